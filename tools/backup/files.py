"""The repository's files, as far as QEMU does not write them: made, synced, renamed, removed and locked.

Every act that changes the disk passes through `_act`, where tests end the process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from dirtmap.fmt.errors import LockedError, StorageError

_PAUSE_SECONDS = 0.02
_TOGETHER = 8 << 20  # bytes that the kernel is asked to write at a time
_BEHIND = 8  # times as many, in which it is expected to have written them
TEMPORARY = ".tmp"  # of files that are being written: whoever has the lock may remove what is left of them


@contextlib.contextmanager
def failing(path: str) -> Iterator[None]:
    """Makes what the operating system says an error that names the file.

    Raises:
        StorageError: in place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(path, error.strerror or str(error), error.errno) from error


@contextlib.contextmanager
def _act(what: str, path: str) -> Iterator[None]:
    """One act that changes the disk; ``what`` tells tests which."""
    with failing(path):
        yield


class Answer(NamedTuple):
    """What was read from a file; see `dirtmap.tools.backup.copying.Answer`."""

    data: bytearray
    empty: bool = False


class Buffers:
    """Memory for what is read, that is used again: a kernel takes as long to give new one as to read a file into it.

    Args:
        length: of those that are kept, bytes.
    """

    def __init__(self, length: int) -> None:
        self._length, self._free = length, list[bytearray]()

    def take(self, length: int) -> bytearray:
        """So many bytes, whatever they are."""
        return self._free.pop() if length == self._length and self._free else bytearray(length)

    def give(self, data: bytearray | memoryview) -> None:
        """Takes back what nobody needs any more."""
        if isinstance(data, bytearray) and len(data) == self._length:
            self._free.append(data)


class Reading:
    """A file or block device that is read. Threads may share it.

    Attributes:
        size: when it was opened, bytes.
        identity: what no other file has at the same time.
        opened: a path that leads to what was opened, in this process, wherever its own path leads by now.

    Raises:
        StorageError: it cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        with failing(path):
            self._number = os.open(path, os.O_RDONLY)
            self.size = os.lseek(self._number, 0, os.SEEK_END)
            found = os.fstat(self._number)
        self.identity = found.st_dev, found.st_ino
        self.opened = f"/proc/self/fd/{self._number}"

    def close(self) -> None:
        """Closes it."""
        os.close(self._number)

    def read(self, offset: int, length: int) -> bytearray:
        """Exactly these bytes.

        Raises:
            StorageError: they cannot be read, or end before.
        """
        data = bytearray(length)
        self.read_into(memoryview(data), offset)
        return data

    def read_into(self, view: memoryview, offset: int) -> None:
        """Reads as many bytes as ``view`` has. Errors as `read`."""
        end = offset + len(view)
        while view:
            with failing(self._path):
                got = os.preadv(self._number, [view], end - len(view))
            if not got:
                raise StorageError(self._path, f"ends before {end}")
            view = view[got:]

    def read_as_zeros_behind(self, view: memoryview, offset: int) -> None:
        """Reads as many bytes as ``view`` has, which are zeros behind the end of the file. Errors as `read`."""
        there = min(len(view), max(0, self.size - offset))
        self.read_into(view[:there], offset)
        view[there:] = bytes(len(view) - there)

    def ask(self, offset: int, length: int) -> None:
        """Lets the kernel begin to read bytes that are needed soon."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._number, offset, length, os.POSIX_FADV_WILLNEED)

    def run(self, offset: int, end: int) -> tuple[bool, int]:
        """Whether there is a hole, and where that, or else the data there, end; ``end`` at most."""
        try:
            data = os.lseek(self._number, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end of the file
                return True, end
            return False, end  # a block device, or a file system that does not tell
        if data > offset:
            return True, min(data, end)
        return False, min(os.lseek(self._number, offset, os.SEEK_HOLE), end)


class Writing:
    """A new file that is written at any place.

    Args:
        path: of the file, which is not there.
        size: bytes; all of it is a hole.

    Raises:
        StorageError: it cannot be made.
    """

    def __init__(self, path: str, size: int) -> None:
        self._path = path
        with _act("make", path):
            self._number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            os.ftruncate(self._number, size)
        self._fresh, self._last = 0, 0  # bytes that the kernel was not asked to write yet, and the end of the last ones
        self._begun = deque([0], _BEHIND)  # where these begin, and where those before them did

    def close(self) -> None:
        """Closes it."""
        os.close(self._number)

    def write(self, offset: int, data: memoryview) -> None:
        """Writes all of the data.

        Raises:
            StorageError: they cannot be written.
        """
        begun = offset
        with _act("write", self._path):
            while data:
                done = os.pwrite(self._number, data, offset)
                data, offset = data[done:], offset + done
        self._fresh += offset - begun
        self._begun[-1], self._last = min(self._begun[-1], begun), max(self._last, offset)
        if self._fresh >= _TOGETHER:
            self._pass_on()

    def _pass_on(self) -> None:
        """Asks the kernel to begin to write what is new, so that `sync` has the less to wait for.

        And to forget what it has written by now: nobody reads it soon, others need what it would push out, and a kernel
        takes longer to get memory than to fill it, much longer where a hypervisor has taken that back.
        """
        with contextlib.suppress(OSError):
            first = min(self._begun)
            os.posix_fadvise(self._number, first, self._last - first, os.POSIX_FADV_DONTNEED)
        self._fresh = 0
        self._begun.append(self._last)

    def set_size(self, size: int) -> None:
        """Makes it so long, in bytes."""
        with _act("set size", self._path):
            os.ftruncate(self._number, size)

    def sync(self) -> None:
        """Makes it durable."""
        with _act("sync", self._path):
            os.fsync(self._number)


def make_folder(path: str) -> bool:
    """Makes a folder durably, if it is not there, for its owner alone: disks have secrets. Returns whether it did."""
    if os.path.isdir(path):
        return False
    with _act("make folder", path):
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            return False
    sync_folder_of(path)
    return True


def remove_folder(path: str) -> None:
    """Removes a folder durably; one that has files stays."""
    with contextlib.suppress(StorageError), _act("remove folder", path):
        os.rmdir(path)
    sync_folder_of(path)


def touch(path: str) -> None:
    """Makes an empty file durably, if there is none."""
    with _act("make", path):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))
    sync_folder_of(path)


