"""The structure of a bitmap directory's entries."""

from __future__ import annotations

from construct import Int8ub, Int16ub, Int32ub, Int64ub, Struct

DIRECTORY_ENTRY = "bitmap directory entry" / Struct(
    "table_offset" / Int64ub,
    "table_size" / Int32ub,
    "flags" / Int32ub,
    "type" / Int8ub,
    "granularity_bits" / Int8ub,
    "name_size" / Int16ub,
    "extra_data_size" / Int32ub,
)
