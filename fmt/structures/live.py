"""The structures of a tracker: its session in the store, its live files, its intent log."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import crc32c
from construct import Bytes, Int32ub, Int32un, Int64ub, Int64un

from dirtmap.fmt.live import (
    INTENT_OFF,
    INTENT_REGION,
    LOG_MAGIC,
    LOG_VERSION,
    MAX_FLIGHTS,
    MAX_PATH,
    MAX_REGION_BITS,
    MIN_REGION_BITS,
    SESSION_VERSION,
    Peer,
    Session,
    Tally,
)
from dirtmap.fmt.structure import Structure
from dirtmap.fmt.structures.store import FILE_IDENTITY, build_identity, parse_identity

SESSION = Structure(
    "session",
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
    "image" / Bytes(FILE_IDENTITY.size),
    "live_size" / Int32ub,
    "log_size" / Int32ub,
)
PEER = Structure("peer", "uuid" / Bytes(16), "name_size" / Int32ub, "store_size" / Int32ub)
CHECKPOINT_NAME = Structure("checkpoint", "length" / Int32ub)
WINDOW = Structure("window", "began" / Int64ub, "ended" / Int64ub, "flags" / Int32ub, "reserved" / Int32ub)
CONTROL = Structure(
    "control file",
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
DESCRIPTOR = Structure(
    "descriptor", "interval" / Int64un, "offset" / Int64un, "granularity_bits" / Int64un, "bytes" / Int64un
)
SLOT = Structure(
    "slot",
    "seen" / Int64un,
    "logging" / Int64un,
    "event" / Int64un,
    "bare" / Int64un,
    "writes" / Int64un,
    "reserved" / Bytes(88),
)
FLIGHT = Structure("flight", "start" / Int64un, "end" / Int64un, "interval" / Int64un, "thread" / Int64un)
SLOT_SIZE = SLOT.size + MAX_FLIGHTS * FLIGHT.size
ARENA = Structure("arena", "magic" / Bytes(8), "uuid" / Bytes(16))
WRITESET = Structure(
    "writeset",
    "magic" / Bytes(8),
    "uuid" / Bytes(16),
    "number" / Int64un,
    "size" / Int64un,
    "granularity_bits" / Int64un,
    "room" / Int64un,
)
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
TALLY = Structure("tally", "number" / Int64ub, "count" / Int32ub, "checksum" / Int32ub)
LOG_RECORD = Structure("logged region", "region" / Int32ub, "checksum" / Int32ub)
_SEED = Structure("log seed", "uuid" / Bytes(16), "number" / Int64ub)
_OTHERS = {"version", "reserved", "image", "live_size", "log_size"}
_NUMBERS = tuple(field.name for field in SESSION.fields if field.name not in _OTHERS)
_SESSION_UUID = SESSION.field("uuid")
_SESSION_VERSION = SESSION.field("version")


def build_session(session: Session) -> bytes:
    """Returns the data of the record extension with the session."""
    numbers = {name: getattr(session, name) for name in _NUMBERS}
    sizes = {"live_size": len(session.live), "log_size": len(session.log_path)}
    image = build_identity(session.image)
    head = SESSION.build(version=SESSION_VERSION, reserved=0, **numbers, image=image, **sizes)
    return head + session.live + session.log_path


def session_version(data: bytes) -> int | None:
    """Returns the version of the session in the data of a record extension; None where that is lost."""
    if len(data) < _SESSION_VERSION.offset + _SESSION_VERSION.size:
        return None
    return int.from_bytes(data[_SESSION_VERSION.offset :][: _SESSION_VERSION.size], "big")


def session_uuid(data: bytes) -> bytes:
    """Returns the UUID of the session in the data of a record extension, as far as it is there."""
    return data[_SESSION_UUID.offset :][: _SESSION_UUID.size]


def parse_session(data: bytes) -> Session:
    """Returns the session in the data of a record extension. What a later version has put behind it is ignored.

    Raises:
        ValueError: it is not sound; the message says why.
    """
    if len(data) < SESSION.size:
        raise ValueError(f"{len(data)} bytes are too few for a session")
    raw = SESSION.parse(data)
    if SESSION.size + raw.live_size + raw.log_size > len(data) or max(raw.live_size, raw.log_size) > MAX_PATH:
        raise ValueError("its paths do not fit it")
    if raw.version != SESSION_VERSION:
        raise ValueError(f"version {raw.version} is not {SESSION_VERSION}")
    if raw.intent not in (INTENT_OFF, INTENT_REGION):
        raise ValueError(f"intent {raw.intent} is unknown")
    if not MIN_REGION_BITS <= raw.region_bits <= MAX_REGION_BITS:
        raise ValueError(f"region_bits {raw.region_bits} is outside {MIN_REGION_BITS}..{MAX_REGION_BITS}")
    live = data[SESSION.size : SESSION.size + raw.live_size]
    log_path = data[SESSION.size + raw.live_size :][: raw.log_size]
    if b"\0" in live + log_path:
        raise ValueError("a path contains a NUL byte")
    numbers = {name: getattr(raw, name) for name in _NUMBERS}
    return Session(**numbers, image=parse_identity(raw.image), live=live, log_path=log_path)


def build_peer(peer: Peer) -> bytes:
    """Returns the data of the record extension with the peer."""
    head = PEER.build(uuid=peer.uuid, name_size=len(peer.name), store_size=len(peer.store))
    return head + peer.name + peer.store


def parse_peer(data: bytes) -> Peer:
    """Returns the peer in the data of a record extension.

    Raises:
        ValueError: it is not sound; the message says why.
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
    """Returns the data of the record extension that lists the checkpoints, oldest first."""
    return b"".join(CHECKPOINT_NAME.build(length=len(name)) + name for name in names)


