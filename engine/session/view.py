"""What a session's bitmaps hold: while its tracker lives, and after its death. The table of SPEC.md, "Recovery".

    alive    its image changed    live files, same boot,    log of regions    what the bitmaps hold
             by others            not poisoned
    yes      -                    -                         -                 saved bits, and the live ones
    no       yes                  -                         -                 all dirty
    no       no                   yes                       -                 saved bits, and the live ones: exact
    no       no                   no                        yes               saved bits, and all logged regions
    no       no                   no                        no                all dirty

How a change by others is seen depends on the image.

- A raw file is compared with what the session has of it: size, inode, time of the last write (mtime) and time of the
  last change (ctime, which nobody can put back).
    - The live files have the time at which the last write ended, by a clock that steps by a tick, up to 10 ms. If no
      write was in flight, a time of the file that is later by more than a tick means a write by others. So a write of
      others within two ticks of the last one of ours is not seen.
    - If a write was in flight, or `mark` was used, which tells of no end, the last heartbeat counts, and half a second
      more. There are four a second, of the tracker, or of those who mark while there is none.
    - After a power loss only the heartbeats on disk are left. There is one a second while the image changes. The last
      one counts, and five seconds more.
    - A clock that was set back would hide what others write. So the tracker notes when the machine was booted by its
      clock, which changes only if the clock is set.
- A block device only tells that it is another one.
- A qcow2 image has a bit in its header, which every other program that opens it for writing clears. If its guest data
  is in a file of its own, that is compared like a raw file, too, because it can be written to by itself.

What is left is in SPEC.md, "What cannot be noticed".

A device has changed if its root has. It has changed as well if the root's session has ended without the device's, to
which no order of recovery leads: see `dirtmap.engine.session.peers`.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from dirtmap.engine.identity import data_file_of, identity_now, identity_of
from dirtmap.engine.model import bits
from dirtmap.engine.model.infos import STOP, refused
from dirtmap.engine.session import intent, livefile, peers
from dirtmap.engine.session.verdict import DURABLE_TOLERANCE_SECONDS, TOLERANCE_SECONDS, Facts, Row, decide
from dirtmap.engine.storefile.file import Snapshot
from dirtmap.engine.storefile.session import peer_of, session_of, window_of
from dirtmap.engine.system import file as fileio
from dirtmap.engine.system.process import CLOCK_TOLERANCE_NS, Process, boot_id, clock_offset
from dirtmap.fmt import geometry, live, store
from dirtmap.fmt.directory import Entry
from dirtmap.fmt.errors import Error, FormatError, StorageError, printable
from dirtmap.fmt.identity import Identity
from dirtmap.fmt.store import Record

if TYPE_CHECKING:
    from dirtmap.engine.model.content import Content

_NS = 1_000_000_000
_TICK_NS = 10_000_000  # of the coarse clock, which markers read; a file's time may come from a finer one


class SessionView:
    """A session as it was found, and what it adds to the saved bits.

    Attributes:
        session: as the record has it.
        row: of the table.
        why: the reason for that row, one line.
        found: the live files; None if there are none that fit the session.
        logged: the regions that the log has; None if it was not kept, cannot be read, or is damaged.
        identity: of the image now; None if it cannot be looked at.
    """

    def __init__(self, snapshot: Snapshot, record: Record, session: live.Session) -> None:
        self.session, self._size, self._path = session, record.size, snapshot.file.abspath
        alive = is_alive(session)
        same_boot = session.boot_id == boot_id() != bytes(16)  # zeros: not known
        self.found = None
        if alive or same_boot:
            self.found = livefile.find(os.fsdecode(session.live), session.uuid, session.oldest, record.size)
        if alive and self.found is None:
            # A tracker commits to the store before it removes live files. If it has just done so, this is read again.
            where = f"{snapshot.file.path}: {record.label}"
            remedy = _unsure(session) or "ask as its user, who can read them"
            what = f"tracked by {tracker_of(session)}, whose live files cannot be read here; {remedy}"
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
        self._unions: dict[tuple[int, int, int], Content] = {}

    @property
    def how(self) -> str:
        """What recovery did or will do: the row, and the reason for it."""
        return f"{self.row.value}: {self.why}"

    @property
    def note(self) -> str:
        """What a listing says about the namespace."""
        if self.row is Row.LIVE:
            return f"tracked by {named(self.session, kept=intent.is_kept(self.session) is not False)}"
        return f"not recovered yet: {self.how}"

    @property
    def doubt(self) -> str | None:
        """Why all bits count as dirty, or None."""
        return self.why if self.row is Row.ALL_DIRTY else None

    def is_busy(self, entry: Entry) -> bool:
        """True while a reader has taken that bitmap from the tracker. False once the tracker is dead."""
        window = window_of(entry)
        return self.row is Row.LIVE and window is not None and window.busy

    def clean_up(self) -> None:
        """Removes the live files and the log of the session, which has ended.

        Their paths are from the store, which anybody may have written. So only files with the session's UUID are
        removed. As long as the session's other namespace needs them, they stay: the last of the two removes them.
        """
        peer = peer_of(self._record)
        of_node = self._record.kind != store.KIND_DEVICE
        if peer and peers.find(self._path, peer, self.session.uuid, of_node=of_node).needs_files:
            return
        livefile.remove_session(os.fsdecode(self.session.live), self.session.uuid)
        intent.remove_log(self.session)

    def added(self, entry: Entry) -> Content | None:
        """What the session adds to the saved bits of a bitmap, at its granularity; None if that is nothing."""
        window = window_of(entry)
        if window is None or window.ended <= self.session.oldest:
            return None
        if self._regions:
            return livefile.united([self._regions], self._size, entry.granularity)
        if self.found:
            numbers = [number for number in self.found.writesets if window.began <= number < window.ended]
            if numbers:
                return self._union(numbers[0], numbers[-1], entry.granularity)
        return None

    def _region_words(self, regions: frozenset[int]) -> livefile.Words:
        size = 1 << self.session.region_bits
        words, numbers = bits.zeros(geometry.granules(self._size, size)), np.fromiter(regions, np.int64)
        bits.scatter(words, numbers, numbers)
        return livefile.Words(words, self._size, size)

    def _union(self, first: int, last: int, granularity: int) -> Content:
        assert self.found
        key = first, last, granularity
        if key not in self._unions:
            parts = [self.found.writesets[number] for number in range(first, last + 1)]
            self._unions[key] = livefile.united(parts, self._size, granularity)
        return self._unions[key]

    def _changed(self, record: Record, log: intent.Logged | None) -> str | None:
        if self._root is None:
            return self._rootless
        then, path = self.session.image, os.fsdecode(self._root.path)
        try:
            data = data_path(self._root.kind, path)
            now = identity_of(data)
        except StorageError:
            return "the image cannot be looked at"
        if self._root.kind == store.KIND_PLACE:
            if now == then and record.kind != store.KIND_PLACE:
                return None  # it was not even checked out
            if (others := opened_by_others(path)) or data == path:
                return others
        what = "the image has changed while nobody tracked it"
        # Its tracker has told which size it will have; it died before the image had it, or before the bits had.
        sizes = (then.size, record.size) if self._root.kind == store.KIND_NODE else (then.size,)
        if not now.is_file(then) or now.size not in sizes or now.mtime_ns < then.mtime_ns:
            return what
        if max(now.mtime_ns, now.ctime_ns) > self._last_sign(log):
            return what
        if now != then and self._is_clock_behind(log):
            return "the clock was set back, so that a write of others to the image could not be told"
        return None

    def _last_sign(self, log: intent.Logged | None) -> int:
        """The time until which a write to the image counts as the tracker's own, ns since 1970."""
        if found := self.found:
            if not found.in_flight and not found.bare:
                return found.event + _TICK_NS
            return max(found.event, found.heartbeat) + int(TOLERANCE_SECONDS * _NS)
        return self._last_beat(log) + int(DURABLE_TOLERANCE_SECONDS * _NS)

    def _last_beat(self, log: intent.Logged | None) -> int:
        return max(log.beat if log else 0, self.session.started)

    def _is_clock_behind(self, log: intent.Logged | None) -> bool:
        """True if the clock was set back since: a file that is written now can look older than the last heartbeat."""
        if self.found:
            return clock_offset() < self.found.clock - CLOCK_TOLERANCE_NS
        return time.time_ns() < self._last_beat(log)


