r"""The bits of a bitmap in a store: a tree of clusters, of which a reader reads, and a commit writes, what it needs.

    level 2        node: pointers                    a cluster each, of 16-byte pointers: place and CRC32C
                  /      |      \
    level 1   node      all     node                 a place of 0: all clean below; of 1: all dirty below
             /    \    clean       \
    level 0  chunk  all dirty      chunk             a cluster of packed bits

Chunks and nodes are numbered from 0 on each level. A cluster belongs to one bitmap. A damaged one makes all that is
below it dirty; that is no error, but it is told. Source: SPEC.md, "Bitmaps in a store".
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dirtmap.engine.model import bits
from dirtmap.engine.model.content import PAGE, Changed, Combined, Content
from dirtmap.engine.storefile.entries import Shape, Tree
from dirtmap.engine.system import memory
from dirtmap.fmt import geometry, store
from dirtmap.fmt.digest import crc32c, crc32c_each
from dirtmap.fmt.errors import Error, FormatError, counted
from dirtmap.fmt.store import ALL_ONES, ALL_ZEROS, Area

if TYPE_CHECKING:
    from dirtmap.engine.model.content import Part
    from dirtmap.engine.storefile.file import Change, Snapshot

Positions = NDArray[np.int64]
Pointers = NDArray[np.void]

_POINTER = np.dtype([("place", ">u8"), ("checksum", ">u4"), ("reserved", ">u4")])
_PIECE = 1 << 18  # bytes that are read at a time, so that they are still in the cache when they are verified
_BLOCK = 1 << 22  # bytes that are looked at in one step
_UNKNOWN = -1  # in place of a place: the bits cannot be read, so whatever is there has to be written anew
_NEAR = 4  # chunks: so far from each other they are read together with what is between them
_PARTLY = 8  # times that a part of the nodes is read; then all are
_SPARSE = 8  # an array of which less than one part in so many is set gets its memory in small pages


class Damage(NamedTuple):
    """Chunks from ``first`` up to ``end`` that count as dirty, because what they are in, or under, is damaged.

    The ``place`` of the first of that is in bytes.
    """

    first: int
    end: int
    place: int


@dataclass(slots=True)
class Found:
    """What a tree leads to.

    Attributes:
        shape: of the tree.
        root: the root's place and checksum; those of what is all dirty, if it is damaged.
        nodes: pointers of each node, by level and number, if they were asked for. Those to what is damaged say that it
            is all dirty.
        at: the place of each of these nodes.
        chunks: the numbers of the chunks that have a cluster; ascending.
        places: where each of them is.
        checksums: of each of them.
        dirty: runs of chunks that are all dirty, first and end; ascending.
        damaged: what is damaged.
        lost_nodes: a node is damaged, so that not all clusters of the tree are known.
    """

    shape: Shape
    root: tuple[int, int]
    nodes: dict[tuple[int, int], Pointers] = field(default_factory=dict)
    at: dict[tuple[int, int], int] = field(default_factory=dict)
    chunks: Positions = field(default_factory=lambda: np.empty(0, np.int64))
    places: Positions = field(default_factory=lambda: np.empty(0, np.int64))
    checksums: Positions = field(default_factory=lambda: np.empty(0, np.int64))
    dirty: list[tuple[int, int]] = field(default_factory=list)
    damaged: list[Damage] = field(default_factory=list)
    lost_nodes: bool = False

    def lose(self, level: int, first: int, end: int, place: int) -> None:
        """Notes that nodes or chunks from ``first`` up to ``end`` are damaged, so that all below them is dirty."""
        below = self.shape.below(level)
        self.damaged.append(Damage(first * below, min(end * below, self.shape.chunks), place))
        self.lost_nodes |= level > 0
        if level == self.shape.top:
            self.root = ALL_ONES, 0
            return
        fan = self.shape.fan
        for above in range(first // fan, (end - 1) // fan + 1):
            if (table := self.nodes.get((level + 1, above))) is not None:
                table[max(first - above * fan, 0) : end - above * fan] = (ALL_ONES, 0, 0)

    def table(self, level: int, index: int) -> Pointers:
        """The pointers of a node. One that takes no space gets the pointers that say the same."""
        if (level, index) not in self.nodes:
            shape = self.shape
            above = self.root[0]
            if level < shape.top:
                above = int(self.table(level + 1, index // shape.fan)["place"][index % shape.fan])
            made = np.zeros(shape.fan, _POINTER)
            made["place"][: shape.children(level, index)] = ALL_ZEROS if above == ALL_ZEROS else ALL_ONES
            self.nodes[level, index] = made
        return self.nodes[level, index]

    def told(self) -> str | None:
        """What is damaged, in words; None if nothing is."""
        return _told(self.shape, self.damaged) if self.damaged else None


def _told(shape: Shape, damaged: list[Damage]) -> str:
    granules = sum(shape.dirty_bits(first, end) for first, end, _ in damaged)
    where = f"at {damaged[0].place:#x}" + (f" and {len(damaged) - 1} more" if len(damaged) > 1 else "")
    return f"bits are damaged {where}, so {counted(granules, 'granule')} of {shape.nbits} must count as dirty"


def walk(snapshot: Snapshot, tree: Tree, wanted: Positions | None = None, *, keep: bool = False) -> Found:
    """Reads and verifies the nodes of a tree.

    Args:
        snapshot: of the store.
        tree: of a bitmap.
        wanted: the chunks that are asked for, ascending: only the nodes above them are read. None for all.
        keep: also returns the nodes.
    """
    shape = Shape(tree.nbits, snapshot.header.cluster_size)
    found = Found(shape, (tree.place, tree.checksum))
    index: Positions = np.zeros(1, np.int64)
    places: NDArray[np.uint64] = np.array([tree.place], np.uint64)
    checksums: Positions = np.array([tree.checksum], np.int64)
    left = most = snapshot.unclaimed(tree.owner)
    for level in range(shape.top, -1, -1):
        below = shape.below(level)
        found.dirty += [
            (first * below, min(end * below, shape.chunks)) for first, end in _runs(index[places == ALL_ONES])
        ]
        there = np.flatnonzero(places > ALL_ONES)
        index, places, checksums = index[there], places[there], checksums[there]
        bad = (
            (places % shape.cluster != 0) | (places < store.RESERVED) | (places > max(snapshot.size - shape.cluster, 0))
        )
        bad |= _used_before(places)
        if len(index) > left:
            bad[left:] = True
        left = max(left - len(index), 0)
        if bad.any():
            _lose_each(found, level, index[bad], places[bad])
            index, places, checksums = index[~bad], places[~bad], checksums[~bad]
        if level == 0:
            found.chunks, found.places, found.checksums = index, places.astype(np.int64), checksums
            break
        step = max(_BLOCK // shape.cluster, 1)
        if len(index) > step:
            solid = _without_holes(snapshot, found, level, index, places, checksums, keep=keep)
            index, places, checksums = index[solid], places[solid], checksums[solid]
        asked = None if wanted is None else wanted // shape.below(level - 1)
        parts = []
        for at in range(0, len(index), step):  # so that nodes are in memory only as long as somebody needs them
            here = slice(at, at + step)
            numbers, nodes = _nodes(snapshot, found, level, index[here], places[here], checksums[here])
            if keep:
                at_places = places[np.searchsorted(index, numbers)].tolist()
                for number, node, place in zip(numbers.tolist(), nodes, at_places, strict=True):
                    found.nodes[level, number], found.at[level, number] = node, place
            parts.append(_leading(shape, level, numbers, nodes, asked))
        index = np.concatenate([part[0] for part in parts] or [np.empty(0, np.int64)])
        places = np.concatenate([part[1] for part in parts] or [np.empty(0, np.uint64)])
        checksums = np.concatenate([part[2] for part in parts] or [np.empty(0, np.int64)])
    snapshot.claim(tree.owner, most - left)
    found.dirty.sort()
    return found


def _nodes(
    snapshot: Snapshot, found: Found, level: int, index: Positions, places: NDArray[np.uint64], checksums: Positions
) -> tuple[Positions, NDArray[np.void]]:
    """Reads nodes, and notes which are damaged: the numbers of the sound ones, and their pointers, a row each."""
    cluster = found.shape.cluster
    # Octets, since numpy copies pointers field by field.
    sound, nodes = np.zeros(len(index), np.bool_), np.empty((len(index), cluster), np.uint8)
    for first, end in _pieces(places, cluster):
        data = snapshot.file.read(int(places[first]), (end - first) * cluster)
        whole = slice(first, first + len(data) // cluster)
        octets = memoryview(data)[: len(data) // cluster * cluster]
        sound[whole] = _sums(octets, cluster) == checksums[whole]
        nodes[whole] = np.frombuffer(octets, np.uint8).reshape(-1, cluster)
    for at in np.flatnonzero(~sound).tolist():
        snapshot.doubted = True
        found.lose(level, int(index[at]), int(index[at]) + 1, int(places[at]))
    if not sound.all():
        index, nodes = index[sound], nodes[sound]
    return index, nodes.view(_POINTER)


def _leading(
    shape: Shape, level: int, numbers: Positions, nodes: NDArray[np.void], asked: Positions | None
) -> tuple[Positions, NDArray[np.uint64], Positions]:
    """The pointers of nodes that do not just say that all is clean: number, place and checksum of what is below."""
    index = (numbers[:, np.newaxis] * shape.fan + np.arange(shape.fan)).reshape(-1)
    index = index[: np.searchsorted(index, shape.number(level - 1))]  # what is behind the last means nothing
    pointers = nodes.reshape(-1)[: len(index)]
    places = pointers["place"].astype(np.uint64)
    chosen = places != ALL_ZEROS
    if asked is not None:
        chosen &= np.isin(index, asked)
    return index[chosen], places[chosen], pointers["checksum"][chosen].astype(np.int64)


def _used_before(places: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which places occur before in the same array. Else a small store could lead to one node any number of times."""
    again = np.zeros(len(places), np.bool_)
    if (places[1:] <= places[:-1]).any():  # mostly they ascend, and need not be sorted
        ordered = np.sort(places)
        if (ordered[1:] == ordered[:-1]).any():
            again[:] = True
            again[np.unique(places, return_index=True)[1]] = False
    return again


