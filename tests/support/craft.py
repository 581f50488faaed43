"""Damages qcow2 images on purpose, byte by byte: where each field lies in a given image, and how to set it.

The offsets of fields come from the declarations in `dirtmap.fmt`; how structures lead to each other is followed here
anew, without the engine, so that what it believes about an image can be held against what is there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dirtmap.fmt import directory, qcow2
from dirtmap.fmt.parsers.directory import DIRECTORY_ENTRY
from dirtmap.fmt.parsers.extensions import EXTENSION_HEAD
from dirtmap.fmt.parsers.qcow2 import BITMAPS_EXTENSION, CRYPTO_EXTENSION, HEADER_MORE, HEADER_V2, HEADER_V3, SNAPSHOT
from dirtmap.fmt.structure import Structure


class Place(NamedTuple):
    """Where a big-endian number lies: ``offset`` and ``size`` in bytes."""

    offset: int
    size: int

    @property
    def most(self) -> int:
        """The largest value that fits."""
        return (1 << 8 * self.size) - 1


class Craft:
    """An image's bytes, to be changed in memory and saved wherever a test wants them.

    Attributes:
        data: the whole file.
    """

    def __init__(self, source: str | os.PathLike[str] | bytes | bytearray) -> None:
        self.data = bytearray(source if isinstance(source, bytes | bytearray) else Path(source).read_bytes())

    def copy(self) -> Craft:
        """The same bytes, to be changed apart from these."""
        return Craft(self.data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Makes a file of these bytes."""
        Path(path).write_bytes(self.data)

    def get(self, place: Place) -> int:
        """The number there."""
        return int.from_bytes(self.data[place.offset : place.offset + place.size], "big")

    def set(self, place: Place, value: int) -> Craft:
        """Puts a number there, cut to what fits; returns the craft itself."""
        self.put(place.offset, (value & place.most).to_bytes(place.size, "big"))
        return self

    def put(self, offset: int, data: bytes) -> Craft:
        """Puts bytes there, making the file longer where they go beyond it."""
        self.data.extend(bytes(max(0, offset + len(data) - len(self.data))))
        self.data[offset : offset + len(data)] = data
        return self

    def append(self, data: bytes) -> int:
        """Puts bytes behind the end, at the next cluster; returns their offset. Nothing counts the cluster yet."""
        offset = -(-len(self.data) // self.cluster_size) * self.cluster_size
        self.put(offset, data.ljust(-(-len(data) // self.cluster_size) * self.cluster_size, b"\0"))
        return offset

    # Where things are.

    def header(self, name: str) -> Place:
        """A field of the header."""
        for structure, start in (
            (HEADER_V2, 0),
            (HEADER_V3, qcow2.V3_OFFSET),
            (HEADER_MORE, qcow2.MORE_OFFSET),
        ):
            if any(field.name == name for field in structure.fields):
                return _place(structure, start, name)
        raise KeyError(name)

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return 1 << self.get(self.header("cluster_bits"))

    def extension(self, kind: int) -> int:
        """The offset of the head of the first extension of that type; 0 (`END`) for the end marker.

        Raises:
            KeyError: there is none.
        """
        version = self.get(self.header("version"))
        at = self.get(self.header("header_length")) if version > 2 else HEADER_V2.size
        while at + EXTENSION_HEAD.size <= self.cluster_size:
            found = self.get(Place(at, 4))
            if found == kind:
                return at
            if found == 0:
                break
            at += 8 + -(-self.get(Place(at + 4, 4)) // 8) * 8
        raise KeyError(kind)

    def head(self, name: str, kind: int = qcow2.EXTENSION_BITMAPS) -> Place:
        """``type`` or ``length`` of an extension."""
        return _place(EXTENSION_HEAD, self.extension(kind), name)

    def bitmaps(self, name: str) -> Place:
        """A field of the bitmaps extension."""
        start = self.extension(qcow2.EXTENSION_BITMAPS) + EXTENSION_HEAD.size
        return _place(BITMAPS_EXTENSION, start, name)

    def entries(self) -> list[int]:
        """The offsets of the directory's entries."""
        at = self.get(self.bitmaps("directory_offset"))
        found = []
        for _ in range(self.get(self.bitmaps("nb_bitmaps"))):
            found.append(at)
            name, extra = (self.get(_place(DIRECTORY_ENTRY, at, f"{what}_size")) for what in ("name", "extra_data"))
            at += -(-(DIRECTORY_ENTRY.size + extra + name) // 8) * 8
        return found

    def entry(self, index: int, name: str) -> Place:
        """A field of a directory entry."""
        return _place(DIRECTORY_ENTRY, self.entries()[index], name)

    def name(self, index: int) -> tuple[int, bytes]:
        """A bitmap's name and where it lies."""
        at = self.entries()[index] + DIRECTORY_ENTRY.size + self.get(self.entry(index, "extra_data_size"))
        return at, bytes(self.data[at : at + self.get(self.entry(index, "name_size"))])

    def table(self, index: int, position: int = 0) -> Place:
        """An entry of a bitmap's table."""
        return Place(self.get(self.entry(index, "table_offset")) + 8 * position, 8)

    def data_clusters(self, index: int) -> list[int]:
        """The offsets of a bitmap's clusters of bits."""
        size = self.get(self.entry(index, "table_size"))
        raw = [self.get(self.table(index, position)) for position in range(size)]
        return [value for value in raw if value > directory.TABLE_ALL_ONES]

    def snapshot(self, index: int, name: str) -> Place:
        """A field of an entry of the snapshot table."""
        at = self.get(self.header("snapshots_offset"))
        for _ in range(index):
            sizes = ("extra_data_size", "id_size", "name_size")
            size = sum(self.get(_place(SNAPSHOT, at, what)) for what in sizes)
            at += -(-(SNAPSHOT.size + size) // 8) * 8
        return _place(SNAPSHOT, at, name)

    def l1(self, index: int = 0) -> Place:
        """An entry of the active L1 table."""
        return Place(self.get(self.header("l1_table_offset")) + 8 * index, 8)

    def l2(self, index: int = 0) -> Place:
        """An entry of the first L2 table, whose entries have 8 bytes."""
        return Place((self.get(self.l1()) & qcow2.OFFSET_MASK) + 8 * index, 8)

    def block(self, index: int = 0) -> Place:
        """An entry of the refcount table."""
        return Place(self.get(self.header("refcount_table_offset")) + 8 * index, 8)

    def fields(self) -> Iterator[tuple[str, Place]]:
        """Every field of the header, the bitmaps extension and the entries of directory and snapshot table, and the
        first entry of each table."""
        version3 = self.get(self.header("version")) > 2
        for structure in (HEADER_V2, *((HEADER_V3, HEADER_MORE) if version3 else ())):
            for field in structure.fields:
                yield f"header.{field.name}", self.header(field.name)
        yield from (("L1[0]", self.l1()), ("L2[0]", self.l2()), ("refcount_table[0]", self.block()))
        if self.get(self.header("nb_snapshots")):
            for field in SNAPSHOT.fields:
                yield f"snapshot[0].{field.name}", self.snapshot(0, field.name)
        with contextlib.suppress(KeyError):
            start = self.extension(qcow2.EXTENSION_CRYPTO) + EXTENSION_HEAD.size
            for field in CRYPTO_EXTENSION.fields:
                yield f"crypto.{field.name}", _place(CRYPTO_EXTENSION, start, field.name)
        try:
            self.extension(qcow2.EXTENSION_BITMAPS)
        except KeyError:
            return
        for field in EXTENSION_HEAD.fields:
            yield f"extension.{field.name}", self.head(field.name)
        for field in BITMAPS_EXTENSION.fields:
            yield f"bitmaps.{field.name}", self.bitmaps(field.name)
        for index in range(len(self.entries())):
            for field in DIRECTORY_ENTRY.fields:
                yield f"entry[{index}].{field.name}", self.entry(index, field.name)
            yield f"table[{index}][0]", self.table(index)

    # Refcounts.

    def refcount(self, offset: int) -> int:
        """How often the cluster at that offset is said to be referenced."""
        place, shift, mask = self._refcount(offset)
        return self.get(place) >> shift & mask

    def set_refcount(self, offset: int, count: int) -> Craft:
        """Says so; its refcount block must exist."""
        place, shift, mask = self._refcount(offset)
        return self.set(place, self.get(place) & ~(mask << shift) | (count & mask) << shift)

    def leak(self, clusters: int = 1) -> list[int]:
        """Clusters behind the end that have a refcount of 1 and nothing that refers to them; returns their offsets."""
        offsets = [self.append(b"leaked") for _ in range(clusters)]
        for offset in offsets:
            self.set_refcount(offset, 1)
        return offsets

    def _refcount(self, offset: int) -> tuple[Place, int, int]:
        order = self.get(self.header("refcount_order")) if self.get(self.header("version")) > 2 else 4
        bits, number = 1 << order, offset // self.cluster_size
        block, position = divmod(number, self.cluster_size * 8 // bits)
        at = self.get(self.block(block))
        if not at:
            raise KeyError(offset)
        if bits >= 8:
            return Place(at + position * bits // 8, bits // 8), 0, (1 << bits) - 1
        return Place(at + position * bits // 8, 1), position * bits % 8, (1 << bits) - 1


def _place(structure: Structure, start: int, name: str) -> Place:
    field = structure.field(name)
    return Place(start + field.offset, field.size)
