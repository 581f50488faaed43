"""Raw disks, asked as an export of QEMU is; see `dirtmap.tools.backup.nbd.Connection`.

QEMU has nothing to add to what is in a raw disk, and each byte that goes through it is copied three times more. There
are no threads here: the kernel reads ahead and writes behind.
"""

from __future__ import annotations

from typing import ClassVar, Self

from dirtmap.tools.backup import files
from dirtmap.tools.backup.document import PIECE
from dirtmap.tools.backup.nbd import HOLE, ZERO


class RawSource:
    """A raw file or a block device. A context manager.

    Args:
        path: of it.
        size: of the disk, bytes.

    Attributes:
        opened: see `files.Reading`.

    Raises:
        StorageError: it cannot be read.
    """

    any_thread: ClassVar[bool] = True

    def __init__(self, path: str, size: int) -> None:
        self._path, self._size, self._next = path, size, 0
        self._asked: dict[int, tuple[int, int]] = {}
        self._buffers = files.Buffers(PIECE)

    def __enter__(self) -> Self:
        self._file = files.Reading(self._path)
        self.opened = self._file.opened
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def status(self, offset: int, length: int) -> list[tuple[int, int]]:
        """What is at the beginning of a range: one run, its length and whether it is a hole."""
        is_hole, end = self._file.run(offset, min(offset + length, self._size))
        return [(end - offset, HOLE | ZERO if is_hole else 0)]

    def read(self, offset: int, length: int) -> int:
        """Asks for bytes of the disk; `wait` returns them."""
        self._file.ask(offset, length)
        self._next += 1
        self._asked[self._next] = offset, length
        return self._next

    def wait(self, token: int) -> files.Answer:
        """The bytes that were asked for. Any thread may do this."""
        offset, length = self._asked.pop(token)
        data = self._buffers.take(length)
        self._file.read_into(memoryview(data), offset)
        return files.Answer(data)

    def recycle(self, data: bytearray | memoryview) -> None:
        """Takes back what was read and is not needed any more; later data come in its place."""
        self._buffers.give(data)


class RawTarget:
    """A new raw file. A context manager.

    Args:
        path: of the file, which is made.
        size: of the disk, bytes.

    Raises:
        StorageError: it cannot be made.
    """

    def __init__(self, path: str, size: int) -> None:
        self._path, self._size = path, size

    def __enter__(self) -> Self:
        self._file = files.Writing(self._path, self._size)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, offset: int, data: memoryview) -> int:
        """Writes bytes; there is nothing to wait for."""
        self._file.write(offset, data)
        return 0

    def wait(self, token: int) -> None:
        """Nothing is written behind."""

    def flush(self) -> None:
        """Makes what was written durable."""
        self._file.sync()
