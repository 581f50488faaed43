"""What a tracker keeps: its session in the store, the live files on tmpfs, and the intent log beside the store.

    store    record: SESSION, paths; PEER  directory entries: WINDOW behind the checksum in the extra data
    tmpfs    control                    writeset-0, writeset-1, ...: one for each interval between two cuts
    disk     LOG | beats | area 0: records of logs 0, 2, ... | area 1: records of logs 1, 3, ...

What lies on a disk is big-endian as the store is. Live files never leave the machine: their numbers are in its own
byte order, each field written by one store of 8 aligned bytes. Bits are least significant first in each byte.
Source of every rule: SPEC.md, "The live path".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import crc32c
from construct import Bytes, Int32ub, Int64ub, Int64un

from dirtmap.fmt import geometry
from dirtmap.fmt.structure import Structure

PAGE = 4096

SESSION = Structure(
    "session",
    "uuid" / Bytes(16),
    "boot_id" / Bytes(16),
    "pid" / Int64ub,
    "process_start" / Int64ub,
    "started" / Int64ub,
    "intent" / Int32ub,
    "region_bits" / Int32ub,
    "oldest" / Int64ub,
    "log" / Int64ub,
    "image_device" / Int64ub,
    "image_inode" / Int64ub,
    "image_mtime" / Int64ub,
    "image_size" / Int64ub,
    "live_size" / Int32ub,
    "log_size" / Int32ub,
)
PEER = Structure("peer", "uuid" / Bytes(16), "name_size" / Int32ub, "store_size" / Int32ub)
CHECKPOINT_NAME = Structure("checkpoint", "length" / Int32ub)
WINDOW = Structure("window", "began" / Int64ub, "ended" / Int64ub, "flags" / Int32ub, "reserved" / Int32ub)
OPEN = 2**64 - 1  # a window that has not ended
WINDOW_BUSY = 1 << 0

INTENT_OFF = 0
INTENT_REGION = 1

CONTROL_MAGIC = b"DMLCTRLC"
CONTROL = Structure(
    "control file",
    "magic" / Bytes(8),
    "uuid" / Bytes(16),
    "poisoned" / Int64un,
    "current" / Int64un,
    "heartbeat" / Int64un,
    "event" / Int64un,
    "in_flight" / Int64un,
    "bare" / Int64un,
    "writes" / Int64un,
    "logged" / Int64un,
    "image_device" / Int64un,
    "image_inode" / Int64un,
    "clock" / Int64un,
)
WRITESET_MAGIC = b"DMLBITS1"
WRITESET = Structure(
    "writeset",
    "magic" / Bytes(8),
    "uuid" / Bytes(16),
    "number" / Int64un,
    "size" / Int64un,
    "granularity_bits" / Int64un,
)

LOG_MAGIC = b"DML\xfb"
LOG_VERSION = 1
LOG = Structure(
    "intent log",
    "magic" / Bytes(4),
    "version" / Int32ub,
    "uuid" / Bytes(16),
    "intent" / Int32ub,
    "region_bits" / Int32ub,
    "regions" / Int64ub,
    "checksum" / Int32ub,
)
BEAT = Structure("beat", "time" / Int64ub, "reserved" / Int32ub, "checksum" / Int32ub)
BEATS = (PAGE, PAGE + 512)  # where they are, used in turn
TALLY = Structure("tally", "number" / Int64ub, "count" / Int32ub, "checksum" / Int32ub)
TALLIES = (PAGE + 1024, PAGE + 1536)  # where they are: for logs of even number, and of odd
AREAS = 2 * PAGE  # where the first area begins
LOG_RECORD = Structure("logged region", "region" / Int32ub, "checksum" / Int32ub)
_SEED = Structure("log seed", "uuid" / Bytes(16), "number" / Int64ub)

MIN_REGION_BITS = 20
MAX_REGION_BITS = 63
MAX_REGIONS = 1 << 20
DEFAULT_REGIONS = 2048  # a disk has at most that many, unless it is told otherwise, and at least half of them
MAX_INTERVALS = 1 << 14  # that are not saved whole
MAX_LOG = (1 << 62) - 1  # the number of a log that a session may name
MAX_PATH = 4096


@dataclass(frozen=True, slots=True)
class Session:
    """A tracker's session, as a namespace's record has it.

    Attributes:
        uuid: of the session, 16 bytes.
        boot_id: of the boot it began in, 16 bytes.
        pid, process_start: the process; the second is in clock ticks since boot, as in /proc/PID/stat.
        started: when, ns since 1970.
        intent: `INTENT_REGION` or `INTENT_OFF`.
        region_bits: log2 of bytes of the disk for each region of the log.
        oldest: intervals before it are saved whole.
        log: logs before it are void.
        image_device, image_inode, image_mtime, image_size: what the image looked like when it began.
        live: the folder of the live files, raw bytes.
        log_path: of the intent log, raw bytes.
    """

    uuid: bytes
    boot_id: bytes
    pid: int
    process_start: int
    started: int
    intent: int
    region_bits: int
    oldest: int
    log: int
    image_device: int
    image_inode: int
    image_mtime: int
    image_size: int
    live: bytes
    log_path: bytes


# Stands for one that cannot be read: no process, and paths that no file can have.
LOST = b""  # the data of a session that is known to be lost, which cannot be read either
NO_SESSION = Session(bytes(16), bytes(16), 0, 0, 0, INTENT_OFF, MIN_REGION_BITS, 0, 0, 0, 0, 0, 0, b"\0", b"\0")
_NUMBERS = tuple(field.name for field in SESSION.fields if not field.name.endswith(("live_size", "log_size")))


def build_session(session: Session) -> bytes:
    """The data of the record extension."""
    numbers = {name: getattr(session, name) for name in _NUMBERS}
    head = SESSION.build(**numbers, live_size=len(session.live), log_size=len(session.log_path))
    return head + session.live + session.log_path


def parse_session(data: bytes) -> Session:
    """The session of a record.

    Raises:
        ValueError: says what is wrong with it.
    """
    if len(data) < SESSION.size:
        raise ValueError(f"{len(data)} bytes are too few for a session")
    raw = SESSION.parse(data)
    if SESSION.size + raw.live_size + raw.log_size != len(data) or max(raw.live_size, raw.log_size) > MAX_PATH:
        raise ValueError("its paths do not fit it")
    if raw.intent not in (INTENT_OFF, INTENT_REGION):
        raise ValueError(f"intent {raw.intent} is unknown")
    if not MIN_REGION_BITS <= raw.region_bits <= MAX_REGION_BITS:
        raise ValueError(f"region_bits {raw.region_bits} is outside {MIN_REGION_BITS}..{MAX_REGION_BITS}")
    live = data[SESSION.size : SESSION.size + raw.live_size]
    log_path = data[SESSION.size + raw.live_size :]
    if b"\0" in live + log_path:
        raise ValueError("a path contains a NUL byte")
    return Session(**{name: getattr(raw, name) for name in _NUMBERS}, live=live, log_path=log_path)


@dataclass(frozen=True, slots=True)
class Peer:
    """The other namespace of a session: a device's root, or the device that is tracked with a node.

    Attributes:
        uuid: of the namespace, 16 bytes.
        name: of the node or device, raw bytes.
        store: the path of the store that has its record, raw bytes; empty: the same store.
    """

    uuid: bytes
    name: bytes
    store: bytes


def build_peer(peer: Peer) -> bytes:
    """The data of the record extension."""
    head = PEER.build(uuid=peer.uuid, name_size=len(peer.name), store_size=len(peer.store))
    return head + peer.name + peer.store


def parse_peer(data: bytes) -> Peer:
    """The peer in a record.

    Raises:
        ValueError: says what is wrong with it.
    """
    if len(data) < PEER.size:
        raise ValueError(f"{len(data)} bytes are too few for a peer")
    raw = PEER.parse(data)
    middle = PEER.size + raw.name_size
    if middle + raw.store_size != len(data) or raw.store_size > MAX_PATH:
        raise ValueError("its name and path do not fit it")
    if b"\0" in data[PEER.size :]:
        raise ValueError("a name or path contains a NUL byte")
    return Peer(raw.uuid, data[PEER.size : middle], data[middle:])


def build_checkpoints(names: Iterable[bytes]) -> bytes:
    """The data of the record extension that says which bitmaps are checkpoints, oldest first."""
    return b"".join(CHECKPOINT_NAME.build(length=len(name)) + name for name in names)


def parse_checkpoints(data: bytes) -> Iterator[bytes]:
    """The names of the checkpoints, oldest first.

    Raises:
        ValueError: a length leads outside.
    """
    at = 0
    while at < len(data):
        body = at + CHECKPOINT_NAME.size
        end = body + (CHECKPOINT_NAME.parse(data, at).length if body <= len(data) else 1)
        if end > len(data):
            raise ValueError(f"the checkpoint at {at} ends past the list's {len(data)} bytes")
        yield data[body:end]
        at = end


def region_bits(size: int) -> int:
    """log2 of the region size that suits a disk of ``size`` bytes."""
    bits = MIN_REGION_BITS
    while size >> bits > DEFAULT_REGIONS:
        bits += 1
    return bits


def area_offset(regions: int, number: int) -> int:
    """Where the records of log ``number`` begin."""
    return AREAS + number % 2 * geometry.align_up(regions * LOG_RECORD.size, PAGE)


def log_bytes(regions: int) -> int:
    """How long an intent log is."""
    return area_offset(regions, 1) + area_offset(regions, 1) - AREAS


def record_seed(uuid: bytes, number: int) -> int:
    """What the checksums of a log's records begin with, so that those of other logs and sessions are void."""
    return int(crc32c.crc32c(_SEED.build(uuid=uuid, number=number)))


