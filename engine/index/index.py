"""`Index`: what each container said when it was last read, and the names, UUIDs and bitmaps that follow from it.

    refresh(path)   the container ---reads what has changed---> the index says what it says now

An image is read again when it looks different from outside (device, inode, size, mtime, ctime), a store when its commit
is another one; and of a store only the buckets, and the directories, whose place has changed. There is no other way
into the index, so it does not matter who changed a container, or when.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

from dirtmap.engine import locks
from dirtmap.engine.fileio import File, open_file
from dirtmap.engine.index.database import Database, Reader, Writer, connect
from dirtmap.engine.qcow2.image import read_session
from dirtmap.engine.qcow2.layout import Layout
from dirtmap.engine.store.bitmaps import read_entries
from dirtmap.engine.store.store import Snapshot, Store
from dirtmap.fmt import index as layout_of
from dirtmap.fmt import qcow2, store
from dirtmap.fmt.errors import Error, FormatError, LockedError, StorageError, UnsupportedError
from dirtmap.fmt.index import (
    BITMAP,
    CONTAINER,
    CONTAINER_VALUE,
    DAMAGED,
    FAULTY,
    FOUND,
    HELD,
    MEMBERS,
    NAME,
    OTHERS,
    PATH,
    QCOW2,
    ROOT,
    SEEN,
    SEEN_VALUE,
    SOUND,
    STATE,
    STATE_VALUE,
    STORE,
    UUID,
    Claim,
    Member,
    number,
    part,
)
from dirtmap.fmt.store import MAGIC as STORE_MAGIC

T = TypeVar("T")

# A file's time may step as seldom as every 10 ms: what was changed so shortly before it was read may change again
# without looking different.
_RACY_NS = 50_000_000
_TOGETHER = 512  # images that one commit of the index takes in
# Bound for the one look-up that has to be fast.
_address_key, _unpack_bitmap, _new_claim = layout_of.address_key, layout_of.BITMAP_VALUE.unpack, tuple.__new__
_SOLE = layout_of.BITMAP_VALUE.size + 2  # and the name: bytes of a value with one claim
_NO_AREA = bytes(store.AREA.size)


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
        kind: `QCOW2`, `STORE` or `FAULTY`.
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


Bitmaps = list[tuple[bytes, int, int]]  # name, flags, log2 of the granularity


@dataclass(slots=True)
class _Reading:
    """What a container says: its condition, and what has to be changed in the index, bucket by bucket."""

    container: Container
    # Of each bucket that changed: its area pointer, and its namespaces, with their bitmaps where those changed.
    buckets: dict[int, tuple[bytes, list[tuple[Member, Bitmaps | None]]]] = field(default_factory=dict)
    problem: Error | None = None
    base: Container | None = None  # what was known when it was read


class Index:
    """The index at a path; see the module.

    Attributes:
        path: of the LMDB database, a directory.
    """

    def __init__(self, path: str, database: Database | None = None) -> None:
        self.path = path
        self._given = self._known = database

    @property
    def database(self) -> Database:
        """The database, opened on first use, and anew in the child of a fork."""
        known = self._known
        if known is None or not known.usable:
            known = self.open()
        return known

    def open(self) -> Database:
        """Opens the database that the path leads to now; makes it, where there is none that can be used."""
        self._known = self._given or connect(self.path)
        return self._known

    # What it says.

    def container(self, path: str) -> Container | None:
        """What is known of the container at a path."""
        return _container(self.database.get, path)

    def path_of(self, container: int) -> str | None:
        """The path of a container."""
        raw = self.database.get(PATH + number(container))
        return None if raw is None else os.fsdecode(raw)

    def namespaces(self, name: bytes) -> list[tuple[int, Member]]:
        """All namespaces of a name, each with the number of its container."""
        return _namespaces(self.database.get(NAME + part(name)))

    def carriers(self, uuid: bytes) -> list[tuple[int, Member]]:
        """All namespaces of a UUID, each with the number of its container."""
        return _namespaces(self.database.get(UUID + uuid))

    def members(self, container: int) -> list[Member]:
        """All namespaces of a container."""
        rows = self.database.read(lambda reader: list(reader.scan(MEMBERS + number(container))))
        return [member for _, value in rows for _, member in _namespaces(value[store.AREA.size :])]

    def devices(self, root: bytes) -> list[tuple[int, Member]]:
        """All devices with that root node, each with the number of its container."""
        return self._scan(ROOT + root)

    def stores(self, container: int) -> list[str]:
        """The paths of the stores that a store remembers."""
        return [os.fsdecode(member.path) for _, member in self._scan(OTHERS + number(container))]

    def _scan(self, prefix: bytes) -> list[tuple[int, Member]]:
        rows = self.database.read(lambda reader: list(reader.scan(prefix)))
        return [found for _, value in rows for found in _namespaces(value)]

    def bitmap(self, node: str, name: str) -> list[Claim]:
        """Who has a bitmap of that address: more than one only where a name is not unique.

        One look-up, with its checksum, and made to be fast.
        """
        contents = self.database.get(_address_key(node, name))
        if contents is None:
            return []
        if len(contents) == _SOLE + len(name) and name.isascii():  # else its length in bytes would have to be known
            return [_new_claim(Claim, _unpack_bitmap(contents))]
        found, claims = layout_of.parse_bitmap(contents)
        return claims if found == name.encode("utf-8", "surrogateescape") else []

    def bitmaps(self, holder: bytes) -> list[tuple[bytes, list[Claim]]]:
        """All bitmaps of a holder, with who has them."""
        rows = self.database.read(lambda reader: list(reader.scan(BITMAP + part(holder))))
        return [layout_of.parse_bitmap(value) for _, value in rows]

    def find(self, bitmap: bytes) -> list[tuple[bytes, list[Claim]]]:
        """All holders of a bitmap of that name, with who has it there."""

        def search(reader: Reader) -> list[tuple[bytes, list[Claim]]]:
            found = []
            for _, holder in reader.scan(FOUND + part(bitmap)):
                contents = reader.get(layout_of.bitmap_key(holder, bitmap))
                name, claims = layout_of.parse_bitmap(contents) if contents else (b"", [])
                if name == bitmap:
                    found.append((holder, claims))
            return found

        return self.database.read(search)

    def seen(self, store_uuid: bytes) -> tuple[int, bytes, str | None] | None:
        """The last commit seen of a store: its generation, its id, and where the store was."""
        contents = self.database.get(SEEN + store_uuid)
        if contents is None:
            return None
        raw = SEEN_VALUE.parse(contents)
        return raw.generation, raw.commit_id, self.path_of(raw.container)

    def all_seen(self) -> list[tuple[bytes, int, bytes, str | None]]:
        """The last commits seen of all stores: UUID, generation, commit id, and where the store was."""
        rows = self.database.read(lambda reader: list(reader.scan(SEEN)))
        parsed = [(key[1:], SEEN_VALUE.parse(value)) for key, value in rows]
        return [(uuid, raw.generation, raw.commit_id, self.path_of(raw.container)) for uuid, raw in parsed]

    def paths(self) -> set[str]:
        """The paths of all containers that it knows or has known."""
        return {os.fsdecode(path) for path in self.database.read(lambda reader: [p for _, p in reader.scan(PATH)])}

    def claims(self) -> Iterator[Claim]:
        """Every bitmap, by who has it."""
        rows = self.database.read(lambda reader: list(reader.scan(BITMAP)))
        for _, contents in rows:
            yield from layout_of.parse_bitmap(contents)[1]

    def all_bitmaps(self) -> Iterator[tuple[bytes, bytes, Claim]]:
        """Every bitmap: its holder, its name, and who has it."""

        def search(reader: Reader) -> list[tuple[bytes, bytes, Claim]]:
            found = []
            for holder in dict.fromkeys(holder for _, holder in reader.scan(FOUND)):
                for _, value in reader.scan(BITMAP + part(holder)):
                    name, claims = layout_of.parse_bitmap(value)
                    found += [(holder, name, claim) for claim in claims]
            return found

        yield from self.database.read(search)

    # How it learns.

    def remember_seen(self, store_uuid: bytes, generation: int, commit_id: bytes, path: str) -> None:
        """Takes over a commit that another index has seen."""

        def work(writer: Writer) -> None:
            container = _container(writer.get, path)
            taken = container.number if container else _new_number(writer, path)
            contents = writer.get(SEEN + store_uuid)
            before = SEEN_VALUE.parse(contents) if contents else None
            if before and before.container == taken and before.generation > generation:
                return  # another process has seen a later one meanwhile
            value = SEEN_VALUE.build(generation=generation, commit_id=commit_id, container=taken)
            writer.put(SEEN + store_uuid, value)

        self.database.change(work)

    def refresh(self, paths: Iterable[str], *, force_share: bool = False) -> Iterator[tuple[Container, Error | None]]:
        """Makes the index say what containers say now, reading what has changed.

        Args:
            paths: absolute; what is not there (any more) is forgotten, and nothing is yielded for it.
            force_share: read images although they are held by a writer.

        Yields:
            Each container as it is known now, with what is wrong with it where it was read just now.
        """
        waiting: list[_Reading | str] = []
        self.open()
        for path in paths:
            known = self.container(path)
            try:
                reading = self._look(path, known, force_share)
            except StorageError:
                if known:
                    waiting.append(path)
                continue
            if reading is None:
                assert known is not None
                yield known, None
                continue
            reading.base = known
            waiting.append(reading)
            if len(waiting) >= _TOGETHER:
                yield from self._take_in(waiting, force_share)
                waiting = []
        yield from self._take_in(waiting, force_share)

    def _take_in(self, waiting: list[_Reading | str], force_share: bool) -> Iterator[tuple[Container, Error | None]]:
        if not waiting:
            return

        def work(writer: Writer) -> list[tuple[Container | None, str, Error | None]]:
            taken = []
            for item in waiting:
                if isinstance(item, str):
                    _forget(writer, item)
                else:
                    taken.append((_apply(writer, item), item.container.path, item.problem))
            return taken

        late = []
        for container, path, problem in self.database.change(work):
            if container is None:
                late.append(path)
            else:
                yield container, problem
        if late:
            yield from self.refresh(late, force_share=force_share)

    def saw(self, target: Store) -> None:
        """Remembers a store's newest commit."""
        path = os.path.abspath(target.path)
        header = target.read(lambda snapshot: snapshot.header)
        if self.seen(header.uuid) == (header.generation, header.commit_id, path):
            return

        self.remember_seen(header.uuid, header.generation, header.commit_id, path)

    def _look(self, path: str, known: Container | None, force_share: bool) -> _Reading | None:
        """What a container says; None where it says what is known already."""
        try:
            status = os.stat(path)
        except OSError as error:
            raise StorageError(path, error.strerror or str(error)) from error
        now = Fingerprint(status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)
        if known and known.kind == STORE:
            return self._look_at_store(path, known, now)
        if known and known.condition != HELD and not known.racy and known.fingerprint == now:
            return None
        # Before reading: what changes from here on looks different next time, or is racy.
        racy = time.time_ns() - max(now.mtime, now.ctime) < _RACY_NS
        with open_file(path) as file:
            magic = file.read(0, 4)
        blank = Container(path, known.number if known else 0, FAULTY, DAMAGED, racy, now)
        if magic == qcow2.MAGIC:
            return _read_image(blank._replace(kind=QCOW2), force_share)
        if _is_store(path):
            return self._look_at_store(path, blank._replace(kind=STORE), now)
        return _Reading(blank, {0: (_NO_AREA, [])}, FormatError(path, "neither a qcow2 image nor a store"))

    def _look_at_store(self, path: str, known: Container, now: Fingerprint) -> _Reading | None:
        try:
            with Store(path) as target:
                return self._read_store(target, known, now)
        except FormatError as error:
            return _Reading(
                known._replace(kind=STORE, condition=DAMAGED, fingerprint=now, commit_id=bytes(16)), {}, error
            )

    def _read_store(self, target: Store, known: Container, now: Fingerprint) -> _Reading | None:
        def look(snapshot: Snapshot) -> _Reading | None:
            header = snapshot.header
            if known.condition == SOUND and known.commit_id == header.commit_id:
                return None
            table = snapshot.table()
            areas = table.areas()
            found = known._replace(
                condition=SOUND,
                racy=False,
                fingerprint=now,
                buckets=len(areas),
                generation=header.generation,
                commit_id=header.commit_id,
                uuid=header.uuid,
            )
            reading = _Reading(found)
            same = known.buckets == len(areas)
            for bucket, area in enumerate(areas):
                pointer = store.AREA.build(**area._asdict())
                before = self.database.get(_members_key(known.number, bucket)) if known.number else None
                if same and before is not None and before[: len(pointer)] == pointer:
                    continue
                # Where namespaces have moved between buckets, all are taken in anew.
                old = (
                    {member.name: member for _, member in _namespaces(before[len(pointer) :])}
                    if same and before
                    else {}
                )
                reading.buckets[bucket] = (
                    pointer,
                    [_member(snapshot, record, old) for record in table.bucket(bucket).values()],
                )
            return reading

        return target.read(look)


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


