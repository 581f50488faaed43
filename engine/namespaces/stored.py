"""`StoredImage`: one namespace of a store as a mapping of names to bitmaps, with the interface of a qcow2 image."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from dirtmap.engine.model.infos import BitmapInfo, ImageInfo, Recovery
from dirtmap.engine.model.naming import decode_name, encode_name, label
from dirtmap.engine.model.transaction import Transaction
from dirtmap.engine.namespaces import salvage
from dirtmap.engine.namespaces.changing import changing
from dirtmap.engine.namespaces.condition import Condition
from dirtmap.engine.namespaces.held import Held
from dirtmap.engine.namespaces.ports import HostPort
from dirtmap.engine.namespaces.recover import log_recovered, recover_record, recover_session, recover_tracked_device
from dirtmap.engine.namespaces.stored_place import holding
from dirtmap.engine.storefile.chain import checkpoints_of, read_times
from dirtmap.engine.storefile.directory import count_saved, no_namespace
from dirtmap.engine.storefile.entries import identity_of
from dirtmap.engine.storefile.file import FORMAT, Snapshot, Store
from dirtmap.engine.storefile.session import require_known
from dirtmap.fmt import store
from dirtmap.fmt.directory import Entry
from dirtmap.fmt.errors import FormatError, UnsupportedError
from dirtmap.fmt.store import Record

if TYPE_CHECKING:
    from dirtmap.engine.model.bitmap import Bitmap
    from dirtmap.engine.model.infos import Status

T = TypeVar("T")


class StoredImage(Held):
    """One namespace of a store; see `Namespace`.

    Args:
        target: the store, which the caller closes.
        name: of the node or device.
        host: opens the store of a device that was tracked with a node.

    Attributes:
        abspath: the absolute path of the store, because the process may change its working folder.
    """

    format = FORMAT

    def __init__(self, target: Store, name: str, host: HostPort) -> None:
        self._store, self._host = target, host
        self.path, self.abspath, self.name = target.path, target.abspath, name
        self._raw_name = encode_name(name)
        record, self.cluster_size = self._read(lambda now: (now.record, now.snapshot.header.cluster_size))
        self.size, self.uuid = record.size, str(uuid.UUID(bytes=record.uuid))
        self._label = record.label

    @property
    def store(self) -> Store:
        """The store that has the namespace."""
        return self._store

    def record(self) -> Record:
        """The record of the namespace, as of the newest commit."""
        return self._read(lambda now: now.record)

    def require_same_size(self) -> None:
        """Refuses bitmaps of a disk that has another size now.

        Raises:
            BitmapError: names both sizes, and the command that adopts the new one.
        """
        self._read(_require_same_size)

    @property
    def where(self) -> str:
        """How messages name the namespace; see `Namespace.where`."""
        return f"{self.path}: {self._label}"

    @property
    def address(self) -> tuple[str, bytes]:
        """The path of the store, and the name there, raw bytes."""
        return self.abspath, self._raw_name

    def doubt(self) -> str | None:
        """Why all bitmaps count as dirty all over; see `Namespace.doubt`."""
        return self._read(lambda now: now.doubt)

    def tracking(self) -> Status | None:
        """The session of the image's tracker; see `Namespace.tracking`."""
        return self._read(lambda now: now.status)

    def close(self) -> None:
        """Does nothing: the host owns the store."""

    def _record(self, snapshot: Snapshot) -> Record:
        record = snapshot.record(self._raw_name)
        if record is None:
            raise no_namespace(self.path, self._raw_name)
        return record

    def _read(self, read: Callable[[Condition], T]) -> T:
        return self._store.read(lambda snapshot: read(Condition(snapshot, self._record(snapshot))))

    def info(self) -> ImageInfo:
        """The namespace and all its bitmaps as of one commit."""
        return self._read(_describe)

    def _load(self, name: bytes) -> Bitmap | None:
        def read(now: Condition) -> Bitmap | None:
            for entry in now.entries:
                if entry.name == name:
                    _require_same_size(now)
                    bitmap = now.frozen(entry, doubted=now.doubted)
                    bitmap.busy = name in now.busy
                    return bitmap
            return None

        return self._read(read)

    def _names(self) -> list[bytes]:
        return self._read(lambda now: [entry.name for entry in now.entries])

    def recover(self, names: Iterable[str] = ()) -> list[Recovery]:
        """Makes all dirty what is inconsistent, in doubt or damaged, bits or directory; see `Namespace.recover`."""
        recover_tracked_device(self._host, self._store, self._raw_name)
        with self._store.change() as change:
            now = Condition(change.snapshot, self._record(change.snapshot))
            damage = None
            try:
                _ = now.entries
            except FormatError as error:
                damage = FormatError(error.where, error.what)  # a copy: the traceback keeps the data in memory
            if damage is not None:
                recovered = salvage.recover(change, now, list(names), damage)
            else:
                recovered = recover_record(change, now, list(names))
        log_recovered(self.where, recovered)
        return recovered

    def recover_session(self) -> None:
        """Like `recover`, but refuses a damaged directory; see `Namespace.recover_session`."""
        recover_tracked_device(self._host, self._store, self._raw_name)
        recover_session(self._store, self._raw_name)

    def __repr__(self) -> str:
        return f"<StoredImage {self.name!r} in {self.path!r}>"

    def _holding(self, where: str, names: list[str], owner: str) -> contextlib.AbstractContextManager[None]:
        return holding(self._store, self._raw_name, names, owner)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Changes the bitmaps, in one commit of the store; see `Namespace.transaction`."""
        recover_tracked_device(self._host, self._store, self._raw_name)
        with self._store.change() as change:
            now = Condition(change.snapshot, self._record(change.snapshot))
            with changing(change, now) as bitmaps:
                yield bitmaps


def _require_same_size(now: Condition) -> None:
    if now.resized:
        raise now.other_size()


def _describe(now: Condition) -> ImageInfo:
    record, refusal = now.record, None
    try:
        require_known(now.snapshot.file.path, record)
    except UnsupportedError as error:
        refusal = str(error)
    if refusal is not None:
        return _info(now, (), errors=(refusal,))
    doubt = now.doubt
    notes = [f"{record.label} counts as all dirty: {doubt}"] if doubt and not now.resized else []
    if now.view and not doubt:
        notes.append(f"{record.label} is {now.view.note}")
    name = decode_name(record.name)
    # Whoever reads a bitmap is refused.
    errors = [str(now.other_size())] if now.resized else []
    counts: dict[bytes, int] = {}
    entries: list[Entry] | None = None
    # Damage to one bitmap must not hide the others.
    with _noting(errors):
        entries = now.entries
    for entry in entries or []:
        if not entry.in_use:
            counts[entry.name], damage = _count(now, entry)
            if damage:
                notes.append(f"{record.label}: {label(decode_name(entry.name))}: {damage}; recover makes that last")
    device = record.kind == store.KIND_DEVICE
    bitmaps = tuple(
        BitmapInfo(
            name=decode_name(entry.name),
            granularity=entry.granularity,
            recording=entry.auto,
            inconsistent=entry.in_use,
            busy=entry.name in now.busy,
            count=counts.get(entry.name),
            namespace=str(uuid.UUID(bytes=record.uuid)),
            node=None if device else name,
            device=name if device else None,
            **_identity(entry),
        )
        for entry in entries or []
    )
    chain: list[str] = []
    with _noting(errors):
        recording = None if entries is None else {decode_name(entry.name): entry.auto for entry in entries}
        chain = checkpoints_of(now.where, record, recording)
    info = _info(now, bitmaps, notes=tuple(notes), doubt=doubt, errors=tuple(errors))
    if chain:
        from dirtmap.engine.model.checkpoints import shown, written_since

        there = {decode_name(entry.name): entry for entry in entries or [] if not entry.in_use}

        def content(name: str) -> Bitmap | None:
            return now.bitmap(there[name], doubted=now.doubted) if name in there else None

        info = shown(info, chain, read_times(record), written_since(chain, content), f"{record.label}: ")
    return info


def _info(
    now: Condition,
    bitmaps: tuple[BitmapInfo, ...],
    *,
    notes: tuple[str, ...] = (),
    doubt: str | None = None,
    errors: tuple[str, ...] = (),
) -> ImageInfo:
    record = now.record
    device, name = record.kind == store.KIND_DEVICE, decode_name(record.name)
    return ImageInfo(
        path=now.snapshot.file.path,
        format=FORMAT,
        size=record.size,
        cluster_size=now.snapshot.header.cluster_size,
        bitmaps=bitmaps,
        notes=notes,
        node=None if device else name,
        device=name if device else None,
        uuid=str(uuid.UUID(bytes=record.uuid)),
        doubt=doubt,
        errors=errors,
    )


@contextlib.contextmanager
def _noting(errors: list[str]) -> Iterator[None]:
    try:
        yield
    except (FormatError, UnsupportedError) as error:
        errors.append(str(error))


def _identity(entry: Entry) -> dict[str, Any]:
    found = identity_of(entry)
    return {"uuid": str(uuid.UUID(bytes=found.uuid)), "generation": found.generation} if found else {}


def _count(now: Condition, entry: Entry) -> tuple[int, str | None]:
    """The dirty bytes of a bitmap, in whole granules; and what of its bits is damaged, or None."""
    if not now.doubted and entry.table_offset > store.ALL_ONES and not now.record.tracked:
        granules, damage = count_saved(now.snapshot, now.record, entry)
        return granules * entry.granularity, damage
    bitmap = now.bitmap(entry, doubted=now.doubted)
    return bitmap.count, bitmap.damage


def describe_store(target: Store) -> ImageInfo:
    """All bitmaps of all namespaces of a store, as of one commit. ``size`` is None, because each disk has its own.

    Raises:
        FormatError: the store is damaged.
        StorageError: the store cannot be opened or read.
    """

    def read(snapshot: Snapshot) -> ImageInfo:
        parts = [_describe(Condition(snapshot, record)) for record in snapshot.table()]
        return ImageInfo(
            path=target.path,
            format=FORMAT,
            size=None,
            cluster_size=snapshot.header.cluster_size,
            bitmaps=tuple(bitmap for part in parts for bitmap in part.bitmaps),
            notes=tuple(note for part in parts for note in part.notes),
            doubt=next((part.doubt for part in parts if part.doubt), None),
            errors=tuple(error for part in parts for error in part.errors),
            checkpoints=tuple(name for part in parts for name in part.checkpoints),
            incomplete=tuple(name for part in parts for name in part.incomplete),
        )

    return target.read(read)
