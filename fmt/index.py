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
from dataclasses import dataclass
from typing import NamedTuple

import crc32c

from dirtmap.fmt.store import AREA_SIZE

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
NO_AREA = bytes(AREA_SIZE)  # the area pointer in the members of what has no namespace table
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


class Claim(NamedTuple):
    """A bitmap as a container has it: the container's number, directory flags, log2 of the granularity, namespace."""

    container: int
    flags: int
    granularity_bits: int
    reserved: int
    uuid: bytes


def members_key(container: int, bucket: int) -> bytes:
    """Of what a bucket of a container's namespace table contributed; an image has bucket 0."""
    return MEMBERS + number(container) + bucket.to_bytes(4, "big")
