"""Reads a container for the index, as far as it may have changed since the index last read it.

A container is read again if it looks different from outside (device, inode, size, mtime, ctime). In a store, only those
leaves and directories are read whose place has changed since the commit that was read last. A container that was not
sound is read again each time, to say what is wrong with it now.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from dirtmap.engine.qcow2.layout import Layout
from dirtmap.engine.qcow2.reading import read_session
from dirtmap.engine.storefile.directory import read_entries
from dirtmap.engine.storefile.file import Snapshot, Store
from dirtmap.engine.storefile.table import DamagedNodeError, NamespaceTable, Node
from dirtmap.engine.system import locks
from dirtmap.engine.system.file import File, open_file
from dirtmap.engine.system.locks import Locking
from dirtmap.fmt import store
from dirtmap.fmt.errors import Error, FormatError, LockedError, StorageError, UnsupportedError, counted
from dirtmap.fmt.index import (
    DAMAGED,
    HELD,
    KIND_FAULTY,
    KIND_STORE,
    NO_AREA,
    SOUND,
    Member,
    image_mark,
    members_key,
    parse_members,
)
from dirtmap.fmt.parsers.store import AREA

Get = Callable[[bytes], bytes | None]
Bitmaps = list[tuple[bytes, int, int]]  # name, flags, log2 of the granularity

_AT_ONCE = Locking(wait=0)

# What was changed so shortly before it was read may change again without looking different: a file's time may step as
# seldom as every 10 ms; where it has whole or even seconds, as in ext4 with small inodes and in FAT, every 2 s.
_SECOND_NS = 1_000_000_000
_RACY_NS, _RACY_SECONDS_NS = 50_000_000, 2 * _SECOND_NS


class PartlyDamagedError(FormatError):
    """Some nodes of a store's namespace table cannot be read; the index has what the others say.

    Args:
        broken: why each cannot be read; not empty.
    """

    def __init__(self, broken: list[DamagedNodeError]) -> None:
        first, *others = broken
        more = f"; and so {'is' if len(others) == 1 else 'are'} {counted(len(others), 'more part')}" if others else ""
        super().__init__(first.where, f"{first.what}{more}")
        self._keys = [range(error.node.key, error.node.end) for error in broken]

    def may_hide(self, name: bytes) -> bool:
        """True where a namespace of that name may be in what cannot be read."""
        return any(store.name_key(name) in keys for keys in self._keys)


class Fingerprint(NamedTuple):
    """What a container looks like from outside: numbers from ``stat``; times in nanoseconds, size in bytes."""

    device: int
    inode: int
    mtime: int
    ctime: int
    size: int


class Container(NamedTuple):
    """A container as the index knows it.

    Attributes:
        path: absolute.
        number: the container's number in the index, which is never used again.
        kind: `KIND_QCOW2`, `KIND_STORE` or `KIND_FAULTY`.
        condition: `SOUND`, `DAMAGED` or `HELD`.
        racy: whether it may have changed since and look the same.
        fingerprint: what it looked like when it was read.
        generation: for a store, that of its commit.
        commit_id: for a store, 16 bytes.
        uuid: of a store, or of an image's namespace; 16 bytes, zeros if there is none.
    """

    path: str
    number: int
    kind: int
    condition: int
    racy: bool
    fingerprint: Fingerprint
    generation: int = 0
    commit_id: bytes = bytes(16)
    uuid: bytes = bytes(16)


@dataclass(slots=True)
class Reading:
    """The result of reading a container: its condition, and what changes in the index.

    Attributes:
        container: as it is now.
        leaves: by key of each leaf that is new or changed, its area pointer, and its namespaces, with their bitmaps if
            those changed. An image has one leaf, with key 0.
        gone: keys of leaves that are no more.
        kept: keys of leaves that are as they were; any that are in none of the three are gone as well. None where all
            others are as they were.
        problem: what is wrong with the container.
        base: what was known when it was read.
    """

    container: Container
    leaves: dict[int, tuple[bytes, list[tuple[Member, Bitmaps | None]]]] = field(default_factory=dict)
    gone: Collection[int] = ()
    kept: Collection[int] | None = ()
    problem: Error | None = None
    base: Container | None = None


@dataclass(frozen=True, slots=True)
class KindReader:
    """How the index reads one kind of container.

    Attributes:
        number: of the kind, in the index.
        probe: whether an open file is of this kind.
        read: reads a container. Its arguments are: a function that returns the index's value of a key; the file; the
            container as far as it is known without reading; the container as the index knows it, or None; and whether
            to read an image even while a writer holds it. Returns None if nothing has changed.
    """

    number: int
    probe: Callable[[File], bool]
    read: Callable[[Get, File, Container, Container | None, bool], Reading | None]


def fingerprint(path: str) -> Fingerprint:
    """What the file at a path looks like from outside.

    Raises:
        StorageError: the file does not exist, or its status cannot be read.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise StorageError(path, error.strerror or str(error), error.errno) from error
    return Fingerprint(status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)


def is_unchanged(known: Container, now: Fingerprint) -> bool:
    """True if a container looks as it did when it was found sound, so that the index is right about it."""
    return known.condition == SOUND and not known.racy and known.fingerprint == now


