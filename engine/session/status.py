"""`status_of`: who tracks an image, and what there is to save or to recover. For monitoring."""

from __future__ import annotations

import os
import uuid

from dirtmap.engine.model import content
from dirtmap.engine.model.infos import Status
from dirtmap.engine.session import intent, livefile
from dirtmap.engine.session.verdict import Row
from dirtmap.engine.session.view import named, view_of
from dirtmap.engine.storefile.file import Snapshot
from dirtmap.fmt import geometry, live
from dirtmap.fmt.store import Record


def status_of(snapshot: Snapshot, record: Record) -> Status | None:
    """The session of a record; None if it has none."""
    view = view_of(snapshot, record)
    if view is None:
        return None
    session, found = view.session, view.found
    dirty = 0
    if found:
        granularity = min(words.granularity for words in found.writesets.values())
        dirty = content.count(livefile.united(found.writesets.values(), record.size, granularity)) * granularity
    alive = view.row is Row.LIVE
    kept = alive and intent.is_kept(session) is not False
    folder = os.fsdecode(session.live)
    socket = os.path.join(folder, live.SOCKET)
    return Status(
        session=str(uuid.UUID(bytes=session.uuid)),
        tracker=named(session, kept=kept),
        pid=session.pid,
        alive=alive,
        kept=kept,
        how=view.how,
        started=session.started / 1e9,
        seen=found.heartbeat / 1e9 if found else None,
        writes=found.writes if found else 0,
        in_flight=found.in_flight if found else 0,
        dirty=dirty,
        intervals=len(found.writesets) if found else 0,
        intent="region" if session.intent == live.INTENT_REGION else "off",
        region_size=1 << session.region_bits,
        regions=found.logged if found else 0,
        regions_in_all=geometry.ceil_div(record.size, 1 << session.region_bits),
        poisoned=bool(found and found.poisoned),
        live=folder,
        socket=socket if kept and os.path.lexists(socket) else None,
        log=os.fsdecode(session.log_path),
    )
