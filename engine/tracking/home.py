"""`Home`: the namespace of a store that a tracker feeds. The tracker changes the store through it alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from dirtmap.engine.model import checkpoints, content
from dirtmap.engine.model.bitmap import Bitmap
from dirtmap.engine.model.naming import decode_name, encode_name, label, not_found
from dirtmap.engine.namespaces.condition import Condition, refuse_tracked
from dirtmap.engine.namespaces.ports import HostPort
from dirtmap.engine.storefile.chain import read_chain, with_chain
from dirtmap.engine.storefile.directory import (
    header_doubts,
    load_saved,
    merge_bits,
    no_namespace,
    place_bitmap,
    read_entries,
    replace_directory,
)
from dirtmap.engine.storefile.entries import identified, tree_of, with_root
from dirtmap.engine.storefile.file import Change, Plan, Snapshot, Store
from dirtmap.engine.storefile.header import Seen
from dirtmap.engine.storefile.session import (
    Window,
    names_session,
    peer_of,
    session_of,
    window_of,
    with_window,
)
from dirtmap.engine.system.log import logger
from dirtmap.fmt import directory, live, store
from dirtmap.fmt.directory import Entry
from dirtmap.fmt.errors import BitmapError, Error, GoneError
from dirtmap.fmt.live import build_peer, build_session
from dirtmap.fmt.store import Record

if TYPE_CHECKING:
    from dirtmap.engine.model.content import Content

T = TypeVar("T")


class Left(NamedTuple):
    """What a commit of ours has left of a namespace, which holds as long as that is the store's newest commit."""

    commit: Seen
    record: Record
    session: live.Session | None
    entries: list[Entry]
    checkpoints: list[str]


def _where(path: str, record: Record) -> str:
    return f"{path}: {record.label}"


class HomeView:
    """The bitmaps of a home as of one commit, for the tracker: saved bits and windows, without the live bits.

    Attributes:
        record: of the namespace.
        session: the tracker's session; None before it has begun.
        entries: names to directory entries, in directory order.
        checkpoints: the chain of `dirtmap.engine.model.checkpoints`, oldest first.
    """

    def __init__(self, snapshot: Snapshot, record: Record, left: Left | None = None) -> None:
        self.snapshot, self.record = snapshot, record
        self.where = _where(snapshot.file.path, record)
        if left is None:
            self.session, self.checkpoints = session_of(record), read_chain(self.where, record)
            self.found = read_entries(snapshot, record)
        else:
            self.session, self.checkpoints, self.found = left.session, list(left.checkpoints), left.entries
        self.entries = {decode_name(entry.name): entry for entry in self.found}
        self._doubted = header_doubts(snapshot, record) is not None

    @property
    def recording(self) -> list[str]:
        """The names of the bitmaps that record."""
        return [name for name, entry in self.entries.items() if entry.auto and not entry.in_use]

    def entry(self, name: str) -> Entry:
        """The directory entry of a bitmap.

        Raises:
            BitmapError: there is no such bitmap, or it is inconsistent.
        """
        if name not in self.entries:
            raise not_found(self.where, name)
        if self.entries[name].in_use:
            raise BitmapError(f"{self.where}: {label(name)}", "inconsistent; recover or remove it")
        return self.entries[name]

    def clean_entry(self, name: str, granularity: int, *, recording: bool) -> Entry:
        """A new directory entry for a clean bitmap; ``granularity`` is in bytes.

        Raises:
            BitmapError: the name is not allowed, or the granularity is too fine for the disk.
        """
        if fault := directory.name_fault(encode_name(name)):
            raise BitmapError(f"{self.where}: {label(name)}", fault)
        flags = directory.FLAG_AUTO if recording else 0
        entry = Entry(encode_name(name), store.ALL_ZEROS, 0, flags, granularity.bit_length() - 1)
        for field, what in store.entry_faults(entry, self.record.size, self.snapshot.header.cluster_size, 0):
            raise BitmapError(f"{self.where}: {label(name)}.{field}", what)
        return entry

    def saved(self, name: str, *, verified: bool = False) -> Bitmap:
        """The bitmap with its saved bits; all dirty if the store is in doubt. Errors as `entry`.

        Args:
            name: of the bitmap.
            verified: reads even a large one as a whole now, so that its ``damage`` is known.
        """
        entry = self.entry(name)
        blank = Bitmap(self.record.size, entry.granularity, entry.auto)
        if self._doubted or entry.table_offset <= store.ALL_ONES:  # then its bits need no memory
            return blank.recovered() if self._doubted or entry.table_offset == store.ALL_ONES else blank

        told: str | None = None

        def tell(damage: str | None) -> None:
            nonlocal told
            told = damage
            if damage:
                logger(__name__).warning("%s: %s: %s", self.where, label(name), damage)

        tree = tree_of(self.record, entry)
        if tree.nbits > content.LARGE:
            from dirtmap.engine.storefile.chunks import Stored

            stored = Stored(self.snapshot.pinned(), tree, tell)
            found = Bitmap._of(self.record.size, entry.granularity, stored, entry.auto)
            if verified:
                _ = found.count  # which reads all of them
                found.damage = told
            return found
        words, damage = load_saved(self.snapshot, self.record, entry, False)
        tell(damage)
        found = Bitmap.from_words(self.record.size, entry.granularity, words, entry.auto)
        found.damage = damage
        return found

    def is_clean(self, name: str) -> bool:
        """True if the bitmap has no saved dirty bits. Reads no bits."""
        return self.entries[name].table_offset == store.ALL_ZEROS and not self._doubted


