"""The file formats: what bytes on disk mean. No I/O, no state, and no import of `dirtmap.engine` or `dirtmap.tools`.

A module for each format (`qcow2`, `store`, `live`, `index`, `lmdb`, and the parts that several share: `directory`,
`extensions`) has its names, limits and arithmetic. Its structures are declared in `dirtmap.fmt.structures`.
"""
