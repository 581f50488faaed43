"""How the structures of `dirtmap.fmt.structures.live` are parsed and built.

Made by `make parsers`: do not edit.
"""

from __future__ import annotations

from struct import Struct

from dirtmap.fmt.structure import Field, Structure

_session = Struct(">LL16s16sQQQLLQQ56sLL")


class RawSession:
    """The fields of a structure: session."""

    __slots__ = (
        "version",
        "reserved",
        "uuid",
        "boot_id",
        "pid",
        "process_start",
        "started",
        "intent",
        "region_bits",
        "oldest",
        "log",
        "image",
        "live_size",
        "log_size",
    )

    def __init__(
        self,
        version: int,
        reserved: int,
        uuid: bytes,
        boot_id: bytes,
        pid: int,
        process_start: int,
        started: int,
        intent: int,
        region_bits: int,
        oldest: int,
        log: int,
        image: bytes,
        live_size: int,
        log_size: int,
    ) -> None:
        self.version = version
        self.reserved = reserved
        self.uuid = uuid
        self.boot_id = boot_id
        self.pid = pid
        self.process_start = process_start
        self.started = started
        self.intent = intent
        self.region_bits = region_bits
        self.oldest = oldest
        self.log = log
        self.image = image
        self.live_size = live_size
        self.log_size = log_size


def _build_session(
    *,
    version: int,
    reserved: int,
    uuid: bytes,
    boot_id: bytes,
    pid: int,
    process_start: int,
    started: int,
    intent: int,
    region_bits: int,
    oldest: int,
    log: int,
    image: bytes,
    live_size: int,
    log_size: int,
) -> bytes:
    if len(uuid) != 16:
        raise ValueError(f"session.uuid: {len(uuid)} bytes, not 16")
    if len(boot_id) != 16:
        raise ValueError(f"session.boot_id: {len(boot_id)} bytes, not 16")
    if len(image) != 56:
        raise ValueError(f"session.image: {len(image)} bytes, not 56")
    return _session.pack(
        version,
        reserved,
        uuid,
        boot_id,
        pid,
        process_start,
        started,
        intent,
        region_bits,
        oldest,
        log,
        image,
        live_size,
        log_size,
    )


SESSION = Structure(
    "session",
    _session,
    RawSession,
    _build_session,
    Field("version", 0, 4),
    Field("reserved", 4, 4),
    Field("uuid", 8, 16),
    Field("boot_id", 24, 16),
    Field("pid", 40, 8),
    Field("process_start", 48, 8),
    Field("started", 56, 8),
    Field("intent", 64, 4),
    Field("region_bits", 68, 4),
    Field("oldest", 72, 8),
    Field("log", 80, 8),
    Field("image", 88, 56),
    Field("live_size", 144, 4),
    Field("log_size", 148, 4),
)

_peer = Struct(">16sLL")


class RawPeer:
    """The fields of a structure: peer."""

    __slots__ = (
        "uuid",
        "name_size",
        "store_size",
    )

    def __init__(
        self,
        uuid: bytes,
        name_size: int,
        store_size: int,
    ) -> None:
        self.uuid = uuid
        self.name_size = name_size
        self.store_size = store_size


def _build_peer(
    *,
    uuid: bytes,
    name_size: int,
    store_size: int,
) -> bytes:
    if len(uuid) != 16:
        raise ValueError(f"peer.uuid: {len(uuid)} bytes, not 16")
    return _peer.pack(
        uuid,
        name_size,
        store_size,
    )


PEER = Structure(
    "peer",
    _peer,
    RawPeer,
    _build_peer,
    Field("uuid", 0, 16),
    Field("name_size", 16, 4),
    Field("store_size", 20, 4),
)

_checkpoint_name = Struct(">L")


class RawCheckpointName:
    """The fields of a structure: checkpoint."""

    __slots__ = ("length",)

    def __init__(
        self,
        length: int,
    ) -> None:
        self.length = length


def _build_checkpoint_name(
    *,
    length: int,
) -> bytes:
    return _checkpoint_name.pack(
        length,
    )


