"""A namespace's directory and bits: read, judged, and placed anew. All of it is of one commit, or of one to come."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dirtmap.engine.identity import disk_size, identity_now, root_elsewhere
from dirtmap.engine.model.naming import decode_name, label
from dirtmap.engine.storefile import holds
from dirtmap.engine.storefile.directory import header_doubts, load_saved, place_bitmap, read_entries, replace_directory
from dirtmap.engine.storefile.file import Change, Snapshot
from dirtmap.engine.storefile.session import session_of
from dirtmap.fmt import store
from dirtmap.fmt.directory import Entry
from dirtmap.fmt.errors import BitmapError, Error, StorageError, printable
from dirtmap.fmt.store import Record

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dirtmap.engine.model.bitmap import Bitmap
    from dirtmap.engine.model.infos import Status
    from dirtmap.engine.session.view import SessionView


@dataclass(eq=False, slots=True)
class Source:
    """Where a bitmap of a transaction has its bits while nobody has asked for them; none where it is all dirty."""

    snapshot: Snapshot
    record: Record
    entry: Entry
    doubted: bool

    def load(self) -> NDArray[np.uint64]:
        """See `load`; not once the transaction has ended."""
        if self.snapshot.file.fd < 0:
            raise Error(self.snapshot.file.path, "the transaction has ended")
        return load(self.snapshot, self.record, self.entry, self.doubted)


def load(snapshot: Snapshot, record: Record, entry: Entry, doubted: bool) -> NDArray[np.uint64]:
    """A bitmap's bits as words: uint64, shape (ceil(granules / 64),), verified, tail bits zero.

    Those of a tracked image, or of one whose tracker has died, include what the tracker has marked.

    Raises:
        FormatError: the checksum is wrong.
    """
    words = load_saved(snapshot, record, entry, doubted)
    if not doubted and (view := tracked_view(snapshot, record)):
        view.add(entry, words)
    return words


def refuse_tracked(path: str, record: Record) -> None:
    """Refuses to change a namespace behind the back of the process that tracks it.

    Raises:
        LockedError: names the process.
    """
    if record.tracked:
        from dirtmap.engine.session import view as recovery

        where = f"{path}: {record.label}"
        recovery.refuse_tracked(where, session_of(record))


def refuse_session(path: str, record: Record) -> None:
    """As `refuse_tracked`; a session whose tracker has died is to be recovered first, too.

    Raises:
        LockedError: names the process.
        BitmapError: names the command that recovers.
    """
    refuse_tracked(path, record)
    if record.tracked:
        what = "its tracker has died; 'dirtmap recover' first"
        raise BitmapError(f"{path}: {record.label}", what)


def refuse_unsettled(snapshot: Snapshot, record: Record) -> None:
    """Refuses to end a node's session while a device that was tracked with it has yet to be recovered.

    Raises:
        BitmapError: names the device, and the command that recovers.
    """
    if record.tracked:
        from dirtmap.engine.session import peers

        if peer := peers.unsettled(snapshot.file.abspath, record):
            what = f"tracked with device '{printable(decode_name(peer.name))}' until that died; 'dirtmap recover' first"
            raise BitmapError(f"{snapshot.file.path}: {record.label}", what)


def other_size(snapshot: Snapshot, record: Record) -> BitmapError:
    """The error for bits that are for a disk of another size: they say nothing about the new space."""
    verb = "node resize" if record.kind == store.KIND_NODE else "device set-root"
    what = f"its image has {size_now(record)} bytes now, and had {record.size}; '{verb}' adopts the new size"
    return BitmapError(f"{snapshot.file.path}: {record.label}", what)


def size_now(record: Record) -> int:
    """The size in bytes of a namespace's disk as its image has it now; as recorded where that cannot be looked at."""
    if record.kind in (store.KIND_NODE, store.KIND_DEVICE):
        with contextlib.suppress(StorageError):
            now = identity_now(record)
            if record.kind == store.KIND_NODE:
                return now.size
            if root_elsewhere(record):
                return record.size
            if now != record.identity or not record.nb_bitmaps:
                return disk_size(os.fsdecode(record.path))
    return record.size


def refuse_held(snapshot: Snapshot, record: Record) -> None:
    """Refuses a change of all of a namespace's bitmaps, or of their addresses, while one of them is held.

    Args:
        snapshot: of the store, which has the record.
        record: of the namespace.

    Raises:
        BitmapError: names the bitmap and who holds it.
    """
    for held in holds.living(snapshot.file, record):
        where = f"{snapshot.file.path}: {record.label}: {label(decode_name(held.bitmap))}"
        raise BitmapError(where, f"busy: held by {held}")


