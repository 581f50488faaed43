"""qcow2 images: feature bits, header extension types, limits, checks of the header, and tables as numpy views.

    byte 0        72            104        header_length              cluster_size
      | version 2 | version 3    | more ...  | extensions ... | name ... |
      |           |  features    |           |  end marker    | of the backing file

The structures are in `dirtmap.fmt.structures.qcow2`. Source of the format: docs/interop/qcow2.txt in QEMU's tree.
Source of the limits: QEMU's block/qcow2.h and block/qcow2.c.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from dirtmap.fmt import geometry
from dirtmap.fmt.directory import MAX_BITMAPS, MAX_DIRECTORY_SIZE, name_fault
from dirtmap.fmt.extensions import Extension
from dirtmap.fmt.parsers.qcow2 import (
    BITMAPS_EXTENSION,
    CRYPTO_EXTENSION,
    HEADER_MORE,
    HEADER_V2,
    HEADER_V3,
    RawHeaderV2,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Counts = NDArray[np.unsignedinteger[Any]]

MAGIC = b"QFI\xfb"

# Where parts of the header are, in bytes from its start.
BACKING_FILE_OFFSET = 8
REFCOUNT_TABLE_OFFSET = 48
V3_OFFSET = 72  # also the length of a version 2 header
AUTOCLEAR_OFFSET = 88
MORE_OFFSET = 104  # also the least length of a version 3 header

NAMESPACE_EXTENSION_SIZE = 16  # bytes of our namespace extension before the name
SNAPSHOT_SIZE = 40  # bytes of a snapshot's fixed part

INCOMPATIBLE_DIRTY = 1 << 0
INCOMPATIBLE_CORRUPT = 1 << 1
INCOMPATIBLE_DATA_FILE = 1 << 2
INCOMPATIBLE_COMPRESSION = 1 << 3
INCOMPATIBLE_EXTENDED_L2 = 1 << 4
COMPATIBLE_LAZY_REFCOUNTS = 1 << 0
AUTOCLEAR_BITMAPS = 1 << 0
AUTOCLEAR_RAW_EXTERNAL_DATA = 1 << 1
# Ours: a tracker has the bitmaps. A program that does not know the bit clears it when it opens the image for writing.
# So if the bit is still set, no such program did.
AUTOCLEAR_TRACKED = 1 << 62

INCOMPATIBLE_NAMES = {
    INCOMPATIBLE_DIRTY: "dirty",
    INCOMPATIBLE_CORRUPT: "corrupt",
    INCOMPATIBLE_DATA_FILE: "external data file",
    INCOMPATIBLE_COMPRESSION: "compression type",
    INCOMPATIBLE_EXTENDED_L2: "extended L2 entries",
}
COMPATIBLE_NAMES = {COMPATIBLE_LAZY_REFCOUNTS: "lazy refcounts"}
AUTOCLEAR_NAMES = {
    AUTOCLEAR_BITMAPS: "bitmaps",
    AUTOCLEAR_RAW_EXTERNAL_DATA: "raw external data",
    AUTOCLEAR_TRACKED: "dirtmap: tracked",
}
KNOWN_INCOMPATIBLE = sum(INCOMPATIBLE_NAMES)
KNOWN_AUTOCLEAR = sum(AUTOCLEAR_NAMES)

EXTENSION_BACKING_FORMAT = 0xE2792ACA
EXTENSION_FEATURE_NAMES = 0x6803F857
EXTENSION_BITMAPS = 0x23852875
EXTENSION_CRYPTO = 0x0537BE77
EXTENSION_DATA_FILE = 0x44415441
# Ours ("dmpF"): the space that a removed bitmaps extension left in the middle of a chain, kept for the next one. QEMU
# keeps it as an unknown extension. Closing the gap would take more than one atomic write; changing an 8-byte head does
# not.
EXTENSION_VACANT = 0x646D7046
# Ours ("dmpN"): the identity of an image, which is the UUID of its namespace (16 bytes) and its node's name. QEMU keeps
# it as an unknown extension. `qemu-img convert` drops it, which is right: the result is another image.
EXTENSION_NAMESPACE = 0x646D704E
EXTENSION_NAMES = {
    EXTENSION_BACKING_FORMAT: "backing file format",
    EXTENSION_FEATURE_NAMES: "feature names",
    EXTENSION_BITMAPS: "bitmaps",
    EXTENSION_CRYPTO: "full disk encryption header",
    EXTENSION_DATA_FILE: "external data file",
    EXTENSION_VACANT: "dirtmap: vacant",
    EXTENSION_NAMESPACE: "dirtmap: namespace",
}
# Types that may appear once only. QEMU takes the last of several, but which one the writer meant is unknown.
SINGLE_EXTENSIONS = frozenset(EXTENSION_NAMES) - {EXTENSION_VACANT}

SECTOR = 512  # QEMU: BDRV_SECTOR_SIZE
MAX_L1_BYTES = 0x2000000  # QCOW_MAX_L1_SIZE
MAX_REFCOUNT_TABLE_BYTES = 0x800000  # QCOW_MAX_REFTABLE_SIZE
MAX_REFCOUNT_ORDER = 6
MAX_SNAPSHOTS = 65536  # QCOW_MAX_SNAPSHOTS
MAX_SNAPSHOT_TABLE_BYTES = 1024 * MAX_SNAPSHOTS  # QCOW_MAX_SNAPSHOTS_SIZE
MAX_SNAPSHOT_EXTRA_DATA = 1024  # QCOW_MAX_SNAPSHOT_EXTRA_DATA
MAX_BACKING_NAME = 1023
MAX_BACKING_FORMAT = 15
MIN_CRYPTO_BYTES = 592  # the LUKS header itself: QEMU crypto/block-luks-priv.h, QCryptoBlockLUKSHeader
MAX_CRYPTO_BYTES = 64 << 20  # ours: a LUKS header with its eight key slots takes 2 MiB
CRYPT_LUKS = 2
LUKS_MAGIC = b"LUKS\xba\xbe"
LUKS_VERSION = b"\0\1"
MIN_EXTENDED_L2_CLUSTER_BITS = 14

TABLE_ENTRY_SIZE = 8
OFFSET_MASK = 0x00FFFFFFFFFFFE00  # L1E_OFFSET_MASK, L2E_OFFSET_MASK, REFT_OFFSET_MASK
COPIED = 1 << 63  # QCOW_OFLAG_COPIED: the refcount is 1, so a write goes in place
L2_COMPRESSED = 1 << 62
COMPRESSED_SECTOR = 512


class Header(NamedTuple):
    """The fields of a header. In a version 2 header, those of version 3 have the values that version 2 implies.

    Attributes:
        v2: the fields of `dirtmap.fmt.parsers.qcow2.HEADER_V2`.
        incompatible, compatible, autoclear: feature bits, all 64 as found.
        refcount_order: log2 of the width of a refcount in bits.
        length: bytes before the first extension.
        compression_type: 0 for zlib, 1 for zstd.
    """

    v2: RawHeaderV2
    incompatible: int
    compatible: int
    autoclear: int
    refcount_order: int
    length: int
    compression_type: int

    @property
    def version(self) -> int:
        """2 or 3."""
        return int(self.v2.version)

    @property
    def size(self) -> int:
        """The virtual disk's size in bytes, rounded down to whole sectors.

        Source: QEMU block/qcow2.c, qcow2_do_open. Part of a sector at the end does not belong to the disk, and QEMU
        checks the length of bitmap tables against the rounded size.
        """
        return int(self.v2.size) // SECTOR * SECTOR

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return 1 << int(self.v2.cluster_bits)

    @property
    def refcount_bits(self) -> int:
        """Bits of one refcount: 1, 2, 4, ... 64."""
        return 1 << self.refcount_order

    @property
    def refcounts_per_block(self) -> int:
        """How many refcounts one refcount block (a cluster) holds."""
        return self.cluster_size * 8 // self.refcount_bits

    @property
    def l2_entry_size(self) -> int:
        """Bytes of an L2 entry: 16 with extended L2 entries, else 8."""
        return 16 if self.incompatible & INCOMPATIBLE_EXTENDED_L2 else 8

    @property
    def chain_limit(self) -> int:
        """Offset at which QEMU stops reading extensions: the backing file's name, else the end of the first cluster."""
        return int(self.v2.backing_file_offset) or self.cluster_size