CHECKPOINT_NAME = Structure(
    "checkpoint",
    _checkpoint_name,
    RawCheckpointName,
    _build_checkpoint_name,
    Field("length", 0, 4),
)

_checkpoint_times = Struct(">LL")


class RawCheckpointTimes:
    """The fields of a structure: checkpoint times."""

    __slots__ = (
        "checksum",
        "reserved",
    )

    def __init__(
        self,
        checksum: int,
        reserved: int,
    ) -> None:
        self.checksum = checksum
        self.reserved = reserved


def _build_checkpoint_times(
    *,
    checksum: int,
    reserved: int,
) -> bytes:
    return _checkpoint_times.pack(
        checksum,
        reserved,
    )


CHECKPOINT_TIMES = Structure(
    "checkpoint times",
    _checkpoint_times,
    RawCheckpointTimes,
    _build_checkpoint_times,
    Field("checksum", 0, 4),
    Field("reserved", 4, 4),
)

_checkpoint_time = Struct(">Q")


class RawCheckpointTime:
    """The fields of a structure: checkpoint time."""

    __slots__ = ("time",)

    def __init__(
        self,
        time: int,
    ) -> None:
        self.time = time


def _build_checkpoint_time(
    *,
    time: int,
) -> bytes:
    return _checkpoint_time.pack(
        time,
    )


CHECKPOINT_TIME = Structure(
    "checkpoint time",
    _checkpoint_time,
    RawCheckpointTime,
    _build_checkpoint_time,
    Field("time", 0, 8),
)

_window = Struct(">QQLL")


class RawWindow:
    """The fields of a structure: window."""

    __slots__ = (
        "began",
        "ended",
        "flags",
        "reserved",
    )

    def __init__(
        self,
        began: int,
        ended: int,
        flags: int,
        reserved: int,
    ) -> None:
        self.began = began
        self.ended = ended
        self.flags = flags
        self.reserved = reserved


def _build_window(
    *,
    began: int,
    ended: int,
    flags: int,
    reserved: int,
) -> bytes:
    return _window.pack(
        began,
        ended,
        flags,
        reserved,
    )


WINDOW = Structure(
    "window",
    _window,
    RawWindow,
    _build_window,
    Field("began", 0, 8),
    Field("ended", 8, 8),
    Field("flags", 16, 4),
    Field("reserved", 20, 4),
)

_control = Struct("=8sQLL16s16sQQQQ40sQQ112sQQQQQQQQ")


class RawControl:
    """The fields of a structure: control file."""

    __slots__ = (
        "magic",
        "order",
        "machine",
        "version",
        "uuid",
        "image_filesystem",
        "image_inode",
        "image_birth",
        "region_bits",
        "intent",
        "reserved1",
        "state",
        "gate",
        "reserved2",
        "size",
        "recycled",
        "high",
        "reason",
        "heartbeat",
        "event",
        "clock",
        "patience",
    )

    def __init__(
        self,
        magic: bytes,
        order: int,
        machine: int,
        version: int,
        uuid: bytes,
        image_filesystem: bytes,
        image_inode: int,
        image_birth: int,
        region_bits: int,
        intent: int,
        reserved1: bytes,
        state: int,
        gate: int,
        reserved2: bytes,
        size: int,
        recycled: int,
        high: int,
        reason: int,
        heartbeat: int,
        event: int,
        clock: int,
        patience: int,
    ) -> None:
        self.magic = magic
        self.order = order
        self.machine = machine
        self.version = version
        self.uuid = uuid
        self.image_filesystem = image_filesystem
        self.image_inode = image_inode
        self.image_birth = image_birth
        self.region_bits = region_bits
        self.intent = intent
        self.reserved1 = reserved1
        self.state = state
        self.gate = gate
        self.reserved2 = reserved2
        self.size = size
        self.recycled = recycled
        self.high = high
        self.reason = reason
        self.heartbeat = heartbeat
        self.event = event
        self.clock = clock
        self.patience = patience


