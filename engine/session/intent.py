"""The intent log: which regions of the disk may have been written to since the last save, durable before the write.

Each region has a place of its own for logs of even number, and another one for logs of odd number, which are used in
turn. So whoever logs a region, in whichever process, writes to the same place as everybody else, and the same bytes: no
places are given out, and the log is never full. The checksum of a record begins with the session and the number of the
log. So records of an older log in the same places are void without being wiped, and to begin the next log nothing needs
to be written. The store's commit says which is the oldest log that counts.

So a place has zeros, or a record of its own region, of a log of that parity, and of no later one than whoever reads it
knows. The checksum of a record, together with its region, gives the number of the log (`_numbers`), so this can be
checked; what is otherwise is damage. Then it is not known what the log had, and it counts as lost. A flipped bit makes
the number one above 2^26, so it is always seen in logs of lower numbers.

A log that lacks records looks like one that was stopped earlier. So there is a *tally* for each parity: how many
records were durable when the tally was written. It is written after the records, and not synced by itself. A log with
fewer records is damaged. Until a later sync has made the tally durable, the loss of the last records is not seen.

Markers write the records: see `engine/tracking/marking.h`. The tracker makes the file, lengthens it and adds
heartbeats.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dirtmap.engine.system.file import open_file, remove_file, sync_folder
from dirtmap.fmt import geometry, live
from dirtmap.fmt.digest import crc32c_after
from dirtmap.fmt.errors import Error, GoneError, LockedError
from dirtmap.fmt.live import (
    build_beat,
    build_log,
    log_seed_head,
    parse_beat,
    parse_tally,
)
from dirtmap.fmt.parsers.live import BEAT, LOG, TALLY

_SUFFIX = ".intent"
# The byte that the tracker locks for as long as it lives; every marker has a shared lock on the next. Logs are shorter.
_OWNER = 1 << 40
# CRC32C a byte at a time: what each low byte of the state adds, and which low byte left that top byte behind.
_ADDED = np.array([crc32c_after(0xFFFFFFFF, bytes([byte])) ^ 0xFFFFFFFF for byte in range(256)], np.uint32)
_LOW_BYTE = np.argsort(_ADDED >> 24).astype(np.uint32)


class IntentLog:
    """The log of a tracker, as the tracker itself uses it.

    Args:
        path: of the file.
        uuid: of the session, 16 bytes.
        intent, region_bits: as in the session.
        size: of the disk, bytes.
        adopt: takes over what a dead tracker has left, with all records; else it is made anew.

    Raises:
        LockedError: the tracker that has it lives.
        GoneError: that session has ended.
        StorageError: it cannot be made.
    """

    def __init__(
        self, path: str, uuid: bytes, intent: int, region_bits: int, size: int, *, adopt: bool = False
    ) -> None:
        self.path, self._uuid, self._intent, self._region_bits = path, uuid, intent, region_bits
        if not adopt:
            remove_file(path)  # a crash may have left one, before its session was in the store
        self._file = open_file(path, writable=True, create=not adopt)
        self._next_beat = 0
        try:
            if not self._file.lock_alone(_OWNER) and adopt:
                raise LockedError(path, "its tracker lives")
            if adopt and self._file.read(LOG.field("uuid").offset, 16) != uuid:
                raise GoneError(path, "the log of another session")
            if not adopt:
                self._lengthen(0, size)
                self._write_header(size)
                self._file.sync()
                sync_folder(path)
        except BaseException:
            self._file.close()
            if not adopt:
                remove_file(path)
            raise

    def grow(self, size: int) -> None:
        """Gives the file the places for a disk of ``size`` bytes. Errors as `File.write` and `File.sync`."""
        self._lengthen(self._file.size(), size)
        self._file.sync()
        self._write_header(size)  # one sector: it tells of the places once they are durable
        self._file.sync()

    def _lengthen(self, at: int, size: int) -> None:
        # All of it is written now, so that logging a region later needs no space and changes no file length.
        for offset in range(at, live.log_bytes(self._regions(size)), live.PAGE):
            self._file.write(offset, bytes(live.PAGE))

    def _write_header(self, size: int) -> None:
        self._file.write(0, build_log(self._uuid, self._intent, self._region_bits, self._regions(size)))

    def _regions(self, size: int) -> int:
        return geometry.ceil_div(size, 1 << self._region_bits)

    def write(self, offset: int, data: bytes) -> None:
        """Writes records or a tally, for the marker. Errors as `File.write`."""
        self._file.write(offset, data)

    def sync(self) -> None:
        """Makes them durable. Errors as `File.sync`."""
        self._file.sync()

    def beat(self, time: int) -> None:
        """Makes a heartbeat durable: a time, ns since 1970. Errors as `write` and `sync`."""
        self._file.write(live.BEATS[self._next_beat], build_beat(self._uuid, time))
        self._next_beat = 1 - self._next_beat
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
    try:
        with open_file(os.fsdecode(session.log_path)) as file:
            header = file.read(0, LOG.size)
            if len(header) < LOG.size:
                return None
            made_for = LOG.parse(header).regions  # more regions where the tracker died while the disk grew
            expected = build_log(session.uuid, session.intent, session.region_bits, made_for)
            if header != expected or not regions <= made_for <= live.MAX_REGIONS:
                return None
            pages = geometry.ceil_div(made_for, live.PER_PAGE)
            data = file.read_exactly(live.RECORDS, live.log_bytes(made_for) - live.RECORDS)
            places = np.frombuffer(data, np.uint64).reshape(pages, 2, live.PER_PAGE)
            logs = []
            for number in (session.log, session.log + 1):
                tally = file.read_exactly(live.TALLIES[number % 2], TALLY.size)
                logs.append(_read_places(places[:, number % 2].ravel(), made_for, tally, session.uuid, number))
            beats = [parse_beat(session.uuid, file.read(at, BEAT.size)) for at in live.BEATS]
    except Error:
        return None
    found = None
    if all(log is not None for log in logs):
        found = frozenset(region for log in logs if log is not None for region in log if region < regions)
    return Logged(found, max(beats))


def _read_places(places: NDArray[np.uint64], regions: int, tally: bytes, uuid: bytes, number: int) -> list[int] | None:
    """The regions in log ``number``, which is the newest in the places of so many; None if it is damaged."""
    logs, nothing = _numbers(places.tobytes(), uuid, number), places == 0
    in_place = (places.view(">u4")[::2] == np.arange(len(places))) & (np.arange(len(places)) < regions)
    sound = in_place & (logs <= number) & ((logs ^ number) & 1 == 0)
    there = sound & (logs == number)  # zeros can be a record, too
    if not bool(np.all(sound | nothing)):
        return None
    found: list[int] = np.flatnonzero(there).tolist()
    if tally != bytes(len(tally)):  # zeros: none was written yet
        last = parse_tally(uuid, tally)
        if last is None or last.number > number or (last.number == number and last.count > len(found)):
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
    """The path of a session's log."""
    return f"{stem}{_SUFFIX}"


def remove_log(session: live.Session) -> None:
    """Removes the log of a session that has ended. Removes nothing if another file is at that path."""
    path, head = os.fsdecode(session.log_path), LOG.field("intent").offset
    try:
        with open_file(path) as file:
            mine = file.read(0, head) == build_log(session.uuid, session.intent, session.region_bits, 0)[:head]
    except Error:
        return
    if mine:
        remove_file(path)


def is_held(session: live.Session) -> bool | None:
    """True while the tracker, or a marker, has the log open, in whichever PID namespace; None if the log is gone."""
    return _is_locked(session, 2)


def is_kept(session: live.Session) -> bool | None:
    """True while the tracker that made or adopted the log has it open; None if the log is gone."""
    return _is_locked(session, 1)


def _is_locked(session: live.Session, count: int) -> bool | None:
    try:
        with open_file(os.fsdecode(session.log_path)) as file:
            return file.locked_by_other(_OWNER, count)
    except Error:
        return None
