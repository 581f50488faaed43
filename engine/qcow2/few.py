"""`Few`: which clusters of a qcow2 image are referenced, and how often, where an image has few references.

Counted with plain integers: importing numpy takes longer than all that changes such an image. Only what is common is
counted here. An image that has more, or anything odd, is left to `dirtmap.engine.qcow2.references`, whose answer for
any other image is the same.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from dirtmap.engine.qcow2.layout import Layout
from dirtmap.engine.system.file import File
from dirtmap.fmt import qcow2
from dirtmap.fmt.geometry import ceil_div

MOST_BYTES = 1 << 20  # of L1 and L2 tables and the refcount table: takes 5 ms, and importing numpy 70
_MOST_CLUSTERS = 1 << 16  # of metadata


class Few:
    """References of one image.

    Attributes:
        times: how often each cluster is referenced, by its number; those that are not are left out.
        end: number of the first cluster behind all that are referenced.
    """

    def __init__(self, times: dict[int, int]) -> None:
        self.times = times
        self.end = max(times, default=-1) + 1

    def unused(self, clusters: Sequence[int]) -> list[int]:
        """Those of the clusters that nothing refers to."""
        return [cluster for cluster in clusters if cluster not in self.times]

    def shared(self, clusters: Sequence[int]) -> list[int]:
        """Those of the clusters that are referenced more than once."""
        return [cluster for cluster in clusters if self.times.get(cluster, 0) > 1]

    def claimed(self, clusters: Sequence[int]) -> list[int]:
        """Those of the clusters to which broken references lead. There are none."""
        return []


class _UnusualError(Exception):
    """The image has many references, or one that is not of the common kind."""


def count_few(file: File, layout: Layout, budget: int) -> Few | None:
    """Follows every reference, as `references.walk` does; None where that has to.

    Args:
        file: the image, locked by the caller.
        layout: as read from it.
        budget: the most bytes of L1 and L2 tables to read.
    """
    header = layout.header
    if layout.faults or header.v2.nb_snapshots or header.incompatible & qcow2.INCOMPATIBLE_DATA_FILE:
        return None
    times: dict[int, int] = {}
    try:
        for cluster in _clusters(file, layout, min(budget, MOST_BYTES)):
            times[cluster] = times.get(cluster, 0) + 1
    except _UnusualError:
        return None
    return Few(times)


def _clusters(file: File, layout: Layout, budget: int) -> Iterator[int]:
    """The number of the cluster, for each reference.

    Raises:
        _UnusualError: see there.
    """
    v2, cluster = layout.header.v2, layout.cluster_size
    left = _MOST_CLUSTERS
    for region in layout.regions():
        if region.length:
            numbers = range(region.offset // cluster, ceil_div(region.offset + region.length, cluster))
            left -= len(numbers)
            if left < 0:
                raise _UnusualError
            yield from numbers
    blocks = _entries(file, layout, v2.refcount_table_offset, v2.refcount_table_clusters * cluster)
    yield from _numbers(layout, blocks)
    length = v2.l1_size * qcow2.TABLE_ENTRY_SIZE
    if v2.l1_table_offset % cluster or v2.l1_table_offset + length > layout.file_size:
        raise _UnusualError
    l1 = [entry & qcow2.OFFSET_MASK for entry in _entries(file, layout, v2.l1_table_offset, length)]
    tables = [offset for offset in l1 if offset]
    if length + len(tables) * cluster > budget:
        raise _UnusualError
    yield from _numbers(layout, tables)
    for table in tables:  # one that is there twice is followed twice
        entries = _entries(file, layout, table, cluster, layout.header.l2_entry_size // qcow2.TABLE_ENTRY_SIZE)
        if any(entry & qcow2.L2_COMPRESSED for entry in entries):
            raise _UnusualError
        data = [entry & qcow2.OFFSET_MASK for entry in entries]
        yield from _numbers(layout, [offset for offset in data if offset])


def _entries(file: File, layout: Layout, offset: int, length: int, step: int = 1) -> list[int]:
    """The entries of a table that are not 0: every one, or the first of so many."""
    if length > MOST_BYTES:
        raise _UnusualError
    raw = file.read(offset, length).ljust(length, b"\0")
    return list(filter(None, struct.unpack(f">{length // 8}Q", raw)[::step]))


def _numbers(layout: Layout, offsets: Sequence[int]) -> list[int]:
    """The numbers of the clusters at these offsets, all of which must be inside the file."""
    cluster, size = layout.cluster_size, layout.file_size
    if any(offset % cluster or offset >= size for offset in offsets):
        raise _UnusualError
    return [offset // cluster for offset in offsets]
