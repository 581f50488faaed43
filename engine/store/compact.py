"""Compacts a store into a new file that takes its place; the same way mends a damaged one.

    old file, locked --> every readable namespace --> new file beside it, synced --> renamed over the old one

A crash leaves the old file, or the new one. Nothing becomes clean that was dirty: bits that fail their checksum become
all dirty; a namespace that can only be read through the older header slot is taken from there, and put in doubt.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from dirtmap.engine.fileio import File, open_file, remove_file, replace_file
from dirtmap.engine.namespace import decode_name
from dirtmap.engine.store import header as headers
from dirtmap.engine.store.bitmaps import namespace_label, read_entries, verify
from dirtmap.engine.store.store import Change, Snapshot, Store, create
from dirtmap.fmt import directory, geometry, store
from dirtmap.fmt.directory import Entry
from dirtmap.fmt.errors import Error, FormatError, StorageError
from dirtmap.fmt.store import Area, Record


@dataclass(slots=True)
class Compaction:
    """What became of a store.

    Attributes:
        before, after: the file's length in bytes.
        namespaces: how many were carried over.
        lost: what could not be, a line each; empty unless it was damaged.
    """

    before: int
    after: int = 0
    namespaces: int = 0
    lost: list[str] = field(default_factory=list)


class _Eager(Change):
    """A change of a file that nobody knows yet: areas are written as they are placed, so that memory stays small."""

    def place(self, data: bytes | memoryview) -> Area:
        area = super().place(data)
        for offset, waiting in self._writes:
            self._file.write(offset, waiting)
        self._writes.clear()
        return area


def compact(path: str, *, mend: bool = False, progress: Callable[[int, int], None] | None = None) -> Compaction:
    """Writes the store anew, without free space, in its own place.

    Args:
        path: the store.
        mend: carry over what can be read of a damaged store, instead of refusing it.
        progress: called with (namespaces done, namespaces in all).

    Raises:
        FormatError: damaged, and not ``mend``; or no header is whole.
        LockedError: another process is writing to it.
        StorageError: the operating system failed; the old file stands.
    """
    path = os.path.realpath(path)  # a link shall go on leading to the store
    with Store(path) as target, target._locked() as old:
        if old.status.st_nlink > 1:
            raise StorageError(path, "has another hard link, which would go on leading to the old content")
        chosen = headers.choose(path, old.read(0, store.RESERVED))
        snapshot = Snapshot(old, chosen)
        header = chosen.header
        result = Compaction(before=old.size())
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        try:
            create(
                temporary,
                cluster_bits=header.cluster_bits,
                store_uuid=header.uuid,
                generation=header.generation + 1,
                doubt_generation=header.doubt_generation,
            )
            with open_file(temporary, writable=True) as new:
                os.fchmod(new.fd, old.status.st_mode & 0o777)
                change = _Eager(new, headers.choose(temporary, new.read(0, store.RESERVED)))
                records = _records(snapshot, result, mend=mend)
                for done, (source, record) in enumerate(records):
                    _carry_over(source, record, change, result, mend=mend)
                    if progress:
                        progress(done + 1, len(records))
                change.commit()
                _fill_older_slot(new)
                result.after = new.size()
            replace_file(temporary, path)
        except BaseException:
            remove_file(temporary)
            raise
        return result


def _fill_older_slot(file: File) -> None:
    """Has both slots say the same: the older one is still the empty store, so losing the newest would lose all."""
    chosen = headers.choose(file.path, file.read(0, store.RESERVED))
    block = headers.build_block(replace(chosen.header, generation=chosen.header.generation + 1))
    for offset in headers.blocks_of(1 - chosen.slot):
        file.write(offset, block)
    file.sync()


def _records(snapshot: Snapshot, result: Compaction, *, mend: bool) -> list[tuple[Snapshot, Record]]:
    if not mend:
        return [(snapshot, record) for record in snapshot.table()]
    found: dict[bytes, tuple[Snapshot, Record]] = {}
    # The older slot's table first, in doubt; what the newest says then replaces it.
    older = _older(snapshot.file, snapshot.chosen.slot)
    for source in (older, snapshot) if older else (snapshot,):
        try:
            table = source.table()
        except FormatError as error:
            result.lost.append(str(error))
            continue
        complete = True
        for number in range(1 << table.bucket_bits):
            try:
                bucket = table.bucket(number)
            except FormatError as error:
                complete = False
                result.lost.append(str(error))
                continue
            for record in bucket.values():
                doubted = replace(record, generation=0) if source is older else record
                found[record.name] = (source, doubted)
        if source is snapshot and complete:
            # Nothing is missing, so what only the older slot knows was removed on purpose.
            found = {name: pair for name, pair in found.items() if pair[0] is snapshot}
    return list(found.values())


def _older(file: File, newest: int) -> Snapshot | None:
    data = file.read(0, store.RESERVED)
    for number in store.COPIES[1 - newest]:
        block = data[number * store.BLOCK : (number + 1) * store.BLOCK]
        if headers.is_whole(block):
            header = headers.parse_block(file.path, block)
            return Snapshot(file, headers.Chosen(header, 1 - newest, True, ()))
    return None


def _carry_over(source: Snapshot, record: Record, change: Change, result: Compaction, *, mend: bool) -> None:
    try:
        entries = read_entries(source, record)
    except FormatError as error:
        if not mend:
            raise
        result.lost.append(f"{error}; its bitmaps are gone")
        entries = []
    doubted = record.generation == 0
    copied = [_carry_bits(source, record, entry, change, result, mend=mend, doubted=doubted) for entry in entries]
    place = change.place(directory.build_directory(copied))
    change.table.put(replace(record, directory=place, nb_bitmaps=len(copied), generation=max(record.generation, 1)))
    result.namespaces += 1


def _carry_bits(
    source: Snapshot, record: Record, entry: Entry, change: Change, result: Compaction, *, mend: bool, doubted: bool
) -> Entry:
    all_dirty = replace(entry, table_offset=store.ALL_ONES, table_size=0, extra_data=b"")
    if doubted:
        return all_dirty
    if entry.table_offset in (store.ALL_ZEROS, store.ALL_ONES):
        return entry
    try:
        verify(source, record, entry)  # proves the checksum before the bits are believed
    except Error as error:
        if not mend:
            raise
        name = f"{namespace_label(record.name)}, bitmap '{decode_name(entry.name)!a}'"
        result.lost.append(f"{name}: all dirty now: {error}")
        return all_dirty
    length = geometry.packed_bytes(record.size, entry.granularity)
    area = change.place(source.file.read_exactly(entry.table_offset, length))
    return replace(entry, table_offset=area.offset)
