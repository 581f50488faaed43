"""The live path: marks in memory-mapped bits that outlive the process, and the log that outlives the machine."""
