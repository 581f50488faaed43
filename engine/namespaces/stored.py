"""`StoredImage`: one namespace of a store as a mapping of names to bitmaps: the same face as a qcow2 image."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from dirtmap.engine.identity import lasting_identity_now
from dirtmap.engine.model.namespace import LEFT_IN_USE, BitmapInfo, ImageInfo, Namespace, Recovery, Transaction
from dirtmap.engine.model.naming import decode_name, encode_name, label, not_found
from dirtmap.engine.namespaces import salvage
from dirtmap.engine.namespaces.condition import (
    Source,
    bitmap_of,
    busy_of,
    checkpoints_of,
    doubts,
    end_session,
    is_readable,
    no_namespace,
    other_size,
    place_bitmap,
    read_entries,
    refuse_held,
    refuse_tracked,
    refuse_unsettled,
    refuse_without_root,
    replace_directory,
    rewrite,
    settle_device,
    size_now,
    tracked_view,
    tracking_status,
    with_checkpoints,
)
from dirtmap.engine.storefile import holds
from dirtmap.engine.storefile.deferred import changing_a_store
from dirtmap.engine.storefile.file import FORMAT, Change, Snapshot, Store
from dirtmap.fmt import directory, geometry, store
from dirtmap.fmt.directory import Entry
from dirtmap.fmt.errors import BitmapNotFoundError, FormatError, StorageError, printable
from dirtmap.fmt.store import Record

if TYPE_CHECKING:
    from dirtmap.engine.model.bitmap import Bitmap
    from dirtmap.engine.session.status import Status
    from dirtmap.engine.tracking.home import Home
    from dirtmap.engine.tracking.tracker import Tracker

T = TypeVar("T")


class StoredImage(Namespace):
    """One namespace of a store; see `Namespace`.

    Attributes:
        place: the path of the store, absolute: the process may change its folder.
        find_node: opens the node of a UUID, wherever the host has it; None: only this store is known.
        look_after: has commits of a store remembered, by which a rollback is noticed; None: no index is known.
        change_root: gives a device another root, by its name and whether it reads the same; None: as before.
    """

    format = FORMAT

    def __init__(self, target: Store, name: str) -> None:
        self._store = target
        self.path, self.place, self.name = target.path, target.place, name
        self._raw_name = encode_name(name)
        self.find_node: Callable[[bytes], Namespace | None] | None = None
        self.look_after: Callable[[Store], None] | None = None
        self.change_root: Callable[[str, bool], None] | None = None
        record, self.cluster_size = self._read(lambda snapshot, record: (record, snapshot.header.cluster_size))
        self.size, self.uuid = record.size, str(uuid.UUID(bytes=record.uuid))
        self._label = record.label

    @property
    def where(self) -> str:
        """How messages name it; see `Namespace.where`."""
        return f"{self.path}: {self._label}"

    def doubt(self) -> str | None:
        """Why all bitmaps count as all dirty; see `Namespace.doubt`."""
        return self._read(doubts)

    def tracking(self) -> Status | None:
        """Who tracks the image; see `Namespace.tracking`."""
        return self._read(tracking_status)

    def track(self, **options: Any) -> Tracker:
        """Begins to track writes to the image; see `Namespace.track`."""
        from dirtmap.engine.tracking.tracker import track_device, track_node

        self._read(_require_same_size)
        if self._read(lambda _, record: record.kind) == store.KIND_DEVICE:
            return track_device(self, options)
        return track_node(self, options)

    def _track_with(self, device: Home, options: dict[str, Any], make: Callable[..., Tracker]) -> Tracker:
        from dirtmap.engine.tracking.tracker import track_node

        self._read(_require_same_size)
        return track_node(self, options, device, make)

    def opened_anew(self) -> StoredImage:
        """The same, with a file of its own."""
        again = StoredImage(Store(self.path, self.place), self.name or "")
        again.find_node, again.look_after, again.change_root = self.find_node, self.look_after, self.change_root
        return again

    def open_root(self) -> Namespace:
        """A device's root node, opened.

        Raises:
            BitmapNotFoundError: no store that is known has it.
        """
        wanted = self._read(lambda _, record: record.root_uuid)
        if self.find_node and (found := self.find_node(wanted)) is not None:  # one without bitmaps is false
            return found
        for record in self._store.read(lambda snapshot: list(snapshot.table())):
            if record.uuid == wanted and record.kind == store.KIND_NODE:
                return StoredImage(Store(self.path, self.place), decode_name(record.name))
        what = f"its root, {uuid.UUID(bytes=wanted)}, is not known; 'index scan' finds images and stores"
        raise BitmapNotFoundError(f"{self.path}: device '{printable(self.name or '')}'", what)

    def close(self) -> None:
        """Closes the store."""
        self._store.close()

    def _record(self, snapshot: Snapshot) -> Record:
        record = snapshot.record(self._raw_name)
        if record is None:
            raise no_namespace(self.path, self._raw_name)
        return record

    def _read(self, read: Callable[[Snapshot, Record], T]) -> T:
        return self._store.read(lambda snapshot: read(snapshot, self._record(snapshot)))

    def info(self) -> ImageInfo:
        """The namespace and all its bitmaps as of one commit."""
        return self._read(_describe)

    def _load(self, name: bytes) -> Bitmap | None:
        def read(snapshot: Snapshot, record: Record) -> Bitmap | None:
            for entry in read_entries(snapshot, record):
                if entry.name == name:
                    _require_same_size(snapshot, record)
                    bitmap = bitmap_of(snapshot, record, entry, doubts(snapshot, record) is not None)
                    bitmap.busy = name in busy_of(snapshot, record, [entry])
                    if not bitmap.inconsistent:
                        _ = bitmap.words  # now, while it is known to be whole
                    return bitmap.freeze()
            return None

        return self._read(read)

    def _names(self) -> list[bytes]:
        return self._read(lambda snapshot, record: [entry.name for entry in read_entries(snapshot, record)])

    def recover(self, names: Iterable[str] = ()) -> list[Recovery]:
        """Makes all dirty what is inconsistent, in doubt or damaged, directory or bits; see `Namespace.recover`."""
        settle_device(self._store, self._raw_name)
        with self._store.change() as change:
            record = self._record(change.snapshot)
            damage = None
            try:
                read_entries(change.snapshot, record)
            except FormatError as error:
                damage = FormatError(error.where, error.what)  # the one raised keeps in memory what was read
            if damage is not None:
                return salvage.recover(change, record, list(names), damage)
            return _recover(change, record, list(names))

    def settle(self) -> None:
        """As `recover`, but for a damaged directory; see `Namespace.settle`."""
        settle_device(self._store, self._raw_name)
        with self._store.change() as change:
            _recover(change, self._record(change.snapshot), [])

    def __repr__(self) -> str:
        return f"<StoredImage {self.name!r} in {self.path!r}>"

    @contextlib.contextmanager
    def hold(self, name: str, owner: str = "dirtmap") -> Iterator[Bitmap]:
        """Holds a bitmap for a backup; see `Namespace.hold`."""
        where = f"{self.where}: {label(name)}"
        self[name].required(where)
        with holding(self._store, self._raw_name, name, owner):
            yield self[name].required(where)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Changes the bitmaps, in one commit of the store; see `Namespace.transaction`."""
        settle_device(self._store, self._raw_name)
        with (
            changing_a_store(),
            self._store.change() as change,
            changing(change, self._record(change.snapshot)) as bitmaps,
        ):
            yield bitmaps


