"""The index: a cache of what each container of a host said when it was last read, and the last commits seen."""
