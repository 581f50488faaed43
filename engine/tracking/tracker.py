"""`Tracker`: an image's recording bitmaps while an embedding tool writes to it.

A bitmap's content is its saved bits OR the writesets of its *window*, the intervals that it records:

    interval      0      |      1      |   2   |    3       (current)
    writeset    folded   |    frozen   | frozen|  marked into
    "sunday"    [========|=============)               ended by the checkpoint "monday"
    "monday"                           [=======|===========>
    "all"       [========|=============|=======|===========>

A cut begins an interval, and its commit to the store moves windows' ends, nothing else, whatever is dirty. A save ORs
the frozen writesets and what is in the current one into the saved bits, in one commit that also says which writesets
and logs count from then on; then the frozen ones are dropped. The windows are in the store and not in the live file, so
that an end of one bitmap and the beginning of the next are one commit: killed between swap and commit, a cut has not
happened, and its two intervals are both in the window that is still open.

What is lost when: see `dirtmap.engine.tracking.marking` for marks, `dirtmap.engine.tracking.recovery` for deaths.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, SupportsIndex

from dirtmap.engine import fileio
from dirtmap.engine.bitmap import DEFAULT_GRANULARITY, Bitmap
from dirtmap.engine.namespace import encode_name, label
from dirtmap.engine.store.bitmaps import doubts
from dirtmap.engine.store.identity import identity_of
from dirtmap.engine.tracking import livefile, process, recovery
from dirtmap.engine.tracking.home import Home, HomeChange, View
from dirtmap.engine.tracking.intent import IntentLog
from dirtmap.engine.tracking.livefile import (
    CURRENT,
    DEFAULT_FOLDER,
    EVENT,
    HEARTBEAT,
    Control,
    Words,
    Writeset,
    union,
    user_folder,
)
from dirtmap.engine.tracking.marking import Kernel, Ticket
from dirtmap.engine.tracking.recovery import Window, window_of
from dirtmap.fmt import geometry, live, store
from dirtmap.fmt.errors import BitmapError, Error, StorageError, SyncError

if TYPE_CHECKING:
    from dirtmap.engine.store.namespace import StoredImage

INTENTS: Final = {"off": live.INTENT_OFF, "region": live.INTENT_REGION}
SAVE_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Options:
    """How to track.

    Attributes:
        live: the folder for live files; on a tmpfs, or they do not survive what they are for at the speed they have.
        intent: ``region``: after a power loss dirty is what was saved and the regions written to since; ``off``: all.
        region_size: bytes of the disk for each region of the intent log; a power of two; None for what suits the disk.
        save_interval: seconds between saves; 0 for none but those asked for.
    """

    live: str = DEFAULT_FOLDER
    intent: str = "region"
    region_size: int | None = None
    save_interval: float = SAVE_SECONDS

    def region_bits(self, size: int) -> int:
        """log2 of the region size.

        Raises:
            BitmapError: what was asked for cannot be.
        """
        if self.region_size is None:
            return live.region_bits(size)
        chosen = self.region_size.bit_length() - 1
        too_many = size >> chosen >= live.MAX_REGIONS if self.region_size > 0 else True
        if not geometry.is_power_of_two(self.region_size) or chosen < live.MIN_REGION_BITS or too_many:
            what = (
                f"{self.region_size} is no power of two from {1 << live.MIN_REGION_BITS} bytes up, or too small for "
                "the disk"
            )
            raise BitmapError("region size", what)
        return chosen


class Tracker:
    """Tracks writes to an image; made by `Namespace.track`. Threads may share it.

    Attributes:
        mark: ``mark(offset, length)``: makes a range dirty; see there. The fastest; right only where no cut can fall
            between the mark and the end of its write.
        size: of the disk, bytes.
        last_error: what went wrong with the last save in the background, or None.
    """

    def __init__(self, home: Home, image: str, options: Options, check_in: Callable[[], object] | None) -> None:
        self._homes = [home]
        self._image, self._options, self._check_in = image, options, check_in
        self.last_error: Error | None = None
        # Held to cut, to save and to close: one at a time. Marks never take it.
        self._lock = threading.RLock()
        self._frozen: dict[int, Writeset] = {}
        self._held: dict[str, int] = {}
        self._spare: Writeset | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._begin()

    # Marking.

    def begin(self, offset: SupportsIndex, length: SupportsIndex) -> Ticket:
        """Marks a write that is about to begin; every later cut waits until its ticket is given to `end`.

        Raises:
            RangeError: not inside the disk; nothing is marked.
            StorageError: its region could not be logged, or the tracker is poisoned; the write must not be made.
        """
        return self._kernel.begin(offset, length)

    def end(self, ticket: Ticket) -> None:
        """The write of that ticket has ended, well or not."""
        self._kernel.end(ticket)

    def write(self, offset: SupportsIndex, length: SupportsIndex) -> Write:
        """`begin` and `end` as a ``with`` block, in which the write is made. No cut may be asked for inside it."""
        return Write(self._kernel, offset, length)

    def mark_many(self, offsets: Iterable[SupportsIndex], lengths: Iterable[SupportsIndex]) -> None:
        """As `mark` for each offset and its length, all or none; for arrays or any integers."""
        self._kernel.mark_many(offsets, lengths)

    # Reading.

    def bitmap(self, name: str) -> Bitmap:
        """A bitmap as it is now, frozen.

        Raises:
            BitmapNotFoundError, BitmapError: none of that name, or inconsistent.
        """
        with self._using():
            return self._home.read(self._session.uuid, lambda view: self._content(view, [name])).freeze()

    def checkpoints(self) -> list[str]:
        """The names of the checkpoints, oldest first."""
        with self._using():
            return self._home.read(self._session.uuid, lambda view: view.checkpoints)

    def changed_since(self, name: str) -> Bitmap:
        """What was written since a checkpoint, or since any recording bitmap began; frozen.

        Raises:
            BitmapError: there is none of that name, or one after it is gone or does not record.
        """
        return self._changed(name, None)

    def changed_between(self, name: str, end: str) -> Bitmap:
        """What was written after one checkpoint and before a later one; frozen. Errors as `changed_since`."""
        return self._changed(name, end)

    # Cuts.

    def add(self, name: str, granularity: int | None = None, *, recording: bool = True) -> None:
        """A new, empty bitmap, that records from this cut on.

        Raises:
            BitmapError: the name is taken or not allowed, or the granularity is not.
            StorageError: the live file has no room, or the store could not be written; nothing has changed.
        """
        self._add(name, granularity, recording=recording, checkpoint=False)

    def checkpoint(self, name: str, granularity: int | None = None) -> None:
        """A point in time, durable on return: the checkpoint before it ends here, and a new bitmap begins.

        Takes the same time whatever is dirty. Errors as `add`.
        """
        self._add(name, granularity, recording=True, checkpoint=True)

    def clear(self, name: str) -> None:
        """Makes a bitmap clean: it begins anew at this cut. Not a checkpoint, which others rely on. Errors as `add`."""

        def edit(home: HomeChange, number: int) -> None:
            entry = self._usable(home, name)
            window = Window(number) if entry.auto else None
            home.put_empty(name, entry.granularity, window, recording=entry.auto)

        self._cut(edit)

    def enable(self, name: str) -> None:
        """Has a bitmap record from this cut on. Errors as `add`."""

        def edit(home: HomeChange, number: int) -> None:
            entry = self._usable(home, name)
            if entry.auto:
                return
            # What an earlier window has that is not saved yet, is: a bitmap has one window.
            bitmap = self._content(home, [name])
            if bitmap != home.saved(name):
                home.put(name, bitmap, None)
            home.set_window(name, Window(number), recording=True)

        self._cut(edit, self._granularity_of(name))

    def disable(self, name: str) -> None:
        """Has a bitmap record no more from this cut on. Errors as `add`."""

        def edit(home: HomeChange, number: int) -> None:
            self._usable(home, name)
            window = home.window(name)
            ended = replace(window, ended=min(window.ended, number)) if window else None
            home.set_window(name, ended, recording=False)

        self._cut(edit)

    def remove(self, name: str) -> None:
        """Removes a bitmap; what a checkpoint has goes to the one before it, so that no answer loses a bit.

        Errors as `add`.
        """
        with self._using(), self._changing() as home:
            self._refuse_busy(home, name)
            home.entry(name)
            if name in home.checkpoints and (at := home.checkpoints.index(name)):
                self._fold(home, home.checkpoints[at - 1], name)
            home.checkpoints = [other for other in home.checkpoints if other != name]
            del home.entries[name]

    # Backups.

    def take(self, name: str) -> Bitmap:
        """Takes a recording bitmap for a backup: what it holds at this cut, frozen.

        It is busy until `drop` or `give_back`. What is written from here on is kept apart. If the tracker dies, it is
        as if the backup had failed.
        """

        def edit(home: HomeChange, number: int) -> None:
            self._usable(home, name)
            window = home.window(name)
            if window is None or window.ended != live.OPEN:
                raise BitmapError(f"{home.where}: {label(name)}", "does not record")
            home.set_window(name, replace(window, busy=True))

        with self._lock:
            number = self._cut(edit)
            self._held[name] = number
            return self._home.read(self._session.uuid, lambda view: self._content(view, [name], before=number)).freeze()

    def drop(self, name: str) -> None:
        """The backup has succeeded: of a taken bitmap only what was written since `take` is left. Errors as `add`."""
        with self._using():
            number = self._holding(name)
            with self._changing() as home:
                entry = home.entry(name)
                since = Bitmap(self.size, entry.granularity, recording=True)
                if number < self._session.oldest:  # saved already, together with what is to go
                    parts = [_words(one) for at, one in self._frozen.items() if number <= at < self._session.oldest]
                    parts.append(_words(self._current))
                    since._words = union(parts, self.size, entry.granularity)
                home.put(name, since, Window(number))
            del self._held[name]
            self._forget()

    def give_back(self, name: str) -> None:
        """The backup has failed: the taken bitmap holds what it held, and what was written since. Errors as `add`."""
        with self._using():
            self._holding(name)
            with self._changing() as home:
                window = home.window(name)
                assert window  # a taken bitmap records, and cannot be disabled
                home.set_window(name, replace(window, busy=False))
            del self._held[name]
            self._forget()

    # Saving and closing.

    def save(self) -> None:
        """Writes all marks to the store: durable on return, and the intent log begins anew.

        Raises:
            SyncError: the tracker is poisoned; recovery will treat it as a power loss.
            StorageError, LockedError: not saved; nothing is lost, and it can be tried again.
        """
        with self._using():
            self._save(final=False)

    def close(self) -> None:
        """Saves, and ends the session. Writes still in flight are marked; one that ends later looks like another's.

        Raises:
            As `save`. A poisoned tracker ends without the store being touched; `dirtmap recover` does the rest.
        """
        with self._lock:
            if self._closed:
                return
            failure = self._kernel.failure
            try:
                if failure is None:
                    self._kernel.refuse(Error(self._where, "the tracker is closed"))
                    self._save(final=True)
            finally:
                self._closed = True
                self._stop_thread()
                self._release()
        if failure:
            raise failure

    def abandon(self) -> None:
        """Ends at once, as if the process had died, but for the marks that nobody made: for a check-out that failed."""
        with self._lock:
            self._kernel.refuse(Error(self._where, "the tracker is closed"))
            self._closed = True
            self._stop_thread()
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: TracebackType | BaseException | None) -> None:
        if kind is None:
            self.close()
            return
        with contextlib.suppress(Error):  # the first error is the one to hear of
            self.close()

    # How.

    @property
    def _home(self) -> Home:
        return self._homes[0]

    def _begin(self) -> None:
        """Makes the live files and the log, then names the session in the store: from then on a death is recovered."""
        home, folder = self._home, user_folder(self._options.live)
        fileio.make_live_folder(folder)
        with contextlib.ExitStack() as undo:
            with home.change(None) as change:
                self._prepare(change, folder, undo)
            undo.pop_all()
        self.mark = self._kernel.mark
        _trackers.add(self)
        self._thread = threading.Thread(target=self._in_background, name="dirtmap tracker", daemon=True)
        self._thread.start()

    def _prepare(self, change: HomeChange, folder: str, undo: contextlib.ExitStack) -> None:
        options, record = self._options, change.record
        if change.session or doubts(change.snapshot, record):
            raise BitmapError(change.where, "its image changed while tracking began; try again")
        if options.intent not in INTENTS:
            raise BitmapError("intent", f"'{options.intent}' is none of {', '.join(INTENTS)}")
        self.size, self._where = record.size, change.where
        identity = identity_of(self._image)
        if record.kind == store.KIND_NODE and identity.size != record.size:
            what = f"its image has {identity.size} bytes now; 'node resize' adopts the new size"
            raise BitmapError(change.where, what)
        recording = [name for name, entry in change.entries.items() if entry.auto and not entry.in_use]
        region_bits = options.region_bits(self.size)
        finest = min([region_bits, 16, *(change.entries[name].granularity_bits for name in recording)])
        name = uuid.UUID(bytes=record.uuid).hex
        live_path = os.path.join(folder, name)
        pid, start = process.own()
        self._session = session = live.Session(
            uuid=uuid.uuid4().bytes,
            boot_id=process.boot_id(),
            pid=pid,
            process_start=start,
            started=time.time_ns(),
            intent=INTENTS[options.intent],
            region_bits=region_bits,
            oldest=0,
            log=0,
            image_device=identity.device,
            image_inode=identity.inode,
            image_mtime=identity.mtime_ns,
            image_size=identity.size,
            live=os.fsencode(live_path),
            log_path=os.fsencode(f"{os.path.abspath(self._home.store.path)}.{name}.intent"),
        )
        livefile.remove_files(live_path)  # what a crash left before its session was in the store
        fileio.make_live_folder(live_path)
        undo.callback(livefile.remove_files, live_path)
        self._control = Control(live_path, session.uuid)
        self._control.fields[EVENT] = self._control.fields[HEARTBEAT] = session.started
        self._current = self._new_writeset(0, finest)
        self._spare = self._new_writeset(1, finest)
        log_path = os.fsdecode(session.log_path)
        self._log = IntentLog(log_path, session.uuid, session.intent, region_bits, self.size)
        undo.callback(self._log.close, remove=True)
        log = self._log if session.intent == live.INTENT_REGION else None
        self._kernel = Kernel(self._where, self.size, self._current, region_bits, log, self._control)
        for name in recording:
            change.set_window(name, Window(0))
        change.session = session
        if record.kind == store.KIND_NODE:
            change.identity = identity

    def _new_writeset(self, number: int, granularity_bits: int) -> Writeset:
        folder = os.fsdecode(self._session.live)
        return Writeset(folder, self._session.uuid, number, self.size, granularity_bits)

    def _cut(self, edit: Callable[[HomeChange, int], None], granularity: int | None = None) -> int:
        """Begins an interval, waits for the writes of the one before, then commits ``edit``.

        Args:
            edit: changes the windows; gets the home and the number of the new interval.
            granularity: what the new interval has to be as fine as, bytes.
        """
        with self._using():
            finest = self._current.granularity_bits
            if granularity is not None:
                finest = min(finest, granularity.bit_length() - 1)
            fresh = self._take_spare(finest)
            old, self._current = self._current, fresh
            self._frozen[old.number] = old
            self._control.fields[CURRENT] = fresh.number  # before anything is marked in it
            self._kernel.swap(fresh)
            self.mark = self._kernel.mark
            self._kernel.drain(old)
            with self._changing() as home:
                edit(home, fresh.number)
            return fresh.number

    def _take_spare(self, granularity_bits: int) -> Writeset:
        spare, self._spare = self._spare, None
        number = self._current.number + 1
        if spare is None or spare.granularity_bits != granularity_bits or spare.number != number:
            if spare:
                spare.forget()
            spare = self._new_writeset(number, granularity_bits)
        return spare

    def _add(self, name: str, granularity: int | None, *, recording: bool, checkpoint: bool) -> None:
        with self._using():
            chosen = DEFAULT_GRANULARITY if granularity is None else granularity
            Bitmap(self.size, chosen)  # judges the granularity

            def edit(home: HomeChange, number: int) -> None:
                if name in home.entries:
                    raise BitmapError(f"{home.where}: {label(name)}", "the name is taken")
                if checkpoint:
                    home.checkpoints = [other for other in home.checkpoints if other != name]
                    if home.checkpoints and home.checkpoints[-1] in home.entries:
                        before = home.checkpoints[-1]
                        window = home.window(before)
                        ended = replace(window, ended=min(window.ended, number)) if window else None
                        home.set_window(before, ended, recording=False)
                    home.checkpoints.append(name)
                home.put_empty(name, chosen, Window(number) if recording else None, recording=recording)

            self._cut(edit, chosen if recording else None)

    def _usable(self, home: HomeChange, name: str) -> Any:
        entry = home.entry(name)
        self._refuse_busy(home, name)
        if name in home.checkpoints:
            raise BitmapError(f"{home.where}: {label(name)}", "a checkpoint, which others rely on; it can be removed")
        return entry

    def _refuse_busy(self, home: HomeChange, name: str) -> None:
        if name in self._held:
            raise BitmapError(f"{home.where}: {label(name)}", "busy: taken for a backup")

    def _holding(self, name: str) -> int:
        if name not in self._held:
            raise BitmapError(f"{self._where}: {label(name)}", "not taken")
        return self._held[name]

    def _granularity_of(self, name: str) -> int:
        with self._using():
            return self._home.read(self._session.uuid, lambda view: view.entry(name).granularity)

    def _fold(self, home: HomeChange, into: str, name: str) -> None:
        """Adds a checkpoint to the one before it."""
        older, newer = home.entry(into), home.entry(name)
        first, second = home.window(into), home.window(name)
        if not home.is_clean(name):
            merged = home.saved(into) | home.saved(name).at(older.granularity)
            home.put(into, merged.at(older.granularity).replace(recording=newer.auto), None)
        window = second
        if first and second:
            window = Window(first.began, second.ended)
        elif first:
            window = first
        home.set_window(into, window, recording=newer.auto)

    def _content(self, view: View, names: list[str], *, before: int = live.OPEN) -> Bitmap:
        """The union of bitmaps, saved and live, without intervals from ``before`` on."""
        numbers: set[int] = set()
        finest = min(view.entry(name).granularity for name in names)
        every = {**self._frozen, self._current.number: self._current}
        for name in names:
            if window := window_of(view.entry(name)):
                end = min(window.ended, before)
                numbers.update(number for number in every if window.began <= number < end)
        parts = [_words(every[number]) for number in sorted(numbers)]
        saved = [view.saved(name) for name in names if not view.is_clean(name)]
        parts += [Words(bitmap.words, self.size, bitmap.granularity) for bitmap in saved]
        result = Bitmap(self.size, finest, view.entry(names[-1]).auto)
        result._words = union(parts, self.size, finest)
        return result

    def _changed(self, name: str, end: str | None) -> Bitmap:
        def read(view: View) -> Bitmap:
            if name not in view.checkpoints:
                if end is not None or not view.entry(name).auto:
                    raise BitmapError(f"{view.where}: {label(name)}", "not a checkpoint, nor recording")
                return self._content(view, [name])
            names = view.checkpoints[view.checkpoints.index(name) :]
            if end is not None:
                if end not in names[1:]:
                    raise BitmapError(f"{view.where}: {label(end)}", f"not a checkpoint after {label(name)}")
                names = names[: names.index(end)]
            for one in names:
                if one not in view.entries:
                    what = f"was removed by itself, so what was written since {label(name)} is not known"
                    raise BitmapError(f"{view.where}: {label(one)}", what)
            if end is None and not view.entry(names[-1]).auto:
                what = f"does not record, so what was written since {label(name)} is not known"
                raise BitmapError(f"{view.where}: {label(names[-1])}", what)
            return self._content(view, names)

        with self._using():
            return self._home.read(self._session.uuid, read).freeze()

    def _save(self, *, final: bool) -> None:
        """Folds what is live into the store. The new log is there before the writesets are read: see `marking`."""
        session, current = self._session, self._current
        if not final:
            # Not twice without a commit between: the log of the last commit has to stay until the next.
            self._kernel.swap(rotate=self._log.number == session.log)
        parts = {number: _words(one) for number, one in self._frozen.items() if number >= session.oldest}
        parts[current.number] = Words(current.words.copy(), self.size, 1 << current.granularity_bits)
        unions: dict[tuple[int, int, int], Any] = {}
        with self._changing() as home:
            for name, entry in list(home.entries.items()):
                window = home.window(name)
                if window is None:
                    continue
                numbers = [number for number in sorted(parts) if window.began <= number < window.ended]
                kept = None if final else window
                if numbers:
                    key = numbers[0], numbers[-1], entry.granularity
                    if key not in unions:
                        chosen = (parts[number] for number in numbers)
                        unions[key] = Bitmap(self.size, entry.granularity)
                        unions[key]._words = union(chosen, self.size, entry.granularity)
                    saved = home.saved(name)
                    merged = saved | unions[key]
                    if merged != saved:
                        home.put(name, merged.replace(recording=entry.auto), kept)
                        continue
                home.set_window(name, kept)
            if final:
                if not self._check_in:
                    home.session = None
                    home.identity = identity_of(self._image)
            else:
                home.session = replace(session, oldest=current.number, log=self._log.number)
        if final:
            if self._check_in:
                self._check_in()
            return
        self._session = replace(session, oldest=current.number, log=self._log.number)
        self._forget()

    def _forget(self) -> None:
        """Drops the frozen writesets that are saved; in memory stay those that a taken bitmap needs to be dropped."""
        needed = min(self._held.values(), default=live.OPEN)
        for number in [number for number in self._frozen if number < self._session.oldest]:
            self._frozen[number].forget()
            if number < needed:
                del self._frozen[number]

    @contextlib.contextmanager
    def _using(self) -> Iterator[None]:
        """One act at a time, and none on a tracker that has failed or ended."""
        with self._lock:
            if self._kernel.failure:
                raise self._kernel.failure
            yield

    @contextlib.contextmanager
    def _changing(self) -> Iterator[HomeChange]:
        """A commit; a failed sync poisons the tracker."""
        try:
            with self._home.change(self._session.uuid) as home:
                yield home
        except SyncError as error:
            self._kernel.poison(error)
            raise

    def _in_background(self) -> None:
        """Signs of life, spare writesets, and saves, until the tracker ends."""
        next_save = time.monotonic() + self._options.save_interval
        next_beat, beaten = 0.0, 0
        while True:
            if self._kernel.failure or self._ended.wait(recovery.HEARTBEAT_SECONDS):
                return
            self._control.fields[HEARTBEAT] = time.time_ns()
            try:
                if time.monotonic() >= next_beat:
                    next_beat = time.monotonic() + recovery.DURABLE_HEARTBEAT_SECONDS
                    beaten = self._beat(beaten)
                if self._spare is None and self._lock.acquire(blocking=False):
                    try:
                        if self._spare is None and not self._closed:
                            current = self._current
                            self._spare = self._new_writeset(current.number + 1, current.granularity_bits)
                    finally:
                        self._lock.release()
                if self._options.save_interval and time.monotonic() >= next_save:
                    if self._kernel.logged or self._frozen:
                        self.save()
                    self.last_error = None
                    next_save = time.monotonic() + self._options.save_interval
            except Error as error:
                # A full disk: the marks stay where they are, and it is tried again.
                self.last_error = error
                next_save = time.monotonic() + self._options.save_interval

    def _beat(self, before: int) -> int:
        """A sign of life on disk, where the image has changed since the last; returns when it changed."""
        modified = identity_of(self._image).mtime_ns
        if modified != before:
            try:
                self._log.beat(time.time_ns())
            except SyncError as error:
                self._kernel.poison(error)
                raise
        return modified

    def _stop_thread(self) -> None:
        self._ended.set()
        thread, self._thread = self._thread, None
        if thread and thread is not threading.current_thread():
            # It may be waiting for the lock that we hold.
            self._lock.release()
            try:
                thread.join()
            finally:
                self._lock.acquire()

    def _release(self) -> None:
        """Gives up the files; those of a session that has ended are removed."""
        ended = True
        with contextlib.suppress(Error):
            record = self._home.store.read(lambda snapshot: snapshot.table().get(self._home.name))
            ended = record is None or record.extension(live.EXTENSION_SESSION) is None
        self._log.close(remove=ended)
        if ended:
            livefile.remove_files(os.fsdecode(self._session.live))
        self._home.close()

    def _abandon(self) -> None:
        """In a forked child: the tracker is the parent's, whose marks ours would undo."""
        self._kernel.abandon(StorageError(self._where, "a tracker cannot be used in a forked process"))
        self._log.close(remove=False)  # the lock is the parent's, and ends with it
        self._closed = True


