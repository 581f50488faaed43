"""The structures of each format, declared with construct, and the functions that parse and build them.

The names, limits and arithmetic of a format are in the module of the same name in `dirtmap.fmt`. Those modules do not
import construct. Import from this package only to parse, build or show bytes.
"""
