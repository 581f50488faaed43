"""Raw disks, asked as an export of QEMU is; see `dirtmap.tools.backup.nbd.Connection`.

QEMU has nothing to add to what is in a raw disk, and each byte that goes through it is copied three times more.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Self

from dirtmap.tools.backup import files
from dirtmap.tools.backup.copying import sha256
from dirtmap.tools.backup.nbd import HOLE, ZERO


class _Answer(NamedTuple):
    data: bytearray
    empty: bool = False


class RawSource:
    """A raw file or a block device. A context manager; reads ahead in a thread of its own.

    Args:
        path: of it.
        size: of the disk, bytes.

    Raises:
        StorageError: it cannot be read.
    """

    def __init__(self, path: str, size: int) -> None:
        self._path, self._size, self._next = path, size, 0
        self._waiting: dict[int, Future[bytearray]] = {}

    def __enter__(self) -> Self:
        self._file = files.Reading(self._path)
        self._pool = ThreadPoolExecutor(1)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._file.close()

    def status(self, offset: int, length: int) -> list[tuple[int, int]]:
        """What is at the beginning of a range: one run, its length and whether it is a hole."""
        is_hole, end = self._file.run(offset, min(offset + length, self._size))
        return [(end - offset, HOLE | ZERO if is_hole else 0)]

    def read(self, offset: int, length: int) -> int:
        """Asks for bytes of the disk; `wait` returns them."""
        self._next += 1
        self._waiting[self._next] = self._pool.submit(self._file.read, offset, length)
        return self._next

    def digest(self, offset: int, length: int) -> bytes:
        """The SHA-256 of bytes of the disk. Threads may share this."""
        return sha256(self._file.read(offset, length))

    def wait(self, token: int) -> _Answer:
        """The bytes that were asked for."""
        return _Answer(self._waiting.pop(token).result())


class RawTarget:
    """A new raw file. A context manager; writes behind in a thread of its own.

    Args:
        path: of the file, which is made.
        size: of the disk, bytes.

    Raises:
        StorageError: it cannot be made.
    """

    def __init__(self, path: str, size: int) -> None:
        self._path, self._size, self._next = path, size, 0
        self._waiting: dict[int, Future[None]] = {}

    def __enter__(self) -> Self:
        self._file = files.Writing(self._path, self._size)
        self._pool = ThreadPoolExecutor(1)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._file.close()

    def write(self, offset: int, data: memoryview) -> int:
        """Asks to write bytes, which must not change before that is waited for."""
        self._next += 1
        self._waiting[self._next] = self._pool.submit(self._file.write, offset, data)
        return self._next

    def wait(self, token: int) -> None:
        """Waits for a write."""
        self._waiting.pop(token).result()

    def flush(self) -> None:
        """Makes what was written durable."""
        self._file.sync()
