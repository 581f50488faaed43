"""How the structures of `dirtmap.fmt.structures.store` are parsed and built.

Made by `make parsers`: do not edit.
"""

from __future__ import annotations

from struct import Struct

from dirtmap.fmt.structure import Field, Structure

_header = Struct(">4sLQQQQLLBBHL16sQ16sQQQ")


class RawHeader:
    """The fields of a structure: store header."""

    __slots__ = (
        "magic",
        "version",
        "incompatible_features",
        "read_only_compatible_features",
        "compatible_features",
        "autoclear_features",
        "cluster_bits",
        "header_length",
        "slot",
        "copy",
        "followed",
        "sessions",
        "uuid",
        "generation",
        "commit_id",
        "doubt_generation",
        "clusters",
        "commit_time",
    )

    def __init__(
        self,
        magic: bytes,
        version: int,
        incompatible_features: int,
        read_only_compatible_features: int,
        compatible_features: int,
        autoclear_features: int,
        cluster_bits: int,
        header_length: int,
        slot: int,
        copy: int,
        followed: int,
        sessions: int,
        uuid: bytes,
        generation: int,
        commit_id: bytes,
        doubt_generation: int,
        clusters: int,
        commit_time: int,
    ) -> None:
        self.magic = magic
        self.version = version
        self.incompatible_features = incompatible_features
        self.read_only_compatible_features = read_only_compatible_features
        self.compatible_features = compatible_features
        self.autoclear_features = autoclear_features
        self.cluster_bits = cluster_bits
        self.header_length = header_length
        self.slot = slot
        self.copy = copy
        self.followed = followed
        self.sessions = sessions
        self.uuid = uuid
        self.generation = generation
        self.commit_id = commit_id
        self.doubt_generation = doubt_generation
        self.clusters = clusters
        self.commit_time = commit_time


def _build_header(
    *,
    magic: bytes,
    version: int,
    incompatible_features: int,
    read_only_compatible_features: int,
    compatible_features: int,
    autoclear_features: int,
    cluster_bits: int,
    header_length: int,
    slot: int,
    copy: int,
    followed: int,
    sessions: int,
    uuid: bytes,
    generation: int,
    commit_id: bytes,
    doubt_generation: int,
    clusters: int,
    commit_time: int,
) -> bytes:
    if len(magic) != 4:
        raise ValueError(f"store header.magic: {len(magic)} bytes, not 4")
    if len(uuid) != 16:
        raise ValueError(f"store header.uuid: {len(uuid)} bytes, not 16")
    if len(commit_id) != 16:
        raise ValueError(f"store header.commit_id: {len(commit_id)} bytes, not 16")
    return _header.pack(
        magic,
        version,
        incompatible_features,
        read_only_compatible_features,
        compatible_features,
        autoclear_features,
        cluster_bits,
        header_length,
        slot,
        copy,
        followed,
        sessions,
        uuid,
        generation,
        commit_id,
        doubt_generation,
        clusters,
        commit_time,
    )


HEADER = Structure(
    "store header",
    _header,
    RawHeader,
    _build_header,
    Field("magic", 0, 4),
    Field("version", 4, 4),
    Field("incompatible_features", 8, 8),
    Field("read_only_compatible_features", 16, 8),
    Field("compatible_features", 24, 8),
    Field("autoclear_features", 32, 8),
    Field("cluster_bits", 40, 4),
    Field("header_length", 44, 4),
    Field("slot", 48, 1),
    Field("copy", 49, 1),
    Field("followed", 50, 2),
    Field("sessions", 52, 4),
    Field("uuid", 56, 16),
    Field("generation", 72, 8),
    Field("commit_id", 80, 16),
    Field("doubt_generation", 96, 8),
    Field("clusters", 104, 8),
    Field("commit_time", 112, 8),
)

_checksum = Struct(">L")


class RawChecksum:
    """The fields of a structure: store header checksum."""

    __slots__ = ("checksum",)

    def __init__(
        self,
        checksum: int,
    ) -> None:
        self.checksum = checksum


def _build_checksum(
    *,
    checksum: int,
) -> bytes:
    return _checksum.pack(
        checksum,
    )


CHECKSUM = Structure(
    "store header checksum",
    _checksum,
    RawChecksum,
    _build_checksum,
    Field("checksum", 0, 4),
)

_area = Struct(">QLL")


