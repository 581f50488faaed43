"""The bitmap directory and the bitmap table, which qcow2 images and stores share.

A directory is a sequence of entries without gaps. Each entry is padded to 8 bytes:

    | fixed part (24) | extra data | name | pad | fixed part (24) | ... | <- directory_size, exactly

A table is an array of big-endian u64, one for each cluster of packed bits:

    | reserved (8 bits, zero) | cluster offset (bits 9..55) | reserved (bits 1..8, zero) | bit 0: all ones |

Source: docs/interop/qcow2.txt, "Bitmap directory", "Bitmap table".
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from dirtmap.fmt import geometry
from dirtmap.fmt.parsers.directory import DIRECTORY_ENTRY

ENTRY_SIZE = 24  # bytes of an entry's fixed part

TYPE_DIRTY_TRACKING = 1
FLAG_IN_USE = 1 << 0
FLAG_AUTO = 1 << 1
FLAG_EXTRA_DATA_COMPATIBLE = 1 << 2
FLAG_NAMES = {FLAG_IN_USE: "in-use", FLAG_AUTO: "auto", FLAG_EXTRA_DATA_COMPATIBLE: "extra-data-compatible"}
# QEMU refuses an image with any other flag, even extra_data_compatible (block/qcow2-bitmap.c, BME_RESERVED_FLAGS).
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
TABLE_ALL_ZEROS = 0
TABLE_ALL_ONES = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """A directory entry, as found or to be written.

    Attributes:
        name: the bitmap's name, 1 to 1023 raw bytes.
        table_offset: where the bitmap table begins, in bytes from the start of the file.
        table_size: length of the bitmap table in entries.
        flags: all 32 bits as found.
        granularity_bits: log2 of the granularity in bytes.
        type: 1 for a dirty bitmap.
        extra_data: the bytes between the fixed part and the name, kept as found.
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
        """True if the stored bits are stale: the last program that had the image open for writing did not close it."""
        return bool(self.flags & FLAG_IN_USE)

    @property
    def auto(self) -> bool:
        """True if the bitmap is recording: QEMU tracks writes in it whenever it has the image open."""
        return bool(self.flags & FLAG_AUTO)

    def with_flags(self, *, set: int = 0, clear: int = 0) -> Entry:
        """Returns the same entry with these flag bits changed, and all others as found."""
        flags = self.flags & ~clear | set
        return self if flags == self.flags else replace(self, flags=flags)

    @property
    def packed_size(self) -> int:
        """Bytes that the entry takes in a directory, padding included."""
        return geometry.align_up(ENTRY_SIZE + len(self.extra_data) + len(self.name), 8)


class BrokenEntryError(ValueError):
    """An entry ends outside the directory. ``offset`` is where it begins, in bytes from the directory's start."""

    def __init__(self, offset: int, what: str) -> None:
        super().__init__(what)
        self.offset = offset


def name_fault(name: bytes) -> str | None:
    """Returns what is wrong with a bitmap name, or None.

    Source: QEMU block/qcow2-bitmap.c, BME_MAX_NAME_SIZE. No NUL, since QEMU's names are C strings.
    """
    if not name:
        return "name is empty"
    if len(name) > MAX_NAME_SIZE:
        return f"name of {len(name)} bytes is longer than {MAX_NAME_SIZE}"
    if b"\0" in name:
        return "name contains a NUL byte"
    return None


def entry_faults(entry: Entry, disk_size: int, cluster_size: int) -> Iterator[tuple[str, str]]:
    """Yields what makes QEMU refuse this entry, as (field, what). Called before reading and before writing.

    Args:
        entry: the entry.
        disk_size: virtual size of the disk, bytes.
        cluster_size: of the image, bytes.

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


def parse_table(data: bytes | memoryview) -> tuple[int, ...]:
    """Returns a bitmap table's raw entries.

    They are plain integers, not a numpy array. A table is short (at most 8,192 entries with 64 KiB clusters, and one in
    most images), and importing numpy takes longer than a loop over it. Long tables (refcounts, L1, L2) are numpy views,
    see `dirtmap.fmt.qcow2`.
    """
    return struct.unpack(f">{len(data) // TABLE_ENTRY_SIZE}Q", data)


def build_table(entries: Iterable[int]) -> bytes:
    """Returns the bytes of a bitmap table with these raw entries."""
    values = list(entries)
    return struct.pack(f">{len(values)}Q", *values)


def table_faults(table: Iterable[int], cluster_size: int, file_size: int) -> Iterator[tuple[int, str]]:
    """Yields what is wrong with a bitmap table's entries, as (index, what).

    Source: QEMU block/qcow2-bitmap.c, check_table_entry. That a cluster must end inside the file is our own rule: QEMU
    reads zeros past the end.
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


def parse_entries(data: bytes, start: int = 0) -> Iterator[tuple[int, Entry]]:
    """Yields the entries of a directory from byte ``start`` on, each with its offset in ``data``.

    Checks lengths only, which are needed to find the next entry. `entry_faults` checks the rest.

    Raises:
        BrokenEntryError: an entry does not fit into the directory. It ends the iteration.
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
    """Returns the bytes of a directory with these entries, padded with zeros."""
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
