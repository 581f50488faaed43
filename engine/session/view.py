"""What a session's bitmaps hold: while its tracker lives, and after its death. The table of SPEC.md, "Recovery".

    alive    its image changed    live files, same boot,    log of regions    what the bitmaps hold
             by others            not poisoned
    yes      -                    -                         -                 saved bits, and the live ones
    no       yes                  -                         -                 all dirty
    no       no                   yes                       -                 saved bits, and the live ones: exact
    no       no                   no                        yes               saved bits, and all logged regions
    no       no                   no                        no                all dirty

Changed by others. Of a raw file only size, inode and the times of the last write and of the last change can tell; the
latter cannot be put back. The tracker writes down in its control file when a write began or ended: where none is in
flight, a file changed after the last end was changed by someone else. The kernel's clock for files is never ahead of
the one we read, but may be a tick (at most 10 ms) behind: a write of others within a tick of our last one is not
seen. Where a write was in flight, or `mark` was used, whose writes have no end that we hear of, what counts is the
last sign of life, given four times a second, and half a second more. After a power loss only signs of life on disk
are left, given once a second while the image changes: five seconds more. A clock that was set back would hide what
others write: the tracker writes down when, by its clock, the machine was booted, which changes with the clock only. A
block device tells only that it is another one. Of a qcow2 image a bit in its header tells, which every other program
that opens it for writing takes away; where its guest data is in a file of its own, that is judged as a raw file is,
too: it can be written to by itself. What is left is in SPEC.md, "What cannot be noticed".

A device is as its root is; and changed, too, where the root's session has ended without the device's, which no order
of recovery leads to: see `dirtmap.engine.session.peers`.
"""

from __future__ import annotations

import os
import time
from weakref import WeakKeyDictionary

import numpy as np

from dirtmap.engine.identity import data_file_of, identity_now, identity_of, touched
from dirtmap.engine.model import bits
from dirtmap.engine.session import intent, livefile, peers
from dirtmap.engine.session.verdict import DURABLE_TOLERANCE_SECONDS, TOLERANCE_SECONDS, Facts, Row, decide
from dirtmap.engine.storefile.file import Snapshot
from dirtmap.engine.storefile.session import peer_of, session_of, window_of
from dirtmap.engine.system import file as fileio
from dirtmap.engine.system.process import CLOCK_TOLERANCE_NS, Process, boot_id, clock_offset
from dirtmap.fmt import geometry, live, store
from dirtmap.fmt.directory import Entry
from dirtmap.fmt.errors import Error, FormatError, LockedError, StorageError, printable
from dirtmap.fmt.store import Identity, Record

_NS = 1_000_000_000


