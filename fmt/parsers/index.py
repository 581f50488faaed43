"""How the structures of `dirtmap.fmt.structures.index` are parsed and built.

Made by `make parsers`: do not edit.
"""

from __future__ import annotations

from struct import Struct

from dirtmap.fmt.structure import Field, Structure

_state_value = Struct(">LLQ")


class RawStateValue:
    """The fields of a structure: index state."""

    __slots__ = (
        "version",
        "reserved",
        "containers",
    )

    def __init__(
        self,
        version: int,
        reserved: int,
        containers: int,
    ) -> None:
        self.version = version
        self.reserved = reserved
        self.containers = containers


def _build_state_value(
    *,
    version: int,
    reserved: int,
    containers: int,
) -> bytes:
    return _state_value.pack(
        version,
        reserved,
        containers,
    )


STATE_VALUE = Structure(
    "index state",
    _state_value,
    RawStateValue,
    _build_state_value,
    Field("version", 0, 4),
    Field("reserved", 4, 4),
    Field("containers", 8, 8),
)

_container_value = Struct(">QBBB5sQQQQQQ16s16s")


class RawContainerValue:
    """The fields of a structure: index container."""

    __slots__ = (
        "number",
        "kind",
        "condition",
        "racy",
        "reserved",
        "device",
        "inode",
        "mtime",
        "ctime",
        "size",
        "generation",
        "commit_id",
        "uuid",
    )

    def __init__(
        self,
        number: int,
        kind: int,
        condition: int,
        racy: int,
        reserved: bytes,
        device: int,
        inode: int,
        mtime: int,
        ctime: int,
        size: int,
        generation: int,
        commit_id: bytes,
        uuid: bytes,
    ) -> None:
        self.number = number
        self.kind = kind
        self.condition = condition
        self.racy = racy
        self.reserved = reserved
        self.device = device
        self.inode = inode
        self.mtime = mtime
        self.ctime = ctime
        self.size = size
        self.generation = generation
        self.commit_id = commit_id
        self.uuid = uuid


def _build_container_value(
    *,
    number: int,
    kind: int,
    condition: int,
    racy: int,
    reserved: bytes,
    device: int,
    inode: int,
    mtime: int,
    ctime: int,
    size: int,
    generation: int,
    commit_id: bytes,
    uuid: bytes,
) -> bytes:
    if len(reserved) != 5:
        raise ValueError(f"index container.reserved: {len(reserved)} bytes, not 5")
    if len(commit_id) != 16:
        raise ValueError(f"index container.commit_id: {len(commit_id)} bytes, not 16")
    if len(uuid) != 16:
        raise ValueError(f"index container.uuid: {len(uuid)} bytes, not 16")
    return _container_value.pack(
        number,
        kind,
        condition,
        racy,
        reserved,
        device,
        inode,
        mtime,
        ctime,
        size,
        generation,
        commit_id,
        uuid,
    )


CONTAINER_VALUE = Structure(
    "index container",
    _container_value,
    RawContainerValue,
    _build_container_value,
    Field("number", 0, 8),
    Field("kind", 8, 1),
    Field("condition", 9, 1),
    Field("racy", 10, 1),
    Field("reserved", 11, 5),
    Field("device", 16, 8),
    Field("inode", 24, 8),
    Field("mtime", 32, 8),
    Field("ctime", 40, 8),
    Field("size", 48, 8),
    Field("generation", 56, 8),
    Field("commit_id", 64, 16),
    Field("uuid", 80, 16),
)

_seen_value = Struct(">Q16sQ")


class RawSeenValue:
    """The fields of a structure: index seen commit."""

    __slots__ = (
        "generation",
        "commit_id",
        "container",
    )

    def __init__(
        self,
        generation: int,
        commit_id: bytes,
        container: int,
    ) -> None:
        self.generation = generation
        self.commit_id = commit_id
        self.container = container


def _build_seen_value(
    *,
    generation: int,
    commit_id: bytes,
    container: int,
) -> bytes:
    if len(commit_id) != 16:
        raise ValueError(f"index seen commit.commit_id: {len(commit_id)} bytes, not 16")
    return _seen_value.pack(
        generation,
        commit_id,
        container,
    )


