"""Live files on a tmpfs. Their memory is allocated when they are made; they are mapped, copied and removed here."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import re
import stat
from collections.abc import Callable

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


def create_live(path: str, size: int) -> mmap.mmap:
    """Makes a live file of ``size`` zero bytes, allocates all its memory, and maps it.

    Raises:
        StorageError: it exists, or there is not enough memory.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, size)  # else a mark could end in a SIGBUS, once the tmpfs is full
            return mmap.mmap(fd, size)
        except BaseException:
            os.unlink(path)
            raise
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:
        raise failure(path, "live file", error) from error


def read_live(path: str, sizes_of: Callable[[bytes], tuple[int, int] | None]) -> bytearray | None:
    """The content of a live file. It is copied and not mapped, since a file that shrinks while mapped is a SIGBUS.

    Args:
        path: of the file.
        sizes_of: gets the first 4096 bytes of the file. Returns the size in bytes that such a file must have, and how
            many of them are wanted, from its start; None if it is no live file.

    Returns:
        None if there is no such file, or if it has another size. Then the rest of it is not read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(fd)
            sizes = sizes_of(os.pread(fd, mmap.PAGESIZE, 0)) if stat.S_ISREG(status.st_mode) else None
            if sizes is None or status.st_size != sizes[0]:
                return None
            size = sizes[1]
            data, done = bytearray(size), 0
            while done < size and (step := os.preadv(fd, [memoryview(data)[done:]], done)):
                done += step
            return data if done == size else None
        finally:
            os.close(fd)
    except (OSError, ValueError):
        return None


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
