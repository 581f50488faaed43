"""The bitmaps of a tracked qcow2 image: checked out into a store while it is tracked, and checked in afterwards.

    check-out   1  store: the session, with a copy of the bits     check-in   1  store: all that was marked
                2  image: its autoclear bit "tracked" on                      2  image: the bits, not in use any more
                3  image: all bitmaps in use                                  3  image: "tracked" off
                                                                              4  store: the session and its copy gone

A program that opens the image for writing clears the autoclear bit "tracked" if it does not know it, as QEMU does; and
QEMU does not touch bitmaps in use. So after a crash, at or between any steps, each bitmap is decided on its own:

    image: not in use, "tracked" off    what either has: not checked out yet, or checked in; or another program made it
                                        usable, perhaps while the tracker lived, without knowing what that has marked
    image: not in use, "tracked" on     what either has: the crash was within steps 2 and 3
    in use, or not there; on            what the session has: see `dirtmap.engine.session.view`
    in use, or not there; off           all dirty: others may have written to the image
    not in use, not the session's; off  all dirty if it records: others have added it, perhaps while the tracker lived

A device that is tracked with the image ends its session before step 2 of the check-in. After step 3 its record is told
how the image looks now. After a crash in between, the device is all dirty.

A bitmap that is in use and not in the session was removed by the tracker if "tracked" is on; else it is left alone. If
the session or its directory is lost, nothing is known to be removed, and everything is dirty.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

from dirtmap.engine.identity import identity_of_disk
from dirtmap.engine.model.bitmap import Bitmap
from dirtmap.engine.model.checkpoints import shown
from dirtmap.engine.model.infos import BitmapInfo, ImageInfo, Recovery, Status
from dirtmap.engine.model.namespace import Namespace
from dirtmap.engine.model.naming import decode_name, encode_name, not_found
from dirtmap.engine.model.transaction import Transaction
from dirtmap.engine.namespaces import salvage
from dirtmap.engine.namespaces.condition import bitmap_of, busy_of, doubts
from dirtmap.engine.namespaces.image import Image
from dirtmap.engine.namespaces.ports import HostPort
from dirtmap.engine.namespaces.recover import confirm, log_recovered, recover_tracked_device
from dirtmap.engine.qcow2.check import free_leaks
from dirtmap.engine.qcow2.commit import Kept, Written, commit, require_writable, set_tracked
from dirtmap.engine.qcow2.layout import Layout, Slot, read_layout
from dirtmap.engine.qcow2.reading import FORMAT, load, write_session
from dirtmap.engine.session import livefile
from dirtmap.engine.session import view as recovery
from dirtmap.engine.session.status import status_of
from dirtmap.engine.session.verdict import Row
from dirtmap.engine.session.view import SessionView
from dirtmap.engine.storefile.chain import checkpoints_of
from dirtmap.engine.storefile.directory import header_doubts, read_entries, release_bits
from dirtmap.engine.storefile.file import Change, Snapshot
from dirtmap.engine.storefile.session import session_of, window_of
from dirtmap.engine.system import locks
from dirtmap.engine.system.file import File, open_file
from dirtmap.fmt import directory, live, store
from dirtmap.fmt.directory import Entry
from dirtmap.fmt.errors import FormatError, MovedError, StorageError
from dirtmap.fmt.store import NOWHERE, Identity, Record

T = TypeVar("T")


def bitmap_of_slot(file: File, layout: Layout, slot: Slot) -> Bitmap:
    """A bitmap of an image, its bits read. Errors as `load`."""
    words = load(file, layout, slot)
    return Bitmap.from_words(layout.header.size, slot.entry.granularity, words, slot.entry.auto)


def check_in(
    host: HostPort,
    path: str,
    store_path: str,
    name: bytes,
    *,
    own: bool = False,
    salvaging: bool = False,
    wanted: Iterable[str] = (),
) -> list[Recovery]:
    """Writes the bitmaps of a session into the image, and ends the session; see the head of the module.

    Args:
        host: opens the stores.
        path: the image.
        store_path: the store that has the session.
        name: of the node, raw bytes.
        own: the session is the caller's, which has saved all marks.
        salvaging: if the session's directory is damaged, recovers all bitmaps that can still be named, all dirty.
        wanted: names of bitmaps that must exist; otherwise nothing happens.

    Returns:
        What was done to each bitmap.

    Raises:
        LockedError: another process tracks the image, or has it open.
        FormatError: the session's directory is damaged, and ``salvaging`` is False.
        BitmapNotFoundError: one of ``wanted`` does not exist.
        As `Namespace.transaction`.
    """
    with host.opened(store_path) as target:
        recover_tracked_device(host, target, name)
    with (
        host.opened(store_path) as target,
        write_session(path, locking=host.locking) as (file, layout),
        target.change() as change,
    ):
        layout.require_sound()
        require_writable(layout)
        record = change.table.get(name)
        session = None if record is None else session_of(record)
        if record is None or session is None:
            return []
        if not own:
            recovery.refuse_tracked(path, session)
        if session is live.NO_SESSION:
            livefile.refuse_living(file.abspath, record.uuid)
        entries = (_entries if salvaging else read_entries)(change.snapshot, record)
        written, recovered = _recovered_slots(file, layout, change.snapshot, record, entries)
        there = {part.entry.name if isinstance(part, Kept) else part.name for part in written}
        for bitmap in wanted:
            if encode_name(bitmap) not in there:
                raise not_found(path, bitmap)
        before = _look(path)
        commit(file, layout, written)
        if not own:
            free_leaks(file)  # those of a check-in that the tracker's death interrupted
        set_tracked(file, read_layout(file), False)
        if layout.tracked:
            confirm(host, change, record, before, _look(path))
        _forget(change, record, entries)
        if not own:
            view = recovery.view_of(change.snapshot, record)
            assert view
            change.afterwards.append(view.clean_up)
    log_recovered(path, recovered)
    return recovered


def _look(path: str) -> Identity | None:
    with contextlib.suppress(StorageError):
        return identity_of_disk(path)
    return None


def _entries(snapshot: Snapshot, record: Record) -> list[Entry] | None:
    """The directory of a session; None if it is damaged."""
    with contextlib.suppress(FormatError):
        return read_entries(snapshot, record)
    return None


def _forget(change: Change, record: Record, entries: list[Entry] | None) -> None:
    """Removes the session and its bitmaps from the record. A damaged directory's space leaks: it is not known."""
    if entries is not None:
        for entry in entries:
            release_bits(change, record, entry)
        change.release(record.directory)
    ended = record.with_extensions(store.OF_A_SESSION)
    change.table.put(replace(ended, directory=NOWHERE, nb_bitmaps=0))