def _require_same_size(snapshot: Snapshot, record: Record) -> None:
    if record.nb_bitmaps and size_now(record) != record.size:
        raise other_size(snapshot, record)


def _recover(change: Change, record: Record, names: list[str]) -> list[Recovery]:
    """Recovers a namespace whose directory is whole: the bitmaps named, or all; see `Namespace.recover`."""
    if size_now(record) != record.size:
        return _recover_resized(change, record, names)
    recovered = []
    entries = {decode_name(entry.name): entry for entry in read_entries(change.snapshot, record)}
    doubt, view = doubts(change.snapshot, record), tracked_view(change.snapshot, record)
    with changing(change, record) as bitmaps:
        for name in names or list(bitmaps):
            bitmap = bitmaps[name]
            why = doubt
            if why is None and bitmap.inconsistent:
                why = LEFT_IN_USE
            if why is None and not is_readable(change.snapshot, record, entries[name]):
                why = "the checksum of its bits is wrong"
            if why is not None:
                bitmaps[name] = bitmap.recovered()
                recovered.append(Recovery(name, f"all dirty: {why}"))
            elif view:
                recovered.append(Recovery(name, view.how))
    return recovered


def _recover_resized(change: Change, record: Record, names: list[str]) -> list[Recovery]:
    """Recovers a namespace whose disk has another size now, which is adopted with it: all its bitmaps, all dirty."""
    path = change.snapshot.file.path
    refuse_tracked(path, record)
    refuse_unsettled(change.snapshot, record)
    refuse_held(path, record)
    found = [decode_name(entry.name) for entry in read_entries(change.snapshot, record)]
    for name in names:
        if name not in found:
            raise not_found(f"{path}: {record.label}", name)
    identity, size = lasting_identity_now(record), size_now(record)
    rewrite(change, record, replace(record, size=size, identity=identity), doubted=True)
    return [Recovery(name, f"all dirty: the disk has {size} bytes now, and had {record.size}") for name in found]


