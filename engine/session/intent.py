"""The intent log: which regions of the disk may have been written to since the last save, durable before the write.

Two areas, used in turn by logs of rising number. A record's checksum begins with the session and the log's number, so
records of an older log in the same area are void without being wiped, and a new log is durable by existing: rotation
writes nothing. The store's commit says which is the oldest log that counts.

What a log looks like, whenever its writer stops. The writer gives out places one after another, each region one place,
and writes records in the order of their places: those of one sector, then a sync, then those of the next. A sector is
written whole or not at all. So on disk a log of *k* records has them in its first *k* places, each region once, and
nothing behind them. An exception in the middle of that, or a write that failed, leaves no gap either: the next record
is written together with all those before it that are not known to be durable. What lies behind the *k* records is what
the area had before: the records of the newest older log that came so far, and zeros where none has. So from one place
to the next the number of a record's log never rises:

    log 4 has 3 records, log 2 had 5, log 0 had 4    | 4 | 4 | 4 | 2 | 2 | zeros ...

A record's checksum, with the region, gives away the number of its log (`_numbers`), so that order can be seen. What
breaks it was not left by a writer that stopped, but is damage: a record that is none of this session, or of a log that
has yet to come; one behind zeros, or behind one of an older log; a region twice in one log. Then nothing is known of
what the log had, and it counts as lost. A flipped bit changes the number to one above 2^26, so it is always seen in
logs of numbers below that.

A log that lacks its last sectors looks like one that was stopped earlier. So there is a *tally* for each area: how many
records were durable when it was written, which is after each record, without a sync of its own. A log with fewer is
damaged. Until the tally has reached the disk, which a later sync sees to, the loss of the last records is not seen.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import islice

import crc32c
import numpy as np
from numpy.typing import NDArray

from dirtmap.engine.system.file import File, open_file, remove_file, sync_folder
from dirtmap.fmt import geometry, live
from dirtmap.fmt.errors import Error
from dirtmap.fmt.structures.live import (
    BEAT,
    LOG,
    TALLY,
    build_beat,
    build_log,
    build_log_record,
    build_tally,
    log_seed_head,
    parse_beat,
    parse_tally,
    record_seed,
)

_SUFFIXES = ".intent", ".2.intent"
_OWNER = 1 << 40  # the byte that the tracker locks for as long as it lives; behind any log
_PER_SECTOR = 512 // live.LOG_RECORD_SIZE
# CRC32C a byte at a time: what each low byte of the state adds, and which low byte left that top byte behind.
_ADDED = np.array([crc32c.crc32c(bytes([byte]), 0xFFFFFFFF) ^ 0xFFFFFFFF for byte in range(256)], np.uint32)
_LOW_BYTE = np.argsort(_ADDED >> 24).astype(np.uint32)


class _Log:
    """A log while records go to it.

    Attributes:
        number: of the log.
        seed: of its records' checksums.
        regions: those that have a place, in the order of their places. Each step on it is one of C: whatever comes in
            between, say a mark in a signal's handler, no region gets two places, and no place two regions.
        durable: so many of the first places are.
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
            except RuntimeError:  # a handler has added some in between
                continue
            if end == len(self.regions):
                return first, found[::-1]


class IntentLog:
    """A tracker's own log.

    Raises:
        StorageError: it cannot be made.
    """

    def __init__(self, path: str, uuid: bytes, intent: int, region_bits: int, size: int) -> None:
        self.path, self._uuid = path, uuid
        self._regions = geometry.ceil_div(size, 1 << region_bits)
        self._log, self._beat = _Log(uuid, 0), 0
        remove_file(path)  # what a crash left before its session was in the store
        self._file = open_file(path, writable=True, create=True)
        try:
            self._file.lock_alone(_OWNER)
            self._file.write(0, build_log(uuid, intent, region_bits, self._regions).ljust(live.PAGE, b"\0"))
            # All of it now, so that logging a region later needs no room and no change of the file's length.
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
        """Of the log that records go to now."""
        return self._log.number

    def append(self, regions: list[int]) -> None:
        """Returns once those regions, which are not in this log yet, are durable.

        Raises:
            SyncError: it is not known whether they are.
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
                return  # a handler has begun the next log: the mark is made again, and its area may be another's
            self._file.write(area + first * live.LOG_RECORD_SIZE, data)
            self._file.sync()
            first, missing = first + len(part), missing[len(part) :]
            log.durable = max(log.durable, first)
        self._file.write(live.TALLIES[log.number % 2], build_tally(self._uuid, log.number, log.durable))

    def rotate(self) -> None:
        """From here on records go to the next log, which is empty.

        It takes the place of the one before last, which the caller knows to be void.
        """
        self._log = _Log(self._uuid, self._log.number + 1)

    def beat(self, time: int) -> None:
        """Makes a sign of life durable: a time, ns since 1970. Errors as `append`."""
        self._file.write(live.BEATS[self._beat], build_beat(self._uuid, time))
        self._beat = 1 - self._beat
        self._file.sync()

    def close(self, *, remove: bool) -> None:
        """Gives up the lock, and the file with it where its session has ended."""
        if remove:
            remove_file(self.path)
        self._file.close()


@dataclass(frozen=True, slots=True)
class Logged:
    """What a log says.

    Attributes:
        regions: that are in it; None where it is damaged.
        beat: when its tracker last showed a sign of life, ns since 1970.
    """

    regions: frozenset[int] | None
    beat: int


def read_log(session: live.Session, size: int) -> Logged | None:
    """What the log of a session says, of a disk of ``size`` bytes; None where there is none of that session."""
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
    """The regions in log ``number``, of whose area it is the newest; None where it is damaged.

    Raises:
        StorageError: the file ends before them.
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
    if tally != bytes(len(tally)):  # else none was written yet
        last = parse_tally(uuid, tally)
        if last is None or last.number > number or (last.number == number and last.count > count):
            return None
    return found


def _numbers(data: bytes, uuid: bytes, number: int) -> NDArray[np.int64]:
    """Of which log each record is, in numbers from that multiple of 2^32 on that is at or below ``number``.

    A checksum is reached from the seed over two words: the low half of the log's number, and the region. CRC can be
    taken back word by word, so the checksum and the region give the state between the two, and that and the state
    before both the number. Any eight bytes are a record of some number in that way; few of them of one that exists.
    """
    fields = np.frombuffer(data, "<u4")
    checksums, regions = fields[1::2].byteswap(), fields[::2]
    high = number >> 32
    start = log_seed_head(uuid, high) ^ 0xFFFFFFFF
    words = _back(_back(~checksums) ^ regions) ^ np.uint32(start)
    return words.byteswap().astype(np.int64) + (high << 32)


def _back(states: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The states of CRC32C four zero bytes before."""
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
    """Removes the logs of a session that has ended; nothing where a path is anything else.

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
    """True while the tracker that made the log has it open, in whichever process namespace; None where it is gone."""
    try:
        with open_file(os.fsdecode(session.log_path)) as file:
            return file.locked_by_other(_OWNER)
    except Error:
        return None
