"""The structures of a store."""

from __future__ import annotations

from construct import Bytes, Int8ub, Int16ub, Int32ub, Int64ub, Struct

HEADER = "store header" / Struct(
    "magic" / Bytes(4),
    "version" / Int32ub,
    "incompatible_features" / Int64ub,
    "read_only_compatible_features" / Int64ub,
    "compatible_features" / Int64ub,
    "autoclear_features" / Int64ub,
    "cluster_bits" / Int32ub,
    "header_length" / Int32ub,
    "slot" / Int8ub,
    "copy" / Int8ub,
    "followed" / Int16ub,
    "sessions" / Int32ub,
    "uuid" / Bytes(16),
    "generation" / Int64ub,
    "commit_id" / Bytes(16),
    "doubt_generation" / Int64ub,
    "clusters" / Int64ub,
    "commit_time" / Int64ub,
)
CHECKSUM = "store header checksum" / Struct("checksum" / Int32ub)  # of a block, in its last four bytes

AREA = "area pointer" / Struct("offset" / Int64ub, "length" / Int32ub, "checksum" / Int32ub)
NAMESPACES_EXTENSION = "namespaces extension" / Struct(
    "offset" / Int64ub,
    "length" / Int32ub,
    "checksum" / Int32ub,
    "depth" / Int32ub,
    "reserved" / Int32ub,
    "namespaces" / Int64ub,
)
NODE_POINTER = "node pointer" / Struct(
    "key" / Int32ub,
    "count" / Int32ub,
    "offset" / Int64ub,
    "length" / Int32ub,
    "checksum" / Int32ub,
)
PLACE_EXTENSION = "place extension" / Struct("filesystem" / Bytes(16), "inode" / Int64ub, "birth" / Int64ub)
LEAF = "space map entry" / Struct("offset" / Int64ub, "free" / Int32ub, "checksum" / Int32ub)
RUN = "released run" / Struct("first" / Int64ub, "count" / Int64ub)
FILE_IDENTITY = "file identity" / Struct(
    "filesystem" / Bytes(16),
    "inode" / Int64ub,
    "birth" / Int64ub,
    "size" / Int64ub,
    "mtime" / Int64ub,
    "ctime" / Int64ub,
)
RECORD = "namespace record" / Struct(
    "length" / Int32ub,
    "kind" / Int8ub,
    "reserved" / Int8ub,
    "name_size" / Int16ub,
    "uuid" / Bytes(16),
    "root_uuid" / Bytes(16),
    "generation" / Int64ub,
    "size" / Int64ub,
    "directory_offset" / Int64ub,
    "directory_length" / Int32ub,
    "directory_checksum" / Int32ub,
    "nb_bitmaps" / Int32ub,
    "path_size" / Int32ub,
    "image" / Bytes(FILE_IDENTITY.sizeof()),
)
OWNER = "directory owner" / Struct("owner" / Bytes(16))  # at the start of each cluster of a directory
POINTER = "bits pointer" / Struct("place" / Int64ub, "checksum" / Int32ub, "reserved" / Int32ub)
# Items in the extra data of a directory entry. A window is another: see `live`.
BITS = "bits" / Struct("checksum" / Int32ub, "reserved" / Int32ub)
IDENTITY = "bitmap identity" / Struct("uuid" / Bytes(16), "generation" / Int64ub)

# A record's extension, one for each hold. The bitmap's name and the owner follow it.
HOLD = "hold" / Struct(
    "process" / Int32ub,
    "name_size" / Int16ub,
    "owner_size" / Int16ub,
    "start" / Int64ub,
    "boot_id" / Bytes(16),
    "token" / Bytes(16),
)
