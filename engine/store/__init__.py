"""The store container: how it is read, changed, checked and shown; `Store` is its face."""