def refuse_without_root(snapshot: Snapshot, record: Record) -> None:
    """Refuses to change a device's bitmaps by the look of another image than its root's.

    Raises:
        BitmapError: there is one in its place.
    """
    if record.kind != store.KIND_DEVICE:
        return
    with contextlib.suppress(StorageError):
        if identity_now(record) == record.identity:
            return
    if reason := root_elsewhere(record):
        raise BitmapError(f"{snapshot.file.path}: {record.label}", reason)


def tracked_view(snapshot: Snapshot, record: Record) -> SessionView | None:
    """What a tracker, alive or dead, says about a namespace; None where none was there since it was last whole."""
    if not record.tracked:
        return None
    from dirtmap.engine.session.view import view_of

    return view_of(snapshot, record)


def tracking_status(snapshot: Snapshot, record: Record) -> Status | None:
    """Who tracks a namespace's image; None where nobody does, or did."""
    if not record.tracked:
        return None
    from dirtmap.engine.session.status import status_of

    return status_of(snapshot, record)


def end_session(change: Change, record: Record, source: Snapshot | None = None) -> Record:
    """The record without the session of a tracker that has died, whose files go once the change is durable.

    Args:
        change: that is to end it.
        record: with the session.
        source: has the record; what is changed, where None.
    """
    if view := tracked_view(source or change.snapshot, record):
        change.afterwards.append(view.clean_up)
    return record.with_extensions(store.OF_A_SESSION)


def doubts(snapshot: Snapshot, record: Record) -> str | None:
    """Why a namespace's bits cannot be relied on, so that all of them count as dirty; None where they can."""
    if not record.nb_bitmaps:
        return None
    if doubt := header_doubts(snapshot, record):
        return doubt
    if view := tracked_view(snapshot, record):
        return view.doubt
    if record.kind in (store.KIND_NODE, store.KIND_DEVICE):
        try:
            now = identity_now(record)
        except StorageError as error:
            return f"the image cannot be looked at ({error.what})"
        if now != record.identity:
            return root_elsewhere(record) or "the image has changed while nobody tracked it"
    return None


def bitmap_of(snapshot: Snapshot, record: Record, entry: Entry, doubted: bool) -> Bitmap:
    """A bitmap of a directory, its bits still unread; all dirty where ``doubted``."""
    from dirtmap.engine.model.bitmap import Bitmap

    source = Source(snapshot, record, entry, doubted)
    return Bitmap._lazy(record.size, entry.granularity, entry.auto, entry.in_use, source)


def busy_of(snapshot: Snapshot, record: Record, entries: list[Entry]) -> set[bytes]:
    """The raw names of those bitmaps of a namespace that are held, or that its tracker has taken for a backup."""
    view = tracked_view(snapshot, record)
    taken = {entry.name for entry in entries if view.is_busy(entry)} if view else set()
    return taken | {held.bitmap for held in holds.living(snapshot.file, record)}


def rewrite(change: Change, record: Record, new: Record, *, doubted: bool) -> None:
    """Has all bitmaps of a namespace written anew, for the disk and the image that its new record tells of.

    Old bits stay and new space is dirty; an inconsistent bitmap becomes all dirty. The session of a tracker that has
    died ends with it: what that marked is among the old bits.

    Args:
        change: plans all of it.
        record: of the namespace, as it was.
        new: as it will be, but for its directory.
        doubted: nothing is known of the disk's content: all bits are dirty.

    Raises:
        BitmapError: a bitmap is too fine for the new size.
        FormatError: damaged bits, unless ``doubted``.
    """
    end_session(change, record)
    new = new.with_extensions(store.OF_A_SESSION)
    entries = read_entries(change.snapshot, record)
    placed = []
    for entry in entries:
        bitmap = bitmap_of(change.snapshot, record, entry, doubted)
        if doubted or bitmap.inconsistent:
            bitmap = type(bitmap)(new.size, entry.granularity, entry.auto).recovered()
        elif new.size != record.size:
            bitmap = bitmap.resized(new.size)
        placed.append(place_bitmap(change, new, decode_name(entry.name), bitmap))
    area = replace_directory(change, record, entries, placed)
    change.table.put(replace(new, generation=change.generation, directory=area))