class Write:
    """A write in progress; see `Tracker.write`."""

    __slots__ = ("_kernel", "_length", "_offset", "_ticket")

    def __init__(self, kernel: Kernel, offset: SupportsIndex, length: SupportsIndex) -> None:
        self._kernel, self._offset, self._length = kernel, offset, length
        self._ticket: Ticket | None = None

    def __enter__(self) -> None:
        self._ticket = self._kernel.begin(self._offset, self._length)

    def __exit__(self, *_: object) -> None:
        if self._ticket:
            self._kernel.end(self._ticket)


def track_node(image: StoredImage, options: dict[str, Any]) -> Tracker:
    """Tracks an image whose bitmaps are in a store; see `Namespace.track`."""
    chosen = Options(**options)
    home = Home(image.path, encode_name(image.name or ""))
    try:
        if home.store.read(home.needs_recovery):
            image.recover()
        path = home.store.read(lambda snapshot: home.record(snapshot).path)
        return Tracker(home, os.fsdecode(path), chosen, None)
    except BaseException:
        home.close()
        raise


def _words(writeset: Writeset) -> Words:
    return Words(writeset.words, writeset.size, 1 << writeset.granularity_bits)


_trackers: weakref.WeakSet[Tracker] = weakref.WeakSet()


def _abandon_all() -> None:
    for tracker in list(_trackers):
        tracker._abandon()


os.register_at_fork(after_in_child=_abandon_all)