def _recovered_slots(
    file: File, layout: Layout, snapshot: Snapshot, record: Record, entries: list[Entry] | None
) -> tuple[list[Kept | Written], list[Recovery]]:
    """The new directory of the image, and what was done to each bitmap of the session."""
    slots = {slot.entry.name: slot for slot in layout.slots}
    contents = _contents(file, layout, snapshot, record, entries)
    written: list[Kept | Written] = []
    recovered = []
    for name, (bitmap, how) in contents.items():
        slot = slots.pop(encode_name(name), None)
        if bitmap is None:
            assert slot
            written.append(Kept(slot.entry))
            continue
        recovered.append(Recovery(name, how))
        written.append(
            Written(
                name=encode_name(name),
                flags=directory.FLAG_AUTO if bitmap.recording else 0,
                granularity_bits=bitmap.granularity.bit_length() - 1,
                packed=memoryview(bitmap.packed()),
                base=slot,
            )
        )
    return written, recovered


def _contents(
    file: File, layout: Layout, snapshot: Snapshot, record: Record, entries: list[Entry] | None
) -> dict[str, tuple[Bitmap | None, str]]:
    """The content of each bitmap, and how it was found. The content is None for a bitmap that the image keeps as it is.

    Args:
        file: the image.
        layout: of the image.
        snapshot: of the store that has the session.
        record: of the session.
        entries: its directory; None if it is damaged. Then every bitmap that can be named is all dirty.
    """
    view = recovery.view_of(snapshot, record)
    assert view
    marked, size = layout.tracked, layout.header.size
    why = _doubt(layout, snapshot, record, view)
    slots = {decode_name(slot.entry.name): slot for slot in layout.slots}
    whys: dict[Entry, str] = {}
    if entries is None or view.session is live.NO_SESSION:  # a missing bitmap was not necessarily removed
        spare = salvage.spare_entries(snapshot, record, snapshot.older()) if entries is None else {}
        whys = spare or dict.fromkeys(entries or (), view.why)
        known = {entry.name for entry in whys}
        for other in layout.slots:
            if other.entry.in_use and marked and other.entry.name not in known:
                whys[other.entry.with_flags(set=directory.FLAG_AUTO)] = salvage.KNOWN if entries is None else view.why
        entries = list(whys)
    found: dict[str, tuple[Bitmap | None, str]] = {}
    for entry in entries:
        name = decode_name(entry.name)
        slot = slots.pop(name, None)
        found[name] = None, ""
        usable = slot is not None and not slot.entry.in_use
        if usable and not marked and not whys and (whole := _known(layout, snapshot, record, view, entry)):
            # Not checked out yet, or checked in before a death; or another program made it usable, without knowing
            # what the tracker has marked.
            bitmap, how = whole
        elif reason := whys.get(entry, why):
            bitmap, how = Bitmap(size, entry.granularity, entry.auto).recovered(), f"{Row.ALL_DIRTY.value}: {reason}"
        else:
            bitmap, how = bitmap_of(snapshot, record, entry, False), view.how
        if slot and usable:
            there = bitmap_of_slot(file, layout, slot)
            bitmap = (bitmap | there.at(bitmap.granularity)).replace(recording=there.recording or bitmap.recording)
            if not marked and bitmap == there:
                continue
        found[name] = bitmap, how
    for name, slot in slots.items():
        if slot.entry.auto and not slot.entry.in_use and not marked:
            # Another program added it, and what was written since only the tracker knew.
            dirty = Bitmap(size, slot.entry.granularity, True).recovered()
            found[name] = dirty, f"{Row.ALL_DIRTY.value}: another program has added it since"
        elif not (slot.entry.in_use and marked):
            found[name] = None, ""
    return found


