"""The intent log: which regions of the disk may have been written to since the last save, durable before the write.

The file has two areas, which logs of rising number use in turn. The checksum of a record begins with the session and
the number of the log. So records of an older log in the same area are void without being wiped, and to begin the next
log nothing needs to be written. The store's commit says which is the oldest log that counts.

This is what a log looks like, whenever its writer stops. The writer gives each region one place, one after another, and
writes the records in the order of their places: those of one sector, then a sync, then those of the next sector. A
sector is written whole or not at all. So on disk a log of *k* records has them in its first *k* places, each region
once, and nothing after them. An exception, or a write that fails, leaves no gap either: the next record is written
together with all records before it that are not known to be durable.

After the *k* records the area has what it had before: the records of the newest older log that was long enough, and
zeros if none was. So from one place to the next the number of a record's log never rises:

    log 4 has 3 records, log 2 had 5, log 0 had 4    | 4 | 4 | 4 | 2 | 2 | zeros ...

This order can be checked, because the checksum of a record, together with its region, gives the number of the log
(`_numbers`). A writer that stops never breaks the order, so what breaks it is damage:

- a record of another session, or of a log that is still to come;
- a record after zeros, or after a record of an older log;
- a region that is twice in one log.

Then it is not known what the log had, and it counts as lost. A flipped bit changes the number to one above 2^26, so it
is always seen in logs of lower numbers.

A log that lacks its last sectors looks like one that was stopped earlier. So each area has a *tally*: how many records
were durable when the tally was written. It is written after each record, and not synced by itself. A log with fewer
records is damaged. Until a later sync has made the tally durable, the loss of the last records is not seen.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from dirtmap.engine.system.file import File, open_file, remove_file, sync_folder
from dirtmap.fmt import geometry, live
from dirtmap.fmt.digest import crc32c_after
from dirtmap.fmt.errors import Error
from dirtmap.fmt.live import (
    build_beat,
    build_log,
    build_log_record,
    build_tally,
    log_seed_head,
    parse_beat,
    parse_tally,
    record_seed,
)
from dirtmap.fmt.parsers.live import BEAT, LOG, TALLY

_SUFFIXES = ".intent", ".2.intent"
_OWNER = 1 << 40  # the byte that the tracker locks for as long as it lives; no log is that long
_PER_SECTOR = 512 // live.LOG_RECORD_SIZE
# CRC32C a byte at a time: what each low byte of the state adds, and which low byte left that top byte behind.
_ADDED = np.array([crc32c_after(0xFFFFFFFF, bytes([byte])) ^ 0xFFFFFFFF for byte in range(256)], np.uint32)
_LOW_BYTE = np.argsort(_ADDED >> 24).astype(np.uint32)


class _Log:
    """A log while records are added to it.

    Attributes:
        number: of the log.
        seed: of the checksums of its records.
        regions: those that have a place, in the order of their places. Every change of it is one call into C, which
            nothing interrupts. So even if a signal's handler marks, no region gets two places, and no place two
            regions.
        durable: how many of the first places are durable.
    """

    __slots__ = ("durable", "number", "regions", "seed")

    def __init__(self, uuid: bytes, number: int) -> None:
        self.number, self.seed = number, record_seed(uuid, number)
        self.regions: dict[int, None] = {}
        self.durable = 0

    def missing(self) -> tuple[int, list[int]]:
        """The first place that is not known to be durable, and the regions from there on."""
        while True:
            first, end = self.durable, len(self.regions)
            try:
                found = list(islice(reversed(self.regions), end - first))
            except RuntimeError:  # a signal's handler has added some meanwhile
                continue
            if end == len(self.regions):
                return first, found[::-1]


class IntentLog:
    """The log of a tracker, as the tracker itself uses it.

    Raises:
        StorageError: it cannot be made.
    """

    def __init__(self, path: str, uuid: bytes, intent: int, region_bits: int, size: int) -> None:
        self.path, self._uuid = path, uuid
        self._regions = geometry.ceil_div(size, 1 << region_bits)
        self._log, self._beat = _Log(uuid, 0), 0
        remove_file(path)  # a crash may have left one, before its session was in the store
        self._file = open_file(path, writable=True, create=True)
        try:
            self._file.lock_alone(_OWNER)
            self._file.write(0, build_log(uuid, intent, region_bits, self._regions).ljust(live.PAGE, b"\0"))
            # The whole file is written now, so that logging a region later needs no space and changes no file length.
            for offset in range(live.PAGE, live.log_bytes(self._regions), live.PAGE):
                self._file.write(offset, bytes(live.PAGE))
            self._file.sync()
            sync_folder(path)
        except BaseException:
            self._file.close()
            remove_file(path)
            raise

    @property
    def number(self) -> int:
        """The number of the log to which records are added now."""
        return self._log.number

    def append(self, regions: list[int]) -> None:
        """Adds regions to the log. On return they are durable.

        Args:
            regions: numbers of regions that are not in this log yet.

        Raises:
            SyncError: it is not known whether they are durable.
            StorageError: they could not be written.
        """
        log = self._log
        log.regions.update(dict.fromkeys(regions))
        first, missing = log.missing()
        area = live.area_offset(self._regions, log.number)
        while missing:
            part = missing[: _PER_SECTOR - first % _PER_SECTOR]
            data = b"".join(build_log_record(log.seed, region) for region in part)
            if log is not self._log:
                # A signal's handler has begun the next log, and this area may belong to a later one. The caller makes
                # the mark again.
                return
            self._file.write(area + first * live.LOG_RECORD_SIZE, data)
            self._file.sync()
            first, missing = first + len(part), missing[len(part) :]
            log.durable = max(log.durable, first)
        self._file.write(live.TALLIES[log.number % 2], build_tally(self._uuid, log.number, log.durable))

    def rotate(self) -> None:
        """Begins the next log, which is empty. Records are added to it from now on.

        It uses the area of the log before the present one. The caller has seen to it that that one does not count any
        more.
        """
        self._log = _Log(self._uuid, self._log.number + 1)

    def beat(self, time: int) -> None:
        """Makes a heartbeat durable: a time, ns since 1970. Errors as `append`."""
        self._file.write(live.BEATS[self._beat], build_beat(self._uuid, time))
        self._beat = 1 - self._beat
        self._file.sync()

    def close(self, *, remove: bool) -> None:
        """Gives up the lock. With ``remove``, removes the file as well, because its session has ended."""
        if remove:
            remove_file(self.path)
        self._file.close()


@dataclass(frozen=True, slots=True)
class Logged:
    """What was read from a log.

    Attributes:
        regions: numbers of the regions in it; None if it is damaged.
        beat: the last durable heartbeat of its tracker, ns since 1970.
    """

    regions: frozenset[int] | None
    beat: int


def read_log(session: live.Session, size: int) -> Logged | None:
    """Reads the log of a session on a disk of ``size`` bytes; None if there is no log of that session."""
    regions = geometry.ceil_div(size, 1 << session.region_bits)
    if regions > live.MAX_REGIONS or session.log > live.MAX_LOG:
        return None
    expected = build_log(session.uuid, session.intent, session.region_bits, regions)
    try:
        with open_file(os.fsdecode(session.log_path)) as file:
            if file.read(0, LOG.size) != expected:
                return None
            logs = [_read_area(file, session.uuid, regions, number) for number in (session.log, session.log + 1)]
            beats = [parse_beat(session.uuid, file.read(at, BEAT.size)) for at in live.BEATS]
    except Error:
        return None
    found = None if None in logs else frozenset().union(*(log for log in logs if log is not None))
    return Logged(found, max(beats))


def _read_area(file: File, uuid: bytes, regions: int, number: int) -> list[int] | None:
    """The regions in log ``number``, which is the newest in its area; None if it is damaged.

    Raises:
        StorageError: the file ends before the end of the area.
    """
    data = file.read_exactly(live.area_offset(regions, number), regions * live.LOG_RECORD_SIZE)
    logs, nothing = _numbers(data, uuid, number), np.frombuffer(data, np.uint64) == 0
    sound = (logs <= number) & ((logs ^ number) & 1 == 0)
    logs[nothing & (logs != number)] = -1  # zeros can be a record, too
    if not bool(np.all(sound | nothing)) or bool(np.any(logs[1:] > logs[:-1])):
        return None
    count = int(np.count_nonzero(logs == number))
    found: list[int] = np.frombuffer(data, ">u4", 2 * count)[::2].tolist()
    if max(found, default=0) >= regions or len(set(found)) < count:
        return None
    tally = file.read_exactly(live.TALLIES[number % 2], TALLY.size)
    if tally != bytes(len(tally)):  # zeros: none was written yet
        last = parse_tally(uuid, tally)
        if last is None or last.number > number or (last.number == number and last.count > count):
            return None
    return found


def _numbers(data: bytes, uuid: bytes, number: int) -> NDArray[np.int64]:
    """The number of the log of each record: int64, shape (records,).

    The upper half of all numbers is taken to be that of ``number``.

    A record's checksum is the CRC of a seed, then of two words: the lower half of the log's number, and the region.
    A CRC can be computed backwards. From the checksum and the region follows the state between the two words; from that
    and the state before the first word follows the first word. By this, any eight bytes are a record of some number,
    but seldom of one that exists.
    """
    fields = np.frombuffer(data, "<u4")
    checksums, regions = fields[1::2].byteswap(), fields[::2]
    high = number >> 32
    start = log_seed_head(uuid, high) ^ 0xFFFFFFFF
    words = _back(_back(~checksums) ^ regions) ^ np.uint32(start)
    return words.byteswap().astype(np.int64) + (high << 32)


def _back(states: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The states that CRC32C had four bytes earlier, if those bytes were zeros."""
    for _ in range(4):
        low = _LOW_BYTE[states >> 24]
        states = (states ^ _ADDED[low]) << 8 | low
    return states


