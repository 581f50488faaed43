"""Changes the bitmaps of namespaces in a store: a transaction each, all of them in one commit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from dirtmap.engine.identity import lasting_identity_now
from dirtmap.engine.model.naming import decode_name, encode_name
from dirtmap.engine.model.transaction import Transaction
from dirtmap.engine.namespaces.condition import (
    Source,
    bitmap_of,
    doubts,
    end_session,
    other_size,
    refuse_tracked,
    refuse_unsettled,
    refuse_without_root,
    size_now,
    tracked_view,
)
from dirtmap.engine.storefile.chain import checkpoints_of, with_checkpoints
from dirtmap.engine.storefile.directory import no_namespace, place_bitmap, read_entries, replace_directory
from dirtmap.engine.storefile.file import Change, Store
from dirtmap.engine.storefile.holds import held_by
from dirtmap.engine.system.log import logger
from dirtmap.fmt import directory, geometry, store
from dirtmap.fmt.directory import Entry
from dirtmap.fmt.errors import StorageError
from dirtmap.fmt.store import Record

if TYPE_CHECKING:
    from dirtmap.engine.model.bitmap import Bitmap


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
        held_by(snapshot.file, record),
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
    with target.change() as change, contextlib.ExitStack() as stack:
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
            and id(source.entry) not in kept
        ):
            kept.add(id(source.entry))
            wanted.append(_kept(source.entry, name, bitmap))
        else:
            wanted.append(place_bitmap(change, record, name, bitmap))
    if wanted == old and not doubted and not view:
        return
    if doubted:
        why = doubts(change.snapshot, record)
        where = f"{change.snapshot.file.path}: {record.label}"
        change.afterwards.append(lambda: logger(__name__).warning("%s: all bitmaps are dirty now: %s", where, why))
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
