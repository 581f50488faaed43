"""`Database`: an LMDB environment. It is checked before it is mapped, opened once per process, and grown when full.

LMDB trusts its file: a missing page kills the process with SIGBUS. So the two meta pages and the size of the file are
checked first. A child process (`dirtmap.engine.index.trial`) reads a file that does not look as its last commit left
it: because that was killed, or something else wrote to it, or the machine has started anew. A database that fails a
check is put aside and replaced by a new one; nothing is lost by it. If a directory holds anything but an index, it is
never touched: a user may have meant another path.

    PATH/data.mdb, PATH/lock.mdb     the database. Both are in one directory, so a new database never meets an old lock.
    PATH.guard                       locked while PATH is opened (shared) or replaced (exclusive)
    PATH.stamp                       what data.mdb looked like after the last commit; locked while one is made
    PATH.bad                         the database that was last put aside
    PATH.new-PID-...                 a database that is being made; locked by its maker, and removed once nobody does

Source: LMDB's lmdb.h ("Restrictions and caveats").
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import lmdb

from dirtmap.engine.index.trial import DAMAGE, trial
from dirtmap.engine.system import order
from dirtmap.engine.system.order import Rank
from dirtmap.engine.system.process import boot_id
from dirtmap.fmt import index as layout
from dirtmap.fmt.digest import crc32c
from dirtmap.fmt.errors import StorageError
from dirtmap.fmt.lmdb import META_BYTES, meta_fault
from dirtmap.fmt.parsers.index import STATE_VALUE

T = TypeVar("T")

_DATA = "data.mdb"
_LOCK = "lock.mdb"
_FILES = (_DATA, _LOCK)
_NEW = ".new-"  # then its maker's process number, for who looks; in another PID namespace it means nothing
_FIRST_SIZE = 64 << 20  # bytes of address space; doubled when they are full
_READERS = 1024
_READER_BYTES = 64  # of one of them in lock.mdb, behind as many of LMDB's own; source: lmdb.h, mdb.c (MDB_reader)
_PATIENCE_SECONDS = 0.5  # to wait for whoever makes a commit, before the file is looked at all the same
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_NETWORK = ("nfs", "cifs", "smb", "ceph", "9p", "afs", "gfs2", "ocfs2", "lustre", "gluster", "beegfs", "fuse.sshfs")


class DatabaseError(StorageError):
    """The database cannot be used, whatever the state of the containers."""


class DamagedError(DatabaseError):
    """The content of the database is damaged; the database must be replaced by a new one."""


class ForbiddenError(DatabaseError):
    """The database must not be used: another user can have written it, or a link was planted beside it."""


class MisplacedError(DatabaseError):
    """What is at the path is no index: a user may have meant another path."""


class Database:
    """An open environment. `connect` returns it, and keeps one per process.

    Attributes:
        path: its directory.
        stamped: what its file looks like is noted after each commit.
        usable: False once it is closed.
    """

    def __init__(self, path: str, *, stamped: bool = False) -> None:
        self.path, self.stamped = path, stamped
        # LMDB forbids resizing or closing the map while any transaction is open.
        self.lock = threading.RLock()
        self._env: lmdb.Environment | None = None
        self._begin: Any = None
        self.usable = True
        self._open()
        self.status = os.stat(os.path.join(path, _DATA))

    def _open(self) -> lmdb.Environment:
        with _errors(self.path):
            if not self.usable:
                raise DamagedError(self.path, "another index has taken its place")
            if self._env is None:
                _make_room_for_locks(self.path)
                self._env = lmdb.open(self.path, map_size=_FIRST_SIZE, max_readers=_READERS, mode=0o600, max_dbs=0)
                self._env.reader_check()
                self._begin = self._env.begin
            return self._env

    def suspend(self) -> None:
        """Unmaps the database until its next use."""
        with self.lock:
            if self._env is not None:
                self._begin = None
                self._env.close()
                self._env = None

    def close(self) -> None:
        """Unmaps the database for good."""
        with self.lock:
            self.usable = False
            self.suspend()

    def is_current(self) -> bool:
        """True if the path still leads to this database."""
        try:
            now = os.stat(os.path.join(self.path, _DATA))
        except OSError:
            return False
        return (now.st_dev, now.st_ino) == (self.status.st_dev, self.status.st_ino)

    def get(self, key: bytes) -> bytes | None:
        """The contents of a value; None if there is no such key.

        Raises:
            DamagedError: the checksum of the value is wrong.
            StorageError: LMDB failed.
        """
        value: Any
        with self.lock:
            try:
                txn = (self._begin or self._open().begin)()
                value = txn.get(key)
                txn.abort()  # cheaper than a context manager; after an error the last reference ends it
            except lmdb.Error:
                value = self._read(lambda txn: txn.get(key))
        if value is None:
            return None
        if crc32c(key + value) != layout.RESIDUE:  # the same as `layout.is_sound`, without a call
            raise DamagedError(self.path, layout.damage(key))
        contents: bytes = value[:-4]
        return contents

    def read(self, work: Callable[[Reader], T]) -> T:
        """Runs ``work`` on one state of the database. Errors as `get`."""
        return self._read(lambda txn: work(Reader(self.path, txn)))

    def _read(self, work: Callable[[lmdb.Transaction], T]) -> T:
        with self.lock, _errors(self.path):
            env = self._open()
            try:
                with env.begin() as txn:
                    return work(txn)
            except lmdb.MapResizedError:  # another process has grown it
                env.set_mapsize(0)
            with env.begin() as txn:
                return work(txn)

    def change(self, work: Callable[[Writer], T]) -> T:
        """Runs ``work``, and makes what it has put durable, all or nothing. Runs it again if the map had to grow.

        Errors as `get`.
        """
        with order.holding(Rank.INDEX, self.path), self.lock, _errors(self.path), self._stamp():
            env = self._open()
            while True:
                try:
                    with env.begin(write=True) as txn:
                        answer = work(Writer(self.path, txn))
                    break
                except lmdb.MapFullError:
                    env.set_mapsize(env.info()["map_size"] * 2)
                except lmdb.MapResizedError:
                    env.set_mapsize(0)
            self._extend(env)
            return answer

    @contextlib.contextmanager
    def _stamp(self) -> Iterator[None]:
        """Notes what the file looks like at the end of the block, and keeps others from judging it meanwhile."""
        if not self.stamped:
            yield
            return
        with _open_stamp(self.path) as fd:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
            with contextlib.suppress(FileNotFoundError):  # put aside meanwhile
                if self.is_current():
                    _note(fd, _looks(self.path))

    def _extend(self, env: lmdb.Environment) -> None:
        """Extends the file to its last page. LMDB does not write pages that one transaction both got and freed."""
        needed = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        path = os.path.join(self.path, _DATA)
        if os.path.getsize(path) < needed:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                # Unlike ftruncate, never cuts off what another process has added meanwhile.
                os.posix_fallocate(fd, 0, needed)
            finally:
                os.close(fd)

    def info(self) -> dict[str, int]:
        """Statistics of LMDB: ``entries``, ``depth``, ``file-size`` and ``map-size`` in bytes, ``readers``."""
        with self.lock, _errors(self.path):
            env = self._open()
            stat, info = env.stat(), env.info()
        return {
            "entries": stat["entries"],
            "depth": stat["depth"],
            "file-size": os.path.getsize(os.path.join(self.path, _DATA)),
            "map-size": info["map_size"],
            "readers": info["num_readers"],
        }


class Reader:
    """One state of the database."""

    def __init__(self, path: str, txn: lmdb.Transaction) -> None:
        self._path, self._txn = path, txn

    def get(self, key: bytes) -> bytes | None:
        """See `Database.get`."""
        value = self._txn.get(key)
        return None if value is None else self._unseal(key, value)

    def _unseal(self, key: bytes, value: Any) -> bytes:
        if not layout.is_sound(key, value):
            raise DamagedError(self._path, layout.damage(key))
        contents: bytes = value[:-4]
        return contents

    def scan(self, prefix: bytes, *, sound_only: bool = False) -> Iterator[tuple[bytes, bytes]]:
        """All keys with that prefix, in order, with their contents. With ``sound_only`` it skips damaged values.

        Raises:
            DamagedError: the checksum of a value is wrong.
        """
        with self._txn.cursor() as cursor:
            if cursor.set_range(prefix):
                key: Any
                value: Any
                for key, value in cursor:
                    if not key.startswith(prefix):
                        return
                    if not sound_only:
                        yield key, self._unseal(key, value)
                    elif layout.is_sound(key, value):
                        yield key, value[:-4]


class Writer(Reader):
    """One state of the database during a change."""

    def put(self, key: bytes, contents: bytes) -> None:
        """Sets the value of a key."""
        self._txn.put(key, layout.seal(key, contents))

    def delete(self, key: bytes) -> None:
        """Deletes a key; does nothing if it does not exist."""
        self._txn.delete(key)


def entries(path: str) -> Iterator[tuple[bytes, memoryview]]:
    """All keys of the database in that directory, in order, with their values as stored; each valid until the next.

    Changes nothing. To be run in a process of its own: LMDB opens a database once per process, and damage may kill it.

    Raises:
        StorageError: LMDB failed.
    """
    lock = os.path.exists(os.path.join(path, _LOCK))  # without that file nobody has it open, and none is made
    with (
        _errors(path),
        lmdb.open(path, readonly=True, lock=lock, map_size=_FIRST_SIZE, max_readers=_READERS, max_dbs=0) as env,
        env.begin(buffers=True) as txn,
        txn.cursor() as cursor,
    ):
        for key, value in cursor:
            yield bytes(key), value


def fault(path: str) -> str | None:
    """Why LMDB must not map the database in that directory; None if it may, or if there is no database yet.

    Raises:
        StorageError: the directory cannot be read, or holds anything but an index.
    """
    _require_ours(path)
    with _errors(path):
        if not os.path.isdir(path) or not os.listdir(path):
            return None
        try:
            with open(os.path.join(path, _DATA), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                pages = file.read(META_BYTES)
        except FileNotFoundError:
            return f"without {_DATA}"
    what = meta_fault(pages, size)
    return f"{_DATA} {what}" if what else None


def _require_ours(path: str) -> None:
    """Refuses a path that holds anything but an index, damaged or not. Nothing there may be touched.

    Raises:
        StorageError: it holds something else, or cannot be read.
    """
    with _errors(path):
        if not _is_ours(os.path.realpath(path)):
            raise MisplacedError(path, "not an index; --index names another")


def _is_ours(path: str) -> bool:
    """True if there is nothing, or a directory that holds nothing but the files of a database."""
    if not os.path.lexists(path):
        return True
    if os.path.islink(path) or not os.path.isdir(path):
        return False
    try:
        with os.scandir(path) as entries:
            return all(entry.name in _FILES and entry.is_file(follow_symlinks=False) for entry in entries)
    except FileNotFoundError:
        return True  # replaced by another process meanwhile


def _make_room_for_locks(path: str) -> None:
    """LMDB maps lock.mdb without making sure that there is room for it: a full file system would be a SIGBUS."""
    fd = os.open(os.path.join(path, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, max(os.fstat(fd).st_size, (_READERS + 2) * _READER_BYTES))
    finally:
        os.close(fd)


# What the file looked like after the last commit.


def _looks(path: str) -> bytes:
    """What the file of a database looks like, and the boot in which it does."""
    now = os.stat(os.path.join(path, _DATA))
    numbers = now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns
    return f"{boot_id().hex()} {' '.join(map(str, numbers))}\n".encode()


@contextlib.contextmanager
def _open_stamp(path: str) -> Iterator[int]:
    fd = _open_beside(path, ".stamp")
    try:
        yield fd
    finally:
        os.close(fd)


def _note(fd: int, looks: bytes) -> None:
    os.pwrite(fd, looks, 0)
    os.ftruncate(fd, len(looks))


def _require_as_left(path: str) -> None:
    """Has a file that does not look as its last commit left it read by a process of its own.

    Raises:
        DamagedError: that found damage, or died of it.
        OSError: it cannot be looked at.
    """
    _make_room_for_locks(path)  # else who tries may die of that
    with _open_stamp(path) as fd:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < deadline:  # a commit that is being made changes what it looks like
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.005)
        looks = _looks(path)
        if os.pread(fd, len(looks) + 1, 0) == looks:
            return
        fcntl.flock(fd, fcntl.LOCK_UN)  # reading it all takes time, and keeps nobody from making commits
        if what := trial(path):
            raise DamagedError(path, f"the index is damaged: {what}")
        if _looks(path) == looks:  # else another process has changed it, and notes that
            _note(fd, looks)


def _remove(path: str) -> None:
    """Removes the directory of a database. Files that were added meanwhile stay, and so does the directory then."""
    for name in _FILES:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(path, name))
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(path)


def _refuse_network(path: str) -> None:
    """Refuses a network file system. LMDB needs memory shared by all processes, and locks that end with a process.

    Raises:
        DatabaseError: the path is on a network file system.
    """
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    kind = _file_system(folder)
    if kind.startswith(_NETWORK):
        raise DatabaseError(path, f"on a network file system ({kind}), where LMDB is not safe; choose another --index")


def _file_system(folder: str) -> str:
    """The type of a folder's file system, from /proc/self/mountinfo; empty if unknown."""
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            mount, _, source = line.partition(" - ")
            if mount.split()[2] == number:
                return source.split()[0]
    return ""