class RawArea:
    """The fields of a structure: area pointer."""

    __slots__ = (
        "offset",
        "length",
        "checksum",
    )

    def __init__(
        self,
        offset: int,
        length: int,
        checksum: int,
    ) -> None:
        self.offset = offset
        self.length = length
        self.checksum = checksum


def _build_area(
    *,
    offset: int,
    length: int,
    checksum: int,
) -> bytes:
    return _area.pack(
        offset,
        length,
        checksum,
    )


AREA = Structure(
    "area pointer",
    _area,
    RawArea,
    _build_area,
    Field("offset", 0, 8),
    Field("length", 8, 4),
    Field("checksum", 12, 4),
)

_namespaces_extension = Struct(">QLLLLQ")


class RawNamespacesExtension:
    """The fields of a structure: namespaces extension."""

    __slots__ = (
        "offset",
        "length",
        "checksum",
        "depth",
        "reserved",
        "namespaces",
    )

    def __init__(
        self,
        offset: int,
        length: int,
        checksum: int,
        depth: int,
        reserved: int,
        namespaces: int,
    ) -> None:
        self.offset = offset
        self.length = length
        self.checksum = checksum
        self.depth = depth
        self.reserved = reserved
        self.namespaces = namespaces


def _build_namespaces_extension(
    *,
    offset: int,
    length: int,
    checksum: int,
    depth: int,
    reserved: int,
    namespaces: int,
) -> bytes:
    return _namespaces_extension.pack(
        offset,
        length,
        checksum,
        depth,
        reserved,
        namespaces,
    )


NAMESPACES_EXTENSION = Structure(
    "namespaces extension",
    _namespaces_extension,
    RawNamespacesExtension,
    _build_namespaces_extension,
    Field("offset", 0, 8),
    Field("length", 8, 4),
    Field("checksum", 12, 4),
    Field("depth", 16, 4),
    Field("reserved", 20, 4),
    Field("namespaces", 24, 8),
)

_node_pointer = Struct(">LLQLL")


class RawNodePointer:
    """The fields of a structure: node pointer."""

    __slots__ = (
        "key",
        "count",
        "offset",
        "length",
        "checksum",
    )

    def __init__(
        self,
        key: int,
        count: int,
        offset: int,
        length: int,
        checksum: int,
    ) -> None:
        self.key = key
        self.count = count
        self.offset = offset
        self.length = length
        self.checksum = checksum


def _build_node_pointer(
    *,
    key: int,
    count: int,
    offset: int,
    length: int,
    checksum: int,
) -> bytes:
    return _node_pointer.pack(
        key,
        count,
        offset,
        length,
        checksum,
    )


NODE_POINTER = Structure(
    "node pointer",
    _node_pointer,
    RawNodePointer,
    _build_node_pointer,
    Field("key", 0, 4),
    Field("count", 4, 4),
    Field("offset", 8, 8),
    Field("length", 16, 4),
    Field("checksum", 20, 4),
)

_place_extension = Struct(">16sQQ")


class RawPlaceExtension:
    """The fields of a structure: place extension."""

    __slots__ = (
        "filesystem",
        "inode",
        "birth",
    )

    def __init__(
        self,
        filesystem: bytes,
        inode: int,
        birth: int,
    ) -> None:
        self.filesystem = filesystem
        self.inode = inode
        self.birth = birth


def _build_place_extension(
    *,
    filesystem: bytes,
    inode: int,
    birth: int,
) -> bytes:
    if len(filesystem) != 16:
        raise ValueError(f"place extension.filesystem: {len(filesystem)} bytes, not 16")
    return _place_extension.pack(
        filesystem,
        inode,
        birth,
    )


PLACE_EXTENSION = Structure(
    "place extension",
    _place_extension,
    RawPlaceExtension,
    _build_place_extension,
    Field("filesystem", 0, 16),
    Field("inode", 16, 8),
    Field("birth", 24, 8),
)

_leaf = Struct(">QLL")


class RawLeaf:
    """The fields of a structure: space map entry."""

    __slots__ = (
        "offset",
        "free",
        "checksum",
    )

    def __init__(
        self,
        offset: int,
        free: int,
        checksum: int,
    ) -> None:
        self.offset = offset
        self.free = free
        self.checksum = checksum


def _build_leaf(
    *,
    offset: int,
    free: int,
    checksum: int,
) -> bytes:
    return _leaf.pack(
        offset,
        free,
        checksum,
    )


LEAF = Structure(
    "space map entry",
    _leaf,
    RawLeaf,
    _build_leaf,
    Field("offset", 0, 8),
    Field("free", 8, 4),
    Field("checksum", 12, 4),
)

