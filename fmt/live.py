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

from dataclasses import dataclass

from dirtmap.fmt.geometry import align_up
from dirtmap.fmt.identity import NO_IDENTITY, Identity

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
