"""The structures of a tracker: its session in the store, its live files, its intent log."""

from __future__ import annotations

from construct import Bytes, Int32ub, Int32un, Int64ub, Int64un, Struct

from dirtmap.fmt.structures import store

SESSION = "session" / Struct(
    "version" / Int32ub,
    "reserved" / Int32ub,
    "uuid" / Bytes(16),
    "boot_id" / Bytes(16),
    "pid" / Int64ub,
    "process_start" / Int64ub,
    "started" / Int64ub,
    "intent" / Int32ub,
    "region_bits" / Int32ub,
    "oldest" / Int64ub,
    "log" / Int64ub,
    "image" / Bytes(store.FILE_IDENTITY.sizeof()),
    "live_size" / Int32ub,
    "log_size" / Int32ub,
)
PEER = "peer" / Struct("uuid" / Bytes(16), "name_size" / Int32ub, "store_size" / Int32ub)
CHECKPOINT_NAME = "checkpoint" / Struct("length" / Int32ub)
CHECKPOINT_TIMES = "checkpoint times" / Struct("checksum" / Int32ub, "reserved" / Int32ub)
CHECKPOINT_TIME = "checkpoint time" / Struct("time" / Int64ub)
WINDOW = "window" / Struct("began" / Int64ub, "ended" / Int64ub, "flags" / Int32ub, "reserved" / Int32ub)
CONTROL = "control file" / Struct(
    "magic" / Bytes(8),
    "order" / Int64un,
    "machine" / Int32un,
    "version" / Int32un,
    "uuid" / Bytes(16),
    "image_filesystem" / Bytes(16),
    "image_inode" / Int64un,
    "image_birth" / Int64un,
    "region_bits" / Int64un,
    "intent" / Int64un,
    "reserved1" / Bytes(40),
    "state" / Int64un,
    "gate" / Int64un,
    "reserved2" / Bytes(112),
    "size" / Int64un,
    "recycled" / Int64un,
    "high" / Int64un,
    "reason" / Int64un,
    "heartbeat" / Int64un,
    "event" / Int64un,
    "clock" / Int64un,
    "patience" / Int64un,
)
DESCRIPTOR = "descriptor" / Struct(
    "interval" / Int64un, "offset" / Int64un, "granularity_bits" / Int64un, "bytes" / Int64un
)
SLOT = "slot" / Struct(
    "seen" / Int64un,
    "logging" / Int64un,
    "event" / Int64un,
    "bare" / Int64un,
    "writes" / Int64un,
    "reserved" / Bytes(88),
)
FLIGHT = "flight" / Struct("start" / Int64un, "end" / Int64un, "interval" / Int64un, "thread" / Int64un)
ARENA = "arena" / Struct("magic" / Bytes(8), "uuid" / Bytes(16))
WRITESET = "writeset" / Struct(
    "magic" / Bytes(8),
    "uuid" / Bytes(16),
    "number" / Int64un,
    "size" / Int64un,
    "granularity_bits" / Int64un,
    "room" / Int64un,
)
LOG = "intent log" / Struct(
    "magic" / Bytes(4),
    "version" / Int32ub,
    "uuid" / Bytes(16),
    "intent" / Int32ub,
    "region_bits" / Int32ub,
    "regions" / Int64ub,
    "checksum" / Int32ub,
)
BEAT = "beat" / Struct("time" / Int64ub, "reserved" / Int32ub, "checksum" / Int32ub)
TALLY = "tally" / Struct("number" / Int64ub, "count" / Int32ub, "checksum" / Int32ub)
LOG_RECORD = "logged region" / Struct("region" / Int32ub, "checksum" / Int32ub)
LOG_SEED = "log seed" / Struct("uuid" / Bytes(16), "number" / Int64ub)
