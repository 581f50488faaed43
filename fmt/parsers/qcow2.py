"""How the structures of `dirtmap.fmt.structures.qcow2` are parsed and built.

Made by `make parsers`: do not edit.
"""

from __future__ import annotations

from struct import Struct

from dirtmap.fmt.structure import Field, Structure

_header_v2 = Struct(">4sLQLLQLLQQLLQ")


class RawHeaderV2:
    """The fields of a structure: header."""

    __slots__ = (
        "magic",
        "version",
        "backing_file_offset",
        "backing_file_size",
        "cluster_bits",
        "size",
        "crypt_method",
        "l1_size",
        "l1_table_offset",
        "refcount_table_offset",
        "refcount_table_clusters",
        "nb_snapshots",
        "snapshots_offset",
    )

    def __init__(
        self,
        magic: bytes,
        version: int,
        backing_file_offset: int,
        backing_file_size: int,
        cluster_bits: int,
        size: int,
        crypt_method: int,
        l1_size: int,
        l1_table_offset: int,
        refcount_table_offset: int,
        refcount_table_clusters: int,
        nb_snapshots: int,
        snapshots_offset: int,
    ) -> None:
        self.magic = magic
        self.version = version
        self.backing_file_offset = backing_file_offset
        self.backing_file_size = backing_file_size
        self.cluster_bits = cluster_bits
        self.size = size
        self.crypt_method = crypt_method
        self.l1_size = l1_size
        self.l1_table_offset = l1_table_offset
        self.refcount_table_offset = refcount_table_offset
        self.refcount_table_clusters = refcount_table_clusters
        self.nb_snapshots = nb_snapshots
        self.snapshots_offset = snapshots_offset


def _build_header_v2(
    *,
    magic: bytes,
    version: int,
    backing_file_offset: int,
    backing_file_size: int,
    cluster_bits: int,
    size: int,
    crypt_method: int,
    l1_size: int,
    l1_table_offset: int,
    refcount_table_offset: int,
    refcount_table_clusters: int,
    nb_snapshots: int,
    snapshots_offset: int,
) -> bytes:
    if len(magic) != 4:
        raise ValueError(f"header.magic: {len(magic)} bytes, not 4")
    return _header_v2.pack(
        magic,
        version,
        backing_file_offset,
        backing_file_size,
        cluster_bits,
        size,
        crypt_method,
        l1_size,
        l1_table_offset,
        refcount_table_offset,
        refcount_table_clusters,
        nb_snapshots,
        snapshots_offset,
    )


HEADER_V2 = Structure(
    "header",
    _header_v2,
    RawHeaderV2,
    _build_header_v2,
    Field("magic", 0, 4),
    Field("version", 4, 4),
    Field("backing_file_offset", 8, 8),
    Field("backing_file_size", 16, 4),
    Field("cluster_bits", 20, 4),
    Field("size", 24, 8),
    Field("crypt_method", 32, 4),
    Field("l1_size", 36, 4),
    Field("l1_table_offset", 40, 8),
    Field("refcount_table_offset", 48, 8),
    Field("refcount_table_clusters", 56, 4),
    Field("nb_snapshots", 60, 4),
    Field("snapshots_offset", 64, 8),
)

_header_v3 = Struct(">QQQLL")


class RawHeaderV3:
    """The fields of a structure: header, version 3."""

    __slots__ = (
        "incompatible_features",
        "compatible_features",
        "autoclear_features",
        "refcount_order",
        "header_length",
    )

    def __init__(
        self,
        incompatible_features: int,
        compatible_features: int,
        autoclear_features: int,
        refcount_order: int,
        header_length: int,
    ) -> None:
        self.incompatible_features = incompatible_features
        self.compatible_features = compatible_features
        self.autoclear_features = autoclear_features
        self.refcount_order = refcount_order
        self.header_length = header_length


def _build_header_v3(
    *,
    incompatible_features: int,
    compatible_features: int,
    autoclear_features: int,
    refcount_order: int,
    header_length: int,
) -> bytes:
    return _header_v3.pack(
        incompatible_features,
        compatible_features,
        autoclear_features,
        refcount_order,
        header_length,
    )


