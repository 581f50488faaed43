"""`Clone`: a file as it was at one moment, of which the file system keeps nothing twice that both have."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from typing import Final, Self

from dirtmap.engine.system.file import open_file
from dirtmap.fmt.errors import StorageError, UnsupportedError

# Source: linux/fs.h: _IOW(0x94, 9, int), and _IOW(0x94, 13, struct file_clone_range).
_FICLONE: Final = 0x40049409
_FICLONERANGE: Final = 0x4020940D
_RANGE: Final = struct.Struct("=qQQQ")  # of which file, from where, how long, to where
# How a file system says that it cannot. Source: ioctl_ficlone(2).
_CANNOT: Final = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EXDEV, errno.ENOSYS})
_TRIAL: Final = 1 << 16  # bytes: a multiple of any file system's blocks


class Clone:
    """A clone of a raw disk's file; a context manager. It has no name, so it is gone with whoever has it open.

    It is made in two steps, since the second is to be short. Entering the block makes an empty file beside the disk,
    tries whether the file system can clone at all, and writes the disk's dirty pages back. `take` clones.

    Args:
        path: of the file.

    Attributes:
        path: of the clone, for this process and for those that inherit the descriptor under its number.
        fd: its descriptor.
        source: that of the file.

    Raises:
        UnsupportedError: the file system cannot clone, or this is a block device.
        StorageError: it cannot be opened, or no file can be made beside it.
    """

    def __init__(self, path: str) -> None:
        self._of = os.path.realpath(path)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open_file(self._of))
            if not file.growable:
                raise UnsupportedError(self._of, "a block device, which cannot be cloned")
            self.source = file.fd
            try:
                self.fd = os.open(os.path.dirname(self._of), os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            except OSError as error:
                what = f"cannot be cloned into its folder: {error.strerror}"
                raise StorageError(self._of, what, error.errno) from error
            stack.callback(os.close, self.fd)
            self.path = f"/proc/self/fd/{self.fd}"
            length = _TRIAL if file.size() > _TRIAL else 0  # 0: to the end
            self._clone(_FICLONERANGE, _RANGE.pack(self.source, 0, length, 0))
            file.write_back()  # or else `take` would have to
            self._stack = stack.pop_all()
        return self

    def take(self) -> None:
        """Clones the file as it is now, with what was written to it and is not on the medium yet.

        Raises:
            StorageError: there is no room, or the medium fails.
        """
        self._clone(_FICLONE, self.source)

    def size(self) -> int:
        """In bytes."""
        return os.fstat(self.fd).st_size

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _clone(self, request: int, argument: bytes | int) -> None:
        try:
            fcntl.ioctl(self.fd, request, argument)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise StorageError(self._of, f"cannot be cloned: {error.strerror}", error.errno) from error
            what = f"cannot be cloned ({error.strerror}), as a file on XFS or btrfs can"
            raise UnsupportedError(self._of, what) from error
