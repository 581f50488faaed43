"""The two namespaces of a device's session, the device's and its root node's, and the order that keeps them right.

One session, one log, one set of live files; but a record in each namespace, perhaps in different stores, and so commits
of their own. Each says what it has saved itself: its own ``oldest`` and ``log``. What neither order nor a crash between
two commits may lose:

    begin    the root's record, then the device's, then the first mark
    save     each by itself; writesets and logs are dropped once both have been saved
    end      the device's record, then the root's; so is recovery, which may also end the device's alone

So a session that the device has is in the root's record, too. Where it is not, it was lost, and the device is all
dirty. And who begins to track the root later has ended the device's session before: no write of ours that the device
has missed can come before the device is judged.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from dirtmap.engine.storefile.file import Store
from dirtmap.engine.storefile.session import names_session, peer_of
from dirtmap.fmt import store
from dirtmap.fmt.errors import Error
from dirtmap.fmt.live import Peer
from dirtmap.fmt.store import Record
from dirtmap.fmt.structures.live import session_uuid


def path_of(path: str, peer: Peer) -> str:
    """The path of the peer's store.

    Args:
        path: of the store whose record names the peer.
        peer: as it names it.
    """
    return os.fsdecode(peer.store) or path


@dataclass(frozen=True, slots=True)
class Found:
    """What became of a peer.

    Attributes:
        record: the peer's, where the session is in it; else None.
        needs_files: False where the peer is known to have done with the session.
    """

    record: Record | None
    needs_files: bool


def find(path: str, peer: Peer, session: bytes, *, of_node: bool) -> Found:
    """The peer's record as it is now.

    Args:
        path: of the store whose record names the peer.
        peer: as it names it.
        session: UUID of the session.
        of_node: the record is a node's, whose peer has to be a device; else it is the other way round.
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
    """The device that has to end its session before this node does; None where there is none, or none to be found."""
    session, peer = record.extension(store.EXTENSION_SESSION), peer_of(record)
    if record.kind == store.KIND_DEVICE or session is None or peer is None:
        return None
    return peer if find(path, peer, session_uuid(session), of_node=True).record else None
