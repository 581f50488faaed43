"""The bits of a small bitmap in a store, read without numpy, which takes longer to start than a command that maps them.

Only where all of them are sound: `dirtmap.engine.storefile.chunks` tells what is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dirtmap.engine.storefile.entries import Shape, Tree
from dirtmap.engine.system import memory
from dirtmap.fmt import geometry, store
from dirtmap.fmt.digest import crc32c
from dirtmap.fmt.parsers.store import POINTER
from dirtmap.fmt.store import ALL_ONES, ALL_ZEROS

if TYPE_CHECKING:
    from dirtmap.engine.storefile.file import Snapshot

_MOST = 1 << 10  # clusters; to read more of them, a loop in Python takes longer than numpy to start


class _Pointer(NamedTuple):
    level: int
    number: int
    place: int
    checksum: int


def load(snapshot: Snapshot, tree: Tree, most: int = _MOST) -> memoryview | None:
    """The bits of a tree as words: uint64, ceil(nbits / 64) of them, tail bits zero.

    Args:
        snapshot: of the store.
        tree: of the bitmap.
        most: so many clusters are few.

    Returns:
        None if the tree has more, or if anything is damaged, or seems to be because the store has moved on.

    Raises:
        MemoryError: the system has no room for them.
    """
    shape = Shape(tree.nbits, snapshot.header.cluster_size)
    cluster, most = shape.cluster, min(most, snapshot.unclaimed(tree.owner))
    dirty: list[tuple[int, int]] = []  # runs of chunks that are dirty all over
    waiting: list[_Pointer] = []  # to nodes, so that it is known how many chunks there are before one is read
    leading: list[_Pointer] = []  # to chunks
    places: set[int] = set()  # of all of them

    def see(level: int, index: int, place: int, checksum: int) -> None:
        if place == ALL_ONES:
            dirty.append((index * shape.below(level), (index + 1) * shape.below(level)))
        elif place != ALL_ZEROS:
            places.add(place)
            (waiting if level else leading).append(_Pointer(level, index, place, checksum))

    see(shape.top, 0, tree.place, tree.checksum)
    nodes = 0
    while waiting and nodes + len(waiting) + len(leading) <= most:
        nodes += 1
        node = waiting.pop()
        if (data := _read(snapshot, node)) is None:
            return None
        words = memoryview(data).cast("Q")[:: store.POINTER_SIZE // 8]  # each begins a pointer; most are ALL_ZEROS
        for number, word in enumerate(words[: shape.children(node.level, node.number)].tolist()):
            if word:
                place, checksum, _ = POINTER.unpack(data, number * store.POINTER_SIZE)
                see(node.level - 1, node.number * shape.fan + number, place, checksum)
    if waiting or nodes + len(leading) > most or len(places) < nodes + len(leading):  # one is used twice
        return None
    chunks: list[tuple[int, bytes]] = []
    for chunk in leading:
        if (data := _read(snapshot, chunk)) is None:
            return None
        chunks.append((chunk.number, data))
    snapshot.claim(tree.owner, nodes + len(chunks))
    octets = memory.zeros(geometry.ceil_div(tree.nbits, 64) * 8)
    for index, data in chunks:
        target = octets[index * cluster : (index + 1) * cluster]
        target[:] = data[: len(target)]
    for first, end in dirty:
        target = octets[first * cluster : end * cluster]
        target[:] = bytes((0xFF,)) * len(target)
    return memory.words(octets, tree.nbits)


def _read(snapshot: Snapshot, pointer: _Pointer) -> bytes | None:
    """The cluster that a pointer leads to; None if it is not sound."""
    cluster, place = snapshot.header.cluster_size, pointer.place
    if place % cluster or not store.RESERVED <= place <= snapshot.size - cluster:
        return None
    data = snapshot.file.read(place, cluster)
    return data if len(data) == cluster and crc32c(data) == pointer.checksum else None