SEEN_VALUE = Structure(
    "index seen commit",
    _seen_value,
    RawSeenValue,
    _build_seen_value,
    Field("generation", 0, 8),
    Field("commit_id", 8, 16),
    Field("container", 24, 8),
)

_namespace_value = Struct(">QB3sHH16s16sQQLL8s")


class RawNamespaceValue:
    """The fields of a structure: index namespace."""

    __slots__ = (
        "container",
        "kind",
        "reserved",
        "name_size",
        "path_size",
        "uuid",
        "root_uuid",
        "size",
        "directory_offset",
        "directory_length",
        "directory_checksum",
        "image",
    )

    def __init__(
        self,
        container: int,
        kind: int,
        reserved: bytes,
        name_size: int,
        path_size: int,
        uuid: bytes,
        root_uuid: bytes,
        size: int,
        directory_offset: int,
        directory_length: int,
        directory_checksum: int,
        image: bytes,
    ) -> None:
        self.container = container
        self.kind = kind
        self.reserved = reserved
        self.name_size = name_size
        self.path_size = path_size
        self.uuid = uuid
        self.root_uuid = root_uuid
        self.size = size
        self.directory_offset = directory_offset
        self.directory_length = directory_length
        self.directory_checksum = directory_checksum
        self.image = image


def _build_namespace_value(
    *,
    container: int,
    kind: int,
    reserved: bytes,
    name_size: int,
    path_size: int,
    uuid: bytes,
    root_uuid: bytes,
    size: int,
    directory_offset: int,
    directory_length: int,
    directory_checksum: int,
    image: bytes,
) -> bytes:
    if len(reserved) != 3:
        raise ValueError(f"index namespace.reserved: {len(reserved)} bytes, not 3")
    if len(uuid) != 16:
        raise ValueError(f"index namespace.uuid: {len(uuid)} bytes, not 16")
    if len(root_uuid) != 16:
        raise ValueError(f"index namespace.root_uuid: {len(root_uuid)} bytes, not 16")
    if len(image) != 8:
        raise ValueError(f"index namespace.image: {len(image)} bytes, not 8")
    return _namespace_value.pack(
        container,
        kind,
        reserved,
        name_size,
        path_size,
        uuid,
        root_uuid,
        size,
        directory_offset,
        directory_length,
        directory_checksum,
        image,
    )


NAMESPACE_VALUE = Structure(
    "index namespace",
    _namespace_value,
    RawNamespaceValue,
    _build_namespace_value,
    Field("container", 0, 8),
    Field("kind", 8, 1),
    Field("reserved", 9, 3),
    Field("name_size", 12, 2),
    Field("path_size", 14, 2),
    Field("uuid", 16, 16),
    Field("root_uuid", 32, 16),
    Field("size", 48, 8),
    Field("directory_offset", 56, 8),
    Field("directory_length", 64, 4),
    Field("directory_checksum", 68, 4),
    Field("image", 72, 8),
)

_bitmap_value = Struct(">QLHH16s")


class RawBitmapValue:
    """The fields of a structure: index bitmap."""

    __slots__ = (
        "container",
        "flags",
        "granularity_bits",
        "reserved",
        "uuid",
    )

    def __init__(
        self,
        container: int,
        flags: int,
        granularity_bits: int,
        reserved: int,
        uuid: bytes,
    ) -> None:
        self.container = container
        self.flags = flags
        self.granularity_bits = granularity_bits
        self.reserved = reserved
        self.uuid = uuid


def _build_bitmap_value(
    *,
    container: int,
    flags: int,
    granularity_bits: int,
    reserved: int,
    uuid: bytes,
) -> bytes:
    if len(uuid) != 16:
        raise ValueError(f"index bitmap.uuid: {len(uuid)} bytes, not 16")
    return _bitmap_value.pack(
        container,
        flags,
        granularity_bits,
        reserved,
        uuid,
    )


BITMAP_VALUE = Structure(
    "index bitmap",
    _bitmap_value,
    RawBitmapValue,
    _build_bitmap_value,
    Field("container", 0, 8),
    Field("flags", 8, 4),
    Field("granularity_bits", 12, 2),
    Field("reserved", 14, 2),
    Field("uuid", 16, 16),
)
