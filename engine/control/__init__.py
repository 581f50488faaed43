"""How a tracker is asked from outside: a Unix socket beside the live files, and what is said there.

`server` is in the tracker's process and passes on what is asked; `client` asks; `wire` is what both say. What can be
asked, `dirtmap.engine.tracking.asked` knows.
"""
