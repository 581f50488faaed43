"""The structures of a store; parsing and building of its area pointers and records."""

from __future__ import annotations

from collections.abc import Iterator

from construct import Bytes, Int8ub, Int16ub, Int32ub, Int64ub

from dirtmap.fmt.geometry import align_up
from dirtmap.fmt.store import Area, Identity, Record
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
_NAME_SIZE = RECORD.field("name_size").offset
# In the extra data of a directory entry in a store.
BITS_CHECKSUM = Structure("bits checksum", "checksum" / Int32ub, "reserved" / Int32ub)

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


def parse_areas(data: bytes) -> list[Area]:
    """Returns the area pointers in an array of them."""
    parsed = (AREA.parse(data, at) for at in range(0, len(data), AREA.size))
    return [Area(area.offset, area.length, area.checksum) for area in parsed]


def parse_records(data: bytes) -> Iterator[Record]:
    """Yields the records of a leaf. `dirtmap.fmt.store.record_faults` checks their fields.

    Raises:
        ValueError: a record, or something in it, ends outside the leaf or the record.
    """
    return (parse_record(raw) for _, raw in split_records(data))


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
