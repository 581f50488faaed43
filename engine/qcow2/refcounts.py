"""`Refcounts`: the two-level refcount structure of a qcow2 image. It is changed in memory; a commit writes it.

refcount table (big-endian u64)      refcount block (one cluster)
  | block 0 | block 1 | 0 | ... |      | count | count | count | ... |   counts of 1, 2, 4, ... 64 bits
       |         |                          one for each cluster of the file, in order
       v         v
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator, Sequence, Set
from typing import TYPE_CHECKING

from dirtmap.engine.model.later import later
from dirtmap.engine.system.file import File
from dirtmap.fmt import qcow2
from dirtmap.fmt.errors import FormatError, StorageError, counted
from dirtmap.fmt.geometry import ceil_div

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Counts = array[int]  # the counts of one block, an element each
else:  # takes longer to import than a few counts to change
    later(globals(), np="numpy")

_UNIT = 512  # changed refcounts are written in whole sectors, which a disk writes atomically
# A search for free clusters stops after so many blocks (32 TiB at 64 KiB clusters), or so many free clusters. It only
# saves room in the file, and a hostile table has a million blocks.
_MOST_BLOCKS = 16384
_MOST_FREE = 1 << 20
_PIECE = 1 << 18  # counts in one piece; a block may have 16 million
_MOST_PLAIN = 1 << 17  # counts that are looked at one by one; more with numpy
_CODES = {8: "B", 16: "H", 32: "I", 64: "Q"}  # of arrays, by bits of an element


class Refcounts:
    """The refcounts of all clusters. Blocks are loaded when they are needed.

    Clusters are numbered from the start of the file. Nothing is written here: `changes` returns what to write.
    """

    def __init__(self, file: File, header: qcow2.Header) -> None:
        self._file = file
        self._file_size = file.size()
        self._header = header
        self.cluster_size = header.cluster_size
        self.table_clusters = int(header.v2.refcount_table_clusters)
        self.per_block = header.refcounts_per_block
        self.maximum = (1 << header.refcount_bits) - 1
        size = self.table_clusters * header.cluster_size
        raw = file.read(header.v2.refcount_table_offset, size).ljust(size, b"\0")
        self.table: Counts = _native("Q", raw)
        self.table_offset = int(header.v2.refcount_table_offset)
        self.moved_table = False
        self.new_blocks: set[int] = set()
        self._blocks: dict[int, Counts] = {}
        self._changed: dict[int, set[int]] = {}  # by block, the numbers of the changed units

    def block_offset(self, index: int) -> int:
        """The offset of block ``index`` in bytes; 0 if there is no such block.

        Raises:
            FormatError: the table's entry is not a cluster inside the file.
        """
        offset = self.table[index] if index < len(self.table) else 0
        bad = offset % self.cluster_size or (
            index not in self.new_blocks and offset + self.cluster_size > self._file_size and offset
        )
        if bad:
            where = f"{self._file.path}: refcount_table[{index}]"
            raise FormatError(where, f"{offset:#x} is not a cluster inside the file")
        return offset

    def block(self, index: int) -> Counts | None:
        """The counts of block ``index``, one per cluster; None if there is no such block, which means all are 0."""
        if index not in self._blocks:
            offset = self.block_offset(index)
            if not offset:
                return None
            self._blocks[index] = self._read(offset)
        return self._blocks[index]

    def glance(self, index: int) -> Counts | None:
        """Like `block`, but not kept in memory, for passes over all blocks; None also for a hole, where all are 0."""
        if index in self._blocks:
            return self._blocks[index]
        offset = self.block_offset(index)
        return self._read(offset) if offset and self._file.has_data(offset, self.cluster_size) else None

    def _read(self, offset: int) -> Counts:
        return self._counts(self._file.read_exactly(offset, self.cluster_size))

    def _counts(self, raw: bytes) -> Counts:
        bits = self._header.refcount_bits
        return _native(_CODES[bits], raw) if bits >= 8 else array("B", qcow2.refcounts_of(raw, bits).tobytes())

    def get(self, cluster: int) -> int:
        """The recorded number of references to a cluster. Errors as `block_offset`."""
        block = self.block(cluster // self.per_block)
        return 0 if block is None else block[cluster % self.per_block]

    def set(self, cluster: int, count: int) -> None:
        """Changes one count, in memory.

        Raises:
            FormatError: the count does not fit, or its block does not exist.
        """
        index, position = divmod(cluster, self.per_block)
        block = self.block(index)
        if block is None or count > self.maximum:
            what = f"cluster {cluster:#x} cannot be counted {counted(count, 'time')}"
            raise FormatError(f"{self._file.path}: refcounts", what)
        block[position] = count
        self._changed.setdefault(index, set()).add(position * self._header.refcount_bits // 8 // _UNIT)

    def set_some(self, numbers: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        """Like `set`, for clusters of one block (int64, 1-D). Skips counts that do not fit or have no block."""
        index = int(numbers[0]) // self.per_block
        block = self.block(index)
        if block is not None:
            fit = counts <= self.maximum
            positions = numbers[fit] % self.per_block
            np.asarray(block)[positions] = counts[fit]
            units = np.unique(positions * self._header.refcount_bits // 8 // _UNIT)
            self._changed.setdefault(index, set()).update(units.tolist())

    def release(self, cluster: int) -> None:
        """Lowers the count of a cluster by one.

        Raises:
            FormatError: the count is 0 already, so the image is corrupt.
        """
        count = self.get(cluster)
        if count == 0:
            where = f"{self._file.path}: refcount of cluster {cluster * self.cluster_size:#x}"
            raise FormatError(where, "0, but a bitmap uses the cluster; run check")
        self.set(cluster, count - 1)

    def end(self, known: int) -> int:
        """The number of the first cluster behind all that have a count; at least ``known``.

        Raises:
            FormatError: the table reaches far beyond ``known``.
        """
        first = known // self.per_block
        indices = [first + at for at, offset in enumerate(self.table[first:]) if offset][::-1]
        for index in indices[:_MOST_BLOCKS]:
            block = self.glance(index)
            if block is not None and (raw := block.tobytes().rstrip(b"\0")):
                return max(known, index * self.per_block + ceil_div(len(raw), block.itemsize))
        if len(indices) > _MOST_BLOCKS:
            raise FormatError(f"{self._file.path}: refcount_table", "reaches far beyond the end of the file")
        return known

    def uncounted(self, end: int) -> list[int]:
        """The numbers of clusters before ``end`` whose count is 0; ascending; not all if there are many."""
        found: list[int] = []
        blocks = [index for index, offset in enumerate(self.table[: ceil_div(end, self.per_block)]) if offset]
        for index in blocks[:_MOST_BLOCKS]:
            first = index * self.per_block
            block = self.glance(index)
            if block is None:
                continue
            counts = block[: end - first]
            if end > _MOST_PLAIN:
                found += (np.flatnonzero(np.asarray(counts) == 0)[:_MOST_FREE] + first).tolist()
            else:
                found += [first + at for at, count in enumerate(counts) if not count]
            if len(found) >= _MOST_FREE:
                break
        return found

    def counted_once(self) -> Set[int] | None:
        """The clusters whose count is 1; None where another has any other count than 0, or there are many to look at.

        Errors as `block_offset`.
        """
        indices = [index for index, offset in enumerate(self.table) if offset]
        if len(indices) * self.per_block > _MOST_PLAIN:
            return None
        found: set[int] = set()
        for index in indices:
            if (block := self.glance(index)) is not None:
                first = index * self.per_block
                here = [first + at for at, count in enumerate(block) if count]
                if sum(block) != len(here):
                    return None
                found.update(here)
        return found

    def pieces(self) -> Iterator[tuple[int, qcow2.Counts]]:
        """All counts, except those in holes and in blocks that cannot exist.

        Yields:
            The number of a piece's first cluster, and the counts of its clusters.
        """
        last = np.uint64(max(0, self._file_size - self.cluster_size))
        table = np.asarray(self.table)
        possible = (table % np.uint64(self.cluster_size) == 0) & (table <= last)
        indices = np.flatnonzero((table != 0) & possible)
        # Sorted by offset, each block once: if several entries lead to one block, it is the first entry's.
        offsets, first = np.unique(table[indices], return_index=True)
        found = [int(indices[first[at]]) for at in self._file.with_data(offsets.data, self.cluster_size)]
        for index in sorted(found):
            block = np.asarray(self._read(self.block_offset(index)))
            for at in range(0, self.per_block, _PIECE):
                yield index * self.per_block + at, block[at : at + _PIECE]

    def touched(self) -> list[int]:
        """The numbers of the clusters of existing blocks that have changed since the last call of `changes`."""
        offsets = [self.block_offset(index) for index in sorted(set(self._changed) - self.new_blocks)]
        return [offset // self.cluster_size for offset in offsets]

    def add_block(self, index: int, cluster: int) -> None:
        """Adds an empty block ``index``, to be written at that cluster. The table must be long enough."""
        self.new_blocks.add(index)
        self.table[index] = cluster * self.cluster_size
        self._blocks[index] = self._counts(bytes(self.cluster_size))

    def move_table(self, cluster: int, clusters: int) -> None:
        """Replaces the table by a longer one, to be written at that cluster."""
        table = array("Q", bytes(clusters * self.cluster_size))
        table[: len(self.table)] = self.table
        self.table, self.table_offset, self.moved_table = table, cluster * self.cluster_size, True

    def changes(self) -> list[tuple[int, bytes]]:
        """The writes for all counts changed since the last call, as (offset in bytes, bytes). New blocks are whole."""
        writes = []
        for index, units in sorted(self._changed.items()):
            raw = self._packed(self._blocks[index])
            offset = self.block_offset(index)
            if index in self.new_blocks:
                writes.append((offset, raw))
                continue
            writes += [(offset + unit * _UNIT, raw[unit * _UNIT : (unit + 1) * _UNIT]) for unit in sorted(units)]
        self._changed.clear()
        return writes

    def table_bytes(self) -> bytes:
        """The whole table as it is to be on disk."""
        return _big_endian(self.table)

    def _packed(self, block: Counts) -> bytes:
        bits = self._header.refcount_bits
        return _big_endian(block) if bits >= 8 else qcow2.refcount_block(np.asarray(block), bits)


def _native(code: str, raw: bytes) -> Counts:
    """The big-endian numbers in ``raw``; ``code`` is that of their type in an array."""
    numbers = array(code, raw)
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers


def _big_endian(numbers: Counts) -> bytes:
    """The inverse of `_native`."""
    return _native(numbers.typecode, numbers.tobytes()).tobytes()


class Allocator:
    """Finds clusters that nothing can refer to, and counts them.

    A refcount of 0 alone proves nothing: after a crash or a bug, counts may be wrong. So a cluster is taken past the
    end of everything, or if its count is 0 *and* a walk of all references has not met it.

    Args:
        path: of the image, for messages.
        refcounts: to be changed.
        end: number of the first cluster past the end of the file and of everything counted or referenced.
        proven: numbers of clusters inside the file that are proven free; ascending.
        capacity: number of clusters that the file can ever have, if it is a block device; None for no limit.
    """

    def __init__(self, path: str, refcounts: Refcounts, end: int, proven: Sequence[int], capacity: int | None) -> None:
        self._path = path
        self._refcounts = refcounts
        self._cluster_size = refcounts.cluster_size
        self._end = end
        self._free = [*reversed(proven)]  # so that the lowest is the cheapest to take
        self._capacity = capacity
        self._uncovered: set[int] = set()

    def take(self, clusters: int) -> int:
        """Takes ``clusters`` adjacent ones, and sets the count of each to 1. Returns the number of the first.

        Raises:
            StorageError: there is no room, and the device cannot grow.
            FormatError: there is no room in what qcow2 can address.
        """
        first = self._find(clusters)
        for cluster in range(first, first + clusters):
            self._count(cluster)
        return first

    def _find(self, clusters: int) -> int:
        first = self._find_free(clusters)
        if first is not None:
            return first
        first = self._end
        if self._capacity is not None and first + clusters > self._capacity:
            what = f"no room for {counted(clusters, 'more cluster')} on a device that cannot grow"
            raise StorageError(self._path, what)
        if (first + clusters) * self._cluster_size > qcow2.OFFSET_MASK:
            raise FormatError(f"{self._path}: refcount table", "counts clusters up to the end of what can be addressed")
        self._end += clusters
        return first

    def _find_free(self, clusters: int) -> int | None:
        #  free:     20   11 10 9   5 4          for 3 adjacent: free[i - 2] - free[i] == 2
        #  first                ^yes  no
        free, span = self._free, clusters - 1
        for at in range(len(free) - 1, span - 1, -1):
            if free[at - span] - free[at] == span:
                first = free[at]
                del free[at - span : at + 1]
                return first
        return None

    def _count(self, cluster: int) -> None:
        index = cluster // self._refcounts.per_block
        if index >= len(self._refcounts.table) or not self._refcounts.block_offset(index):
            self._uncovered.add(cluster)
        else:
            self._refcounts.set(cluster, 1)

    def cover(self) -> int | None:
        """Gives every taken cluster a refcount block. Adds blocks and, if needed, a longer table.

        Returns:
            The number of clusters of the old table if a longer one replaces it, else None.

        Raises:
            FormatError: the table would become longer than QEMU accepts.
        """
        refcounts = self._refcounts
        replaced = None
        while self._uncovered:
            needed = {cluster // refcounts.per_block for cluster in self._uncovered}
            index = max(needed)
            # New blocks may count each other, so several must appear at once: in a new table, by one pointer.
            several = len(needed | refcounts.new_blocks) > 1 and not refcounts.moved_table
            if several or index >= len(refcounts.table):
                # Has room for an eighth more, so that the blocks which the new table itself needs fit as well.
                per_cluster = self._cluster_size // qcow2.TABLE_ENTRY_SIZE
                clusters = max(refcounts.table_clusters, ceil_div(index + 1 + index // 8, per_cluster) + 1)
                if clusters * self._cluster_size > qcow2.MAX_REFCOUNT_TABLE_BYTES:
                    raise FormatError(f"{self._path}: refcount table", "would grow past what QEMU accepts")
                if replaced is None:
                    replaced = refcounts.table_clusters
                refcounts.move_table(self.take(clusters), clusters)
                continue
            pending, self._uncovered = self._uncovered, set()
            for missing in sorted({cluster // refcounts.per_block for cluster in pending}):
                if not refcounts.block_offset(missing):
                    # The block may lie in the range that it covers itself.
                    place = self._find(1)
                    refcounts.add_block(missing, place)
                    self._count(place)
            for cluster in pending:
                self._count(cluster)
        return replaced
