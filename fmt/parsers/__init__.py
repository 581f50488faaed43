"""How the structures of each format are parsed and built: plain `struct` code, made by `make parsers`.

The declarations are in the module of the same name in `dirtmap.fmt.structures`, and what the fields mean in that of
`dirtmap.fmt`.
"""
