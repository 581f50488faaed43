"""`Condition`: whether the bitmaps of a namespace can be relied on, and what forbids to change them.

the record in the store           -> entries                            as of one commit
the image, its tracker, holders   -> doubt, size_now, view, busy        as of the first time that somebody asks
locks of trackers and holders     -> refuse_tracked, refuse_held, ...   as of each call, the former a function
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from dirtmap.engine.identity import disk_size, identity_now, root_elsewhere
from dirtmap.engine.model.naming import decode_name, label
from dirtmap.engine.storefile import holds
from dirtmap.engine.storefile.directory import header_doubts, load_saved, place_bitmap, read_entries, replace_directory
from dirtmap.engine.storefile.entries import tree_of, with_root
from dirtmap.engine.storefile.few import load as load_few
from dirtmap.engine.storefile.file import Change, Snapshot, Store
from dirtmap.engine.storefile.session import session_of
from dirtmap.engine.system.log import logger
from dirtmap.fmt import geometry, store
from dirtmap.fmt.directory import Entry
from dirtmap.fmt.errors import BitmapError, Error, FormatError, LockedError, StorageError, printable
from dirtmap.fmt.store import Record

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    import numpy as np
    from numpy.typing import NDArray

    from dirtmap.engine.model.bitmap import Bitmap
    from dirtmap.engine.model.content import Content
    from dirtmap.engine.model.infos import Status
    from dirtmap.engine.session.view import SessionView
    from dirtmap.fmt.identity import Identity

_WITH_IMAGE = store.KIND_NODE, store.KIND_DEVICE  # the image's looks tell whether their bitmaps are right


def refuse_tracked(where: str, record: Record) -> None:
    """Refuses what must not happen behind a live tracker's back. Looks for the tracker at each call.

    Args:
        where: how the error names the namespace.
        record: of the namespace.

    Raises:
        LockedError: the namespace is tracked; the error names the process.
    """
    if (session := session_of(record)) is not None:
        from dirtmap.engine.session.view import tracked_by

        if (what := tracked_by(session)) is not None:
            raise LockedError(where, what)


def refuse_session(where: str, record: Record) -> None:
    """Like `refuse_tracked`, but also refuses the session of a dead tracker, which is to be recovered first.

    Raises:
        LockedError: the namespace is tracked; the error names the process.
        BitmapError: the tracker has died; the error names the command that recovers.
    """
    refuse_tracked(where, record)
    if record.tracked:
        raise BitmapError(where, "its tracker has died; 'dirtmap recover' first")


def size_now(record: Record) -> int:
    """The present size of a namespace's disk in bytes, from its image; the recorded size if that cannot be read.

    Looks at the image at each call.
    """
    return _size_by(record, lambda: identity_now(record))


def _size_by(record: Record, look: Callable[[], Identity]) -> int:
    if record.kind in _WITH_IMAGE:
        with contextlib.suppress(StorageError):
            now = look()
            if record.kind == store.KIND_NODE:
                return now.size
            as_recorded = now == record.identity and record.nb_bitmaps
            if not as_recorded and not root_elsewhere(record):
                return disk_size(os.fsdecode(record.path))
    return record.size


class Condition:
    """The condition of a namespace as of one commit.

    What the commit says cannot change. The image and the tracker can change at any time, so each fact about them has a
    time of its own, and is a property or a method accordingly:

    - A property is looked at when it is first asked for. From then on it stays the same, so one answer, or one change,
      does not contradict itself. Nobody keeps a `Condition` for longer than that.
    - A method looks at each call: at the locks of trackers and of holders.
    - An image's identity that is to be recorded is no fact of a condition. Whoever records it looks at the image
      himself, and asks `size_now`, the function, after that.

    Args:
        snapshot: the store, as of the commit.
        record: of the namespace. It may differ from the one in the snapshot in what the caller vouches for.

    Attributes:
        where: how messages name the namespace.
    """

    def __init__(self, snapshot: Snapshot, record: Record) -> None:
        self.snapshot, self.record = snapshot, record
        self.where = f"{snapshot.file.path}: {record.label}"

    # What the commit says.

    @cached_property
    def entries(self) -> list[Entry]:
        """The directory. Errors as `read_entries`, each time."""
        return read_entries(self.snapshot, self.record)

    # What the image and the tracker say, as of the first time that somebody asks.

    @cached_property
    def view(self) -> SessionView | None:
        """What a tracker, alive or dead, says about the namespace; None without a session.

        It is looked at once for each snapshot, whatever conditions are made of that.
        """
        if not self.record.tracked:
            return None
        from dirtmap.engine.session.view import view_of

        return view_of(self.snapshot, self.record)

    @cached_property
    def status(self) -> Status | None:
        """The session of the tracker, alive or dead, for people and programs that look on; None without a session."""
        if not self.record.tracked:
            return None
        from dirtmap.engine.session.status import status_of

        return status_of(self.snapshot, self.record)

    @cached_property
    def doubt(self) -> str | None:
        """Why the bits cannot be relied on, so that all count as dirty; None if they can be."""
        record = self.record
        if not record.nb_bitmaps:
            return None
        if doubt := header_doubts(self.snapshot, record):
            return doubt
        if self.view:
            return self.view.doubt
        if record.kind in _WITH_IMAGE:
            try:
                now = self._identity
            except StorageError as error:
                return f"the image cannot be looked at ({error.what})"
            if now != record.identity:
                return root_elsewhere(record) or "the image has changed while nobody tracked it"
        return None

    @property
    def doubted(self) -> bool:
        """True if there is a `doubt`."""
        return self.doubt is not None

    @cached_property
    def size_now(self) -> int:
        """The size of the disk in bytes; see the function `size_now`."""
        return _size_by(self.record, lambda: self._identity)

    @cached_property
    def _identity(self) -> Identity:
        """What the image looks like. Errors as `identity_now`, each time."""
        return identity_now(self.record)

    @property
    def resized(self) -> bool:
        """True if there are bitmaps, and they are for another size than the disk has now.

        Not so while a tracker lives that lets the disk grow: nothing is written to the new space before the store has
        the new size.
        """
        if not self.record.nb_bitmaps or self.size_now == self.record.size:
            return False
        if not self.growing:
            return True
        from dirtmap.engine.session.verdict import Row

        return self.view is None or self.view.row is not Row.LIVE

    @property
    def growing(self) -> bool:
        """True if the disk has the size that its tracker was about to give it, so that the old bits are right.

        Unless the image has changed otherwise, which `doubt` tells.
        """
        session = session_of(self.record)
        return session is not None and self.record.size < self.size_now == session.image.size

    @cached_property
    def busy(self) -> set[bytes]:
        """The raw names of the bitmaps that somebody holds, or that the tracker has taken for a backup.

        Errors as `entries`.
        """
        view = self.view
        taken = {entry.name for entry in self.entries if view.is_busy(entry)} if view else set()
        return taken | {held.bitmap for held in holds.living(self.snapshot.file, self.record)}

    # What forbids a change, as of the call.

    def refuse_unrecovered(self) -> None:
        """Refuses to end a node's session before that of the device that was tracked with it.

        Raises:
            BitmapError: the device is yet to be recovered; the error names it, and the command that recovers.
        """
        if self.record.tracked:
            from dirtmap.engine.session import peers

            if peer := peers.unrecovered(self.snapshot.file.abspath, self.record):
                device = printable(decode_name(peer.name))
                what = f"tracked with device '{device}' until that died; 'dirtmap recover' first"
                raise BitmapError(self.where, what)

    def refuse_held(self) -> None:
        """Refuses a change of all bitmaps, or of their addresses, while one of them is held.

        Raises:
            BitmapError: names the bitmap and its holder.
        """
        for held in holds.living(self.snapshot.file, self.record):
            raise BitmapError(f"{self.where}: {label(decode_name(held.bitmap))}", f"busy: held by {held}")

    def refuse_without_root(self) -> None:
        """Refuses to change a device's bitmaps if another image is in the place of its root's image.

        Raises:
            BitmapError: the root's image is elsewhere.
        """
        if self.record.kind != store.KIND_DEVICE:
            return
        with contextlib.suppress(StorageError):
            if identity_now(self.record) == self.record.identity:
                return
        if reason := root_elsewhere(self.record):
            raise BitmapError(self.where, reason)

    def other_size(self) -> BitmapError:
        """The error for bits of a disk that has another size now: they say nothing about the new space."""
        verb = "node resize" if self.record.kind == store.KIND_NODE else "device set-root"
        if self.growing:
            verb = "dirtmap recover"
        what = f"its image has {self.size_now} bytes now, and had {self.record.size}; '{verb}' adopts the new size"
        return BitmapError(self.where, what)

    # The bits.

    def load(self, entry: Entry, *, doubted: bool) -> tuple[NDArray[np.uint64], str | None]:
        """The bits of a bitmap, with what its tracker has marked if the image is tracked, or its tracker has died.

        Arguments and result are those of `load_saved`, and so are the errors.
        """
        from dirtmap.engine.model import bits, content

        words, damage = load_saved(self.snapshot, self.record, entry, doubted)
        if not doubted and self.view and (added := self.view.added(entry)) is not None:
            bits.combine(words, content.load(added), bits.OR, words)
        return words, damage

    def bitmap(self, entry: Entry, *, doubted: bool) -> Bitmap:
        """A bitmap of the directory, its bits still unread; dirty all over if ``doubted``."""
        return self._lazy(entry, Source(self, entry, doubted))

    def frozen(self, entry: Entry, *, doubted: bool) -> Bitmap:
        """Like `bitmap`, but a value that lasts: its bits are read, or can be read for as long as it is there.

        Errors as `Source.load` and `Snapshot.pinned`.
        """
        from dirtmap.engine.model.content import LARGE

        source = Source(self, entry, doubted)
        bitmap = self._lazy(entry, source)
        if not entry.in_use and source.uniform is None:
            if bitmap._nbits > LARGE:
                source.snapshot = self.snapshot.pinned()
                bitmap = self._lazy(entry, source)
                _ = bitmap.count  # which verifies all of them
                bitmap.damage = source.damage
            elif self.view is None and (few := load_few(self.snapshot, tree_of(self.record, entry))) is not None:
                bitmap._take(few)
            else:
                _ = bitmap.words
        return bitmap.freeze()

    def _lazy(self, entry: Entry, source: Source) -> Bitmap:
        from dirtmap.engine.model.bitmap import Bitmap

        return Bitmap._lazy(self.record.size, entry.granularity, entry.auto, entry.in_use, source)

    # Changes.

    def end_session(self, change: Change) -> Record:
        """The record without the session of its dead tracker, whose files are removed once the change is durable."""
        if self.view:
            change.afterwards.append(self.view.clean_up)
        return self.record.with_extensions(store.OF_A_SESSION)

    def rewrite(self, change: Change, new: Record, *, doubted: bool) -> None:
        """Writes all bitmaps anew, for the disk and the image of a new record.

        Old bits stay; new space is dirty; an inconsistent bitmap becomes dirty all over. The session of a dead tracker
        ends, because what the tracker marked is among the old bits.

        Args:
            change: plans the bitmaps and the new record.
            new: the record as it will be, except for its directory.
            doubted: nothing is known about the content of the disk, so all bits become dirty.

        Raises:
            BitmapError: a bitmap is too fine for the new size.
        """
        self.end_session(change)
        new = new.with_extensions(store.OF_A_SESSION)
        placed = []
        for entry in self.entries:
            bitmap = self.bitmap(entry, doubted=doubted)
            if doubted or bitmap.inconsistent:
                bitmap = type(bitmap)(new.size, entry.granularity, entry.auto).recovered()
            elif new.size != self.record.size:
                bitmap = bitmap.resized(new.size)
            base = entry if new.size == self.record.size else with_root(entry, store.ALL_ZEROS, 0, 0)
            placed.append(place_bitmap(change, new, decode_name(entry.name), bitmap, base))
        area = replace_directory(change, self.record, self.entries, placed)
        change.table.put(replace(new, generation=change.generation, directory=area))


def doubts(
    target: Store, kinds: Collection[int], broken: list[FormatError] | None = None
) -> list[tuple[Record, str | None]]:
    """The namespaces of a store that are of these kinds, sorted by name, each with why its bitmaps are in doubt.

    Args:
        target: the store.
        kinds: as of a record.
        broken: takes in why a part of the namespace table cannot be read; None: that is raised.
    """

    def look(snapshot: Snapshot) -> list[tuple[Record, str | None]]:
        table = snapshot.table()
        records = table if broken is None else table.readable(broken.append)
        return [(record, Condition(snapshot, record).doubt) for record in records if record.kind in kinds]

    return sorted(target.read(look), key=lambda found: decode_name(found[0].name))


class Source:
    """Where a bitmap has its bits until they are read; all dirty if ``doubted``.

    Attributes:
        damage: what of the bits was damaged when they were read, and so is dirty: one line, or None.
        snapshot: what they are read from.
    """

    __slots__ = "condition", "damage", "doubted", "entry", "snapshot"

    def __init__(self, condition: Condition, entry: Entry, doubted: bool) -> None:
        self.condition, self.entry, self.doubted = condition, entry, doubted
        self.damage: str | None = None
        self.snapshot = condition.snapshot

    @property
    def uniform(self) -> bool | None:
        """What all bits are, if no bits have to be read for that; else None."""
        if self.doubted or self.entry.table_offset == store.ALL_ONES:
            return True
        return False if self.entry.table_offset == store.ALL_ZEROS and not self.condition.record.tracked else None

    def load(self) -> NDArray[np.uint64]:
        """Reads the bits, and logs what is damaged; see `Condition.load`.

        Raises:
            Error: the transaction has ended.
        """
        from dirtmap.engine.model import bits

        now = self.condition
        if (fill := self.uniform) is not None:
            return bits.filled(geometry.granules(now.record.size, self.entry.granularity), fill)
        self._require_open()
        words, damage = now.load(self.entry, doubted=self.doubted)
        self._tell(damage)
        return words

    def open(self) -> Content:
        """The bits, to be read in parts, each when it is asked for. Errors as `load`."""
        from dirtmap.engine.model.content import OR, Combined, Uniform
        from dirtmap.engine.storefile.chunks import Stored

        now = self.condition
        tree = tree_of(now.record, self.entry)
        if self.doubted:
            return Uniform(tree.nbits, True)
        if self.snapshot.file.fd < 0 and (fill := self.uniform) is not None:
            return Uniform(tree.nbits, fill)
        self._require_open()
        stored = Stored(self.snapshot, tree, self._tell)
        added = now.view.added(self.entry) if now.view else None
        return stored if added is None else Combined(stored, added, OR)

    def _require_open(self) -> None:
        if self.snapshot.file.fd < 0:
            raise Error(self.snapshot.file.path, "the transaction has ended")

    def _tell(self, damage: str | None) -> None:
        self.damage = damage
        if damage:
            where, name = self.condition.where, label(decode_name(self.entry.name))
            logger(__name__).warning("%s: %s: %s", where, name, damage)
