"""`Tracker`: keeps the recording bitmaps of an image current while the embedding tool writes to it.

A bitmap's content is its saved bits OR the writesets of its *window*. The window is the intervals that it records:

    interval      0      |      1      |   2   |    3       (current)
    writeset    folded   |    frozen   | frozen|  marked into
    "sunday"    [========|=============)               ended by the checkpoint "monday"
    "monday"                           [=======|===========>
    "all"       [========|=============|=======|===========>

A cut begins an interval. Its commit to the store moves the ends of windows and nothing else, however much is dirty. A
save ORs the frozen writesets, and what the current one has, into the saved bits. The same commit says which writesets
and logs count from then on, and the frozen ones are dropped. The windows are in the store and not in the live file, so
that one commit ends one bitmap and begins the next. If the process is killed between swap and commit, the cut has not
happened, and both its intervals are in the window that is still open.

The methods of a device's tracker are about the device's bitmaps. Those of its root go on recording, and are saved, too;
they are changed by the methods that take a ``namespace``, if they are given the root's.

What survives what: see `dirtmap.engine.tracking.kernel` for marks, `dirtmap.engine.session.view` for deaths.
"""

from __future__ import annotations

import contextlib
import operator
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Final, SupportsIndex

from dirtmap.engine.control import wire
from dirtmap.engine.control.server import Answering
from dirtmap.engine.identity import identity_of
from dirtmap.engine.model import checkpoints, content
from dirtmap.engine.model.bitmap import DEFAULT_GRANULARITY, Bitmap, checked_granularity, damage_of
from dirtmap.engine.model.naming import a_checkpoint, label
from dirtmap.engine.session.livefile import Words, united
from dirtmap.engine.storefile.session import HELD_ONLY, Window, window_of
from dirtmap.engine.system import order
from dirtmap.engine.system.file import open_file
from dirtmap.engine.system.order import Rank
from dirtmap.engine.tracking.asked import Asked
from dirtmap.engine.tracking.closing import closed
from dirtmap.engine.tracking.home import Home, HomeChange, HomeView
from dirtmap.engine.tracking.kernel import Ticket, Write
from dirtmap.engine.tracking.recorder import Outside, Pinned, Recorder, Setup, words_of
from dirtmap.fmt import geometry, live, store
from dirtmap.fmt.errors import BitmapError, Error, LockedError, StorageError, UnsupportedError, printable


