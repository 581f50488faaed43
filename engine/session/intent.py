"""The intent log: which regions of the disk may have been written to since the last save, durable before the write.

Two areas, used in turn by logs of rising number. A record's checksum begins with the session and the log's number, so
records of an older log in the same area are void without being wiped, and a new log is durable by existing: rotation
writes nothing. The store's commit says which is the oldest log that counts.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass

from dirtmap.engine.system.file import open_file, remove_file, sync_folder
from dirtmap.fmt import geometry, live
from dirtmap.fmt.errors import Error, StorageError
from dirtmap.fmt.structures.live import (
    BEAT,
    LOG,
    build_beat,
    build_log,
    build_log_record,
    parse_beat,
    parse_log_records,
    record_seed,
)

_OWNER = 1 << 40  # the byte that the tracker locks for as long as it lives; behind any log


class _Log:
    """A log while records go to it. ``places`` are what is free in its area: each is given out once, by a step of C.

    So whatever comes in between, say a mark in a signal's handler, no record is written over.
    """

    __slots__ = ("number", "places", "seed")

    def __init__(self, uuid: bytes, number: int) -> None:
        self.number, self.seed, self.places = number, record_seed(uuid, number), itertools.count()


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
            StorageError: they could not be written, or there is no room before the next save.
        """
        log = self._log
        records = [(next(log.places), build_log_record(log.seed, region)) for region in regions]
        if records and records[-1][0] >= self._regions:  # some were written twice, since a mark was interrupted
            raise StorageError(self.path, "the log is full until the next save")
        area = live.area_offset(self._regions, log.number)
        if records and records[-1][0] - records[0][0] < len(records):  # as a rule they are adjacent
            self._file.write(area + records[0][0] * live.LOG_RECORD_SIZE, b"".join(data for _, data in records))
        else:
            for place, data in records:
                self._file.write(area + place * live.LOG_RECORD_SIZE, data)
        self._file.sync()

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
    """What a log says: the ``regions`` in it, and when its tracker last showed a sign of life, ns since 1970."""

    regions: frozenset[int]
    beat: int


def read_log(session: live.Session, size: int) -> Logged | None:
    """What the log of a session says; None where it cannot be relied on."""
    regions = geometry.ceil_div(size, 1 << session.region_bits)
    expected = build_log(session.uuid, session.intent, session.region_bits, regions)
    if regions > live.MAX_REGIONS:
        return None
    try:
        with open_file(os.fsdecode(session.log_path)) as file:
            if file.read(0, LOG.size) != expected:
                return None
            found: set[int] = set()
            for number in (session.log, session.log + 1):
                data = file.read_exactly(live.area_offset(regions, number), regions * live.LOG_RECORD_SIZE)
                found.update(parse_log_records(data, record_seed(session.uuid, number)))
            beats = [parse_beat(session.uuid, file.read(at, BEAT.size)) for at in live.BEATS]
    except Error:
        return None
    return Logged(frozenset(region for region in found if region < regions), max(beats))


def remove_log(session: live.Session) -> None:
    """Removes the log of a session that has ended; nothing where that path is anything else."""
    try:
        with open_file(os.fsdecode(session.log_path)) as file:
            mine = (
                file.read(0, LOG.size)[: LOG.field("intent").offset]
                == build_log(session.uuid, session.intent, session.region_bits, 0)[: LOG.field("intent").offset]
            )
    except Error:
        return
    if mine:
        remove_file(os.fsdecode(session.log_path))


def is_held(session: live.Session) -> bool | None:
    """True while the tracker that made the log has it open, in whichever process namespace; None where it is gone."""
    try:
        with open_file(os.fsdecode(session.log_path)) as file:
            return file.locked_by_other(_OWNER)
    except Error:
        return None
