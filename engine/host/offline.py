"""`offline`: keeps a disk from being written to while somebody copies or serves it. `lent`: lets one program write."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dirtmap.engine.identity import data_file_of, identity_of, identity_of_disk, lasting_identity
from dirtmap.engine.system import locks
from dirtmap.engine.system.file import open_file
from dirtmap.engine.system.probe import QCOW2
from dirtmap.fmt.errors import LockedError, UnsupportedError

if TYPE_CHECKING:
    from dirtmap.engine.model.infos import Disk
    from dirtmap.engine.system.locks import Locking


@contextlib.contextmanager
def offline(disk: Disk, locking: Locking) -> Iterator[None]:
    """Holds a QEMU reader's locks on all that a guest reads, and compares its looks at the end; see `Host.offline`."""
    # What a raw disk says is its guest's: it names no other file.
    is_qcow2 = disk.format == QCOW2
    data = data_file_of(disk.path) if is_qcow2 else None
    with contextlib.ExitStack() as stack:
        for path in (disk.path, data):
            if path is not None:
                stack.enter_context(locks.keeping(stack.enter_context(open_file(path)), locking=locking))
        before = lasting_identity(disk.path, of_disk=is_qcow2)
        yield
        if (identity_of_disk if is_qcow2 else identity_of)(disk.path) != before:
            raise LockedError(disk.path, "was written to, changed or replaced while it was to stay as it was")


@contextlib.contextmanager
def lent(disk: Disk, locking: Locking) -> Iterator[int]:
    """Holds a QEMU writer's locks on a raw disk for another program; see `Host.lent`."""
    if disk.format == QCOW2:
        raise UnsupportedError(disk.path, "a qcow2 image is locked by what writes it")
    with open_file(disk.path, writable=True) as file:
        locks.lend(file, locking=locking)
        yield file.fd
