"""The structures of a qcow2 image: its header, the data of its header extensions, its snapshots.

Source: docs/interop/qcow2.txt in QEMU's tree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from construct import Bytes, Int8ub, Int16ub, Int32ub, Int64ub

from dirtmap.fmt.directory import MAX_BITMAPS, MAX_DIRECTORY_SIZE
from dirtmap.fmt.extensions import Extension
from dirtmap.fmt.qcow2 import (
    CRYPT_LUKS,
    EXTENSION_BACKING_FORMAT,
    EXTENSION_CRYPTO,
    EXTENSION_DATA_FILE,
    INCOMPATIBLE_DATA_FILE,
    MAX_BACKING_FORMAT,
    MAX_CRYPTO_BYTES,
    MIN_CRYPTO_BYTES,
    MORE_OFFSET,
    V3_OFFSET,
    Header,
)
from dirtmap.fmt.structure import Structure

HEADER_V2 = Structure(
    "header",
    "magic" / Bytes(4),
    "version" / Int32ub,
    "backing_file_offset" / Int64ub,
    "backing_file_size" / Int32ub,
    "cluster_bits" / Int32ub,
    "size" / Int64ub,
    "crypt_method" / Int32ub,
    "l1_size" / Int32ub,
    "l1_table_offset" / Int64ub,
    "refcount_table_offset" / Int64ub,
    "refcount_table_clusters" / Int32ub,
    "nb_snapshots" / Int32ub,
    "snapshots_offset" / Int64ub,
)
HEADER_V3 = Structure(
    "header, version 3",
    "incompatible_features" / Int64ub,
    "compatible_features" / Int64ub,
    "autoclear_features" / Int64ub,
    "refcount_order" / Int32ub,
    "header_length" / Int32ub,
)
# Present if header_length says so. Fields behind it are kept as found, and not read.
HEADER_MORE = Structure("header, additional fields", "compression_type" / Int8ub, "padding" / Bytes(7))

# The 12 bytes of the header that say where the refcount table is. They lie in its first 512 bytes, which a disk writes
# whole or not at all.
REFCOUNT_TABLE_POINTER = Structure("refcount table pointer", "offset" / Int64ub, "clusters" / Int32ub)
POINTER = Structure("pointer", "offset" / Int64ub)

BITMAPS_EXTENSION = Structure(
    "bitmaps extension",
    "nb_bitmaps" / Int32ub,
    "reserved" / Int32ub,
    "directory_size" / Int64ub,
    "directory_offset" / Int64ub,
)
NAMESPACE_EXTENSION = Structure("namespace extension", "uuid" / Bytes(16))  # followed by the name
CRYPTO_EXTENSION = Structure("crypto extension", "offset" / Int64ub, "length" / Int64ub)
FEATURE_NAME = Structure("feature name", "type" / Int8ub, "bit" / Int8ub, "name" / Bytes(46))
SNAPSHOT = Structure(
    "snapshot",
    "l1_table_offset" / Int64ub,
    "l1_size" / Int32ub,
    "id_size" / Int16ub,
    "name_size" / Int16ub,
    "date_seconds" / Int32ub,
    "date_nanoseconds" / Int32ub,
    "vm_clock" / Int64ub,
    "vm_state_size" / Int32ub,
    "extra_data_size" / Int32ub,
)


def parse_header(data: bytes) -> Header:
    """Returns the header at the start of ``data``, without checking it: see `dirtmap.fmt.qcow2.header_faults`.

    Args:
        data: at least the first 112 bytes of the image, padded with zeros if the image is shorter.
    """
    v2 = HEADER_V2.parse(data)
    if v2.version < 3:
        return Header(v2, 0, 0, 0, 4, HEADER_V2.size, 0)
    v3 = HEADER_V3.parse(data, V3_OFFSET)
    more = v3.header_length >= MORE_OFFSET + HEADER_MORE.size
    return Header(
        v2,
        v3.incompatible_features,
        v3.compatible_features,
        v3.autoclear_features,
        v3.refcount_order,
        v3.header_length,
        HEADER_MORE.parse(data, MORE_OFFSET).compression_type if more else 0,
    )


def extension_faults(header: Header, chain: Iterable[Extension]) -> Iterator[tuple[str, str]]:
    """Yields what makes QEMU refuse an extension other than the bitmaps extension, as (extension or field in it, what).

    Source: QEMU block/qcow2.c, qcow2_read_extensions, qcow2_do_open.
    """
    found = {extension.type: extension.data for extension in chain}
    if len(found.get(EXTENSION_BACKING_FORMAT, b"")) > MAX_BACKING_FORMAT:
        yield "backing file format", f"{len(found[EXTENSION_BACKING_FORMAT])} bytes are above {MAX_BACKING_FORMAT}"
    # QEMU takes the name for a C string: one that begins with a NUL is empty.
    if header.incompatible & INCOMPATIBLE_DATA_FILE and not found.get(EXTENSION_DATA_FILE, b"").partition(b"\0")[0]:
        yield "external data file", "there is none, but incompatible feature bit 2 is set"
    encrypted, data = header.v2.crypt_method == CRYPT_LUKS, found.get(EXTENSION_CRYPTO)
    if encrypted != (data is not None):
        yield "full disk encryption header", f"contradicts crypt_method {header.v2.crypt_method}"
    elif data is not None and len(data) != CRYPTO_EXTENSION.size:
        yield "full disk encryption header", f"length {len(data)} is not {CRYPTO_EXTENSION.size}"
    elif data is not None:
        crypto = CRYPTO_EXTENSION.parse(data)
        if crypto.offset % header.cluster_size:
            what = f"{crypto.offset:#x} is not a multiple of the cluster size {header.cluster_size}"
            yield "full disk encryption header.offset", what
        if not MIN_CRYPTO_BYTES <= crypto.length <= MAX_CRYPTO_BYTES:
            limits = f"{MIN_CRYPTO_BYTES}..{MAX_CRYPTO_BYTES}"
            yield "full disk encryption header.length", f"{crypto.length} is outside {limits}"


def bitmaps_extension_faults(data: bytes, cluster_size: int, file_size: int) -> Iterator[tuple[str, str]]:
    """Yields what is wrong with the bitmaps extension's data, as (field, what). Sizes are in bytes.

    Source: QEMU block/qcow2.c, qcow2_read_extensions. That the directory must lie inside the file is our own rule: QEMU
    reads zeros past the end.
    """
    if len(data) != BITMAPS_EXTENSION.size:
        yield "length", f"{len(data)} is not {BITMAPS_EXTENSION.size}"
        return
    ext = BITMAPS_EXTENSION.parse(data)
    if ext.reserved:
        yield "reserved", f"{ext.reserved:#x} is not 0"
    if not 1 <= ext.nb_bitmaps <= MAX_BITMAPS:
        yield "nb_bitmaps", f"{ext.nb_bitmaps} is outside 1..{MAX_BITMAPS}"
    if ext.directory_offset == 0 or ext.directory_offset % cluster_size:
        yield "directory_offset", f"{ext.directory_offset:#x} is not a multiple of the cluster size {cluster_size}"
    elif ext.directory_offset >= file_size:
        yield "directory_offset", f"{ext.directory_offset:#x} is past the end of the file ({file_size:#x})"
    if not 1 <= ext.directory_size <= MAX_DIRECTORY_SIZE:
        yield "directory_size", f"{ext.directory_size} is outside 1..{MAX_DIRECTORY_SIZE}"
    elif ext.directory_offset < file_size < ext.directory_offset + ext.directory_size:
        end = ext.directory_offset + ext.directory_size
        yield "directory_size", f"the directory ends at {end:#x}, past the end of the file ({file_size:#x})"
