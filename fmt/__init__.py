"""The file formats: what bytes on disk mean. No I/O, no state, and no import of `dirtmap.engine` or `dirtmap.tools`.

A module for each format (`qcow2`, `store`, `live`, `index`, `lmdb`, and the parts that several share: `directory`,
`extensions`) has its names, limits and arithmetic, and parses and builds it.
Its structures are declared in `dirtmap.fmt.structures`; what reads and writes a single one is made of that, and in
`dirtmap.fmt.parsers`.
"""
