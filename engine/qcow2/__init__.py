"""The qcow2 container: how it is read, changed, checked and shown; `Image` is its face."""
