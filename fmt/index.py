"""The index: keys of the LMDB database that says which container of a host has which namespaces and bitmaps.

    c path               what a container looked like when it was read        n name             namespaces of that name
    i number             a container's path                                   u uuid             namespaces of that UUID
    m number key         what that part of it contributed                     r uuid name        devices with that root
    s uuid               the last commit seen of a store                      t number s|i name  others a store knows
    v                    version of all this, numbers given out               b holder bitmap    bitmaps of that address
    g number image name  nodes of a store that may be that image
                                                                              f bitmap holder    the same, by bitmap

A *holder* is a node or device, or the path of an image without a name. Its first byte says which. A part of variable
length ends with a NUL, and a long one is replaced by a digest. So no two keys can be mistaken for each other, and all
keys that begin with the same parts have a prefix of their own. Every value ends with a CRC32C of its key and the rest
of the value. Numbers are big-endian. The values' structures are in `dirtmap.fmt.structures.index`. Source of every
rule: docs/behaviour.md, "The index".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from dirtmap.fmt.digest import crc32c, digest
from dirtmap.fmt.identity import FilePlace
from dirtmap.fmt.parsers.index import BITMAP_VALUE, NAMESPACE_VALUE
from dirtmap.fmt.store import AREA_SIZE

VERSION = 3
MAX_SEEN = 1 << 61  # highest generation of a seen commit that is kept: half of what a store can have
# The CRC32C of any bytes followed by their own CRC32C, little-endian.
RESIDUE = 0x48674BC7

CONTAINER, PATH, MEMBERS, SEEN, STATE = b"c", b"i", b"m", b"s", b"v"
NAME, UUID, ROOT, OTHERS, IMAGE, BITMAP, FOUND = b"n", b"u", b"r", b"t", b"g", b"b", b"f"
TAGS = {
    CONTAINER: "container",
    PATH: "path",
    MEMBERS: "members",
    SEEN: "seen commit",
    NAME: "name",
    UUID: "uuid",
    ROOT: "root",
    OTHERS: "other container",
    IMAGE: "image",
    BITMAP: "bitmap",
    FOUND: "bitmap by name",
    STATE: "state",
}
KNOWN_STORE, KNOWN_IMAGE = b"s", b"i"  # in the key of another container: there are few stores, and many images
NO_AREA = bytes(AREA_SIZE)  # area pointer in the members of a container without a namespace table
IMAGE_MARK_SIZE = NAMESPACE_VALUE.field("image").size  # bytes
NAMED, UNNAMED = b"N", b"P"  # first byte of a holder: a node or device; an image without a name
_LONGEST = 200  # bytes of the longest part that is not replaced by a digest; an LMDB key has at most 511
_SURE = _LONGEST // 4  # so many characters, with a holder's first byte, are never more bytes than that
_DIGEST = 32
# The parts of a key behind its first byte: the length of each in bytes, or 0 for a variable length.
_KEY_PARTS = {
    CONTAINER: (0,),
    PATH: (8,),
    MEMBERS: (8, 4),
    SEEN: (16,),
    NAME: (0,),
    UUID: (16,),
    ROOT: (16, 0),
    OTHERS: (8, 1, 0),
    IMAGE: (8, 8, 0),
    BITMAP: (0, 0),
    FOUND: (0, 0),
    STATE: (),
}

# Kinds of containers.
KIND_QCOW2, KIND_STORE, KIND_FAULTY = 1, 2, 3
# Conditions of containers: what was found when they were last read.
SOUND, DAMAGED, HELD = 0, 1, 2
CONDITION_NAMES = {SOUND: "sound", DAMAGED: "damaged", HELD: "held"}


class BadValueError(ValueError):
    """A value is damaged: its checksum or its structure is wrong. The index is rebuilt then."""


def part(data: bytes) -> bytes:
    """Returns a part of variable length as it stands in a key: itself and a NUL, or if it is long a NUL and a digest.

    ``data`` must not contain a NUL.
    """
    if len(data) <= _LONGEST:
        return data + b"\0"
    return b"\0" + digest(data, _DIGEST)


def number(value: int) -> bytes:
    """Returns a container's number as it stands in a key: eight bytes."""
    return value.to_bytes(8, "big")


def bitmap_key(holder: bytes, bitmap: bytes) -> bytes:
    """Returns the key of a bitmap's address. ``holder`` comes from `named` or `unnamed`."""
    return BITMAP + part(holder) + part(bitmap)


def address_key(node: str, name: str) -> bytes:
    """Returns the `bitmap_key` of a node's or device's bitmap. Faster, for the look-up that has to be fast."""
    if len(node) < _SURE and len(name) < _SURE:
        return f"bN{node}\0{name}\0".encode("utf-8", "surrogateescape")
    return bitmap_key(named(node.encode("utf-8", "surrogateescape")), name.encode("utf-8", "surrogateescape"))


def named(name: bytes) -> bytes:
    """Returns the holder for a node or device."""
    return NAMED + name


def unnamed(path: bytes) -> bytes:
    """Returns the holder for an image without a name."""
    return UNNAMED + path


def seal(key: bytes, contents: bytes) -> bytes:
    """Returns a value as stored: the contents, then the CRC32C of key and contents, little-endian."""
    return contents + crc32c(key + contents).to_bytes(4, "little")


def is_sound(key: bytes, value: bytes) -> bool:
    """Returns True if a value's checksum is right. ``value`` includes the checksum."""
    return bool(crc32c(key + value) == RESIDUE)


