"""A store file, byte by byte: its headers, namespace table, space map and directories. It knows nothing of qcow2."""
