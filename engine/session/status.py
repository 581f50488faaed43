"""`Status`: who tracks an image, and what there is to save or to recover; for people and programs that look on."""

from __future__ import annotations

import os
from dataclasses import dataclass

from dirtmap.engine.model import bits
from dirtmap.engine.session import livefile
from dirtmap.engine.session.view import Row, tracker_of, view_of
from dirtmap.engine.storefile.file import Snapshot
from dirtmap.fmt import geometry, live
from dirtmap.fmt.store import Record


@dataclass(frozen=True, slots=True)
class Status:
    """A session as it is now.

    Attributes:
        tracker: the process, in words.
        pid: its number.
        alive: it lives, and tracks.
        how: what recovery will do, once it does not.
        started: when the session began, seconds since 1970.
        seen: when the tracker last showed a sign of life, seconds since 1970; None where its live files are gone.
        writes: how many were begun with `Tracker.begin` or `write`; a bare `Tracker.mark` is too quick to be counted.
        dirty: bytes, in whole granules, marked since the last cut, and before it as far as not saved.
        intervals: how many there are that are not saved whole.
        intent: ``region`` or ``off``.
        region_size: bytes.
        regions: how many regions are logged since the last save.
        regions_in_all: how many the disk has.
        poisoned: a sync failed.
        live: the folder of the live files.
        log: the path of the intent log.
    """

    tracker: str
    pid: int
    alive: bool
    how: str
    started: float
    seen: float | None
    writes: int
    dirty: int
    intervals: int
    intent: str
    region_size: int
    regions: int
    regions_in_all: int
    poisoned: bool
    live: str
    log: str


def status_of(snapshot: Snapshot, record: Record) -> Status | None:
    """The session of a record; None where it has none."""
    view = view_of(snapshot, record)
    if view is None:
        return None
    session, found = view.session, view.found
    dirty = 0
    if found:
        granularity = min(words.granularity for words in found.writesets.values())
        union = livefile.union(found.writesets.values(), record.size, granularity)
        dirty = bits.count(union) * granularity
    alive = view.row is Row.LIVE
    return Status(
        # The number of one that has died may be another's by now.
        tracker=str(tracker_of(session)) if alive else f"a process that has ended ({session.pid} while it ran)",
        pid=session.pid,
        alive=alive,
        how=view.how,
        started=session.started / 1e9,
        seen=found.heartbeat / 1e9 if found else None,
        writes=found.writes if found else 0,
        dirty=dirty,
        intervals=len(found.writesets) if found else 0,
        intent="region" if session.intent == live.INTENT_REGION else "off",
        region_size=1 << session.region_bits,
        regions=found.logged if found else 0,
        regions_in_all=geometry.ceil_div(record.size, 1 << session.region_bits),
        poisoned=bool(found and found.poisoned),
        live=os.fsdecode(session.live),
        log=os.fsdecode(session.log_path),
    )