def _build_control(
    *,
    magic: bytes,
    order: int,
    machine: int,
    version: int,
    uuid: bytes,
    image_filesystem: bytes,
    image_inode: int,
    image_birth: int,
    region_bits: int,
    intent: int,
    reserved1: bytes,
    state: int,
    gate: int,
    reserved2: bytes,
    size: int,
    recycled: int,
    high: int,
    reason: int,
    heartbeat: int,
    event: int,
    clock: int,
    patience: int,
) -> bytes:
    if len(magic) != 8:
        raise ValueError(f"control file.magic: {len(magic)} bytes, not 8")
    if len(uuid) != 16:
        raise ValueError(f"control file.uuid: {len(uuid)} bytes, not 16")
    if len(image_filesystem) != 16:
        raise ValueError(f"control file.image_filesystem: {len(image_filesystem)} bytes, not 16")
    if len(reserved1) != 40:
        raise ValueError(f"control file.reserved1: {len(reserved1)} bytes, not 40")
    if len(reserved2) != 112:
        raise ValueError(f"control file.reserved2: {len(reserved2)} bytes, not 112")
    return _control.pack(
        magic,
        order,
        machine,
        version,
        uuid,
        image_filesystem,
        image_inode,
        image_birth,
        region_bits,
        intent,
        reserved1,
        state,
        gate,
        reserved2,
        size,
        recycled,
        high,
        reason,
        heartbeat,
        event,
        clock,
        patience,
    )


CONTROL = Structure(
    "control file",
    _control,
    RawControl,
    _build_control,
    Field("magic", 0, 8),
    Field("order", 8, 8),
    Field("machine", 16, 4),
    Field("version", 20, 4),
    Field("uuid", 24, 16),
    Field("image_filesystem", 40, 16),
    Field("image_inode", 56, 8),
    Field("image_birth", 64, 8),
    Field("region_bits", 72, 8),
    Field("intent", 80, 8),
    Field("reserved1", 88, 40),
    Field("state", 128, 8),
    Field("gate", 136, 8),
    Field("reserved2", 144, 112),
    Field("size", 256, 8),
    Field("recycled", 264, 8),
    Field("high", 272, 8),
    Field("reason", 280, 8),
    Field("heartbeat", 288, 8),
    Field("event", 296, 8),
    Field("clock", 304, 8),
    Field("patience", 312, 8),
)

_descriptor = Struct("=QQQQ")


class RawDescriptor:
    """The fields of a structure: descriptor."""

    __slots__ = (
        "interval",
        "offset",
        "granularity_bits",
        "bytes",
    )

    def __init__(
        self,
        interval: int,
        offset: int,
        granularity_bits: int,
        bytes: int,
    ) -> None:
        self.interval = interval
        self.offset = offset
        self.granularity_bits = granularity_bits
        self.bytes = bytes


def _build_descriptor(
    *,
    interval: int,
    offset: int,
    granularity_bits: int,
    bytes: int,
) -> bytes:
    return _descriptor.pack(
        interval,
        offset,
        granularity_bits,
        bytes,
    )


DESCRIPTOR = Structure(
    "descriptor",
    _descriptor,
    RawDescriptor,
    _build_descriptor,
    Field("interval", 0, 8),
    Field("offset", 8, 8),
    Field("granularity_bits", 16, 8),
    Field("bytes", 24, 8),
)

_slot = Struct("=QQQQQ88s")


class RawSlot:
    """The fields of a structure: slot."""

    __slots__ = (
        "seen",
        "logging",
        "event",
        "bare",
        "writes",
        "reserved",
    )

    def __init__(
        self,
        seen: int,
        logging: int,
        event: int,
        bare: int,
        writes: int,
        reserved: bytes,
    ) -> None:
        self.seen = seen
        self.logging = logging
        self.event = event
        self.bare = bare
        self.writes = writes
        self.reserved = reserved