def _read_image(blank: Container, force_share: bool) -> _Reading:
    def look(layout: Layout) -> tuple[Member, Bitmaps]:
        bitmaps = [(slot.entry.name, slot.entry.flags, slot.entry.granularity_bits) for slot in layout.slots]
        uuid = layout.uuid or bytes(16)
        member = Member(
            layout.name or b"", store.KIND_PLACE, uuid, bytes(16), layout.header.size, os.fsencode(blank.path)
        )
        return member, bitmaps

    nothing: dict[int, tuple[bytes, list[tuple[Member, Bitmaps | None]]]] = {0: (_NO_AREA, [])}
    try:
        with open_file(blank.path) as file:
            member, bitmaps = read_session(file, look, force_share=force_share)
            # Whoever does not force it is to be told, next time.
            held = force_share and locks.is_written(file)
    except LockedError as error:
        return _Reading(blank._replace(condition=HELD), nothing, error)
    except (FormatError, UnsupportedError) as error:
        return _Reading(blank._replace(condition=DAMAGED), nothing, error)
    found = blank._replace(condition=SOUND, uuid=member.uuid, racy=blank.racy or held)
    return _Reading(found, {0: (_NO_AREA, [(member, bitmaps)])})


def _is_store(path: str) -> bool:
    with open_file(path) as file:
        return any(_magic(file, at) == STORE_MAGIC for at in range(0, store.RESERVED, store.BLOCK))