def _without_holes(
    snapshot: Snapshot,
    found: Found,
    level: int,
    index: Positions,
    places: NDArray[np.uint64],
    checksums: Positions,
    *,
    keep: bool,
) -> Positions:
    """The positions of nodes that are no holes of the file. The others are not read: a small store can have many.

    A hole is a node of zeros, so all below it is clean, if its checksum says the same.
    """
    shape, order = found.shape, np.argsort(places)
    hole = np.ones(len(places), np.bool_)
    hole[order[list(snapshot.file.with_data(places[order].tolist(), shape.cluster))]] = False
    sound = hole & (checksums == crc32c(bytes(shape.cluster)))
    if keep:
        for at in np.flatnonzero(sound).tolist():
            key = level, int(index[at])
            found.nodes[key], found.at[key] = np.zeros(shape.fan, _POINTER), int(places[at])
    bad = hole & ~sound
    if bad.any():
        snapshot.doubted = True
        _lose_each(found, level, index[bad], places[bad])
    return np.flatnonzero(~hole)


def _lose_each(found: Found, level: int, index: Positions, places: NDArray[np.uint64]) -> None:
    """Notes that nodes or chunks are damaged; together those that are consecutive, of which there can be many."""
    at = places.tolist()
    for first, end in _together(np.diff(index) == 1):
        found.lose(level, int(index[first]), int(index[end - 1]) + 1, at[first])


