"""The structures of the index's values."""

from __future__ import annotations

from construct import Bytes, Int8ub, Int16ub, Int32ub, Int64ub, Struct

STATE_VALUE = "index state" / Struct("version" / Int32ub, "reserved" / Int32ub, "containers" / Int64ub)
CONTAINER_VALUE = "index container" / Struct(
    "number" / Int64ub,
    "kind" / Int8ub,
    "condition" / Int8ub,
    "racy" / Int8ub,
    "reserved" / Bytes(5),
    "device" / Int64ub,
    "inode" / Int64ub,
    "mtime" / Int64ub,
    "ctime" / Int64ub,
    "size" / Int64ub,
    "generation" / Int64ub,
    "commit_id" / Bytes(16),
    "uuid" / Bytes(16),
)
SEEN_VALUE = "index seen commit" / Struct("generation" / Int64ub, "commit_id" / Bytes(16), "container" / Int64ub)
NAMESPACE_VALUE = "index namespace" / Struct(
    "container" / Int64ub,
    "kind" / Int8ub,
    "reserved" / Bytes(3),
    "name_size" / Int16ub,
    "path_size" / Int16ub,
    "uuid" / Bytes(16),
    "root_uuid" / Bytes(16),
    "size" / Int64ub,
    "directory_offset" / Int64ub,
    "directory_length" / Int32ub,
    "directory_checksum" / Int32ub,
    "image" / Bytes(8),
)
BITMAP_VALUE = "index bitmap" / Struct(
    "container" / Int64ub,
    "flags" / Int32ub,
    "granularity_bits" / Int16ub,
    "reserved" / Int16ub,
    "uuid" / Bytes(16),
)