_connected: dict[str, Database] = {}
_registry = threading.RLock()
_suspended: list[Database] = []


def _before_fork() -> None:
    """Unmaps every database once it is unused: a child must neither use nor close what its parent has mapped."""
    _registry.acquire()
    for database in _connected.values():
        database.lock.acquire()
        database.suspend()
        _suspended.append(database)


def _after_fork() -> None:
    while _suspended:
        _suspended.pop().lock.release()
    _registry.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


def connect(path: str) -> Database:
    """The database at ``path``. Makes a new one if there is none, or if the present one cannot be read at all.

    Raises:
        DamagedError: the content of the database is damaged.
        ForbiddenError: a link was planted beside it.
        StorageError: this user may not open or make it, it cannot be made or opened, is on a network file system, or is
            not an index.
    """
    key = os.path.realpath(path)
    with _registry:
        database = _connected.get(key)
        if database is not None:
            if database.is_current():
                return database
            _connected.pop(key).close()
        _require_ours(path)
        _refuse_network(path)
        with _errors(path):
            os.makedirs(os.path.dirname(key), mode=0o700, exist_ok=True)
        with _guard(key, fcntl.LOCK_SH):
            if database := _opened(key):
                return _connected.setdefault(key, database)
        replace(key)
        with _guard(key, fcntl.LOCK_SH):
            return _connected.setdefault(key, Database(key, stamped=True))


