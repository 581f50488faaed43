"""Compacts a store into a new file that takes its place; the same way mends a damaged one.

    old file, locked --> every readable namespace --> new file beside it, synced --> renamed over the old one

A crash leaves the old file, or the new one. Nothing becomes clean that was dirty: bits that fail their checksum become
all dirty; so does a namespace that only the older header slot still leads to, and one with a damaged directory. For
such a namespace the session of a tracker is lost, too: what is missing would count as removed by the tracker.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from dirtmap.engine.model.naming import decode_name, label
from dirtmap.engine.namespaces.condition import end_session, refuse_held, refuse_tracked
from dirtmap.engine.namespaces.salvage import all_dirty, spare_entries
from dirtmap.engine.storefile import header as headers
from dirtmap.engine.storefile import holds
from dirtmap.engine.storefile.directory import read_entries, verify
from dirtmap.engine.storefile.file import Change, Snapshot, Store, create
from dirtmap.engine.system.file import File, open_file, remove_file, replace_file
from dirtmap.engine.system.locks import USUAL, Locking
from dirtmap.fmt import geometry, live, store
from dirtmap.fmt.directory import Entry
from dirtmap.fmt.errors import Error, FormatError, StorageError, counted
from dirtmap.fmt.store import Area, Record
from dirtmap.fmt.structures.directory import build_directory


@dataclass(slots=True)
class Compaction:
    """What became of a store.

    Attributes:
        before, after: the file's length in bytes.
        namespaces: how many were carried over.
        dropped: what could not be, a line each; empty unless it was damaged.
        made_dirty: bitmaps whose bits could not be, and are all dirty now, a line each.
    """

    before: int
    after: int = 0
    namespaces: int = 0
    dropped: list[str] = field(default_factory=list)
    made_dirty: list[str] = field(default_factory=list)


class _Readable(NamedTuple):
    """A namespace as ``source`` has it, and the store as the older header slot has it, if that is not the source.

    Where there is a ``doubt``, its bits count as dirty.
    """

    source: Snapshot
    record: Record
    older: Snapshot | None = None
    doubt: str = ""


_COMMITS = 4  # how much higher a generation is after a compaction, at most
_OLDER = "known from the older header slot only"


class _Eager(Change):
    """A change of a file that nobody knows yet: areas are written as they are placed, so that memory stays small."""

    def place(self, data: bytes | memoryview) -> Area:
        area = super().place(data)
        for offset, waiting in self._writes:
            self._file.write(offset, waiting)
        self._writes.clear()
        return area


def compact(
    path: str,
    *,
    mend: bool = False,
    new_identity: bool = False,
    of_copy: bool = False,
    progress: Callable[[int, int], None] | None = None,
    expect: Callable[[Store], object] = lambda target: None,
    locking: Locking = USUAL,
) -> Compaction:
    """Writes the store anew, without free space, in its own place.

    Args:
        path: the store.
        mend: carry over what can be read of a damaged store, instead of refusing it.
        new_identity: the store gets a UUID of its own, as do its nodes and devices.
        of_copy: it is known to be a copy of another, whose trackers and holds are those that it tells of.
        progress: called with (namespaces done, namespaces in all).
        expect: has the store know what was seen of it; see `Store.expect`. What was rolled back is in doubt in the new
            file.
        locking: how to take the lock.

    Raises:
        FormatError: damaged, and not ``mend``; or no header is whole.
        LockedError: another process is writing to it, or tracks an image in what is to get another identity.
        BitmapError: a bitmap in what is to get another identity is held.
        StorageError: the operating system failed; the old file stands.
    """
    path = os.path.realpath(path)  # a link shall go on leading to the store
    with Store(path, locking=locking) as target, target._locked() as old:
        if old.status.st_nlink > 1:
            raise StorageError(path, "has another hard link, which would go on leading to the old content")
        expect(target)
        chosen = target.choose(old)
        snapshot = Snapshot(old, chosen)
        header = chosen.header
        if header.generation > store.MAX_GENERATION - _COMMITS:
            raise FormatError(f"{path}: header.generation", f"{header.generation} is so high that no commit can follow")
        result = Compaction(before=old.size())
        for left in _left_behind(path):  # whoever makes one has the lock that we have
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
                change = _Eager(new, headers.choose(temporary, new.read(0, store.RESERVED)))
                readable = _readable(snapshot, result, mend=mend)
                if new_identity and not of_copy:
                    _refuse_used(path, readable)
                if new_identity:
                    readable = _with_new_identities(readable)
                for done, found in enumerate(readable):
                    _carry_over(found, change, result, mend=mend)
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
    """What compactions have left beside a store that were killed."""
    folder, name = os.path.split(path)
    left = re.compile(re.escape(name) + r"\.[0-9a-f]{32}\.tmp")
    try:
        return [os.path.join(folder, other) for other in os.listdir(folder) if left.fullmatch(other)]
    except OSError:
        return []


def _fill_older_slot(file: File) -> None:
    """Has both slots say the same: the older one is still the empty store, so losing the newest would lose all."""
    chosen = headers.choose(file.path, file.read(0, store.RESERVED))
    block = headers.build_block(replace(chosen.header, generation=chosen.header.generation + 1))
    for offset in headers.blocks_of(1 - chosen.slot):
        file.write(offset, block)
    file.sync()


def _refuse_used(path: str, readable: list[_Readable]) -> None:
    for found in readable:
        refuse_tracked(path, found.record)
        refuse_held(path, found.record)


def _with_new_identities(readable: list[_Readable]) -> list[_Readable]:
    """The same with other UUIDs for what is in this store; images have their own. Holds are on the original.

    So are the sessions of trackers: what is marked in them is not in this store, and their files are not its own.
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
        if record.kind == store.KIND_PLACE:  # the image goes back to the original
            return found._replace(record=replace(record, directory=store.NOWHERE, nb_bitmaps=0))
        return found._replace(record=record, doubt="its tracker is the original's")

    return [renewed(found) for found in readable]