def data_path(kind: int, path: str) -> str:
    """The path of the file that has the guest's data. Its times tell whether others have written.

    Args:
        kind: of the root node's record. Only a qcow2 image may name another file: what a raw one says is the guest's.
        path: of the image.

    Raises:
        StorageError: the image cannot be read.
    """
    return (data_file_of(path) if kind == store.KIND_PLACE else None) or path


def opened_by_others(path: str) -> str | None:
    """Why others may have written to a tracked qcow2 image, or None."""
    from dirtmap.engine.qcow2.layout import read_layout

    try:
        with fileio.open_file(path) as file:
            tracked = read_layout(file).tracked
    except Error:
        return "the image cannot be read"
    return None if tracked else "another program has opened the image for writing since"


def _damaged(snapshot: Snapshot, record: Record) -> str | None:
    """Why the session or its directory is lost, or None. Recovery makes all bitmaps dirty that can still be named."""
    from dirtmap.engine.storefile.directory import read_entries

    if session_of(record) is live.NO_SESSION:
        return "what its tracker had is lost"
    try:
        read_entries(snapshot, record)
    except FormatError:
        return "its directory is damaged"
    return None


def _fit(snapshot: Snapshot, record: Record, session: live.Session, found: livefile.Found) -> bool:
    """False if the live files of a dead tracker are older than what the store has of it, or than one another."""
    from dirtmap.engine.storefile.directory import read_entries

    if livefile.is_outdated(os.fsdecode(session.live), session.uuid, found.current):
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
    """The process of the session's tracker, which may have ended."""
    return Process(session.pid, session.process_start, session.boot_id)