def _doubt(layout: Layout, snapshot: Snapshot, record: Record, view: SessionView) -> str | None:
    """Why the bits of a session cannot be relied on, or None."""
    if not layout.tracked:
        return "another program has opened the image for writing since"
    if doubt := doubts(snapshot, record):
        return doubt
    if layout.header.size != record.size:
        return f"the disk has {layout.header.size} bytes now, and had {record.size}"
    return view.doubt


def _known(
    layout: Layout, snapshot: Snapshot, record: Record, view: SessionView, entry: Entry
) -> tuple[Bitmap, str] | None:
    """All that the tracker has marked for a bitmap, even if others have written to the image; None if it is lost."""
    if layout.header.size != record.size or header_doubts(snapshot, record) is not None:
        return None
    bitmap = bitmap_of(snapshot, record, entry, False)
    if window_of(entry) is None or (view.found is not None and not view.found.poisoned):
        return bitmap, f"{Row.EXACT.value}: what the image has, and what its tracker has marked"
    if view.logged is None:
        return None
    region = 1 << view.session.region_bits
    for number in view.logged:
        bitmap.mark(number * region, min(region, record.size - number * region))
    return bitmap, f"{Row.LOGGED.value}: what the image has, and every region that its tracker has logged"


class CheckedOutImage(Namespace):
    """A qcow2 image whose bitmaps are checked out. Reads them from the session; changes them once the tracker is gone.

    Args:
        path: of the image.
        host: opens the store.
        store: path of the store that has the session.
        name: of the node in that store.
    """

    format = FORMAT

    def __init__(self, path: str, host: HostPort, store: str, name: str) -> None:
        # Absolute, except in messages: the process may change its working folder.
        self.path, self.name, self._host, self._store_path = path, name, host, os.path.abspath(store)
        self._abspath = os.path.abspath(path)
        self._raw_name = encode_name(name)
        record = self._ask(self._record)
        self.size, self.uuid = record.size, str(uuid.UUID(bytes=record.uuid))
        with open_file(path) as file:
            self.cluster_size = read_layout(file).cluster_size

    def _record(self, snapshot: Snapshot) -> Record:
        record = snapshot.record(self._raw_name)
        if record is None or not record.tracked:
            raise MovedError(self.path, "is not tracked any more; open it again")
        return record

    def _ask(self, question: Callable[[Snapshot], T]) -> T:
        with self._host.opened(self._store_path) as target:
            return target.read(question)

    def _read(self) -> tuple[SessionView, dict[str, Bitmap], Record]:
        """The session, the bitmaps, and the record. If the tracker is dead, they are as recovery would make them."""

        def read(snapshot: Snapshot) -> tuple[SessionView, dict[str, Bitmap], Record]:
            record = self._record(snapshot)
            view = recovery.view_of(snapshot, record)
            assert view
            entries = read_entries(snapshot, record)
            busy = busy_of(snapshot, record, entries)
            found: dict[str, Bitmap] = {}
            if view.row is Row.LIVE:
                doubted = doubts(snapshot, record) is not None
                for entry in entries:
                    found[decode_name(entry.name)] = bitmap_of(snapshot, record, entry, doubted)
            else:
                with open_file(self.path, abspath=self._abspath) as file, locks.reading(file, force_share=True):
                    layout = read_layout(file)
                    layout.require_sound()
                    slots = {decode_name(slot.entry.name): slot for slot in layout.slots}
                    for name, (bitmap, _) in _contents(file, layout, snapshot, record, entries).items():
                        if bitmap is not None:
                            found[name] = bitmap
                        elif slots[name].entry.in_use:
                            entry = slots[name].entry
                            found[name] = Bitmap._lazy(self.size, entry.granularity, entry.auto, True, None)
                        else:
                            found[name] = bitmap_of_slot(file, layout, slots[name])
            for name, bitmap in found.items():
                bitmap.busy = encode_name(name) in busy
                if not bitmap.inconsistent:
                    _ = bitmap.words  # loads the bits now, while they are consistent
                bitmap.freeze()
            return view, found, record

        return self._ask(read)

    def info(self) -> ImageInfo:
        """Describes the image and its bitmaps, from the session."""
        view, found, record = self._read()
        info = ImageInfo(
            path=self.path,
            format=self.format,
            size=self.size,
            cluster_size=self.cluster_size,
            bitmaps=tuple(
                BitmapInfo(
                    name=name,
                    granularity=bitmap.granularity,
                    recording=bitmap.recording,
                    inconsistent=bitmap.inconsistent,
                    busy=bitmap.busy,
                    count=None if bitmap.inconsistent else bitmap.count,
                )
                for name, bitmap in found.items()
            ),
            notes=(f"node '{self.name}' is {view.note}",),
            node=self.name,
            uuid=self.uuid,
            doubt=self.doubt(),
        )
        try:
            recording = {name: bitmap.recording for name, bitmap in found.items()}
            chain = checkpoints_of(f"{self._store_path}: {record.label}", record, recording)
        except FormatError as error:
            return replace(info, errors=(str(error),))
        return shown(info, chain)

    def doubt(self) -> str | None:
        """Why all bitmaps count as dirty all over; see `Namespace.doubt`."""
        return self._ask(lambda snapshot: doubts(snapshot, self._record(snapshot)))

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Changes the bitmaps after recovering them; see `Namespace.transaction`."""
        self.recover_session()
        with Image(self._abspath, self._host, force_share=True) as image, image.transaction() as bitmaps:
            yield bitmaps

    @contextlib.contextmanager
    def hold(self, name: str, owner: str = "dirtmap") -> Iterator[Bitmap]:
        """Holds a bitmap for a backup, after recovery; see `Namespace.hold`. A live tracker refuses: use its `take`."""
        self.recover_session()
        with Image(self._abspath, self._host) as image, image.hold(name, owner) as held:
            yield held

    def recover(self, names: Iterable[str] = ()) -> list[Recovery]:
        """Checks in what a dead tracker has left: all of it, whatever is named; see `Namespace.recover`."""
        chosen = set(names)
        recovered = check_in(self._host, self._abspath, self._store_path, self._raw_name, salvaging=True, wanted=chosen)
        # An inconsistent bitmap of the image that the session does not have is recovered as in any image.
        left = chosen - {item.name for item in recovered}
        if left or not chosen:
            with Image(self._abspath, self._host) as image:
                recovered += image.recover(left)
        return [item for item in recovered if not chosen or item.name in chosen]

    def recover_session(self) -> None:
        """Like `recover`, but refuses a damaged directory; see `Namespace.recover_session`."""
        check_in(self._host, self._abspath, self._store_path, self._raw_name)

    def tracking(self) -> Status | None:
        """The session of the image's tracker; see `Namespace.tracking`."""
        return self._ask(lambda snapshot: status_of(snapshot, self._record(snapshot)))

    def close(self) -> None:
        """Does nothing: the host owns the store."""

    def _names(self) -> list[bytes]:
        return [encode_name(name) for name in self._read()[1]]

    def _load(self, name: bytes) -> Bitmap | None:
        return self._read()[1].get(decode_name(name))

    def __repr__(self) -> str:
        return f"<CheckedOutImage {self.path!r}>"
