"""The structures of the index's values; parsing and building of values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from construct import Bytes, Int8ub, Int16ub, Int32ub, Int64ub

from dirtmap.fmt.index import IMAGE_MARK_SIZE, BadValueError, Claim, Member
from dirtmap.fmt.store import AREA_SIZE
from dirtmap.fmt.structure import Structure

STATE_VALUE = Structure("index state", "version" / Int32ub, "reserved" / Int32ub, "containers" / Int64ub)
CONTAINER_VALUE = Structure(
    "index container",
    "number" / Int64ub,
    "kind" / Int8ub,
    "condition" / Int8ub,
    "racy" / Int8ub,
    "reserved" / Bytes(5),
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
    "image" / Bytes(IMAGE_MARK_SIZE),
)
BITMAP_VALUE = Structure(
    "index bitmap",
    "container" / Int64ub,
    "flags" / Int32ub,
    "granularity_bits" / Int16ub,
    "reserved" / Int16ub,
    "uuid" / Bytes(16),
)


def parse_all(structure: Structure, contents: bytes) -> list[Any]:
    """Returns the records of that structure in an array of them.

    Raises:
        BadValueError: the last record is cut short.
    """
    if len(contents) % structure.size:
        raise BadValueError(f"{structure.name}: {len(contents)} bytes are not a multiple of {structure.size}")
    return [structure.parse(contents, at) for at in range(0, len(contents), structure.size)]


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
                image=raw.image,
            ),
        )
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
    return contents[end:-2], [Claim._make(raw) for raw in parse_all(BITMAP_VALUE, contents[:end])]


def build_members(pointer: bytes, members: Iterable[tuple[int, Member]]) -> bytes:
    """Returns the contents of a leaf's value: its area pointer, then its namespaces, as `build_namespaces` does."""
    return pointer + build_namespaces(members)


def parse_members(contents: bytes | None) -> tuple[bytes, Iterator[tuple[int, Member]]]:
    """Returns a leaf's area pointer (empty if there is no value), and its namespaces as `parse_namespaces` does."""
    contents = contents or b""
    return contents[:AREA_SIZE], parse_namespaces(contents[AREA_SIZE:])
