"""`SpaceMap`: which clusters of a store are free. It finds them without looking at what uses the others.

    root:  | leaf 0: offset, free, CRC | leaf 1 | ...        one bit a cluster, 1 = used or released,
    leaf:  | 1 1 1 0 0 1 ... |                               clusters numbered from the start of the file

In memory a leaf is one integer whose bit n is that of its cluster n. That is faster than an array, and needs no import.

A commit may use a cluster only if *neither* header slot refers to it: the older slot is what a reader falls back to,
and what a crash during the commit leaves. So what commit N stops using is listed as *released* by N and stays marked.
Commit N + 1 clears those marks, while it overwrites the slot that referred to those clusters. Commit N + 2 is the first
that may use them.

    commit          N - 1        N           N + 1         N + 2
    cluster         used         released    free          may be used
    slots hold      N-1, N-2     N, N-1      N+1, N        N+1, N while it works
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

from dirtmap.fmt import store
from dirtmap.fmt.digest import crc32c
from dirtmap.fmt.errors import FormatError, StorageError, counted
from dirtmap.fmt.geometry import ceil_div
from dirtmap.fmt.parsers.store import LEAF, RUN
from dirtmap.fmt.store import Area

Write = tuple[int, bytes | memoryview]

# Number of leaves to search for a run of clusters, from the first leaf on and again from the emptiest. After that the
# run is taken at the end of the file instead.
_MOST_LEAVES_SEARCHED = 4
# About the number of runs that clusters of one bitmap are spread over, so that they can be read in few pieces.
_MOST_RUNS = 128


class SpaceMap:
    """The map as one commit finds it, and as it leaves it.

    Args:
        where: path of the store, for messages.
        cluster_size: in bytes.
        clusters: number of clusters that the map covers, which is the length of the file.
        root: the bytes of the map's root.
        released: (first, count) of the runs of clusters that the last commit released.
        read: returns the bytes of an area, verified.

    Attributes:
        clusters: as above, with those that were taken behind the end.
        newly_released: (first, count) of the runs of clusters that this commit gives up, in no order.
        reuses: False: takes clusters behind the end only, because somebody may still read what others had.

    Raises:
        FormatError: the root does not cover the clusters, or two leaves have the same offset.
    """

    reuses = True

    def __init__(
        self,
        where: str,
        cluster_size: int,
        clusters: int,
        root: bytes,
        released: Iterable[tuple[int, int]],
        read: Callable[[Area, str], bytes],
    ) -> None:
        self._where, self._cluster, self.clusters, self._read = where, cluster_size, clusters, read
        self.per_leaf = store.leaf_clusters(cluster_size)
        if (count := len(root) // LEAF.size) != ceil_div(clusters, self.per_leaf):
            what = f"{counted(count, 'leaf', 'leaves')}, which do not cover {counted(clusters, 'cluster')}"
            raise FormatError(f"{where}: space map", what)
        leaves = [LEAF.parse(root, at) for at in range(0, len(root), LEAF.size)]
        self.places = [Area(leaf.offset, cluster_size, leaf.checksum) for leaf in leaves]
        self.free = [int(leaf.free) for leaf in leaves]
        if len({place.offset for place in self.places}) != count:
            raise FormatError(f"{where}: space map", "two leaves share a place")
        self._released = list(released)
        self.newly_released: list[tuple[int, int]] = []
        self._leaves: dict[int, int] = {}
        self._changed: set[int] = set()

    def leaf(self, index: int) -> int:
        """Leaf ``index`` with all changes so far: bit n is set if its cluster n is used or released."""
        if index not in self._leaves:
            self._leaves[index] = self.read_leaf(index)
        return self._leaves[index]

    def read_leaf(self, index: int) -> int:
        """Leaf ``index`` as the last commit left it. It is not kept in memory.

        Raises:
            FormatError: the leaf is damaged, or contradicts the root.
        """
        leaf = int.from_bytes(self._read(self.places[index], f"space map leaf {index}"), "little")
        where = f"{self._where}: space map[{index}]"
        if (free := self.per_leaf - leaf.bit_count()) != self.free[index]:
            raise FormatError(f"{where}.free", f"{self.free[index]}, but {free} are free")
        if index == 0 and ~leaf & _ones(min(ceil_div(store.RESERVED, self._cluster), self.per_leaf)):
            raise FormatError(where, "the headers' clusters are marked as free")
        return leaf

    def take(self, count: int) -> int:
        """Marks ``count`` adjacent clusters, to which neither slot refers, as used. Returns the first one's number.

        Raises:
            StorageError: the store would become larger than its space map can show.
        """
        first = self._found(count)
        if first is None:
            first = self.clusters
            self._grow(count)
        self._mark(first, count, used=True)
        return first

    def take_runs(self, count: int) -> list[tuple[int, int]]:
        """Like `take`, but the clusters lie in several runs, (first, count), where the free ones inside the file do.

        Raises:
            StorageError: the store would become larger than its space map can show.
        """
        runs: list[tuple[int, int]] = []
        step, least = count, max(count // _MOST_RUNS, 1)
        while count:
            step = min(step, count)
            first = self._found(step)
            if first is not None:
                self._mark(first, step, used=True)
                runs.append((first, step))
                count -= step
            elif step > least:
                step = max(step // 2, least)
            else:
                runs.append((self.take(count), count))
                break
        return runs

    def untake(self, first: int, count: int) -> None:
        """Marks clusters as free that this commit has taken and does not use."""
        self._mark(first, count, used=False)

    def _found(self, count: int) -> int | None:
        """The first of ``count`` adjacent free clusters inside the file; None if a short search finds none."""
        if not self.reuses:
            return None
        if count > self.per_leaf:
            return self._found_across(count)
        possible = [index for index, free in enumerate(self.free) if free >= count]
        if len(possible) > 1:
            possible = self._ordered(possible)
        for index in possible:
            start = _run(self.leaf(index), count)
            if start + count <= min(self.per_leaf, self.clusters - index * self.per_leaf):
                return index * self.per_leaf + start
        return None

    def _ordered(self, possible: list[int]) -> list[int]:
        """The order of the search: first leaves that are rewritten anyway, last the emptiest, so that they stay so."""
        near = [index for index in possible if index not in self._changed][:_MOST_LEAVES_SEARCHED]
        emptiest = heapq.nlargest(_MOST_LEAVES_SEARCHED, possible, key=lambda index: self.free[index])
        return list(dict.fromkeys([*sorted(self._changed.intersection(possible)), *near, *emptiest]))

    def _found_across(self, count: int) -> int | None:
        """Like `_found` for more clusters than a leaf has: a leaf's free end, free leaves, a leaf's free start."""
        index = 0
        while index < len(self.free):
            first = index
            while index < len(self.free) and self.free[index] == self.per_leaf:
                index += 1
            if (index - first + 2) * self.per_leaf >= count and index > first:
                start, end = first * self.per_leaf, index * self.per_leaf
                if first:
                    start -= self.per_leaf - self.leaf(first - 1).bit_length()
                if index < len(self.free):
                    end += _first(self.leaf(index))
                if min(end, self.clusters) - start >= count:
                    return start
            index += 1
        return None

    def _grow(self, count: int) -> None:
        self.clusters += count
        leaves = ceil_div(self.clusters, self.per_leaf)
        if self.clusters * self._cluster > store.MAX_FILE_BYTES or leaves * LEAF.size > store.MAX_SPACE_MAP_BYTES:
            raise StorageError(self._where, "the store would become larger than its space map can show")
        while len(self.places) * self.per_leaf < self.clusters:
            self._leaves[len(self.places)] = 0
            self._changed.add(len(self.places))
            self.places.append(Area())
            self.free.append(self.per_leaf)

    def _mark(self, first: int, count: int, *, used: bool) -> None:
        for index, start, here in self._parts([(first, count)]):
            leaf, part = self.leaf(index), _ones(here) << start
            marked = (leaf >> start & _ones(here)).bit_count()
            self._leaves[index] = leaf | part if used else leaf & ~part
            self.free[index] += marked - here if used else marked
            self._changed.add(index)

    def _parts(self, runs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
        """Splits runs at leaf boundaries: the leaf's number, the first cluster in it, and the count."""
        for first, count in runs:
            while count:
                index, start = divmod(first, self.per_leaf)
                here = min(count, self.per_leaf - start)
                yield index, start, here
                first, count = first + here, count - here

    def _free_released(self) -> None:
        """Clears the marks of what the last commit released; leaf by leaf, because there may be a million runs."""
        for index, parts in groupby(self._parts(self._released), key=lambda part: part[0]):
            mask = bytearray(self._cluster)
            for _, start, count in parts:
                at = slice(start // 8, (start + count - 1) // 8 + 1)
                bits = int.from_bytes(mask[at], "little") | _ones(count) << start % 8
                mask[at] = bits.to_bytes(len(mask[at]), "little")
            leaf = self.leaf(index)
            left = leaf & ~int.from_bytes(mask, "little")
            self._leaves[index] = left
            self.free[index] += leaf.bit_count() - left.bit_count()

    def release(self, area: Area) -> None:
        """Gives up an area in this commit. The commit after the next may reuse it."""
        if clusters := area.clusters(self._cluster):
            self.newly_released.append((clusters.start, len(clusters)))

    def keep(self, runs: list[tuple[int, int]]) -> None:
        """Takes back that these runs were given up in this commit."""
        kept = set(runs)
        self.newly_released = [run for run in self.newly_released if run not in kept]

    def seal(self, old_root: Area, old_released: Area) -> tuple[Area, Area, list[Write]]:
        """Ends the changes to the map. Its own parts are replaced like all others.

        Returns:
            The area of the root, the area of the released list, and what to write.

        Raises:
            StorageError: the change is too large for one commit.
        """
        self.release(old_root)
        self.release(old_released)
        self._changed |= {index for index, _, _ in self._parts(self._released)}
        placed: dict[int, int] = {}
        root = released = (0, 0)  # first cluster, clusters
        while True:
            # Giving a leaf a place can change another leaf, which then needs one, too.
            for index in sorted(self._changed - placed.keys()):
                if self.places[index].length:
                    self.release(self.places[index])
                placed[index] = self.take(1)
            runs = merged(self.newly_released)
            if len(runs) * RUN.size > store.MAX_RELEASED_BYTES:
                raise StorageError(self._where, "the change is too large for one commit")
            root = self._resized(root, len(self.places) * LEAF.size)
            released = self._resized(released, len(runs) * RUN.size)
            if self._changed <= placed.keys() and root[1] * self._cluster >= len(self.places) * LEAF.size:
                break
        self._free_released()
        writes: list[Write] = []
        for index, cluster in placed.items():
            raw = self._leaves[index].to_bytes(self._cluster, "little")
            self.places[index] = _written(writes, cluster * self._cluster, raw)
        root_bytes = b"".join(
            LEAF.build(offset=place.offset, free=free, checksum=place.checksum)
            for place, free in zip(self.places, self.free, strict=True)
        )
        run_bytes = b"".join(RUN.build(first=first, count=count) for first, count in runs)
        return (
            _written(writes, root[0] * self._cluster, root_bytes),
            _written(writes, released[0] * self._cluster, run_bytes),
            writes,
        )

    def _resized(self, place: tuple[int, int], length: int) -> tuple[int, int]:
        wanted = ceil_div(length, self._cluster)
        if place[1] >= wanted:
            # Runs can merge while leaves are placed, so that less is needed than was taken.
            self._mark(place[0] + wanted, place[1] - wanted, used=False)
            return place[0], wanted
        if place[1]:
            self._mark(*place, used=False)  # taken in this commit, so nothing refers to it
        return self.take(wanted), wanted


def _written(writes: list[Write], offset: int, raw: bytes) -> Area:
    if not raw:
        return Area()
    writes.append((offset, raw))
    return Area(offset, len(raw), crc32c(raw))


def _ones(count: int) -> int:
    return (1 << count) - 1


def _first(bits: int) -> int:
    """The number of the lowest set bit; -1 if none is set."""
    return (bits & -bits).bit_length() - 1


def _run(leaf: int, count: int) -> int:
    """The first of ``count`` adjacent free clusters. All clusters behind the leaf's last mark count as free.

    In each step a bit stands for a longer run of clusters that begins with its own:

    free     1 1 0 1 1 1 1 0 1 1            bit 0 on the left
    2        1 0 0 1 1 1 0 0 1 0            free, and the next too:      bits & bits >> 1
    3        0 0 0 1 1 0 0 0 0 0            and the one behind them:     bits & bits >> 1
    """
    length, free = 1, ~leaf  # negative, so it has infinitely many ones
    while length < count:
        step = min(length, count - length)
        free &= free >> step
        length += step
    return _first(free)


def merged(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merges runs of clusters, (first, count): the result is ascending, disjoint and not adjacent."""
    found: list[tuple[int, int]] = []
    for first, count in sorted(runs):
        if found and (end := sum(found[-1])) >= first:
            found[-1] = found[-1][0], max(end, first + count) - found[-1][0]
        else:
            found.append((first, count))
    return found