@contextlib.contextmanager
def holding(target: Store, node: bytes, name: str, owner: str) -> Iterator[None]:
    """A hold on a bitmap, in the record of its namespace, for the time of the block; see `Namespace.hold`."""
    taken = holds.hold(encode_name(name), owner)

    def change_holds(add: bool) -> None:
        with target.change() as change:
            record = change.table.get(node)
            if record is None:
                if add:
                    raise no_namespace(target.path, node)
                return  # and with it the hold
            if add:
                refuse_tracked(target.path, record)  # its tracker takes bitmaps for backups
            others = [found for found in holds.living(record) if found.token != taken.token]
            change.table.put(holds.with_holds(record, [*others, taken] if add else others))

    change_holds(True)
    try:
        yield
    finally:
        change_holds(False)


def held_by(record: Record) -> dict[str, str]:
    """Which bitmaps of a namespace are held, and by whom."""
    return {decode_name(found.bitmap): str(found) for found in holds.living(record)}


def _describe(snapshot: Snapshot, record: Record) -> ImageInfo:
    doubt, view = doubts(snapshot, record), tracked_view(snapshot, record)
    notes = [f"{record.label} counts as all dirty: {doubt}"] if doubt else []
    if view and not doubt:
        notes.append(f"{record.label} is {view.note}")
    name = decode_name(record.name)
    errors: list[str] = []
    counts: dict[bytes, int | None] = {}
    entries: list[Entry] = []
    # Damage to one of them must not hide the others.
    with _noting(errors):
        entries = read_entries(snapshot, record)
    busy = busy_of(snapshot, record, entries)
    for entry in entries:
        with _noting(errors):
            counts[entry.name] = None if entry.in_use else _count(snapshot, record, entry, doubt is not None)
    return ImageInfo(
        path=snapshot.file.path,
        format=FORMAT,
        size=record.size,
        cluster_size=snapshot.header.cluster_size,
        bitmaps=tuple(
            BitmapInfo(
                name=decode_name(entry.name),
                granularity=entry.granularity,
                recording=entry.auto,
                inconsistent=entry.in_use,
                busy=entry.name in busy,
                count=counts.get(entry.name),
                namespace=str(uuid.UUID(bytes=record.uuid)),
                node=None if record.kind == store.KIND_DEVICE else name,
                device=name if record.kind == store.KIND_DEVICE else None,
            )
            for entry in entries
        ),
        notes=tuple(notes),
        doubt=doubt,
        errors=tuple(errors),
    )


@contextlib.contextmanager
def _noting(errors: list[str]) -> Iterator[None]:
    try:
        yield
    except FormatError as error:
        errors.append(str(error))


def _count(snapshot: Snapshot, record: Record, entry: Entry, doubted: bool) -> int:
    """A bitmap's dirty bytes in whole granules; reads nothing where it takes no space."""
    if doubted or entry.table_offset == store.ALL_ONES:
        return geometry.granules(record.size, entry.granularity) * entry.granularity
    if entry.table_offset == store.ALL_ZEROS and not tracked_view(snapshot, record):
        return 0
    return bitmap_of(snapshot, record, entry, False).count


def describe_store(target: Store) -> ImageInfo:
    """All bitmaps of all namespaces of a store, as of one commit; ``size`` is None: each disk has its own.

    Raises:
        FormatError: damaged.
        StorageError: cannot be opened or read.
    """

    def read(snapshot: Snapshot) -> ImageInfo:
        parts = [_describe(snapshot, record) for record in snapshot.table()]
        return ImageInfo(
            path=target.path,
            format=FORMAT,
            size=None,
            cluster_size=snapshot.header.cluster_size,
            bitmaps=tuple(bitmap for part in parts for bitmap in part.bitmaps),
            notes=tuple(note for part in parts for note in part.notes),
            doubt=next((part.doubt for part in parts if part.doubt), None),
            errors=tuple(error for part in parts for error in part.errors),
        )

    return target.read(read)


