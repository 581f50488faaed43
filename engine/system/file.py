"""`File`: the one seam through which every byte reaches a disk. It reads, writes, syncs and locks.

The engine opens files with `open_file` only. Tests replace `File` by a subclass, with `using`, which records what the
engine does, or fails, or reorders it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import threading
import time
import weakref
from collections.abc import Iterator, Sequence

from dirtmap.engine.system.filesystem import place_of
from dirtmap.engine.system.mounts import file_system
from dirtmap.fmt.errors import StorageError, SyncError, errno_of
from dirtmap.fmt.identity import FilePlace
from dirtmap.fmt.spelling import spellings

# struct flock of Linux: type, whence, start, length, pid.
_FLOCK = struct.Struct("@hhqqi")
MOST = 2**63 - 1  # the last offset that a file can have
_TOGETHER = 512  # places that `File.with_data` skips at once, where all of them lie in one hole


_NOBODYS = 2**40 + 1  # a byte that is locked only to see whether locks work
# What `File.lock_fault` has found, and until when that is believed, by the number of the file system.
_lock_faults: dict[int, tuple[str | None, float]] = {}
_NO_LOCKS = {errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.ENOSYS}

# The errors of system calls; of an offset from 2**63 on; and of a path that no file can have.
FAILURES = (OSError, OverflowError, ValueError)


class File:
    """An open image file or block device.

    Offsets and lengths are bytes. Every operating-system error becomes a `StorageError` that names the file.
    After a failed sync the handle is poisoned: the kernel may have dropped the data it could not write and will call
    the next sync a success, so nothing is retried and every later write or sync fails.

    A lock belongs to what was opened, which a forked child shares. So in the child a file that is open for writing is
    given up, as if it was closed: the change that is being made is the parent's, and its lock ends with the parent. A
    file that is open for reading is opened anew, and has the child's locks alone.

    Attributes:
        path: as messages name it.
        abspath: the absolute path, because the process may change its working folder.
        unshared: whoever opened it knows that nobody else uses it, where locks cannot tell.
    """

    unshared = False
    _place: FilePlace | None = None
    _beside: dict[int, int]  # how many hold the lock on each byte that `lock_beside` takes

    def __init__(self, path: str, *, writable: bool = False, create: bool = False) -> None:
        self.path = path
        self._writable = writable
        self._poisoned: str | None = None
        self._left = False
        self._guard, self._beside = threading.RLock(), {}
        # O_NONBLOCK: a FIFO given as an image must not block the open; it means nothing for files and disks.
        mode = os.O_RDWR if writable else os.O_RDONLY
        mode |= os.O_CREAT | os.O_EXCL if create else 0
        try:
            self.abspath = os.path.abspath(path)
            self.fd = os.open(path, mode | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, 0o600)
            self.status = os.fstat(self.fd)
        except FAILURES as error:
            raise self._failed("open", error) from error
        if not (stat.S_ISREG(self.status.st_mode) or stat.S_ISBLK(self.status.st_mode)):
            os.close(self.fd)
            raise StorageError(path, "neither a regular file nor a block device")

    @property
    def growable(self) -> bool:
        """True if writing past the end makes the file longer, which it does not on a block device."""
        return stat.S_ISREG(self.status.st_mode)

    def close(self) -> None:
        """Closes the descriptor. Every lock that was taken through it is given up with it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _fork(self) -> None:
        """In a forked child: gives up what is the parent's."""
        self._guard, self._beside = threading.RLock(), {}  # of threads that are not in it
        if self.fd < 0:
            return
        if self._writable:
            self._left = True
            self.close()
            return
        # Where that is refused, as without /proc, the file stays shared: a writer may wait for the child's end.
        with contextlib.suppress(OSError):
            fresh = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
            try:
                os.dup2(fresh, self.fd, inheritable=False)
            finally:
                os.close(fresh)

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def size(self) -> int:
        """The present length of the file or the device, in bytes."""
        try:
            return os.lseek(self.fd, 0, os.SEEK_END)
        except FAILURES as error:
            raise self._failed("size", error) from error

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``; fewer only if the file ends before that."""
        if offset > MOST:
            return b""
        try:
            data = os.pread(self.fd, length, offset)
            if len(data) == length or not data:
                return data
            parts = [data]
            done = len(data)
            while done < length and (data := os.pread(self.fd, length - done, offset + done)):
                parts.append(data)
                done += len(data)
            return b"".join(parts)
        except FAILURES as error:
            raise self._failed("read", error) from error

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Reads into ``buffer`` from ``offset`` on, until it is full.

        Raises:
            StorageError: the file ends before it is full.
        """
        try:
            done = 0
            while done < len(buffer) and (step := os.preadv(self.fd, [buffer[done:]], offset + done)):
                done += step
        except FAILURES as error:
            raise self._failed("read", error) from error
        if done < len(buffer):
            raise StorageError(self.path, f"ends before byte {offset + len(buffer):#x}")

    def read_exactly(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``.

        Raises:
            StorageError: the file ends before them.
        """
        data = self.read(offset, length)
        if len(data) < length:
            raise StorageError(self.path, f"ends before byte {offset + length:#x}")
        return data

    def has_data(self, offset: int, length: int) -> bool:
        """False if the range is known to be a hole, which reads as zeros. True if that is not known."""
        try:
            return offset <= MOST and os.lseek(self.fd, offset, os.SEEK_DATA) < offset + length
        except OSError as error:
            return error.errno != errno.ENXIO  # ENXIO: nothing but a hole up to the end of the file

    def with_data(self, offsets: Sequence[int], length: int) -> Iterator[int]:
        """The indexes of those ``offsets`` at which ``length`` bytes are not just a hole. The offsets are ascending."""
        for first in range(0, len(offsets), _TOGETHER):
            last = min(first + _TOGETHER, len(offsets)) - 1
            if self.has_data(offsets[first], offsets[last] + length - offsets[first]):
                yield from (at for at in range(first, last + 1) if self.has_data(offsets[at], length))

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Writes all of ``data`` at ``offset``. It is durable only after the next `sync`."""
        self._refuse_if_poisoned()
        view = memoryview(data).cast("B")
        try:
            while len(view):
                done = os.pwrite(self.fd, view, offset)
                offset += done
                view = view[done:]
        except FAILURES as error:
            raise self._failed("write", error) from error

    def truncate(self, size: int) -> None:
        """Cuts the file to ``size`` bytes."""
        self._refuse_if_poisoned()
        try:
            os.ftruncate(self.fd, size)
        except FAILURES as error:
            raise self._failed("truncate", error) from error

    def belong_as(self, other: File) -> None:
        """Gives the file the owner, the group and the mode of another.

        Raises:
            StorageError: only root may.
        """
        try:
            owner = other.status.st_uid, other.status.st_gid
            if owner != (self.status.st_uid, self.status.st_gid):
                os.fchown(self.fd, *owner)
            os.fchmod(self.fd, other.status.st_mode & 0o777)
        except FAILURES as error:
            raise self._failed("owner and mode of the old file", error) from error

    def sync(self) -> None:
        """Makes everything durable that was written before.

        Raises:
            SyncError: it is not known to be durable. The handle is poisoned.
        """
        self._refuse_if_poisoned()
        try:
            os.fdatasync(self.fd)
        except FAILURES as error:
            failed = self._failed("sync", error)
            self._poisoned = str(failed)
            raise SyncError(failed.where, failed.what, failed.errno) from error

    def write_back(self) -> None:
        """Makes durable what others have written to the file, so that the kernel notices when they write again.

        Raises:
            StorageError: the system call failed. The handle is not poisoned.
        """
        try:
            os.fdatasync(self.fd)
        except FAILURES as error:
            raise self._failed("write back", error) from error

    def lock(self, offset: int) -> None:
        """Takes a shared open-file-description lock on one byte. Does not wait; QEMU takes shared ones only."""
        try:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, offset, 1, 0))
        except FAILURES as error:
            raise self._failed("lock", error) from error

    def unlock(self, offset: int) -> None:
        """Gives up the lock on that byte; a file that is closed has none."""
        if self.fd < 0:
            return
        try:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, offset, 1, 0))
        except FAILURES as error:
            raise self._failed("unlock", error) from error

    def lock_alone(self, offset: int) -> bool:
        """Takes an exclusive open-file-description lock on one byte; False if someone else has a lock on it."""
        try:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0))
        except (BlockingIOError, PermissionError):
            return False
        except FAILURES as error:
            raise self._failed("lock", error) from error
        return True

    def lock_fault(self) -> str | None:
        """Why not all who have the file open see its locks, with the type of the file system; None if all see them.

        What was found is believed of the same file system for a second: whoever lists thousands of images would spend a
        quarter of the time on it.
        """
        now = time.monotonic()
        found, until = _lock_faults.get(self.status.st_dev, (None, now))
        if now >= until:
            found = self._look_for_locks()
            _lock_faults[self.status.st_dev] = found, now + 1
        return found

    def _look_for_locks(self) -> str | None:
        kind, private = file_system(self.status.st_dev)
        if private is not None:
            return f"on {kind} with the mount option '{private}', which keeps locks to this machine"
        try:
            for lock in (fcntl.F_RDLCK, fcntl.F_UNLCK):
                request = _FLOCK.pack(lock, os.SEEK_SET, _NOBODYS, 1, 0)
                fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, request)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise self._failed("lock", error) from error
            return f"on {kind}, which has no such locks ({error.strerror})"
        return None

    def lock_beside(self, offset: int) -> bool:
        """Takes a shared open-file-description lock on one byte; False if someone else has an exclusive one.

        Threads that share this `File` share the lock. The last `unlock_beside` gives it up.
        """
        with self._guard:
            try:
                fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, offset, 1, 0))
            except (BlockingIOError, PermissionError):
                return False
            except FAILURES as error:
                raise self._failed("lock", error) from error
            self._beside[offset] = self._beside.get(offset, 0) + 1
            return True

    def unlock_beside(self, offset: int) -> None:
        """Gives up the lock that one `lock_beside` has taken."""
        with self._guard:
            self._beside[offset] = left = max(0, self._beside.get(offset, 0) - 1)
            if not left:
                self.unlock(offset)

    def locked_by_other(self, offset: int, length: int = 1) -> bool:
        """True if another open file description has a lock on any of ``length`` bytes from ``offset`` on."""
        request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, length, 0)
        try:
            answer = fcntl.fcntl(self.fd, fcntl.F_OFD_GETLK, request)
        except FAILURES as error:
            raise self._failed("lock", error) from error
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)

    def modified(self) -> int:
        """When the file was last written to, ns since 1970. Before Linux 6.13 that clock steps by up to 10 ms."""
        try:
            return os.fstat(self.fd).st_mtime_ns
        except FAILURES as error:
            raise self._failed("stat", error) from error

    def place(self) -> FilePlace:
        """Which file this is; see `dirtmap.engine.system.filesystem`. Looked at once: an open file stays the same.

        Raises:
            StorageError: it cannot be looked at.
        """
        if self._place is None:
            try:
                self._place = place_of(self.fd)
            except FAILURES as error:
                raise self._failed("look at its file system", error) from error
        return self._place

    def take_place_of(self, other: File) -> None:
        """Believes what another open file knows of its place, where both are the same file."""
        if other.fd >= 0 and other._place is not None and os.path.samestat(self.status, other.status):
            self._place = other._place

    def is_current(self) -> bool:
        """True while the path still leads to this file. A lock stays with the inode, but a rename moves the name."""
        try:
            now = os.stat(self.abspath)
        except OSError:
            return False
        return (now.st_dev, now.st_ino) == (self.status.st_dev, self.status.st_ino)

    def _refuse_if_poisoned(self) -> None:
        if self._poisoned:
            raise StorageError(self.path, f"not used any more after a failed sync ({self._poisoned})")

    def _failed(self, action: str, error: Exception) -> StorageError:
        if self._left:
            return StorageError(self.path, f"{action}: open in the process that this one was forked from, and not here")
        return failure(self.path, action, error)


