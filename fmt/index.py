"""The index: keys and values of the LMDB database that tells, across a host, which container has what.

    c path               what a container looked like when it was read        n name             namespaces of that name
    i number             a container's path                                   u uuid             namespaces of that UUID
    m number bucket      what that part of it contributed                     r uuid name        devices with that root
    s uuid               the last commit seen of a store                      t number name      stores a store knows
    v                    version of all this, numbers given out               b holder bitmap    bitmaps of that address
                                                                              f bitmap holder    the same, by bitmap

A *holder* is a named namespace, or the path of an image without a name; its first byte keeps the two apart. Variable
parts end with a NUL, or are replaced by a digest where they are long, so that no two keys can be taken for each other
and "all keys that begin with these parts" is a prefix. Every value ends with a CRC32C over its key and the rest.
All numbers are big-endian. Source of every rule: SPEC.md, "The index".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import crc32c
from construct import Bytes, Int8ub, Int16ub, Int32ub, Int64ub

from dirtmap.fmt.store import AREA
from dirtmap.fmt.structure import Structure

VERSION = 1
MAX_SEEN = 1 << 61  # generation of a store's commit that is remembered: half of what there can be
# The CRC32C of anything followed by its own CRC32C, little-endian.
RESIDUE = 0x48674BC7

CONTAINER, PATH, MEMBERS, SEEN, STATE = b"c", b"i", b"m", b"s", b"v"
NAME, UUID, ROOT, OTHERS, BITMAP, FOUND = b"n", b"u", b"r", b"t", b"b", b"f"
TAGS = {
    CONTAINER: "container",
    PATH: "path",
    MEMBERS: "members",
    SEEN: "seen commit",
    NAME: "name",
    UUID: "uuid",
    ROOT: "root",
    OTHERS: "other store",
    BITMAP: "bitmap",
    FOUND: "bitmap by name",
    STATE: "state",
}
NO_AREA = bytes(AREA.size)  # the area pointer in the members of what has no namespace table
NAMED, UNNAMED = b"N", b"P"  # first byte of a holder: a node or device, or an image that has no name
_LONGEST = 200  # bytes of a part that stand in a key as they are; LMDB keys have 511 at most
_SURE = _LONGEST // 4  # characters that are no more bytes than that, with a holder's first one
_DIGEST = 32
# What a key has behind its first byte: parts of so many bytes; 0 is a variable one.
_KEY_PARTS = {
    CONTAINER: (0,),
    PATH: (8,),
    MEMBERS: (8, 4),
    SEEN: (16,),
    NAME: (0,),
    UUID: (16,),
    ROOT: (16, 0),
    OTHERS: (8, 0),
    BITMAP: (0, 0),
    FOUND: (0, 0),
    STATE: (),
}

STATE_VALUE = Structure("index state", "version" / Int32ub, "reserved" / Int32ub, "containers" / Int64ub)
CONTAINER_VALUE = Structure(
    "index container",
    "number" / Int64ub,
    "kind" / Int8ub,
    "condition" / Int8ub,
    "racy" / Int8ub,
    "reserved" / Int8ub,
    "buckets" / Int32ub,
    "device" / Int64ub,
    "inode" / Int64ub,
    "mtime" / Int64ub,
    "ctime" / Int64ub,
    "size" / Int64ub,
    "generation" / Int64ub,
    "commit_id" / Bytes(16),
    "uuid" / Bytes(16),
)
SEEN_VALUE = Structure("index seen commit", "generation" / Int64ub, "commit_id" / Bytes(16), "container" / Int64ub)
NAMESPACE_VALUE = Structure(
    "index namespace",
    "container" / Int64ub,
    "kind" / Int8ub,
    "reserved" / Bytes(3),
    "name_size" / Int16ub,
    "path_size" / Int16ub,
    "uuid" / Bytes(16),
    "root_uuid" / Bytes(16),
    "size" / Int64ub,
    "directory_offset" / Int64ub,
    "directory_length" / Int32ub,
    "directory_checksum" / Int32ub,
)
BITMAP_VALUE = Structure(
    "index bitmap",
    "container" / Int64ub,
    "flags" / Int32ub,
    "granularity_bits" / Int16ub,
    "reserved" / Int16ub,
    "uuid" / Bytes(16),
)

# Kinds of containers.
KIND_QCOW2, KIND_STORE, KIND_FAULTY = 1, 2, 3
# Conditions: what the last reading found.
SOUND, DAMAGED, HELD = 0, 1, 2
CONDITION_NAMES = {SOUND: "sound", DAMAGED: "damaged", HELD: "held"}


class BadValueError(ValueError):
    """A value that its checksum or its form gives away; the index is rebuilt."""


def part(data: bytes) -> bytes:
    """A variable part of a key, itself without NUL: it and a NUL; or, where it is long, a NUL and a digest of it."""
    if len(data) <= _LONGEST:
        return data + b"\0"
    return b"\0" + hashlib.blake2b(data, digest_size=_DIGEST).digest()


def number(value: int) -> bytes:
    """A container's number in a key: eight bytes."""
    return value.to_bytes(8, "big")


