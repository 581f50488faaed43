"""The session of a tracker as a namespace's record and its directory entries say it: session, peer, windows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from dirtmap.engine.storefile.entries import item, with_items
from dirtmap.fmt import live, store
from dirtmap.fmt.directory import Entry
from dirtmap.fmt.errors import UnsupportedError
from dirtmap.fmt.live import Peer, parse_peer, parse_session, session_uuid, session_version
from dirtmap.fmt.parsers.live import WINDOW
from dirtmap.fmt.store import Record


def require_known(path: str, record: Record) -> None:
    """Refuses a namespace that has what only newer software knows, and must not be ignored.

    Args:
        path: of the store, for the message.
        record: of the namespace.

    Raises:
        UnsupportedError: names the namespace.
    """
    for kind, data in record.extensions:
        what = None
        if kind & store.CRITICAL and kind not in store.RECORD_EXTENSIONS:
            what = f"extension {kind:#010x} is unknown, and must not be ignored"
        elif kind == store.EXTENSION_SESSION and session_version(data) not in (None, live.SESSION_VERSION):
            what = f"the session's version {session_version(data)} is unknown"
        if what is not None:
            raise UnsupportedError(f"{path}: {record.label}", f"{what}: the namespace needs newer software")


def names_session(record: Record, session: bytes) -> bool:
    """True where a record has a session, and its UUID begins with these bytes: all of them, or what was read of it."""
    data = record.extension(store.EXTENSION_SESSION)
    return data is not None and session_uuid(data)[: len(session)] == session


def session_of(record: Record) -> live.Session | None:
    """The session in a record, or None. One that makes no sense counts as one of which nothing is left."""
    data = record.extension(store.EXTENSION_SESSION)
    if data is None:
        return None
    try:
        return parse_session(data)
    except ValueError:
        return live.NO_SESSION


@dataclass(frozen=True, slots=True)
class Window:
    """The intervals that a bitmap records: ``began`` and all up to, and without, ``ended``; ``busy``: taken or held."""

    began: int
    ended: int = live.OPEN
    busy: bool = False

    def build(self) -> bytes:
        """Its bytes."""
        return WINDOW.build(began=self.began, ended=self.ended, flags=int(self.busy), reserved=0)

    @property
    def records(self) -> bool:
        """False of one without intervals, which only says that the bitmap is busy."""
        return self.began < self.ended

    def freed(self) -> Window | None:
        """The window of the bitmap once nobody holds it any more; None where it needs none then."""
        return replace(self, busy=False) if self.records else None


# Of a bitmap that records nothing in a session, and is held.
HELD_ONLY: Final = Window(0, 0, True)


def window_of(entry: Entry) -> Window | None:
    """The window of a bitmap in a session; None where it records nothing in it, and is not held."""
    data = item(entry, store.ITEM_WINDOW)
    if data is None:
        return None
    raw = WINDOW.parse(data)
    return Window(raw.began, raw.ended, bool(raw.flags & live.WINDOW_BUSY))


def with_window(entry: Entry, window: Window | None) -> Entry:
    """The entry with that window, or without one."""
    return with_items(entry, {store.ITEM_WINDOW: window.build() if window else None})


def peer_of(record: Record) -> Peer | None:
    """The other namespace of a record's session; None where there is none, or none that makes sense."""
    data = record.extension(store.EXTENSION_PEER)
    if data is None:
        return None
    try:
        return parse_peer(data)
    except ValueError:
        return None
