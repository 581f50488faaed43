"""`StoredImage`: one namespace of a store as a mapping of names to bitmaps: the same face as a qcow2 image."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from dirtmap.engine.model.infos import BitmapInfo, ImageInfo, Recovery
from dirtmap.engine.model.namespace import Namespace
from dirtmap.engine.model.naming import decode_name, encode_name, label
from dirtmap.engine.model.transaction import Transaction
from dirtmap.engine.namespaces import salvage
from dirtmap.engine.namespaces.changing import changing
from dirtmap.engine.namespaces.condition import (
    bitmap_of,
    busy_of,
    doubts,
    other_size,
    size_now,
    tracked_view,
    tracking_status,
)
from dirtmap.engine.namespaces.place import holding
from dirtmap.engine.namespaces.recover import recover_record, settle, settle_device
from dirtmap.engine.storefile.deferred import changing_a_store
from dirtmap.engine.storefile.directory import no_namespace, read_entries
from dirtmap.engine.storefile.file import FORMAT, Snapshot, Store
from dirtmap.fmt import geometry, store
from dirtmap.fmt.directory import Entry
from dirtmap.fmt.errors import BitmapNotFoundError, FormatError, printable
from dirtmap.fmt.store import Record

if TYPE_CHECKING:
    from dirtmap.engine.model.bitmap import Bitmap
    from dirtmap.engine.model.infos import Status
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
            return recover_record(change, record, list(names))

    def settle(self) -> None:
        """As `recover`, but for a damaged directory; see `Namespace.settle`."""
        settle_device(self._store, self._raw_name)
        settle(self._store, self._raw_name)

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