HEADER_V3 = Structure(
    "header, version 3",
    _header_v3,
    RawHeaderV3,
    _build_header_v3,
    Field("incompatible_features", 0, 8),
    Field("compatible_features", 8, 8),
    Field("autoclear_features", 16, 8),
    Field("refcount_order", 24, 4),
    Field("header_length", 28, 4),
)

_header_more = Struct(">B7s")


class RawHeaderMore:
    """The fields of a structure: header, additional fields."""

    __slots__ = (
        "compression_type",
        "padding",
    )

    def __init__(
        self,
        compression_type: int,
        padding: bytes,
    ) -> None:
        self.compression_type = compression_type
        self.padding = padding


def _build_header_more(
    *,
    compression_type: int,
    padding: bytes,
) -> bytes:
    if len(padding) != 7:
        raise ValueError(f"header, additional fields.padding: {len(padding)} bytes, not 7")
    return _header_more.pack(
        compression_type,
        padding,
    )


HEADER_MORE = Structure(
    "header, additional fields",
    _header_more,
    RawHeaderMore,
    _build_header_more,
    Field("compression_type", 0, 1),
    Field("padding", 1, 7),
)

_refcount_table_pointer = Struct(">QL")


class RawRefcountTablePointer:
    """The fields of a structure: refcount table pointer."""

    __slots__ = (
        "offset",
        "clusters",
    )

    def __init__(
        self,
        offset: int,
        clusters: int,
    ) -> None:
        self.offset = offset
        self.clusters = clusters


def _build_refcount_table_pointer(
    *,
    offset: int,
    clusters: int,
) -> bytes:
    return _refcount_table_pointer.pack(
        offset,
        clusters,
    )


REFCOUNT_TABLE_POINTER = Structure(
    "refcount table pointer",
    _refcount_table_pointer,
    RawRefcountTablePointer,
    _build_refcount_table_pointer,
    Field("offset", 0, 8),
    Field("clusters", 8, 4),
)

_pointer = Struct(">Q")


class RawPointer:
    """The fields of a structure: pointer."""

    __slots__ = ("offset",)

    def __init__(
        self,
        offset: int,
    ) -> None:
        self.offset = offset


def _build_pointer(
    *,
    offset: int,
) -> bytes:
    return _pointer.pack(
        offset,
    )


POINTER = Structure(
    "pointer",
    _pointer,
    RawPointer,
    _build_pointer,
    Field("offset", 0, 8),
)

_bitmaps_extension = Struct(">LLQQ")


class RawBitmapsExtension:
    """The fields of a structure: bitmaps extension."""

    __slots__ = (
        "nb_bitmaps",
        "reserved",
        "directory_size",
        "directory_offset",
    )

    def __init__(
        self,
        nb_bitmaps: int,
        reserved: int,
        directory_size: int,
        directory_offset: int,
    ) -> None:
        self.nb_bitmaps = nb_bitmaps
        self.reserved = reserved
        self.directory_size = directory_size
        self.directory_offset = directory_offset


def _build_bitmaps_extension(
    *,
    nb_bitmaps: int,
    reserved: int,
    directory_size: int,
    directory_offset: int,
) -> bytes:
    return _bitmaps_extension.pack(
        nb_bitmaps,
        reserved,
        directory_size,
        directory_offset,
    )


BITMAPS_EXTENSION = Structure(
    "bitmaps extension",
    _bitmaps_extension,
    RawBitmapsExtension,
    _build_bitmaps_extension,
    Field("nb_bitmaps", 0, 4),
    Field("reserved", 4, 4),
    Field("directory_size", 8, 8),
    Field("directory_offset", 16, 8),
)

_namespace_extension = Struct(">16s")


class RawNamespaceExtension:
    """The fields of a structure: namespace extension."""

    __slots__ = ("uuid",)

    def __init__(
        self,
        uuid: bytes,
    ) -> None:
        self.uuid = uuid


