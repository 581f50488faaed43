"""The one seam through which every byte reaches a disk: read, write, sync, lock.

The engine opens files with `open_file` only. Tests put a subclass of `File` in its place with `using`, to record,
fail or reorder what the engine does.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Sequence

from dirtmap.engine.system.mounts import file_system
from dirtmap.fmt.errors import StorageError, SyncError, errno_of

# struct flock of Linux: type, whence, start, length, pid.
_FLOCK = struct.Struct("@hhqqi")
MOST = 2**63 - 1  # the last offset that a file can have
_TOGETHER = 512  # places that `File.with_data` skips at once, where all of them lie in one hole


_NOBODYS = 2**40 + 1  # a byte that nobody locks but to see whether locks work
_NO_LOCKS = {errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.ENOSYS}

# What the operating system refuses; an offset past 2**63, a path that no file can have.
_FAILURES = (OSError, OverflowError, ValueError)


class File:
    """An open image file or block device.

    Offsets and lengths are bytes. Every operating-system error becomes a `StorageError` that names the file.
    After a failed sync the handle is poisoned: the kernel may have dropped the data it could not write and will call
    the next sync a success, so nothing is retried and every later write or sync fails.

    Attributes:
        path: as messages name it.
        abspath: absolute: the process may change its folder.
    """

    def __init__(self, path: str, *, writable: bool = False, create: bool = False) -> None:
        self.path = path
        self._poisoned: str | None = None
        self._guard, self._beside = threading.RLock(), Counter[int]()
        # O_NONBLOCK: a FIFO given as an image must not block the open; it means nothing for files and disks.
        mode = os.O_RDWR if writable else os.O_RDONLY
        mode |= os.O_CREAT | os.O_EXCL if create else 0
        try:
            self.abspath = os.path.abspath(path)
            self.fd = os.open(path, mode | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, 0o600)
            self.status = os.fstat(self.fd)
        except _FAILURES as error:
            raise self._failed("open", error) from error
        if not (stat.S_ISREG(self.status.st_mode) or stat.S_ISBLK(self.status.st_mode)):
            os.close(self.fd)
            raise StorageError(path, "neither a regular file nor a block device")

    @property
    def growable(self) -> bool:
        """True where writing past the end makes the file longer: not so on a block device."""
        return stat.S_ISREG(self.status.st_mode)

    def close(self) -> None:
        """Gives up the descriptor and with it every lock taken through it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def size(self) -> int:
        """The file's length now, or the device's."""
        try:
            return os.lseek(self.fd, 0, os.SEEK_END)
        except _FAILURES as error:
            raise self._failed("size", error) from error

    def read(self, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes at ``offset``: fewer only where the file ends."""
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
        except _FAILURES as error:
            raise self._failed("read", error) from error

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills ``buffer`` from ``offset`` on.

        Raises:
            StorageError: the file ends before it is full.
        """
        try:
            done = 0
            while done < len(buffer) and (step := os.preadv(self.fd, [buffer[done:]], offset + done)):
                done += step
        except _FAILURES as error:
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
        """False where the range is known to be a hole, which reads as zeros; True when in doubt."""
        try:
            return offset <= MOST and os.lseek(self.fd, offset, os.SEEK_DATA) < offset + length
        except OSError as error:
            return error.errno != errno.ENXIO  # nothing but a hole up to the end of the file

    def with_data(self, offsets: Sequence[int], length: int) -> Iterator[int]:
        """The positions of those ``offsets``, ascending, at which ``length`` bytes are more than a hole."""
        for first in range(0, len(offsets), _TOGETHER):
            last = min(first + _TOGETHER, len(offsets)) - 1
            if self.has_data(offsets[first], offsets[last] + length - offsets[first]):
                yield from (at for at in range(first, last + 1) if self.has_data(offsets[at], length))

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Writes all of ``data`` at ``offset``; durable after the next `sync` only."""
        self._refuse_if_poisoned()
        view = memoryview(data).cast("B")
        try:
            while len(view):
                done = os.pwrite(self.fd, view, offset)
                offset += done
                view = view[done:]
        except _FAILURES as error:
            raise self._failed("write", error) from error

    def truncate(self, size: int) -> None:
        """Cuts the file to ``size`` bytes."""
        self._refuse_if_poisoned()
        try:
            os.ftruncate(self.fd, size)
        except _FAILURES as error:
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
        except _FAILURES as error:
            raise self._failed("owner and mode of the old file", error) from error

    def sync(self) -> None:
        """Returns once everything written before is durable.

        Raises:
            SyncError: it is not known to be; the handle is poisoned.
        """
        self._refuse_if_poisoned()
        try:
            os.fdatasync(self.fd)
        except _FAILURES as error:
            failed = self._failed("sync", error)
            self._poisoned = str(failed)
            raise SyncError(failed.where, failed.what, failed.errno) from error

    def write_back(self) -> None:
        """Has the kernel write what others have written to the file, so that it notices when they write again.

        Raises:
            StorageError: it could not.
        """
        try:
            os.fdatasync(self.fd)
        except _FAILURES as error:
            raise self._failed("write back", error) from error

    def lock(self, offset: int) -> None:
        """Takes a shared open-file-description lock on one byte (never waits: QEMU takes shared ones only)."""
        try:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, offset, 1, 0))
        except _FAILURES as error:
            raise self._failed("lock", error) from error

    def unlock(self, offset: int) -> None:
        """Gives up the lock on that byte."""
        try:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, offset, 1, 0))
        except _FAILURES as error:
            raise self._failed("unlock", error) from error

    def lock_alone(self, offset: int) -> bool:
        """Takes an exclusive open-file-description lock on one byte; False where someone else holds it."""
        try:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0))
        except (BlockingIOError, PermissionError):
            return False
        except _FAILURES as error:
            raise self._failed("lock", error) from error
        return True

    def lock_fault(self) -> str | None:
        """Why locks on the file are not seen by all who have it open; None where they are. Names the file system."""
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
        """Takes a shared open-file-description lock on one byte; False where someone else holds it alone.

        Threads that share this file share the lock: the last `unlock_beside` gives it up.
        """
        with self._guard:
            try:
                fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, offset, 1, 0))
            except (BlockingIOError, PermissionError):
                return False
            except _FAILURES as error:
                raise self._failed("lock", error) from error
            self._beside[offset] += 1
            return True

    def unlock_beside(self, offset: int) -> None:
        """Gives up the lock that one `lock_beside` has taken."""
        with self._guard:
            self._beside[offset] -= 1
            if not self._beside[offset]:
                self.unlock(offset)

    def locked_by_other(self, offset: int, length: int = 1) -> bool:
        """True where any other open file description holds a lock on any of ``length`` bytes."""
        request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, length, 0)
        try:
            answer = fcntl.fcntl(self.fd, fcntl.F_OFD_GETLK, request)
        except _FAILURES as error:
            raise self._failed("lock", error) from error
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)

    def modified(self) -> int:
        """When it was last written to, in ns; the clock may step as seldom as every 10 ms before Linux 6.13."""
        try:
            return os.fstat(self.fd).st_mtime_ns
        except _FAILURES as error:
            raise self._failed("stat", error) from error

    def is_current(self) -> bool:
        """True while the path still leads to this very file: locks follow the inode, a rename moves the name."""
        try:
            now = os.stat(self.abspath)
        except OSError:
            return False
        return (now.st_dev, now.st_ino) == (self.status.st_dev, self.status.st_ino)

    def _refuse_if_poisoned(self) -> None:
        if self._poisoned:
            raise StorageError(self.path, f"not used any more after a failed sync ({self._poisoned})")

    def _failed(self, action: str, error: Exception) -> StorageError:
        return failure(self.path, action, error)


def failure(path: str, action: str, error: Exception) -> StorageError:
    """The error for something that the operating system refused."""
    return StorageError(path, f"{action}: {getattr(error, 'strerror', None) or error}", errno_of(error))


_factory: type[File] = File


def open_file(path: str, *, writable: bool = False, create: bool = False, abspath: str | None = None) -> File:
    """Opens ``path``; with ``create``, makes it, readable by its owner only.

    Args:
        path: also what messages call it.
        writable: for writing, too.
        create: it must not exist.
        abspath: where the path led when it was first opened: see `File`.

    Raises:
        StorageError: it cannot be opened, is neither a regular file nor a block device, or exists and was to be made.
    """
    file = _factory(abspath or path, writable=writable, create=create)
    file.path = path
    return file


def make_folder_of(path: str, where: str) -> None:
    """Makes the folder that the file ``path`` is to be in, for its owner only, where it is not there.

    Args:
        path: of the file, absolute.
        where: what messages call it.

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
    """Gives the file ``new`` the name of ``old``, which is gone; durable on return."""
    rename_file(new, old)
    sync_folder(old)


def room_at(path: str) -> int:
    """How many bytes a new file at ``path`` could take.

    Raises:
        StorageError: its folder cannot be looked at.
    """
    try:
        status = os.statvfs(os.path.dirname(path) or ".")
    except (OSError, ValueError) as error:
        raise StorageError(path, getattr(error, "strerror", None) or str(error), errno_of(error)) from error
    return status.f_bavail * status.f_frsize


def is_gone(path: str) -> bool:
    """True where there is nothing at a path; not where that cannot be told, as behind a folder of someone else's."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        pass
    return False


def is_same_file(one: str | bytes, other: str | bytes) -> bool:
    """True where both paths lead to one file; not where that cannot be told."""
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return False


def remove_file(path: str) -> None:
    """Removes a file that this process made; nothing where it is gone."""
    with contextlib.suppress(OSError):
        os.unlink(path)


@contextlib.contextmanager
def using(factory: type[File]) -> Iterator[None]:
    """For tests: while active, `open_file` makes files of this class."""
    global _factory
    previous, _factory = _factory, factory
    try:
        yield
    finally:
        _factory = previous