def _opened(path: str) -> Database | None:
    """The database at ``path``; None if there is none, it has another version, or LMDB cannot read it.

    Raises:
        DamagedError: LMDB can read it, but its content is damaged.
    """
    if fault(path) is not None or not os.path.isdir(path) or not os.listdir(path):
        return None
    with _errors(path):
        _require_as_left(path)
    try:
        database = Database(path, stamped=True)
    except DamagedError:
        return None
    try:
        state = database.get(layout.STATE) or b""
    except DamagedError:
        database.close()
        raise
    if len(state) == STATE_VALUE.size and STATE_VALUE.parse(state).version == layout.VERSION:
        return database
    database.close()
    return None


def replace(path: str, fill: Callable[[Database], None] | None = None, *, even_if_good: bool = False) -> None:
    """Replaces the database at ``path`` by a new one.

    Args:
        path: of the database. The old one is put aside as PATH.bad.
        fill: fills the new database before it replaces the old one.
        even_if_good: if False, keeps a good database that another process has made meanwhile.

    Raises:
        StorageError: it cannot be made, or PATH or PATH.bad holds anything but an index.
    """
    import shutil
    import tempfile

    _require_ours(path)
    key = os.path.realpath(path)
    with _registry, _errors(path):
        if database := _connected.pop(key, None):
            database.close()
        with contextlib.ExitStack() as stack:
            with _guard(key, fcntl.LOCK_EX):  # nobody finds it before it is locked
                _remove_leftovers(key)
                prefix = f"{os.path.basename(key)}{_NEW}{os.getpid()}-"
                fresh = tempfile.mkdtemp(prefix=prefix, dir=os.path.dirname(key))
                stack.callback(shutil.rmtree, fresh, ignore_errors=True)
                stack.callback(os.close, _lock_folder(fresh))
            new = Database(fresh)
            try:
                state = STATE_VALUE.build(version=layout.VERSION, reserved=0, containers=0)
                new.change(lambda writer: writer.put(layout.STATE, state))
                if fill:
                    fill(new)
            finally:
                new.close()
            with _guard(key, fcntl.LOCK_EX):
                if not even_if_good and (good := _opened(key)):
                    good.close()
                    return
                _put_aside(key)
                os.rename(fresh, key)
                with _open_stamp(key) as fd:
                    _note(fd, _looks(key))


