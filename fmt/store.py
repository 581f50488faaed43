"""The store: our own file format, which holds the bitmaps of many images, each in a namespace of its own.

    block 0     1     2     3   |  clusters: areas of bits, directories, nodes, the space map
      | A | B | A' | B' |       |  ...

    header --+-- namespace table: nodes of pointers --> leaf: records --> directory --> nodes --> chunks of bits
             +-- space map: a pointer for each leaf --> leaf: one bit a cluster, 1 = used
             +-- released: runs of clusters that the previous commit used and this one does not

There are two header slots, A and B, which commits use in turn. Each slot has two copies. A header refers to everything
else by *area pointers*: offset, length in bytes, and CRC32C of those bytes. An area begins at a cluster. It is never
changed, only replaced by another one. All numbers are big-endian. The structures are in `dirtmap.fmt.structures.store`.
Source of every rule: SPEC.md, "The store".
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from dirtmap.fmt import geometry
from dirtmap.fmt.digest import crc32c, digest
from dirtmap.fmt.directory import MAX_BITMAPS, TYPE_DIRTY_TRACKING, Entry, name_fault
from dirtmap.fmt.extensions import HEAD_SIZE, build_extension, parse_chain
from dirtmap.fmt.identity import NO_IDENTITY, Identity
from dirtmap.fmt.parsers.store import AREA, FILE_IDENTITY, RECORD

MAGIC = b"DMS\xfc"
EARLIER_MAGIC = b"DMS\xfb"  # of a layout that had no release; such a store is refused, and never repaired
VERSION = 2
WRITER = b"dirtmap 0.1.0"  # what a commit says of the program that made it
BLOCK = 4096  # bytes of one copy of a header
COPIES = ((0, 2), (1, 3))  # blocks of slot A and of slot B
RESERVED = 4 * BLOCK  # bytes at the start of the file that hold headers only
INCOMPATIBLE_SESSION = 1 << 0  # set exactly while a record has a session
INCOMPATIBLE_KNOWN = INCOMPATIBLE_SESSION
AREA_SIZE = 16  # bytes of an area pointer
POINTER_SIZE = 16  # bytes of a pointer in a node of the tree that leads to a bitmap's bits
OWNER_SIZE = 16  # bytes at the start of each cluster of a directory: whose it is

CRITICAL = 1 << 31  # in the type of a record's extension: who does not know it refuses the namespace
# Types of a record's extensions.
EXTENSION_HOLD = CRITICAL | 0x484F4C44
EXTENSION_SESSION = CRITICAL | 0x5452414B
EXTENSION_PEER = CRITICAL | 0x50454552
EXTENSION_CHECKPOINTS = 0x434B5054
EXTENSION_CHECKPOINT_TIMES = 0x434B544D
RECORD_EXTENSIONS = (
    EXTENSION_HOLD,
    EXTENSION_SESSION,
    EXTENSION_PEER,
    EXTENSION_CHECKPOINTS,
    EXTENSION_CHECKPOINT_TIMES,
)
OF_A_SESSION = (EXTENSION_SESSION, EXTENSION_PEER)  # removed from a record when its session ends

# Types of the items in the extra data of a directory entry. Who does not know a critical one refuses the namespace.
CRITICAL_ITEM = 1 << 31
ITEM_BITS = 0x42495453
ITEM_WINDOW = CRITICAL_ITEM | 0x57494E44
ITEM_IDENTITY = 0x424D4944
ITEM_SIZES = {ITEM_BITS: 8, ITEM_WINDOW: 24, ITEM_IDENTITY: 24}  # bytes of data; a later version may have more

# Types of the header's extensions.
EXTENSION_NAMESPACES = 0x4E535043
EXTENSION_SPACE = 0x53504143
EXTENSION_RELEASED = 0x52454C53
EXTENSION_PLACE = 0x504C4143
EXTENSION_WRITER = 0x57525452
EXTENSION_NAMES = {
    EXTENSION_NAMESPACES: "namespaces",
    EXTENSION_SPACE: "space map",
    EXTENSION_RELEASED: "released clusters",
    EXTENSION_PLACE: "place",
    EXTENSION_WRITER: "writer",
}

MIN_CLUSTER_BITS = 12
MAX_CLUSTER_BITS = 21
DEFAULT_CLUSTER_BITS = 12
MAX_NAMESPACES = 1 << 24  # of 2**32 keys one in 256 is taken, so that hardly any two names share one
NODE_BYTES = 4096  # of a node of the namespace table, above which a writer splits it if it can
MAX_NODE_BYTES = 1 << 17  # the longest record, or 1,000 short ones whose names share a key
MAX_DEPTH = 8  # levels of nodes above the leaves; 16 million namespaces need four
MAX_PATH = 4096
MAX_WRITER = 255  # bytes
MAX_RECORD_EXTENSIONS = 1 << 16  # bytes
MAX_SPACE_MAP_BYTES = 4 << 20  # of the space map's root: enough for 32 TiB with clusters of 4 KiB, 8 PiB with 64 KiB
MAX_RELEASED_BYTES = 16 << 20
MAX_EXTRA_DATA = 1 << 16  # bytes, of a directory entry
MAX_METADATA_BYTES = 96 << 20  # of any other area without bits: 65,535 entries with the longest names take 66 MiB
MAX_CHUNKS = 0xFFFFFFFF  # of a bitmap: as many as an entry's table_size can say
MAX_FILE_BYTES = 1 << 62
MAX_GENERATION = 1 << 62

KIND_NODE = 1
KIND_DEVICE = 2
# Says where a qcow2 image with an identity of its own is. Its bitmaps are in the image.
KIND_PLACE = 3
# Says where any other container of the host is. Only the default store has such records.
KIND_CONTAINER = 4
KIND_NAMES = {KIND_NODE: "node", KIND_DEVICE: "device", KIND_PLACE: "place", KIND_CONTAINER: "container"}
CONTAINER_PREFIX = b"container:"  # of the name of a container's record; a digest of the path follows

# Values of a place, in a directory entry's table_offset and in a pointer of a node, for bits that take no space.
ALL_ZEROS = 0
ALL_ONES = 1
_NAME_SIZE = RECORD.field("name_size").offset
_LONGEST_KEPT = 256  # bytes of the extra data of an entry


class Area(NamedTuple):
    """An area pointer: offset and length in bytes, and CRC32C of the bytes. Length 0 means that nothing is stored."""

    offset: int = 0
    length: int = 0
    checksum: int = 0

    def clusters(self, cluster_size: int) -> range:
        """Returns the numbers of the clusters that the area takes."""
        first = self.offset // cluster_size
        return range(first, first + geometry.ceil_div(self.length, cluster_size))


NOWHERE = Area()


def name_key(name: bytes) -> int:
    """Returns the number by which a namespace is found in the namespace table: the CRC32C of its name."""
    return crc32c(name)


def fan_out(cluster_size: int) -> int:
    """Returns how many pointers a node has: as many as fit into a cluster."""
    return cluster_size // POINTER_SIZE


def root_level(chunks: int, cluster_size: int) -> int:
    """Returns the level of the root of a tree with so many chunks: 0 if the root is a chunk."""
    level, covered = 0, 1
    while covered < chunks:
        level, covered = level + 1, covered * fan_out(cluster_size)
    return level


def leaf_clusters(cluster_size: int) -> int:
    """Returns how many clusters a leaf of the space map covers: one for each bit."""
    return cluster_size * 8


def area_faults(area: Area, cluster_size: int, file_size: int) -> Iterator[tuple[str, str]]:
    """Yields what makes an area unusable, as (field, what). Called before its bytes are read. Sizes are in bytes."""
    if area.length == 0:
        if area.offset or area.checksum:
            yield "length", "0, but the area has a place"
        return
    if area.offset % cluster_size or area.offset < RESERVED:
        yield "offset", f"{area.offset:#x} is not a cluster behind the headers"
    elif area.offset + area.length > file_size:
        end = area.offset + area.length
        yield "offset", f"the area ends at {end:#x}, past the end of the file ({file_size:#x})"


@dataclass(frozen=True, slots=True)
class Record:
    """The record of a namespace.

    Attributes:
        name: name of the node or device, raw bytes.
        kind: `KIND_NODE`, `KIND_DEVICE`, `KIND_PLACE` or `KIND_CONTAINER`.
        uuid: UUID of the namespace, 16 bytes.
        size: size of the virtual disk, bytes.
        generation: number of the commit that wrote the directory.
        directory: where the directory is; its length is 0 if there are no bitmaps.
        nb_bitmaps: number of entries in the directory.
        path: path of the image, raw bytes; for a device, of its root's image.
        identity: identity of the image.
        root_uuid: UUID of a device's root node, 16 bytes; zeros for a node.
        extensions: further data, as (type, data); unknown types are kept.
    """

    name: bytes
    kind: int
    uuid: bytes
    size: int
    generation: int = 0
    directory: Area = NOWHERE
    nb_bitmaps: int = 0
    path: bytes = b""
    identity: Identity = NO_IDENTITY
    root_uuid: bytes = bytes(16)
    extensions: tuple[tuple[int, bytes], ...] = ()

    @property
    def label(self) -> str:
        """How messages call the namespace. One of an unknown kind, which `dump` can meet, is called a namespace."""
        kind = KIND_NODE if self.kind == KIND_PLACE else self.kind
        return f"{KIND_NAMES.get(kind, 'namespace')} '{_readable(self.name)}'"

    def extension(self, kind: int) -> bytes | None:
        """Returns the data of the first extension of that type, or None."""
        return next((data for found, data in self.extensions if found == kind), None)

    @property
    def tracked(self) -> bool:
        """True if the record has the session of a tracker. The tracker may have died."""
        return self.extension(EXTENSION_SESSION) is not None

    def with_extensions(self, kinds: Collection[int], new: Iterable[tuple[int, bytes]] = ()) -> Record:
        """Returns the same record with all extensions of the types ``kinds`` replaced by ``new``, as (type, data)."""
        others = (item for item in self.extensions if item[0] not in kinds)
        return replace(self, extensions=(*others, *new))


def namespace_label(name: bytes) -> str:
    """Returns how messages call a namespace whose kind is unknown or does not matter."""
    return f"namespace '{_readable(name)}'"


def _readable(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def container_name(path: bytes) -> bytes:
    """Returns the name of the record for the container at a path: `CONTAINER_PREFIX` and 32 hexadecimal digits."""
    return CONTAINER_PREFIX + digest(path, 16).hex().encode()


def directory_owner(name: bytes) -> bytes:
    """Returns what each cluster of the directory of that namespace begins with. No other namespace has the same."""
    return digest(name, OWNER_SIZE)


def with_owner(entries: bytes, name: bytes, cluster_size: int) -> bytes:
    """Returns the bytes of a directory: those of its entries, cut into clusters that each begin with the owner."""
    owner, room, view = directory_owner(name), cluster_size - OWNER_SIZE, memoryview(entries)
    return b"".join(part for at in range(0, len(entries), room) for part in (owner, view[at : at + room]))


def without_owner(data: bytes, cluster_size: int) -> bytes:
    """Returns the bytes of the entries of a directory, whoever it belongs to."""
    view = memoryview(data)
    return b"".join(view[at + OWNER_SIZE : at + cluster_size] for at in range(0, len(data), cluster_size))


def belongs_to(data: bytes, name: bytes, cluster_size: int) -> bool:
    """Returns True if every cluster of a directory begins with that namespace as its owner."""
    owner = directory_owner(name)
    return all(data.startswith(owner, at) for at in range(0, len(data), cluster_size))


def place_in_directory(at: int, cluster_size: int) -> int:
    """Returns where byte ``at`` of a directory's entries is in the directory."""
    return at + (at // (cluster_size - OWNER_SIZE) + 1) * OWNER_SIZE


def record_faults(record: Record) -> Iterator[tuple[str, str]]:
    """Yields what is wrong with a record, as (field, what). Called before reading and before writing."""
    if fault := name_fault(record.name):
        yield "name", fault
    if record.kind not in KIND_NAMES:
        yield "kind", f"{record.kind} is unknown"
    if record.size > geometry.MAX_DISK_SIZE:
        yield "size", f"{record.size} is above {geometry.MAX_DISK_SIZE}"
    if len(record.path) > MAX_PATH or b"\0" in record.path:
        yield "path", "too long, or contains a NUL byte"
    if sum(len(data) + HEAD_SIZE for _, data in record.extensions) > MAX_RECORD_EXTENSIONS:
        yield "extensions", f"more than {MAX_RECORD_EXTENSIONS} bytes"
    if record.nb_bitmaps > MAX_BITMAPS:
        yield "nb_bitmaps", f"{record.nb_bitmaps} is above {MAX_BITMAPS}"
    if bool(record.nb_bitmaps) != bool(record.directory.length):
        yield "nb_bitmaps", f"{record.nb_bitmaps}, but the directory has {record.directory.length} bytes"


def entry_faults(entry: Entry, disk_size: int, cluster_size: int, file_size: int) -> Iterator[tuple[str, str]]:
    """Yields what is wrong with a directory entry in a store, as (field, what). Sizes are in bytes.

    Unknown flags are no fault; they are kept.
    """
    if entry.type != TYPE_DIRTY_TRACKING:
        yield "type", f"{entry.type} is not 1 (dirty tracking bitmap)"
    if fault := name_fault(entry.name):
        yield "name", fault
    if not geometry.is_granularity(1 << min(entry.granularity_bits, 63)):
        yield "granularity_bits", f"{entry.granularity_bits} is outside 9..31"
        return
    chunks = geometry.table_entries(disk_size, entry.granularity, cluster_size)
    if chunks > MAX_CHUNKS:
        yield "granularity_bits", f"{chunks} chunks of bits are more than {MAX_CHUNKS}"
    if entry.table_offset in (ALL_ZEROS, ALL_ONES):
        if entry.table_size:
            yield "table_size", f"{entry.table_size}, but the bitmap takes no space"
        return
    if entry.table_size != chunks or not chunks:
        yield "table_size", f"{entry.table_size} chunks, but the disk's size needs another number"
    yield from area_faults(Area(entry.table_offset, cluster_size, 0), cluster_size, file_size)


def parse_identity(data: bytes) -> Identity:
    """Returns the identity in the bytes of a file identity."""
    return Identity(*FILE_IDENTITY.unpack(data))


def build_identity(identity: Identity) -> bytes:
    """Returns the bytes of a file identity."""
    return FILE_IDENTITY.build(
        filesystem=identity.filesystem,
        inode=identity.inode,
        birth=identity.birth,
        size=identity.size,
        mtime=identity.mtime_ns,
        ctime=identity.ctime_ns,
    )


def parse_items(data: bytes) -> tuple[tuple[int, bytes], ...]:
    """Returns the items in the extra data of a directory entry, as (type, data).

    Raises:
        ValueError: they do not fit the extra data.
    """
    # A commit takes the same few apart several times. Long ones are not kept in memory.
    return _parse_items(data) if len(data) <= _LONGEST_KEPT else _parse_items.__wrapped__(data)


@functools.lru_cache(maxsize=32)
def _parse_items(data: bytes) -> tuple[tuple[int, bytes], ...]:
    chain = parse_chain(data, 0, len(data))
    if chain.fault or chain.terminated or chain.end != len(data):
        raise ValueError(chain.fault or f"items that end at byte {chain.end} of {len(data)}")
    return tuple((item.type, item.data) for item in chain.extensions)


def build_items(items: Iterable[tuple[int, bytes]]) -> bytes:
    """Returns the extra data of a directory entry with these items, as (type, data)."""
    return b"".join(build_extension(kind, data) for kind, data in items)


def item_faults(entry: Entry) -> Iterator[tuple[str, str]]:
    """Yields what is wrong with the extra data of a directory entry in a store, as (field, what)."""
    if len(entry.extra_data) > MAX_EXTRA_DATA:
        yield "extra_data", f"{len(entry.extra_data)} bytes, more than {MAX_EXTRA_DATA}"
        return
    try:
        items = parse_items(entry.extra_data)
    except ValueError as error:
        yield "extra_data", str(error)
        return
    kinds = [kind for kind, _ in items]
    if len(set(kinds)) != len(kinds):
        yield "extra_data", "two items of one type"
    for kind, data in items:
        if len(data) < ITEM_SIZES.get(kind, 0):
            yield "extra_data", f"an item of type {kind:#010x} has {len(data)} bytes, which are too few"
    if entry.table_offset > ALL_ONES and ITEM_BITS not in kinds:
        yield "extra_data", "no checksum of the bits"


def unknown_item(entry: Entry) -> int | None:
    """Returns the type of an item that must be known to use the entry, and is not; or None. The items have to fit."""
    kinds = (kind for kind, _ in parse_items(entry.extra_data))
    return next((kind for kind in kinds if kind & CRITICAL_ITEM and kind not in ITEM_SIZES), None)


def parse_areas(data: bytes) -> list[Area]:
    """Returns the area pointers in an array of them."""
    parsed = (AREA.parse(data, at) for at in range(0, len(data), AREA.size))
    return [Area(area.offset, area.length, area.checksum) for area in parsed]


def split_records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the name and the bytes of each record of a leaf.

    Raises:
        ValueError: a record or a name ends outside the leaf or the record.
    """
    at, left = 0, len(data)
    while left:
        if left < RECORD.size:
            raise ValueError(f"{left} bytes are left, too few for a record")
        length = int.from_bytes(data[at : at + 4], "big")
        name = at + RECORD.size
        end = name + int.from_bytes(data[at + _NAME_SIZE : at + _NAME_SIZE + 2], "big")
        if end > at + length or length > left or length % 8:
            raise ValueError(f"a record of {length} bytes at {at} does not fit its name, or the leaf")
        yield data[name:end], data[at : at + length]
        at, left = at + length, left - length


def parse_record(raw: bytes) -> Record:
    """Returns the record in its bytes, as `split_records` yields them.

    Raises:
        ValueError: the path or an extension ends outside the record.
    """
    fixed = RECORD.parse(raw)
    path = RECORD.size + fixed.name_size
    first = geometry.align_up(path + fixed.path_size, 8)
    if first > len(raw):
        raise ValueError(f"a record of {len(raw)} bytes does not fit its path")
    chain = parse_chain(raw, first, len(raw))
    if chain.fault or chain.end != len(raw):
        raise ValueError("a record has extensions that do not fit it")
    return Record(
        name=raw[RECORD.size : path],
        kind=fixed.kind,
        uuid=fixed.uuid,
        size=fixed.size,
        generation=fixed.generation,
        directory=Area(fixed.directory_offset, fixed.directory_length, fixed.directory_checksum),
        nb_bitmaps=fixed.nb_bitmaps,
        path=raw[path : path + fixed.path_size],
        identity=parse_identity(fixed.image),
        root_uuid=fixed.root_uuid,
        extensions=tuple((extension.type, extension.data) for extension in chain.extensions),
    )


def build_record(record: Record) -> bytes:
    """Returns the bytes of one record, padded with zeros to a multiple of 8."""
    names = (record.name + record.path).ljust(geometry.align_up(len(record.name) + len(record.path), 8), b"\0")
    extensions = b"".join(build_extension(kind, data) for kind, data in record.extensions)
    length = RECORD.size + len(names) + len(extensions)
    fixed = RECORD.build(
        length=length,
        kind=record.kind,
        reserved=0,
        name_size=len(record.name),
        uuid=record.uuid,
        root_uuid=record.root_uuid,
        generation=record.generation,
        size=record.size,
        directory_offset=record.directory.offset,
        directory_length=record.directory.length,
        directory_checksum=record.directory.checksum,
        nb_bitmaps=record.nb_bitmaps,
        path_size=len(record.path),
        image=build_identity(record.identity),
    )
    return fixed + names + extensions
