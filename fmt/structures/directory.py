"""The structure of a bitmap directory's entries; parsing and building of directories."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from construct import Int8ub, Int16ub, Int32ub, Int64ub

from dirtmap.fmt.directory import BrokenEntryError, Entry
from dirtmap.fmt.geometry import align_up
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


def parse_entries(data: bytes, start: int = 0) -> Iterator[tuple[int, Entry]]:
    """Yields the entries of a directory from byte ``start`` on, each with its offset in ``data``.

    Checks lengths only, which are needed to find the next entry. `dirtmap.fmt.directory.entry_faults` checks the rest.

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
        end = align_up(name + name_size, 8)
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
