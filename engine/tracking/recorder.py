"""`Recorder`: a running session: its writesets and its log, how intervals begin, and how they are saved."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Final, NamedTuple, Protocol, Self

from dirtmap.engine.control.server import Answering, Server
from dirtmap.engine.identity import identity_of, identity_of_disk, touched
from dirtmap.engine.model import content
from dirtmap.engine.model.bitmap import Bitmap
from dirtmap.engine.model.content import Content
from dirtmap.engine.model.naming import decode_name, label
from dirtmap.engine.namespaces.condition import Condition
from dirtmap.engine.session import livefile, verdict
from dirtmap.engine.session import view as recovery
from dirtmap.engine.session.intent import IntentLog, path_of
from dirtmap.engine.session.livefile import Words, union, united
from dirtmap.engine.storefile import holds
from dirtmap.engine.storefile.session import Window
from dirtmap.engine.system import livefs, order
from dirtmap.engine.system.file import open_file
from dirtmap.engine.system.order import Rank
from dirtmap.engine.system.process import this_process
from dirtmap.engine.tracking.arena import SPARES, Arena, Writeset
from dirtmap.engine.tracking.home import Home, HomeChange, HomeView
from dirtmap.engine.tracking.kernel import Kernel
from dirtmap.engine.tracking.options import INTENTS, Options
from dirtmap.fmt import geometry, live, store
from dirtmap.fmt.errors import BitmapError, Error, GoneError, LockedError, StorageError, SyncError
from dirtmap.fmt.live import Peer

_PATIENCE_SECONDS: Final = 5.0
_BREAK_SECONDS: Final = 0.02
_MOST_INTERVALS: Final = (1 << 32) - 2  # of a session: the state has 32 bits for the number


class Roots(Protocol):
    """The root nodes that a tracked device may have, one after the other; see `Tracker.set_root`."""

    def opened(self) -> AbstractContextManager[Callable[[str, bool, Callable[[Setup], object]], object]]:
        """Opens the device for the time of the block, before the tracker gives up the old root.

        `Tracker.set_root` calls it, with the tracker's locks held.

        Yields:
            A function of the new root's name, whether its content is unchanged, and a callback that begins to track a
            root. It gives the device the new root and calls the callback; if the new root is refused, it calls the
            callback for the old one.
        """


@dataclass(frozen=True, slots=True)
class Setup:
    """What a tracker is made of.

    Attributes:
        homes: the namespaces that it feeds. The last is that of the image's node: its session begins first and ends
            last.
        image: the absolute path of the image.
        options: how to track.
        check_in: writes the bitmaps back into a qcow2 image when the session ends; None for other images.
        roots: of a device; None for a node.
        adopt: takes over a session whose tracker has died, while others mark in it; the session keeps its options but
            for ``save_interval``.
        own: one of the homes, which the tracker's methods change where they are not told another one; None: the first.
    """

    homes: list[Home]
    image: str
    options: Options
    check_in: Callable[[], object] | None = None
    roots: Roots | None = None
    adopt: bool = False
    own: Home | None = None


class Pinned(NamedTuple):
    """Bitmaps of a home that are held: their names, and who holds them, for messages."""

    home: Home
    names: tuple[str, ...]
    owner: str


class Outside:
    """Changes from outside to the bitmaps of a home.

    Attributes:
        guard: held by who is about to make some, from the cut as of which they are until they are made.
        owner: who that is, for messages to others.
        begun: the interval as of which they are.
        serial: is another one after each change of the content or the names of bitmaps, but for marks.
    """

    def __init__(self) -> None:
        self.guard, self.owner = threading.Lock(), ""
        self.begun, self.serial = live.OPEN, 0


class Recorder:
    """The session of an image; `Tracker` adds what tools call.

    Attributes:
        size: of the disk, in bytes.
        live: the folder of the live files, where a `Marker` in another process marks.
        last_error: why the last background save failed, or None.
    """

    def __init__(self, setup: Setup) -> None:
        # Held during a cut, so that cuts come one at a time; taken before the others. Reading, saving and closing do
        # not take it: a thread in the middle of a write, for whose end a cut waits, may do all of these.
        self._cuts = threading.RLock()
        # Held to change or read windows, to save and to close, but not while waiting for a write. No mark takes it.
        self._lock = threading.RLock()
        # Held to use the arena. Taken while _lock is held, never the other way round.
        self._spare_guard = threading.Lock()
        self._start(setup)

    def _start(self, setup: Setup) -> None:
        self._homes, self._roots = setup.homes, setup.roots
        self._home = setup.own or setup.homes[0]
        self._image, self._options, self._check_in = setup.image, setup.options, setup.check_in
        self.last_error: Error | None = None
        self._frozen: dict[int, Writeset] = {}
        self._held: dict[str, int] = {}  # of its own home
        self._pinned: dict[int, Pinned] = {}
        self._outside = {home: Outside() for home in self._homes}
        self._ended, self._wake = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._control: Server | None = None
        self._closed = False
        self._failed: Error | None = None  # why the tracker did not end well
        self._doubt: str | None = None  # why bitmaps are dirty all over although it ended well
        self._saves = self._remembered = 0  # number of saves, and of saves reported to the index
        if setup.adopt:
            self._adopt()
        else:
            self._begin()

    def mark(self, offset: int, length: int) -> None:
        """Makes every granule dirty that has a byte in the range; call it before the write. It is the fastest way.

        It is right only if no cut can fall between the mark and the end of its write. Otherwise see `Tracker.write`.

        Args:
            offset: in bytes from the start of the disk.
            length: in bytes; 0 marks nothing.

        Raises:
            RangeError: the range is not inside the disk; nothing is marked.
            StorageError: its region could not be logged, or the tracker is poisoned; the write must not be made.
        """
        self._kernel.mark(offset, length)  # `_begin` puts the kernel's own in place of this one, to save a call

    def save(self) -> None:
        """Writes all marks to the store. They are durable on return, and the intent log begins anew.

        Raises:
            SyncError: the tracker is poisoned; recovery will treat it as a power loss.
            StorageError, LockedError: not saved. Nothing is lost, and the caller can try again.
        """
        with self._using():
            self._save(final=False)

    def close(self) -> None:
        """Saves, and ends the session. Writes still in flight are marked; one that ends later looks like a foreign one.

        Warns with a `RuntimeWarning` if another program has opened a qcow2 image meanwhile.

        Raises:
            BitmapError: called in the middle of another act of this thread, say in a signal handler; ends unsaved.
            As `save`. A poisoned tracker ends without changing the store; `dirtmap recover` does the rest.
        """
        try:
            self._refuse_nested(self._lock)
        except BitmapError as error:  # a handler that closes usually ends the process next
            self._failed = error
            self.abandon()
            raise
        self._close()

    def _close(self) -> None:
        with order.holding(Rank.TRACKER, self._where), self._lock:
            if not self._closed:
                what = "was interrupted while it was closed; what is not saved is recovered"
                self._failed, failure = StorageError(self._where, what), self._kernel.failure
                try:
                    if failure is None:
                        self._kernel.fail(StorageError(self._where, "the tracker is closed"))
                        self._save(final=True)
                    self._failed = failure
                except Error as error:
                    self._failed = error
                    raise
                finally:
                    self._closed = True
                    self._stop_threads()
                    self._release()
                if self._doubt:
                    what = f"{self._where}: {self._doubt}: bitmaps that missed that are dirty all over now"
                    warnings.warn(what, RuntimeWarning, stacklevel=3)
        if failed := self._failed:
            raise type(failed)(failed.where, failed.what)

    def abandon(self) -> None:
        """Ends at once, as if the process had died before any mark. For a check-out that failed."""
        with self._lock:
            self._kernel.fail(StorageError(self._where, "the tracker is closed"))
            self._closed = True
            self._stop_threads()
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: TracebackType | BaseException | None) -> None:
        if kind is None:
            self.close()
            return
        with contextlib.suppress(Error):  # the block's own error is the one to raise
            self.close()

    # How.

    @property
    def _session(self) -> live.Session:
        return self._home.session

    def _begin(self) -> None:
        """Makes the live files and the log, then names the session in the store. From then on a death is recovered."""
        folder = self._options.live_folder
        livefs.make_live_folder(folder)
        *others, node = self._homes
        with contextlib.ExitStack() as undo:
            try:
                with node.change(None) as change:
                    self._require_free(change)
                    self._prepare(change, folder, undo)
                    self._enter(change)
            except BaseException:
                session = getattr(node, "session", None)
                if session and node.has(session.uuid):  # the commit was durable before it failed
                    self._leave(undo)
                raise
            try:
                for home in others:
                    with home.change(None) as change:
                        self._require_free(change)
                        self._enter(change)
            except BaseException:
                self._withdraw(node, undo)
                raise
            undo.pop_all()
        self._run()

    def _run(self) -> None:
        for home in self._homes:
            home.report()
        for name in ("mark", "mark_many", "begin", "end", "write"):
            setattr(self, name, getattr(self._kernel, name))
        _recorders.add(self)
        with self._noting():  # a tracker that cannot be asked is a tracker all the same
            self._control = Server(os.fsdecode(self._session.live), self._asked)
        for act in (self._give_signs, self._in_background):
            thread = threading.Thread(target=act, name="dirtmap tracker", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _adopt(self) -> None:
        """Takes over a session whose tracker has died, while others mark in it. They notice nothing.

        Whatever the tracker was doing has happened or not, as recovery would find it. Only where a disk was growing and
        one of its namespaces has the new size already, the rest is done first.

        Raises:
            GoneError: nobody marks in it any more: it is to be recovered.
            LockedError: it has a tracker.
            StorageError: the live files are not as described.
        """
        views = [home.store.read(home.view) for home in self._homes]
        record, session = views[-1].record, views[-1].session
        if session is None:
            raise GoneError(views[-1].where, "its session has ended")
        self._where = views[self._homes.index(self._home)].where
        self._data = recovery.data_path(record.kind, self._image)
        self._look = identity_of if record.kind == store.KIND_NODE else identity_of_disk
        path = os.fsdecode(session.live)
        with contextlib.ExitStack() as undo:
            self._folder, self.live = livefile.Folder(path, adopt=True), path
            undo.callback(self._folder.close)
            self._kernel = Kernel(self._where, path, None)  # a marker as others; only then is the log that of a keeper
            undo.callback(self._kernel.leave, True)
            log_path, intent, region_bits = os.fsdecode(session.log_path), session.intent, session.region_bits
            self._log = IntentLog(log_path, session.uuid, intent, region_bits, record.size, adopt=True)
            undo.callback(self._log.close, remove=False)
            self._kernel.keep_with(self._log)
            grown = self._look_at_dead(session.uuid)  # only now: another one may have adopted it, saved, and died
            self._arena = Arena(self._kernel, session.uuid)
            oldest, current = min(home.session.oldest for home in self._homes), self._kernel.interval
            writesets = self._arena.adopt(oldest, current)
            logs = {self._kernel.log - home.session.log for home in self._homes}
            if not writesets or not logs <= {0, 1}:
                raise StorageError(path, "the live files are not as described")
            self._current, self._frozen = writesets.pop(current), writesets
            if grown > self.size:
                if self._current.size != grown:
                    raise StorageError(path, "the live files are not as described")
                for home in self._homes:
                    if home.store.read(home.view).record.size != grown:
                        self._grow_home(home, grown, {})
                self._take_size(grown)
            me = this_process()
            for home in self._homes:
                taken = replace(home.session, pid=me.number, process_start=me.start)
                with self._changing(home) as change:
                    for name in change.entries:
                        if (window := change.window(name)) and window.busy:  # that backup has failed
                            change.set_window(name, window.freed())
                    change.session = taken
                home.session = taken
            undo.pop_all()
        self._kernel.give_sign()
        self._wake.set()
        self._run()

    def _look_at_dead(self, uuid: bytes) -> int:
        """Reads what the homes have of a session that is taken over, and the size of its disk.

        Returns:
            The size that the disk was about to get, in bytes; its own where it did not grow.
        """
        self.size = grown = self._kernel.size
        for home in self._homes:
            view = home.store.read(home.view)
            if view.session is None or view.session.uuid != uuid or self._kernel.uuid != uuid:
                raise GoneError(view.where, "its session has ended")
            home.session, grown = view.session, max(grown, view.record.size)
        return grown

    def _require_free(self, change: HomeChange) -> None:
        if change.session or Condition(change.snapshot, change.record).doubted:
            raise BitmapError(change.where, "its image changed while tracking began; try again")
        for held in holds.living(change.snapshot.file, change.record):
            raise LockedError(f"{change.where}: {label(decode_name(held.bitmap))}", f"held by {held}")

    def _prepare(self, change: HomeChange, folder: str, undo: contextlib.ExitStack) -> None:
        options, node = self._options, change.record
        self._data = recovery.data_path(node.kind, self._image)
        self._look = identity_of if node.kind == store.KIND_NODE else identity_of_disk
        self.size, identity = node.size, identity_of(self._data)
        if node.kind == store.KIND_NODE and identity.size != node.size:
            what = f"its image has {identity.size} bytes now; 'node resize' adopts the new size"
            raise BitmapError(change.where, what)
        views: list[HomeView] = [home.store.read(home.view) for home in self._homes[:-1]]
        for view in views:
            if view.record.size != self.size:
                what = f"has {view.record.size} bytes, and its root {self.size}; 'device set-root' adopts the new size"
                raise BitmapError(view.where, what)
        views.append(change)
        self._where = views[0].where
        region_bits = options.region_bits(self.size)
        finest = min(
            [region_bits, 16, *(view.entries[name].granularity_bits for view in views for name in view.recording)]
        )
        name = uuid.UUID(bytes=node.uuid).hex  # the node has the session as long as the files are needed
        live_path = os.path.join(folder, name)
        me = this_process()
        session = live.Session(
            uuid=uuid.uuid4().bytes,
            boot_id=me.boot_id,
            pid=me.number,
            process_start=me.start,
            started=time.time_ns(),
            intent=INTENTS[options.intent],
            region_bits=region_bits,
            oldest=0,
            log=0,
            image=identity,
            live=os.fsencode(live_path),
            log_path=os.fsencode(path_of(f"{change.snapshot.file.abspath}.{name}")),
        )
        for home in self._homes:
            home.session = session
        self._peers = [self._peer_of(view) for view in reversed(views)] if len(views) > 1 else [None]
        self._folder, self.live = livefile.Folder(live_path), live_path
        undo.callback(self._folder.close)
        livefile.remove_files(live_path, keep_folder=True)  # left by a death before the session was in the store
        undo.callback(livefile.remove_files, live_path)
        log_path = os.fsdecode(session.log_path)
        self._log = IntentLog(log_path, session.uuid, session.intent, region_bits, self.size)
        undo.callback(self._log.close, remove=True)
        place = identity_of(self._image).place
        livefile.make(
            live_path,
            session.uuid,
            place,
            intent=session.intent,
            region_bits=region_bits,
            size=self.size,
            log_path=session.log_path,
        )
        self._kernel = Kernel(self._where, live_path, None)
        undo.callback(self._kernel.leave, True)
        self._kernel.keep_with(self._log)
        self._arena = Arena(self._kernel, session.uuid)
        self._current = self._arena.take(0, self.size, finest)
        self._arena.prepare(self.size, finest, 1)
        self._wake.set()
        if node.kind == store.KIND_NODE:
            change.identity = identity

    def _peer_of(self, view: HomeView) -> Peer:
        paths = {os.path.realpath(home.store.abspath) for home in self._homes}
        elsewhere = view.snapshot.file.abspath if len(paths) > 1 else ""
        return Peer(view.record.uuid, view.record.name, os.fsencode(elsewhere))

    def _enter(self, change: HomeChange) -> None:
        """Names the session in the record of a home."""
        peer = self._peers[0 if change.record.kind == store.KIND_DEVICE else -1]
        moved = peer is not None and change.record.kind == store.KIND_DEVICE and change.record.root_uuid != peer.uuid
        if change.record.size != self.size or moved:
            raise BitmapError(change.where, "its image changed while tracking began; try again")
        change.reconcile_checkpoints()
        for name in change.recording:
            change.set_window(name, Window(0))
        change.session = self._session
        change.peer = peer

    def _withdraw(self, node: Home, undo: contextlib.ExitStack) -> None:
        """Removes the session from the node's record, because it did not begin."""
        try:
            with node.change(self._session.uuid) as change:
                for name in change.entries:
                    change.set_window(name, None)
                change.session = None
        except BaseException:
            self._leave(undo)
            raise

    def _leave(self, undo: contextlib.ExitStack) -> None:
        """Keeps the files of a session that a record names: recovery finds there that nothing was marked."""
        undo.pop_all()
        self._kernel.leave(True)
        self._log.close(remove=False)
        self._folder.close()

    @contextlib.contextmanager
    def _cut(self, granularity: int | None = None) -> Iterator[int]:
        """Begins an interval, waits for the writes of earlier ones, and yields its number to the block that commits.

            _cuts   |=====================================|
            _lock   |= swap =|                  |= commit =|
            waits             .................
            others             read, save, close

        A save during the wait belongs to a cut that has not happened yet. It folds marks of the new interval into
        bitmaps that end with the interval before, which is too much but never too little. Their log is void then; see
        `_begin_window`.

        Args:
            granularity: in bytes; the new interval must be at least as fine. None if the caller does not care.
        """
        self._refuse_nested(self._cuts)
        self._refuse_nested(self._lock)
        self._kernel.refuse_own()
        with order.holding(Rank.CUT, self._where), self._cuts:
            if self._is_full():
                self.save()
            with self._using():
                finest = self._current.granularity_bits
                if granularity is not None:
                    finest = min(finest, granularity.bit_length() - 1)
                # All that may wait comes first: until the swap an interruption does no harm.
                with self._spare_guard, self._undivided():
                    fresh = self._begin_interval(self.size, finest)
            # Also for writes of cuts that were interrupted here: they, too, began before this cut.
            self._kernel.drain(fresh.number)
            with self._using():
                yield fresh.number
            self._kernel.forget(fresh.number)
            self._wake.set()  # the next cut needs a spare

    def _is_full(self) -> bool:
        """True where there can be no more intervals before a save."""
        return self._current.number - min(home.session.oldest for home in self._homes) >= live.MAX_INTERVALS - 1

    @contextlib.contextmanager
    def _undivided(self) -> Iterator[None]:
        """Steps that belong together: an interruption in between, by Ctrl-C or a signal, ends the tracker.

        It is as if the process had died there, which every order of these steps survives. The session stays as it is,
        and recovery finds every mark.
        """
        try:
            yield
        except Error:
            raise  # an error of ours comes only where it does no harm
        except BaseException:
            what = "was interrupted in the middle of a cut or a save, and is not used any more; every mark is recovered"
            self._kernel.fail(StorageError(self._where, what))
            raise

    def _begin_interval(self, size: int, granularity_bits: int) -> Writeset:
        """The swap: marks go to another writeset from now on."""
        if self._current.number >= _MOST_INTERVALS:
            raise StorageError(self._where, "has cut as often as one session can; end the tracker, and begin anew")
        fresh = self._arena.take(self._current.number + 1, size, granularity_bits)
        self._frozen[self._current.number] = self._current
        self._current = fresh
        self._kernel.swap(1 << 32)
        return fresh

    def _save(self, *, final: bool) -> None:
        """Folds the live bits into the store. The new log begins before the writesets are read: see `kernel`."""
        current = self._current
        if not final:
            # Rotates only if every home has committed the current log: that log must stay until the next commit.
            with self._undivided():
                if self._is_log_saved():
                    self._kernel.rotate()
        marked = {number: words_of(one, self.size) for number, one in self._frozen.items()}
        now, granularity = words_of(current, self.size), 1 << current.granularity_bits
        if geometry.granules(self.size, granularity) <= content.LARGE:  # else it is looked at part by part
            now = Words(union([now], self.size, granularity), self.size, granularity)
        marked[current.number] = now
        unions: dict[tuple[int, int, int], Content] = {}
        for one in self._homes:
            self._save_to(one, marked, unions, final=final)
            if final:
                one.report()
        self._saves += not final  # reported in the background: the index may be busy
        if not final:
            self._forget()
        elif self._check_in:
            self._doubt = recovery.opened_by_others(self._image)
            with self._poisoning():
                self._check_in()
            self._homes[-1].report()

    def _save_to(
        self, target: Home, marked: dict[int, Words], unions: dict[tuple[int, int, int], Content], *, final: bool
    ) -> None:
        """Saves to one home, in one commit. ``unions`` caches unions of writesets, for the homes that follow."""
        session = target.session
        parts = {number: words for number, words in marked.items() if number >= session.oldest}
        with self._changing(target) as home:
            for name, entry in list(home.entries.items()):
                window = home.window(name)
                if window is None:
                    continue
                kept = None if final else window
                if kept and kept.busy and self._holder(target.uuid, name) is None:
                    kept = kept.freed()  # of a hold whose end could not be written
                if (added := self._union(parts, window, entry.granularity, unions)) is not None:
                    home.merge(name, added, kept)
                else:
                    home.set_window(name, kept)
            if not final:
                home.session = replace(session, oldest=max(marked), log=self._kernel.log)
            elif not (self._check_in and target is self._homes[-1]):
                home.session = None
                home.identity = self._look(self._image)  # before the check below, so that later changes show
                if self._check_in and recovery.opened_by_others(self._image):
                    home.make_all_dirty()
        if not final:
            target.session = replace(session, oldest=max(marked), log=self._kernel.log)

    def _union(
        self, parts: dict[int, Words], window: Window, granularity: int, unions: dict[tuple[int, int, int], Content]
    ) -> Content | None:
        """What the intervals of a window have; None where it has none of them."""
        numbers = [number for number in sorted(parts) if window.began <= number < window.ended]
        if not numbers:
            return None
        key = numbers[0], numbers[-1], granularity
        if key not in unions:
            unions[key] = united((parts[number] for number in numbers), self.size, granularity)
        return unions[key]

    def _grow(self, size: int) -> None:
        """Gives the disk another size, in the order of SPEC.md, "A disk that grows"; see `Tracker.resize`."""
        if self._is_full():
            self._save(final=False)
        shift = self._current.granularity_bits
        with self._poisoning(), self._kernel.guard:
            self._log.grow(size)
        self._kernel.beat(time.time_ns())  # else the change of the image's time is after the last sign of life
        self._kernel.reserve_logged(geometry.ceil_div(size, 1 << self._session.region_bits))
        with self._spare_guard:
            self._arena.prepare(size, shift, 1)
        for home in self._homes:
            with self._changing(home) as change:
                change.session = replace(home.session, image=replace(home.session.image, size=size))
            home.session = replace(home.session, image=replace(home.session.image, size=size))
        self._grow_image(size)
        with self._spare_guard:
            self._begin_interval(size, shift)
        grown = 0
        try:
            unions: dict[tuple[int, int, int], Content] = {}
            for home in self._homes:
                self._grow_home(home, size, unions)
                grown += 1
        except Error as error:
            if grown or not self._is_unchanged():
                what = f"was ended while the disk grew ({error}); every mark is recovered"
                self._kernel.fail(StorageError(self._where, what))
            raise
        self._take_size(size)
        self._saves += 1
        self._wake.set()

    def _take_size(self, size: int) -> None:
        """Lets marks go as far as that, now that every home has that size."""
        shift = self._current.granularity_bits
        # A bitmap that was taken before, and is dropped later, keeps what was written since, and the new space is.
        new = self.size >> shift, geometry.granules(size, 1 << shift)
        self._kernel.set_bits(self._current.buffer.offset, *new)
        self._kernel.size = self.size = size
        for outside in self._outside.values():
            outside.serial += 1
        self._forget()
        with self._spare_guard:
            self._arena.release_others(size, shift)

    def _grow_image(self, size: int) -> None:
        """Makes the image that long, durably, if it is not."""
        with open_file(self._image, writable=True) as file:
            if file.size() < size:
                with self._kernel.touching():
                    file.truncate(size)
                    file.sync()

    def _grow_home(self, target: Home, size: int, unions: dict[tuple[int, int, int], Content]) -> None:
        """Saves to one home what was marked before the current interval, and gives it the new size, in one commit."""
        oldest = self._current.number
        parts = {n: words_of(one, self.size) for n, one in self._frozen.items() if n >= target.session.oldest}
        session = replace(target.session, oldest=oldest, log=self._kernel.log)
        with self._changing(target) as home:
            home.grow(size)
            for name, entry in list(home.entries.items()):
                if entry.in_use:  # as `node resize` does
                    dirty = Bitmap(size, entry.granularity, entry.auto).recovered()
                    home.put(name, dirty, Window(oldest) if entry.auto else None)
                    continue
                window, bitmap = home.window(name), home.saved(name)
                if window and (added := self._union(parts, window, entry.granularity, unions)) is not None:
                    bitmap |= Bitmap._of(self.size, entry.granularity, added, True)
                home.put(name, bitmap.replace(recording=entry.auto).resized(size), window)
            home.session = session
        target.session = session

    def _is_unchanged(self) -> bool:
        """True where it is known for certain that no home has taken the new size: a failed commit came to nothing."""
        if self._kernel.failure:
            return False  # a sync has failed, so that nothing is known
        try:
            sizes = [home.read(self._session.uuid, lambda view: view.record.size) for home in self._homes]
        except Error:
            return False
        return all(size == self.size for size in sizes)

    def _holder(self, namespace: bytes, name: str) -> str | None:
        """Who holds a bitmap, or has taken it, for messages; None where nobody does."""
        if self._is_taken(namespace, name):
            return "its tracker, for a backup"
        pinned = self._pinned.values()
        return next((one.owner for one in pinned if name in one.names and one.home.uuid == namespace), None)

    def _is_taken(self, namespace: bytes, name: str) -> bool:
        return name in self._held and namespace == self._home.uuid

    def _forget(self) -> None:
        """Drops the saved frozen writesets. Those stay that a `drop`, or a change as of earlier, needs."""
        begun = (outside.begun for outside in self._outside.values())
        needed = min([*self._held.values(), *begun])
        oldest = min(home.session.oldest for home in self._homes)
        with self._spare_guard:
            for number in [number for number in self._frozen if number < oldest]:
                self._kernel.withdraw(number)
                if number < needed:
                    self._arena.give_back(self._frozen.pop(number))

    @contextlib.contextmanager
    def _using(self) -> Iterator[None]:
        """Lets one act run at a time, and none once the tracker has failed or ended, or its session is lost."""
        self._refuse_nested(self._lock)
        with order.holding(Rank.TRACKER, self._where), self._lock, self._acting():
            yield

    @contextlib.contextmanager
    def _acting(self) -> Iterator[None]:
        self._kernel.require_usable()
        try:
            yield
        except GoneError as error:
            self._kernel.fail(error)  # otherwise marks would go where recovery does not look
            raise

    def _refuse_nested(self, lock: Any) -> None:
        """Refuses an act in the middle of another act of the same thread, because it would wait for itself.

        Raises:
            BitmapError: this thread holds the lock.
        """
        if lock._is_owned():  # `threading.Condition` uses it, too
            what = "asked for in the middle of another act of the same thread, as in a signal's handler"
            raise BitmapError(self._where, what)

    @contextlib.contextmanager
    def _changing(self, target: Home | None = None) -> Iterator[HomeChange]:
        """Changes a home in one commit; a failed sync poisons the tracker."""
        with self._poisoning(), (target or self._home).change(self._session.uuid) as home:
            yield home

    @contextlib.contextmanager
    def _poisoning(self) -> Iterator[None]:
        try:
            yield
        except SyncError as error:
            self._kernel.poison(error)
            raise

    def _give_signs(self) -> None:
        """Writes heartbeats to the live file until the tracker ends, in a thread of its own that waits for nothing."""
        ended, kernel = self._ended, self._kernel
        while not ended.wait(verdict.HEARTBEAT_SECONDS) and not kernel.failure:
            kernel.give_sign()

    def _in_background(self) -> None:
        """Makes durable heartbeats, spare writesets and saves until the tracker ends. A failure does not stop it."""
        next_save = time.monotonic() + self._options.save_interval
        next_beat, beaten = 0.0, 0
        ended, wake = self._ended, self._wake
        while True:
            if self._kernel.failure or ended.is_set():
                return
            wake.wait(verdict.HEARTBEAT_SECONDS)
            wake.clear()
            if ended.is_set():
                return
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + verdict.DURABLE_HEARTBEAT_SECONDS
                with self._noting():
                    beaten = self._beat(beaten)
            if (saves := self._saves) != self._remembered:
                for home in self._homes:
                    home.report()
                self._remembered = saves
            for count in range(1, SPARES + 1):
                if self._arena.is_ready(self.size, self._current.granularity_bits, count):
                    continue
                # The second spare can wait: a cut that follows at once has the first, and needs the processor.
                if count > 1 and ended.wait(_BREAK_SECONDS):
                    return
                # Waits for no lock: the thread that holds it may be about to wait for this thread's end.
                if self._spare_guard.acquire(blocking=False):  # not _lock, so a cut waits only if it needs a spare
                    try:
                        with self._noting():
                            if not self._closed:
                                self._arena.prepare(self.size, self._current.granularity_bits, count)
                    finally:
                        self._spare_guard.release()
            if self._options.save_interval and time.monotonic() >= next_save and self._lock.acquire(blocking=False):
                try:
                    # On an error such as a full disk the marks stay where they are, and the next round tries again.
                    with self._noting(), order.holding(Rank.TRACKER, self._where), self._acting():
                        if self._kernel.logged or self._frozen or not self._is_log_saved():
                            self._save(final=False)
                        self.last_error = None
                finally:
                    self._lock.release()
                next_save = time.monotonic() + self._options.save_interval

    def _is_log_saved(self) -> bool:
        """False if a save has begun a new log and then failed, so that not every home knows that log."""
        return all(self._kernel.log == home.session.log for home in self._homes)

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """Keeps the error of a background act in `last_error`."""
        try:
            yield
        except Error as error:
            self.last_error = error

    def _beat(self, before: int) -> int:
        """Makes a heartbeat durable if the image was touched since ``before``. Returns when it was last, in ns."""
        modified = touched(self._data)
        if modified != before:
            self._kernel.beat(time.time_ns())
        return modified

    def _asked(self) -> AbstractContextManager[Answering]:
        """A conversation with whoever asks from outside."""
        raise NotImplementedError

    def _stop_threads(self) -> None:
        self._ended.set()
        self._wake.set()
        threads, self._threads = self._threads, []
        for thread in threads:
            if thread is not threading.current_thread():
                # A signal handler may run here while this thread holds a lock for which that one waits.
                thread.join(_PATIENCE_SECONDS)

    def _release(self) -> None:
        """Closes the files, and removes them if the session has ended."""
        ended = not any(home.has(self._session.uuid) for home in self._homes)
        if self._control is not None:
            self._control.close()
        self._kernel.leave(True)
        self._log.close(remove=ended)
        folder = os.fsdecode(self._session.live)
        if ended and livefile.is_of(folder, self._session.uuid):
            livefile.remove_files(folder)
        self._folder.close()
        for home in self._homes:
            home.close()

    def _abandon(self) -> None:
        """Gives up the tracker in a forked child: it belongs to the parent, whose marks a child's would undo.

        Another thread of the parent may have held a lock, which nobody releases in the child.
        """
        self._cuts, self._lock, self._spare_guard = threading.RLock(), threading.RLock(), threading.Lock()
        self._kernel.abandon(StorageError(self._where, "a tracker cannot be used in a forked process"))
        self._log.close(remove=False)  # the lock is the parent's, and ends with it
        self._folder.close()
        if self._control is not None:
            self._control.abandon()
        self._closed = True


def words_of(writeset: Writeset, size: int) -> Words:
    """A writeset's bits, as of a disk of ``size`` bytes; if it has that size, a view, which shows later marks, too."""
    return Words(writeset.words, writeset.size, 1 << writeset.granularity_bits).sized(size)


_recorders: weakref.WeakSet[Recorder] = weakref.WeakSet()


def _abandon_all() -> None:
    for recorder in list(_recorders):
        recorder._abandon()


os.register_at_fork(after_in_child=_abandon_all)