def load(snapshot: Snapshot, tree: Tree, key: object = None) -> tuple[bits.Words, str | None]:
    """The bits of a tree.

    Args:
        snapshot: of the store.
        tree: of the bitmap.
        key: tells the bitmap from others. If a checksum is wrong, and the answer is made again because it was that of a
            commit too long ago, the chunks that have not changed since are not read again.

    Returns:
        uint64, shape (ceil(nbits / 64),), tail bits zero; and what is damaged, in words, or None.

    Raises:
        FormatError: see `Snapshot.require_untouched`; so do `count` and `verify`.
    """
    found = walk(snapshot, tree)
    shape = found.shape
    held = len(found.chunks) + sum(end - first for first, end in found.dirty)
    words = _zeros(shape.nbits, sparse=held < shape.chunks // _SPARSE)
    _read(snapshot, _unread(found, words, snapshot.kept.pop(key, None)), words)
    if found.damaged:
        snapshot.kept[key] = found, words
        snapshot.require_untouched()
    for first, end, *_ in (*found.dirty, *found.damaged):
        bits.set_range(words, first * shape.bits, min(end * shape.bits, shape.nbits))
    bits.mask_tail(words, shape.nbits)
    return words, found.told()


class Stored:
    """The bits of a tree, which are read when they are asked for: a `Content`.

    A wrong checksum is damage: what it covers is dirty, and told. Where the bits were counted before, and were sound,
    it is an error: another program has written over them, or the file was damaged meanwhile.

    Args:
        snapshot: of the store; nobody writes over what it leads to, or it says so, see `Snapshot.require_untouched`.
        tree: of the bitmap.
        tell: called with what is damaged so far, in words, each time that more is found.
    """

    def __init__(
        self, snapshot: Snapshot, tree: Tree, tell: Callable[[str | None], object] = lambda told: None
    ) -> None:
        self.nbits, self.snapshot, self.tree = tree.nbits, snapshot, tree
        self._tell, self._shape = tell, Shape(tree.nbits, snapshot.header.cluster_size)
        # What the whole tree leads to, and the runs of chunks that are dirty all over, damaged or not; ascending.
        # Threads may share the bits: what one of them finds is put here at once, or kept to itself.
        self._known: tuple[Found, list[tuple[int, int]]] | None = None
        self._partly = 0
        self._told: dict[Damage, None] = {}
        self._verified = False
        self._last: tuple[int, int, Part] | None = None

    def count(self) -> int:
        """How many bits are set. Reads and verifies all, and keeps none.

        Raises:
            FormatError: as `load`.
        """
        total, found = _counted(self.snapshot, self.tree)
        self._lose(found.damaged)
        self._known, self._verified = (found, _dirty(found)), True
        return total

    def part(self, first: int, end: int) -> Part:
        """See `Content.part`."""
        shape = self._shape
        low, high = first // shape.bits, geometry.ceil_div(end, shape.bits)
        last = self._last
        if last is None or last[:2] != (low, high):
            part = self._read(low, high)
            self._last = (low, high, part) if (high - low) * shape.bits > end - first else None
        else:
            part = last[2]
        if isinstance(part, bool):
            return part
        start = low * shape.bits
        return part[(first - start) // 64 : geometry.ceil_div(end - start, 64)]

    def _read(self, low: int, high: int) -> Part:
        """The chunks from ``low`` up to ``high``."""
        if self.snapshot.file.fd < 0:
            raise Error(self.snapshot.file.path, "the transaction has ended")
        shape, (found, runs) = self._shape, self._tables(low, high)
        at, to = np.searchsorted(found.chunks, [low, high]).tolist()
        dirty = [(max(first, low), min(end, high)) for first, end in _between(runs, low, high)]
        if at == to:
            if not dirty:
                return False
            if dirty == [(low, high)]:
                return True
        start, stop = low * shape.bits, min(high * shape.bits, shape.nbits)
        words = bits.zeros((high - low) * shape.bits)
        here = replace(found, chunks=found.chunks[at:to], places=found.places[at:to], damaged=[], nodes={})
        here.checksums = found.checksums[at:to]
        _read(self.snapshot, here, words, low)
        if here.damaged:
            self.snapshot.require_untouched()
            dirty += [(first, end) for first, end, _ in here.damaged]
            self._lose(here.damaged)
        for first, end in dirty:
            bits.set_range(words, (first - low) * shape.bits, min(end * shape.bits, shape.nbits) - start)
        words = words[: geometry.ceil_div(stop - start, 64)]
        bits.mask_tail(words, stop - start)
        return words

    def _lose(self, pieces: list[Damage]) -> None:
        pieces = [piece for piece in pieces if piece not in self._told]
        if pieces and self._verified:
            what = "was sound when it was read before: written over, or damaged since"
            raise FormatError(f"{self.snapshot.file.path}: bits at {pieces[0].place:#x}", what)
        if pieces:
            self._told.update(dict.fromkeys(pieces))
            self._tell(_told(self._shape, list(self._told)))

    def _tables(self, low: int, high: int) -> tuple[Found, list[tuple[int, int]]]:
        """What is known of where these chunks are, and perhaps all others; as `_known`."""
        if (known := self._known) is not None:
            return known
        partly = self._partly < _PARTLY and (high - low) * _PARTLY < self._shape.chunks
        found = walk(self.snapshot, self.tree, np.arange(low, high) if partly else None)
        if found.damaged:
            self.snapshot.require_untouched()
        self._lose(found.damaged)
        known = found, _dirty(found)
        if partly:
            self._partly += 1
        else:
            self._known = known
        return known


def _dirty(found: Found) -> list[tuple[int, int]]:
    """Runs of chunks that are dirty all over, whether or not because they are damaged; ascending."""
    return sorted([*found.dirty, *((first, end) for first, end, _ in found.damaged)])


def _between(runs: list[tuple[int, int]], low: int, high: int) -> list[tuple[int, int]]:
    """Those of ascending runs, first and end, that have a number from ``low`` up to ``high``."""
    at = bisect.bisect_right(runs, low, key=lambda run: run[1])
    return runs[at : bisect.bisect_left(runs, high, lo=at, key=lambda run: run[0])]


def verify(snapshot: Snapshot, tree: Tree) -> Found:
    """Reads and verifies a whole tree, and keeps no bits but its nodes."""
    found = walk(snapshot, tree, keep=True)
    for _ in _contents(snapshot, found):
        pass
    snapshot.require_untouched()
    return found


def count(snapshot: Snapshot, tree: Tree) -> tuple[int, str | None]:
    """How many bits are set; and what is damaged, in words, or None. Keeps no bits."""
    total, found = _counted(snapshot, tree)
    return total, found.told()


def _counted(snapshot: Snapshot, tree: Tree) -> tuple[int, Found]:
    found = walk(snapshot, tree)
    shape, total = found.shape, 0
    for chunks, data in _contents(snapshot, found):
        if chunks[-1] == shape.chunks - 1:  # bits behind the last one are not to be counted, even if they are set
            data = data.copy()
            used = geometry.ceil_div(shape.dirty_bits(int(chunks[-1]), shape.chunks), 64)
            data[-1, used:] = 0
            bits.mask_tail(data[-1, :used], shape.nbits)
        total += bits.count(data.reshape(-1))
    snapshot.require_untouched()
    total += sum(shape.dirty_bits(first, end) for first, end, *_ in (*found.dirty, *found.damaged))
    return total, found


def release(change: Change, tree: Tree) -> None:
    """Gives up all clusters of a tree. Below a damaged node they are not known, and leak; `check` repairs that."""
    if tree.place > ALL_ONES:
        found = walk(change.snapshot, tree, keep=True)
        _release(change, np.concatenate([found.places, np.array(list(found.at.values()), np.int64)]))


def clusters(found: Found) -> Iterator[Area]:
    """The clusters of a tree that was read with its nodes, in runs."""
    return _areas(np.concatenate([found.places, np.array(list(found.at.values()), np.int64)]), found.shape.cluster)


def clusters_of_chunks(found: Found) -> Iterator[Area]:
    """The clusters of the chunks of a tree, in runs."""
    return _areas(found.places, found.shape.cluster)


def write(change: Change, wanted: Content, base: Tree, among: Positions | None = None) -> tuple[int, int]:
    """Plans the writing of those chunks that differ from what is there, and of the nodes above them.

    What they replace is given up; all else stays, and belongs to the new tree. A part of the bits after the other is
    looked at, so all of them need not be in memory.

    Args:
        change: plans the writing.
        wanted: the bits as they shall be; tail bits are zero. Words that it has in memory must not change until the
            commit. A content whose parts are copies may be marked meanwhile, as a tracker's is: each chunk is looked at
            once, so that what is written of it and its checksum are the same bits. A later mark may be missing.
        base: the tree that is there; ``place`` 0 for a new one. Afterwards it must not be used any more.
        among: the chunks that can differ, ascending; None for those from which the content tells that they do not.

    Returns:
        Place and checksum of the new root.
    """
    if among is None:
        among = _changed(change, wanted, base)
    shape = Shape(base.nbits, change.header.cluster_size)
    if among is not None and not len(among):
        return base.place, base.checksum
    if shape.top == 0:
        return _write_one(change, wanted, base, shape)
    old = walk(change.snapshot, base, among, keep=True)
    if among is None:
        among = np.arange(shape.chunks)
    before, known = _places(old, among)
    pointers = np.zeros(len(among), _POINTER)
    changed = np.zeros(len(among), np.bool_)
    for here, rows in _batches(wanted, shape, among):
        numbers = among[here]
        if isinstance(rows, bool):
            kinds = np.full(len(numbers), ALL_ONES if rows else ALL_ZEROS)
            changed[here] = (before[here] != kinds) | (before[here] == _UNKNOWN)
            pointers["place"][here] = kinds
            continue
        kinds = _kinds(rows, shape, numbers)
        new = np.flatnonzero(kinds == _UNKNOWN)
        sums = _checksums_of(rows, new)
        differs = (before[here] != kinds) | (before[here] == _UNKNOWN)
        equal = new[(before[here][new] > ALL_ONES) & (known[here][new] == sums)]
        there = Found(shape, old.root, chunks=numbers[equal], places=before[here][equal], checksums=known[here][equal])
        differs[equal[_is_same(change.snapshot, rows, equal, there)]] = False
        chosen = differs[new]
        pointers["place"][here] = np.maximum(kinds, 0)
        at = new[chosen]
        pointers["place"][here.start + at] = _plan(change, rows, shape, at)
        pointers["checksum"][here.start + at] = sums[chosen]
        changed[here] = differs
    if not changed.any():
        return base.place, base.checksum
    _release(change, before[changed & (before > ALL_ONES)])
    return _seal(change, old, among[changed], pointers[changed])


def _write_one(change: Change, wanted: Content, base: Tree, shape: Shape) -> tuple[int, int]:
    """`write`, where the root is the only chunk: for one chunk, numpy's calls would take longer than the work."""
    area = Area(base.place, shape.cluster)
    there = base.place > ALL_ONES and not any(store.area_faults(area, shape.cluster, change.snapshot.size))
    words, data = wanted.part(0, shape.nbits), b""
    if isinstance(words, bool):
        place = ALL_ONES if words else ALL_ZEROS
    else:
        place = {0: ALL_ZEROS, shape.nbits: ALL_ONES}.get(bits.count(words), _UNKNOWN)
        data = words.tobytes().ljust(shape.cluster, b"\0")
    same = place == base.place
    if place == _UNKNOWN and there and crc32c(data) == base.checksum:  # else what is there is another, or damaged
        same = change.snapshot.file.read(base.place, shape.cluster) == data
    if same:
        return base.place, base.checksum
    if there:
        change.release(area)
    return change.place(data)[::2] if place == _UNKNOWN else (place, 0)


def merge(change: Change, added: Content, base: Tree) -> tuple[int, int]:
    """Like `write`, for the bits that are there and those of ``added``. Looks only at chunks where those are."""
    shape = Shape(base.nbits, change.header.cluster_size)
    both = Combined(Stored(change.snapshot, base), added, bits.OR)
    return write(change, both, base, _some(added, shape))


def carry_over(snapshot: Snapshot, tree: Tree, change: Change) -> tuple[tuple[int, int], str | None]:
    """Plans the writing of the same tree in another store.

    Returns:
        Place and checksum of the new root; and what is damaged, in words, or None.
    """
    if tree.place <= ALL_ONES:
        return (tree.place, 0), None
    found = walk(snapshot, tree, keep=True)
    found.at.clear()  # nothing to give up
    shape = found.shape
    free = _offsets(change, len(found.chunks))
    pointers = np.zeros(len(found.chunks), _POINTER)
    done = 0
    for chunks, data in _contents(snapshot, found):
        lost = np.searchsorted(found.chunks, chunks[0]) - done
        if lost:
            pointers["place"][done : done + lost] = ALL_ONES
            done += int(lost)
        here = slice(done, done + len(chunks))
        pointers["place"][here], pointers["checksum"][here] = free[here], found.checksums[here]
        for first, end in _together(np.diff(free[here]) == shape.cluster):
            change.plan(int(free[done + first]), bytes(data[first:end].data))
        done += len(chunks)
    pointers["place"][done:] = ALL_ONES
    _give_back(change, free[pointers["place"] == ALL_ONES], shape.cluster)
    return _seal(change, found, found.chunks, pointers), found.told()


# The loop over chunks.


def _sums(data: memoryview, cluster: int) -> Positions:
    """The CRC32C of each cluster of ``data``."""
    sums = np.empty(len(data) // cluster, np.int64)
    crc32c_each(data, cluster, sums)
    return sums


# What is read.


def _zeros(nbits: int, *, sparse: bool) -> bits.Words:
    """Clear bits; with ``sparse`` in memory for arrays of which little is used."""
    length = -(-nbits // 64) * 8
    if not length or (length > memory.SMALL and not sparse):
        return bits.zeros(nbits)
    # Not numpy's, which may get memory that was used before, and clear it just to have it overwritten.
    return np.frombuffer(memory.zeros(length), bits.WORD)


def _pieces(places: NDArray[Any], cluster: int) -> Iterator[tuple[int, int]]:
    """The positions, first and end, of clusters that are adjacent, as many as are read at a time."""
    most = max(_PIECE // cluster, 1)
    for first, end in _together(np.diff(places) == cluster) if len(places) else ():
        for at in range(first, end, most):
            yield at, min(at + most, end)


def _lose(snapshot: Snapshot, found: Found, first: int, bad: Positions) -> None:
    """Notes the damage of chunks; ``bad`` are their positions behind ``first``."""
    if len(bad):
        snapshot.doubted = True
        for at in (bad + first).tolist():
            number = int(found.chunks[at])
            found.lose(0, number, number + 1, int(found.places[at]))


def _read(snapshot: Snapshot, found: Found, words: bits.Words, base: int = 0) -> None:
    """Reads the chunks that have a cluster into ``words``, which begin with chunk ``base``; verified."""
    cluster = found.shape.cluster
    data = words.view(np.uint8).data
    spare = memoryview(bytearray(min(max(_PIECE, cluster), len(found.chunks) * cluster)))
    sums = np.empty(len(found.chunks), np.int64)
    for first, end in _pieces(found.places, cluster):
        chunk, last = int(found.chunks[first]) - base, int(found.chunks[end - 1]) - base
        straight = last - chunk == end - first - 1 and (last + 1) * cluster <= len(data)
        buffer = data[chunk * cluster : (last + 1) * cluster] if straight else spare[: (end - first) * cluster]
        snapshot.file.read_into(int(found.places[first]), buffer)
        crc32c_each(buffer, cluster, sums[first:end])
        if not straight:
            for at, number in enumerate((found.chunks[first:end] - base).tolist()):
                target = data[number * cluster : (number + 1) * cluster]
                target[:] = buffer[at * cluster : at * cluster + len(target)]
    _lose(snapshot, found, 0, np.flatnonzero(sums != found.checksums))


def _unread(found: Found, words: bits.Words, before: tuple[Found, bits.Words] | None) -> Found:
    """What is left to be read when what an earlier attempt has verified, and what is as it was, is in ``words``."""
    if before is None or before[0].shape.nbits != found.shape.nbits:
        return found
    old, known = before
    sound = ~np.isin(old.chunks, np.array([first for first, _, _ in old.damaged], np.int64))
    common, mine, theirs = np.intersect1d(found.chunks, old.chunks, assume_unique=True, return_indices=True)
    same = sound[theirs] & (found.places[mine] == old.places[theirs]) & (found.checksums[mine] == old.checksums[theirs])
    per = found.shape.bits // 64
    for first, end in _runs(common[same]):
        words[first * per : end * per] = known[first * per : end * per]
    left = np.ones(len(found.chunks), np.bool_)
    left[mine[same]] = False
    return replace(found, chunks=found.chunks[left], places=found.places[left], checksums=found.checksums[left])


def _contents(snapshot: Snapshot, found: Found) -> Iterator[tuple[Positions, NDArray[np.uint64]]]:
    """The sound chunks, some at a time: their numbers, and their words, a row each, which are valid until the next."""
    cluster = found.shape.cluster
    spare = memoryview(bytearray(min(max(_PIECE, cluster), len(found.chunks) * cluster)))
    for first, end in _pieces(found.places, cluster):
        buffer = spare[: (end - first) * cluster]
        snapshot.file.read_into(int(found.places[first]), buffer)
        bad = np.flatnonzero(_sums(buffer, cluster) != found.checksums[first:end])
        _lose(snapshot, found, first, bad)
        rows = np.frombuffer(buffer, bits.WORD).reshape(end - first, -1)
        starts, ends = [0, *(bad + 1).tolist()], [*bad.tolist(), end - first]
        for start, stop in zip(starts, ends, strict=True):
            if start < stop:
                yield found.chunks[first + start : first + stop], rows[start:stop]


def _places(found: Found, among: Positions) -> tuple[Positions, Positions]:
    """Where each chunk is: its cluster's place, `ALL_ZEROS`, `ALL_ONES`, or `_UNKNOWN` where that is damaged.

    And the checksum of each that has a cluster.
    """
    places, sums = np.zeros(len(among), np.int64), np.zeros(len(among), np.int64)
    at = np.searchsorted(among, found.chunks)
    places[at], sums[at] = found.places, found.checksums
    for value, runs in ((ALL_ONES, found.dirty), (_UNKNOWN, [(first, end) for first, end, _ in found.damaged])):
        for first, end in runs:
            places[np.searchsorted(among, first) : np.searchsorted(among, end)] = value
    return places, sums


# What is written.


Rows = NDArray[np.uint64]  # chunks, a row each


def _batches(wanted: Content, shape: Shape, among: Positions) -> Iterator[tuple[slice, Rows | bool]]:
    """The chunks that are asked for, some at a time: which of ``among``, and their words, or what all bits are."""
    step = max(_BLOCK // shape.cluster, 1)
    at = 0
    while at < len(among):
        first = int(among[at])
        to = int(np.searchsorted(among, first + step))
        numbers = among[at:to]
        gaps = np.flatnonzero(np.diff(numbers) > _NEAR) + 1
        parts = []
        for run in np.split(numbers, gaps):
            low, high = int(run[0]), int(run[-1]) + 1
            part = wanted.part(low * shape.bits, min(high * shape.bits, shape.nbits))
            if isinstance(part, bool):
                if len(run) == len(numbers):
                    yield slice(at, to), part
                    break
                part = bits.filled(shape.dirty_bits(low, high), part)
            rows = _rows(part, shape, high - low)
            parts.append(rows if len(run) == high - low else rows[run - low])
        else:
            yield slice(at, to), parts[0] if len(parts) == 1 else np.concatenate(parts)
        at = to


def _rows(words: bits.Words, shape: Shape, number: int) -> Rows:
    """So many chunks; behind the last word are zeros."""
    per = shape.bits // 64
    if len(words) < number * per:
        words = np.append(words, bits.zeros((number * per - len(words)) * 64))
    return words.reshape(number, per)


def _kinds(rows: Rows, shape: Shape, numbers: Positions) -> Positions:
    """What each of the chunks is: `ALL_ZEROS`, `ALL_ONES`, or `_UNKNOWN` for one that needs a cluster."""
    kinds = bits.uniform(rows.reshape(-1), len(rows))
    last = shape.chunks - 1
    if numbers[-1] == last and bits.count(rows[-1]) == shape.dirty_bits(last, shape.chunks):
        kinds[-1] = ALL_ONES  # the bits behind the last one are not set
    return kinds


def _changed(change: Change, wanted: Content, base: Tree) -> Positions | None:
    """The chunks of a tree from which a content can differ; None where that is not known."""
    if not isinstance(wanted, Changed) or not isinstance(there := wanted.base, Stored):
        return None
    if there.snapshot is not change.snapshot or there.tree[:3] != base[:3]:
        return None
    return np.unique(wanted.pages() * PAGE // Shape(base.nbits, change.header.cluster_size).bits)


def _some(content: Content, shape: Shape) -> Positions:
    """The numbers of the chunks that have bits; ascending."""
    step = max(_BLOCK // shape.cluster, 1)
    found = []
    for at in range(0, shape.chunks, step):
        number = min(step, shape.chunks - at)
        part = content.part(at * shape.bits, min((at + number) * shape.bits, shape.nbits))
        if part is True:
            found.append(np.arange(at, at + number))
        elif part is not False:
            rows = _rows(part, shape, number)
            found.append(np.flatnonzero(bits.uniform(rows.reshape(-1), number)) + at)
    return np.concatenate(found) if found else np.empty(0, np.int64)


def _checksums_of(rows: Rows, chosen: Positions) -> Positions:
    """The CRC32C of these rows."""
    parts = [_sums(rows[first:end].reshape(-1).view(np.uint8).data, rows.shape[1] * 8) for first, end in _runs(chosen)]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _is_same(snapshot: Snapshot, rows: Rows, chosen: Positions, there: Found) -> NDArray[np.bool_]:
    """Which of the chosen rows are in the file bit for bit, as these chunks, one each."""
    same = np.zeros(len(chosen), np.bool_)
    for chunks, data in _contents(snapshot, there):
        first = int(np.searchsorted(there.chunks, chunks[0]))
        here = slice(first, first + len(chunks))
        same[here] = (data == rows[chosen[here]]).all(axis=1)
    return same


def _offsets(change: Change, number: int) -> Positions:
    """Takes so many clusters: where each is, in bytes; ascending within each run, of which there are few."""
    cluster = change.header.cluster_size
    runs = change.take(number) if number else []
    return np.concatenate([np.arange(first, first + many) for first, many in runs] or [np.empty(0, np.int64)]) * cluster


def _plan(change: Change, rows: Rows, shape: Shape, chosen: Positions) -> Positions:
    """Plans the writing of these rows into clusters that it takes; returns where they are."""
    offsets = _offsets(change, len(chosen))
    for first, end in _together((np.diff(chosen) == 1) & (np.diff(offsets) == shape.cluster)) if len(chosen) else ():
        data = rows[int(chosen[first]) : int(chosen[end - 1]) + 1]
        change.plan(int(offsets[first]), data.reshape(-1).view(np.uint8).data)
    return offsets


def _seal(change: Change, old: Found, chunks: Positions, pointers: Pointers) -> tuple[int, int]:
    """Plans the writing of the nodes above chunks that have new pointers, and of all others that have no place.

    Returns:
        Place and checksum of the new root.
    """
    shape = old.shape
    if not len(chunks) and not old.nodes:  # its root is damaged
        return old.root
    if shape.top == 0:
        return int(pointers["place"][0]), int(pointers["checksum"][0])
    index = chunks
    for level in range(1, shape.top + 1):
        above = index // shape.fan
        numbers = above[np.flatnonzero(np.diff(above, prepend=-1))].tolist()
        for number in numbers:
            here = slice(*np.searchsorted(above, [number, number + 1]).tolist())
            old.table(level, number)[index[here] % shape.fan] = pointers[here]
        numbers = sorted({*numbers, *(n for of, n in old.nodes if of == level and (of, n) not in old.at)})
        pointers = np.zeros(len(numbers), _POINTER)
        written = []
        for at, number in enumerate(numbers):
            places = old.table(level, number)["place"][: shape.children(level, number)]
            if places[0] <= ALL_ONES and (places == places[0]).all():
                pointers["place"][at] = places[0]
            else:
                written.append(at)
        _release(change, np.array([old.at[level, n] for n in numbers if (level, n) in old.at], np.int64))
        offsets, sums = _offsets(change, len(written)), []
        for at, offset in zip(written, offsets.tolist(), strict=True):
            data = old.nodes[level, numbers[at]].tobytes()
            sums.append(crc32c(data))
            change.plan(offset, data)
        pointers["place"][written], pointers["checksum"][written] = offsets, sums
        index = np.array(numbers, np.int64)
    return int(pointers["place"][0]), int(pointers["checksum"][0])


def _release(change: Change, places: Positions) -> None:
    for area in _areas(places, change.header.cluster_size):
        change.release(area)


def _give_back(change: Change, places: Positions, cluster: int) -> None:
    for area in _areas(places, cluster):
        change.untake(area.offset // cluster, area.length // cluster)


def _areas(places: Positions, cluster: int) -> Iterator[Area]:
    """The clusters at these places, in runs. A cluster that is there twice is in two of them."""
    for first, end in _runs(np.sort(places // cluster)):
        yield Area(first * cluster, (end - first) * cluster)


def _runs(numbers: Positions) -> Iterator[tuple[int, int]]:
    """Runs of consecutive numbers, first and end, of an array."""
    if len(numbers):
        for first, end in _together(np.diff(numbers) == 1):
            yield int(numbers[first]), int(numbers[end - 1]) + 1


def _together(linked: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """The positions, first and end, of runs of elements of which each is linked to the next; one link for each pair."""
    edges = (np.flatnonzero(~linked) + 1).tolist()
    return zip([0, *edges], [*edges, len(linked) + 1], strict=True)
