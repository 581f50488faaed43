"""The structures of a store; parsing and building of its area pointers and records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from construct import Bytes, Int8ub, Int16ub, Int32ub, Int64ub

from dirtmap.fmt.directory import Entry
from dirtmap.fmt.geometry import align_up
from dirtmap.fmt.store import ALL_ONES, CRITICAL_ITEM, ITEM_BITS, ITEM_SIZES, Area, Identity, Record
from dirtmap.fmt.structure import Structure
from dirtmap.fmt.structures.extensions import build_extension, parse_chain

HEADER = Structure(
    "store header",
    "magic" / Bytes(4),
    "version" / Int32ub,
    "incompatible_features" / Int64ub,
    "compatible_features" / Int64ub,
    "autoclear_features" / Int64ub,
    "cluster_bits" / Int32ub,
    "header_length" / Int32ub,
    "uuid" / Bytes(16),
    "generation" / Int64ub,
    "commit_id" / Bytes(16),
    "doubt_generation" / Int64ub,
    "clusters" / Int64ub,
)
CHECKSUM = Structure("store header checksum", "checksum" / Int32ub)  # of a block, in its last four bytes

AREA = Structure("area pointer", "offset" / Int64ub, "length" / Int32ub, "checksum" / Int32ub)
NAMESPACES_EXTENSION = Structure(
    "namespaces extension",
    "offset" / Int64ub,
    "length" / Int32ub,
    "checksum" / Int32ub,
    "bucket_bits" / Int32ub,
    "namespaces" / Int32ub,
)
LEAF = Structure("space map entry", "offset" / Int64ub, "free" / Int32ub, "checksum" / Int32ub)
RUN = Structure("released run", "first" / Int64ub, "count" / Int64ub)
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
    "image_device" / Int64ub,
    "image_inode" / Int64ub,
    "image_mtime" / Int64ub,
    "image_size" / Int64ub,
)
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


def parse_records(data: bytes) -> Iterator[Record]:
    """Yields the records of a bucket. `dirtmap.fmt.store.record_faults` checks their fields.

    Raises:
        ValueError: a record, or something in it, ends outside the bucket or the record.
    """
    at = 0
    while at < len(data):
        if at + RECORD.size > len(data):
            raise ValueError(f"{len(data) - at} bytes are left, too few for a record")
        raw = RECORD.parse(data, at)
        name = at + RECORD.size
        first = align_up(name + raw.name_size + raw.path_size, 8)
        end = at + raw.length
        if end < first or end > len(data) or raw.length % 8:
            raise ValueError(f"a record of {raw.length} bytes at {at} does not fit its name and path, or the bucket")
        chain = parse_chain(data, first, end)
        if chain.fault or chain.end != end:
            raise ValueError(f"a record at {at} has extensions that do not fit it")
        yield Record(
            name=data[name : name + raw.name_size],
            kind=raw.kind,
            uuid=raw.uuid,
            size=raw.size,
            generation=raw.generation,
            directory=Area(raw.directory_offset, raw.directory_length, raw.directory_checksum),
            nb_bitmaps=raw.nb_bitmaps,
            path=data[name + raw.name_size : name + raw.name_size + raw.path_size],
            identity=Identity(raw.image_device, raw.image_inode, raw.image_mtime, raw.image_size),
            root_uuid=raw.root_uuid,
            extensions=tuple((extension.type, extension.data) for extension in chain.extensions),
        )
        at = end


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
        image_device=record.identity.device,
        image_inode=record.identity.inode,
        image_mtime=record.identity.mtime_ns,
        image_size=record.identity.size,
    )
    return fixed + names + extensions
