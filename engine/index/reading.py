"""Reads what a container says, as far as it may have changed since the index knew it.

A container is read again when it looks different from outside (device, inode, size, mtime, ctime); of a store only the
buckets, and the directories, whose place has changed since the commit that was read last. What was not sound is read
again each time, to say what is wrong with it now.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from dirtmap.engine.qcow2.layout import Layout
from dirtmap.engine.qcow2.reading import read_session
from dirtmap.engine.storefile.directory import read_entries
from dirtmap.engine.storefile.file import Snapshot, Store
from dirtmap.engine.storefile.table import NamespaceTable, bucket_of
from dirtmap.engine.system import locks
from dirtmap.engine.system.file import File, open_file
from dirtmap.fmt import store
from dirtmap.fmt.errors import Error, FormatError, LockedError, StorageError, UnsupportedError
from dirtmap.fmt.index import DAMAGED, HELD, KIND_FAULTY, KIND_STORE, NO_AREA, SOUND, Member, members_key
from dirtmap.fmt.structures.index import parse_members

Get = Callable[[bytes], bytes | None]
Bitmaps = list[tuple[bytes, int, int]]  # name, flags, log2 of the granularity

# A file's time may step as seldom as every 10 ms: what was changed so shortly before it was read may change again
# without looking different.
_RACY_NS = 50_000_000


class PartlyDamagedError(FormatError):
    """Some buckets of a store's namespace table cannot be read; the index has what the others say.

    Args:
        broken: why each cannot be read, by number; not empty.
        buckets: how many there are.
    """

    def __init__(self, broken: dict[int, FormatError], buckets: int) -> None:
        first, *others = broken.values()
        more = f"; and so are {len(others)} more of its {buckets} buckets" if others else ""
        super().__init__(first.where, f"{first.what}{more}")
        self._broken, self._buckets = frozenset(broken), buckets

    def may_hide(self, name: bytes) -> bool:
        """True where a namespace of that name may be in what cannot be read."""
        return bucket_of(name, self._buckets) in self._broken


class Fingerprint(NamedTuple):
    """What a container looks like from outside: numbers from ``stat``; times in ns, size in bytes."""

    device: int
    inode: int
    mtime: int
    ctime: int
    size: int


class Container(NamedTuple):
    """A container as the index knows it.

    Attributes:
        path: absolute.
        number: the index's own, never used again.
        kind: `KIND_QCOW2`, `KIND_STORE` or `KIND_FAULTY`.
        condition: `SOUND`, `DAMAGED` or `HELD`.
        racy: it may have changed since without looking different.
        fingerprint: what it looked like when it was read.
        buckets: of a store's namespace table.
        generation: of a store's commit.
        commit_id: 16 bytes; of a store.
        uuid: 16 bytes; of a store, or of an image's namespace; zeros where there is none.
    """

    path: str
    number: int
    kind: int
    condition: int
    racy: bool
    fingerprint: Fingerprint
    buckets: int = 0
    generation: int = 0
    commit_id: bytes = bytes(16)
    uuid: bytes = bytes(16)


@dataclass(slots=True)
class Reading:
    """What a container says: its condition, and what has to be changed in the index, bucket by bucket."""

    container: Container
    # Of each bucket that changed: its area pointer, and its namespaces, with their bitmaps where those changed.
    buckets: dict[int, tuple[bytes, list[tuple[Member, Bitmaps | None]]]] = field(default_factory=dict)
    problem: Error | None = None
    base: Container | None = None  # what was known when it was read


@dataclass(frozen=True, slots=True)
class KindReader:
    """How the index reads one kind of container.

    Attributes:
        number: of the kind, in the index.
        probe: tells whether an open file is one.
        read: reads one. It is given what tells what the index has under a key; the file; the container as far as it is
            known without being read, and ``known`` to the index from before; and whether an image is read although it
            is held by a writer. It returns None where all is as known.
    """

    number: int
    probe: Callable[[File], bool]
    read: Callable[[Get, File, Container, Container | None, bool], Reading | None]


def fingerprint(path: str) -> Fingerprint:
    """What the file at a path looks like from outside.

    Raises:
        StorageError: there is nothing, or it cannot be looked at.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise StorageError(path, error.strerror or str(error)) from error
    return Fingerprint(status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)


def is_unchanged(known: Container, now: Fingerprint) -> bool:
    """True where a container is as it was when it was found sound: what the index says of it holds."""
    return known.condition == SOUND and not known.racy and known.fingerprint == now


def look(
    readers: Iterable[KindReader], get: Get, path: str, known: Container | None, force_share: bool
) -> Reading | None:
    """What a container says.

    Args:
        readers: of each kind of container.
        get: tells what the index has under a key.
        path: of the container, absolute.
        known: what the index knows of it.
        force_share: read an image although it is held by a writer.

    Returns:
        None where it says what is known already.

    Raises:
        StorageError: there is nothing, or it cannot be looked at.
    """
    now = fingerprint(path)
    if known and is_unchanged(known, now):
        return None
    # Before reading: what changes from here on looks different next time, or is racy.
    racy = time.time_ns() - max(now.mtime, now.ctime) < _RACY_NS
    blank = Container(path, known.number if known else 0, KIND_FAULTY, DAMAGED, racy, now)
    with open_file(path) as file:
        for reader in readers:
            if reader.probe(file):
                return reader.read(get, file, blank._replace(kind=reader.number), known, force_share)
    return Reading(blank, {0: (NO_AREA, [])}, FormatError(path, "neither a qcow2 image nor a store"))