def damage(key: bytes) -> str:
    """Returns the message for a value with a wrong checksum."""
    return f"{TAGS.get(key[:1], 'unknown')} {key[1:41].hex()}: its checksum is wrong"


def key_text(key: bytes) -> str:
    """Returns a key as people read it: what its value is, and its parts. An unknown key is shown in hexadecimal."""
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
    """A namespace, as its container describes it.

    Attributes:
        name: of the node or device, raw bytes; empty for an image without a name.
        kind: as in a store's record: node, device, place or container.
        uuid: of the namespace, 16 bytes; zeros if it has none.
        root_uuid: of a device's root node, 16 bytes.
        size: of the virtual disk, bytes.
        path: of the image, raw bytes, if the container says it.
        directory: offset, length (bytes) and CRC32C of its directory. While they stay the same, so do its bitmaps.
        image: `image_mark` of which file the image is, if a store says it; else zeros.
    """

    name: bytes
    kind: int
    uuid: bytes
    root_uuid: bytes
    size: int
    path: bytes = b""
    directory: tuple[int, int, int] = (0, 0, 0)
    image: bytes = bytes(IMAGE_MARK_SIZE)


class Claim(NamedTuple):
    """A bitmap, as its container describes it.

    Attributes:
        container: number of the container.
        flags: of the directory entry.
        granularity_bits: log2 of the granularity in bytes.
        reserved: 0.
        uuid: of the bitmap's namespace, 16 bytes.
    """

    container: int
    flags: int
    granularity_bits: int
    reserved: int
    uuid: bytes


def image_mark(place: FilePlace) -> bytes:
    """Returns what stands in a key for which file an image is; others may have the same."""
    return digest(place.filesystem + number(place.inode) + number(place.birth), IMAGE_MARK_SIZE)


def path_mark(path: bytes) -> bytes:
    """Returns what stands in a key for the path of an image; others may have the same."""
    return digest(path, IMAGE_MARK_SIZE)


def image_key(container: int, mark: bytes, name: bytes = b"") -> bytes:
    """Returns the key that says of a node of a store that it may be an image; without its name the prefix of all.

    Args:
        container: number of the store.
        mark: `image_mark` or `path_mark` of the image.
        name: of the node.
    """
    return IMAGE + number(container) + mark + (part(name) if name else b"")


def members_key(container: int, key: int) -> bytes:
    """Returns the key of the namespaces in one leaf of a container's namespace table; 0 where the root is one.

    Args:
        container: number of the container. An image has one leaf, with key 0.
        key: the smallest key in the leaf.
    """
    return MEMBERS + number(container) + key.to_bytes(4, "big")


def _build_namespace(container: int, member: Member) -> bytes:
    """Returns the bytes of a namespace in a value: the fixed fields, then its name and its path."""
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
        image=member.image,
    )
    return fixed + member.name + member.path


def build_namespaces(namespaces: Iterable[tuple[int, Member]]) -> bytes:
    """Returns the bytes of namespaces in a value, each given with the number of its container."""
    return b"".join(_build_namespace(container, member) for container, member in namespaces)


def parse_namespaces(contents: bytes | None) -> Iterator[tuple[int, Member]]:
    """Yields the namespaces in a value, each with the number of its container. No value has no namespaces.

    Raises:
        BadValueError: a namespace is cut short.
    """
    at, contents = 0, contents or b""
    while at < len(contents):
        if at + NAMESPACE_VALUE.size > len(contents):
            raise BadValueError("a namespace is cut short")
        container, kind, _, name_size, path_size, uuid, root, size, *directory, image = NAMESPACE_VALUE.unpack(
            contents, at
        )
        at += NAMESPACE_VALUE.size
        path = at + name_size
        end = path + path_size
        if end > len(contents):
            raise BadValueError("a namespace's name or path is cut short")
        offset, length, checksum = directory
        name = contents[at:path]
        yield container, Member(name, kind, uuid, root, size, contents[path:end], (offset, length, checksum), image)
        at = end


def build_bitmap(name: bytes, claims: Iterable[Claim]) -> bytes:
    """Returns the contents of a bitmap's value: every bitmap at that address, then the name and its length."""
    return b"".join(BITMAP_VALUE.build(**claim._asdict()) for claim in claims) + name + len(name).to_bytes(2, "big")


def parse_bitmap(contents: bytes) -> tuple[bytes, list[Claim]]:
    """Returns the name in a bitmap's value, and every bitmap at that address.

    Raises:
        BadValueError: the name or a bitmap is cut short.
    """
    end = len(contents) - 2 - int.from_bytes(contents[-2:], "big")
    if end < 0:
        raise BadValueError("a bitmap's name is cut short")
    if end % BITMAP_VALUE.size:
        raise BadValueError(f"{BITMAP_VALUE.name}: {end} bytes are not a multiple of {BITMAP_VALUE.size}")
    return contents[end:-2], list(map(Claim._make, BITMAP_VALUE.unpack_all(contents[:end])))


def build_members(pointer: bytes, members: Iterable[tuple[int, Member]]) -> bytes:
    """Returns the contents of a leaf's value: its area pointer, then its namespaces, as `build_namespaces` does."""
    return pointer + build_namespaces(members)


def parse_members(contents: bytes | None) -> tuple[bytes, Iterator[tuple[int, Member]]]:
    """Returns a leaf's area pointer (empty if there is no value), and its namespaces as `parse_namespaces` does."""
    contents = contents or b""
    return contents[:AREA_SIZE], parse_namespaces(contents[AREA_SIZE:])