class HomeChange(HomeView):
    """A home during a change by the tracker. `Home.change` commits it: durable at the end of its block.

    Attributes:
        began: when the checkpoints began that are new in this change, in ns since 1970.
    """

    def __init__(self, change: Change, record: Record, left: Left | None = None) -> None:
        super().__init__(change.snapshot, record, left)
        self.change = change
        self.placed = record  # with the size that the disk will have
        self.identity = record.identity
        self.peer = peer_of(record)
        self.began: dict[str, int] = {}
        self._plans: list[tuple[int, Plan]] = []  # of bits that were replaced, by their new root
        self._planned: dict[int, Bitmap] = {}  # what these bits are, which are not in the file yet
        if self._doubted:
            # This commit ends the doubt, so all that is in doubt must be dirty in it.
            for name, entry in self.entries.items():
                if not entry.in_use:
                    self.put(name, self.saved(name), window_of(entry))

    def window(self, name: str) -> Window | None:
        """The window of a bitmap, the intervals that it records; None if it has none."""
        return window_of(self.entries[name])

    def set_window(self, name: str, window: Window | None, *, recording: bool | None = None) -> None:
        """Sets or removes the window of a bitmap; also sets whether it records, unless ``recording`` is None."""
        entry = self.entries[name]
        if recording is not None and recording != entry.auto:
            entry = entry.with_flags(**{"set" if recording else "clear": directory.FLAG_AUTO})
            entry = identified(entry, self.change.generation)
        self.entries[name] = with_window(entry, window)

    def put(self, name: str, bitmap: Bitmap, window: Window | None) -> None:
        """Replaces the saved bits and the window of a bitmap; adds the bitmap if there is none of that name.

        Raises:
            BitmapError: the name is not allowed.
        """
        if fault := directory.name_fault(encode_name(name)):
            raise BitmapError(f"{self.where}: {label(name)}", fault)
        with self.change.planning() as plan:
            self.entries[name] = place_bitmap(self.change, self.placed, name, bitmap, self._base(name))
        root = self.entries[name].table_offset
        self._plans.append((root, plan))
        self._planned[root] = bitmap
        self.set_window(name, window)

    def saved(self, name: str, *, verified: bool = False) -> Bitmap:
        """The bitmap with its saved bits, as they will be; see `HomeView.saved`."""
        entry = self.entry(name)
        planned = self._planned.get(entry.table_offset) if entry.table_offset > store.ALL_ONES else None
        return super().saved(name, verified=verified) if planned is None else planned.replace(recording=entry.auto)

    def rename(self, names: Mapping[str, str]) -> None:
        """Gives bitmaps other names, all at once: to each of these names the one that is behind it.

        Raises:
            BitmapError: a name is taken, or not allowed.
        """
        for new in names.values():
            if fault := directory.name_fault(encode_name(new)):
                raise BitmapError(f"{self.where}: {label(new)}", fault)
        renamed = [names.get(name, name) for name in self.entries]
        for name in names.values():
            if renamed.count(name) > 1:
                raise BitmapError(f"{self.where}: {label(name)}", "the name is taken")
        entries = (
            replace(entry, name=encode_name(name)) for name, entry in zip(renamed, self.entries.values(), strict=True)
        )
        self.entries = dict(zip(renamed, entries, strict=True))

    def merge(self, name: str, added: Content, window: Window | None) -> None:
        """Adds bits to the saved ones of a bitmap, and replaces its window. Looks only at what changes.

        Args:
            name: of the bitmap, whose saved bits were not replaced in this change.
            added: as many bits.
            window: the new one.
        """
        self.entries[name] = merge_bits(self.change, self.record, self.entries[name], added)
        self.set_window(name, window)

    def _base(self, name: str) -> Entry | None:
        """The entry of the bitmap that another one replaces, with the bits that are in the file; or None."""
        entry = self.entries.get(name)
        if entry and self.placed.size != self.record.size:
            return with_root(entry, store.ALL_ZEROS, 0, 0)  # a tree of another size
        if entry and all(entry.table_offset != found.table_offset for found in self.found):
            return with_root(entry, store.ALL_ZEROS, 0, 0)  # its bits are only planned
        return entry

    def put_empty(self, name: str, granularity: int, window: Window | None, *, recording: bool) -> None:
        """Like `put` for a clean bitmap, but takes the same time however large the disk. Errors as `clean_entry`."""
        entry, known = self.clean_entry(name, granularity, recording=recording), self.entries.get(name)
        if known:  # the same bitmap, with what is known of it
            entry = replace(entry, extra_data=known.extra_data)
        items = {store.ITEM_BITS: None, store.ITEM_WINDOW: window.build() if window else None}
        self.entries[name] = identified(entry, self.change.generation, new=known is None, items=items)

    def grow(self, size: int) -> None:
        """Gives the disk another size, in bytes. The caller then puts every bitmap anew."""
        self.placed = replace(self.record, size=size)
        self.identity = replace(self.identity, size=size)

    def reconcile_checkpoints(self) -> None:
        """Reconciles the chain with what other programs have done to checkpoints since the last session."""
        recording = {name: entry.auto for name, entry in self.entries.items()}
        self.checkpoints = checkpoints.reconcile(self.checkpoints, recording)

    def make_all_dirty(self) -> None:
        """Makes every bitmap dirty all over, except inconsistent ones, whose bits cannot be trusted anyway."""
        for name, entry in list(self.entries.items()):
            if not entry.in_use:
                self.put(name, Bitmap(self.record.size, entry.granularity, entry.auto).recovered(), None)

    def finish(self) -> Record:
        """Plans the new record and directory, to be committed at the end of the block, and returns the record."""
        change, record = self.change, self.record
        wanted = list(self.entries.values())
        roots = {entry.table_offset for entry in wanted}
        for root, plan in self._plans:
            if root not in roots:  # another content has taken its place, or the bitmap was removed
                change.withdraw(plan)
        area = record.directory
        if wanted != self.found:
            area = replace_directory(change, record, self.found, wanted)
        extensions = []
        if self.session:
            extensions.append((store.EXTENSION_SESSION, build_session(self.session)))
            if self.peer:
                extensions.append((store.EXTENSION_PEER, build_peer(self.peer)))
        new = with_chain(record.with_extensions(store.OF_A_SESSION, extensions), self.checkpoints, self.began)
        new = replace(
            new,
            size=self.placed.size,
            generation=change.generation,
            directory=area,
            nb_bitmaps=len(wanted),
            identity=self.identity,
        )
        change.table.put(new, record)
        return new