def read_store(
    opened: AbstractContextManager[Store], get: Get, blank: Container, known: Container | None
) -> Reading | None:
    """Reads a store for the index; see `KindReader`.

    Args:
        opened: the store, for as long as it is read.
        get: see `KindReader`.
        blank: the container as far as it is known without being read.
        known: as the index knew it before.
    """
    try:
        with opened as target:
            return _read_store(get, target, blank, known)
    except (FormatError, UnsupportedError) as error:
        # Without buckets, what it said before goes.
        return Reading(blank._replace(condition=DAMAGED, racy=False), {}, error)


def _read_store(get: Get, target: Store, blank: Container, before: Container | None) -> Reading | None:
    known = before if before is not None and before.kind == KIND_STORE else blank

    def look(snapshot: Snapshot) -> Reading | None:
        header = snapshot.header
        table = snapshot.table()  # a store that has lost it is damaged, whatever was known
        pointers = table.pointers
        container = blank._replace(
            condition=SOUND,
            buckets=len(pointers),
            generation=header.generation,
            commit_id=header.commit_id,
            uuid=header.uuid,
        )
        reading = Reading(container)
        broken: dict[int, FormatError] = {}
        if known.condition == SOUND and known.commit_id == header.commit_id:
            return None if container == known else reading
        same = known.buckets == len(pointers)
        for bucket in _changed(snapshot, table, known) if same and known.condition == SOUND else range(len(pointers)):
            pointer = pointers[bucket]
            # Where namespaces have moved between buckets, all are taken in anew.
            before, members = parse_members(get(members_key(known.number, bucket)) if same else None)
            if before == pointer:
                continue
            old = {member.name: member for _, member in members}
            try:
                records = table.bucket(bucket).values()
            except FormatError as error:
                # The other buckets are none the worse. What was known of this one goes: nothing holds it any more.
                broken[bucket] = error
                reading.buckets[bucket] = (NO_AREA, [])
                continue
            reading.buckets[bucket] = (pointer, [_member(snapshot, record, old) for record in records])
        if broken:
            reading.container = container._replace(condition=DAMAGED)
            reading.problem = PartlyDamagedError(broken, len(pointers))
        return reading

    return target.read(look)


def _changed(snapshot: Snapshot, table: NamespaceTable, known: Container) -> Iterable[int]:
    """The buckets that may have changed since the index knew the store: few, where that was one commit ago."""
    with contextlib.suppress(FormatError, UnsupportedError):
        older = snapshot.older()
        if older and older.header.commit_id == known.commit_id and older.header.uuid == known.uuid:
            before = older.table()
            if before.bucket_bits == table.bucket_bits:
                return table.unlike(before)
    return range(known.buckets)


def _member(snapshot: Snapshot, record: store.Record, old: dict[bytes, Member]) -> tuple[Member, Bitmaps | None]:
    """A store's namespace, and its bitmaps, if its directory is another one than before."""
    area = (record.directory.offset, record.directory.length, record.directory.checksum)
    member = Member(record.name, record.kind, record.uuid, record.root_uuid, record.size, record.path, area)
    before = old.get(record.name)
    if before and (before.directory, before.uuid) == (member.directory, member.uuid):
        return member, None
    if record.kind == store.KIND_PLACE:
        return member, []  # the image says what it has; what is here while it is tracked is the same
    try:
        entries = read_entries(snapshot, record)
    except FormatError:
        # Its other namespaces are none the worse; `check` tells what is wrong with this one.
        return replace(member, directory=(0, 0, 0)), []
    return member, [(entry.name, entry.flags, entry.granularity_bits) for entry in entries]


def read_image(file: File, blank: Container, force_share: bool) -> Reading:
    """Reads a qcow2 image for the index; see `KindReader`."""

    def look(layout: Layout) -> tuple[Member, Bitmaps]:
        bitmaps = [(slot.entry.name, slot.entry.flags, slot.entry.granularity_bits) for slot in layout.slots]
        uuid = layout.uuid or bytes(16)
        member = Member(
            layout.name or b"", store.KIND_PLACE, uuid, bytes(16), layout.header.size, os.fsencode(blank.path)
        )
        return member, bitmaps

    nothing: dict[int, tuple[bytes, list[tuple[Member, Bitmaps | None]]]] = {0: (NO_AREA, [])}
    try:
        member, bitmaps = read_session(file, look, force_share=force_share)
        # Whoever does not force it is to be told, next time.
        held = force_share and locks.is_written(file)
    except LockedError as error:
        return Reading(blank._replace(condition=HELD), nothing, error)
    except (FormatError, UnsupportedError) as error:
        return Reading(blank._replace(condition=DAMAGED), nothing, error)
    found = blank._replace(condition=SOUND, uuid=member.uuid, racy=blank.racy or held)
    return Reading(found, {0: (NO_AREA, [(member, bitmaps)])})