def _magic(file: File, at: int) -> bytes:
    return file.read(at, len(STORE_MAGIC))


# How what a container says gets into the database.


def _container(get: Callable[[bytes], bytes | None], path: str) -> Container | None:
    contents = get(CONTAINER + part(os.fsencode(path)))
    if contents is None:
        return None
    raw = CONTAINER_VALUE.parse(contents)
    return Container(
        path=path,
        number=raw.number,
        kind=raw.kind,
        condition=raw.condition,
        racy=bool(raw.racy),
        fingerprint=Fingerprint(raw.device, raw.inode, raw.mtime, raw.ctime, raw.size),
        buckets=raw.buckets,
        generation=raw.generation,
        commit_id=raw.commit_id,
        uuid=raw.uuid,
    )


def _namespaces(contents: bytes | None) -> list[tuple[int, Member]]:
    return list(layout_of.parse_namespaces(contents)) if contents else []


def _members_key(container: int, bucket: int) -> bytes:
    return MEMBERS + number(container) + bucket.to_bytes(4, "big")


def _new_number(writer: Writer, path: str) -> int:
    state = STATE_VALUE.parse(writer.get(STATE) or bytes(STATE_VALUE.size))
    taken = int(state.containers) + 1
    writer.put(STATE, STATE_VALUE.build(version=layout_of.VERSION, reserved=0, containers=taken))
    writer.put(PATH + number(taken), os.fsencode(path))
    return taken


