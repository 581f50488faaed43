"""Changes the bitmaps of namespaces in a store: one transaction per namespace, all of them in one commit."""

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
    refuse_unrecovered,
    refuse_without_root,
    size_now,
    tracked_view,
)
from dirtmap.engine.storefile.chain import checkpoints_of, with_checkpoints
from dirtmap.engine.storefile.directory import no_namespace, place_bitmap, read_entries, replace_directory
from dirtmap.engine.storefile.entries import identified, with_root
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
    """One namespace's part of a change. The end of the transaction puts its new directory into ``change``.

    Raises:
        LockedError: the namespace is tracked.
        BitmapError: it must be recovered first, a device's root is elsewhere, or a rule of the format is broken.
        FormatError: the directory is damaged.
    """
    snapshot = change.snapshot
    refuse_tracked(snapshot.file.path, record)
    refuse_unrecovered(snapshot, record)
    refuse_without_root(snapshot, record)
    size = size_now(record)
    if not record.nb_bitmaps:
        record = replace(record, size=size)  # without bitmaps the new size can be adopted at once
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
        most_bytes=store.MAX_CHUNKS * change.header.cluster_size,
    )
    try:
        yield bitmaps
        bitmaps.validate()
        if size == record.size:
            _put(change, record, entries, bitmaps, doubted)
        else:
            _put_at_old_size(change, record, entries, bitmaps)
    finally:
        bitmaps.close()


class StoreTransaction(Mapping[str, Transaction]):
    """The namespaces of a store during a change: a mapping of names to transactions, which one commit ends."""

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
    """Changes any number of namespaces. At the end of the block all changes are durable; after an exception none is.

    Errors as `Namespace.transaction`.
    """
    with target.change() as change, contextlib.ExitStack() as stack:
        yield StoreTransaction(change, stack)


def _put_at_old_size(change: Change, record: Record, old: list[Entry], bitmaps: Transaction) -> None:
    """Like `_put`, but for a disk that has another size than its bits, as long as no bits have to be written.

    All bits stay in doubt, and a dead tracker's session stays, until the new size is adopted.

    Raises:
        BitmapError: bits would have to be written.
    """
    wanted: list[Entry] = []
    for name, bitmap in bitmaps.items():
        source = bitmap._source
        kept = None
        if isinstance(source, Source) and source.record is record:
            kept = _kept(change, source.entry, name, bitmap, new=bitmaps.origins.get(name) is None)
        if kept is None or any(kept.table_offset == entry.table_offset > store.ALL_ONES for entry in wanted):
            raise other_size(change.snapshot, record)
        wanted.append(kept)
    if wanted != old:
        area = replace_directory(change, record, old, wanted)
        change.table.put(replace(record, directory=area, nb_bitmaps=len(wanted)))


def _kept(change: Change, entry: Entry, name: str, bitmap: Bitmap, *, new: bool) -> Entry:
    """The entry of a bitmap whose bits keep their place in the file; ``new`` if they were another one's."""
    flags = {"set": directory.FLAG_AUTO} if bitmap.recording else {"clear": directory.FLAG_AUTO}
    kept = replace(entry.with_flags(**flags), name=encode_name(name))
    return kept if kept.flags == entry.flags and not new else identified(kept, change.generation, new=new)


def _put(change: Change, record: Record, old: list[Entry], bitmaps: Transaction, doubted: bool) -> None:
    kept: dict[str, Entry] = {}
    of: set[bytes] = set()  # old names of the bitmaps whose bits are kept
    # A tracker that has the session is dead, or this change would have been refused. What it marked is in the bits that
    # were read. They are written, and the session ends.
    view = tracked_view(change.snapshot, record)
    before = {decode_name(entry.name): entry for entry in old}
    # First those that stay what they are, then those whose bits are now another's.
    for moved in (False, True):
        for name, bitmap in bitmaps.items():
            source = bitmap._source
            # Bits of another namespace or store are copied. Bits in doubt are written as they are shown, all dirty.
            # Bits of an inconsistent bitmap are not shown at all.
            if (
                name not in kept
                and isinstance(source, Source)
                and source.record is record
                and (not source.doubted or bitmap.inconsistent)
                and not (view and not bitmap.inconsistent)
                and source.entry.name not in of
                and (moved or bitmaps.origins.get(name) == decode_name(source.entry.name))
            ):
                of.add(source.entry.name)
                kept[name] = _kept(change, source.entry, name, bitmap, new=moved)
    wanted: list[Entry] = []
    for name, bitmap in bitmaps.items():
        base = before.get(bitmaps.origins.get(name, ""))
        if base and base.name in of and name not in kept:
            base = with_root(base, store.ALL_ZEROS, 0, 0)  # its bits are another's now
        wanted.append(kept.get(name) or place_bitmap(change, record, name, bitmap, base))
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
        # Either all that was in doubt is now dirty on disk, or the first bitmap begins: changes count from here on.
        with contextlib.suppress(StorageError):
            identity = lasting_identity_now(record)
    new = with_checkpoints(end_session(change, record), bitmaps.checkpoints)
    generation, count = change.generation, len(wanted)
    change.table.put(replace(new, generation=generation, directory=area, nb_bitmaps=count, identity=identity))
