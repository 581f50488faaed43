"""What commands that serve over NBD have in common: where they listen, and how they say that they are ready.

Used by `dirtmap.tools.export` and `dirtmap.tools.serve`, each of which runs a server of its own.
"""
