"""A second reader of qcow2 images, as plain as can be, that shares nothing with dirtmap: the judge of its commits.

It reads whole images in memory, follows the format's definition (docs/interop/qcow2.txt), and raises `Broken` at the
first thing that is not as it should be. Offsets and lengths are bytes, clusters are numbered from the file's start.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BITMAPS = 0x23852875
CRYPTO = 0x0537BE77
VACANT = 0x646D7046  # dirtmap's own: room for an extension
NAMESPACE = 0x646D704E  # dirtmap's own: the image's identity
OURS = (BITMAPS, VACANT, NAMESPACE)
AUTOCLEAR_AT = 88
OFFSET = 0x00FFFFFFFFFFFE00

Counts = NDArray[np.int64]


class Broken(Exception):
    """The image is not what the format says."""


class Bitmap(NamedTuple):
    """A bitmap with its bits: ``packed`` bytes, cut at the last granule; of one in use whatever its clusters hold."""

    name: bytes
    granularity_bits: int
    flags: int
    packed: bytes


class Extension(NamedTuple):
    kind: int
    offset: int
    data: bytes


@dataclass
class Header:
    """The fields this reader needs, and the extensions."""

    backing: tuple[int, int]
    cluster: int
    size: int
    l1: tuple[int, int]
    refcount_table: tuple[int, int]
    snapshots: tuple[int, int]
    incompatible: int
    autoclear: int
    refcount_bits: int
    length: int
    chain: list[Extension]
    chain_end: int

    def find(self, kind: int) -> Extension | None:
        return next((extension for extension in self.chain if extension.kind == kind), None)


def read_header(image: bytes | bytearray) -> Header:
    """The header and its extensions."""
    if len(image) < 112 or image[:8] != b"QFI\xfb\0\0\0\3":
        raise Broken("not a version 3 header")
    (
        backing_at,
        backing_size,
        cluster_bits,
        size,
        _,
        l1_size,
        l1_at,
        table_at,
        table_clusters,
        snapshots,
        snapshots_at,
    ) = struct.unpack_from(">QIIQIIQQIIQ", image, 8)
    incompatible, _, autoclear, order, length = struct.unpack_from(">QQQII", image, 72)
    header = Header(
        (backing_at, backing_size),
        1 << cluster_bits,
        size,
        (l1_at, l1_size),
        (table_at, table_clusters),
        (snapshots_at, snapshots),
        incompatible,
        autoclear,
        1 << order,
        length,
        [],
        0,
    )
    at, limit = length, backing_at or header.cluster
    while True:
        if at + 8 > limit:
            raise Broken("the extensions have no end")
        kind, count = struct.unpack_from(">II", image, at)
        if kind == 0:
            break
        if at + 8 + count > limit:
            raise Broken(f"extension {kind:#x} leaves the header")
        header.chain.append(Extension(kind, at, bytes(image[at + 8 : at + 8 + count])))
        at += 8 + (count + 7) // 8 * 8
    header.chain_end = at
    return header


def backing_name(image: bytes | bytearray, header: Header) -> bytes:
    at, size = header.backing
    return bytes(image[at : at + size]) if at else b""


def take(image: bytes | bytearray, offset: int, length: int, what: str) -> bytes:
    """Those bytes, all of them."""
    if offset == 0 or offset + length > len(image):
        raise Broken(f"{what} at {offset:#x} is not in the file")
    return bytes(image[offset : offset + length])


def words(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f">{len(data) // 8}Q", data)


class Reader:
    """One image: its bitmaps, and how often each cluster is referenced."""

    def __init__(self, image: bytes | bytearray) -> None:
        self.image = image
        self.header = read_header(image)
        self.cluster = self.header.cluster
        self.references: dict[int, int] = {}

    def refer(self, offset: int, length: int) -> None:
        for number in range(offset // self.cluster, -(-(offset + length) // self.cluster)):
            self.references[number] = self.references.get(number, 0) + 1

    def guest(self) -> dict[int, int]:
        """References of all but bitmaps and refcounts: the header, guest data, snapshots, an encryption header."""
        header, image = self.header, self.image
        self.references = {}
        self.refer(0, self.cluster)
        tables = [header.l1]
        at, count = header.snapshots
        for _ in range(count):
            l1_at, l1_size, id_size, name_size = struct.unpack_from(">QIHH", image, at)
            (extra,) = struct.unpack_from(">I", image, at + 36)
            tables.append((l1_at, l1_size))
            at += (40 + extra + id_size + name_size + 7) // 8 * 8
        if count:
            self.refer(header.snapshots[0], at - header.snapshots[0])
        crypto = header.find(CRYPTO)
        if crypto:
            self.refer(*struct.unpack(">QQ", crypto.data))
        for l1_at, l1_size in tables:
            self.refer(l1_at, l1_size * 8)
            for entry in words(image[l1_at : l1_at + l1_size * 8]):
                if entry & OFFSET:
                    self.l2(entry & OFFSET)
        return self.references

    def l2(self, offset: int) -> None:
        self.refer(offset, self.cluster)
        for entry in words(bytes(self.image[offset : offset + self.cluster]))[
            :: 2 if self.header.incompatible & 16 else 1
        ]:
            if entry >> 62 & 1:
                shift = 62 - (self.cluster.bit_length() - 1 - 8)
                start = entry & (1 << shift) - 1
                end = (start // 512 + (entry >> shift & (1 << 62 - shift) - 1) + 1) * 512
                self.refer(start, end - start)
            elif entry & OFFSET and not self.header.incompatible & 4:
                self.refer(entry & OFFSET, self.cluster)

    def bitmaps(self) -> tuple[Bitmap, ...]:
        """The bitmaps in their order, and nothing else may be in `references` twice; none where they are void."""
        self.references = {}
        extensions = [extension for extension in self.header.chain if extension.kind == BITMAPS]
        if len(extensions) > 1:
            raise Broken("two bitmaps extensions")
        if not self.header.autoclear & 1:
            return ()
        if not extensions or len(extensions[0].data) != 24:
            raise Broken("the autoclear bit promises bitmaps, and there is no such extension")
        count, reserved, size, at = struct.unpack(">IIQQ", extensions[0].data)
        if reserved or not count or not size or at % self.cluster:
            raise Broken("bad bitmaps extension")
        directory = take(self.image, at, size, "the directory")
        self.refer(at, size)
        found = []
        at = 0
        while at < size:
            if at + 24 > size:
                raise Broken("a piece of a directory entry")
            entry = struct.unpack_from(">QIIBBHI", directory, at)
            end = at + 24 + entry[6] + entry[5]
            if end > size:
                raise Broken("a directory entry leaves the directory")
            found.append(self.bitmap(entry, directory[at + 24 + entry[6] : end]))
            if any(directory[end : end + -end % 8]):
                raise Broken("padding is not zero")
            at = end + -end % 8
        if len(found) != count or len({bitmap.name for bitmap in found}) != count:
            raise Broken("not as many bitmaps as promised, or one twice")
        if any(number != 1 for number in self.references.values()):
            raise Broken("bitmaps share a cluster")
        return tuple(found)

    def bitmap(self, entry: tuple[int, ...], name: bytes) -> Bitmap:
        table_at, entries, flags, kind, bits, _, extra = entry
        if kind != 1 or extra or flags & ~3 or not name or not 9 <= bits <= 31 or table_at % self.cluster:
            raise Broken(f"bad entry of {name!r}")
        granules = -(-self.header.size // (1 << bits))
        size = (granules + 7) // 8
        if entries != -(-size // self.cluster):
            raise Broken(f"the table of {name!r} has {entries} entries")
        table = take(self.image, table_at, entries * 8, f"the table of {name!r}")
        self.refer(table_at, entries * 8)
        packed = bytearray()
        for raw in words(table):
            if raw & 0xFF000000000001FE or (raw & 1 and raw != 1) or raw & OFFSET & (self.cluster - 1):
                raise Broken(f"the table of {name!r} holds {raw:#x}")
            if raw <= 1:
                packed += (b"\xff" if raw else b"\0") * self.cluster
            else:
                packed += take(self.image, raw & OFFSET, self.cluster, f"data of {name!r}")
                self.refer(raw & OFFSET, self.cluster)
        if granules % 8 and not flags & 1:
            packed[size - 1] &= (1 << granules % 8) - 1
        return Bitmap(name, bits, flags, bytes(packed[:size]))

    def refcounts(self) -> list[int]:
        """The clusters of the refcount table and its blocks."""
        table, clusters = self.header.refcount_table
        blocks = words(take(self.image, table, clusters * self.cluster, "the refcount table"))
        first = table // self.cluster
        return [*range(first, first + clusters), *(block // self.cluster for block in blocks if block)]

    def counts(self) -> Counts:
        """The refcounts as stored, one a cluster; refcount blocks and their table are added to `references`."""
        table_at, clusters = self.header.refcount_table
        self.refer(table_at, clusters * self.cluster)
        width = self.header.refcount_bits
        per_block = self.cluster * 8 // width
        blocks = []
        for raw in words(take(self.image, table_at, clusters * self.cluster, "the refcount table")):
            if not raw:
                blocks.append(None)
                continue
            if raw % self.cluster:
                raise Broken(f"the refcount table holds {raw:#x}")
            self.refer(raw, self.cluster)
            blocks.append(take(self.image, raw, self.cluster, "a refcount block"))
        while blocks and blocks[-1] is None:
            blocks.pop()
        data = b"".join(block or bytes(self.cluster) for block in blocks)
        assert len(data) * 8 == len(blocks) * per_block * width
        if width >= 8:
            return np.frombuffer(data, f">u{width // 8}").astype(np.int64)
        octets = np.frombuffer(data, np.uint8)[:, None] >> np.arange(0, 8, width, dtype=np.uint8)
        return (octets & ((1 << width) - 1)).reshape(-1).astype(np.int64)


def leaks(image: bytes | bytearray) -> bool:
    """Whether a cluster inside the file is counted more often than referenced: what `qemu-img check` calls a leak."""
    reader = Reader(image)
    guest = reader.guest()
    reader.bitmaps()
    counts = reader.counts()
    inside = -(-len(image) // reader.cluster)
    return any(
        count > guest.get(number, 0) + reader.references.get(number, 0)
        for number, count in enumerate(counts[:inside].tolist())
    )
