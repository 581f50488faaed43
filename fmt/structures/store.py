"""The structures of a store; parsing and building of its area pointers and records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from construct import Bytes, Int8ub, Int16ub, Int32ub, Int64ub

from dirtmap.fmt.directory import Entry
from dirtmap.fmt.geometry import align_up
from dirtmap.fmt.identity import Identity
from dirtmap.fmt.store import ALL_ONES, CRITICAL_ITEM, ITEM_BITS, ITEM_SIZES, Area, Record
from dirtmap.fmt.structure import Structure
from dirtmap.fmt.structures.extensions import build_extension, parse_chain

HEADER = Structure(
    "store header",
    "magic" / Bytes(4),
    "version" / Int32ub,
    "incompatible_features" / Int64ub,
    "read_only_compatible_features" / Int64ub,
    "compatible_features" / Int64ub,
    "autoclear_features" / Int64ub,
    "cluster_bits" / Int32ub,
    "header_length" / Int32ub,
    "slot" / Int8ub,
    "copy" / Int8ub,
    "followed" / Int16ub,
    "sessions" / Int32ub,
    "uuid" / Bytes(16),
    "generation" / Int64ub,
    "commit_id" / Bytes(16),
    "doubt_generation" / Int64ub,
    "clusters" / Int64ub,
    "commit_time" / Int64ub,
)
CHECKSUM = Structure("store header checksum", "checksum" / Int32ub)  # of a block, in its last four bytes

AREA = Structure("area pointer", "offset" / Int64ub, "length" / Int32ub, "checksum" / Int32ub)
NAMESPACES_EXTENSION = Structure(
    "namespaces extension",
    "offset" / Int64ub,
    "length" / Int32ub,
    "checksum" / Int32ub,
    "depth" / Int32ub,
    "reserved" / Int32ub,
    "namespaces" / Int64ub,
)
NODE_POINTER = Structure(
    "node pointer",
    "key" / Int32ub,
    "count" / Int32ub,
    "offset" / Int64ub,
    "length" / Int32ub,
    "checksum" / Int32ub,
)
PLACE_EXTENSION = Structure("place extension", "filesystem" / Bytes(16), "inode" / Int64ub, "birth" / Int64ub)
LEAF = Structure("space map entry", "offset" / Int64ub, "free" / Int32ub, "checksum" / Int32ub)
RUN = Structure("released run", "first" / Int64ub, "count" / Int64ub)
FILE_IDENTITY = Structure(
    "file identity",
    "filesystem" / Bytes(16),
    "inode" / Int64ub,
    "birth" / Int64ub,
    "size" / Int64ub,
    "mtime" / Int64ub,
    "ctime" / Int64ub,
)
RECORD = Structure(
    "namespace record",
    "length" / Int32ub,
    "kind" / Int8ub,
    "reserved" / Int8ub,
    "name_size" / Int16ub,
    "uuid" / Bytes(16),
    "root_uuid" / Bytes(16),
    "generation" / Int64ub,
    "size" / Int64ub,
    "directory_offset" / Int64ub,
    "directory_length" / Int32ub,
    "directory_checksum" / Int32ub,
    "nb_bitmaps" / Int32ub,
    "path_size" / Int32ub,
    "image" / Bytes(FILE_IDENTITY.size),
)
OWNER = Structure("directory owner", "owner" / Bytes(16))  # at the start of each cluster of a directory
_NAME_SIZE = RECORD.field("name_size").offset
POINTER = Structure("bits pointer", "place" / Int64ub, "checksum" / Int32ub, "reserved" / Int32ub)
# Items in the extra data of a directory entry. A window is another: see `dirtmap.fmt.structures.live`.
BITS = Structure("bits", "checksum" / Int32ub, "reserved" / Int32ub)
IDENTITY = Structure("bitmap identity", "uuid" / Bytes(16), "generation" / Int64ub)

# A record's extension, one for each hold. The bitmap's name and the owner follow it.
HOLD = Structure(
    "hold",
    "process" / Int32ub,
    "name_size" / Int16ub,
    "owner_size" / Int16ub,
    "start" / Int64ub,
    "boot_id" / Bytes(16),
    "token" / Bytes(16),
)


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
    chain = parse_chain(data, 0, len(data))
    if chain.fault or chain.terminated or chain.end != len(data):
        raise ValueError(chain.fault or f"items that end at byte {chain.end} of {len(data)}")
    return tuple((item.type, item.data) for item in chain.extensions)


def build_items(items: Iterable[tuple[int, bytes]]) -> bytes:
    """Returns the extra data of a directory entry with these items, as (type, data)."""
    return b"".join(build_extension(kind, data) for kind, data in items)


def item_faults(entry: Entry) -> Iterator[tuple[str, str]]:
    """Yields what is wrong with the extra data of a directory entry in a store, as (field, what)."""
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
    first = align_up(path + fixed.path_size, 8)
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
    names = (record.name + record.path).ljust(align_up(len(record.name) + len(record.path), 8), b"\0")
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