class Home:
    """One namespace of a store, as its tracker uses it.

    Args:
        host: validates the store, and is told of its commits.
        path: of the store.
        name: of the namespace, raw bytes.

    Attributes:
        session: the session as this namespace's record has it, once the tracker has begun. Homes save one after the
            other, so their records may differ in what is saved.
    """

    session: live.Session

    def __init__(self, host: HostPort, path: str, name: bytes) -> None:
        self._host, self.name = host, name
        self._left: Left | None = None
        # Not the host's store: that one reports each commit to the index, which takes longer than a cut.
        self.store = Store(os.path.abspath(path), locking=host.locking)  # the process may change its working folder
        try:
            host.watch(self.store)
        except BaseException:
            self.store.close()
            raise

    @property
    def begun(self) -> bool:
        """Whether the tracker has begun with the namespace, so that its `uuid` is known."""
        return self._left is not None

    @property
    def uuid(self) -> bytes:
        """Of the namespace, 16 bytes; known once the tracker has changed it, which it does when it begins."""
        assert self._left
        return self._left.record.uuid

    @property
    def where(self) -> str:
        """How messages name the namespace; known as its `uuid` is."""
        assert self._left
        return _where(self.store.path, self._left.record)

    def close(self) -> None:
        """Closes the store."""
        self.store.close()

    def record(self, snapshot: Snapshot) -> Record:
        """The record of the namespace.

        Raises:
            BitmapError: there is no such namespace.
        """
        return self._found(snapshot.record(self.name))

    def _found(self, record: Record | None, session: bytes | None = None) -> Record:
        if record is None:
            missing = no_namespace(self.store.path, self.name)
            raise GoneError(missing.where, missing.what) if session else missing
        return record

    def _require(self, view: HomeView, session: bytes | None) -> None:
        if session is not None and (view.session is None or view.session.uuid != session):
            raise GoneError(view.where, "the store has lost this tracker's session")

    def needs_recovery(self, snapshot: Snapshot) -> bool:
        """True if the bitmaps are in doubt, or a session ended without being closed.

        Raises:
            BitmapError: there is no such namespace.
            LockedError: a live tracker has the session.
        """
        now = Condition(snapshot, self.record(snapshot))
        refuse_tracked(now.where, now.record)
        return now.record.tracked or now.doubted

    def view(self, snapshot: Snapshot) -> HomeView:
        """The namespace as it is, whichever session it has."""
        return HomeView(snapshot, self.record(snapshot))

    def report(self) -> None:
        """Reports the store's last commit to the index, which notices a rollback to an earlier one."""
        self._host.report(self.store)

    def has(self, session: bytes) -> bool:
        """False if the record is known not to name that session; True if it does, or cannot be read."""
        try:
            found = self.store.record(self.name)
        except Error:
            return True
        return found is not None and names_session(found, session)

    def read(self, session: bytes, read: Callable[[HomeView], T]) -> T:
        """Runs ``read`` on the state of one commit. Raises `GoneError` for another session. Errors as `Store.read`."""

        def read_view(snapshot: Snapshot) -> T:
            left = self._left_at(snapshot)
            view = HomeView(snapshot, left.record, left) if left else self.view(snapshot)
            self._require(view, session)
            return read(view)

        return self.store.read(read_view)

    @contextlib.contextmanager
    def change(self, session: bytes | None) -> Iterator[HomeChange]:
        """Changes the namespace, in one commit.

        Args:
            session: UUID of the tracker's session, 16 bytes, which the record must have; None if it has yet to begin.

        Raises:
            GoneError: the record has another session.
            As `Store.change`.
        """
        with self.store.change() as change:
            left = self._left_at(change.snapshot)
            record = left.record if left else self._found(change.table.get(self.name), session)
            home = HomeChange(change, record, left)
            self._require(home, session)
            yield home
            record = home.finish()
        entries, chain = list(home.entries.values()), list(home.checkpoints)
        self._left = Left(change.committed, record, home.session, entries, chain)

    def _left_at(self, snapshot: Snapshot) -> Left | None:
        """What our last commit has left, where that is the commit that counts."""
        left = self._left
        return left if left is not None and snapshot.chosen.is_as_committed(left.commit) else None
