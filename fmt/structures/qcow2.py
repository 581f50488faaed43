"""The structures of a qcow2 image: its header, the data of its header extensions, its snapshots.

Source: docs/interop/qcow2.txt in QEMU's tree.
"""

from __future__ import annotations

from construct import Bytes, Int8ub, Int16ub, Int32ub, Int64ub, Struct

HEADER_V2 = "header" / Struct(
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
HEADER_V3 = "header, version 3" / Struct(
    "incompatible_features" / Int64ub,
    "compatible_features" / Int64ub,
    "autoclear_features" / Int64ub,
    "refcount_order" / Int32ub,
    "header_length" / Int32ub,
)
# Present if header_length says so. Fields behind it are kept as found, and not read.
HEADER_MORE = "header, additional fields" / Struct("compression_type" / Int8ub, "padding" / Bytes(7))

# The 12 bytes of the header that say where the refcount table is. They lie in its first 512 bytes, which a disk writes
# whole or not at all.
REFCOUNT_TABLE_POINTER = "refcount table pointer" / Struct("offset" / Int64ub, "clusters" / Int32ub)
POINTER = "pointer" / Struct("offset" / Int64ub)

BITMAPS_EXTENSION = "bitmaps extension" / Struct(
    "nb_bitmaps" / Int32ub,
    "reserved" / Int32ub,
    "directory_size" / Int64ub,
    "directory_offset" / Int64ub,
)
NAMESPACE_EXTENSION = "namespace extension" / Struct("uuid" / Bytes(16))  # followed by the name
CRYPTO_EXTENSION = "crypto extension" / Struct("offset" / Int64ub, "length" / Int64ub)
FEATURE_NAME = "feature name" / Struct("type" / Int8ub, "bit" / Int8ub, "name" / Bytes(46))
SNAPSHOT = "snapshot" / Struct(
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
