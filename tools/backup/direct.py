"""`DirectImage`: what a qcow2 image of a repository has itself, read without QEMU.

Nothing in it is trusted: an offset that makes no sense is an error, and what is read is held against its digest.
Source: QEMU's docs/interop/qcow2.txt.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Self

from dirtmap.fmt import qcow2
from dirtmap.fmt.errors import FormatError
from dirtmap.fmt.geometry import ceil_div
from dirtmap.tools.backup import files, images

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_ZERO = 1  # an L2 entry of a cluster that reads as zeros, whatever is below it
_TABLES = 4  # L2 tables that are kept: a disk is read in order


class _Answer(NamedTuple):
    data: bytearray
    empty: bool = False


class DirectImage:
    """An image whose clusters are not compressed. A context manager; asked as a `Connection` is.

    Raises:
        FormatError: it is damaged, or has what no image of a repository has.
        StorageError: it cannot be read.
    """

    def __init__(self, path: str) -> None:
        self._path, self._next = path, 0
        self._asked: dict[int, tuple[int, list[tuple[int, int]]]] = {}
        self._tables: dict[int, NDArray[np.uint64]] = {}

    def __enter__(self) -> Self:
        header = images.read_header(self._path)
        if header.incompatible & ~qcow2.INCOMPATIBLE_COMPRESSION:
            raise FormatError(self._path, "has features that no image of a repository has")
        self._cluster = header.cluster_size
        self._entries = self._cluster // qcow2.TABLE_ENTRY_SIZE
        self._file = files.Reading(self._path)
        try:
            l1 = self._file.read(header.v2.l1_table_offset, header.v2.l1_size * qcow2.TABLE_ENTRY_SIZE)
            self._l1 = qcow2.table_view(l1)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, offset: int, length: int) -> int:
        """Asks for bytes of the disk, from the beginning of a cluster; `wait` returns them."""
        runs = list(self._runs(offset, length))
        for at, size in runs:
            if at:
                self._file.ask(at, size)
        self._next += 1
        self._asked[self._next] = length, runs
        return self._next

    def wait(self, token: int) -> _Answer:
        """The bytes that were asked for."""
        length, runs = self._asked.pop(token)
        data, done = bytearray(length), 0
        for at, size in runs:
            if at:
                self._file.read_into(memoryview(data)[done : done + size], at)
            done += size
        return _Answer(data, all(not at for at, _ in runs))

    def _runs(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Where bytes of the disk are in the file, 0 where they are zeros; and how many."""
        at, end = offset, offset + length
        begun = size = 0
        for number in range(offset // self._cluster, ceil_div(end, self._cluster)):
            entry = self._entry(number)
            if entry & qcow2.L2_COMPRESSED:
                raise FormatError(self._path, "damaged: a cluster is compressed, and none should be")
            host = 0 if entry & _ZERO else entry & qcow2.OFFSET_MASK
            if host % self._cluster:
                raise FormatError(self._path, f"damaged: a cluster at {host} of the file")
            if host:
                host += at % self._cluster
            part = min(end, (number + 1) * self._cluster) - at
            if size and (host == begun + size if begun else not host):
                size += part
            else:
                if size:
                    yield begun, size
                begun, size = host, part
            at += part
        if size:
            yield begun, size

    def _entry(self, number: int) -> int:
        """The L2 entry of a cluster of the disk."""
        index, place = divmod(number, self._entries)
        if index not in self._tables:
            self._tables[index] = self._table(index)
            if len(self._tables) > _TABLES:
                del self._tables[next(iter(self._tables))]
        return int(self._tables[index][place])

    def _table(self, index: int) -> NDArray[np.uint64]:
        where = int(self._l1[index]) & qcow2.OFFSET_MASK if index < len(self._l1) else 0
        data = self._file.read(where, self._cluster) if where else bytes(self._cluster)
        return qcow2.table_view(data)
