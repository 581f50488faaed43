"""Which kind of container a file is, by the magic numbers in it, and where an index is.

An image has its magic at byte 0; a store in each of its four header copies, any of which is enough: damage to one must
not hide a store.
"""

from __future__ import annotations

import os
from typing import Final

from dirtmap.engine.system.file import File, open_file
from dirtmap.fmt import qcow2

# As ``--output=json`` and ``-f`` call them.
QCOW2: Final = "qcow2"
STORE: Final = "dirtmap"
INDEX: Final = "index"


def is_qcow2(file: File) -> bool:
    """True of a qcow2 image. Errors as `File.read`."""
    return file.read(0, len(qcow2.MAGIC)) == qcow2.MAGIC


def is_store(file: File) -> bool:
    """True of a store. Errors as `File.read`."""
    from dirtmap.fmt import store  # of no use to whoever has images only

    copies = range(0, store.RESERVED, store.BLOCK)
    return any(file.read(at, len(store.MAGIC)) in (store.MAGIC, store.EARLIER_MAGIC) for at in copies)


def probe(file: File) -> str | None:
    """`QCOW2`, `STORE`, or None: no container.

    Raises:
        StorageError: cannot be read.
    """
    return QCOW2 if is_qcow2(file) else STORE if is_store(file) else None


def probe_path(path: str) -> str | None:
    """As `probe`, of the file at that path.

    Raises:
        StorageError: cannot be opened or read.
    """
    with open_file(path) as file:
        return probe(file)


def index_folder(path: str) -> str | None:
    """The folder of the index at that path, or of which it is the ``data.mdb``; None where there is no index.

    Raises:
        StorageError: cannot be opened or read.
    """
    if os.path.isfile(os.path.join(path, "data.mdb")):
        return path
    if os.path.basename(path) == "data.mdb" and os.path.isfile(path) and probe_path(path) is None:
        return os.path.dirname(path) or "."
    return None