def log_seed_head(uuid: bytes, high: int) -> int:
    """The checksum that `record_seed` has reached before the low 32 bits of the log's number, of these high ones."""
    return int(crc32c.crc32c(_SEED.build(uuid=uuid, number=high << 32)[:-4]))


def build_log_record(seed: int, region: int) -> bytes:
    """One logged region."""
    return LOG_RECORD.build(region=region, checksum=crc32c.crc32c(region.to_bytes(4, "big"), seed))


def build_log(uuid: bytes, intent: int, bits: int, regions: int) -> bytes:
    """The header of an intent log."""
    fields = {"magic": LOG_MAGIC, "version": LOG_VERSION, "uuid": uuid, "intent": intent}
    bare = LOG.build(**fields, region_bits=bits, regions=regions, checksum=0)[:-4]
    return bare + int(crc32c.crc32c(bare)).to_bytes(4, "big")


def build_beat(uuid: bytes, time: int) -> bytes:
    """A sign of life: a time, ns since 1970."""
    bare = BEAT.build(time=time, reserved=0, checksum=0)[:-4]
    return bare + int(crc32c.crc32c(bare, crc32c.crc32c(uuid))).to_bytes(4, "big")


def parse_beat(uuid: bytes, data: bytes) -> int:
    """Its time, or 0 where it is not whole."""
    if len(data) < BEAT.size or crc32c.crc32c(data[: BEAT.size - 4], crc32c.crc32c(uuid)) != BEAT.parse(data).checksum:
        return 0
    return int(BEAT.parse(data).time)


@dataclass(frozen=True, slots=True)
class Tally:
    """How many records of a log were durable when it was written: the log's ``number``, and their ``count``."""

    number: int
    count: int


def build_tally(uuid: bytes, number: int, count: int) -> bytes:
    """The bytes of a tally of the session with that UUID."""
    bare = TALLY.build(number=number, count=count, checksum=0)[:-4]
    return bare + int(crc32c.crc32c(b"tally" + uuid + bare)).to_bytes(4, "big")


def parse_tally(uuid: bytes, data: bytes) -> Tally | None:
    """A tally of the session with that UUID, or None where it is not whole."""
    raw = TALLY.parse(data)
    if build_tally(uuid, raw.number, raw.count) != data:
        return None
    return Tally(raw.number, raw.count)