def _build_slot(
    *,
    seen: int,
    logging: int,
    event: int,
    bare: int,
    writes: int,
    reserved: bytes,
) -> bytes:
    if len(reserved) != 88:
        raise ValueError(f"slot.reserved: {len(reserved)} bytes, not 88")
    return _slot.pack(
        seen,
        logging,
        event,
        bare,
        writes,
        reserved,
    )


SLOT = Structure(
    "slot",
    _slot,
    RawSlot,
    _build_slot,
    Field("seen", 0, 8),
    Field("logging", 8, 8),
    Field("event", 16, 8),
    Field("bare", 24, 8),
    Field("writes", 32, 8),
    Field("reserved", 40, 88),
)

_flight = Struct("=QQQQ")


class RawFlight:
    """The fields of a structure: flight."""

    __slots__ = (
        "start",
        "end",
        "interval",
        "thread",
    )

    def __init__(
        self,
        start: int,
        end: int,
        interval: int,
        thread: int,
    ) -> None:
        self.start = start
        self.end = end
        self.interval = interval
        self.thread = thread


def _build_flight(
    *,
    start: int,
    end: int,
    interval: int,
    thread: int,
) -> bytes:
    return _flight.pack(
        start,
        end,
        interval,
        thread,
    )


FLIGHT = Structure(
    "flight",
    _flight,
    RawFlight,
    _build_flight,
    Field("start", 0, 8),
    Field("end", 8, 8),
    Field("interval", 16, 8),
    Field("thread", 24, 8),
)

_arena = Struct(">8s16s")


class RawArena:
    """The fields of a structure: arena."""

    __slots__ = (
        "magic",
        "uuid",
    )

    def __init__(
        self,
        magic: bytes,
        uuid: bytes,
    ) -> None:
        self.magic = magic
        self.uuid = uuid


def _build_arena(
    *,
    magic: bytes,
    uuid: bytes,
) -> bytes:
    if len(magic) != 8:
        raise ValueError(f"arena.magic: {len(magic)} bytes, not 8")
    if len(uuid) != 16:
        raise ValueError(f"arena.uuid: {len(uuid)} bytes, not 16")
    return _arena.pack(
        magic,
        uuid,
    )


ARENA = Structure(
    "arena",
    _arena,
    RawArena,
    _build_arena,
    Field("magic", 0, 8),
    Field("uuid", 8, 16),
)

_writeset = Struct("=8s16sQQQQ")


class RawWriteset:
    """The fields of a structure: writeset."""

    __slots__ = (
        "magic",
        "uuid",
        "number",
        "size",
        "granularity_bits",
        "room",
    )

    def __init__(
        self,
        magic: bytes,
        uuid: bytes,
        number: int,
        size: int,
        granularity_bits: int,
        room: int,
    ) -> None:
        self.magic = magic
        self.uuid = uuid
        self.number = number
        self.size = size
        self.granularity_bits = granularity_bits
        self.room = room


def _build_writeset(
    *,
    magic: bytes,
    uuid: bytes,
    number: int,
    size: int,
    granularity_bits: int,
    room: int,
) -> bytes:
    if len(magic) != 8:
        raise ValueError(f"writeset.magic: {len(magic)} bytes, not 8")
    if len(uuid) != 16:
        raise ValueError(f"writeset.uuid: {len(uuid)} bytes, not 16")
    return _writeset.pack(
        magic,
        uuid,
        number,
        size,
        granularity_bits,
        room,
    )


WRITESET = Structure(
    "writeset",
    _writeset,
    RawWriteset,
    _build_writeset,
    Field("magic", 0, 8),
    Field("uuid", 8, 16),
    Field("number", 24, 8),
    Field("size", 32, 8),
    Field("granularity_bits", 40, 8),
    Field("room", 48, 8),
)

_log = Struct(">4sL16sLLQL")


class RawLog:
    """The fields of a structure: intent log."""

    __slots__ = (
        "magic",
        "version",
        "uuid",
        "intent",
        "region_bits",
        "regions",
        "checksum",
    )

    def __init__(
        self,
        magic: bytes,
        version: int,
        uuid: bytes,
        intent: int,
        region_bits: int,
        regions: int,
        checksum: int,
    ) -> None:
        self.magic = magic
        self.version = version
        self.uuid = uuid
        self.intent = intent
        self.region_bits = region_bits
        self.regions = regions
        self.checksum = checksum


