"""The values that everything else is about: bits, bitmaps, transactions, reports. No I/O."""
