"""A qcow2 file, byte by byte: how it is read, changed, checked and shown. It knows nothing of stores."""
