"""`Store`: a store file. Reading waits for nobody; one commit at a time changes it.

A commit writes in epochs. A sync ends each:

    0  areas, into clusters that neither header slot refers to, some of them while the change is still being planned;
       and header copies that differ from their twin after a crash or damage, which are made equal to it
    1  one copy of the other slot's header                                  <- the commit
    2  its second copy; and the second copy of the header before, which says from then on that another has followed

Source: SPEC.md, "Changing a store".
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from time import time_ns
from typing import Any, TypeVar

from dirtmap.engine.storefile import header as headers
from dirtmap.engine.storefile.header import Chosen, Header, Seen
from dirtmap.engine.storefile.place import is_elsewhere
from dirtmap.engine.storefile.session import require_known
from dirtmap.engine.storefile.table import Known, NamespaceTable
from dirtmap.engine.system import locks, order
from dirtmap.engine.system.file import File, open_file, remove_file, sync_folder
from dirtmap.engine.system.locks import USUAL, Locking
from dirtmap.engine.system.order import Rank
from dirtmap.fmt import store
from dirtmap.fmt.digest import crc32c
from dirtmap.fmt.directory import parse_table
from dirtmap.fmt.errors import FormatError, GoneError, LockedError, StorageError, UnsupportedError
from dirtmap.fmt.geometry import ceil_div
from dirtmap.fmt.parsers.store import LEAF
from dirtmap.fmt.store import Area, Record

T = TypeVar("T")
Write = tuple[int, bytes | memoryview]  # where, and what

FORMAT = "dirtmap"
_WRITER = 100  # offset of the byte that a writer locks exclusively; the next one to write locks the byte after it
_READERS = 102  # that of the byte that all have locked who read a state by and by
# A reader starts over if what it reads is overwritten meanwhile. So many attempts are needed only if commits never
# pause: each keeps what was read of a bitmap and has not changed.
_ATTEMPTS = 200
# What a change plans to write is in memory, up to so many bytes; those of a bitmap that was loaded are so anyway.
_MOST_PLANNED = 1 << 24
# A write has whole pages, or the kernel may have to read the rest of one from the disk first. Those that are not longer
# than this are joined where they lie side by side, which takes fewer calls.
_PAGE, _MOST_JOINED = 4096, 1 << 16


class Snapshot:
    """The state of a store as of one commit.

    Attributes:
        file: the store.
        chosen: which header counts, and why.
        header: the header that counts.
        doubted: a checksum was wrong: damage, or the commits since have written over what was read.
        watched: the namespaces of which something else was looked at, too, such as a tracker's live files, by name.
        kept: what an earlier attempt at the same answer has read and verified, for those who can use it.

    Args:
        nodes: of the namespace table, that were read last of the same store.
    """

    def __init__(
        self,
        file: File,
        chosen: Chosen,
        kept: dict[object, Any] | None = None,
        outdated: Callable[[Header], bool] = lambda header: False,
        nodes: Known | None = None,
    ) -> None:
        self._outdated, self._nodes = outdated, nodes
        self.file, self.chosen, self.header = file, chosen, chosen.header
        self.doubted = False
        self.watched: dict[bytes, Record] = {}
        self.kept: dict[object, Any] = {} if kept is None else kept
        self.size = file.size()
        self._claims: dict[bytes, int] = {}
        self._claimed = 0  # in all

    def unclaimed(self, owner: bytes) -> int:
        """How many clusters the bits of a bitmap can have, given those of all other bitmaps that were read.

        No cluster belongs to two bitmaps. So bits that have more are damaged, which bounds what a small store can have
        a reader do, whatever its header says.

        Args:
            owner: tells the bitmap from others; nothing where the others do not count: for who changes it, and may
                have read it under another name.
        """
        clusters = min(self.header.clusters, ceil_div(self.size, self.header.cluster_size))
        return max(clusters - self._claimed + self._claims.get(owner, 0), 0) if owner else clusters

    def claim(self, owner: bytes, clusters: int) -> None:
        """Notes how many clusters the bits of a bitmap have, as far as they were read."""
        known = self._claims.get(owner, 0)
        if owner and clusters > known:
            self._claims[owner] = clusters
            self._claimed += clusters - known

    def settle_claims(self) -> None:
        """Forgets which bitmaps have claimed clusters, so that it takes no memory: none of them is read again."""
        self._claims.clear()

    def require_untouched(self) -> None:
        """Called where a wrong checksum shall count as damage: it may come from commits that have written over it.

        Raises:
            FormatError: the store has moved on that far, so that the answer will be made again.
        """
        if self.doubted and self._outdated(self.header):
            raise FormatError(self.file.path, "was written over while it was read")

    def pinned(self) -> Snapshot:
        """The same state, for who reads it by and by: no commit writes over it as long as the result is there.

        It has the file open for itself, with a lock that says so: see SPEC.md, "Reading". On a file system without
        locks that writers see, a commit may write over it: what is read then is found to be wrong.

        Raises:
            FormatError: the store has moved on too far, or another file has taken its place: the answer is made again.
            StorageError: the store cannot be opened.
        """
        file, locked = open_file(self.file.path, abspath=self.file.abspath), False
        try:
            with contextlib.suppress(StorageError):
                locked = file.lock_beside(_READERS)
            if not os.path.samestat(file.status, self.file.status) or self._outdated(self.header):
                self.doubted = True
                raise FormatError(self.file.path, "was written over while it was read")
        except BaseException:
            file.close()
            raise

        def outdated(header: Header) -> bool:
            if locked:
                return False
            newest = headers.choose(file.path, file.read(0, store.RESERVED)).header
            return newest.generation > header.generation + 1

        found = Snapshot(file, self.chosen, outdated=outdated)
        weakref.finalize(found, file.close)
        return found

    def check_area(self, area: Area, what: str, most: int = store.MAX_METADATA_BYTES) -> None:
        """Refuses an area that cannot be read, or has more than ``most`` bytes.

        Raises:
            FormatError: the area breaks a rule of the format, or is too long; the error names it.
        """
        for name, fault in store.area_faults(area, self.header.cluster_size, self.size):
            raise FormatError(f"{self.file.path}: {what}.{name}", fault)
        if area.length > most:
            raise FormatError(f"{self.file.path}: {what}.length", f"{area.length} is above {most}")

    def read(self, area: Area, what: str, remedy: str = "'check -r all' mends the store") -> bytes:
        """The bytes of an area.

        Args:
            area: where they are.
            what: names the area in errors.
            remedy: what an error advises.

        Raises:
            FormatError: the area cannot be read, or its checksum is wrong; the error names it.
        """
        self.check_area(area, what)
        if not area.length:
            return b""
        data = self.file.read(area.offset, area.length)
        if len(data) < area.length or crc32c(data) != area.checksum:
            self.doubted = True
            raise FormatError(f"{self.file.path}: {what} at {area.offset:#x}", f"its checksum is wrong; {remedy}")
        return data

    def table(self) -> NamespaceTable:
        """The namespaces of the store."""
        header = self.header
        return NamespaceTable(
            self.file.path,
            header.table,
            header.depth,
            header.namespaces,
            header.sessions,
            self.read,
            node_bytes=store.NODE_BYTES,
            known=self._nodes,
        )

    def record(self, name: bytes) -> Record | None:
        """The namespace of that name, or None.

        Raises:
            UnsupportedError: it has what only newer software knows.
            As `read`.
        """
        record = self.table().get(name)
        if record is not None:
            require_known(self.file.path, record)
        return record

    def older(self) -> Snapshot | None:
        """The store as the other header slot has it, all of it in doubt; None if neither copy of that slot is whole."""
        older = self.chosen.older
        return None if older is None else Snapshot(self.file, Chosen(older, 1 - self.chosen.slot, True))

    def released(self) -> list[tuple[int, int]]:
        """The runs of clusters that the commit released, (first, count), ascending.

        Raises:
            FormatError: the list is damaged, or runs overlap or leave the file.
        """
        values = parse_table(self.read(self.header.released, "released clusters"))
        runs = list(zip(values[::2], values[1::2], strict=True))
        end = ceil_div(store.RESERVED, self.header.cluster_size)
        for first, count in runs:
            if first < end or count == 0 or first + count > self.header.clusters:
                raise FormatError(f"{self.file.path}: released clusters", f"run of {count} at {first} is out of range")
            end = first + count
        return runs


class Store:
    """A store file. Reading waits for nobody; `change` is the only way to write.

    A store is rolled back if it lacks a commit that was seen before, say because an older copy was put back. From then
    on all bitmaps in it count as dirty all over, and the next change records that on disk.

    Args:
        path: of the store.
        abspath: its absolute path, if the process may have changed its working folder since.
        after_commit: called with this store after each commit that this object has made, once this thread holds no
            store's lock.
        locking: how to take the lock for a change.

    Attributes:
        path: as it was opened, for messages.
        abspath: the absolute path.
        uuid: of the store, 16 bytes.

    Raises:
        FormatError: the file is not a store, or no header is whole.
        StorageError: the file cannot be opened or read.
    """

    def __init__(
        self,
        path: str,
        abspath: str | None = None,
        *,
        after_commit: Callable[[Store], object] | None = None,
        locking: Locking = USUAL,
    ) -> None:
        self.path, self._locking = path, locking
        self._after_commit = after_commit
        self._file = self._opened(path, abspath)
        self._outdated: list[File] = []  # another thread may still read one
        self.abspath = self._file.abspath
        try:
            data = self._file.read(0, store.RESERVED)
            chosen = headers.choose(path, data)
        except BaseException:
            self._file.close()
            raise
        self.uuid, self._seen, self._copies = chosen.header.uuid, chosen.header.commit, chosen.copies
        self._judged = data, chosen  # a read and a change judge the headers several times, mostly the same ones
        self._nodes: Known = {}

    def close(self) -> None:
        """Closes the file."""
        for file in (*self._outdated, self._file):
            file.close()
        self._outdated.clear()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def headers(self) -> bytes | None:
        """The bytes of the header copies. As long as they are the same, so is all that they lead to.

        Returns:
            None if the path leads to another file now.
        """
        return self._file.read(0, store.RESERVED) if self._file.is_current() else None

    def expect(self, seen: Seen) -> None:
        """Records a commit that was seen elsewhere. If the store lacks it, the store is rolled back."""
        if seen.generation >= self._seen.generation:
            self._seen = seen

    def suspect(self) -> None:
        """Counts the store as rolled back, although nobody knows of a commit that it lacks. Errors as `read`."""
        if not self.is_rolled_back():
            self._seen = Seen(self._seen.generation, bytes(len(self._seen.commit_id)))

    def is_rolled_back(self) -> bool:
        """True if the store lacks a commit that was seen before. Errors as `read`."""
        return self.read(lambda snapshot: bool(snapshot.chosen.lost))

    def is_elsewhere(self) -> bool | None:
        """True if the file is a copy of the one that its last commit was written to; None if nobody can tell.

        Errors as `read`.
        """
        return self.read(lambda snapshot: is_elsewhere(snapshot.header.place, snapshot.file))

    def choose(self, file: File) -> Chosen:
        """The header that counts, given the commits that this object has seen.

        Raises:
            GoneError: the file is another store now.
            As `headers.choose`.
        """
        seen = self._seen  # first: another thread may see a later commit than we are about to read
        known, chosen = self._judged
        if (data := file.read(0, store.RESERVED)) != known:
            chosen = headers.choose(file.path, data, self._copies)
            self._judged, self._copies = (data, chosen), chosen.copies
        if chosen.header.uuid != self.uuid:
            raise GoneError(file.path, "was replaced since it was opened")
        if seen.is_missing_at(chosen.header.commit):
            return chosen.without(seen)
        self.expect(chosen.header.commit)
        return chosen

    def choose_to_write(self, file: File) -> Chosen:
        """As `choose`, for who writes.

        Raises:
            UnsupportedError: the store has what only newer software keeps right.
        """
        chosen = self.choose(file)
        if unknown := chosen.header.read_only_compatible:
            what = f"{unknown:#x} is unknown: the store can be read, and writing it needs newer software"
            raise UnsupportedError(f"{file.path}: header.read_only_compatible_features", what)
        return chosen

    def record(self, name: bytes) -> Record | None:
        """The namespace of that name as of the newest commit, or None. Errors as `read`."""
        return self.read(lambda snapshot: snapshot.record(name))

    def read(self, read: Callable[[Snapshot], T]) -> T:
        """Runs ``read`` on the state of one commit, or again on a later one if the store changed too much meanwhile.

        An answer counts, as that of its commit, if all that it was made from was verified. If a checksum was wrong, it
        is damage only if the newest header is still at most one generation on: what a commit refers to stays untouched
        until the commit after the next has switched the header, because areas are taken from clusters that neither slot
        refers to. Otherwise the answer is made again. What was looked at beside the store, such as live files, goes
        with its record: that must be the same, or the header at most one generation on.

        Raises:
            FormatError: a checksum is wrong, and the store did not change.
            GoneError: the file is another store now.
            LockedError: the store changes faster than it can be read.
        """
        kept: dict[object, Any] = {}
        for _ in range(_ATTEMPTS):
            if not self._file.is_current():
                self._reopen()
            snapshot = Snapshot(self._file, self._stable_header(), kept, self._has_moved_on, self._nodes)
            if snapshot.chosen.lost and not self._file.is_current():
                continue  # a compaction has just put another file in its place
            try:
                answer = read(snapshot)
                failure = None
            except FormatError as error:
                failure = error
            if failure is None and not snapshot.doubted and not snapshot.watched:
                return answer
            chosen = self._stable_header()
            now = chosen.header
            if failure is None and now.generation <= snapshot.header.generation + 1:
                return answer
            if failure is None and not snapshot.doubted and _is_as_watched(snapshot, Snapshot(self._file, chosen)):
                return answer
            if failure is not None and now.commit_id == snapshot.header.commit_id and self._file.is_current():
                try:
                    raise failure
                finally:
                    failure = None  # its traceback refers to this frame, and keeps the data in memory
        raise LockedError(self.path, "changes faster than it can be read")

    def _has_moved_on(self, header: Header) -> bool:
        """True if commits since may have written over what that header leads to."""
        return self._stable_header().header.generation > header.generation + 1

    def _stable_header(self) -> Chosen:
        """The header that counts. If it looks damaged, looks again, to tell a torn read from damage."""
        for _ in range(20):
            try:
                chosen = self.choose(self._file)
            except FormatError:
                chosen = None
            if chosen is not None and not chosen.in_doubt:
                return chosen
            time.sleep(0.001)
        return self.choose(self._file)

    def _opened(self, path: str, abspath: str | None, *, writable: bool = False) -> File:
        file = open_file(path, writable=writable, abspath=abspath)
        file.unshared = not self._locking.lock
        return file

    def _reopen(self) -> None:
        fresh = self._opened(self.path, self.abspath)
        self._outdated.append(self._file)
        self._file = fresh

    @contextlib.contextmanager
    def change(self) -> Iterator[Change]:
        """Changes the store. At the end of the block all changes are durable; after an exception none is made.

        Raises:
            LockedError: another process or thread is writing, and does not end.
            UnsupportedError: as `choose_to_write`.
            FormatError: what would have to be changed is damaged.
            StorageError: the operating system failed. Either the old state stands, or the new one.
        """
        with self._locked() as file:
            file.take_place_of(self._file)
            change = Change(file, self.choose_to_write(file), self._nodes)
            yield change
            commit = change.committed = change.commit()
            self.expect(commit)
            self._copies = change.copies
            for act in change.afterwards:
                act()
            if self._after_commit and commit != change.header.commit:
                order.after_stores(partial(self._after_commit, self))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[File]:
        def refusal() -> LockedError:
            return LockedError(self.path, f"being written by {locks.holders(self._file)}")

        with locks.turn(Rank.STORE, self.abspath, self._locking, refusal) as deadline:
            while True:
                with self._opened(self.path, self.abspath, writable=True) as file:
                    locked = locks.has_locks(file, self._locking)
                    while locked and not locks.try_alone(file, _WRITER):
                        if time.monotonic() > deadline:
                            raise refusal()
                        locks.pause()
                    # A compaction may have replaced the file while this thread waited.
                    if file.is_current():
                        yield file
                        return


def _in_pages(writes: list[Write]) -> Iterator[Write]:
    """The same writes, of whole pages; short ones that lie side by side are one."""
    together: list[bytes | memoryview] = []
    first = end = 0
    for offset, data in sorted(writes, key=itemgetter(0)):
        pad = -len(data) % _PAGE
        if together and (offset != end or len(data) > _MOST_JOINED):
            yield first, b"".join(together)
            together = []
        if len(data) > _MOST_JOINED and not pad:
            yield offset, data
            continue
        if not together:
            first = offset
        together += data, bytes(pad)
        end = offset + len(data) + pad
    if together:
        yield first, b"".join(together)


def _is_as_watched(then: Snapshot, now: Snapshot) -> bool:
    """True if no commit since has changed a namespace of which something else was looked at, too."""
    try:
        table = now.table()
        return all(table.get(name) == record for name, record in then.watched.items())
    except FormatError:
        return False


@dataclass(slots=True)
class Plan:
    """What a part of a change has planned, so that it can be withdrawn.

    Attributes:
        writes: what it writes, each with its offset in bytes.
        released: the runs of clusters that it gives up, (first, count).
        superseded: what it has added to `Change.superseded`.
    """

    writes: list[Write] = field(default_factory=list)
    released: list[tuple[int, int]] = field(default_factory=list)
    superseded: set[int] = field(default_factory=set)


class Change:
    """A store during a change. Areas are planned; then `commit` writes them and switches the header.

    Attributes:
        snapshot: the state that the change starts from.
        table: the namespaces, to be changed.
        generation: the number that the commit will have.
        afterwards: callbacks for when the commit is durable.
        committed: the newest commit, at the end: that of the change, or the one before if nothing was changed.
        copies: the header copies known so far, and what they say.
        superseded: the roots of those bits of the old state that new ones take over from: see `chunks.write`.
    """

    def __init__(self, file: File, chosen: Chosen, nodes: Known | None = None) -> None:
        from dirtmap.engine.storefile.space import SpaceMap

        self._file, self._chosen, self.copies = file, chosen, chosen.copies
        self.snapshot = Snapshot(file, chosen, nodes=nodes)
        header = self.header = chosen.header
        self.committed = header.commit
        self.table = self.snapshot.table()
        root = self.snapshot.read(header.space, "space map")
        self.space = SpaceMap(
            file.path, header.cluster_size, header.clusters, root, self.snapshot.released(), self.snapshot.read
        )
        with contextlib.suppress(StorageError):  # a file system without locks
            self.space.reuses = not file.locked_by_other(_READERS)
        # Also past a lost newest header, which had the next number.
        self.generation = max(header.generation + (2 if chosen.in_doubt else 1), chosen.lost + 1)
        self._writes: list[Write] = []
        self._planned, self._written = 0, False  # bytes; some of what was planned
        self.afterwards: list[Callable[[], None]] = []
        self.superseded: set[int] = set()

    def place(self, data: bytes) -> Area:
        """Finds room for bytes, and plans their writing by the commit. Errors as `SpaceMap.take`."""
        length = len(data)
        if not length:
            return Area()
        cluster = self.space.take(ceil_div(length, self.header.cluster_size))
        offset = cluster * self.header.cluster_size
        self.plan(offset, data)
        return Area(offset, length, crc32c(data))

    def take(self, count: int) -> list[tuple[int, int]]:
        """Finds so many clusters, for `plan`: runs, (first, count). Errors as `SpaceMap.take_runs`."""
        return self.space.take_runs(count)

    def untake(self, first: int, count: int) -> None:
        """Gives back clusters that `take` has found, and for which nothing is planned."""
        self.space.untake(first, count)

    def plan(self, offset: int, data: bytes | memoryview) -> None:
        """Plans the writing of bytes by the commit, into clusters that `take` has found.

        Where there are many, they are written at once, to save memory: before the commit nothing leads there.
        """
        self._writes.append((offset, data))
        self._planned += len(data)
        if self._planned > _MOST_PLANNED:
            self._write_planned()

    def _write_planned(self) -> None:
        for offset, data in _in_pages(self._writes):
            self._file.write(offset, data)
        self._written |= bool(self._writes)
        self._writes, self._planned = [], 0

    def release(self, area: Area) -> None:
        """Gives up an area. It is reused once neither header slot refers to it."""
        self.space.release(area)

    @contextlib.contextmanager
    def planning(self) -> Iterator[Plan]:
        """Yields what the block plans, as soon as it has ended."""
        plan, superseded = Plan(), set(self.superseded)
        writes, released = len(self._writes), len(self.space.newly_released)
        yield plan
        plan.writes, plan.released = self._writes[writes:], self.space.newly_released[released:]
        plan.superseded = self.superseded - superseded

    def withdraw(self, plan: Plan) -> None:
        """Undoes what was planned, and what nothing planned since relies on."""
        gone = set(map(id, plan.writes))
        self._writes = [write for write in self._writes if id(write) not in gone]
        for offset, data in plan.writes:
            cluster = self.header.cluster_size
            self.untake(offset // cluster, ceil_div(len(data), cluster))
        self.space.keep(plan.released)
        self.superseded -= plan.superseded

    def commit(self) -> Seen:
        """Makes the change durable. Writes nothing if nothing has changed and no commit is missing.

        Returns:
            The new commit, or the old one if nothing was written.

        Raises:
            FormatError: the generation is so high that no commit can follow.
            StorageError: the operating system failed, or the store would become too large.
        """
        old = self.header
        self.table.seal(self.place, self.release)
        table = self.table.root
        if table.area == old.table and not self._chosen.lost and not self._writes and not self._written:
            return old.commit
        if self.generation > store.MAX_GENERATION:
            what = f"{old.generation} is so high that no commit can follow; copy its bitmaps into another store"
            raise FormatError(f"{self._file.path}: header.generation", what)
        space, released, writes = self.space.seal(old.space, old.released)
        new = replace(
            old,
            generation=self.generation,
            commit_id=uuid.uuid4().bytes,
            clusters=self.space.clusters,
            table=table.area,
            depth=table.level,
            namespaces=table.records,
            sessions=self.table.sessions,
            space=space,
            released=released,
            commit_time=time_ns(),
            place=self._file.place(),
            writer=store.WRITER,
            autoclear=0,
        )
        for number, data in self._chosen.repairs:
            self._file.write(number * store.BLOCK, data)
        self._writes += writes
        self._write_planned()
        self._file.sync()
        before, copies = self._chosen, dict(self._chosen.copies)
        for epoch in headers.switch(new, before):
            for number, block in epoch:
                self._file.write(number * store.BLOCK, block)
                copies[block] = copies[before.block] if number % 2 == before.slot else new
            self._file.sync()
        self.copies = copies
        return new.commit


def create(
    path: str,
    *,
    cluster_bits: int = store.DEFAULT_CLUSTER_BITS,
    store_uuid: bytes | None = None,
    generation: int = 1,
    doubt_generation: int = 0,
) -> None:
    """Makes an empty store.

    Args:
        path: must not exist.
        cluster_bits: log2 of the cluster size in bytes, 12 to 21.
        store_uuid: 16 bytes; None for a new one. Given if this store is to replace another.
        generation: of its first commit.
        doubt_generation: see `Header`.

    Raises:
        StorageError: the file exists, or cannot be made.
    """
    if not store.MIN_CLUSTER_BITS <= cluster_bits <= store.MAX_CLUSTER_BITS:
        raise StorageError(path, f"a cluster of 2**{cluster_bits} bytes is outside 4 KiB to 2 MiB")
    cluster = 1 << cluster_bits
    first = ceil_div(store.RESERVED, cluster)
    used = first + 2  # a leaf, the space map's root
    leaf = ((1 << used) - 1).to_bytes(cluster, "little")
    leaf_offset = first * cluster
    root = LEAF.build(offset=leaf_offset, free=store.leaf_clusters(cluster) - used, checksum=crc32c(leaf))
    header = Header(
        uuid=store_uuid or uuid.uuid4().bytes,
        generation=generation,
        commit_id=uuid.uuid4().bytes,
        doubt_generation=doubt_generation,
        cluster_bits=cluster_bits,
        clusters=used,
        table=Area(),
        depth=0,
        namespaces=0,
        space=Area((first + 1) * cluster, len(root), crc32c(root)),
        released=Area(),
        commit_time=time_ns(),
    )
    with open_file(path, writable=True, create=True) as file:
        try:
            file.write(leaf_offset, leaf)
            file.write((first + 1) * cluster, root.ljust(cluster, b"\0"))
            file.sync()
            header = replace(header, place=file.place())
            later = replace(header, generation=generation + 1)
            for number, block in (*headers.pair(header, 0, followed=True), *headers.pair(later, 1, followed=False)):
                file.write(number * store.BLOCK, block)
            file.sync()
        except BaseException:
            remove_file(path)  # an incomplete store would be in the way of the next attempt
            raise
    sync_folder(os.path.abspath(path))