@contextlib.contextmanager
def changing(change: Change, record: Record) -> Iterator[Transaction]:
    """One namespace's part of a change: a transaction whose end puts the new directory into ``change``."""
    snapshot = change.snapshot
    refuse_tracked(snapshot.file.path, record)
    refuse_unsettled(snapshot, record)
    refuse_without_root(snapshot, record)
    size = size_now(record)
    if not record.nb_bitmaps:
        record = replace(record, size=size)  # no bits that would have to be adopted
    doubted = size != record.size or doubts(snapshot, record) is not None
    entries = read_entries(snapshot, record)
    where = f"{snapshot.file.path}: {record.label}"
    bitmaps = Transaction(
        where,
        record.size,
        geometry.MAX_DEFAULT_GRANULARITY,
        {decode_name(entry.name): bitmap_of(snapshot, record, entry, doubted) for entry in entries},
        held_by(record),
        checkpoints_of(where, record, {decode_name(entry.name): entry.auto for entry in entries}),
    )
    try:
        yield bitmaps
        bitmaps.judge()
        if size == record.size:
            _put(change, record, entries, bitmaps, doubted)
        else:
            _put_at_old_size(change, record, entries, bitmaps)
    finally:
        bitmaps.close()


class StoreTransaction(Mapping[str, Transaction]):
    """All namespaces of a store while they are being changed: names to transactions, which one commit ends together."""

    def __init__(self, change: Change, stack: contextlib.ExitStack) -> None:
        self._change, self._stack = change, stack
        self._begun: dict[str, Transaction] = {}

    def __getitem__(self, name: str) -> Transaction:
        if name not in self._begun:
            record = self._change.table.get(encode_name(name))
            if record is None:
                raise no_namespace(self._change.snapshot.file.path, encode_name(name))
            self._begun[name] = self._stack.enter_context(changing(self._change, record))
        return self._begun[name]

    def __iter__(self) -> Iterator[str]:
        return (decode_name(record.name) for record in self._change.table)

    def __len__(self) -> int:
        return self._change.table.count


@contextlib.contextmanager
def transaction(target: Store) -> Iterator[StoreTransaction]:
    """Changes any number of namespaces: at the end of the block all of it is durable, or, after an exception, nothing.

    Errors as `Namespace.transaction`.
    """
    with changing_a_store(), target.change() as change, contextlib.ExitStack() as stack:
        yield StoreTransaction(change, stack)


def _put_at_old_size(change: Change, record: Record, old: list[Entry], bitmaps: Transaction) -> None:
    """As `_put` while the disk has another size than the bits are for: what is not written anew needs none.

    All bits stay in doubt, and what a tracker has left stays, until the new size is adopted.
    """
    wanted: list[Entry] = []
    for name, bitmap in bitmaps.items():
        source = bitmap._source
        kept = _kept(source.entry, name, bitmap) if isinstance(source, Source) and source.record is record else None
        if kept is None or any(kept.table_offset == entry.table_offset > store.ALL_ONES for entry in wanted):
            raise other_size(change.snapshot, record)
        wanted.append(kept)
    if wanted != old:
        area = replace_directory(change, record, old, wanted)
        change.table.put(replace(record, directory=area, nb_bitmaps=len(wanted)))


def _kept(entry: Entry, name: str, bitmap: Bitmap) -> Entry:
    """The entry of a bitmap whose bits stay where they are."""
    flags = {"set": directory.FLAG_AUTO} if bitmap.recording else {"clear": directory.FLAG_AUTO}
    return replace(entry.with_flags(**flags), name=encode_name(name))


def _put(change: Change, record: Record, old: list[Entry], bitmaps: Transaction, doubted: bool) -> None:
    wanted: list[Entry] = []
    kept: set[int] = set()
    # The tracker of a session has died, or we would not be here: what it marked is in the bits that we have read, and
    # is written with them, and the session ends.
    view = tracked_view(change.snapshot, record)
    for name, bitmap in bitmaps.items():
        source = bitmap._source
        # Bits of another namespace or store are copied. Those in doubt are written as they are shown, all dirty; those
        # of an inconsistent bitmap are not shown at all.
        if (
            isinstance(source, Source)
            and source.record is record
            and (not source.doubted or bitmap.inconsistent)
            and not (view and not bitmap.inconsistent)
            and source.entry.table_offset not in kept
        ):
            if source.entry.table_offset > store.ALL_ONES:
                kept.add(source.entry.table_offset)
            wanted.append(_kept(source.entry, name, bitmap))
        else:
            wanted.append(place_bitmap(change, record, name, bitmap))
    if wanted == old and not doubted and not view:
        return
    area = replace_directory(change, record, old, wanted)
    identity = record.identity
    if view and view.identity:
        identity = view.identity
    elif record.kind in (store.KIND_NODE, store.KIND_DEVICE) and (doubted or not record.nb_bitmaps):
        # All that was in doubt is dirty now, on disk, or the first bitmap begins: from here on changes count.
        with contextlib.suppress(StorageError):
            identity = lasting_identity_now(record)
    new = with_checkpoints(end_session(change, record), bitmaps.checkpoints)
    generation, count = change.generation, len(wanted)
    change.table.put(replace(new, generation=generation, directory=area, nb_bitmaps=count, identity=identity))