class Tracker(Recorder):
    """Tracks writes to an image. `Handle.track` makes it; threads may share it.

    Attributes:
        size: of the disk, in bytes.
        live: the folder of the live files, where a `Marker` in another process marks.
        last_error: why the last background save failed, or None.
        on_stop: called where somebody asks from outside to end the tracker, by ``dirtmap track stop``; it is to see to
            it that `close` is called soon. None: it is closed at once, and what marks is refused from then on.
    """

    on_stop: Callable[[], object] | None = None

    # Marking.

    def begin(self, offset: SupportsIndex, length: SupportsIndex) -> Ticket:
        """Marks a write that is about to begin, in bytes. Every later cut waits until its ticket is given to `end`.

        A cut in the same thread would wait for ever. So an asynchronous program asks for cuts in a thread of their own,
        for example with ``asyncio.to_thread``.

        Raises:
            RangeError: the range is not inside the disk; nothing is marked.
            StorageError: its region could not be logged, or the tracker is poisoned; the write must not be made.
        """
        return self._kernel.begin(offset, length)

    def end(self, ticket: Ticket) -> None:
        """Says that the write of that ticket has ended, successfully or not."""
        ticket.end()

    def write(self, offset: SupportsIndex, length: SupportsIndex) -> Write:
        """`begin` and `end` as a ``with`` block, in which the write is made. No cut may be requested inside it."""
        return self._kernel.write(offset, length)

    def mark_many(self, offsets: Iterable[SupportsIndex], lengths: Iterable[SupportsIndex]) -> None:
        """Like `mark` for each offset and its length, all or none, for arrays or any integers. Errors as `mark`."""
        self._kernel.mark_many(offsets, lengths)

    # Reading.

    def bitmap(self, name: str) -> Bitmap:
        """The bitmap as it is now, frozen.

        Raises:
            BitmapError: there is no such bitmap, or it is inconsistent.
        """
        with self._using():
            return self._home.read(self._session.uuid, lambda view: self._content(view, [name])).freeze()

    def checkpoints(self) -> list[str]:
        """The names of the checkpoints, oldest first."""
        with self._using():
            chain = self._home.read(self._session.uuid, lambda view: view.checkpoints)
            return [name for name in chain if name != checkpoints.BREAK]

    def changed_since(self, name: str) -> Bitmap:
        """What was written since a checkpoint, or since any recording bitmap began; frozen.

        Raises:
            BitmapError: there is no such bitmap; or another program removed or disabled it or a later checkpoint.
        """
        return self._changed(name, None)

    def changed_between(self, name: str, end: str) -> Bitmap:
        """What was written after one checkpoint and before a later one; frozen. Errors as `changed_since`."""
        return self._changed(name, end)

    # Cuts.

    def add(self, name: str, granularity: SupportsIndex | None = None, *, recording: bool = True) -> None:
        """Adds a new, empty bitmap, which records from this cut on. ``granularity`` is in bytes.

        Raises:
            BitmapError: the name is taken or not allowed, or the granularity is not allowed.
            StorageError: the live file has no room, or the store could not be written; nothing has changed.
        """
        self._add(name, granularity, None, recording=recording, checkpoint=False)

    def checkpoint(self, name: str, granularity: SupportsIndex | None = None, *, namespace: str | None = None) -> None:
        """Marks a point in time, durable on return: ends the checkpoint before it, and begins a new bitmap.

        Takes the same time however much is dirty. Arguments and errors as `add`; ``namespace`` as `change`.
        """
        self._add(name, granularity, namespace, recording=True, checkpoint=True)

    def clear(self, name: str) -> None:
        """Makes a bitmap clean: it begins anew at this cut. Not for checkpoints. Errors as `add`."""
        self.change([("clear", name)])

    def enable(self, name: str) -> None:
        """Lets a bitmap record from this cut on. Errors as `add`."""
        self.change([("enable", name)])

    def disable(self, name: str) -> None:
        """Stops a bitmap from recording at this cut. Errors as `add`."""
        self.change([("disable", name)])

    def remove(self, name: str) -> None:
        """Removes a bitmap. If it is a checkpoint, the one before it takes over its content, so that no bit is lost.

        Errors as `add`.
        """
        self.change([("remove", name)])

    def change(self, changes: Iterable[tuple[Any, ...]], *, namespace: str | None = None) -> None:
        """Makes several changes at one cut, in their order, all of them or none.

        Args:
            changes: each ``("clear", name)``, and so for ``enable``, ``disable`` and ``remove``; or ``("add", name,
                granularity, recording)``; ``("rename", {name: new, ...})``, all at once; ``("merge", name, bitmap)``,
                which adds the bits of a bitmap; ``("put", name, granularity, recording, bitmap)``, which adds one or
                replaces its content. A checkpoint loses no bits by it. At most one of the last two for each name.
            namespace: whose bitmaps they are, by its UUID: of a device's tracker, the device's or its root's. None: of
                what the tracker was made for.

        Raises:
            UnsupportedError: there is no such change.
            BitmapError: that namespace is not tracked here.
            As `add`.
        """
        self._change(list(changes), namespace, None)

    @contextlib.contextmanager
    def beginning(
        self, owner: str, *, namespace: str | None = None
    ) -> Iterator[Callable[[Iterable[tuple[Any, ...]]], object]]:
        """Begins changes that take longer, such as those of somebody who looks at the bitmaps first: with a cut.

        What they say is as of that cut, whenever they are made: whoever reads a bitmap after it, changes it and puts it
        back overwrites no mark that was made meanwhile. One such block at a time for each namespace.

        Args:
            owner: of the block, for messages to others.
            namespace: as `change`.

        Yields:
            `change` for changes as of the cut. It raises a `LockedError` where the bitmaps were changed meanwhile, but
            for marks.

        Raises:
            LockedError: somebody else is in such a block.
            As `add`.
        """
        with self._using():
            target = self._named(namespace)
            outside = self._outside[target]
        if not outside.guard.acquire(blocking=False):
            raise LockedError(target.where, f"is being changed by {printable(outside.owner)}")
        outside.owner = owner
        try:
            with self._cut() as number:
                # From here on the writesets of this interval stay, whatever is saved.
                outside.begun, serial = number, outside.serial
            yield lambda changes: self._change(list(changes), namespace, (number, outside, serial))
        finally:
            outside.begun = live.OPEN
            outside.guard.release()
            with contextlib.suppress(Error), self._using():
                self._forget()

    def _change(
        self, changes: list[tuple[Any, ...]], namespace: str | None, begun: tuple[int, Outside, int] | None
    ) -> None:
        """Makes changes as of now, or as of an earlier interval, if the serial number is still the same."""
        for act, *_ in changes:
            if act not in _CHANGES:
                raise UnsupportedError(self._where, f"no change to a bitmap is called '{printable(str(act))}'")
        finest = [one[2] for one in changes if one[0] in ("add", "put") and one[3]]
        former = {new: name for one in changes if one[0] == "rename" for name, new in one[1].items()}
        finest += [self._granularity_of(namespace, former.get(one[1], one[1])) for one in changes if one[0] == "enable"]
        needed = min(map(checked_granularity, finest), default=None)
        with contextlib.ExitStack() as stack:
            if begun is None:
                cuts = any(one[0] not in _WITHOUT_CUT for one in changes)
            else:
                cuts = needed is not None and needed < 1 << self._current.granularity_bits
            number = stack.enter_context(self._cut(needed) if cuts else self._uncut())
            target = self._named(namespace)
            outside = self._outside[target]
            if begun is not None:
                number, then, serial = begun
                if then is not outside or serial != outside.serial:
                    raise LockedError(target.where, "its bitmaps were changed meanwhile; nothing was done: try again")
            outside.serial += 1
            home = stack.enter_context(self._changing(target))
            for act, *more in changes:
                _CHANGES[act](self, home, number, *more)

    @contextlib.contextmanager
    def _uncut(self) -> Iterator[int]:
        """The number of the current interval, for a change that ends none."""
        with self._using():
            yield self._current.number

    def rebuild(self, name: str, begun: str, differing: Bitmap, *, namespace: str | None = None) -> None:
        """Gives a checkpoint that was lost its content anew, in one commit; see `Handle.rebuild`.

        ``namespace`` and errors as `change`, too.

        Raises:
            BitmapError: ``begun`` is not the newest checkpoint; there is a bitmap ``name`` that is none; or the disk
                has another size than what was compared.
        """
        with self._using(), self._changing(target := self._named(namespace)) as home:
            for one in (name, begun):
                self._refuse_busy(home, one)
            if differing.size != self.size:
                raise BitmapError(home.where, f"has {self.size} bytes, and had {differing.size} when compared")
            chain = list(home.checkpoints)
            if name == begun or not chain or chain[-1] != begun:
                raise BitmapError(f"{home.where}: {label(begun)}", "not the newest checkpoint")
            if name not in chain:
                if name in home.entries:
                    raise BitmapError(f"{home.where}: {label(name)}", "not a checkpoint")
                chain.insert(-1, name)
            behind = chain.index(name) + 1
            if chain[behind] == checkpoints.BREAK:
                del chain[behind]  # what was missed there is in what differs
            if checkpoints.BREAK in chain[behind:]:
                what = "not all that was written since a later checkpoint is known; remove that one first"
                raise BitmapError(f"{home.where}: {label(name)}", what)
            home.checkpoints = chain
            if chain[-2] == name:
                newer, window = home.entry(begun), home.window(begun)
                if not home.is_clean(begun):
                    differing = differing | home.saved(begun).at(differing.granularity)
                home.put(name, differing.replace(recording=newer.auto), window)
                home.checkpoints = checkpoints.without(chain, begun)
                del home.entries[begun]
            else:
                home.put(name, differing.replace(recording=False), None)
                self._remove(home, 0, begun)
            self._outside[target].serial += 1

    def _clear(self, home: HomeChange, number: int, name: str) -> None:
        entry = self._usable(home, name)
        if entry.auto:
            self._begin_window(home, name, entry.granularity, number)
        else:
            home.put_empty(name, entry.granularity, None, recording=False)

    def _enable(self, home: HomeChange, number: int, name: str) -> None:
        entry = self._usable(home, name)
        if entry.auto:
            return
        # A bitmap has one window. So what an earlier window holds and is not saved yet is saved now.
        bitmap = self._content(home, [name]) | self._since(home, number, entry.granularity)
        if bitmap != home.saved(name):
            home.put(name, bitmap, None)
        home.set_window(name, Window(number), recording=True)

    def _disable(self, home: HomeChange, number: int, name: str) -> None:
        self._usable(home, name)
        self._end_window(home, name, number)

    def _remove(self, home: HomeChange, number: int, name: str) -> None:
        self._refuse_busy(home, name)
        gone = home.entries.get(name)
        if gone is None:
            home.entry(name)  # raises
        elif name in home.checkpoints:
            older = checkpoints.predecessor(home.checkpoints, name)
            if older is not None and (gone.in_use or home.entries[older].in_use):
                home.checkpoints = checkpoints.broken(home.checkpoints, name)
            else:
                if older is not None:
                    self._refuse_busy(home, older)
                    self._fold(home, older, name)
                home.checkpoints = checkpoints.without(home.checkpoints, name)
        del home.entries[name]

    def _rename(self, home: HomeChange, number: int, names: Mapping[str, str]) -> None:
        for name in names:
            self._refuse_busy(home, name)
            if name not in home.entries:
                home.entry(name)  # raises
            if name in home.checkpoints:
                raise a_checkpoint(home.where, name)
        home.rename(names)

    def _merge(self, home: HomeChange, number: int, name: str, bitmap: Bitmap) -> None:
        self._refuse_busy(home, name)
        self._require_size(bitmap)
        entry = home.entry(name)
        added = bitmap.at(entry.granularity)
        home.put(name, (home.saved(name) | added).replace(recording=entry.auto), home.window(name))

    def _put(self, home: HomeChange, number: int, name: str, granularity: int, recording: bool, bitmap: Bitmap) -> None:
        self._refuse_busy(home, name)
        self._require_size(bitmap)
        bitmap, known = bitmap.at(granularity), home.entries.get(name)
        if known and name in home.checkpoints:
            if known.auto != recording:
                raise a_checkpoint(home.where, name)
            bitmap |= self._content(home, [name]).at(granularity)
        if recording:
            bitmap |= self._since(home, number, granularity)
        home.put(name, bitmap.replace(recording=recording), Window(number) if recording else None)

    def _require_size(self, bitmap: Bitmap) -> None:
        if bitmap.size != self.size:
            raise BitmapError(self._where, f"has {self.size} bytes; the bitmap is for a disk of {bitmap.size}")

    def _insert(self, home: HomeChange, number: int, name: str, granularity: int, recording: bool) -> None:
        if name in home.entries:
            raise _taken(home, name)
        if recording:
            self._begin_window(home, name, granularity, number)
        else:
            home.put_empty(name, granularity, None, recording=False)

    # Backups.

    def take(self, name: str) -> Bitmap:
        """Takes a recording bitmap for a backup: its content at this cut, frozen.

        The bitmap is busy until `drop` or `give_back`. Later writes are kept apart from what was taken. If the tracker
        dies, it is as if the backup had failed. A checkpoint cannot be taken: begin a new `checkpoint`, and back up
        what `changed_between` tells.

        Raises:
            BitmapError: there is no such bitmap, it does not record, is taken already, or is a checkpoint.
            StorageError: as `add`.
        """
        with self._cut() as number:
            with self._changing() as home:
                self._usable(home, name)
                window = home.window(name)
                if window is None or window.ended != live.OPEN:
                    raise BitmapError(f"{home.where}: {label(name)}", "does not record")
                home.set_window(name, replace(window, busy=True))
            self._held[name] = number
            try:
                uuid = self._session.uuid
                return self._home.read(uuid, lambda view: self._content(view, [name], before=number)).freeze()
            except BaseException:
                with contextlib.suppress(Error):  # no caller has the bitmap
                    self._give_back(name)
                raise

    def drop(self, name: str) -> None:
        """Says that the backup succeeded: the bitmap keeps only what was written since `take`. Errors as `add`."""
        with self._using():
            number = self._holding(name)
            with self._changing() as home:
                self._begin_window(home, name, home.entry(name).granularity, number)
            self._outside[self._home].serial += 1
            del self._held[name]
            self._forget()

    def give_back(self, name: str) -> None:
        """Says that the backup failed: the bitmap keeps its content and what was written since. Errors as `add`."""
        with self._using():
            self._give_back(name)

    def _give_back(self, name: str) -> None:
        self._holding(name)
        with self._changing() as home:
            window = home.window(name)
            assert window  # a taken bitmap records, and cannot be disabled
            home.set_window(name, replace(window, busy=False))
        del self._held[name]
        self._forget()

    def hold(self, names: Iterable[str], owner: str = "dirtmap", *, namespace: str | None = None) -> int:
        """Holds bitmaps as they are at this cut, until `release`: they are busy. They need not record.

        If the tracker ends, so does the hold.

        Args:
            names: of the bitmaps.
            owner: the holder, for messages to others.
            namespace: as `change`.

        Returns:
            What `held` and `release` take.

        Raises:
            BitmapError: there is no such bitmap, it is inconsistent, or taken.
            StorageError: as `add`.
        """
        chosen = tuple(dict.fromkeys(names))
        with self._cut() as number:
            target = self._named(namespace)
            with self._changing(target) as home:
                for name in chosen:
                    home.entry(name)
                    self._refuse_taken(home, name)
                    self._set_busy(home, name, True)
            self._pinned[number] = Pinned(target, chosen, owner)
        return number

    def held(self, hold: int, name: str) -> Bitmap:
        """A bitmap as it was when it was held, frozen; where a save came since, it may have later marks as well.

        Raises:
            BitmapError: it is not held.
        """
        with self._using():
            pinned = self._pinned.get(hold)
            if pinned is None or name not in pinned.names:
                raise BitmapError(f"{self._where}: {label(name)}", "not held")
            uuid = self._session.uuid
            return pinned.home.read(uuid, lambda view: self._content(view, [name], before=hold)).freeze()

    def release(self, hold: int) -> None:
        """Ends a hold."""
        with self._using():
            target, names, _ = self._pinned.pop(hold)
            with self._changing(target) as home:
                for name in names:
                    if self._holder(target.uuid, name) is None:
                        self._set_busy(home, name, False)

    def holders(self, namespace: str | None = None) -> dict[str, str]:
        """The bitmaps that are held or taken, and by whom, for messages to others; ``namespace`` as `change`."""
        with self._using():
            target = self._named(namespace)
            names = {*self._held, *(name for pinned in self._pinned.values() for name in pinned.names)}
            found = {name: self._holder(target.uuid, name) for name in sorted(names)}
            return {name: owner for name, owner in found.items() if owner is not None}

    def _set_busy(self, home: HomeChange, name: str, busy: bool) -> None:
        """So that other processes see it, as long as the tracker lives."""
        window = home.window(name)
        if busy:
            home.set_window(name, replace(window, busy=True) if window else HELD_ONLY)
        elif window:
            home.set_window(name, window.freed())

    # The size of the disk.

    def resize(self, size: SupportsIndex) -> None:
        """Grows the disk: the new space is dirty in every bitmap, and can be marked once this returns.

        A raw file is made longer, unless it is as long already; a block device must have its new size already. Marks by
        other threads go on meanwhile. If the process dies in it, nothing that was marked is lost, and recovery adopts
        the size that the image has by then.

        Args:
            size: of the disk, in bytes; not below the present one.

        Raises:
            UnsupportedError: a qcow2 image is tracked, whose own metadata has the size.
            BitmapError: the disk would shrink; the image has another size by now; a bitmap, or the session's region
                size, is too fine for a larger disk; a write of the same thread is in flight.
            FormatError: the bits of a bitmap are damaged; nothing has changed.
            StorageError, LockedError: as `save`. The disk has its old size for the tracker, although the image may be
                longer, and the call can be repeated; unless it failed between two stores: then the tracker has ended.
        """
        wanted = operator.index(size)
        self._refuse_nested(self._cuts)
        self._refuse_nested(self._lock)
        self._kernel.refuse_own()
        with order.holding(Rank.CUT, self._where), self._cuts, self._using():
            self._require_growth(wanted)
            if wanted > self.size:
                with self._undivided():
                    self._grow(wanted)

    def _require_growth(self, size: int) -> None:
        """Refuses a size that the disk cannot get."""
        if self._check_in:
            what = (
                "a qcow2 image, which is resized once its tracker has ended: 'qemu-img resize' changes its bitmaps, too"
            )
            raise UnsupportedError(self._where, what)
        if size < self.size:
            what = f"has {self.size} bytes; to shrink it, end the tracker, then let 'node resize' adopt the new size"
            raise BitmapError(self._where, what)
        if size > geometry.MAX_DISK_SIZE:
            raise BitmapError(self._where, f"no disk can have {size} bytes")
        now = identity_of(self._image)
        with open_file(self._image) as file:
            growable = file.growable  # else it gets its size from elsewhere
        if not now.is_file(self._session.image):
            raise BitmapError(self._where, "another image is in its place")
        if not (self.size <= now.size <= size if growable else now.size == size):
            raise BitmapError(self._where, f"its image has {now.size} bytes, and is to have {size}")

        def look(view: HomeView) -> None:
            cluster = view.snapshot.header.cluster_size
            for name, entry in view.entries.items():
                if geometry.table_entries(size, entry.granularity, cluster) > store.MAX_CHUNKS:
                    what = f"granularity {entry.granularity} is too fine for a disk of {size} bytes"
                    raise BitmapError(f"{view.where}: {label(name)}", what)

        for home in self._homes:
            home.read(self._session.uuid, look)
        region_bits = self._session.region_bits
        if size >> region_bits >= live.MAX_REGIONS:
            what = f"its regions of {1 << region_bits} bytes are too small for a disk of {size}; end the tracker first"
            raise BitmapError(self._where, what)

    # A device's root.

    def set_root(self, root: str, *, content_unchanged: bool = False) -> None:
        """Gives the tracked device another root node, say an overlay, and goes on tracking that.

        The old root's bitmaps are saved and, in a qcow2 image, checked in. The new root's bitmaps are fed from then on.
        All earlier writes must have ended, and no write may begin until this returns. `mark` is another function
        afterwards.

        Args:
            root: name of the node.
            content_unchanged: the caller vouches that the new root reads as the old one does. Otherwise all bitmaps of
                the device become dirty all over.

        Raises:
            BitmapError: the tracker is not a device's, a write is in flight, a bitmap is taken, or the root is refused
                as by `devices.set_root`. The tracker goes on with the old root.
            Error: as `close`; or the new root cannot be tracked, see `Handle.track`. The tracker has ended, which every
                later call reports. The device has whichever root it has.
        """
        if self._roots is None:
            raise BitmapError(self._where, "is tracked as a node, which has no root")
        self._refuse_in_flight()  # before waiting for a cut, which may wait for just that write
        self._refuse_nested(self._cuts)
        self._refuse_nested(self._lock)
        with order.holding(Rank.CUT, self._where), self._cuts, self._using(), self._roots.opened() as change:
            for name in self._held:
                raise BitmapError(f"{self._where}: {label(name)}", "busy: taken for a backup")
            for pinned in self._pinned.values():
                raise BitmapError(pinned.home.where, f"a bitmap is busy: held by {printable(pinned.owner)}")
            self._refuse_in_flight()
            self._close()
            change(root, content_unchanged, self._begin_anew)

    def _refuse_in_flight(self) -> None:
        if self._kernel.in_flight:
            raise BitmapError(self._where, "a write is in flight, to the root that is to go")

    def gated(self) -> AbstractContextManager[None]:
        """A block in which nothing is written to the disk; see `dirtmap.engine.gate`, which is for several."""
        return closed([self._kernel])

    @property
    def spool_folder(self) -> str:
        """Where bits wait for their commit that are too many for memory: on the disk that will have them."""
        return os.path.dirname(self._home.store.abspath)

    def place(self) -> dict[str, Any]:
        """Which file the image is, wherever its path leads by now: see SPEC.md, "Identity of an image"."""
        return wire.spelled(self._session.image.place)

    def _asked(self) -> AbstractContextManager[Answering]:
        return Asked(self)

    def _begin_anew(self, setup: Setup) -> Tracker:
        try:
            self._start(setup)
        except BaseException:
            self._closed = True
            self._kernel.fail(StorageError(self._where, "the tracker has ended: its new root is not tracked"))
            raise
        return self

    # How.

    def _add(
        self, name: str, granularity: SupportsIndex | None, namespace: str | None, *, recording: bool, checkpoint: bool
    ) -> None:
        chosen = checked_granularity(DEFAULT_GRANULARITY if granularity is None else granularity)
        if recording and chosen < 1 << self._current.granularity_bits:
            # Writesets as fine as this may be large, and stay so: what will be refused is refused before.
            self._require_possible(namespace, name, chosen)
        with (
            self._cut(chosen if recording else None) as number,
            self._changing(target := self._named(namespace)) as home,
        ):
            if checkpoint and name not in home.entries:
                if home.checkpoints and (before := home.checkpoints[-1]) != checkpoints.BREAK:
                    self._end_window(home, before, number)
                home.checkpoints.append(name)
                home.began[name] = time.time_ns()
            self._insert(home, number, name, chosen, recording)
            self._outside[target].serial += 1

    def require_namespace(self, namespace: str) -> None:
        """Refuses a question that is about another disk.

        Args:
            namespace: its UUID: that of the tracked node, or of the tracked device or its root.

        Raises:
            BitmapError: it is not tracked here.
            LockedError: the device is being given another root.
        """
        self._named(namespace)

    def _named(self, namespace: str | None) -> Home:
        """The home with that UUID; None: the tracker's own.

        What changes it asks where no other root can come: see `set_root`.

        Raises:
            BitmapError: it is not tracked here.
            LockedError: another root is coming just now.
        """
        if namespace is None:
            return self._home
        homes = self._homes
        if not all(home.begun for home in homes):
            raise LockedError(self._where, "is being given another root; try again")
        for home in homes:
            if str(uuid.UUID(bytes=home.uuid)) == namespace:
                return home
        raise BitmapError(self._where, "its tracker tracks another disk")

    def _require_possible(self, namespace: str | None, name: str, granularity: int) -> None:
        def look(view: HomeView) -> None:
            if name in view.entries:
                raise _taken(view, name)
            view.clean_entry(name, granularity, recording=True)

        with self._using():
            self._named(namespace).read(self._session.uuid, look)

    def _begin_window(self, home: HomeChange, name: str, granularity: int, number: int) -> None:
        """Begins a bitmap anew: it records, and holds what was written from that interval on."""
        if number > _oldest(home):
            home.put_empty(name, granularity, Window(number), recording=True)
        else:
            home.put(name, self._since(home, number, granularity), Window(number))

    def _end_window(self, home: HomeChange, name: str, number: int) -> None:
        """Stops a bitmap from recording, from that interval on."""
        window = home.window(name)
        ended = replace(window, ended=min(window.ended, number)) if window else None
        home.set_window(name, ended, recording=False)

    def _since(self, home: HomeChange, number: int, granularity: int) -> Bitmap:
        """What the saved bits of a bitmap must hold that begins with that interval: usually nothing.

        But if a save has come since, it has folded marks of that interval into the bitmaps of that time, and made the
        log of those marks void. After a power loss only saved bits tell of them.
        """
        if number > _oldest(home):
            return Bitmap(self.size, granularity, recording=True)
        parts = [words_of(writeset, self.size) for at, writeset in self._frozen.items() if at >= number]
        found = united([*parts, words_of(self._current, self.size)], self.size, granularity)
        return Bitmap._of(self.size, granularity, found, True)

    def _usable(self, home: HomeChange, name: str) -> Any:
        entry = home.entry(name)
        self._refuse_busy(home, name)
        if name in home.checkpoints:
            raise a_checkpoint(home.where, name)
        return entry

    def _refuse_busy(self, home: HomeChange, name: str) -> None:
        if (owner := self._holder(home.record.uuid, name)) is not None:
            raise BitmapError(f"{home.where}: {label(name)}", f"busy: held by {printable(owner)}")

    def _refuse_taken(self, home: HomeChange, name: str) -> None:
        if self._is_taken(home.record.uuid, name):
            self._refuse_busy(home, name)

    def _holding(self, name: str) -> int:
        if name not in self._held:
            raise BitmapError(f"{self._where}: {label(name)}", "not taken")
        return self._held[name]

    def _granularity_of(self, namespace: str | None, name: str) -> int:
        with self._using():
            home = self._named(namespace)
            return home.read(self._session.uuid, lambda view: view.entry(name).granularity)

    def _fold(self, home: HomeChange, into: str, name: str) -> None:
        """ORs the content of a checkpoint into the one before it."""
        home.entry(into)
        newer = home.entry(name)
        first, second = home.window(into), home.window(name)
        if not home.is_clean(name):
            home.put(into, checkpoints.take_over(home.saved(into), home.saved(name)), None)
        window = second
        if first and second:
            window = Window(first.began, second.ended)
        elif first:
            window = first
        home.set_window(into, window, recording=newer.auto)

    def _content(self, view: HomeView, names: list[str], *, before: int = live.OPEN) -> Bitmap:
        """The union of these bitmaps, saved and live, without the intervals from ``before`` on."""
        numbers: set[int] = set()
        finest = min(view.entry(name).granularity for name in names)
        every = {**self._frozen, self._current.number: self._current}
        for name in names:
            if window := window_of(view.entry(name)):
                end = min(window.ended, before)
                numbers.update(number for number in every if window.began <= number < end)
        parts = [words_of(every[number], self.size) for number in sorted(numbers)]
        saved = [view.saved(name, verified=True) for name in names if not view.is_clean(name)]
        parts += [Words(bitmap.words, self.size, bitmap.granularity) for bitmap in saved if not bitmap._is_large]
        marked = united(parts, self.size, finest)
        if marked.nbits > content.LARGE:  # else it is made one that lasts anyway
            marked = content.kept(marked)
        found = Bitmap._of(self.size, finest, marked, view.entry(names[-1]).auto)
        found.damage = damage_of(bitmap for bitmap in saved if not bitmap._is_large)
        for bitmap in saved:
            if bitmap._is_large:
                found |= bitmap
        return found

    def _changed(self, name: str, end: str | None) -> Bitmap:
        def read(view: HomeView) -> Bitmap:
            if name not in view.checkpoints or name == checkpoints.BREAK:
                recording = view.entry(name).auto
                if end is not None or not recording:
                    what = "neither a checkpoint nor recording" if end is None else "not a checkpoint"
                    raise BitmapError(f"{view.where}: {label(name)}", what)
                return self._content(view, [name])
            names = view.checkpoints[view.checkpoints.index(name) :]
            if end is not None:
                if end not in names[1:] or end == checkpoints.BREAK:
                    raise BitmapError(f"{view.where}: {label(end)}", f"not a checkpoint after {label(name)}")
                names = names[: names.index(end)]
            if checkpoints.BREAK in names:
                last = label(names[names.index(checkpoints.BREAK) - 1])
                what = f"not all that was written since is known: {last}, or one after it, was removed or disabled"
                raise BitmapError(f"{view.where}: {label(name)}", what)
            return self._content(view, names)

        with self._using():
            return self._home.read(self._session.uuid, read).freeze()


_CHANGES: Final[dict[Any, Callable[..., None]]] = {
    "add": Tracker._insert,
    "clear": Tracker._clear,
    "disable": Tracker._disable,
    "enable": Tracker._enable,
    "merge": Tracker._merge,
    "put": Tracker._put,
    "remove": Tracker._remove,
    "rename": Tracker._rename,
}
_WITHOUT_CUT: Final = "merge", "remove", "rename"  # nothing that is written belongs to another bitmap from then on


def _taken(view: HomeView, name: str) -> BitmapError:
    return BitmapError(f"{view.where}: {label(name)}", "the name is taken")


def _oldest(home: HomeChange) -> int:
    """The first interval that is not saved. No log tells of earlier ones, as the store says, whatever we know here."""
    assert home.session
    return home.session.oldest