def bitmap_key(holder: bytes, bitmap: bytes) -> bytes:
    """Of a bitmap's address; ``holder`` as `named` or `unnamed` make it."""
    return BITMAP + part(holder) + part(bitmap)


def address_key(node: str, name: str) -> bytes:
    """`bitmap_key` of a node's or device's bitmap: the same, for the path that has to be fast."""
    if len(node) < _SURE and len(name) < _SURE:
        return f"bN{node}\0{name}\0".encode("utf-8", "surrogateescape")
    return bitmap_key(named(node.encode("utf-8", "surrogateescape")), name.encode("utf-8", "surrogateescape"))


def named(name: bytes) -> bytes:
    """The holder that is a node or device."""
    return NAMED + name


def unnamed(path: bytes) -> bytes:
    """The holder that is an image without a name."""
    return UNNAMED + path


def seal(key: bytes, contents: bytes) -> bytes:
    """A value as stored: the contents, then the CRC32C of key and contents, little-endian."""
    return contents + crc32c.crc32c(key + contents).to_bytes(4, "little")


def is_sound(key: bytes, value: bytes) -> bool:
    """True where a value's checksum is right."""
    return bool(crc32c.crc32c(key + value) == RESIDUE)


def damage(key: bytes) -> str:
    """What is said of a value with a wrong checksum."""
    return f"{TAGS.get(key[:1], 'unknown')} {key[1:41].hex()}: its checksum is wrong"


def key_text(key: bytes) -> str:
    """A key for people: what its value is, and its parts; a key of another form in hexadecimal."""
    parts, at = [], 1
    for size in _KEY_PARTS.get(key[:1], ()):
        end = at + size if size else key.find(b"\0", at)
        if size:
            parts.append(key[at:end].hex() if size == 16 else str(int.from_bytes(key[at:end], "big")))
        elif end > at:
            parts.append(key[at:end].decode("utf-8", "backslashreplace"))
            end += 1
        else:
            end = at + 1 + _DIGEST
            parts.append(f"digest {key[at + 1 : end].hex()}")
        at = end
    what = TAGS.get(key[:1], "unknown")
    if at != len(key):
        return f"{what} {key[1:41].hex()}"
    return f"{what}: {', '.join(parts)}" if parts else what


def parse_all(structure: Structure, contents: bytes) -> list[Any]:
    """The records of that structure, one behind the other.

    Raises:
        BadValueError: a part of a record is left.
    """
    if len(contents) % structure.size:
        raise BadValueError(f"{structure.name}: {len(contents)} bytes are not a multiple of {structure.size}")
    return [structure.parse(contents, at) for at in range(0, len(contents), structure.size)]


