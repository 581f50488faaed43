"""Changes the bitmaps of namespaces in a store: one transaction per namespace, all of them in one commit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from dirtmap.engine.identity import lasting_identity_now
from dirtmap.engine.model.naming import decode_name, encode_name
from dirtmap.engine.model.transaction import Transaction
from dirtmap.engine.namespaces.condition import Condition, Source, refuse_tracked
from dirtmap.engine.storefile.chain import checkpoints_of, with_chain
from dirtmap.engine.storefile.directory import no_namespace, place_bitmap, replace_directory
from dirtmap.engine.storefile.entries import identified, item, with_items, with_root
from dirtmap.engine.storefile.file import Change, Store
from dirtmap.engine.storefile.holds import held_by
from dirtmap.engine.system.log import logger
from dirtmap.fmt import directory, geometry, store
from dirtmap.fmt.directory import Entry
from dirtmap.fmt.errors import StorageError

if TYPE_CHECKING:
    from dirtmap.engine.model.bitmap import Bitmap


@contextlib.contextmanager
def changing(change: Change, now: Condition) -> Iterator[Transaction]:
    """One namespace's part of a change. The end of the transaction puts its new directory into ``change``.

    Args:
        change: of the store.
        now: the condition of the namespace, as of the snapshot of the change.

    Raises:
        LockedError: the namespace is tracked.
        BitmapError: it must be recovered first, a device's root is elsewhere, or a rule of the format is broken.
        FormatError: the directory is damaged.
    """
    refuse_tracked(now.where, now.record)
    now.refuse_unrecovered()
    now.refuse_without_root()
    if not now.record.nb_bitmaps:  # the new size can be adopted at once
        now = Condition(now.snapshot, replace(now.record, size=now.size_now))
    record = now.record
    doubted = now.resized or now.doubted
    bitmaps = Transaction(
        now.where,
        record.size,
        geometry.MAX_DEFAULT_GRANULARITY,
        {decode_name(entry.name): now.bitmap(entry, doubted=doubted) for entry in now.entries},
        held_by(now.snapshot.file, record),
        checkpoints_of(now.where, record, {decode_name(entry.name): entry.auto for entry in now.entries}),
        most_bytes=store.MAX_CHUNKS * change.header.cluster_size,
    )
    try:
        yield bitmaps
        bitmaps.validate()
        if now.resized:
            _put_at_old_size(change, now, bitmaps)
        else:
            _put(change, now, bitmaps)
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
            now = Condition(self._change.snapshot, record)
            self._begun[name] = self._stack.enter_context(changing(self._change, now))
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


def _put_at_old_size(change: Change, now: Condition, bitmaps: Transaction) -> None:
    """Like `_put`, but for a disk that has another size than its bits, as long as no bits have to be written.

    All bits stay in doubt, and a dead tracker's session stays, until the new size is adopted.

    Raises:
        BitmapError: bits would have to be written.
    """
    wanted: list[Entry] = []
    before = {decode_name(entry.name): entry for entry in now.entries}
    for name, bitmap in bitmaps.items():
        source = bitmap._source
        kept = None
        if isinstance(source, Source) and source.condition is now:
            kept = _kept(change, source.entry, before.get(bitmaps.origins.get(name, "")), name, bitmap)
        if kept is None or any(kept.table_offset == entry.table_offset > store.ALL_ONES for entry in wanted):
            raise now.other_size()
        wanted.append(kept)
    if wanted != now.entries:
        area = replace_directory(change, now.record, now.entries, wanted)
        change.table.put(replace(now.record, directory=area, nb_bitmaps=len(wanted)))


def _kept(change: Change, source: Entry, own: Entry | None, name: str, bitmap: Bitmap) -> Entry:
    """The entry of a bitmap that has the bits of another one's, or its own, where they are in the file.

    Args:
        change: of the store.
        source: the entry that has led to these bits.
        own: the entry that the bitmap had, under whichever name; None for a new one.
        name: of the bitmap now.
        bitmap: its flags.
    """
    flags = {"set": directory.FLAG_AUTO} if bitmap.recording else {"clear": directory.FLAG_AUTO}
    kept = replace(source.with_flags(**flags), name=encode_name(name))
    if own and own.name != source.name:  # it stays the bitmap that it is, with all else that is known of it
        of_bits = {kind: item(source, kind) for kind in (store.ITEM_BITS, store.ITEM_WINDOW)}
        kept = replace(kept, extra_data=with_items(own, of_bits).extra_data)
    elif own and kept.flags == source.flags:
        return kept
    return identified(kept, change.generation, new=own is None)


def _put(change: Change, now: Condition, bitmaps: Transaction) -> None:
    record, view = now.record, now.view
    kept: dict[str, Entry] = {}
    of: set[bytes] = set()  # old names of the bitmaps whose bits are kept
    # A tracker that has the session is dead, or this change would have been refused. What it marked is in the bits that
    # were read. They are written, and the session ends.
    before = {decode_name(entry.name): entry for entry in now.entries}
    # First those that stay what they are, then those whose bits are now another's.
    for moved in (False, True):
        for name, bitmap in bitmaps.items():
            source = bitmap._source
            # Bits of another namespace or store are copied. Bits in doubt are written as they are shown, all dirty.
            # Bits of an inconsistent bitmap are not shown at all.
            if (
                name not in kept
                and isinstance(source, Source)
                and source.condition is now
                and (not source.doubted or bitmap.inconsistent)
                and not (view and not bitmap.inconsistent)
                and source.entry.name not in of
                and (moved or bitmaps.origins.get(name) == decode_name(source.entry.name))
            ):
                of.add(source.entry.name)
                own = before.get(bitmaps.origins.get(name, ""))
                kept[name] = _kept(change, source.entry, own, name, bitmap)
    wanted: list[Entry] = []
    for name, bitmap in bitmaps.items():
        base = before.get(bitmaps.origins.get(name, ""))
        if base and base.name in of and name not in kept:
            base = with_root(base, store.ALL_ZEROS, 0, 0)  # its bits are another's now
        wanted.append(kept.get(name) or place_bitmap(change, record, name, bitmap, base))
    if wanted == now.entries and not now.doubted and not view:
        return
    if now.doubted:
        message = "%s: all bitmaps are dirty now: %s"
        change.afterwards.append(lambda: logger(__name__).warning(message, now.where, now.doubt))
    area = replace_directory(change, record, now.entries, wanted)
    identity = record.identity
    if view and view.identity:
        identity = view.identity
    elif record.kind in (store.KIND_NODE, store.KIND_DEVICE) and (now.doubted or not record.nb_bitmaps):
        # Either all that was in doubt is now dirty on disk, or the first bitmap begins: changes count from here on.
        with contextlib.suppress(StorageError):
            identity = lasting_identity_now(record)
    new = with_chain(now.end_session(change), bitmaps.checkpoints)
    generation, count = change.generation, len(wanted)
    change.table.put(replace(new, generation=generation, directory=area, nb_bitmaps=count, identity=identity))
