"""A device's session is in two records, that of the device and that of its root node: its *peer*.

There is one session, one log and one set of live files. But each of the two records has them, perhaps in different
stores, so each has commits of its own. Each says what it has saved itself: its own ``oldest`` and ``log``. The order of
the commits is such that a crash between two of them loses no mark:

    begin      the root's record, then the device's, then the first mark
    save       each by itself; writesets and logs are dropped once both have been saved
    end        the device's record, then the root's
    recovery   the device's record, then the root's; or the device's alone

So a session that is in the device's record is in the root's record, too. If it is not, it was lost, and the device is
all dirty. Whoever tracks the root again has ended the device's session before. So no tracker of ours writes to the root
what the device misses, until it is decided what the device's bitmaps hold.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from dirtmap.engine.storefile.file import Store
from dirtmap.engine.storefile.session import names_session, peer_of
from dirtmap.fmt import store
from dirtmap.fmt.errors import Error
from dirtmap.fmt.live import Peer, session_uuid
from dirtmap.fmt.store import Record


def path_of(path: str, peer: Peer) -> str:
    """The path of the peer's store.

    Args:
        path: of the store whose record names the peer.
        peer: as that record names it.
    """
    return os.fsdecode(peer.store) or path


@dataclass(frozen=True, slots=True)
class Found:
    """What was found of a peer.

    Attributes:
        record: of the peer, if it has the session; else None.
        needs_files: False if the peer is known not to need the session's live files and log any more.
    """

    record: Record | None
    needs_files: bool


def find(path: str, peer: Peer, session: bytes, *, of_node: bool) -> Found:
    """The peer's record as it is now.

    Args:
        path: of the store whose record names the peer.
        peer: as that record names it.
        session: UUID of the session, 16 bytes.
        of_node: True if the record is a node's: then the peer has to be a device. False if it is the other way round.
    """
    try:
        with Store(path_of(path, peer)) as target:
            record = target.record(peer.name)
    except Error:
        return Found(None, True)
    if record is None or record.uuid != peer.uuid or (record.kind == store.KIND_DEVICE) != of_node:
        return Found(None, False)
    named = names_session(record, session)
    return Found(record if named else None, named)


def unrecovered(path: str, record: Record) -> Peer | None:
    """The device that has to end its session before this node does; None if there is none, or it cannot be found."""
    session, peer = record.extension(store.EXTENSION_SESSION), peer_of(record)
    if record.kind == store.KIND_DEVICE or session is None or peer is None:
        return None
    return peer if find(path, peer, session_uuid(session), of_node=True).record else None