def failure(path: str, action: str, error: Exception) -> StorageError:
    """The error for an action that the operating system refused."""
    return StorageError(path, f"{action}: {getattr(error, 'strerror', None) or error}", errno_of(error))


_factory: type[File] = File


def open_file(path: str, *, writable: bool = False, create: bool = False, abspath: str | None = None) -> File:
    """Opens ``path``; with ``create``, makes it, readable by its owner only.

    Args:
        path: of the file, also in messages.
        writable: opens it for writing as well.
        create: makes the file, which must not exist.
        abspath: the absolute path of the file, if its path may lead elsewhere by now; see `File`.

    Raises:
        StorageError: it cannot be opened, is neither a regular file nor a block device, or exists despite ``create``.
    """
    with _opening:
        file = _factory(abspath or path, writable=writable, create=create)
        _open.add(file)
    file.path = path
    return file


# The guard is a leaf of the lock order, and held for an open only: no child is forked between the open and the note of
# it. It is reentrant, for a fork in a signal's handler.
_open: weakref.WeakSet[File] = weakref.WeakSet()
_opening = threading.RLock()


def _after_fork_in_child() -> None:
    for file in list(_open):
        file._fork()
    _opening.release()


os.register_at_fork(before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_after_fork_in_child)


def make_folder_of(path: str, where: str) -> None:
    """Makes the folder of the file ``path``, if it is missing, with access for its owner only.

    Args:
        path: of the file, absolute.
        where: how messages name the file.

    Raises:
        StorageError: it cannot be made.
    """
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    except (OSError, ValueError) as error:
        raise StorageError(where, getattr(error, "strerror", None) or str(error), errno_of(error)) from error


