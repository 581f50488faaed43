"""Compacts a store: writes it into a new file, which replaces the old one. Repairs a damaged store the same way.

    old file, locked --> every readable namespace --> new file beside it, synced --> renamed over the old one

A crash leaves the old file, or the new one. Nothing dirty becomes clean. What damaged bits cover becomes dirty, and
a namespace all dirty that only the older header slot leads to, or whose directory is damaged. Such a namespace
also loses a tracker's session, because the bitmaps that are missing would count as removed by the tracker.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from dirtmap.engine.model.naming import decode_name, label
from dirtmap.engine.namespaces.condition import Condition, refuse_tracked
from dirtmap.engine.namespaces.salvage import spare_entries
from dirtmap.engine.storefile import header as headers
from dirtmap.engine.storefile import holds
from dirtmap.engine.storefile.directory import place_directory, read_entries
from dirtmap.engine.storefile.entries import all_dirty, identified, tree_of, with_root
from dirtmap.engine.storefile.file import Change, Snapshot, Store, create
from dirtmap.engine.storefile.session import require_known
from dirtmap.engine.storefile.table import DamagedNodeError
from dirtmap.engine.system import locks
from dirtmap.engine.system.file import File, open_file, remove_file, replace_file
from dirtmap.engine.system.locks import USUAL, Locking
from dirtmap.fmt import live, store
from dirtmap.fmt.directory import Entry
from dirtmap.fmt.errors import Error, FormatError, LockedError, StorageError, counted
from dirtmap.fmt.store import Record


@dataclass(slots=True)
class Compaction:
    """The result of a compaction.

    Attributes:
        before, after: length of the file in bytes.
        namespaces: number of namespaces carried over.
        dropped: what could not be carried over, one line each; empty unless the store was damaged.
        made_dirty: bitmaps whose bits could not be carried over, and which are now all dirty, one line each.
    """

    before: int
    after: int = 0
    namespaces: int = 0
    dropped: list[str] = field(default_factory=list)
    made_dirty: list[str] = field(default_factory=list)


class _Readable(NamedTuple):
    """A namespace in the snapshot ``source``, with the ``older`` header slot's snapshot if that is another one.

    If there is a ``doubt``, all its bits count as dirty.
    """

    source: Snapshot
    record: Record
    older: Snapshot | None = None
    doubt: str = ""


_COMMITS = 4  # the most by which a compaction raises the generation
_OLDER = "known from the older header slot only"


def compact(
    path: str,
    *,
    repair: bool = False,
    new_identity: bool = False,
    of_copy: bool = False,
    in_doubt: bool = False,
    progress: Callable[[int, int], None] | None = None,
    expect: Callable[[Store], object] = lambda target: None,
    locking: Locking = USUAL,
) -> Compaction:
    """Rewrites the store in its place, without free space.

    Args:
        path: the store.
        repair: carries over what can be read of a damaged store, instead of refusing it.
        new_identity: gives the store, its nodes and its devices new UUIDs.
        of_copy: the store is known to be a copy; the trackers and holds in it are those of the original.
        in_doubt: what the store lacks is not known: all bitmaps in the new file count as dirty all over.
        progress: called with (namespaces done, namespaces in all).
        expect: compares the store with what was last seen of it; see `Store.expect`. A rolled-back store is in doubt in
            the new file, too.
        locking: how to take the lock of the store.

    Raises:
        FormatError: the store is damaged and ``repair`` is False, or no header is whole.
        UnsupportedError: the store, or a namespace in it, has what only newer software keeps right.
        LockedError: another process writes to the store, or tracks an image in a store that gets a new identity; or a
            bitmap in it is held, and damage hides which.
        BitmapError: a bitmap in it is held.
        StorageError: the operating system failed; the old file stands.
    """
    path = os.path.realpath(path)  # so that a symbolic link to the store stays one
    with Store(path, locking=locking) as target, target._locked() as old:
        if old.status.st_nlink > 1:
            raise StorageError(path, "has another hard link, which would go on leading to the old content")
        expect(target)
        chosen = target.choose_to_write(old)
        snapshot = Snapshot(old, chosen)
        header = chosen.header
        if header.generation > store.MAX_GENERATION - _COMMITS:
            raise FormatError(f"{path}: header.generation", f"{header.generation} is so high that no commit can follow")
        result = Compaction(before=old.size())
        if in_doubt:
            header = replace(header, doubt_generation=header.generation)
            result.made_dirty.append("all bitmaps: the store may lack commits that the original has")
        for left in _left_behind(path):  # a live compaction would have the lock that we hold
            remove_file(left)
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        try:
            create(
                temporary,
                cluster_bits=header.cluster_bits,
                store_uuid=None if new_identity else header.uuid,
                generation=max(header.generation, chosen.lost) + 1,
                doubt_generation=header.doubt_generation,
            )
            with open_file(temporary, writable=True) as new:
                new.belong_as(old)
                change = Change(new, headers.choose(temporary, new.read(0, store.RESERVED)))
                readable = _readable(snapshot, result, repair=repair)
                for found in readable:
                    require_known(path, found.record)
                _refuse_held(old, readable, locking)
                if new_identity and not of_copy:
                    _refuse_used(path, readable)
                if new_identity:
                    readable = _with_new_identities(readable)
                for done, found in enumerate(readable):
                    _carry_over(found, change, result, repair=repair)
                    if progress:
                        progress(done + 1, len(readable))
                change.commit()
                _fill_older_slot(new)
                result.after = new.size()
            replace_file(temporary, path)
        except BaseException:
            remove_file(temporary)
            raise
        for act in change.afterwards:
            act()
        return result


def _left_behind(path: str) -> list[str]:
    """The temporary files that killed compactions have left beside a store."""
    folder, name = os.path.split(path)
    left = re.compile(re.escape(name) + r"\.[0-9a-f]{32}\.tmp")
    try:
        return [os.path.join(folder, other) for other in os.listdir(folder) if left.fullmatch(other)]
    except OSError:
        return []


def _fill_older_slot(file: File) -> None:
    """Makes both slots say the same. The older one is still the empty store: losing the newest would lose all."""
    chosen = headers.choose(file.path, file.read(0, store.RESERVED))
    for epoch in headers.switch(replace(chosen.header, generation=chosen.header.generation + 1), chosen):
        for number, block in epoch:
            file.write(number * store.BLOCK, block)
    file.sync()


def _refuse_used(path: str, readable: list[_Readable]) -> None:
    for found in readable:
        refuse_tracked(f"{path}: {found.record.label}", found.record)


def _refuse_held(old: File, readable: list[_Readable], locking: Locking) -> None:
    """Refuses to put another file in the store's place while a bitmap in it is held; see `holds`.

    Raises:
        BitmapError: names the bitmap and who holds it.
        LockedError: the hold's record cannot be read.
    """
    for found in readable:
        Condition(found.source, found.record).refuse_held()
    # On a file system without locks nobody can hold, and the caller has said that nobody else uses the store.
    if locks.has_locks(old, locking) and holds.is_any_alive(old):
        raise LockedError(old.path, "a bitmap in it is held, and its record of that cannot be read; try again later")


def _with_new_identities(readable: list[_Readable]) -> list[_Readable]:
    """The same namespaces with new UUIDs for nodes and devices; qcow2 images have their own. Drops holds and sessions.

    Both belong to the original: what its trackers mark is not in this store, and their live files are not its own.
    """
    ours = (store.KIND_NODE, store.KIND_DEVICE)
    fresh = {found.record.uuid: uuid.uuid4().bytes for found in readable if found.record.kind in ours}

    def renewed(found: _Readable) -> _Readable:
        record = found.record
        own = fresh.get(record.uuid, record.uuid) if record.kind in ours else record.uuid
        record = holds.with_holds(
            replace(record, uuid=own, root_uuid=fresh.get(record.root_uuid, record.root_uuid)), []
        )
        if not record.tracked:
            return found._replace(record=record)
        record = record.with_extensions(store.OF_A_SESSION)
        if record.kind == store.KIND_PLACE:  # the original will check the image in
            return found._replace(record=replace(record, directory=store.NOWHERE, nb_bitmaps=0))
        return found._replace(record=record, doubt="its tracker is the original's")

    return [renewed(found) for found in readable]


def _with_session_lost(source: Snapshot, record: Record, change: Change) -> Record:
    """The record of a namespace that loses its tracker's session. The session's files are removed after the change.

    A qcow2 image's bitmaps are in the session, so its record says that the session is lost: see `live.LOST`.

    Raises:
        LockedError: the tracker is alive, and would go on marking where nobody looks.
    """
    if not record.tracked:
        return record
    now = Condition(source, record)
    refuse_tracked(now.where, now.record)
    ended = now.end_session(change)
    lost = [(store.EXTENSION_SESSION, live.LOST)] if record.kind == store.KIND_PLACE else []
    return ended.with_extensions(store.OF_A_SESSION, lost)


def _readable(snapshot: Snapshot, result: Compaction, *, repair: bool) -> list[_Readable]:
    if not repair:
        return [_Readable(snapshot, record) for record in snapshot.table()]
    faults: list[FormatError] = []
    newest = {record.name: record for record in _records(snapshot, faults)}
    unknown = "namespaces that the older header slot does not know"
    result.dropped += [f"{unknown}: {_text(snapshot, error)}" for error in faults]
    older = snapshot.older()
    if older is None:
        return [_Readable(snapshot, record) for record in newest.values()]
    found = [_Readable(snapshot, record, older) for record in newest.values()]
    if faults:  # without faults, what only the older slot has was removed on purpose
        lost = [record for record in _records(older, []) if record.name not in newest]
        found += [_Readable(older, record, doubt=_OLDER) for record in lost]
    return found


def _records(snapshot: Snapshot, faults: list[FormatError]) -> list[Record]:
    """All records that can be read. Adds the rest to ``faults``."""

    def fail(error: FormatError) -> None:
        if not (isinstance(error, DamagedNodeError) and error.hides_nothing):  # the new table counts them
            faults.append(FormatError(error.where, error.what))  # a copy: the raised one keeps the data in memory

    return list(snapshot.table().readable(fail))


def _text(snapshot: Snapshot, error: Error) -> str:
    """What is wrong and where, without the path of the file."""
    return f"{error.where.removeprefix(f'{snapshot.file.path}: ')}: {error.what}"


def _carry_over(found: _Readable, change: Change, result: Compaction, *, repair: bool) -> None:
    source, record = found.source, found.record
    if found.doubt:
        record = _with_session_lost(source, record, change)
    whys: dict[Entry, str] = {}
    lost = None
    try:
        entries = read_entries(source, record)
    except FormatError as error:
        if not repair:
            raise
        lost = _text(source, error)
    if lost is not None:  # outside `except`, so that the error keeps no data in memory
        entries = list(whys := spare_entries(source, record, found.older))
        if len(entries) < record.nb_bitmaps:
            many = f"{record.nb_bitmaps - len(entries)} of {counted(record.nb_bitmaps, 'bitmap')}"
            result.dropped.append(f"{record.label}, {many}: {lost}")
        record = _with_session_lost(source, record, change)
    copied = [
        _carry_bits(source, record, entry, change, result, repair=repair, doubt=whys.get(entry, found.doubt))
        for entry in entries
    ]
    place = place_directory(change, record.name, copied)
    change.table.put(replace(record, directory=place, nb_bitmaps=len(copied)))
    result.namespaces += 1


def _carry_bits(
    source: Snapshot, record: Record, entry: Entry, change: Change, result: Compaction, *, repair: bool, doubt: str
) -> Entry:
    where = f"{record.label}, {label(decode_name(entry.name))}"
    if doubt:
        result.made_dirty.append(f"{where}: {doubt}")
        return identified(all_dirty(entry), change.generation)
    if entry.table_offset <= store.ALL_ONES:
        return entry
    from dirtmap.engine.storefile import chunks

    (place, checksum), damage = chunks.carry_over(source, tree_of(record, entry), change)
    new = with_root(entry, place, checksum, entry.table_size)
    if damage is None:
        return new
    if not repair:
        raise FormatError(f"{source.file.path}: {where}", f"its {damage}; recover makes that last")
    result.made_dirty.append(f"{where}: its {damage}")
    return identified(new, change.generation)
