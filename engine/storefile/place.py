"""Where the file of a store is, as its header says it: a copy of the file has the same header, and is elsewhere."""

from __future__ import annotations

from dirtmap.engine.system.file import File
from dirtmap.fmt.identity import FilePlace


def is_elsewhere(said: FilePlace, file: File) -> bool | None:
    """Whether a store's file is another than the one that its last commit was written to.

    Args:
        said: what its header says.
        file: it.

    Returns:
        None where that cannot be told: the file system has another name now, and had none that lasts.

    Raises:
        StorageError: the file cannot be looked at.
    """
    now = file.place()
    if said.filesystem != now.filesystem:
        return True if said.is_lasting and now.is_lasting else None
    return said.inode != now.inode or (said.birth != now.birth and bool(said.birth and now.birth))
