"""What a tracker keeps: its session in the store, live files on tmpfs, and an intent log beside the store.

    store    in the namespace's record: SESSION, its paths, PEER; in each directory entry: WINDOW, behind the checksum
    tmpfs    control; writeset-0, writeset-1, ...: one for each interval between two cuts
    disk     LOG | beats, tallies | area 0: records of logs 0, 2, ... | area 1: records of logs 1, 3, ...

What is stored on disk is big-endian, as in the store. Live files never leave the machine, so their numbers are in its
own byte order; each field has 8 aligned bytes and is written by one store instruction. Bits are packed with the least
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

CONTROL_MAGIC = b"DMLCTRLC"
WRITESET_MAGIC = b"DMLBITS1"

LOG_MAGIC = b"DML\xfb"
LOG_VERSION = 1
BEATS = (PAGE, PAGE + 512)  # offsets of the two heartbeats in the log, which are written in turn
TALLIES = (PAGE + 1024, PAGE + 1536)  # offsets of the tallies in the log: for logs of even number, and of odd
AREAS = 2 * PAGE  # offset of the first area of records in the log
LOG_RECORD_SIZE = 8  # bytes of a logged region

MIN_REGION_BITS = 20
MAX_REGION_BITS = 63
MAX_REGIONS = 1 << 20
DEFAULT_REGIONS = 2048  # the most regions of a disk by default; a large disk has at least half as many
MAX_INTERVALS = 1 << 14  # the most that a session may have and not have saved whole
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


def area_offset(regions: int, number: int) -> int:
    """Returns where the records of log ``number`` begin, in bytes from the start of a log with so many regions."""
    return AREAS + number % 2 * align_up(regions * LOG_RECORD_SIZE, PAGE)


def log_bytes(regions: int) -> int:
    """Returns the length of an intent log in bytes."""
    return area_offset(regions, 1) + area_offset(regions, 1) - AREAS


@dataclass(frozen=True, slots=True)
class Tally:
    """How many records of a log were durable when it was written: the log's ``number``, and their ``count``."""

    number: int
    count: int
