"""QEMU's qemu-storage-daemon: started, told over QMP what to open and to serve, and ended with this process.

Used by `dirtmap.tools.export` and `dirtmap.tools.backup`.
"""
