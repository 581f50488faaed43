"""`Index`: what each container said when it was last read, and which names, UUIDs and bitmaps follow from that.

    refresh(path)   the container ---reads what has changed---> the index says what it says now

Nothing else writes these entries. So it does not matter which program changed a container, or when. If there can be no
database, one in memory stands in for it, which knows nothing at first: so nobody else needs a way without an index.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from dirtmap.engine.index.database import (
    DamagedError,
    Database,
    DatabaseError,
    ForbiddenError,
    MisplacedError,
    Reader,
    Writer,
    connect,
)
from dirtmap.engine.index.memory import Memory
from dirtmap.engine.index.reading import Container, KindReader, Reading, fingerprint, is_unchanged, look
from dirtmap.engine.index.writing import apply, container_at, forget, new_number
from dirtmap.engine.storefile.file import Store
from dirtmap.engine.storefile.header import Seen
from dirtmap.engine.system.log import logger
from dirtmap.fmt import index as layout
from dirtmap.fmt.errors import Error, StorageError
from dirtmap.fmt.identity import FilePlace
from dirtmap.fmt.index import (
    BITMAP,
    FOUND,
    KNOWN_STORE,
    MEMBERS,
    NAME,
    OTHERS,
    PATH,
    ROOT,
    SEEN,
    UUID,
    Claim,
    Member,
    number,
    parse_bitmap,
    parse_members,
    parse_namespaces,
    part,
)
from dirtmap.fmt.parsers.index import BITMAP_VALUE, SEEN_VALUE

_TOGETHER = 512  # readings per commit of the index
# Bound here for `Index.bitmap`, the one look-up that must be fast.
_address_key, _unpack_bitmap, _new_claim = layout.address_key, BITMAP_VALUE.unpack, tuple.__new__
_SOLE = BITMAP_VALUE.size + 2  # bytes of a value with one claim, without the name


_stand_ins: dict[str, Memory] = {}  # one for all hosts of this process
_guard = threading.Lock()


def _memory_of(path: str) -> tuple[Memory, bool]:
    """What stands in for the database at a path, and whether it does so from now on."""
    key = os.path.realpath(path)
    with _guard:
        is_first = key not in _stand_ins
        return _stand_ins.setdefault(key, Memory(path)), is_first


class SeenCommit(NamedTuple):
    """The last commit seen of a store: the store's UUID (16 bytes), the commit, and the store's path then or None."""

    store_uuid: bytes
    commit: Seen
    path: str | None


class _Question(threading.local):
    """What this thread is about to ask: how many questions deep, and whether the database has failed one of them."""

    depth = 0
    failed = False


class Index:
    """The index at a path; see the head of the module.

    Args:
        path: of the LMDB database, a directory.
        readers: one for each kind of container.
        database: the database at that path, if it is open already.

    Attributes:
        path: as given.
        problem: why the database could not be used, and memory stood in for it; None where that never was so.
        notice: the same as a user is to be told it, with what follows from it.

    Raises:
        StorageError: no file can have such a path.
    """

    def __init__(self, path: str, readers: Sequence[KindReader], database: Database | None = None) -> None:
        if "\0" in path:
            raise StorageError(path, "index: a path cannot hold a NUL")
        self.path, self.readers = path, readers
        self._given = self._known = database
        self._question = _Question()
        self.problem: DatabaseError | None = None
        self.notice: str | None = None

    @property
    def database(self) -> Database:
        """The database. It is opened on first use, and again in a forked child."""
        known = self._known
        if known is None or not known.usable:
            known = self.open()
        return known

    def open(self) -> Database:
        """Opens the database to which the path leads now; makes one if there is none that can be used.

        If it cannot be made or opened, or has failed this `question` already, the answer is one in memory.

        Raises:
            DamagedError: the content of the database is damaged.
            ForbiddenError: as `connect`.
            MisplacedError: what is at the path is not an index.
        """
        if self._question.failed and isinstance(self._known, Memory):
            return self._known
        try:
            self._known = self._given or connect(self.path)
        except (DamagedError, ForbiddenError, MisplacedError):
            raise
        except DatabaseError as error:
            self.do_without(error)
        return self._known or self.do_without(DatabaseError(self.path, "index: cannot be opened"))

    def do_without(self, error: DatabaseError) -> Database:
        """Has memory stand in for the database from here on, until it is opened anew.

        What the database has seen of stores is taken over, so far as it can still be read.
        """
        self._question.failed = self._question.depth > 0
        if isinstance(self._known, Memory):
            return self._known
        seen: list[SeenCommit] = []
        if self._known is not None and self._known.usable:
            with contextlib.suppress(Error, layout.BadValueError):
                seen = self.all_seen(sound_only=True)
        self._known, is_first = _memory_of(self.path)
        for commit in seen:
            self.remember_seen(commit)
        if self.problem is None:
            blind = "" if seen else ", and a store that was rolled back is not noticed"
            self.problem, self.notice = error, f"{error}; without it, containers are read anew{blind}"
        if is_first:
            logger(__name__).warning("%s", self.notice)
        return self._known

    @contextlib.contextmanager
    def question(self) -> Iterator[None]:
        """Keeps to memory until the end of the outermost such block, once the database has failed in it.

        A database that can be read and not written, as on a full file system, would be opened again and again else.
        """
        self._question.depth += 1
        try:
            yield
        finally:
            self._question.depth -= 1
            if not self._question.depth:
                self._question.failed = False

    @property
    def exists(self) -> bool:
        """True where there is one, usable or not, in its place or in memory."""
        return isinstance(self._known, Memory) or os.path.isdir(self.path)

    def require(self) -> None:
        """Refuses to go on without the database itself.

        Raises:
            StorageError: why it cannot be used.
        """
        if isinstance(self.open(), Memory):
            assert self.problem is not None
            raise self.problem

    # What it says.

    def container(self, path: str) -> Container | None:
        """The index's record of the container at a path, or None."""
        return container_at(self.database.get, path)

    def unchanged(self, path: str) -> Container | None:
        """The record of the container at a path, if that looks as it did when it was found sound; else None."""
        known = self.container(path) if self.exists else None
        try:
            return known if known is not None and is_unchanged(known, fingerprint(path)) else None
        except StorageError:
            return None

    def path_of(self, container: int) -> str | None:
        """The path of a container, or None."""
        raw = self.database.get(PATH + number(container))
        return None if raw is None else os.fsdecode(raw)

    def namespaces(self, name: bytes) -> list[tuple[int, Member]]:
        """All namespaces with a name, each with the number of its container."""
        return list(parse_namespaces(self.database.get(NAME + part(name))))

    def carriers(self, uuid: bytes) -> list[tuple[int, Member]]:
        """All namespaces with a UUID, each with the number of its container."""
        return list(parse_namespaces(self.database.get(UUID + uuid)))

    def members(self, container: int) -> list[Member]:
        """All namespaces of a container."""
        rows = self.database.read(lambda reader: list(reader.scan(MEMBERS + number(container))))
        return [member for _, value in rows for _, member in parse_members(value)[1]]

    def devices(self, root: bytes) -> list[tuple[int, Member]]:
        """All devices with that root node, each with the number of its container."""
        return self._scan(ROOT + root)

    def stores(self, container: int) -> list[str]:
        """The paths of the stores that a store remembers."""
        return [os.fsdecode(one.path) for _, one in self._scan(OTHERS + number(container) + KNOWN_STORE)]

    def others(self, container: int) -> list[Member]:
        """What a store remembers of other containers: stores, and images, with a name or without."""
        return [member for _, member in self._scan(OTHERS + number(container))]

    def on_image(self, container: int, paths: Iterable[bytes], place: FilePlace) -> list[bytes]:
        """The names of those nodes of a store that may be an image.

        Args:
            container: number of the store.
            paths: of the image, raw bytes.
            place: which file the image is.
        """
        keys = [layout.image_key(container, mark) for mark in (layout.image_mark(place), *map(layout.path_mark, paths))]
        rows = self.database.read(lambda reader: [row for key in keys for row in reader.scan(key)])
        return list(dict.fromkeys(name for _, name in rows))

    def _scan(self, prefix: bytes) -> list[tuple[int, Member]]:
        rows = self.database.read(lambda reader: list(reader.scan(prefix)))
        return [found for _, value in rows for found in parse_namespaces(value)]

    def bitmap(self, node: str, name: str) -> list[Claim]:
        """The claims to a bitmap of that address. There is more than one only if a name is not unique.

        It is one look-up, with its checksum, and made to be fast.
        """
        contents = self.database.get(_address_key(node, name))
        if contents is None:
            return []
        if len(contents) == _SOLE + len(name) and name.isascii():  # else its length in bytes would have to be known
            return [_new_claim(Claim, _unpack_bitmap(contents))]
        found, claims = parse_bitmap(contents)
        return claims if found == name.encode("utf-8", "surrogateescape") else []

    def node_at(self, path: str, node: bytes) -> tuple[Container, dict[bytes, Claim]] | None:
        """What is known of the container at a path, and its claims to bitmaps of a node, by name, as of one moment."""

        def look_up(reader: Reader) -> tuple[Container, dict[bytes, Claim]] | None:
            container = container_at(reader.get, path)
            if container is None:
                return None
            rows = [parse_bitmap(contents) for _, contents in reader.scan(BITMAP + part(layout.named(node)))]
            return container, {
                name: claim for name, claims in rows for claim in claims if claim.container == container.number
            }

        return self.database.read(look_up)

    def find(self, bitmap: bytes) -> list[tuple[bytes, list[Claim]]]:
        """All holders of a bitmap of that name, each with the claims to it."""

        def search(reader: Reader) -> list[tuple[bytes, list[Claim]]]:
            found = []
            for _, holder in reader.scan(FOUND + part(bitmap)):
                contents = reader.get(layout.bitmap_key(holder, bitmap))
                name, claims = parse_bitmap(contents) if contents else (b"", [])
                if name == bitmap:
                    found.append((holder, claims))
            return found

        return self.database.read(search)

    def seen(self, store_uuid: bytes) -> SeenCommit | None:
        """The last commit seen of a store, or None."""
        contents = self.database.get(SEEN + store_uuid)
        if contents is None:
            return None
        raw = SEEN_VALUE.parse(contents)
        return SeenCommit(store_uuid, Seen(raw.generation, raw.commit_id), self.path_of(raw.container))

    def all_seen(self, *, sound_only: bool = False) -> list[SeenCommit]:
        """The last commits seen of all stores. With ``sound_only`` it skips damaged entries."""

        def read(reader: Reader) -> list[SeenCommit]:
            paths = dict(reader.scan(PATH, sound_only=sound_only))
            found = []
            for key, value in reader.scan(SEEN, sound_only=sound_only):
                if len(value) == SEEN_VALUE.size:
                    raw = SEEN_VALUE.parse(value)
                    path = paths.get(PATH + number(raw.container))
                    place = None if path is None else os.fsdecode(path)
                    found.append(SeenCommit(key[1:], Seen(raw.generation, raw.commit_id), place))
            return found

        return self.database.read(read)

    def paths(self) -> set[str]:
        """The paths of all containers that the index knows or has known."""
        return {os.fsdecode(path) for path in self.database.read(lambda reader: [p for _, p in reader.scan(PATH)])}

    def claims(self) -> Iterator[Claim]:
        """The claims of all containers to bitmaps."""
        rows = self.database.read(lambda reader: list(reader.scan(BITMAP)))
        for _, contents in rows:
            yield from parse_bitmap(contents)[1]

    def all_bitmaps(self) -> Iterator[tuple[bytes, bytes, Claim]]:
        """Every claim to a bitmap, as the bitmap's holder, its name, and the claim."""

        def search(reader: Reader) -> list[tuple[bytes, bytes, Claim]]:
            found = []
            for holder in dict.fromkeys(holder for _, holder in reader.scan(FOUND)):
                for _, value in reader.scan(BITMAP + part(holder)):
                    name, claims = parse_bitmap(value)
                    found += [(holder, name, claim) for claim in claims]
            return found

        yield from self.database.read(search)

    # How it learns.

    def remember_seen(self, seen: SeenCommit) -> None:
        """Records the last commit seen of a store, unless a commit that the index has seen before is missing there."""
        store_uuid, commit, path = seen

        def work(writer: Writer) -> None:
            container = container_at(writer.get, path) if path is not None else None
            taken = container.number if container else 0 if path is None else new_number(writer, path)
            contents = writer.get(SEEN + store_uuid)
            before = SEEN_VALUE.parse(contents) if contents else None
            if before and Seen(before.generation, before.commit_id).is_missing_at(commit):
                return  # a later one was seen meanwhile, or the store was rolled back: see `Stores.watch`
            value = SEEN_VALUE.build(**commit._asdict(), container=taken)
            writer.put(SEEN + store_uuid, value)

        self.database.change(work)

    def refresh(self, paths: Iterable[str], *, force_share: bool = False) -> Iterator[tuple[Container, Error | None]]:
        """Brings the index up to date with these containers. Reads what has changed.

        Args:
            paths: absolute paths. A container that does not exist any more is forgotten, and not yielded.
            force_share: reads images even while a writer holds them.

        Yields:
            Each container as the index knows it now, and the error if it is not sound.
        """
        waiting: list[Reading | str] = []
        self.open()
        for path in paths:
            known = self.container(path)
            try:
                reading = look(self.readers, self.database.get, path, known, force_share)
            except StorageError:
                if known:
                    waiting.append(path)
                continue
            if reading is None:
                assert known is not None
                yield known, None
                continue
            if known and reading.problem and reading.container == known:
                yield known, reading.problem  # nothing to write: it is still not sound
                continue
            reading.base = known
            waiting.append(reading)
            if len(waiting) >= _TOGETHER:
                yield from self._take_in(waiting, force_share)
                waiting = []
        yield from self._take_in(waiting, force_share)

    def _take_in(self, waiting: list[Reading | str], force_share: bool) -> Iterator[tuple[Container, Error | None]]:
        if not waiting:
            return

        def work(writer: Writer) -> list[tuple[Container | None, str, Error | None]]:
            taken = []
            for item in waiting:
                if isinstance(item, str):
                    forget(writer, item)
                else:
                    taken.append((apply(writer, item), item.container.path, item.problem))
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
        """Records the newest commit of a store as seen."""
        header = target.read(lambda snapshot: snapshot.header)
        seen = SeenCommit(header.uuid, header.commit, target.abspath)
        if self.seen(header.uuid) == seen:
            return
        if header.generation > layout.MAX_SEEN:
            return  # made up: after a rollback the store would have to count on from there
        self.remember_seen(seen)
