"""Walks every reference to a cluster of a qcow2 image: the proof of what is used, whatever the refcounts say.

    header, tables, directory, bitmaps      from `Layout.regions`
    refcount table -> refcount blocks
    active L1, snapshots' L1s -> L2 tables -> data clusters, compressed runs

A backing file or an external data file is never opened: their clusters are not this file's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dirtmap.engine.fileio import File
from dirtmap.engine.qcow2.layout import Fault, Layout
from dirtmap.fmt import qcow2
from dirtmap.fmt.geometry import align_up, ceil_div

if TYPE_CHECKING:
    from numpy.typing import NDArray

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class References:
    """How often each cluster is referenced.

    Attributes:
        numbers: cluster numbers, ascending, each once, int64, shape (n,).
        counts: references to each, int64, shape (n,).
        faults: references that lead nowhere sensible. With any, absence from ``numbers`` proves nothing.
    """

    numbers: NDArray[np.int64]
    counts: NDArray[np.int64]
    faults: list[Fault] = field(default_factory=list)

    @classmethod
    def unknown(cls, why: str) -> References:
        """What is referenced cannot be told, so no cluster inside the file is proven free."""
        empty = np.empty(0, np.int64)
        return cls(empty, empty, [Fault("references", why)])

    def of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """How often each of those clusters is referenced, int64, same shape."""
        at = np.searchsorted(self.numbers, numbers)
        at[at == len(self.numbers)] = 0
        if not len(self.numbers):
            return np.zeros_like(numbers)
        return np.where(self.numbers[at] == numbers, self.counts[at], 0)

    @property
    def end(self) -> int:
        """The number of the first cluster behind all that are referenced."""
        return int(self.numbers[-1]) + 1 if len(self.numbers) else 0


class _Walk:
    def __init__(self, file: File, layout: Layout, progress: Progress | None) -> None:
        self.file, self.layout, self.progress = file, layout, progress
        self.header = layout.header
        self.cluster = layout.cluster_size
        self.numbers: list[NDArray[np.int64]] = []
        self.weights: list[NDArray[np.int64]] = []
        self.faults: list[Fault] = []

    def add(self, numbers: NDArray[np.int64], weight: int = 1) -> None:
        if len(numbers):
            numbers, counts = np.unique(numbers, return_counts=True)
            self.numbers.append(numbers)
            self.weights.append(counts.astype(np.int64) * weight)

    def add_region(self, offset: int, length: int) -> None:
        if length:
            self.add(np.arange(offset // self.cluster, ceil_div(offset + length, self.cluster), dtype=np.int64))

    def inside(self, offsets: NDArray[np.uint64], where: str) -> NDArray[np.uint64]:
        """Those offsets that are clusters inside the file; the others are blamed, once for each table.

        QEMU calls a reference corrupt that exceeds the file by a cluster or more (block/qcow2-refcount.c,
        qcow2_inc_refcounts_imrt).
        """
        good = (offsets % np.uint64(self.cluster) == 0) & (offsets < np.uint64(self.layout.file_size))
        if not good.all():
            wrong = offsets[~good]
            others = f" and {len(wrong) - 1} more like it" if len(wrong) > 1 else ""
            self.faults.append(Fault(where, f"{int(wrong[0]):#x} is not a cluster inside the file{others}"))
        inside: NDArray[np.uint64] = offsets[good]
        return inside

    def add_offsets(self, offsets: NDArray[np.uint64], where: str, weight: int = 1) -> None:
        self.add((self.inside(offsets, where) // np.uint64(self.cluster)).astype(np.int64), weight)

    def regions(self) -> None:
        for region in self.layout.regions():
            if region.bitmap is None:
                self.add_region(region.offset, region.length)
        bitmaps = [
            number
            for region in self.layout.regions()
            if region.bitmap is not None
            for number in range(region.offset // self.cluster, ceil_div(region.offset + region.length, self.cluster))
        ]
        self.add(np.array(bitmaps, np.int64))

    def refcount_blocks(self) -> None:
        v2 = self.header.v2
        raw = self.file.read(v2.refcount_table_offset, v2.refcount_table_clusters * self.cluster)
        blocks = qcow2.table_view(raw[: len(raw) // 8 * 8]).astype(np.uint64)
        self.add_offsets(blocks[blocks != 0], "refcount_table")

    def l1_tables(self) -> list[tuple[str, int, int]]:
        """Name, offset and entries of the active L1 table and those of all snapshots."""
        v2 = self.header.v2
        tables = [("L1 table", int(v2.l1_table_offset), int(v2.l1_size))]
        at = int(v2.snapshots_offset)
        budget = self.layout.file_size  # L1 tables of different snapshots do not overlap
        for index in range(v2.nb_snapshots):
            where = f"snapshot {index}"
            raw = self.file.read(at, qcow2.SNAPSHOT.size)
            if len(raw) < qcow2.SNAPSHOT.size:
                self.faults.append(Fault(where, "lies past the end of the file"))
                break
            snapshot = qcow2.SNAPSHOT.parse(raw)
            size = snapshot.extra_data_size + snapshot.id_size + snapshot.name_size
            budget -= snapshot.l1_size * qcow2.TABLE_ENTRY_SIZE
            if (
                snapshot.extra_data_size > qcow2.MAX_SNAPSHOT_EXTRA_DATA
                or snapshot.l1_size * qcow2.TABLE_ENTRY_SIZE > qcow2.MAX_L1_BYTES
                or budget < 0
            ):
                self.faults.append(Fault(where, "its L1 table or extra data is larger than QEMU accepts"))
                break
            self.add_region(int(snapshot.l1_table_offset), snapshot.l1_size * qcow2.TABLE_ENTRY_SIZE)
            tables.append((f"{where}: L1 table", int(snapshot.l1_table_offset), int(snapshot.l1_size)))
            at = align_up(at + qcow2.SNAPSHOT.size + size, 8)
        # `Layout.regions` knows the least size of the snapshot table only.
        least = int(v2.snapshots_offset) + v2.nb_snapshots * qcow2.SNAPSHOT.size
        if v2.nb_snapshots and align_up(at, self.cluster) > align_up(least, self.cluster):
            self.add_region(align_up(least, self.cluster), at - align_up(least, self.cluster))
        return tables

    def l2_tables(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Offsets of all L2 tables, each once, and how often each is referenced."""
        parts = []
        for where, offset, entries in self.l1_tables():
            raw = self.file.read(offset, entries * qcow2.TABLE_ENTRY_SIZE)
            table = qcow2.table_view(raw[: len(raw) // 8 * 8]).astype(np.uint64) & np.uint64(qcow2.OFFSET_MASK)
            parts.append(self.inside(table[table != 0], where))
        return np.unique(np.concatenate(parts), return_counts=True)

    def guest(self, tables: NDArray[np.uint64], weights: NDArray[np.int64]) -> None:
        self.add(np.repeat((tables // np.uint64(self.cluster)).astype(np.int64), weights))
        for done, (offset, weight) in enumerate(zip(tables.tolist(), weights.tolist(), strict=True)):
            if self.file.has_data(offset, self.cluster):
                self.l2_table(offset, weight)
            if self.progress:
                self.progress(done + 1, len(tables))

    def l2_table(self, offset: int, weight: int) -> None:
        raw = self.file.read(offset, self.cluster).ljust(self.cluster, b"\0")
        entries = qcow2.table_view(raw)[:: self.header.l2_entry_size // 8].astype(np.uint64)
        entries = entries[entries != 0]
        compressed = (entries & np.uint64(qcow2.L2_COMPRESSED)) != 0
        if compressed.any():
            self.compressed(entries[compressed], offset, weight)
            entries = entries[~compressed]
        if not self.header.incompatible & qcow2.INCOMPATIBLE_DATA_FILE:
            data = entries & np.uint64(qcow2.OFFSET_MASK)
            self.add_offsets(data[data != 0], f"L2 table at {offset:#x}", weight)

    def compressed(self, entries: NDArray[np.uint64], table: int, weight: int) -> None:
        """Compressed clusters: a byte offset and a number of additional 512-byte sectors, across cluster borders."""
        shift = 62 - (int(self.header.v2.cluster_bits) - 8)
        start = entries & np.uint64((1 << shift) - 1)
        more = (entries & np.uint64(qcow2.L2_COMPRESSED - 1)) >> np.uint64(shift)
        sector = np.uint64(qcow2.COMPRESSED_SECTOR)
        last = (start // sector + more) * sector + sector - np.uint64(1)
        first_cluster = (start // np.uint64(self.cluster)).astype(np.int64)
        last_cluster = (last // np.uint64(self.cluster)).astype(np.int64)
        good = start < np.uint64(self.layout.file_size)
        if not good.all():
            self.faults.append(Fault(f"L2 table at {table:#x}", "a compressed cluster lies past the end of the file"))
        span = int((last_cluster - first_cluster).max(initial=0))
        for step in range(span + 1):  # at most 2: a compressed cluster is no longer than a plain one
            self.add((first_cluster + step)[good & (first_cluster + step <= last_cluster)], weight)

    def finish(self) -> References:
        if not self.numbers:
            empty = np.empty(0, np.int64)
            return References(empty, empty, self.faults)
        numbers, weights = np.concatenate(self.numbers), np.concatenate(self.weights)
        order = np.argsort(numbers, kind="stable")
        numbers, weights = numbers[order], weights[order]
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))
        return References(numbers[starts], np.add.reduceat(weights, starts), self.faults)


def walk(
    file: File, layout: Layout, *, progress: Progress | None = None, budget: int | None = None
) -> References | None:
    """Follows every reference.

    Args:
        file: the image, locked by the caller.
        layout: as read from it.
        progress: called with (L2 tables done, L2 tables in all).
        budget: give up and return None where more bytes of L2 tables than this would have to be read.
    """
    steps = _Walk(file, layout, progress)
    tables, weights = steps.l2_tables()
    if budget is not None and len(tables) * layout.cluster_size > budget:
        return None
    steps.regions()
    steps.refcount_blocks()
    steps.guest(tables, weights)
    return steps.finish()