@dataclass(frozen=True, slots=True)
class Member:
    """A namespace as a container has it.

    Attributes:
        name: raw bytes; empty for an image without a name.
        kind: as in a store's record: node, device, place or container.
        uuid: 16 bytes; zeros where it has none.
        root_uuid: of a device.
        size: of the disk, bytes.
        path: of the image, raw bytes, where the container tells.
        directory: offset, length and CRC32C of its directory; if they are the same, so are its bitmaps.
    """

    name: bytes
    kind: int
    uuid: bytes
    root_uuid: bytes
    size: int
    path: bytes = b""
    directory: tuple[int, int, int] = (0, 0, 0)


def _build_namespace(container: int, member: Member) -> bytes:
    """A namespace as it stands in a value: fixed fields, then its name and its path."""
    offset, length, checksum = member.directory
    fixed = NAMESPACE_VALUE.build(
        container=container,
        kind=member.kind,
        reserved=bytes(3),
        name_size=len(member.name),
        path_size=len(member.path),
        uuid=member.uuid,
        root_uuid=member.root_uuid,
        size=member.size,
        directory_offset=offset,
        directory_length=length,
        directory_checksum=checksum,
    )
    return fixed + member.name + member.path


def build_namespaces(namespaces: Iterable[tuple[int, Member]]) -> bytes:
    """Namespaces as they stand in a value, each with the number of its container."""
    return b"".join(_build_namespace(container, member) for container, member in namespaces)


def parse_namespaces(contents: bytes | None) -> Iterator[tuple[int, Member]]:
    """The namespaces in a value, each with the number of its container; none where there is no value.

    Raises:
        BadValueError: one ends behind the value.
    """
    at, contents = 0, contents or b""
    while at < len(contents):
        if at + NAMESPACE_VALUE.size > len(contents):
            raise BadValueError("a namespace is cut short")
        raw = NAMESPACE_VALUE.parse(contents, at)
        at += NAMESPACE_VALUE.size
        path = at + raw.name_size
        end = path + raw.path_size
        if end > len(contents):
            raise BadValueError("a namespace's name or path is cut short")
        yield (
            raw.container,
            Member(
                name=contents[at:path],
                kind=raw.kind,
                uuid=raw.uuid,
                root_uuid=raw.root_uuid,
                size=raw.size,
                path=contents[path:end],
                directory=(raw.directory_offset, raw.directory_length, raw.directory_checksum),
            ),
        )
        at = end


class Claim(NamedTuple):
    """A bitmap as a container has it: the container's number, directory flags, log2 of the granularity, namespace."""

    container: int
    flags: int
    granularity_bits: int
    reserved: int
    uuid: bytes


def build_bitmap(name: bytes, claims: Iterable[Claim]) -> bytes:
    """The contents of a bitmap's value: all who have one at the address, then its name, and the name's length."""
    return b"".join(BITMAP_VALUE.build(**claim._asdict()) for claim in claims) + name + len(name).to_bytes(2, "big")


def parse_bitmap(contents: bytes) -> tuple[bytes, list[Claim]]:
    """A bitmap's name and who has one at that address. Errors as `parse_all`."""
    end = len(contents) - 2 - int.from_bytes(contents[-2:], "big")
    if end < 0:
        raise BadValueError("a bitmap's name is cut short")
    return contents[end:-2], [Claim._make(raw) for raw in parse_all(BITMAP_VALUE, contents[:end])]


def members_key(container: int, bucket: int) -> bytes:
    """Of what a bucket of a container's namespace table contributed; an image has bucket 0."""
    return MEMBERS + number(container) + bucket.to_bytes(4, "big")


def build_members(pointer: bytes, members: Iterable[tuple[int, Member]]) -> bytes:
    """The contents of its value: the bucket's area pointer, then its namespaces, as `build_namespaces`."""
    return pointer + build_namespaces(members)


def parse_members(contents: bytes | None) -> tuple[bytes, Iterator[tuple[int, Member]]]:
    """The area pointer of a bucket, empty where there is no value, and its namespaces, as `parse_namespaces`."""
    contents = contents or b""
    return contents[: AREA.size], parse_namespaces(contents[AREA.size :])