def _lock_folder(path: str) -> int:
    """Locks a folder for as long as the descriptor that is returned is open.

    Raises:
        BlockingIOError: somebody has it locked.
        OSError: it cannot be opened, or is no folder.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _remove_leftovers(path: str) -> None:
    """Removes new databases whose makers died before they put them in place: the kernel has dropped their locks."""
    folder, start = os.path.dirname(path), os.path.basename(path) + _NEW
    for name in os.listdir(folder):
        if name.startswith(start) and name.removeprefix(start).partition("-")[0].isdecimal():
            leftover = os.path.join(folder, name)
            with contextlib.suppress(OSError):  # its maker lives, or it is another user's
                lock = _lock_folder(leftover)
                try:
                    if _is_ours(leftover):
                        _remove(leftover)
                finally:
                    os.close(lock)


def _put_aside(path: str) -> None:
    _require_ours(path)
    if not os.path.lexists(path):
        return
    bad = path + ".bad"
    if not _is_ours(bad):
        raise DatabaseError(bad, "in the place where a damaged index is put aside, and not one; move it away")
    _remove(bad)
    os.rename(path, bad)


def _open_beside(path: str, suffix: str) -> int:
    """Opens a file beside a database, and makes it if there is none.

    Raises:
        ForbiddenError: it is a link.
        OSError: it cannot be opened.
    """
    try:
        return os.open(path + suffix, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        # Whoever made it would have us make, lock or overwrite a file of his choice.
        raise ForbiddenError(
            path + suffix, "index: a symbolic link, which is not followed; remove it", error.errno
        ) from error


@contextlib.contextmanager
def _guard(path: str, how: int) -> Iterator[None]:
    with _errors(path):
        fd = _open_beside(path, ".guard")
    try:
        with _errors(path):
            fcntl.flock(fd, how)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def _errors(path: str) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        raise DamagedError(path, f"the index is damaged: {error}") from error
    except lmdb.ReadonlyError as error:
        raise DatabaseError(path, f"index: {error}; --index names another") from error
    except lmdb.Error as error:
        raise DatabaseError(path, f"index: {error}") from error
    except OSError as error:
        if error.errno in _FORBIDDEN:
            raise DatabaseError(path, f"index: {error.strerror}; --index names another", error.errno) from error
        raise DatabaseError(path, f"index: {error.strerror or error}", error.errno) from error
