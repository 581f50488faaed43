"""The items in the extra data of a store's directory entry: the root of its bits, its identity, its window.

Also the measures of the tree that the root is of.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from dirtmap.fmt import geometry, store
from dirtmap.fmt.directory import Entry
from dirtmap.fmt.parsers.store import BITS, IDENTITY
from dirtmap.fmt.store import ALL_ONES, ITEM_BITS, ITEM_IDENTITY, Record, build_items, parse_items

_NOTHING: Mapping[int, bytes | None] = {}


class Tree(NamedTuple):
    """Where the bits of a bitmap are: the root's place and checksum, how many bits there are, and whose they are."""

    place: int
    checksum: int
    nbits: int
    owner: bytes = b""


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


class Identity(NamedTuple):
    """Which bitmap it is, 16 bytes, and the number of the commit that last changed its bits or its flags."""

    uuid: bytes
    generation: int


def item(entry: Entry, kind: int) -> bytes | None:
    """The data of an item; None if there is none of that type."""
    return next((data for found, data in parse_items(entry.extra_data) if found == kind), None)


def with_items(entry: Entry, new: Mapping[int, bytes | None]) -> Entry:
    """The entry with these items in place of its own of their types; None removes one. All others stay."""
    items = {kind: data for kind, data in parse_items(entry.extra_data) if kind not in new}
    items.update({kind: data for kind, data in new.items() if data is not None})
    extra = build_items(sorted(items.items()))
    return entry if extra == entry.extra_data else replace(entry, extra_data=extra)


def tree_of(record: Record, entry: Entry) -> Tree:
    """Where the bits of a bitmap are."""
    nbits = geometry.granules(record.size, entry.granularity)
    data = item(entry, ITEM_BITS) if entry.table_offset > ALL_ONES else None
    return Tree(entry.table_offset, BITS.parse(data).checksum if data else 0, nbits, record.uuid + entry.name)


def with_root(entry: Entry, place: int, checksum: int, chunks: int) -> Entry:
    """The entry with another root, of a tree with so many chunks."""
    there = place > ALL_ONES
    entry = replace(entry, table_offset=place, table_size=chunks if there else 0)
    return with_items(entry, {ITEM_BITS: BITS.build(checksum=checksum, reserved=0) if there else None})


def identity_of(entry: Entry) -> Identity | None:
    """Which bitmap it is; None where the entry does not say."""
    data = item(entry, ITEM_IDENTITY)
    if data is None:
        return None
    raw = IDENTITY.parse(data)
    return Identity(raw.uuid, raw.generation)


def identified(
    entry: Entry, generation: int, *, new: bool = False, items: Mapping[int, bytes | None] = _NOTHING
) -> Entry:
    """The entry of a bitmap that commit ``generation`` changes; a ``new`` one, or one without a UUID, gets one.

    Args:
        entry: of the bitmap.
        generation: number of the commit.
        new: whether the bitmap is another one than whose items the entry has.
        items: what else changes, as in `with_items`.
    """
    known = None if new else identity_of(entry)
    own = known.uuid if known else uuid.uuid4().bytes
    return with_items(entry, {**items, ITEM_IDENTITY: IDENTITY.build(uuid=own, generation=generation)})


def all_dirty(entry: Entry) -> Entry:
    """The entry of the same bitmap, dirty all over."""
    return with_root(entry, ALL_ONES, 0, 0)


def is_same_content(one: Entry, other: Entry) -> bool:
    """True if both lead to the same bits, with the same flags and granularity."""

    def content(entry: Entry) -> tuple[object, ...]:
        return entry.table_offset, entry.granularity_bits, entry.flags, item(entry, ITEM_BITS)

    return content(one) == content(other)