_run = Struct(">QQ")


class RawRun:
    """The fields of a structure: released run."""

    __slots__ = (
        "first",
        "count",
    )

    def __init__(
        self,
        first: int,
        count: int,
    ) -> None:
        self.first = first
        self.count = count


def _build_run(
    *,
    first: int,
    count: int,
) -> bytes:
    return _run.pack(
        first,
        count,
    )


RUN = Structure(
    "released run",
    _run,
    RawRun,
    _build_run,
    Field("first", 0, 8),
    Field("count", 8, 8),
)

_file_identity = Struct(">16sQQQQQ")


class RawFileIdentity:
    """The fields of a structure: file identity."""

    __slots__ = (
        "filesystem",
        "inode",
        "birth",
        "size",
        "mtime",
        "ctime",
    )

    def __init__(
        self,
        filesystem: bytes,
        inode: int,
        birth: int,
        size: int,
        mtime: int,
        ctime: int,
    ) -> None:
        self.filesystem = filesystem
        self.inode = inode
        self.birth = birth
        self.size = size
        self.mtime = mtime
        self.ctime = ctime


def _build_file_identity(
    *,
    filesystem: bytes,
    inode: int,
    birth: int,
    size: int,
    mtime: int,
    ctime: int,
) -> bytes:
    if len(filesystem) != 16:
        raise ValueError(f"file identity.filesystem: {len(filesystem)} bytes, not 16")
    return _file_identity.pack(
        filesystem,
        inode,
        birth,
        size,
        mtime,
        ctime,
    )


FILE_IDENTITY = Structure(
    "file identity",
    _file_identity,
    RawFileIdentity,
    _build_file_identity,
    Field("filesystem", 0, 16),
    Field("inode", 16, 8),
    Field("birth", 24, 8),
    Field("size", 32, 8),
    Field("mtime", 40, 8),
    Field("ctime", 48, 8),
)

_record = Struct(">LBBH16s16sQQQLLLL56s")


class RawRecord:
    """The fields of a structure: namespace record."""

    __slots__ = (
        "length",
        "kind",
        "reserved",
        "name_size",
        "uuid",
        "root_uuid",
        "generation",
        "size",
        "directory_offset",
        "directory_length",
        "directory_checksum",
        "nb_bitmaps",
        "path_size",
        "image",
    )

    def __init__(
        self,
        length: int,
        kind: int,
        reserved: int,
        name_size: int,
        uuid: bytes,
        root_uuid: bytes,
        generation: int,
        size: int,
        directory_offset: int,
        directory_length: int,
        directory_checksum: int,
        nb_bitmaps: int,
        path_size: int,
        image: bytes,
    ) -> None:
        self.length = length
        self.kind = kind
        self.reserved = reserved
        self.name_size = name_size
        self.uuid = uuid
        self.root_uuid = root_uuid
        self.generation = generation
        self.size = size
        self.directory_offset = directory_offset
        self.directory_length = directory_length
        self.directory_checksum = directory_checksum
        self.nb_bitmaps = nb_bitmaps
        self.path_size = path_size
        self.image = image


def _build_record(
    *,
    length: int,
    kind: int,
    reserved: int,
    name_size: int,
    uuid: bytes,
    root_uuid: bytes,
    generation: int,
    size: int,
    directory_offset: int,
    directory_length: int,
    directory_checksum: int,
    nb_bitmaps: int,
    path_size: int,
    image: bytes,
) -> bytes:
    if len(uuid) != 16:
        raise ValueError(f"namespace record.uuid: {len(uuid)} bytes, not 16")
    if len(root_uuid) != 16:
        raise ValueError(f"namespace record.root_uuid: {len(root_uuid)} bytes, not 16")
    if len(image) != 56:
        raise ValueError(f"namespace record.image: {len(image)} bytes, not 56")
    return _record.pack(
        length,
        kind,
        reserved,
        name_size,
        uuid,
        root_uuid,
        generation,
        size,
        directory_offset,
        directory_length,
        directory_checksum,
        nb_bitmaps,
        path_size,
        image,
    )


RECORD = Structure(
    "namespace record",
    _record,
    RawRecord,
    _build_record,
    Field("length", 0, 4),
    Field("kind", 4, 1),
    Field("reserved", 5, 1),
    Field("name_size", 6, 2),
    Field("uuid", 8, 16),
    Field("root_uuid", 24, 16),
    Field("generation", 40, 8),
    Field("size", 48, 8),
    Field("directory_offset", 56, 8),
    Field("directory_length", 64, 4),
    Field("directory_checksum", 68, 4),
    Field("nb_bitmaps", 72, 4),
    Field("path_size", 76, 4),
    Field("image", 80, 56),
)