def _apply(writer: Writer, reading: _Reading) -> Container | None:
    """Puts a reading into the database; None where another process was faster, and it says nothing any more."""
    known = _container(writer.get, reading.container.path)
    if known != reading.base:
        return None
    taken = known.number if known else _new_number(writer, reading.container.path)
    container = reading.container._replace(number=taken)
    if known and known.buckets != container.buckets:
        # Namespaces have moved between buckets: the old ones go first.
        for key, value in list(writer.scan(MEMBERS + number(taken))):
            for _, member in _namespaces(value[len(_NO_AREA) :]):
                _drop(writer, container, member)
            writer.delete(key)
    for bucket, (pointer, found) in reading.buckets.items():
        key = _members_key(taken, bucket)
        before = writer.get(key)
        old = {member.name: member for _, member in _namespaces(before[len(pointer) :])} if before else {}
        new = {member.name for member, _ in found}
        for name, member in old.items():
            if name not in new:
                _drop(writer, container, member)
        for member, bitmaps in found:
            _set(writer, container, old.get(member.name), member, bitmaps)
        members = b"".join(layout_of.build_namespace(taken, member) for member, _ in found)
        writer.put(key, pointer + members)
    seen = container.fingerprint
    value = CONTAINER_VALUE.build(
        number=taken,
        kind=container.kind,
        condition=container.condition,
        racy=int(container.racy),
        reserved=0,
        buckets=container.buckets,
        device=seen.device,
        inode=seen.inode,
        mtime=seen.mtime % 2**64,
        ctime=seen.ctime % 2**64,
        size=seen.size,
        generation=container.generation,
        commit_id=container.commit_id,
        uuid=container.uuid,
    )
    writer.put(CONTAINER + part(os.fsencode(container.path)), value)
    return container


