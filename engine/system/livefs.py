"""Live files on a tmpfs. Their memory is allocated when they are made; they are mapped, copied and removed here."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import struct
from collections.abc import Sequence

from dirtmap.engine.system.file import failure
from dirtmap.fmt.errors import StorageError


def make_live_folder(path: str) -> None:
    """Makes a folder for live files, to which only this user has access. An existing one has to be such a folder.

    Raises:
        StorageError: it cannot be made, belongs to another user, or others have access to it.
    """
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        status = os.lstat(path)
    except (OSError, ValueError) as error:
        raise failure(path, "live folder", error) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise StorageError(path, "not a folder that belongs to this user alone")


def create_live(path: str, data: bytes, size: int, more: Sequence[tuple[int, int]] = ()) -> None:
    """Makes a live file of ``size`` bytes that begins with ``data``. The rest are zeros.

    Memory is allocated for ``data`` and for the parts in ``more``, offsets and lengths in bytes, else a mark could end
    in a SIGBUS, once the tmpfs is full. Whoever uses other parts allocates them first.

    Raises:
        StorageError: it exists, or there is not enough memory.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, size)
            for offset, length in [(0, len(data)), *more]:
                if length:
                    os.posix_fallocate(fd, offset, length)
            os.pwrite(fd, data, 0)
        except BaseException:
            os.unlink(path)
            raise
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:
        raise failure(path, "live file", error) from error


class LiveReader:
    """Reads a live file. It is copied and not mapped, since a file that shrinks while mapped is a SIGBUS.

    Attributes:
        size: of the file when it was opened or last read, bytes; 0 if there is none.
    """

    def __init__(self, path: str) -> None:
        self._fd, self.size = -1, 0
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            status = os.fstat(self._fd)
            self.size = status.st_size
            if not stat.S_ISREG(status.st_mode):
                self.close()
        except (OSError, ValueError):
            self.close()
            self.size = 0

    def read(self, offset: int, length: int, *, short: bool = False) -> memoryview | None:
        """That part of the file; None if the file ends before, unless it may be ``short``."""
        if self._fd < 0:
            return None
        try:
            self.size = os.fstat(self._fd).st_size
            length = max(min(length, self.size - offset), 0) if short else length
            if offset + length > self.size:
                return None
            data, done = bytearray(length), 0
            while done < length and (step := os.preadv(self._fd, [memoryview(data)[done:]], offset + done)):
                done += step
        except (OSError, ValueError, OverflowError, MemoryError):
            return None
        return memoryview(data) if done == length else None

    def data_from(self, offset: int, end: int) -> int:
        """Where the first data can be from ``offset`` on; ``end`` if not before. What is skipped is a hole: zeros."""
        if self._fd < 0 or offset >= end:
            return end
        try:
            return min(os.lseek(self._fd, offset, os.SEEK_DATA), end)
        except OSError as error:
            return end if error.errno == errno.ENXIO else offset  # ENXIO: a hole up to the end of the file

    def close(self) -> None:
        """Closes it."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> LiveReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def hold_live_folder(path: str) -> int | None:
    """Locks a folder for live files.

    Returns:
        A descriptor, whose closing gives up the lock; None if another process has it.

    Raises:
        StorageError: it cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.lstat(path)):  # whoever had the lock may have removed the folder
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
    except (BlockingIOError, FileNotFoundError):
        pass
    except (OSError, ValueError) as error:
        raise failure(path, "live folder", error) from error
    return None


def is_locked(path: str, length: int) -> bool:
    """True if a process has a lock on one of the first bytes of a file; False if there is no such file."""
    request = struct.pack("@hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, length, 0)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request)
        finally:
            os.close(fd)
    except (OSError, ValueError):
        return False
    return bool(struct.unpack("@hhqqi", answer)[0] != fcntl.F_UNLCK)


def remove_live_files(path: str, pattern: re.Pattern[str], *, keep_folder: bool) -> None:
    """Removes the files in a folder whose names match a pattern. Then removes the folder, if it is empty.

    Args:
        path: of the folder.
        pattern: of the whole names of live files.
        keep_folder: leaves the folder there.
    """
    with contextlib.suppress(OSError):
        for name in os.listdir(path):
            if pattern.fullmatch(name):
                os.unlink(os.path.join(path, name))
        if not keep_folder:
            os.rmdir(path)