def _build_log(
    *,
    magic: bytes,
    version: int,
    uuid: bytes,
    intent: int,
    region_bits: int,
    regions: int,
    checksum: int,
) -> bytes:
    if len(magic) != 4:
        raise ValueError(f"intent log.magic: {len(magic)} bytes, not 4")
    if len(uuid) != 16:
        raise ValueError(f"intent log.uuid: {len(uuid)} bytes, not 16")
    return _log.pack(
        magic,
        version,
        uuid,
        intent,
        region_bits,
        regions,
        checksum,
    )


LOG = Structure(
    "intent log",
    _log,
    RawLog,
    _build_log,
    Field("magic", 0, 4),
    Field("version", 4, 4),
    Field("uuid", 8, 16),
    Field("intent", 24, 4),
    Field("region_bits", 28, 4),
    Field("regions", 32, 8),
    Field("checksum", 40, 4),
)

_beat = Struct(">QLL")


class RawBeat:
    """The fields of a structure: beat."""

    __slots__ = (
        "time",
        "reserved",
        "checksum",
    )

    def __init__(
        self,
        time: int,
        reserved: int,
        checksum: int,
    ) -> None:
        self.time = time
        self.reserved = reserved
        self.checksum = checksum


def _build_beat(
    *,
    time: int,
    reserved: int,
    checksum: int,
) -> bytes:
    return _beat.pack(
        time,
        reserved,
        checksum,
    )


BEAT = Structure(
    "beat",
    _beat,
    RawBeat,
    _build_beat,
    Field("time", 0, 8),
    Field("reserved", 8, 4),
    Field("checksum", 12, 4),
)

_tally = Struct(">QLL")


class RawTally:
    """The fields of a structure: tally."""

    __slots__ = (
        "number",
        "count",
        "checksum",
    )

    def __init__(
        self,
        number: int,
        count: int,
        checksum: int,
    ) -> None:
        self.number = number
        self.count = count
        self.checksum = checksum


def _build_tally(
    *,
    number: int,
    count: int,
    checksum: int,
) -> bytes:
    return _tally.pack(
        number,
        count,
        checksum,
    )


TALLY = Structure(
    "tally",
    _tally,
    RawTally,
    _build_tally,
    Field("number", 0, 8),
    Field("count", 8, 4),
    Field("checksum", 12, 4),
)

_log_record = Struct(">LL")


class RawLogRecord:
    """The fields of a structure: logged region."""

    __slots__ = (
        "region",
        "checksum",
    )

    def __init__(
        self,
        region: int,
        checksum: int,
    ) -> None:
        self.region = region
        self.checksum = checksum


def _build_log_record(
    *,
    region: int,
    checksum: int,
) -> bytes:
    return _log_record.pack(
        region,
        checksum,
    )


LOG_RECORD = Structure(
    "logged region",
    _log_record,
    RawLogRecord,
    _build_log_record,
    Field("region", 0, 4),
    Field("checksum", 4, 4),
)

_log_seed = Struct(">16sQ")


class RawLogSeed:
    """The fields of a structure: log seed."""

    __slots__ = (
        "uuid",
        "number",
    )

    def __init__(
        self,
        uuid: bytes,
        number: int,
    ) -> None:
        self.uuid = uuid
        self.number = number


def _build_log_seed(
    *,
    uuid: bytes,
    number: int,
) -> bytes:
    if len(uuid) != 16:
        raise ValueError(f"log seed.uuid: {len(uuid)} bytes, not 16")
    return _log_seed.pack(
        uuid,
        number,
    )


LOG_SEED = Structure(
    "log seed",
    _log_seed,
    RawLogSeed,
    _build_log_seed,
    Field("uuid", 0, 16),
    Field("number", 16, 8),
)
