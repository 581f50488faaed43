"""Salvages a namespace whose directory is damaged: finds the names that can still be read, and makes each all dirty.

    directory, damaged       | monday | tue?day |###|        what parses there, each entry by itself
    the older header slot    | sunday | monday  |            the directory that it leads to, if that is whole

Either source may show a name that did not exist: one with a flipped bit, or one removed since. That does no harm, as
the bitmap of that name is all dirty, and records. Which bits the lost directory led to cannot be known.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from dirtmap.engine.identity import lasting_identity_now
from dirtmap.engine.model.infos import Recovery
from dirtmap.engine.model.naming import decode_name, encode_name, label
from dirtmap.engine.namespaces.condition import refuse_tracked, size_now
from dirtmap.engine.storefile.directory import place_directory, read_entries, spare_directory
from dirtmap.engine.storefile.entries import identified
from dirtmap.fmt import directory, store
from dirtmap.fmt.directory import Entry, parse_entries
from dirtmap.fmt.errors import (
    BitmapError,
    BitmapNotFoundError,
    FormatError,
    StorageError,
    UnsupportedError,
    counted,
)

if TYPE_CHECKING:
    from dirtmap.engine.namespaces.condition import Condition
    from dirtmap.engine.storefile.file import Change, Snapshot
    from dirtmap.fmt.store import Record

KNOWN = "its directory was damaged"
READ = f"{KNOWN}, and its name may have been another"


def spare_entries(snapshot: Snapshot, record: Record, older: Snapshot | None) -> dict[Entry, str]:
    """The bitmaps that a namespace with a damaged directory may have had: all dirty, consistent and recording.

    Args:
        snapshot: of the store that has the namespace.
        record: of the namespace.
        older: the store as the other header slot has it, or None.

    Returns:
        Their entries, each with its reason: `KNOWN`, or `READ` for a name that only the damaged directory has.
    """
    found: dict[bytes, tuple[Entry, str]] = {}
    # Reads one directory after the other, without their extra data, because each may be 128 MiB long.
    for entries, why in ((_from_before(record, older), KNOWN), (_from_damaged(snapshot, record), READ)):
        for entry in entries:
            # Whether it recorded is uncertain. A bitmap that does not record would miss all later writes.
            flags = entry.with_flags(set=directory.FLAG_AUTO, clear=directory.FLAG_IN_USE)
            # Without its extra data, which may be damaged: it gets an identity of its own.
            dirty = replace(flags, table_offset=store.ALL_ONES, table_size=0, extra_data=b"")
            # The disk may have grown since, and the bitmap be too long for it.
            faults = store.entry_faults(dirty, record.size, snapshot.header.cluster_size, snapshot.size)
            if len(found) < directory.MAX_BITMAPS and not any(faults):
                found.setdefault(entry.name, (dirty, why))
    return dict(found.values())


def recover(change: Change, now: Condition, names: list[str], damage: FormatError) -> list[Recovery]:
    """Gives a namespace with a damaged directory a new one, in which each bitmap that can be named is all dirty.

    The space that the old directory led to cannot be known, so it leaks. `check` repairs that.

    Args:
        change: plans the new directory.
        now: the condition of the namespace, as of the snapshot of the change.
        names: the bitmaps that the caller asks for; empty for all. All are recovered in any case.
        damage: the error from reading the directory.

    Raises:
        FormatError: no bitmap can be named.
        BitmapNotFoundError: one of ``names`` is not among those found.
        As `Namespace.transaction`.
    """
    record = now.record
    refuse_tracked(now.where, now.record)
    now.refuse_unrecovered()
    now.refuse_without_root()
    now.refuse_held()
    entries = spare_entries(change.snapshot, record, change.snapshot.older())
    if not entries:
        raise FormatError(damage.where, "damaged, and none of its bitmaps can be named; 'check -r all' gives them up")
    known = {entry.name for entry in entries}
    for name in names:
        if encode_name(name) not in known:
            what = "its directory is damaged, and shows no such name; with no name 'recover' brings back what it shows"
            raise BitmapNotFoundError(f"{now.where}: {label(name)}", what)
    identity = record.identity
    with contextlib.suppress(StorageError):
        identity = lasting_identity_now(record)
    size = size_now(record)  # looked at after the identity, so that a later change of the size is seen
    for entry in entries:
        for field, what in store.entry_faults(entry, size, change.header.cluster_size, 0):
            raise BitmapError(f"{now.where}: {label(decode_name(entry.name))}.{field}", what)
    area = place_directory(change, record.name, [identified(entry, change.generation) for entry in entries])
    change.table.put(
        replace(
            now.end_session(change),
            size=size,
            identity=identity,
            generation=change.generation,
            directory=area,
            nb_bitmaps=len(entries),
        )
    )
    lost = record.nb_bitmaps - len(entries)
    more = f"; {lost} of {counted(record.nb_bitmaps, 'bitmap')} cannot be named" if lost > 0 else ""
    return [Recovery(decode_name(entry.name), f"all dirty: {why}{more}") for entry, why in entries.items()]


def _from_before(record: Record, older: Snapshot | None) -> Iterator[Entry]:
    with contextlib.suppress(FormatError, UnsupportedError):
        before = older and older.record(record.name)
        if older and before and before.uuid == record.uuid:  # not another namespace of that name
            yield from read_entries(older, before)


def _from_damaged(snapshot: Snapshot, record: Record) -> Iterator[Entry]:
    with contextlib.suppress(FormatError, directory.BrokenEntryError):
        data = spare_directory(snapshot, record)
        yield from (entry for _, entry in islice(parse_entries(data), record.nb_bitmaps))
