"""The bits of a small bitmap in a store, read without numpy, which takes longer to start than a command that maps them.

Only where all of them are sound: `dirtmap.engine.storefile.chunks` tells what is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dirtmap.engine.storefile.entries import Shape, Tree
from dirtmap.engine.system import memory
from dirtmap.fmt import geometry, store
from dirtmap.fmt.digest import crc32c
from dirtmap.fmt.parsers.store import POINTER
from dirtmap.fmt.store import ALL_ONES, ALL_ZEROS

if TYPE_CHECKING:
    from dirtmap.engine.storefile.file import Snapshot

_MOST = 1 << 9  # chunks, of 16 Mi bits as a rule; for more, a loop in Python takes longer than numpy to start


def load(snapshot: Snapshot, tree: Tree, most: int = _MOST) -> memoryview | None:
    """The bits of a tree as words: uint64, ceil(nbits / 64) of them, tail bits zero.

    Args:
        snapshot: of the store.
        tree: of the bitmap.
        most: so many chunks are few.

    Returns:
        None if there are many, or if anything is damaged, or seems to be because the store has moved on.
    """
    shape = Shape(tree.nbits, snapshot.header.cluster_size)
    if shape.chunks > most:
        return None
    cluster, unclaimed, read = shape.cluster, snapshot.unclaimed(tree.owner), 0
    octets = memory.zeros(geometry.ceil_div(tree.nbits, 64) * 8)
    above = [(shape.top, 0, tree.place, tree.checksum)]
    while above:
        level, index, place, checksum = above.pop()
        if place == ALL_ZEROS:
            continue
        first = index * shape.below(level) * cluster
        target = octets[first : first + shape.below(level) * cluster]
        if place == ALL_ONES:
            target[:] = bytes((0xFF,)) * len(target)
            continue
        read += 1
        if place % cluster or not store.RESERVED <= place <= snapshot.size - cluster or read > unclaimed:
            return None
        data = snapshot.file.read(place, cluster)
        if len(data) < cluster or crc32c(data) != checksum:
            return None
        if level == 0:
            target[:] = data[: len(target)]
            continue
        for child in range(shape.children(level, index)):
            place, checksum, _ = POINTER.unpack(data, child * POINTER.size)
            above.append((level - 1, index * shape.fan + child, place, checksum))
    snapshot.claim(tree.owner, read)
    words = octets.cast("Q")
    if tree.nbits % 64:
        words[-1] &= (1 << tree.nbits % 64) - 1
    return words