def _build_namespace_extension(
    *,
    uuid: bytes,
) -> bytes:
    if len(uuid) != 16:
        raise ValueError(f"namespace extension.uuid: {len(uuid)} bytes, not 16")
    return _namespace_extension.pack(
        uuid,
    )


NAMESPACE_EXTENSION = Structure(
    "namespace extension",
    _namespace_extension,
    RawNamespaceExtension,
    _build_namespace_extension,
    Field("uuid", 0, 16),
)

_crypto_extension = Struct(">QQ")


class RawCryptoExtension:
    """The fields of a structure: crypto extension."""

    __slots__ = (
        "offset",
        "length",
    )

    def __init__(
        self,
        offset: int,
        length: int,
    ) -> None:
        self.offset = offset
        self.length = length


def _build_crypto_extension(
    *,
    offset: int,
    length: int,
) -> bytes:
    return _crypto_extension.pack(
        offset,
        length,
    )


CRYPTO_EXTENSION = Structure(
    "crypto extension",
    _crypto_extension,
    RawCryptoExtension,
    _build_crypto_extension,
    Field("offset", 0, 8),
    Field("length", 8, 8),
)

_feature_name = Struct(">BB46s")


class RawFeatureName:
    """The fields of a structure: feature name."""

    __slots__ = (
        "type",
        "bit",
        "name",
    )

    def __init__(
        self,
        type: int,
        bit: int,
        name: bytes,
    ) -> None:
        self.type = type
        self.bit = bit
        self.name = name


def _build_feature_name(
    *,
    type: int,
    bit: int,
    name: bytes,
) -> bytes:
    if len(name) != 46:
        raise ValueError(f"feature name.name: {len(name)} bytes, not 46")
    return _feature_name.pack(
        type,
        bit,
        name,
    )


FEATURE_NAME = Structure(
    "feature name",
    _feature_name,
    RawFeatureName,
    _build_feature_name,
    Field("type", 0, 1),
    Field("bit", 1, 1),
    Field("name", 2, 46),
)

_snapshot = Struct(">QLHHLLQLL")


class RawSnapshot:
    """The fields of a structure: snapshot."""

    __slots__ = (
        "l1_table_offset",
        "l1_size",
        "id_size",
        "name_size",
        "date_seconds",
        "date_nanoseconds",
        "vm_clock",
        "vm_state_size",
        "extra_data_size",
    )

    def __init__(
        self,
        l1_table_offset: int,
        l1_size: int,
        id_size: int,
        name_size: int,
        date_seconds: int,
        date_nanoseconds: int,
        vm_clock: int,
        vm_state_size: int,
        extra_data_size: int,
    ) -> None:
        self.l1_table_offset = l1_table_offset
        self.l1_size = l1_size
        self.id_size = id_size
        self.name_size = name_size
        self.date_seconds = date_seconds
        self.date_nanoseconds = date_nanoseconds
        self.vm_clock = vm_clock
        self.vm_state_size = vm_state_size
        self.extra_data_size = extra_data_size


def _build_snapshot(
    *,
    l1_table_offset: int,
    l1_size: int,
    id_size: int,
    name_size: int,
    date_seconds: int,
    date_nanoseconds: int,
    vm_clock: int,
    vm_state_size: int,
    extra_data_size: int,
) -> bytes:
    return _snapshot.pack(
        l1_table_offset,
        l1_size,
        id_size,
        name_size,
        date_seconds,
        date_nanoseconds,
        vm_clock,
        vm_state_size,
        extra_data_size,
    )


SNAPSHOT = Structure(
    "snapshot",
    _snapshot,
    RawSnapshot,
    _build_snapshot,
    Field("l1_table_offset", 0, 8),
    Field("l1_size", 8, 4),
    Field("id_size", 12, 2),
    Field("name_size", 14, 2),
    Field("date_seconds", 16, 4),
    Field("date_nanoseconds", 20, 4),
    Field("vm_clock", 24, 8),
    Field("vm_state_size", 32, 4),
    Field("extra_data_size", 36, 4),
)
