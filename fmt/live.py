"""What a tracker keeps: its session in the store, live files on tmpfs, and an intent log beside the store.

    store    in the namespace's record: SESSION, its paths, PEER; in each directory entry: WINDOW, behind the checksum
    tmpfs    control: CONTROL | DESCRIPTORs | path of the log | SLOTs with FLIGHTs | two areas of logged regions
             bits: ARENA | WRITESET, bits | WRITESET, bits | ...: buffers, in use for an interval each, or free
             markers: ARENA; its bytes are locked, and it is never mapped
    disk     LOG | beats, tallies | a page of logs 0, 2, ... | a page of logs 1, 3, ... | a page of logs 0, 2, ... | ...

What is stored on disk is big-endian, as in the store. Live files never leave the machine, so their numbers are in its
own byte order; `engine/tracking/marking.h` has them as atomic words. Bits are packed with the least
significant first. The structures are in `dirtmap.fmt.structures.live`. Source of every rule: SPEC.md, "The live path".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from dirtmap.fmt.digest import crc32c, crc32c_after
from dirtmap.fmt.geometry import align_up
from dirtmap.fmt.identity import NO_IDENTITY, Identity
from dirtmap.fmt.parsers.live import (
    BEAT,
    CHECKPOINT_NAME,
    CHECKPOINT_TIME,
    CHECKPOINT_TIMES,
    FLIGHT,
    LOG,
    LOG_RECORD,
    LOG_SEED,
    PEER,
    SESSION,
    SLOT,
    TALLY,
)
from dirtmap.fmt.store import build_identity, parse_identity

PAGE = 4096
OPEN = 2**64 - 1  # `ended` of a window that has not ended
WINDOW_BUSY = 1 << 0  # flag of a window: the bitmap is taken for a backup

INTENT_OFF = 0
INTENT_REGION = 1

CONTROL_MAGIC = b"DMLCTRL2"
CONTROL_ORDER = 0x0102030405060708
CONTROL_VERSION = 1
ARENA_MAGIC = b"DMLARENA"
MARKERS_MAGIC = b"DMLMARKS"
WRITESET_MAGIC = b"DMLBITS1"
MACHINES = {"x86_64": 62, "aarch64": 183}  # ELF's e_machine: atomics of another machine are others
DESCRIPTORS = PAGE  # offsets in `control`
LOG_PATH = 3 * PAGE
SLOTS = 4 * PAGE
LOGGED = SLOTS + 512 * 1024
CONTROL_BYTES = LOGGED + 2 * (1 << 17)
MAX_DESCRIPTORS = 256
MAX_SLOTS = 512
MAX_FLIGHTS = 28  # of a slot
SLOT_SIZE = SLOT.size + MAX_FLIGHTS * FLIGHT.size
ENDED = 1 << 32  # a reason why marks are refused that is no errno: the session has ended
ORPHAN = 1 << 63  # of a flight's interval: nobody will end it
KEEPER = 4096  # bytes of `markers` that are locked: the keeper's, and that of who closes the gate
GATE = 4097
PATIENCE_NS = 10_000_000_000  # for so long a write waits at the gate

LOG_MAGIC = b"DML\xfb"
LOG_VERSION = 1
BEATS = (PAGE, PAGE + 512)  # offsets of the two heartbeats in the log, which are written in turn
TALLIES = (PAGE + 1024, PAGE + 1536)  # offsets of the tallies in the log: for logs of even number, and of odd
RECORDS = 2 * PAGE  # offset of the first record in the log
LOG_RECORD_SIZE = 8  # bytes of a logged region
PER_PAGE = PAGE // LOG_RECORD_SIZE

MIN_REGION_BITS = 20
MAX_REGION_BITS = 63
MAX_REGIONS = 1 << 20
DEFAULT_REGIONS = 2048  # the most regions of a disk by default; a large disk has at least half as many
MAX_INTERVALS = 256  # the most that a session may have and not have saved whole
MAX_LOG = (1 << 62) - 1  # the largest number of a log that a session may name
MAX_PATH = 4096
SESSION_VERSION = 1  # of the record's extension; another is newer software's
_OTHERS = {"version", "reserved", "image", "live_size", "log_size"}


@dataclass(frozen=True, slots=True)
class Session:
    """A tracker's session, as it stands in the record of a namespace.

    Attributes:
        uuid: of the session, 16 bytes.
        boot_id: of the boot in which the session began, 16 bytes.
        pid: of the tracker's process.
        process_start: when that process began, in clock ticks since boot, as in /proc/PID/stat.
        started: when the session began, in nanoseconds since 1970.
        intent: `INTENT_REGION` or `INTENT_OFF`.
        region_bits: log2 of the size of a region of the log, in bytes of the disk.
        oldest: number of the oldest interval that may not be wholly saved yet.
        log: number of the oldest log whose records count.
        image: the identity of the file that guests write to, as it was when the session began.
        live: path of the folder with the live files, raw bytes.
        log_path: path of the intent log, raw bytes.
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
    image: Identity
    live: bytes
    log_path: bytes


LOST = b""  # data of a session that is known to be lost; it does not parse, so `NO_SESSION` stands for it
# Stands for a session that cannot be parsed. It has no process, and its paths are such that no file can have them.
NO_SESSION = Session(bytes(16), bytes(16), 0, 0, 0, INTENT_OFF, MIN_REGION_BITS, 0, 0, NO_IDENTITY, b"\0", b"\0")