def write(path: str, parts: Iterable[bytes]) -> None:
    """Writes a new file, wholly or not at all, and durably.

    Args:
        path: of the file; one that is there is replaced.
        parts: of its content, taken one after the other.
    """
    temporary = path + TEMPORARY
    with failing(temporary), contextlib.ExitStack() as stack:  # closing it may write, too
        with _act("make", temporary):
            file = stack.enter_context(open(temporary, "wb"))
        with _act("write", temporary):
            for part in parts:
                file.write(part)
            file.flush()
        with _act("sync", temporary):
            os.fsync(file.fileno())
    rename(temporary, path)


def sync(path: str) -> None:
    """Makes the content of a file durable that another process has written."""
    with _act("sync", path), open(path, "rb") as file:
        os.fsync(file.fileno())


def rename(old: str, new: str) -> None:
    """Renames a file within its folder, durably; one that has the new name is replaced."""
    with _act("rename", new):
        os.rename(old, new)
    sync_folder_of(new)


def remove(path: str) -> None:
    """Removes a file durably, if it is there."""
    with _act("remove", path), contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sync_folder_of(path)


def discard(path: str) -> None:
    """Removes a temporary file, if it is there and that can be done; else whoever has the lock next does."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def sync_folder_of(name: str) -> None:
    """Makes the names durable in the folder that a file is in."""
    path = os.path.dirname(os.path.abspath(name))
    with _act("sync folder", path):
        number = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


@contextlib.contextmanager
def unused_device(path: str) -> Iterator[int]:
    """Keeps the kernel from mounting a block device, or using it otherwise, until the block ends; yields its bytes.

    Raises:
        StorageError: it is in use, as when it is mounted.
    """
    with failing(path):
        number = os.open(path, os.O_RDWR | os.O_EXCL)
    try:
        yield os.lseek(number, 0, os.SEEK_END)
    finally:
        os.close(number)


@contextlib.contextmanager
def locked(path: str, *, shared: bool, wait: float) -> Iterator[None]:
    """Holds the lock of a file, for the time of the block; the process's end gives it up, too.

    Args:
        path: of the file, which has nothing in it. Where it is not there, as copies may lack it, whoever does not
            share it makes it.
        shared: others may share it.
        wait: seconds to wait for others.

    Raises:
        LockedError: somebody else has it.
    """
    deadline = time.monotonic() + wait
    with failing(path):
        number = os.open(path, os.O_RDONLY if shared else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        while True:
            try:
                with failing(path):
                    fcntl.flock(number, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except StorageError as error:
                if not isinstance(error.__cause__, BlockingIOError):
                    raise
            if time.monotonic() > deadline:
                raise LockedError(path, "the repository is in use by another process")
            time.sleep(_PAUSE_SECONDS)
        yield
    finally:
        os.close(number)
