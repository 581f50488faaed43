"""The structures on disk, a module per format: what is declared with construct, and what parses and builds with it.

Names, limits and arithmetic of a format are in the module of the same name in `dirtmap.fmt`, which knows nothing of
construct: import from here only what parses, builds or shows bytes.
"""
