"""The values that all other rooms work on: packed bits, bitmaps, transactions, infos and reports. No I/O."""
