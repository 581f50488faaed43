"""Where the file of a store is, as its header says it: a copy of the file has the same header, and is elsewhere."""

from __future__ import annotations

from dirtmap.engine.system.file import File
from dirtmap.fmt.store import Place


def place_of(file: File) -> Place:
    """Where a file is. The file system is called by its device number, which does not outlast its mount."""
    return Place(bytes(8) + file.status.st_dev.to_bytes(8, "big"), file.status.st_ino, 0)