def sync_folder(path: str) -> None:
    """Makes the creation, renaming or removal of the file ``path`` durable."""
    try:
        fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise failure(path, "sync of its folder", error) from error


def rename_file(old: str, new: str) -> None:
    """Gives the file ``old`` the name ``new``; durable after `sync_folder` of both."""
    try:
        os.replace(old, new)
    except OSError as error:
        raise failure(old, "rename", error) from error


def replace_file(new: str, old: str) -> None:
    """Renames the file ``new`` to ``old``, which it replaces. The rename is durable on return."""
    rename_file(new, old)
    sync_folder(old)


def room_at(path: str) -> int:
    """How many bytes are free for a new file at ``path``.

    Raises:
        StorageError: its folder cannot be looked at.
    """
    try:
        status = os.statvfs(os.path.dirname(path) or ".")
    except (OSError, ValueError) as error:
        raise StorageError(path, getattr(error, "strerror", None) or str(error), errno_of(error)) from error
    return status.f_bavail * status.f_frsize


def is_gone(path: str) -> bool:
    """True if there is nothing at a path. False if that is not known, as in a folder that this user cannot search."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        pass
    return False


def existing(path: str) -> str:
    r"""The path of what is there: this very text, or else what JSON shows as this text, with ``\xff`` for a byte.

    Where neither is there, the text itself.
    """
    return next((found for found in spellings(path) if os.path.lexists(found)), path)


def is_same_file(one: str | bytes, other: str | bytes) -> bool:
    """True if both paths lead to one file. False if that is not known."""
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return False


def remove_file(path: str) -> None:
    """Removes a file that this process has made, if it is still there."""
    with contextlib.suppress(OSError):
        os.unlink(path)


@contextlib.contextmanager
def using(factory: type[File]) -> Iterator[None]:
    """For tests: until the end of the block `open_file` makes files of this class."""
    global _factory
    previous, _factory = _factory, factory
    try:
        yield
    finally:
        _factory = previous
