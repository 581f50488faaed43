"""Walks every reference to a cluster of a qcow2 image. It proves which clusters are used, whatever the refcounts say.

    header, tables, directory, bitmaps      from `Layout.regions`
    refcount table -> refcount blocks
    active L1, snapshots' L1s -> L2 tables -> data clusters, compressed runs

A backing file or an external data file is never opened, because their clusters are not in this file. Holes are skipped,
so the walk takes time for the tables that exist, not for those that a sparse file claims to have.

A complete walk remembers every guest cluster, which takes memory. A commit asks less: are *these* clusters free? So in
a large image `walk` follows everything but L2 tables, and `follow` streams those past the clusters in question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dirtmap.engine.qcow2.layout import Fault, Layout
from dirtmap.engine.system.file import File
from dirtmap.fmt import qcow2
from dirtmap.fmt.geometry import ceil_div

if TYPE_CHECKING:
    from numpy.typing import NDArray

Progress = Callable[[int, int], None]

_READ = 1 << 20  # bytes of a long table, or of adjacent L2 tables, at a time
_BUCKETS = 24  # log2 of the number of buckets of clusters, one byte each
_ACTIVE = "L1 table"
_SEEK = 16 << 10  # cost of a seek, in bytes that could be read meanwhile


@dataclass(slots=True)
class Runs:
    """Runs of adjacent clusters that have the same number of references: ascending, without overlap.

    Attributes:
        starts, ends: number of the first cluster, and of the first behind the run; int64, shape (n,).
        counts: number of references to each cluster of the run, above 0; int64, shape (n,).
    """

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    counts: NDArray[np.int64]

    @classmethod
    def of_clusters(cls, numbers: NDArray[np.int64], weight: int) -> Runs:
        """Runs of these clusters (int64, any order), each repeated per reference; all counts times ``weight``."""
        if not len(numbers):
            return cls(numbers, numbers, numbers)
        numbers, counts = np.unique(numbers, return_counts=True)
        new = np.flatnonzero((np.diff(numbers, prepend=-2) != 1) | (np.diff(counts, prepend=0) != 0))
        ends = numbers[np.append(new[1:], len(numbers)) - 1] + 1
        return cls(numbers[new], ends, counts[new] * weight)

    @classmethod
    def laid_over(cls, parts: list[Runs]) -> Runs:
        """The sum of all parts. Inside a part, runs may overlap and be in any order. Empties the list."""
        #   runs       ----2----            steps  +2    +1   -2   -1
        #                   ---1---         levels  2     3    1    0     from each position to the next
        empty = np.empty(0, np.int64)
        starts = np.concatenate([empty, *(part.starts for part in parts)])
        ends = np.concatenate([empty, *(part.ends for part in parts)])
        counts = np.concatenate([empty, *(part.counts for part in parts)])
        parts.clear()
        positions, steps = np.concatenate([starts, ends]), np.concatenate([counts, -counts])
        del starts, ends, counts
        order = np.argsort(positions, kind="stable")
        positions, levels = positions[order], np.cumsum(steps[order])
        last = np.flatnonzero(np.diff(positions, append=-1))  # the last of those at one position
        positions, levels = positions[last], levels[last]
        used = np.flatnonzero(levels)
        return cls(positions[used], positions[used + 1], levels[used])

    def of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of references to each of those clusters, int64, same shape."""
        if not len(self.starts):
            return np.zeros_like(numbers)
        at = np.searchsorted(self.starts, numbers, side="right") - 1
        return np.where((at >= 0) & (numbers < self.ends[at]), self.counts[at], 0)

    def between(self, first: int, last: int) -> NDArray[np.int64]:
        """The number of references to each of the clusters ``first..last - 1``, int64, shape (last - first,)."""
        steps = np.zeros(last - first + 1, np.int64)
        low = np.searchsorted(self.ends, first, side="right")
        high = np.searchsorted(self.starts, last, side="left")
        steps[np.maximum(self.starts[low:high] - first, 0)] += self.counts[low:high]
        steps[np.minimum(self.ends[low:high], last) - first] -= self.counts[low:high]
        return np.cumsum(steps)[:-1]

    def most(self, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
        """The highest number of references to a cluster of each range, int64, same shape as ``starts``."""
        if not len(self.starts):
            return np.zeros_like(starts)
        low = np.searchsorted(self.ends, starts, side="right")
        high = np.searchsorted(self.starts, ends, side="left")
        # `reduceat` needs every index inside, hence the sentinel, and gives the element at `low` for an empty range.
        found = np.maximum.reduceat(np.append(self.counts, 0), np.stack([low, np.maximum(high, low)], 1).ravel())[::2]
        return np.where(low < high, found, 0)

    def within(self, first: int, last: int) -> Runs:
        """The runs cut down to the clusters ``first..last - 1``."""
        low = np.searchsorted(self.ends, first, side="right")
        high = np.searchsorted(self.starts, last, side="left")
        starts, ends = np.maximum(self.starts[low:high], first), np.minimum(self.ends[low:high], last)
        return Runs(starts, ends, self.counts[low:high])

    @property
    def end(self) -> int:
        """The number of the first cluster behind all that are referenced."""
        return int(self.ends[-1]) if len(self.ends) else 0


@dataclass(slots=True)
class References:
    """Which clusters are referenced, and how often.

    Attributes:
        runs: all referenced clusters.
        uncopied: clusters to which an active table refers without the flag "copied", which says that no other does.
        astray: clusters to which broken references lead, past the end of the file or off a cluster's start. QEMU would
            take what is written there for a table or for guest data.
        faults: references that are broken, or were not followed. If there is any, no cluster is proven free.
        unfollowed: offsets of L2 tables that were left out, in bytes, ascending, uint64. What they refer to is not in
            ``runs``.
        cost: of reading all L2 tables that say where guest data are in this file, in bytes; a seek counts as some more.
    """

    runs: Runs
    uncopied: Runs
    astray: Runs
    faults: list[Fault] = field(default_factory=list)
    unfollowed: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    cost: int = 0

    @property
    def end(self) -> int:
        """The number of the first cluster behind all that are referenced."""
        return self.runs.end

    def unused(self, clusters: Sequence[int]) -> list[int]:
        """Those of the clusters that nothing refers to, as far as it was followed."""
        numbers = np.array(clusters, np.int64)
        found: list[int] = numbers[self.runs.of(numbers) == 0].tolist()
        return found

    def shared(self, clusters: Sequence[int]) -> list[int]:
        """Those of the clusters that are referenced more than once."""
        numbers = np.array(clusters, np.int64)
        found: list[int] = numbers[self.runs.of(numbers) > 1].tolist()
        return found

    def claimed(self, clusters: Sequence[int]) -> list[int]:
        """Those of the clusters to which broken references lead; see ``astray``."""
        numbers = np.array(clusters, np.int64)
        found: list[int] = numbers[self.astray.of(numbers) > 0].tolist()
        return found

    @classmethod
    def unknown(cls, why: str) -> References:
        """For an image whose references are unknown, so that no cluster inside the file is proven free."""
        return cls(Runs.laid_over([]), Runs.laid_over([]), Runs.laid_over([]), [Fault("references", why)])


class _Walk:
    def __init__(self, file: File, layout: Layout, progress: Progress | None) -> None:
        self.file, self.layout, self.progress = file, layout, progress
        self.header = layout.header
        self.cluster = layout.cluster_size
        self.parts: list[Runs] = []
        self.uncopied: list[Runs] = []
        self.astray: list[Runs] = []
        self.faults: list[Fault] = []
        self.unfollowed = np.empty(0, np.uint64)
        self.cost = 0

    def add(self, numbers: NDArray[np.int64], weight: int = 1) -> None:
        if len(numbers):
            self.parts.append(Runs.of_clusters(numbers, weight))

    def add_offsets(self, offsets: NDArray[np.uint64], where: str, weight: int = 1) -> NDArray[np.uint64]:
        """Like `add`, for offsets (bytes) of clusters that must lie inside the file. Returns those that do.

        QEMU calls a reference corrupt if it exceeds the file by a cluster or more (block/qcow2-refcount.c,
        qcow2_inc_refcounts_imrt).
        """
        good = (offsets & np.uint64(self.cluster - 1) == 0) & (offsets < np.uint64(self.layout.file_size))
        if not good.all():
            wrong = offsets[~good]
            others = f" and {len(wrong) - 1} more like it" if len(wrong) > 1 else ""
            self.faults.append(Fault(where, f"{int(wrong[0]):#x} is not a cluster inside the file{others}"))
            ends = self.numbers(wrong + np.uint64(self.cluster - 1))
            self.astray.append(Runs.of_clusters(np.concatenate([self.numbers(wrong), ends]), 1))
        offsets = offsets[good]
        self.add(self.numbers(offsets), weight)
        return offsets

    def numbers(self, offsets: NDArray[np.uint64]) -> NDArray[np.int64]:
        return (offsets >> np.uint64(self.cluster.bit_length() - 1)).astype(np.int64)

    def regions(self) -> None:
        regions = [region for region in self.layout.regions() if region.length]
        starts = np.array([region.offset // self.cluster for region in regions], np.int64)
        ends = np.array([ceil_div(region.offset + region.length, self.cluster) for region in regions], np.int64)
        self.parts.append(Runs(starts, ends, np.ones_like(starts)))

    def refcount_blocks(self) -> None:
        v2 = self.header.v2
        for blocks in self.entries(v2.refcount_table_offset, v2.refcount_table_clusters * self.cluster):
            self.add_offsets(blocks, "refcount_table")

    def entries(self, offset: int, length: int) -> Iterator[NDArray[np.uint64]]:
        """The non-zero entries of a long table, piece by piece, uint64, as far as the file has them."""
        end = min(offset + length, self.layout.file_size)
        for at in range(offset, end if self.file.has_data(offset, length) else offset, _READ):
            size = min(_READ, offset + length - at)
            if self.file.has_data(at, size):
                raw = self.file.read(at, size)
                piece = qcow2.table_view(raw[: len(raw) // 8 * 8]).astype(np.uint64)
                yield piece[piece != 0]

    def l1_tables(self) -> Iterator[tuple[str, int, int]]:
        """Name, offset and length in bytes of the active L1 table (`_ACTIVE`) and of all snapshots' L1 tables."""
        v2 = self.header.v2
        tables = [(int(v2.l1_table_offset), v2.l1_size * qcow2.TABLE_ENTRY_SIZE, _ACTIVE)]
        for index, snapshot in enumerate(self.layout.snapshots):
            length = snapshot.l1_size * qcow2.TABLE_ENTRY_SIZE
            tables.append((snapshot.l1_table_offset, length, f"L1 table of snapshot {index}"))
        reach = 0
        for offset, length, where in sorted(tables):
            if length > qcow2.MAX_L1_BYTES:
                self.faults.append(Fault(where, f"{length} bytes are more than QEMU accepts"))
            elif offset % self.cluster or offset + length > self.layout.file_size:
                self.faults.append(Fault(where, f"{offset:#x} is not a place for {length} bytes inside the file"))
                first, last = offset // self.cluster, ceil_div(offset + length, self.cluster)
                if length:
                    self.astray.append(Runs(*np.array([[first], [last], [1]], np.int64)))
            elif offset < reach:
                self.faults.append(Fault(where, f"overlaps another one at {offset:#x}"))
            else:
                reach = offset + length
                yield where, offset, length

    def guest(self, budget: int | None) -> None:
        """Adds what the L1 tables and the L2 tables refer to."""
        l1_tables = list(self.l1_tables())
        if budget is not None and sum(length for _, _, length in l1_tables) > max(budget, qcow2.MAX_L1_BYTES):
            self.faults.append(Fault("references", "not followed: too many L1 tables"))
            return
        parts, active = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
        for where, offset, length in l1_tables:
            for entries in self.entries(offset, length):
                if where == _ACTIVE:
                    self.note_uncopied(entries)
                tables = entries & np.uint64(qcow2.OFFSET_MASK)
                parts.append(self.add_offsets(tables[tables != 0], where))
                if where == _ACTIVE:
                    active.append(parts[-1])
        tables, weights = np.unique(np.concatenate(parts), return_counts=True)
        elsewhere = self.header.incompatible & qcow2.INCOMPATIBLE_DATA_FILE
        if budget is not None and elsewhere:
            return  # they lead to the data file; QEMU does not follow compressed ones
        if not elsewhere:
            self.cost = len(tables) * self.cluster + int(np.count_nonzero(np.diff(tables) != self.cluster)) * _SEEK
        if budget is not None and len(tables) * self.cluster > budget:
            self.unfollowed = tables
            return
        del parts
        in_use = np.sort(np.concatenate(active))
        for index in self.file.with_data(tables.data, self.cluster):
            at = int(np.searchsorted(in_use, tables[index]))
            is_active = at < len(in_use) and in_use[at] == tables[index]
            self.l2_table(int(tables[index]), int(weights[index]), bool(is_active))
            if self.progress:
                self.progress(index + 1, len(tables))
        if self.progress:
            self.progress(len(tables), len(tables))

    def note_uncopied(self, entries: NDArray[np.uint64]) -> None:
        uncopied = entries[(entries & np.uint64(qcow2.COPIED)) == 0] & np.uint64(qcow2.OFFSET_MASK)
        if len(uncopied):
            self.uncopied.append(Runs.of_clusters(self.numbers(uncopied), 1))

    def l2_table(self, offset: int, weight: int, active: bool) -> None:
        self.l2_entries(self.file.read(offset, self.cluster).ljust(self.cluster, b"\0"), offset, weight, active)

    def l2_entries(self, raw: bytes, offset: int, weight: int, active: bool) -> None:
        """Adds what the entries of an L2 table at ``offset``, or of several adjacent ones, refer to."""
        entries = qcow2.table_view(raw)[:: self.header.l2_entry_size // 8].astype(np.uint64)
        entries = entries[entries != 0]
        compressed = (entries & np.uint64(qcow2.L2_COMPRESSED)) != 0
        if compressed.any():
            self.compressed(entries[compressed], offset, weight)
            entries = entries[~compressed]
        if not self.header.incompatible & qcow2.INCOMPATIBLE_DATA_FILE:
            if active:
                self.note_uncopied(entries)
            data = entries & np.uint64(qcow2.OFFSET_MASK)
            self.add_offsets(data[data != 0], f"L2 table at {offset:#x}", weight)

    def compressed(self, entries: NDArray[np.uint64], table: int, weight: int) -> None:
        """Adds compressed clusters: a byte offset and more 512-byte sectors, which may cross cluster borders."""
        shift = 62 - (int(self.header.v2.cluster_bits) - 8)
        start = entries & np.uint64((1 << shift) - 1)
        more = (entries & np.uint64(qcow2.L2_COMPRESSED - 1)) >> np.uint64(shift)
        sector = np.uint64(qcow2.COMPRESSED_SECTOR)
        last = (start // sector + more) * sector + sector - np.uint64(1)
        good = start < np.uint64(self.layout.file_size)
        if not good.all():
            what = "a compressed cluster lies past the end of the file"
            self.faults.append(Fault(f"L2 table at {table:#x}", what))
        first_cluster, last_cluster = self.numbers(start[good]), self.numbers(last[good])
        span = int((last_cluster - first_cluster).max(initial=0))  # at most 2: no longer than a plain one
        steps = [first_cluster + step for step in range(span + 1)]
        self.add(np.concatenate([numbers[numbers <= last_cluster] for numbers in steps]), weight)


def walk(file: File, layout: Layout, *, progress: Progress | None = None, budget: int | None = None) -> References:
    """Follows every reference.

    Args:
        file: the image, locked by the caller.
        layout: as read from it.
        progress: called with (L2 tables done, L2 tables in all).
        budget: the most bytes of L2 tables to read. If there are more, all of them are left ``unfollowed``; if guest
            data are in another file, none is needed. None for no limit, as a check wants it.
    """
    steps = _Walk(file, layout, progress)
    steps.regions()
    steps.refcount_blocks()
    steps.guest(budget)
    parts, uncopied, astray = (Runs.laid_over(each) for each in (steps.parts, steps.uncopied, steps.astray))
    return References(parts, uncopied, astray, steps.faults, steps.unfollowed, steps.cost)


class _Window(_Walk):
    """Streams L2 tables past the clusters in question, and records for each whether a reference to it was met.

    Args:
        numbers: of these clusters; ascending, without duplicates, int64.
    """

    #  number        | bucket it is in | position among the numbers |
    #  Most numbers end at the first step, because no cluster in question is in their bucket.

    def __init__(self, file: File, layout: Layout, numbers: NDArray[np.int64]) -> None:
        super().__init__(file, layout, None)
        self.asked = numbers
        self.met = np.zeros(len(numbers), np.bool_)
        self.end = 0
        top = int(numbers[-1]) if len(numbers) else 0
        self.shift = max(0, top.bit_length() - _BUCKETS)
        self.buckets = np.zeros((top >> self.shift) + 2, np.bool_)  # the last bucket is for all clusters beyond
        self.buckets[numbers >> self.shift] = True

    def add(self, numbers: NDArray[np.int64], weight: int = 1) -> None:
        if len(numbers):
            self.end = max(self.end, int(numbers.max()) + 1)
            near = numbers[self.buckets[np.minimum(numbers >> self.shift, len(self.buckets) - 1)]]
            at = np.minimum(np.searchsorted(self.asked, near), len(self.asked) - 1)
            self.met[at[self.asked[at] == near]] = True

    def note_uncopied(self, entries: NDArray[np.uint64]) -> None:
        pass

    def stream(self, tables: NDArray[np.uint64]) -> bool:
        """Reads the tables. False at the first reference that is broken."""
        most = max(1, _READ // self.cluster)
        ends = np.flatnonzero(np.diff(tables, append=0) != self.cluster) + 1  # ends of the runs of adjacent tables
        first = 0
        for end in ends.tolist():
            while first < end:
                size = min(most, end - first) * self.cluster
                raw = self.file.read(int(tables[first]), size).ljust(size, b"\0")
                self.l2_entries(raw, int(tables[first]), 1, False)
                if self.faults:
                    return False
                first += size // self.cluster
        return True


def follow(file: File, layout: Layout, references: References, numbers: NDArray[np.int64]) -> References | None:
    """Reads the L2 tables that a walk left ``unfollowed``, to prove some clusters free.

    Args:
        file: the image, locked by the caller.
        layout: as read from it.
        references: of a walk under that lock.
        numbers: of these clusters, in any order, int64. Those that the walk met are looked up as well.

    Returns:
        The same references, with those from guest data that lead to any of these clusters, and one to the last cluster
        of guest data. None if a reference is broken, so that no cluster is proven free.
    """
    runs = references.runs
    sizes = runs.ends - runs.starts
    used = np.repeat(runs.ends - np.cumsum(sizes), sizes) + np.arange(int(sizes.sum()), dtype=np.int64)
    window = _Window(file, layout, np.unique(np.concatenate([numbers, used])))
    if not window.stream(references.unfollowed):
        return None
    met = window.asked[window.met]
    if window.end and not (len(met) and met[-1] == window.end - 1):
        met = np.append(met, window.end - 1)
    parts = [Runs(runs.starts, runs.ends, runs.counts), Runs.of_clusters(met, 1)]
    return References(Runs.laid_over(parts), references.uncopied, references.astray, references.faults)
