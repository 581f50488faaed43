"""`place_of`: which file this is, in numbers that outlast a mount, the number of a device, and a boot.

    file system     named by
    ext2, 3, 4      f_fsid of statfs: Linux makes it of the UUID, and tells everybody
    btrfs           f_fsid: of the UUID and the subvolume; a file in a snapshot differs in nothing else
    XFS             its UUID, as XFS_IOC_FSGEOMETRY tells it: its f_fsid is the number of the device
    any other       the number of the device, which does not last

A block device is no file of the file system that its name is on: it is the number of the device, and its medium.

Linux 6.9 has FS_IOC_GETFSUUID. It is not used: on an older kernel the same file would be another one, btrfs has none,
and what overlayfs and tmpfs answer does not last either.

Source: Linux, ``ext4_statfs``, ``btrfs_statfs``, ``xfs_fs_statfs``, ``struct xfs_fsop_geom_v1``; statfs(2), statx(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from functools import cache
from typing import Any

from dirtmap.engine.system.medium import medium_of
from dirtmap.fmt.identity import FilePlace, unnamed_filesystem

_EXT, _BTRFS, _XFS = 0xEF53, 0x9123683E, 0x58465342
_FSID_OF = {_EXT: b"ext4", _BTRFS: b"btrfs"}
_FSID = struct.Struct(">8sQ")

_GEOMETRY = bytes(112)
_XFS_IOC_FSGEOMETRY_V1 = 2 << 30 | len(_GEOMETRY) << 16 | ord("X") << 8 | 100
_XFS_UUID = slice(64, 80)

_AT_EMPTY_PATH = 0x1000
_STATX_BTIME = 0x800
_TIME = struct.Struct("@qI")
_MASK_AT, _BIRTH_AT = 0, 80  # in struct statx, bytes
_ROOM = 256  # bytes: struct statx has as many, struct statfs fewer
_SECOND_NS = 1_000_000_000


def place_of(target: str | int) -> FilePlace:
    """Which file that is, wherever its file system is mounted; of a block device which one, and its medium.

    Args:
        target: a path, or the descriptor of an open file.

    Raises:
        OSError, ValueError: it cannot be looked at.
    """
    if isinstance(target, int):
        return _place(target, target, os.fstat(target))
    return look_at(target)[1]


def look_at(path: str) -> tuple[os.stat_result, FilePlace]:
    """What ``stat`` tells of a file, and which file it is. Errors as `place_of`."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)  # so that both are of one file, whatever is renamed meanwhile
    try:
        status = os.fstat(fd)
        return status, _place(fd, path, status)
    finally:
        os.close(fd)


def _place(fd: int, target: str | int, status: os.stat_result) -> FilePlace:
    if stat.S_ISBLK(status.st_mode):
        return FilePlace(unnamed_filesystem(status.st_rdev), medium_of(status.st_rdev))
    # Asked each time: up to Linux 5.6, overlayfs tells the device and the f_fsid of the file system below it.
    kind, name = _kind(fd), bytes(16)
    if kind == _XFS:
        name = _xfs_uuid(target, status)
    elif kind in _FSID_OF and (fsid := os.statvfs(fd).f_fsid):
        name = _FSID.pack(_FSID_OF[kind], fsid)
    # Zeros are no name: the file system was made without a UUID.
    return FilePlace(name if any(name) else unnamed_filesystem(status.st_dev), status.st_ino, _birth(fd))


def _xfs_uuid(target: str | int, status: os.stat_result) -> bytes:
    """The UUID of the XFS that a file is on. Asks through its folder where the file itself must not be read."""
    if isinstance(target, int):
        return fcntl.ioctl(target, _XFS_IOC_FSGEOMETRY_V1, _GEOMETRY)[_XFS_UUID]
    if stat.S_ISREG(status.st_mode) and (uuid := _asked(target, status.st_dev)):
        return uuid
    if uuid := _asked(os.path.dirname(os.path.realpath(target)), status.st_dev):
        return uuid
    raise PermissionError(errno.EACCES, "neither it nor its folder may be read, to ask for the file system's UUID")


def _asked(path: str, device: int) -> bytes | None:
    """The UUID of the XFS at a path; None where that may not be read, or is on another file system."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except PermissionError:
        return None
    try:
        same = os.fstat(fd).st_dev == device
        return fcntl.ioctl(fd, _XFS_IOC_FSGEOMETRY_V1, _GEOMETRY)[_XFS_UUID] if same else None
    finally:
        os.close(fd)


def _kind(fd: int) -> int:
    """The magic number of the file system that an open file is on."""
    ctypes, libc = _libc()
    room = ctypes.create_string_buffer(_ROOM)
    if libc.fstatfs(fd, room):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(ctypes.c_ulong.from_buffer(room).value)


def _birth(fd: int) -> int:
    """When an open file was made, in ns since 1970, modulo 2**64; 0 where that is not known."""
    ctypes, libc = _libc()
    room = ctypes.create_string_buffer(_ROOM)
    # musl has had it since 2024 only.
    if not hasattr(libc, "statx") or libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_BTIME, room):
        return 0
    if not ctypes.c_uint32.from_buffer(room, _MASK_AT).value & _STATX_BTIME:
        return 0
    seconds, ns = _TIME.unpack_from(room, _BIRTH_AT)
    return int(seconds * _SECOND_NS + ns) % 2**64


@cache
def _libc() -> tuple[Any, Any]:
    """`ctypes`, and the C library: Python has `os.statx` since 3.15, and no statfs. Loaded by who needs it: 2 ms."""
    import ctypes

    return ctypes, ctypes.CDLL(None, use_errno=True)
