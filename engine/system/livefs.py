"""Live files on a tmpfs: made with their space, mapped, read by others, and removed."""

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
    """Makes a folder for live files, which only this user can look into; one that is there has to be like that.

    Raises:
        StorageError: it cannot be made, or is somebody else's, or open to others.
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
    """Makes a live file of ``size`` zeros, all of which have their memory, and maps it.

    Raises:
        StorageError: it exists, or there is no room.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, size)  # else a full tmpfs would be a SIGBUS at some mark
            return mmap.mmap(fd, size)
        except BaseException:
            os.unlink(path)
            raise
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:
        raise failure(path, "live file", error) from error


def read_live(path: str, sizes_of: Callable[[bytes], tuple[int, int] | None]) -> bytearray | None:
    """A live file as it is now. Copied, not mapped: nobody can cut it off under us.

    Args:
        path: of the file.
        sizes_of: which size, in bytes, a file with these first 4096 bytes has to have, and how much of it is wanted,
            from its start; None: it is none.

    Returns:
        None where there is none, or where it has another size: then the rest of it is not read.
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
    """Takes a folder for live files for this process, until the descriptor is closed; None where another has it.

    Raises:
        StorageError: it cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.lstat(path)):  # whoever had it may just have removed it
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
    """Removes the live files in a folder, by their names, and the folder, unless something else is in it."""
    with contextlib.suppress(OSError):
        for name in os.listdir(path):
            if pattern.fullmatch(name):
                os.unlink(os.path.join(path, name))
        if not keep_folder:
            os.rmdir(path)