def look(
    readers: Iterable[KindReader], get: Get, path: str, known: Container | None, force_share: bool
) -> Reading | None:
    """Reads a container, if it may have changed.

    Args:
        readers: one for each kind of container.
        get: returns the index's value of a key.
        path: of the container, absolute.
        known: the container as the index knows it, or None.
        force_share: reads an image even while a writer holds it.

    Returns:
        None if nothing has changed.

    Raises:
        StorageError: the file does not exist, or cannot be read.
    """
    now = fingerprint(path)
    if known and is_unchanged(known, now):
        return None
    # Before reading: what changes from here on looks different next time, or is racy.
    changed = max(now.mtime, now.ctime)
    racy = time.time_ns() - changed < (_RACY_NS if changed % _SECOND_NS else _RACY_SECONDS_NS)
    with open_file(path) as file:
        racy = racy or not file.growable  # a block device, of which `stat` does not tell when it was written to
        blank = Container(path, known.number if known else 0, KIND_FAULTY, DAMAGED, racy, now)
        for reader in readers:
            if reader.probe(file):
                return reader.read(get, file, blank._replace(kind=reader.number), known, force_share)
    return Reading(blank, problem=FormatError(path, "neither a qcow2 image nor a store"))


def read_store(
    opened: AbstractContextManager[Store], get: Get, blank: Container, known: Container | None
) -> Reading | None:
    """Reads a store for the index; see `KindReader`.

    Args:
        opened: opens the store for the time of the reading.
        get: returns the index's value of a key.
        blank: the container as far as it is known without reading.
        known: the container as the index knows it, or None.
    """
    try:
        with opened as target:
            return _read_store(get, target, blank, known)
    except (FormatError, UnsupportedError) as error:
        # A reading without leaves removes what the store said before.
        return Reading(blank._replace(condition=DAMAGED, racy=False), problem=error)


def _read_store(get: Get, target: Store, blank: Container, before: Container | None) -> Reading | None:
    if before is not None and before.kind == KIND_STORE:
        known = before
    else:  # what the index knows is not of a store
        known, get = blank, lambda key: None

    def look(snapshot: Snapshot) -> Reading | None:
        header = snapshot.header
        snapshot.read(header.table, "namespace table")  # first: a store without it is damaged, whatever is known
        container = blank._replace(
            condition=SOUND,
            generation=header.generation,
            commit_id=header.commit_id,
            uuid=header.uuid,
        )
        if known.condition == SOUND and known.commit_id == header.commit_id:
            return None if container == known else Reading(container, kept=None)
        table = snapshot.table()
        broken: list[DamagedNodeError] = []
        reading = Reading(container)
        changed, reading.gone, reading.kept = _changed(get, snapshot, table, known, broken)
        old: dict[bytes, Member] = {}
        for key in {*reading.gone, *(leaf.key for leaf in changed)}:
            old.update((member.name, member) for _, member in parse_members(get(members_key(known.number, key)))[1])
        for leaf in changed:
            try:
                members = [_member(snapshot, record, old) for record in table.records(leaf)]
            except DamagedNodeError as error:
                # The others are none the worse. What was known of this one goes: nothing holds it any more.
                broken.append(error)
                reading.gone = {*reading.gone, leaf.key}
                continue
            reading.leaves[leaf.key] = AREA.pack(*leaf.area), members
        if broken:
            reading.container = container._replace(condition=DAMAGED)
            reading.problem = PartlyDamagedError(broken)
        return reading

    return target.read(look)


def _changed(
    get: Get, snapshot: Snapshot, table: NamespaceTable, known: Container, broken: list[DamagedNodeError]
) -> tuple[list[Node], set[int], set[int] | None]:
    """The leaves that may have changed since the index read the store, and `Reading.gone` and `Reading.kept`.

    They are few if that was one commit ago. ``broken`` takes in which nodes cannot be read.
    """
    if known.condition == SOUND:
        with contextlib.suppress(FormatError, UnsupportedError):
            older = snapshot.older()
            if older and older.header.commit_id == known.commit_id and older.header.uuid == known.uuid:
                found: list[DamagedNodeError] = []
                changed, others = table.unlike(older.table(), found.append)
                broken += found
                return changed, {leaf.key for leaf in others} - {leaf.key for leaf in changed}, None
    leaves, _ = table.unlike(None, broken.append)
    kept = {leaf.key for leaf in leaves if _pointer(get, known, leaf.key) == AREA.pack(*leaf.area)}
    return [leaf for leaf in leaves if leaf.key not in kept], set(), kept


def _pointer(get: Get, known: Container, key: int) -> bytes:
    return parse_members(get(members_key(known.number, key)))[0]


def _member(snapshot: Snapshot, record: store.Record, old: dict[bytes, Member]) -> tuple[Member, Bitmaps | None]:
    """A namespace of a store, and its bitmaps if its directory has changed, else None."""
    area = (record.directory.offset, record.directory.length, record.directory.checksum)
    mark = image_mark(record.identity.place)
    member = Member(record.name, record.kind, record.uuid, record.root_uuid, record.size, record.path, area, mark)
    before = old.get(record.name)
    if before and (before.directory, before.uuid) == (member.directory, member.uuid):
        return member, None
    if record.kind == store.KIND_PLACE:
        return member, []  # the image itself says which bitmaps it has, even while they are checked out
    try:
        entries = read_entries(snapshot, record)
    except (FormatError, UnsupportedError):
        # Damage to one namespace does not affect the others. `check` reports what is wrong with this one.
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

    try:
        member, bitmaps = read_session(file, look, force_share=force_share, locking=_AT_ONCE, closing=True)
        # If a writer holds the image, the next caller without force_share must be told: the reading counts as racy.
        held = force_share and locks.is_written_by_others(file)
    except LockedError as error:
        return Reading(blank._replace(condition=HELD), problem=error)
    except (FormatError, UnsupportedError) as error:
        return Reading(blank._replace(condition=DAMAGED), problem=error)
    found = blank._replace(condition=SOUND, uuid=member.uuid, racy=blank.racy or held)
    return Reading(found, {0: (NO_AREA, [(member, bitmaps)])})
