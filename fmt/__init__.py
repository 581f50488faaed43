"""What bytes mean: no I/O, no state. Imports nothing of dirtmap's other rooms."""
