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

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dirtmap.engine.model import bits
from dirtmap.engine.storefile.entries import Tree
from dirtmap.engine.system import memory
from dirtmap.fmt import geometry, store
from dirtmap.fmt.digest import crc32c
from dirtmap.fmt.errors import counted
from dirtmap.fmt.store import ALL_ONES, ALL_ZEROS, Area

if TYPE_CHECKING:
    from dirtmap.engine.storefile.file import Change, Snapshot

Positions = NDArray[np.int64]
Pointers = NDArray[np.void]

_POINTER = np.dtype([("place", ">u8"), ("checksum", ">u4"), ("reserved", ">u4")])
_PIECE = 1 << 18  # bytes that are read at a time, so that they are still in the cache when they are verified
_BLOCK = 1 << 22  # bytes that are looked at in one step
_UNKNOWN = -1  # in place of a place: the bits cannot be read, so whatever is there has to be written anew
_SPARSE = 8  # an array of which less than one part in so many is set gets its memory in small pages


class Damage(NamedTuple):
    """Chunks from ``first`` up to ``end`` that count as dirty, because what they are in, or under, is damaged.

    The ``place`` of the first of that is in bytes.
    """

    first: int
    end: int
    place: int


class Shape:
    """The measures of a tree.

    Attributes:
        cluster: bytes of a chunk or a node.
        bits: in a chunk.
        fan: pointers in a node.
        nbits: in all.
        chunks: in all.
        top: the level of the root.
    """

    def __init__(self, nbits: int, cluster: int) -> None:
        self.nbits, self.cluster, self.bits, self.fan = nbits, cluster, cluster * 8, store.fan_out(cluster)
        self.chunks = geometry.ceil_div(nbits, self.bits)
        self.top = store.root_level(self.chunks, cluster)

    def below(self, level: int) -> int:
        """How many chunks a whole tree of that level has."""
        return int(self.fan**level)

    def number(self, level: int) -> int:
        """How many nodes, or chunks, that level has."""
        return geometry.ceil_div(self.chunks, self.below(level))

    def children(self, level: int, index: int) -> int:
        """How many pointers of a node mean something; those behind them are zero."""
        return min(self.fan, self.number(level - 1) - index * self.fan)

    def dirty_bits(self, first: int, end: int) -> int:
        """How many bits chunks from ``first`` up to ``end`` have."""
        return min(end * self.bits, self.nbits) - first * self.bits


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
        if not self.damaged:
            return None
        granules = sum(self.shape.dirty_bits(first, end) for first, end, _ in self.damaged)
        where = f"at {self.damaged[0].place:#x}" + (
            f" and {len(self.damaged) - 1} more" if len(self.damaged) > 1 else ""
        )
        return f"bits are damaged {where}, so {counted(granules, 'granule')} of {self.shape.nbits} must count as dirty"


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
    index, places = np.zeros(1, np.int64), np.array([tree.place], np.uint64)
    checksums = np.array([tree.checksum], np.int64)
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
        if len(index) > left:
            bad[left:] = True
        left = max(left - len(index), 0)
        if bad.any():
            lost, at = index[bad], places[bad].tolist()
            for first, end in _together(np.diff(lost) == 1):  # of which a small store can have many
                found.lose(level, int(lost[first]), int(lost[end - 1]) + 1, at[first])
            index, places, checksums = index[~bad], places[~bad], checksums[~bad]
        if level == 0:
            found.chunks, found.places, found.checksums = index, places.astype(np.int64), checksums
            break
        parts: list[tuple[Positions, NDArray[np.uint64], Positions]] = []
        for number, place, checksum in zip(index.tolist(), places.tolist(), checksums.tolist(), strict=True):
            data = snapshot.file.read(place, shape.cluster)
            if len(data) < shape.cluster or crc32c(data) != checksum:
                snapshot.doubted = True
                found.lose(level, number, number + 1, place)
                continue
            pointers = np.frombuffer(data, _POINTER)
            if keep:
                found.nodes[level, number], found.at[level, number] = pointers.copy(), place
            count = shape.children(level, number)
            pointers = pointers[:count]
            first = number * shape.fan
            parts.append(
                (
                    np.arange(first, first + count),
                    pointers["place"].astype(np.uint64),
                    pointers["checksum"].astype(np.int64),
                )
            )
        if not parts:
            break
        index, places, checksums = (np.concatenate(part) for part in zip(*parts, strict=True))
        if wanted is not None:
            asked = np.flatnonzero(np.isin(index, wanted // shape.below(level - 1)))
            index, places, checksums = index[asked], places[asked], checksums[asked]
    snapshot.claim(tree.owner, most - left)
    found.dirty.sort()
    return found


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


def verify(snapshot: Snapshot, tree: Tree) -> Found:
    """Reads and verifies a whole tree, and keeps no bits but its nodes."""
    found = walk(snapshot, tree, keep=True)
    for _ in _contents(snapshot, found):
        pass
    snapshot.require_untouched()
    return found


def count(snapshot: Snapshot, tree: Tree) -> tuple[int, str | None]:
    """How many bits are set; and what is damaged, in words, or None. Keeps no bits."""
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
    return total, found.told()


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


def write(change: Change, words: bits.Words, base: Tree, among: Positions | None = None) -> tuple[int, int]:
    """Plans the writing of those chunks that differ from what is there, and of the nodes above them.

    What they replace is given up; all else stays, and belongs to the new tree.

    Args:
        change: plans the writing.
        words: the bits as they shall be; tail bits are zero. They must not change until the commit.
        base: the tree that is there; ``place`` 0 for a new one. Afterwards it must not be used any more.
        among: the chunks that can differ, ascending; None for all.

    Returns:
        Place and checksum of the new root.
    """
    shape = Shape(base.nbits, change.header.cluster_size)
    if among is not None and not len(among):
        return base.place, base.checksum
    old = walk(change.snapshot, base, among, keep=True)
    if among is None:
        among = np.arange(shape.chunks)
    kinds = _kinds(words, shape, among)
    before = _places(old, among)
    new = among[kinds == _UNKNOWN]
    checksums = _checksums_of(words, shape, new)
    changed = (before != kinds) | (before == _UNKNOWN)
    changed[np.flatnonzero(kinds == _UNKNOWN)[_is_same(change.snapshot, words, old, new, checksums)]] = False
    if not changed.any():
        return base.place, base.checksum
    _release(change, before[changed & (before > ALL_ONES)])
    chosen = changed[kinds == _UNKNOWN]
    pointers = np.zeros(len(among), _POINTER)
    pointers["place"] = np.maximum(kinds, 0)
    at = np.flatnonzero(changed & (kinds == _UNKNOWN))
    pointers["place"][at] = _plan(change, words, shape, new[chosen])
    pointers["checksum"][at] = checksums[chosen]
    return _seal(change, old, among[changed], pointers[changed])


def merge(change: Change, words: bits.Words, base: Tree) -> tuple[int, int]:
    """Like `write`, for the bits that are there and those of ``words``. Looks only at chunks where those are."""
    shape = Shape(base.nbits, change.header.cluster_size)
    among = _some(words, shape)
    if not len(among):
        return base.place, base.checksum
    found = walk(change.snapshot, base, among)
    merged = _zeros(shape.nbits, sparse=True)
    _read(change.snapshot, found, merged)
    per = shape.bits // 64
    for number in among.tolist():
        here = slice(number * per, (number + 1) * per)
        merged[here] |= words[here]
    places = _places(found, among)
    for number in among[(places == ALL_ONES) | (places == _UNKNOWN)].tolist():
        bits.set_range(merged, number * shape.bits, min((number + 1) * shape.bits, shape.nbits))
    return write(change, merged, base, among)


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


def checksums(data: memoryview, cluster: int) -> Positions:
    """The CRC32C of each cluster of ``data``."""
    octets = np.frombuffer(data, np.uint8)
    return np.array([crc32c(octets[at : at + cluster]) for at in range(0, len(octets), cluster)], np.int64)


# What is read.


def _zeros(nbits: int, *, sparse: bool) -> bits.Words:
    """Clear bits; with ``sparse`` in memory for arrays of which little is used."""
    if not sparse or not nbits:
        return bits.zeros(nbits)
    return np.frombuffer(memory.sparse(-(-nbits // 64) * 8), bits.WORD)


def _pieces(found: Found) -> Iterator[tuple[int, int]]:
    """The positions, first and end, of chunks whose clusters are adjacent, as many as are read at a time."""
    cluster = found.shape.cluster
    most = max(_PIECE // cluster, 1)
    for first, end in _together(np.diff(found.places) == cluster) if len(found.places) else ():
        for at in range(first, end, most):
            yield at, min(at + most, end)


def _lose(snapshot: Snapshot, found: Found, first: int, bad: Positions) -> None:
    """Notes the damage of chunks; ``bad`` are their positions behind ``first``."""
    if len(bad):
        snapshot.doubted = True
        for at in (bad + first).tolist():
            number = int(found.chunks[at])
            found.lose(0, number, number + 1, int(found.places[at]))


def _read(snapshot: Snapshot, found: Found, words: bits.Words) -> None:
    """Reads the chunks that have a cluster into ``words``, verified."""
    cluster = found.shape.cluster
    data = words.view(np.uint8).data
    spare = memoryview(bytearray(min(max(_PIECE, cluster), len(found.chunks) * cluster)))
    for first, end in _pieces(found):
        chunk, last = int(found.chunks[first]), int(found.chunks[end - 1])
        straight = last - chunk == end - first - 1 and (last + 1) * cluster <= len(data)
        buffer = data[chunk * cluster : (last + 1) * cluster] if straight else spare[: (end - first) * cluster]
        snapshot.file.read_into(int(found.places[first]), buffer)
        bad = np.flatnonzero(checksums(buffer, cluster) != found.checksums[first:end])
        _lose(snapshot, found, first, bad)
        if not straight:
            for at, number in enumerate(found.chunks[first:end].tolist()):
                target = data[number * cluster : (number + 1) * cluster]
                target[:] = buffer[at * cluster : at * cluster + len(target)]


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
    for first, end in _pieces(found):
        buffer = spare[: (end - first) * cluster]
        snapshot.file.read_into(int(found.places[first]), buffer)
        bad = np.flatnonzero(checksums(buffer, cluster) != found.checksums[first:end])
        _lose(snapshot, found, first, bad)
        rows = np.frombuffer(buffer, bits.WORD).reshape(end - first, -1)
        starts, ends = [0, *(bad + 1).tolist()], [*bad.tolist(), end - first]
        for start, stop in zip(starts, ends, strict=True):
            if start < stop:
                yield found.chunks[first + start : first + stop], rows[start:stop]


def _places(found: Found, among: Positions) -> Positions:
    """Where each chunk is: its cluster's place, `ALL_ZEROS`, `ALL_ONES`, or `_UNKNOWN` where that is damaged."""
    places = np.zeros(len(among), np.int64)
    places[np.searchsorted(among, found.chunks)] = found.places
    for value, runs in ((ALL_ONES, found.dirty), (_UNKNOWN, [(first, end) for first, end, _ in found.damaged])):
        for first, end in runs:
            places[np.searchsorted(among, first) : np.searchsorted(among, end)] = value
    return places


# What is written.


def _rows(words: bits.Words, shape: Shape) -> NDArray[np.uint64]:
    """The chunks that are whole in the array, a row each."""
    per = shape.bits // 64
    return words[: len(words) // per * per].reshape(-1, per)


def _row(words: bits.Words, shape: Shape, number: int) -> bytes:
    """The bytes of one chunk; those behind the last word are zero."""
    per = shape.bits // 64
    return words[number * per : (number + 1) * per].tobytes().ljust(shape.cluster, b"\0")


def _kinds(words: bits.Words, shape: Shape, among: Positions) -> Positions:
    """What each of the chunks is: `ALL_ZEROS`, `ALL_ONES`, or `_UNKNOWN` for one that needs a cluster."""
    rows = _rows(words, shape)
    kinds = np.full(len(among), _UNKNOWN, np.int64)
    whole = np.searchsorted(among, len(rows))
    step = max(_BLOCK // shape.cluster, 1)
    for at in range(0, int(whole), step):
        numbers = among[at : min(at + step, int(whole))]
        first, last = int(numbers[0]), int(numbers[-1])
        block = rows[first : last + 1] if last - first == len(numbers) - 1 else rows[numbers]
        some = np.bitwise_or.reduce(block, axis=1) != 0
        kinds[at : at + len(numbers)][~some] = ALL_ZEROS
        candidates = np.flatnonzero(some & (block[:, 0] == bits.ALL))
        full = candidates[np.bitwise_and.reduce(block[candidates], axis=1) == bits.ALL]
        kinds[at + full] = ALL_ONES
    for at in range(int(whole), len(among)):
        dirty = bits.count(words[int(among[at]) * (shape.bits // 64) :])
        if not dirty:
            kinds[at] = ALL_ZEROS
        elif dirty == shape.dirty_bits(int(among[at]), shape.chunks):
            kinds[at] = ALL_ONES
    # One that is whole in the array need not be whole on the disk.
    if shape.nbits % shape.bits and len(among) and among[-1] == shape.chunks - 1 < len(rows):
        dirty = bits.count(rows[-1])
        kinds[-1] = ALL_ONES if dirty == shape.dirty_bits(shape.chunks - 1, shape.chunks) else kinds[-1]
    return kinds


def _some(words: bits.Words, shape: Shape) -> Positions:
    """The numbers of the chunks that have bits; ascending."""
    rows = _rows(words, shape)
    step = max(_BLOCK // shape.cluster, 1)
    found = [
        np.flatnonzero(np.bitwise_or.reduce(rows[at : at + step], axis=1)) + at for at in range(0, len(rows), step)
    ]
    if len(rows) < shape.chunks and words[len(rows) * (shape.bits // 64) :].any():
        found.append(np.array([len(rows)], np.int64))
    return np.concatenate(found) if found else np.empty(0, np.int64)


def _checksums_of(words: bits.Words, shape: Shape, chunks: Positions) -> Positions:
    rows = _rows(words, shape)
    parts = []
    for first, end in _runs(chunks):
        if whole := rows[first:end].size:
            parts.append(checksums(rows[first:end].reshape(-1).view(np.uint8).data[: whole * 8], shape.cluster))
        if end > len(rows):
            parts.append(checksums(memoryview(_row(words, shape, end - 1)), shape.cluster))
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _is_same(
    snapshot: Snapshot, words: bits.Words, old: Found, new: Positions, checked: Positions
) -> NDArray[np.bool_]:
    """Which of the chunks ``new``, with these checksums, are in the file as they are in ``words``, bit for bit."""
    same = np.zeros(len(new), np.bool_)
    common, mine, theirs = np.intersect1d(new, old.chunks, assume_unique=True, return_indices=True)
    equal = np.flatnonzero(checked[mine] == old.checksums[theirs])
    part = Found(old.shape, old.root, chunks=common[equal])
    part.places, part.checksums = old.places[theirs[equal]], old.checksums[theirs[equal]]
    rows = _rows(words, old.shape)
    for chunks, data in _contents(snapshot, part):
        at, first = int(np.searchsorted(part.chunks, chunks[0])), int(chunks[0])
        if chunks[-1] - first == len(chunks) - 1 and chunks[-1] < len(rows):
            found = (data == rows[first : first + len(chunks)]).all(axis=1)
        else:
            now = (
                rows[number] if number < len(rows) else np.frombuffer(_row(words, old.shape, number), bits.WORD)
                for number in chunks.tolist()
            )
            found = np.array([np.array_equal(row, other) for row, other in zip(data, now, strict=True)])
        same[mine[equal[at : at + len(chunks)]]] = found
    return same


def _offsets(change: Change, number: int) -> Positions:
    """Takes so many clusters: where each is, in bytes; ascending within each run, of which there are few."""
    cluster = change.header.cluster_size
    runs = change.take(number) if number else []
    return np.concatenate([np.arange(first, first + many) for first, many in runs] or [np.empty(0, np.int64)]) * cluster


def _plan(change: Change, words: bits.Words, shape: Shape, chunks: Positions) -> Positions:
    """Plans the writing of chunks into clusters that it takes; returns where they are."""
    offsets = _offsets(change, len(chunks))
    rows = _rows(words, shape)
    for first, end in _together((np.diff(chunks) == 1) & (np.diff(offsets) == shape.cluster)) if len(chunks) else ():
        number, last = int(chunks[first]), int(chunks[end - 1])
        if last >= len(rows):
            change.plan(int(offsets[end - 1]), _row(words, shape, last))
            last -= 1
        if last >= number:
            change.plan(int(offsets[first]), rows[number : last + 1].reshape(-1).view(np.uint8).data)
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
        numbers = np.unique(above).tolist()
        for number in numbers:
            here = slice(*np.searchsorted(above, [number, number + 1]).tolist())
            old.table(level, number)[index[here] % shape.fan] = pointers[here]
        numbers = sorted({*numbers, *(n for of, n in old.nodes if of == level and (of, n) not in old.at)})
        pointers = np.zeros(len(numbers), _POINTER)
        written = []
        for at, number in enumerate(numbers):
            places = old.table(level, number)["place"][: shape.children(level, number)]
            if (places == places[0]).all() and places[0] <= ALL_ONES:
                pointers["place"][at] = places[0]
            else:
                written.append(at)
        _release(change, np.array([old.at[level, n] for n in numbers if (level, n) in old.at], np.int64))
        for at, offset in zip(written, _offsets(change, len(written)).tolist(), strict=True):
            data = old.nodes[level, numbers[at]].tobytes()
            pointers[at] = (offset, crc32c(data), 0)
            change.plan(offset, data)
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