_owner = Struct(">16s")


class RawOwner:
    """The fields of a structure: directory owner."""

    __slots__ = ("owner",)

    def __init__(
        self,
        owner: bytes,
    ) -> None:
        self.owner = owner


def _build_owner(
    *,
    owner: bytes,
) -> bytes:
    if len(owner) != 16:
        raise ValueError(f"directory owner.owner: {len(owner)} bytes, not 16")
    return _owner.pack(
        owner,
    )


OWNER = Structure(
    "directory owner",
    _owner,
    RawOwner,
    _build_owner,
    Field("owner", 0, 16),
)

_pointer = Struct(">QLL")


class RawPointer:
    """The fields of a structure: bits pointer."""

    __slots__ = (
        "place",
        "checksum",
        "reserved",
    )

    def __init__(
        self,
        place: int,
        checksum: int,
        reserved: int,
    ) -> None:
        self.place = place
        self.checksum = checksum
        self.reserved = reserved


def _build_pointer(
    *,
    place: int,
    checksum: int,
    reserved: int,
) -> bytes:
    return _pointer.pack(
        place,
        checksum,
        reserved,
    )


POINTER = Structure(
    "bits pointer",
    _pointer,
    RawPointer,
    _build_pointer,
    Field("place", 0, 8),
    Field("checksum", 8, 4),
    Field("reserved", 12, 4),
)

_bits = Struct(">LL")


class RawBits:
    """The fields of a structure: bits."""

    __slots__ = (
        "checksum",
        "reserved",
    )

    def __init__(
        self,
        checksum: int,
        reserved: int,
    ) -> None:
        self.checksum = checksum
        self.reserved = reserved


def _build_bits(
    *,
    checksum: int,
    reserved: int,
) -> bytes:
    return _bits.pack(
        checksum,
        reserved,
    )


BITS = Structure(
    "bits",
    _bits,
    RawBits,
    _build_bits,
    Field("checksum", 0, 4),
    Field("reserved", 4, 4),
)

_identity = Struct(">16sQ")


class RawIdentity:
    """The fields of a structure: bitmap identity."""

    __slots__ = (
        "uuid",
        "generation",
    )

    def __init__(
        self,
        uuid: bytes,
        generation: int,
    ) -> None:
        self.uuid = uuid
        self.generation = generation


def _build_identity(
    *,
    uuid: bytes,
    generation: int,
) -> bytes:
    if len(uuid) != 16:
        raise ValueError(f"bitmap identity.uuid: {len(uuid)} bytes, not 16")
    return _identity.pack(
        uuid,
        generation,
    )


IDENTITY = Structure(
    "bitmap identity",
    _identity,
    RawIdentity,
    _build_identity,
    Field("uuid", 0, 16),
    Field("generation", 16, 8),
)

_hold = Struct(">LHHQ16s16s")


class RawHold:
    """The fields of a structure: hold."""

    __slots__ = (
        "process",
        "name_size",
        "owner_size",
        "start",
        "boot_id",
        "token",
    )

    def __init__(
        self,
        process: int,
        name_size: int,
        owner_size: int,
        start: int,
        boot_id: bytes,
        token: bytes,
    ) -> None:
        self.process = process
        self.name_size = name_size
        self.owner_size = owner_size
        self.start = start
        self.boot_id = boot_id
        self.token = token


def _build_hold(
    *,
    process: int,
    name_size: int,
    owner_size: int,
    start: int,
    boot_id: bytes,
    token: bytes,
) -> bytes:
    if len(boot_id) != 16:
        raise ValueError(f"hold.boot_id: {len(boot_id)} bytes, not 16")
    if len(token) != 16:
        raise ValueError(f"hold.token: {len(token)} bytes, not 16")
    return _hold.pack(
        process,
        name_size,
        owner_size,
        start,
        boot_id,
        token,
    )


HOLD = Structure(
    "hold",
    _hold,
    RawHold,
    _build_hold,
    Field("process", 0, 4),
    Field("name_size", 4, 2),
    Field("owner_size", 6, 2),
    Field("start", 8, 8),
    Field("boot_id", 16, 16),
    Field("token", 32, 16),
)
