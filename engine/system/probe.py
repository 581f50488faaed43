"""`probe`: which kind of container a file is, by the magic numbers in it. `index_folder`: where an index is.

A qcow2 image has its magic number at byte 0. A store has it in each of its four header copies, and any one of them is
enough, so that damage to the others does not hide the store.
"""

from __future__ import annotations

import os
from typing import Final

from dirtmap.engine.system.file import File, open_file
from dirtmap.fmt import qcow2

# The names in ``--output=json`` and for ``-f``.
QCOW2: Final = "qcow2"
STORE: Final = "dirtmap"
INDEX: Final = "index"


def is_qcow2(file: File) -> bool:
    """True of a qcow2 image. Errors as `File.read`."""
    return file.read(0, len(qcow2.MAGIC)) == qcow2.MAGIC


def is_store(file: File) -> bool:
    """True of a store. Errors as `File.read`."""
    from dirtmap.fmt import store  # imported here, because a command on images does not need it

    copies = range(0, store.RESERVED, store.BLOCK)
    return any(file.read(at, len(store.MAGIC)) in (store.MAGIC, store.EARLIER_MAGIC) for at in copies)


def probe(file: File) -> str | None:
    """The kind of a file: `QCOW2` or `STORE`; None if it is no container.

    Raises:
        StorageError: the file cannot be read.
    """
    return QCOW2 if is_qcow2(file) else STORE if is_store(file) else None


def probe_path(path: str) -> str | None:
    """Like `probe`, for the file at a path.

    Raises:
        StorageError: the file cannot be opened or read.
    """
    with open_file(path) as file:
        return probe(file)


def index_folder(path: str) -> str | None:
    """The folder of an index, from the path of the folder or of the ``data.mdb`` in it; None if there is no index.

    Raises:
        StorageError: the file cannot be opened or read.
    """
    if os.path.isfile(os.path.join(path, "data.mdb")):
        return path
    if os.path.basename(path) == "data.mdb" and os.path.isfile(path) and probe_path(path) is None:
        return os.path.dirname(path) or "."
    return None