@dataclass(frozen=True, slots=True)
class Peer:
    """The other namespace of a session: a device's root, or the device that is tracked with a node.

    Attributes:
        uuid: of that namespace, 16 bytes.
        name: of that node or device, raw bytes.
        store: path of the store that has its record, raw bytes; empty if it is the same store.
    """

    uuid: bytes
    name: bytes
    store: bytes


def region_bits(size: int) -> int:
    """Returns log2 of the default region size (bytes) for a disk of ``size`` bytes."""
    bits = MIN_REGION_BITS
    while size >> bits > DEFAULT_REGIONS:
        bits += 1
    return bits


def record_offset(region: int, number: int) -> int:
    """Returns where the record of a region in log ``number`` is, in bytes from the start of the file.

    A page has records of logs of even number, or of odd number, only. So the file can be made longer.
    """
    return RECORDS + (2 * (region // PER_PAGE) + number % 2) * PAGE + region % PER_PAGE * LOG_RECORD_SIZE


def log_bytes(regions: int) -> int:
    """Returns the length of an intent log in bytes."""
    return record_offset(align_up(regions, PER_PAGE), 0)


@dataclass(frozen=True, slots=True)
class Tally:
    """How many records of a log were durable when it was written: the log's ``number``, and their ``count``."""

    number: int
    count: int


_NUMBERS = tuple(field.name for field in SESSION.fields if field.name not in _OTHERS)
_SESSION_UUID = SESSION.field("uuid")
_SESSION_VERSION = SESSION.field("version")


def build_session(session: Session) -> bytes:
    """Returns the data of the record extension with the session."""
    numbers: dict[str, Any] = {name: getattr(session, name) for name in _NUMBERS}
    sizes: dict[str, Any] = {"live_size": len(session.live), "log_size": len(session.log_path)}
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


def build_checkpoint_times(checkpoints: bytes, times: Iterable[int]) -> bytes:
    """Returns the data of the record extension that says when the checkpoints began.

    Args:
        checkpoints: the data of the extension that lists them.
        times: of each, in their order, in nanoseconds since 1970; 0 where it is not known, and for a break.
    """
    head = CHECKPOINT_TIMES.build(checksum=crc32c(checkpoints), reserved=0)
    return head + b"".join(CHECKPOINT_TIME.build(time=time) for time in times)


def parse_checkpoint_times(checkpoints: bytes, data: bytes) -> list[int]:
    """Returns when the checkpoints began, as `build_checkpoint_times` has it.

    An empty list if it says that of another list of them: software that does not know these times has changed that.
    """
    if len(data) < CHECKPOINT_TIMES.size or CHECKPOINT_TIMES.parse(data).checksum != crc32c(checkpoints):
        return []
    ends = range(CHECKPOINT_TIMES.size, len(data) - CHECKPOINT_TIME.size + 1, CHECKPOINT_TIME.size)
    return [CHECKPOINT_TIME.parse(data, at).time for at in ends]


def record_seed(uuid: bytes, number: int) -> int:
    """Returns the CRC32C with which the checksums of a log's records begin.

    It makes the records of other logs and sessions void.
    """
    return crc32c(LOG_SEED.build(uuid=uuid, number=number))


def log_seed_head(uuid: bytes, high: int) -> int:
    """Returns what `record_seed` has reached before the low 32 bits of the log's number, of these high 32 bits."""
    return crc32c(LOG_SEED.build(uuid=uuid, number=high << 32)[:-4])


def build_log_record(seed: int, region: int) -> bytes:
    """Returns the record that logs a region, by its number. ``seed`` is the log's `record_seed`."""
    return LOG_RECORD.build(region=region, checksum=crc32c_after(seed, region.to_bytes(4, "big")))


def build_log(uuid: bytes, intent: int, bits: int, regions: int) -> bytes:
    """Returns the header of an intent log. ``bits`` is log2 of the region size in bytes."""
    fields: dict[str, Any] = {"magic": LOG_MAGIC, "version": LOG_VERSION, "uuid": uuid, "intent": intent}
    body = LOG.build(**fields, region_bits=bits, regions=regions, checksum=0)[:-4]
    return body + crc32c(body).to_bytes(4, "big")


def build_beat(uuid: bytes, time: int) -> bytes:
    """Returns a heartbeat with that time, in nanoseconds since 1970."""
    body = BEAT.build(time=time, reserved=0, checksum=0)[:-4]
    return body + crc32c_after(crc32c(uuid), body).to_bytes(4, "big")


def parse_beat(uuid: bytes, data: bytes) -> int:
    """Returns the time of a heartbeat, in nanoseconds since 1970, or 0 if it is not wholly written."""
    if len(data) < BEAT.size or crc32c_after(crc32c(uuid), data[: BEAT.size - 4]) != BEAT.parse(data).checksum:
        return 0
    return int(BEAT.parse(data).time)


def build_tally(uuid: bytes, number: int, count: int) -> bytes:
    """Returns a tally of the session with that UUID: so many records of log ``number`` are durable."""
    body = TALLY.build(number=number, count=count, checksum=0)[:-4]
    return body + crc32c(b"tally" + uuid + body).to_bytes(4, "big")


def parse_tally(uuid: bytes, data: bytes) -> Tally | None:
    """Returns a tally of the session with that UUID, or None if it is not wholly written."""
    raw = TALLY.parse(data)
    if build_tally(uuid, raw.number, raw.count) != data:
        return None
    return Tally(raw.number, raw.count)
