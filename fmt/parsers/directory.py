"""How the structures of `dirtmap.fmt.structures.directory` are parsed and built.

Made by `make parsers`: do not edit.
"""

from __future__ import annotations

from struct import Struct

from dirtmap.fmt.structure import Field, Structure

_directory_entry = Struct(">QLLBBHL")


class RawDirectoryEntry:
    """The fields of a structure: bitmap directory entry."""

    __slots__ = (
        "table_offset",
        "table_size",
        "flags",
        "type",
        "granularity_bits",
        "name_size",
        "extra_data_size",
    )

    def __init__(
        self,
        table_offset: int,
        table_size: int,
        flags: int,
        type: int,
        granularity_bits: int,
        name_size: int,
        extra_data_size: int,
    ) -> None:
        self.table_offset = table_offset
        self.table_size = table_size
        self.flags = flags
        self.type = type
        self.granularity_bits = granularity_bits
        self.name_size = name_size
        self.extra_data_size = extra_data_size


def _build_directory_entry(
    *,
    table_offset: int,
    table_size: int,
    flags: int,
    type: int,
    granularity_bits: int,
    name_size: int,
    extra_data_size: int,
) -> bytes:
    return _directory_entry.pack(
        table_offset,
        table_size,
        flags,
        type,
        granularity_bits,
        name_size,
        extra_data_size,
    )


DIRECTORY_ENTRY = Structure(
    "bitmap directory entry",
    _directory_entry,
    RawDirectoryEntry,
    _build_directory_entry,
    Field("table_offset", 0, 8),
    Field("table_size", 8, 4),
    Field("flags", 12, 4),
    Field("type", 16, 1),
    Field("granularity_bits", 17, 1),
    Field("name_size", 18, 2),
    Field("extra_data_size", 20, 4),
)
