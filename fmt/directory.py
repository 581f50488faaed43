"""The bitmap directory and the bitmap table, which qcow2 and the store share.

A directory is a run of entries without gaps, each padded to 8 bytes:

    | fixed part (24) | extra data | name | pad | fixed part (24) | ... | <- directory_size, exactly

A table is a run of big-endian u64, one for each cluster of packed bits:

    | reserved (8 bits, zero) | cluster offset (bits 9..55) | reserved (bits 1..8, zero) | bit 0: all ones |

Source: docs/interop/qcow2.txt, "Bitmap directory", "Bitmap table".
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from construct import Int8ub, Int16ub, Int32ub, Int64ub

from dirtmap.fmt import geometry
from dirtmap.fmt.structure import Structure

DIRECTORY_ENTRY = Structure(
    "bitmap directory entry",
    "table_offset" / Int64ub,
    "table_size" / Int32ub,
    "flags" / Int32ub,
    "type" / Int8ub,
    "granularity_bits" / Int8ub,
    "name_size" / Int16ub,
    "extra_data_size" / Int32ub,
)

TYPE_DIRTY_TRACKING = 1
FLAG_IN_USE = 1 << 0
FLAG_AUTO = 1 << 1
FLAG_EXTRA_DATA_COMPATIBLE = 1 << 2
FLAG_NAMES = {FLAG_IN_USE: "in-use", FLAG_AUTO: "auto", FLAG_EXTRA_DATA_COMPATIBLE: "extra-data-compatible"}
# QEMU refuses an image with any other flag, extra_data_compatible included (block/qcow2-bitmap.c, BME_RESERVED_FLAGS).
ACCEPTED_FLAGS = FLAG_IN_USE | FLAG_AUTO

# QEMU: block/qcow2-bitmap.c, BME_MAX_*, QCOW2_MAX_BITMAPS, QCOW2_MAX_BITMAP_DIRECTORY_SIZE.
MAX_NAME_SIZE = 1023
MAX_TABLE_ENTRIES = 0x8000000
MAX_DATA_BYTES = 0x20000000
MAX_GRANULES = 1 << 41  # QEMU: util/hbitmap.c, HBITMAP_LOG_MAX_SIZE on a 64-bit host; beyond it QEMU aborts
MAX_BITMAPS = 65535
MAX_DIRECTORY_SIZE = 1024 * MAX_BITMAPS

TABLE_ENTRY_SIZE = 8
TABLE_OFFSET_MASK = 0x00FFFFFFFFFFFE00
TABLE_RESERVED_MASK = 0xFF000000000001FE
TABLE_ALL_ONES = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """A directory entry as found, or to be written.

    Attributes:
        name: raw bytes, 1 to 1023 of them.
        table_offset: where the table begins, bytes.
        table_size: its length in entries.
        flags: all 32 bits as found.
        granularity_bits: log2 of the granularity in bytes.
        type: 1 for a dirty bitmap.
        extra_data: bytes between the fixed part and the name, kept as found.
    """

    name: bytes
    table_offset: int
    table_size: int
    flags: int
    granularity_bits: int
    type: int = TYPE_DIRTY_TRACKING
    extra_data: bytes = b""

    @property
    def granularity(self) -> int:
        """Bytes of the disk for each bit."""
        return 1 << self.granularity_bits

    @property
    def in_use(self) -> bool:
        """The stored bits are stale: whoever had the image open for writing did not finish."""
        return bool(self.flags & FLAG_IN_USE)

    @property
    def auto(self) -> bool:
        """Recording: QEMU goes on tracking into it when it opens the image."""
        return bool(self.flags & FLAG_AUTO)

    def with_flags(self, *, set: int = 0, clear: int = 0) -> Entry:
        """The same entry with those flag bits changed and all others as found."""
        flags = self.flags & ~clear | set
        return self if flags == self.flags else replace(self, flags=flags)

    @property
    def packed_size(self) -> int:
        """Bytes it takes in a directory, padding included."""
        return geometry.align_up(DIRECTORY_ENTRY.size + len(self.extra_data) + len(self.name), 8)


class BrokenEntryError(ValueError):
    """An entry's lengths lead outside the directory; ``offset`` in bytes from the directory's start."""

    def __init__(self, offset: int, what: str) -> None:
        super().__init__(what)
        self.offset = offset


def parse_entries(data: bytes, start: int = 0) -> Iterator[tuple[int, Entry]]:
    """The entries of a directory from byte ``start`` on, with their offsets.

    Only lengths are judged here, since they are needed to find the next entry; `entry_faults` judges the rest.

    Raises:
        BrokenEntryError: once, at the first entry that does not fit; nothing follows it.
    """
    at, total = start, len(data)
    while at < total:
        if at + DIRECTORY_ENTRY.size > total:
            raise BrokenEntryError(at, f"{total - at} bytes are left, too few for an entry")
        fixed = DIRECTORY_ENTRY.parse(data, at)
        name_size, extra_data_size = fixed.name_size, fixed.extra_data_size
        extra = at + DIRECTORY_ENTRY.size
        name = extra + extra_data_size
        end = geometry.align_up(name + name_size, 8)
        if end > total:
            raise BrokenEntryError(at, f"entry of {end - at} bytes ends past the directory's {total} bytes")
        yield (
            at,
            Entry(
                name=data[name : name + name_size],
                table_offset=fixed.table_offset,
                table_size=fixed.table_size,
                flags=fixed.flags,
                granularity_bits=fixed.granularity_bits,
                type=fixed.type,
                extra_data=data[extra:name],
            ),
        )
        at = end


def build_directory(entries: Iterable[Entry]) -> bytes:
    """The bytes of a directory; padding is written as zeros."""
    parts = []
    for entry in entries:
        fixed = DIRECTORY_ENTRY.build(
            table_offset=entry.table_offset,
            table_size=entry.table_size,
            flags=entry.flags,
            type=entry.type,
            granularity_bits=entry.granularity_bits,
            name_size=len(entry.name),
            extra_data_size=len(entry.extra_data),
        )
        parts.append((fixed + entry.extra_data + entry.name).ljust(entry.packed_size, b"\0"))
    return b"".join(parts)


def name_fault(name: bytes) -> str | None:
    """What is wrong with a bitmap name, or None. Source: QEMU, BME_MAX_NAME_SIZE; its names are C strings."""
    if not name:
        return "name is empty"
    if len(name) > MAX_NAME_SIZE:
        return f"name of {len(name)} bytes is longer than {MAX_NAME_SIZE}"
    if b"\0" in name:
        return "name contains a NUL byte"
    return None


def entry_faults(entry: Entry, disk_size: int, cluster_size: int) -> Iterator[tuple[str, str]]:
    """What makes QEMU refuse this entry, as (field, what); called on load and on store.

    Source: QEMU block/qcow2-bitmap.c, check_dir_entry and bitmap_list_load.
    """
    if entry.type != TYPE_DIRTY_TRACKING:
        yield "type", f"{entry.type} is not 1 (dirty tracking bitmap)"
    if entry.flags & ~ACCEPTED_FLAGS:
        yield "flags", f"{entry.flags:#x} has bits that QEMU refuses ({entry.flags & ~ACCEPTED_FLAGS:#x})"
    if entry.extra_data:
        yield "extra_data_size", f"{len(entry.extra_data)} bytes of extra data, which QEMU refuses"
    if fault := name_fault(entry.name):
        yield "name", fault
    if not geometry.MIN_GRANULARITY_BITS <= entry.granularity_bits <= geometry.MAX_GRANULARITY_BITS:
        limits = f"{geometry.MIN_GRANULARITY_BITS}..{geometry.MAX_GRANULARITY_BITS}"
        yield "granularity_bits", f"{entry.granularity_bits} is outside {limits}"
        return
    if entry.table_offset == 0 or entry.table_offset % cluster_size:
        yield "table_offset", f"{entry.table_offset:#x} is not a multiple of the cluster size {cluster_size}"
    if not 1 <= entry.table_size <= MAX_TABLE_ENTRIES or entry.table_size * cluster_size > MAX_DATA_BYTES:
        yield (
            "table_size",
            f"{entry.table_size} entries of {cluster_size} bytes are outside 1..{MAX_DATA_BYTES} bytes",
        )
    elif entry.in_use:  # it may date from before a resize; QEMU only removes it, but makes room for its bits
        if geometry.granules(disk_size, entry.granularity) > MAX_GRANULES:
            yield "granularity_bits", f"{entry.granularity_bits} makes more than {MAX_GRANULES} granules of the disk"
    else:
        expected = geometry.table_entries(disk_size, entry.granularity, cluster_size)
        if entry.table_size != expected:
            yield "table_size", f"{entry.table_size} entries, but the disk's size needs {expected}"


def parse_table(data: bytes) -> tuple[int, ...]:
    """A bitmap table's raw entries.

    Plain integers, not an array: a table is short (8,192 entries at most with 64 KiB clusters, one in most images),
    and importing numpy costs a command more than walking it. Long tables (refcounts, L1, L2) are views: `fmt.qcow2`.
    """
    return struct.unpack(f">{len(data) // TABLE_ENTRY_SIZE}Q", data)


def build_table(entries: Iterable[int]) -> bytes:
    """The bytes of a table."""
    values = list(entries)
    return struct.pack(f">{len(values)}Q", *values)


def table_faults(table: Iterable[int], cluster_size: int, file_size: int) -> Iterator[tuple[int, str]]:
    """What is wrong with a table's entries, as (index, what).

    Source: QEMU block/qcow2-bitmap.c, check_table_entry; that clusters end inside the file is ours (QEMU
    reads zeros there).
    """
    allowed, last = TABLE_OFFSET_MASK & -cluster_size, file_size - cluster_size
    for index, raw in enumerate(table):
        if raw <= TABLE_ALL_ONES or (not raw & ~allowed and raw <= last):
            continue
        offset = raw & TABLE_OFFSET_MASK
        if raw & TABLE_RESERVED_MASK:
            yield index, f"{raw:#018x} has reserved bits set"
        elif raw & TABLE_ALL_ONES:
            yield index, f"{raw:#018x} is all ones and has an offset"
        elif offset % cluster_size:
            yield index, f"{offset:#x} is not a multiple of the cluster size {cluster_size}"
        else:
            yield index, f"cluster at {offset:#x} ends past the end of the file ({file_size:#x})"