def named(session: live.Session, *, kept: bool) -> str:
    """Who tracks, for people; ``kept``: the process is alive, and not only others who mark."""
    # The number of a process that has ended may be that of another one by now.
    return str(tracker_of(session)) if kept else f"a process that has ended ({session.pid} while it ran)"


def is_alive(session: live.Session) -> bool:
    """False if the session's tracker is known to have ended, and nobody else marks in it.

    A live tracker has a lock on its log, and so has everybody else who marks in the session, which lives as long as one
    of them does. If the log is gone, the tracker's process is looked for.
    """
    if session is live.NO_SESSION:
        return False  # the record names neither a tracker nor a log
    held = intent.is_held(session)
    return not tracker_of(session).has_ended() if held is None else held


# Sessions as they were found, by snapshot and namespace UUID. So one answer looks at a session once.
_views: WeakKeyDictionary[Snapshot, dict[bytes, SessionView | None]] = WeakKeyDictionary()


def view_of(snapshot: Snapshot, record: Record) -> SessionView | None:
    """The session of a record; None if it has none. It is looked at once for each snapshot."""
    views = _views.setdefault(snapshot, {})
    if record.uuid not in views:
        session = session_of(record)
        if session is not None:
            snapshot.watched[record.name] = record
        views[record.uuid] = None if session is None else SessionView(snapshot, record, session)
    return views[record.uuid]


def tracked_by(session: live.Session) -> str | None:
    """Who tracks, and what to do about it, for an error; None if the tracker is known to have ended."""
    if not is_alive(session):
        return None
    kept = intent.is_kept(session) is not False
    return refused(tracker_of(session), kept=kept, remedy=_unsure(session) or STOP)


def _unsure(session: live.Session) -> str | None:
    """Why nobody can tell whether a tracker has ended, and what would tell; None where that is known."""
    if intent.is_held(session) is not None or tracker_of(session).is_seen():
        return None
    log = printable(os.fsdecode(session.log_path))
    return f"it may have ended, but its log {log} is gone, which would tell; an empty file there says that it has"