class SessionView:
    """A session as found, and what it adds to the saved bits.

    Attributes:
        session: as in the record.
        row: of the table.
        why: in words, one line.
        found: the live files, or None.
        logged: the regions that the log has; None where it was not kept, cannot be read, or is damaged.
        identity: of the image now; None where it cannot be looked at or has none.
    """

    def __init__(self, snapshot: Snapshot, record: Record, session: live.Session) -> None:
        self.session, self._size, self._path = session, record.size, snapshot.file.abspath
        alive = is_alive(session)
        same_boot = session.boot_id == boot_id() != bytes(16)  # zeros: not known
        self.found = None
        if alive or same_boot:
            self.found = livefile.find(os.fsdecode(session.live), session.uuid, session.oldest, record.size)
        if alive and self.found is None:
            # The store moves on before live files go: then this is read again.
            where = f"{snapshot.file.path}: {record.label}"
            what = f"tracked by {tracker_of(session)}, whose live files cannot be read; {_remedy(session)}"
            raise FormatError(where, what)
        if not alive and self.found and not _fit(snapshot, record, session, self.found):
            self.found = None
        log = None if alive else intent.read_log(session, record.size)
        self.identity = _look_at(record)
        self._root: Record | None = record
        self._rootless = "the session of its root ended without it"
        if record.kind == store.KIND_DEVICE and not alive:
            peer = peer_of(record)
            found = peers.find(self._path, peer, session.uuid, of_node=False) if peer else None
            self._root = found.record if found else None
            if found and found.needs_files:
                self._rootless = "the store of its root cannot be read"
        facts = Facts(
            alive=alive,
            changed=None if alive else _damaged(snapshot, record) or self._changed(record, log),
            same_boot=same_boot,
            live=self.found is not None,
            poisoned=self.found is not None and bool(self.found.poisoned),
            log=log is not None and log.regions is not None and session.intent == live.INTENT_REGION,
        )
        self.row, self.why = decide(facts)
        self._record = record
        self.logged = log.regions if log and session.intent == live.INTENT_REGION else None
        self._regions = self._region_words(self.logged) if self.row is Row.LOGGED and self.logged else None
        self._unions: dict[tuple[int, int, int], bits.Words] = {}

    @property
    def how(self) -> str:
        """What recovery did, or will do: the row, and why."""
        return f"{self.row.value}: {self.why}"

    @property
    def note(self) -> str:
        """What a listing says of the namespace."""
        if self.row is Row.LIVE:
            return f"tracked by {tracker_of(self.session)}"
        return f"not recovered yet: {self.how}"

    @property
    def doubt(self) -> str | None:
        """Why all is dirty, or None."""
        return self.why if self.row is Row.ALL_DIRTY else None

    def is_busy(self, entry: Entry) -> bool:
        """True while a reader has taken that bitmap; not once the tracker is dead."""
        window = window_of(entry)
        return self.row is Row.LIVE and window is not None and window.busy

    def clean_up(self) -> None:
        """Removes what the session has left on tmpfs and beside the store, once it has ended.

        The paths are from the store, which may be anybody's: only what carries the session's UUID is touched. What the
        session's other namespace still needs stays: whichever ends last removes it.
        """
        peer = peer_of(self._record)
        of_node = self._record.kind != store.KIND_DEVICE
        if peer and peers.find(self._path, peer, self.session.uuid, of_node=of_node).needs_files:
            return
        livefile.remove_session(os.fsdecode(self.session.live), self.session.uuid)
        intent.remove_log(self.session)

    def add(self, entry: Entry, words: bits.Words) -> None:
        """ORs into a bitmap's saved bits what the session adds."""
        window = window_of(entry)
        if window is None or window.ended <= self.session.oldest:
            return
        if self._regions:
            np.bitwise_or(words, self._regions.at(entry.granularity), out=words)
        elif self.found:
            numbers = [number for number in self.found.writesets if window.began <= number < window.ended]
            if numbers:
                np.bitwise_or(words, self._union(numbers[0], numbers[-1], entry.granularity), out=words)

    def _region_words(self, regions: frozenset[int]) -> livefile.Words:
        size = 1 << self.session.region_bits
        words, numbers = bits.zeros(geometry.granules(self._size, size)), np.fromiter(regions, np.int64)
        bits.scatter(words, numbers, numbers)
        return livefile.Words(words, self._size, size)

    def _union(self, first: int, last: int, granularity: int) -> bits.Words:
        assert self.found
        key = first, last, granularity
        if key not in self._unions:
            parts = [self.found.writesets[number] for number in range(first, last + 1)]
            self._unions[key] = livefile.union(parts, self._size, granularity)
        return self._unions[key]

    def _changed(self, record: Record, log: intent.Logged | None) -> str | None:
        if self._root is None:
            return self._rootless
        session, path = self.session, os.fsdecode(self._root.path)
        then = Identity(session.image_device, session.image_inode, session.image_mtime, session.image_size)
        try:
            data = data_path(self._root.kind, path)
            now, changed = identity_of(data), touched(data)
        except StorageError:
            return "the image cannot be looked at"
        if self._root.kind == store.KIND_PLACE:
            if now == then and record.kind != store.KIND_PLACE:
                return None  # it was not even checked out
            if (others := opened_by_others(path)) or data == path:
                return others
        what = "the image has changed while nobody tracked it"
        if (now.device, now.inode, now.size) != (then.device, then.inode, then.size) or now.mtime_ns < then.mtime_ns:
            return what
        if max(now.mtime_ns, changed) > self._last_sign(log):
            return what
        if now != then and self._is_clock_behind(log):
            return "the clock was set back, so that a write of others to the image could not be told"
        return None

    def _last_sign(self, log: intent.Logged | None) -> int:
        """Until when a write to the image counts as the tracker's own; ns since 1970."""
        if found := self.found:
            if not found.in_flight and not found.bare:
                return found.event
            return max(found.event, found.heartbeat) + int(TOLERANCE_SECONDS * _NS)
        return self._last_beat(log) + int(DURABLE_TOLERANCE_SECONDS * _NS)

    def _last_beat(self, log: intent.Logged | None) -> int:
        return max(log.beat if log else 0, self.session.started)

    def _is_clock_behind(self, log: intent.Logged | None) -> bool:
        """True where the clock is set to earlier than it was for the tracker: what is written now can look older."""
        if self.found:
            return clock_offset() < self.found.clock - CLOCK_TOLERANCE_NS
        return time.time_ns() < self._last_beat(log)


