"""The condition of a namespace as of one commit: its bits, whether they can be relied on, and what forbids a change.

Also writes all its bitmaps anew, for the next commit.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dirtmap.engine.identity import disk_size, identity_now, root_elsewhere
from dirtmap.engine.model.naming import decode_name, label
from dirtmap.engine.storefile import holds
from dirtmap.engine.storefile.directory import header_doubts, load_saved, place_bitmap, read_entries, replace_directory
from dirtmap.engine.storefile.entries import with_root
from dirtmap.engine.storefile.file import Change, Snapshot
from dirtmap.engine.storefile.session import session_of
from dirtmap.engine.system.log import logger
from dirtmap.fmt import geometry, store
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
    """Where a bitmap of a transaction has its bits until they are read; all dirty if ``doubted``.

    Attributes:
        damage: what of the bits was damaged when they were read, and so is dirty: one line, or None.
    """

    snapshot: Snapshot
    record: Record
    entry: Entry
    doubted: bool
    damage: str | None = None

    @property
    def uniform(self) -> bool | None:
        """What all bits are, if no bits have to be read for that; else None."""
        if self.doubted or self.entry.table_offset == store.ALL_ONES:
            return True
        return False if self.entry.table_offset == store.ALL_ZEROS and not self.record.tracked else None

    def load(self) -> NDArray[np.uint64]:
        """Reads the bits, and logs what is damaged; see the function `load`.

        Raises:
            Error: the transaction has ended.
        """
        from dirtmap.engine.model import bits

        if (fill := self.uniform) is not None:
            return bits.filled(geometry.granules(self.record.size, self.entry.granularity), fill)
        if self.snapshot.file.fd < 0:
            raise Error(self.snapshot.file.path, "the transaction has ended")
        words, self.damage = load(self.snapshot, self.record, self.entry, self.doubted)
        if self.damage:
            where = f"{self.snapshot.file.path}: {self.record.label}"
            logger(__name__).warning("%s: %s: %s", where, label(decode_name(self.entry.name)), self.damage)
        return words


def load(snapshot: Snapshot, record: Record, entry: Entry, doubted: bool) -> tuple[NDArray[np.uint64], str | None]:
    """The bits of a bitmap, with what its tracker has marked if the image is tracked, or its tracker has died.

    Arguments and result are those of `load_saved`, and so are the errors.
    """
    words, damage = load_saved(snapshot, record, entry, doubted)
    if not doubted and (view := tracked_view(snapshot, record)):
        view.add(entry, words)
    return words, damage


def refuse_tracked(path: str, record: Record) -> None:
    """Refuses to change a namespace that a live process tracks.

    Raises:
        LockedError: the namespace is tracked; the error names the process.
    """
    if record.tracked:
        from dirtmap.engine.session import view as recovery

        where = f"{path}: {record.label}"
        recovery.refuse_tracked(where, session_of(record))


def refuse_session(path: str, record: Record) -> None:
    """Like `refuse_tracked`, but also refuses the session of a dead tracker, which is to be recovered first.

    Raises:
        LockedError: the namespace is tracked; the error names the process.
        BitmapError: the tracker has died; the error names the command that recovers.
    """
    refuse_tracked(path, record)
    if record.tracked:
        what = "its tracker has died; 'dirtmap recover' first"
        raise BitmapError(f"{path}: {record.label}", what)


def refuse_unrecovered(snapshot: Snapshot, record: Record) -> None:
    """Refuses to end a node's session before that of the device that was tracked with it.

    Raises:
        BitmapError: the device is yet to be recovered; the error names it, and the command that recovers.
    """
    if record.tracked:
        from dirtmap.engine.session import peers

        if peer := peers.unrecovered(snapshot.file.abspath, record):
            what = f"tracked with device '{printable(decode_name(peer.name))}' until that died; 'dirtmap recover' first"
            raise BitmapError(f"{snapshot.file.path}: {record.label}", what)


def other_size(snapshot: Snapshot, record: Record) -> BitmapError:
    """The error for bits of a disk that has another size now: they say nothing about the new space."""
    verb = "node resize" if record.kind == store.KIND_NODE else "device set-root"
    what = f"its image has {size_now(record)} bytes now, and had {record.size}; '{verb}' adopts the new size"
    return BitmapError(f"{snapshot.file.path}: {record.label}", what)


def size_now(record: Record) -> int:
    """The present size of a namespace's disk in bytes, from its image; the recorded size if that cannot be read."""
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
    """Refuses a change of all bitmaps of a namespace, or of their addresses, while one of them is held.

    Args:
        snapshot: of the store, which has the record.
        record: of the namespace.

    Raises:
        BitmapError: names the bitmap and its holder.
    """
    for held in holds.living(snapshot.file, record):
        where = f"{snapshot.file.path}: {record.label}: {label(decode_name(held.bitmap))}"
        raise BitmapError(where, f"busy: held by {held}")