def _forget(writer: Writer, path: str) -> None:
    """Takes a container out of the index; the last commit seen of a store stays."""
    container = _container(writer.get, path)
    if container is None:
        return
    for key, value in list(writer.scan(MEMBERS + number(container.number))):
        for _, member in _namespaces(value[len(_NO_AREA) :]):
            _drop(writer, container, member)
        writer.delete(key)
    writer.delete(CONTAINER + part(os.fsencode(path)))


def holder_of(container: Container, member: Member) -> bytes:
    """Under what a namespace's bitmaps stand: its name, or its image's path."""
    return layout_of.named(member.name) if member.name else layout_of.unnamed(os.fsencode(container.path))


def _set(writer: Writer, container: Container, old: Member | None, new: Member, bitmaps: Bitmaps | None) -> None:
    if old != new:
        keys = list(keys_of(container.number, new))
        for key in keys_of(container.number, old) if old else ():
            if key not in keys:
                _claim(writer, key, container.number, replace(new, kind=0))
        for key in keys:
            _claim(writer, key, container.number, new)
    if bitmaps is not None:
        _set_bitmaps(writer, container, new, bitmaps)


def _drop(writer: Writer, container: Container, member: Member) -> None:
    _set_bitmaps(writer, container, member, [])
    for key in keys_of(container.number, member):
        _claim(writer, key, container.number, replace(member, kind=0))


def keys_of(container: int, member: Member) -> Iterator[bytes]:
    """Where a namespace can be found."""
    if member.name:
        yield NAME + part(member.name)
    if any(member.uuid):
        yield UUID + member.uuid
        if member.kind == store.KIND_CONTAINER:
            yield OTHERS + number(container) + part(member.name)
    if any(member.root_uuid):
        yield ROOT + member.root_uuid + part(member.name)


def _claim(writer: Writer, key: bytes, container: int, member: Member) -> None:
    """Sets what a container says of a namespace of that name; kind 0 takes it away."""
    claims = [claim for claim in _namespaces(writer.get(key)) if (claim[0], claim[1].name) != (container, member.name)]
    if member.kind:
        claims.append((container, member))
    if claims:
        writer.put(key, b"".join(layout_of.build_namespace(*claim) for claim in claims))
    else:
        writer.delete(key)


def _set_bitmaps(writer: Writer, container: Container, member: Member, bitmaps: Bitmaps) -> None:
    holder = holder_of(container, member)
    wanted = {name: Claim(container.number, flags, bits, 0, member.uuid) for name, flags, bits in bitmaps}
    for key, value in list(writer.scan(BITMAP + part(holder))):
        name, claims = layout_of.parse_bitmap(value)
        kept = [claim for claim in claims if claim.container != container.number]
        claim = wanted.pop(name, None)
        if claim is not None:
            kept.append(claim)
        if kept == claims:
            continue
        if kept:
            writer.put(key, layout_of.build_bitmap(name, kept))
        else:
            writer.delete(key)
            writer.delete(FOUND + part(name) + part(holder))
    for name, claim in wanted.items():
        writer.put(layout_of.bitmap_key(holder, name), layout_of.build_bitmap(name, [claim]))
        writer.put(FOUND + part(name) + part(holder), holder)