def path_of(stem: str) -> str:
    """The path of a session's first log."""
    return f"{stem}{_SUFFIXES[0]}"


def other_path(path: str) -> str:
    """The path of the log that follows the one at ``path`` when the disk grows; that of the next one is ``path``."""
    first, second = _SUFFIXES
    return path.removesuffix(second) + first if path.endswith(second) else path.removesuffix(first) + second


def remove_log(session: live.Session) -> None:
    """Removes the logs of a session that has ended. Removes nothing if another file is at such a path.

    There may be another beside the one that it names, where its tracker died while the disk grew.
    """
    path = os.fsdecode(session.log_path)
    for each in (path, other_path(path)):
        _remove_log_at(each, session)


def _remove_log_at(path: str, session: live.Session) -> None:
    try:
        with open_file(path) as file:
            mine = (
                file.read(0, LOG.size)[: LOG.field("intent").offset]
                == build_log(session.uuid, session.intent, session.region_bits, 0)[: LOG.field("intent").offset]
            )
    except Error:
        return
    if mine:
        remove_file(path)


def is_held(session: live.Session) -> bool | None:
    """True while the tracker that made the log has it open, in whichever PID namespace; None if the log is gone."""
    try:
        with open_file(os.fsdecode(session.log_path)) as file:
            return file.locked_by_other(_OWNER)
    except Error:
        return None
