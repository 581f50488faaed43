"""What a tracker keeps: its session in the store, the live files on tmpfs, and the intent log beside the store.

    store    record: SESSION, paths; PEER  directory entries: WINDOW behind the checksum in the extra data
    tmpfs    control                    writeset-0, writeset-1, ...: one for each interval between two cuts
    disk     LOG | beats | area 0: records of logs 0, 2, ... | area 1: records of logs 1, 3, ...

What lies on a disk is big-endian as the store is. Live files never leave the machine: their numbers are in its own
byte order, each field written by one store of 8 aligned bytes. Bits are least significant first in each byte.
Source of every rule: SPEC.md, "The live path".
"""

from __future__ import annotations

from dataclasses import dataclass

from dirtmap.fmt.geometry import align_up

PAGE = 4096
OPEN = 2**64 - 1  # a window that has not ended
WINDOW_BUSY = 1 << 0

INTENT_OFF = 0
INTENT_REGION = 1

CONTROL_MAGIC = b"DMLCTRL1"
WRITESET_MAGIC = b"DMLBITS1"

LOG_MAGIC = b"DML\xfb"
LOG_VERSION = 1
BEATS = (PAGE, PAGE + 512)  # where they are, used in turn
AREAS = 2 * PAGE  # where the first area begins
LOG_RECORD_SIZE = 8  # bytes of a logged region

MIN_REGION_BITS = 20
MAX_REGION_BITS = 63
MAX_REGIONS = 1 << 20
DEFAULT_REGIONS = 2048  # a disk has at most that many, unless it is told otherwise, and at least half of them
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


def region_bits(size: int) -> int:
    """log2 of the region size that suits a disk of ``size`` bytes."""
    bits = MIN_REGION_BITS
    while size >> bits > DEFAULT_REGIONS:
        bits += 1
    return bits


def area_offset(regions: int, number: int) -> int:
    """Where the records of log ``number`` begin."""
    return AREAS + number % 2 * align_up(regions * LOG_RECORD_SIZE, PAGE)


def log_bytes(regions: int) -> int:
    """How long an intent log is."""
    return area_offset(regions, 1) + area_offset(regions, 1) - AREAS