def data_path(kind: int, path: str) -> str:
    """The file that a guest's writes go to, by which is seen whether others have written.

    Args:
        kind: of the root node's record: only a qcow2 image may say that its data is elsewhere, a guest may not.
        path: of the image.

    Raises:
        StorageError: the image cannot be read.
    """
    return (data_file_of(path) if kind == store.KIND_PLACE else None) or path


def opened_by_others(path: str) -> str | None:
    """Why a tracked qcow2 image is not the tracker's alone any more, or None."""
    from dirtmap.engine.qcow2.layout import read_layout

    try:
        with fileio.open_file(path) as file:
            tracked = read_layout(file).tracked
    except Error:
        return "the image cannot be read"
    return None if tracked else "another program has opened the image for writing since"


def _damaged(snapshot: Snapshot, record: Record) -> str | None:
    """That the session or its directory is lost, so that recovery makes all dirty what can still be named; or None."""
    from dirtmap.engine.storefile.directory import read_entries

    if session_of(record) is live.NO_SESSION:
        return "what its tracker had is lost"
    try:
        read_entries(snapshot, record)
    except FormatError:
        return "its directory is damaged"
    return None


def _fit(snapshot: Snapshot, record: Record, session: live.Session, found: livefile.Found) -> bool:
    """False where the live files of a dead tracker are older than what the store knows of it, or than one another."""
    from dirtmap.engine.storefile.directory import read_entries

    if livefile.is_outdated(os.fsdecode(session.live), session.uuid, found.current, record.size):
        return False
    try:
        windows = [window_of(entry) for entry in read_entries(snapshot, record)]
    except FormatError:
        return True  # then all is dirty anyway
    known = [number for window in windows if window for number in (window.began, window.ended)]
    return all(number <= found.current for number in known if number != live.OPEN)


def _look_at(record: Record) -> Identity | None:
    try:
        return identity_now(record)
    except StorageError:
        return None


def tracker_of(session: live.Session) -> Process:
    """The process that tracks, or did."""
    return Process(session.pid, session.process_start, session.boot_id)


def is_alive(session: live.Session) -> bool:
    """False where the session's tracker is known to have ended: it locks its log; without that, its process tells."""
    if session is live.NO_SESSION:
        return False  # nothing is left of it that could name a tracker, or a log
    held = intent.is_held(session)
    return not tracker_of(session).has_ended() if held is None else held


# Sessions as found, by snapshot and namespace UUID: what one answer needs more than once is looked at once.
_views: WeakKeyDictionary[Snapshot, dict[bytes, SessionView | None]] = WeakKeyDictionary()


def view_of(snapshot: Snapshot, record: Record) -> SessionView | None:
    """A record's session as found now, once for each snapshot; None where it has none."""
    views = _views.setdefault(snapshot, {})
    if record.uuid not in views:
        session = session_of(record)
        if session is not None:
            snapshot.watched[record.name] = record
        views[record.uuid] = None if session is None else SessionView(snapshot, record, session)
    return views[record.uuid]


def refuse_tracked(where: str, session: live.Session | None) -> None:
    """Refuses what must not happen behind a tracker's back.

    Raises:
        LockedError: names the tracker.
    """
    if session and is_alive(session):
        raise LockedError(where, f"tracked by {tracker_of(session)}; {_remedy(session)}")


def _remedy(session: live.Session) -> str:
    """What to do about a tracker that lives, or that is not known to have ended."""
    if intent.is_held(session) is None and not tracker_of(session).is_seen():
        log = printable(os.fsdecode(session.log_path))
        return f"it may have ended, but its log {log} is gone, which would tell; an empty file there says that it has"
    return "ask it, or end it first"
