"""What an image looks like from outside: by this it is known again, and seen to have changed."""

from __future__ import annotations

import os
import stat
import time
import uuid
from contextlib import suppress

from dirtmap.engine.fileio import open_file
from dirtmap.fmt import qcow2
from dirtmap.fmt.errors import StorageError
from dirtmap.fmt.store import Identity, Record

_SECOND_NS = 1_000_000_000
# Linux before 6.13 takes the time of a write from a clock that steps every 1 to 10 ms. Where it has whole seconds, as
# in ext4 with small inodes, or even seconds, as in FAT, that is the step.
_TICK_NS = 20_000_000


def identity_of(path: str) -> Identity:
    """What an image looks like now: a file by inode, size and mtime; a block device by number and size.

    Raises:
        StorageError: it cannot be looked at, or is neither.
    """
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode):
            # Before 1970 the time is negative; it is only ever compared.
            return Identity(status.st_dev, status.st_ino, status.st_mtime_ns % 2**64, status.st_size)
        if stat.S_ISBLK(status.st_mode):
            with open_file(path) as file:
                return Identity(status.st_rdev, 0, 0, file.size())
    except (OSError, ValueError) as error:  # the latter: a path that no file can have
        raise StorageError(path, getattr(error, "strerror", None) or str(error)) from error
    raise StorageError(path, "neither a regular file nor a block device")


def lasting_identity(path: str) -> Identity:
    """As `identity_of`, to be remembered: whoever writes to the image from now on gives it another time.

    A time is only as fine as the clock it is taken from. So this waits until that has moved on since the last write: a
    few milliseconds, and only if the image was written to just before; longer where times are in whole seconds.
    """
    found = identity_of(path)
    tick = _TICK_NS if found.mtime_ns % _SECOND_NS else 2 * _SECOND_NS
    # A time to come is another machine's: what passes here passes there, too.
    age = max(time.time_ns() - found.mtime_ns, 0)
    if found.mtime_ns and age < tick:
        time.sleep((tick - age) / _SECOND_NS)
    return found


def disk_size(path: str) -> int:
    """The size in bytes of the disk that an image holds: as its header says where it is qcow2, else its own.

    Raises:
        StorageError: it cannot be looked at.
    """
    with open_file(path) as file:
        head = file.read(0, qcow2.HEADER_V2.size)
        if head[: len(qcow2.MAGIC)] == qcow2.MAGIC and len(head) == qcow2.HEADER_V2.size:
            return int(qcow2.HEADER_V2.parse(head).size)
        return file.size()


def is_twin(record: Record, path: str) -> bool:
    """True where ``path`` is another file than the one remembered, and that one, or one put in its place, is there.

    If none is, the image was moved.
    """
    here = identity_of(path)
    there = record.identity
    if (here.device, here.inode) == (there.device, there.inode):
        return False
    with suppress(StorageError):
        original = identity_of(os.fsdecode(record.path))
        if (original.device, original.inode) == (there.device, there.inode):
            return True
        return (original.device, original.inode) != (here.device, here.inode) and _carries(record)
    return False


def _carries(record: Record) -> bool:
    """True where the file in a qcow2 image's place has its UUID, as one that was put back from a backup."""
    from dirtmap.engine.qcow2.image import read_identity

    found = read_identity(os.fsdecode(record.path))
    return found is not None and uuid.UUID(found[1]).bytes == record.uuid
