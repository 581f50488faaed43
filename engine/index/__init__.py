"""The index: a cache, across a host, of what each container said when it was last read."""