def parse_checkpoints(data: bytes) -> Iterator[bytes]:
    """Yields the names of the checkpoints in the data of a record extension, oldest first.

    Raises:
        ValueError: a name ends outside the data.
    """
    at = 0
    while at < len(data):
        body = at + CHECKPOINT_NAME.size
        end = body + (CHECKPOINT_NAME.parse(data, at).length if body <= len(data) else 1)
        if end > len(data):
            raise ValueError(f"the checkpoint at {at} ends past the list's {len(data)} bytes")
        yield data[body:end]
        at = end


def record_seed(uuid: bytes, number: int) -> int:
    """Returns the CRC32C with which the checksums of a log's records begin.

    It makes the records of other logs and sessions void.
    """
    return int(crc32c.crc32c(_SEED.build(uuid=uuid, number=number)))


def log_seed_head(uuid: bytes, high: int) -> int:
    """Returns what `record_seed` has reached before the low 32 bits of the log's number, of these high 32 bits."""
    return int(crc32c.crc32c(_SEED.build(uuid=uuid, number=high << 32)[:-4]))


def build_log_record(seed: int, region: int) -> bytes:
    """Returns the record that logs a region, by its number. ``seed`` is the log's `record_seed`."""
    return LOG_RECORD.build(region=region, checksum=crc32c.crc32c(region.to_bytes(4, "big"), seed))


def build_log(uuid: bytes, intent: int, bits: int, regions: int) -> bytes:
    """Returns the header of an intent log. ``bits`` is log2 of the region size in bytes."""
    fields = {"magic": LOG_MAGIC, "version": LOG_VERSION, "uuid": uuid, "intent": intent}
    body = LOG.build(**fields, region_bits=bits, regions=regions, checksum=0)[:-4]
    return body + int(crc32c.crc32c(body)).to_bytes(4, "big")


def build_beat(uuid: bytes, time: int) -> bytes:
    """Returns a heartbeat with that time, in nanoseconds since 1970."""
    body = BEAT.build(time=time, reserved=0, checksum=0)[:-4]
    return body + int(crc32c.crc32c(body, crc32c.crc32c(uuid))).to_bytes(4, "big")


def parse_beat(uuid: bytes, data: bytes) -> int:
    """Returns the time of a heartbeat, in nanoseconds since 1970, or 0 if it is not wholly written."""
    if len(data) < BEAT.size or crc32c.crc32c(data[: BEAT.size - 4], crc32c.crc32c(uuid)) != BEAT.parse(data).checksum:
        return 0
    return int(BEAT.parse(data).time)


def build_tally(uuid: bytes, number: int, count: int) -> bytes:
    """Returns a tally of the session with that UUID: so many records of log ``number`` are durable."""
    body = TALLY.build(number=number, count=count, checksum=0)[:-4]
    return body + int(crc32c.crc32c(b"tally" + uuid + body)).to_bytes(4, "big")


def parse_tally(uuid: bytes, data: bytes) -> Tally | None:
    """Returns a tally of the session with that UUID, or None if it is not wholly written."""
    raw = TALLY.parse(data)
    if build_tally(uuid, raw.number, raw.count) != data:
        return None
    return Tally(raw.number, raw.count)