def feature_text(bits: int, names: dict[int, str]) -> list[str]:
    """Returns the names of the bits that are set, and ``unknown bit N`` for a bit that has none."""
    return [names.get(1 << bit, f"unknown bit {bit}") for bit in range(bits.bit_length()) if bits >> bit & 1]


def header_faults(header: Header) -> Iterator[tuple[str, str]]:
    """Yields what makes QEMU refuse the header, as (field, what). Source: QEMU block/qcow2.c, qcow2_do_open.

    Fields that depend on a faulty one are not checked.
    """
    v2 = header.v2
    if v2.magic != MAGIC:
        yield "magic", "not a qcow2 image"
        return
    if v2.version not in (2, 3):
        yield "version", f"{v2.version} is neither 2 nor 3"
        return
    if unknown := header.incompatible & ~KNOWN_INCOMPATIBLE:
        yield (
            "incompatible_features",
            f"{unknown:#x} has bits that are unknown: the image needs newer software",
        )
        return
    if not geometry.MIN_CLUSTER_BITS <= v2.cluster_bits <= geometry.MAX_CLUSTER_BITS:
        limits = f"{geometry.MIN_CLUSTER_BITS}..{geometry.MAX_CLUSTER_BITS}"
        yield "cluster_bits", f"{v2.cluster_bits} is outside {limits}"
        return
    cluster = header.cluster_size
    if header.length < (MORE_OFFSET if v2.version == 3 else V3_OFFSET) or header.length > cluster:
        yield "header_length", f"{header.length} is outside {MORE_OFFSET}..{cluster}"
        return
    if header.length % 8:
        yield "header_length", f"{header.length} is not a multiple of 8"
    if header.autoclear & AUTOCLEAR_RAW_EXTERNAL_DATA and not header.incompatible & INCOMPATIBLE_DATA_FILE:
        yield "autoclear_features", "bit 1 (raw external data) is set, but there is no external data file"
    if header.refcount_order > MAX_REFCOUNT_ORDER:
        yield "refcount_order", f"{header.refcount_order} is above {MAX_REFCOUNT_ORDER}"
    if v2.crypt_method > CRYPT_LUKS:
        yield "crypt_method", f"{v2.crypt_method} is unknown"
    if v2.size > geometry.MAX_DISK_SIZE:
        yield "size", f"{v2.size} is above {geometry.MAX_DISK_SIZE}"
    if header.incompatible & INCOMPATIBLE_EXTENDED_L2 and v2.cluster_bits < MIN_EXTENDED_L2_CLUSTER_BITS:
        yield "incompatible_features", f"extended L2 entries with clusters of {cluster} bytes"
    if header.compression_type > 1:
        yield "compression_type", f"{header.compression_type} is unknown"
    if bool(header.incompatible & INCOMPATIBLE_COMPRESSION) != bool(header.compression_type):
        yield "compression_type", f"{header.compression_type} contradicts incompatible feature bit 3"
    l1_bytes = v2.l1_size * TABLE_ENTRY_SIZE
    yield from _table_faults("l1_size", l1_bytes, MAX_L1_BYTES, "l1_table_offset", v2.l1_table_offset, cluster)
    needed = geometry.ceil_div(v2.size, cluster * (cluster // header.l2_entry_size))
    if v2.l1_size < needed:
        yield "l1_size", f"{v2.l1_size} entries are too few: the disk's size needs {needed}"
    if not v2.refcount_table_clusters:
        yield "refcount_table_clusters", "0: there is no refcount table"
    yield from _table_faults(
        "refcount_table_clusters",
        v2.refcount_table_clusters * cluster,
        MAX_REFCOUNT_TABLE_BYTES,
        "refcount_table_offset",
        v2.refcount_table_offset,
        cluster,
    )
    if v2.nb_snapshots > MAX_SNAPSHOTS:
        yield "nb_snapshots", f"{v2.nb_snapshots} is above {MAX_SNAPSHOTS}"
    else:
        least = v2.nb_snapshots * SNAPSHOT_SIZE
        limit = MAX_SNAPSHOT_TABLE_BYTES
        yield from _table_faults("nb_snapshots", least, limit, "snapshots_offset", v2.snapshots_offset, cluster)
    if v2.backing_file_offset:
        if v2.backing_file_offset > cluster:
            yield "backing_file_offset", f"{v2.backing_file_offset} is outside the first cluster"
        elif v2.backing_file_size > min(MAX_BACKING_NAME, cluster - v2.backing_file_offset):
            yield "backing_file_size", f"{v2.backing_file_size} bytes are too long or leave the first cluster"
        elif v2.backing_file_offset < header.length:
            yield "backing_file_offset", f"{v2.backing_file_offset} lies inside the header"


def _table_faults(
    length_field: str, length: int, limit: int, offset_field: str, offset: int, cluster_size: int
) -> Iterator[tuple[str, str]]:
    """Checks where a table lies and how long it is, in bytes. Source: QEMU block/qcow2.c, qcow2_validate_table."""
    if length > limit:
        yield length_field, f"{length} bytes are above {limit}"
    if offset % cluster_size:
        yield offset_field, f"{offset:#x} is not a multiple of the cluster size {cluster_size}"
    elif length and offset == 0:
        yield offset_field, "0 is the header's place"
    elif offset + length > geometry.MAX_DISK_SIZE:
        yield offset_field, f"{offset:#x} is out of range"


def luks_faults(start: bytes) -> Iterator[tuple[str, str]]:
    """Yields what makes QEMU refuse the encryption header by its first bytes, as (field, what).

    Source: QEMU crypto/block-luks.c, qcrypto_block_luks_check_header. Its cipher and key slots are not judged: bitmaps
    are stored in clear.
    """
    if not start.startswith(LUKS_MAGIC):
        yield "LUKS header", "begins with another magic: it is none"
    elif start[len(LUKS_MAGIC) :][:2] != LUKS_VERSION:
        yield "LUKS header", "its version is not 1"


def namespace_extension_faults(data: bytes) -> Iterator[tuple[str, str]]:
    """Yields what is wrong with our namespace extension, as (field, what). Called before reading and before writing."""
    if len(data) < NAMESPACE_EXTENSION_SIZE:
        yield "uuid", f"{len(data)} bytes are too few"
    elif fault := name_fault(data[NAMESPACE_EXTENSION_SIZE:]):
        yield "name", fault


def table_view(data: bytes | bytearray) -> NDArray[np.uint64]:
    """Returns an L1, L2 or refcount table as a view of ``data``: one element per entry, dtype ``>u8``."""
    import numpy as np

    return np.frombuffer(data, dtype=">u8")


def refcounts_of(block: bytes, refcount_bits: int) -> Counts:
    """Returns the refcounts in a refcount block, one element each.

    The elements are native unsigned integers as wide as a refcount, but at least a byte. On disk, refcounts of less
    than a byte are packed with the least significant first, and wider ones are big-endian.
    """
    import numpy as np

    if refcount_bits >= 8:
        return np.frombuffer(block, dtype=f">u{refcount_bits // 8}").astype(f"=u{refcount_bits // 8}")
    octets = np.frombuffer(block, dtype=np.uint8)
    shifts = np.arange(0, 8, refcount_bits, dtype=np.uint8)
    return ((octets[:, None] >> shifts) & np.uint8((1 << refcount_bits) - 1)).reshape(-1)


def refcount_block(counts: Counts, refcount_bits: int) -> bytes:
    """Returns the bytes of a refcount block with these refcounts. The inverse of `refcounts_of`."""
    import numpy as np

    if refcount_bits >= 8:
        return counts.astype(f">u{refcount_bits // 8}").tobytes()
    shifts = np.arange(0, 8, refcount_bits, dtype=np.uint8)
    parts = counts.astype(np.uint8).reshape(-1, 8 // refcount_bits) << shifts
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(parts, axis=1).astype(np.uint8)
    return packed.tobytes()


def parse_header(data: bytes) -> Header:
    """Returns the header at the start of ``data``, without checking it: see `header_faults`.

    Args:
        data: at least the first 112 bytes of the image, padded with zeros if the image is shorter.
    """
    v2 = HEADER_V2.parse(data)
    if v2.version < 3:
        return Header(v2, 0, 0, 0, 4, HEADER_V2.size, 0)
    incompatible, compatible, autoclear, refcount_order, length = HEADER_V3.unpack(data, V3_OFFSET)
    compression_type = HEADER_MORE.unpack(data, MORE_OFFSET)[0] if length >= MORE_OFFSET + HEADER_MORE.size else 0
    return Header(v2, incompatible, compatible, autoclear, refcount_order, length, compression_type)


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