def _with_session_lost(source: Snapshot, record: Record, change: Change) -> Record:
    """The record where what its tracker had is lost, whose files go.

    A qcow2 image's bitmaps are in the session, and the image has to hear of it: see `live.LOST`.

    Raises:
        LockedError: the tracker lives, and would go on marking where nobody looks.
    """
    if not record.tracked:
        return record
    refuse_tracked(source.file.path, record)
    ended = end_session(change, record, source)
    lost = [(store.EXTENSION_SESSION, live.LOST)] if record.kind == store.KIND_PLACE else []
    return ended.with_extensions(store.OF_A_SESSION, lost)


def _readable(snapshot: Snapshot, result: Compaction, *, mend: bool) -> list[_Readable]:
    if not mend:
        return [_Readable(snapshot, record) for record in snapshot.table()]
    faults: list[FormatError] = []
    newest = {record.name: record for record in _records(snapshot, faults)}
    unknown = "namespaces that the older header slot does not know"
    result.dropped += [f"{unknown}: {_text(snapshot, error)}" for error in faults]
    older = snapshot.older()
    if older is None:
        return [_Readable(snapshot, record) for record in newest.values()]
    found = [_Readable(snapshot, record, older) for record in newest.values()]
    if faults:  # else nothing is missing, so what only the older slot knows was removed on purpose
        lost = [record for record in _records(older, []) if record.name not in newest]
        found += [_Readable(older, record, doubt=_OLDER) for record in lost]
    return found


def _records(snapshot: Snapshot, faults: list[FormatError]) -> list[Record]:
    """All that can be read; adds to ``faults`` what cannot."""
    found: list[Record] = []
    try:
        table = snapshot.table()
    except FormatError as error:
        faults.append(FormatError(error.where, error.what))  # the one raised keeps in memory what was read
        return found
    table.count = store.MAX_NAMESPACES  # the number may be what is wrong; the new table counts them
    for number in range(1 << table.bucket_bits):
        try:
            found += table.bucket(number).values()
        except FormatError as error:
            faults.append(FormatError(error.where, error.what))  # the one raised keeps in memory what was read
    return found


def _text(snapshot: Snapshot, error: Error) -> str:
    """What is wrong, and where in the file."""
    return f"{error.where.removeprefix(f'{snapshot.file.path}: ')}: {error.what}"


def _carry_over(found: _Readable, change: Change, result: Compaction, *, mend: bool) -> None:
    source, record = found.source, found.record
    if found.doubt:
        record = _with_session_lost(source, record, change)
    whys: dict[Entry, str] = {}
    lost = None
    try:
        entries = read_entries(source, record)
    except FormatError as error:
        if not mend:
            raise
        lost = _text(source, error)
    if lost is not None:  # by now the error does not keep in memory any more what was read
        entries = list(whys := spare_entries(source, record, found.older))
        if len(entries) < record.nb_bitmaps:
            many = f"{record.nb_bitmaps - len(entries)} of {counted(record.nb_bitmaps, 'bitmap')}"
            result.dropped.append(f"{record.label}, {many}: {lost}")
        record = _with_session_lost(source, record, change)
    copied = [
        _carry_bits(source, record, entry, change, result, mend=mend, doubt=whys.get(entry, found.doubt))
        for entry in entries
    ]
    place = change.place(build_directory(copied))
    change.table.put(replace(record, directory=place, nb_bitmaps=len(copied)))
    result.namespaces += 1


def _carry_bits(
    source: Snapshot, record: Record, entry: Entry, change: Change, result: Compaction, *, mend: bool, doubt: str
) -> Entry:
    where = f"{record.label}, {label(decode_name(entry.name))}"
    if doubt:
        result.made_dirty.append(f"{where}: {doubt}")
        return all_dirty(entry)
    if entry.table_offset in (store.ALL_ZEROS, store.ALL_ONES):
        return entry
    try:
        verify(source, record, entry)  # proves the checksum before the bits are believed
    except Error:
        if not mend:
            raise
        result.made_dirty.append(f"{where}: its bits are damaged")
        return all_dirty(entry)
    length = geometry.packed_bytes(record.size, entry.granularity)
    area = change.place(source.file.read_exactly(entry.table_offset, length))
    return replace(entry, table_offset=area.offset)
