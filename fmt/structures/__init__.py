"""The structures of each format, declared with construct, and nothing else.

`dirtmap.fmt.generate` makes `dirtmap.fmt.parsers` of them, which is what parses and builds. Nothing but that and the
tests imports this package, or construct.
"""
