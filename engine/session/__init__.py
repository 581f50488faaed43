"""What a tracker left behind: its live files, its intent log, and what they say about the bitmaps."""