def refuse_without_root(snapshot: Snapshot, record: Record) -> None:
    """Refuses to change a device's bitmaps if another image is in the place of its root's image.

    Raises:
        BitmapError: the root's image is elsewhere.
    """
    if record.kind != store.KIND_DEVICE:
        return
    with contextlib.suppress(StorageError):
        if identity_now(record) == record.identity:
            return
    if reason := root_elsewhere(record):
        raise BitmapError(f"{snapshot.file.path}: {record.label}", reason)


def tracked_view(snapshot: Snapshot, record: Record) -> SessionView | None:
    """What a tracker, alive or dead, says about a namespace; None without a session."""
    if not record.tracked:
        return None
    from dirtmap.engine.session.view import view_of

    return view_of(snapshot, record)


def tracking_status(snapshot: Snapshot, record: Record) -> Status | None:
    """The session of a namespace's tracker, alive or dead; None without a session."""
    if not record.tracked:
        return None
    from dirtmap.engine.session.status import status_of

    return status_of(snapshot, record)


def end_session(change: Change, record: Record, source: Snapshot | None = None) -> Record:
    """The record without the session of its dead tracker, whose files are removed once the change is durable.

    Args:
        change: the change that ends the session.
        record: with the session.
        source: the snapshot that has the record; None for that of the change.
    """
    if view := tracked_view(source or change.snapshot, record):
        change.afterwards.append(view.clean_up)
    return record.with_extensions(store.OF_A_SESSION)


def doubts(snapshot: Snapshot, record: Record) -> str | None:
    """Why the bits of a namespace cannot be relied on, so that all count as dirty; None if they can be."""
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
    """A bitmap of a directory, its bits still unread; dirty all over if ``doubted``."""
    from dirtmap.engine.model.bitmap import Bitmap

    source = Source(snapshot, record, entry, doubted)
    return Bitmap._lazy(record.size, entry.granularity, entry.auto, entry.in_use, source)


def busy_of(snapshot: Snapshot, record: Record, entries: list[Entry]) -> set[bytes]:
    """The raw names of the bitmaps of a namespace that are held, or that its tracker has taken for a backup."""
    view = tracked_view(snapshot, record)
    taken = {entry.name for entry in entries if view.is_busy(entry)} if view else set()
    return taken | {held.bitmap for held in holds.living(snapshot.file, record)}


def rewrite(change: Change, record: Record, new: Record, *, doubted: bool) -> None:
    """Writes all bitmaps of a namespace anew, for the disk and the image of its new record.

    Old bits stay; new space is dirty; an inconsistent bitmap becomes dirty all over. The session of a dead tracker
    ends, because what the tracker marked is among the old bits.

    Args:
        change: plans the bitmaps and the new record.
        record: of the namespace, as it was.
        new: the record as it will be, except for its directory.
        doubted: nothing is known about the content of the disk, so all bits become dirty.

    Raises:
        BitmapError: a bitmap is too fine for the new size.
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
        base = entry if new.size == record.size else with_root(entry, store.ALL_ZEROS, 0, 0)
        placed.append(place_bitmap(change, new, decode_name(entry.name), bitmap, base))
    area = replace_directory(change, record, entries, placed)
    change.table.put(replace(new, generation=change.generation, directory=area))
