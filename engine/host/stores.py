"""`Stores`: the stores and images that a host knows. Its stores stay open, and are watched for rollbacks.

    default store ---places---> images and stores ---what they say---> index

The default store remembers where the host's containers are; the containers say what is in them. The index makes that
fast, and remembers the last commit seen of each store. A store that lacks that commit was rolled back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from dirtmap.engine.host.defaults import USUAL_STORE
from dirtmap.engine.host.kind import Kind
from dirtmap.engine.host.pool import Pool
from dirtmap.engine.index.database import DamagedError, DatabaseError, ForbiddenError, MisplacedError
from dirtmap.engine.index.index import Index
from dirtmap.engine.index.reading import Container, PartlyDamagedError
from dirtmap.engine.storefile.file import Snapshot, Store, create
from dirtmap.engine.system.file import is_gone, is_same_file, make_folder_of
from dirtmap.engine.system.locks import Locking
from dirtmap.engine.system.log import logger
from dirtmap.engine.system.probe import probe_path
from dirtmap.engine.system.trust import distrust
from dirtmap.fmt import index as layout
from dirtmap.fmt import store
from dirtmap.fmt.errors import BitmapError, Error, FormatError, StorageError
from dirtmap.fmt.identity import FilePlace
from dirtmap.fmt.index import SOUND
from dirtmap.fmt.store import Record

T = TypeVar("T")

_ATTEMPTS = 5


class Stores:
    """The containers that a default store knows, and an index of them. Stores stay open until `close`.

    Args:
        home: absolute path of the default store; it need not exist.
        name: name of the default store in messages.
        index: path of the index, which is made when first needed.
        kinds: the kinds of containers.
        locking: how to take the locks of the stores.
        fallback: the stores of the user's normal default store, when --store names another; else None.
        trust: believe files that another user can replace; see `dirtmap.engine.system.trust`.

    Attributes:
        home: as given; absolute, because the process may change its working folder.
        store: name of the default store in messages; methods take it as its path.
        index: the index.
        fallback: as given.
    """

    def __init__(
        self,
        home: str,
        name: str,
        index: str,
        kinds: Iterable[Kind],
        locking: Locking,
        fallback: Stores | None = None,
        *,
        trust: bool = False,
    ) -> None:
        self.home, self.store, self.fallback, self._trust = home, name, fallback, trust
        self._trusted: set[str] = set()
        self._pool = Pool(self.report, locking)
        self.index = Index(index, [reader for kind in kinds if (reader := kind.reader(self.kept))])

    def close(self) -> None:
        """Closes all open stores."""
        self._pool.close()
        if self.fallback is not None:
            self.fallback.close()

    @property
    def notice(self) -> str | None:
        """Why the index could not be used, and what follows; None where that never was so."""
        return self.index.notice or (None if self.fallback is None else self.fallback.notice)

    @property
    def exists(self) -> bool:
        """True if the default store exists."""
        return os.path.exists(self.home)

    def _where(self, path: str) -> tuple[str, str]:
        """The absolute path of a store, and its name in messages. The default store's path was fixed at the start."""
        if path == self.store:
            return self.home, self.store
        where = os.path.abspath(path)
        return where, self.store if where == self.home else path

    def kept(self, path: str) -> contextlib.AbstractContextManager[Store]:
        """Opens a store of the host for the time of the block, without watching it. Errors as `Store`."""
        return self._pool.using(*self._where(path), lambda target: None)

    # Whether another user can have written what is in a file.

    def require_trusted(self, path: str) -> None:
        """Refuses, for root, a store that another user can have written. A path that root names is no matter of this.

        Args:
            path: of the store, absolute.

        Raises:
            StorageError: says why.
        """
        if (reason := self._distrust(path)) is not None:
            raise StorageError(self._where(path)[1], reason)

    def require_trusted_index(self) -> None:
        """As `require_trusted`, of the index.

        Raises:
            ForbiddenError: says why.
        """
        for path in (self.index.path, os.path.join(self.index.path, "data.mdb")):
            if (reason := self._distrust(path)) is not None:
                raise ForbiddenError(self.index.path, f"index: {reason}")

    def _distrust(self, path: str) -> str | None:
        reason = None if self._trust else distrust(path, self._trusted)
        return None if reason is None else f"not trusted: {reason}; --trust insists"

    # Stores, and whether they are what was last seen.

    @contextlib.contextmanager
    def opened(self, path: str | None = None, *, make: bool = False) -> Iterator[Store]:
        """Opens a store for the time of the block. Detects a rollback before any answer, and reports commits.

        Args:
            path: of the store; None for the default store.
            make: makes the default store if it does not exist yet.

        Raises:
            BitmapError: the store is a copy of another store.
            StorageError: it is the default store, and root must not trust it.
            As `Store` and `Store.change`.
        """
        if path is None:
            self.require_trusted(self.home)
        path = path or self.store
        if make and path == self.store and not self.exists:
            make_folder_of(self.home, path)
            with contextlib.suppress(StorageError):  # another process was faster
                create(self.home)
        with contextlib.ExitStack() as stack:
            try:
                target = stack.enter_context(self._pool.using(*self._where(path), self.watch))
            except FormatError as error:
                raise self._advised(path, error) from error
            yield target

    def _advised(self, path: str, error: Error) -> Error:
        """The error for a store. For the default store, which everything needs, it also says what can be done."""
        if self._where(path)[0] != self.home or not isinstance(error, FormatError):
            return error
        how = "'check -r all' may mend it, or 'index scan' make another once it is moved away"
        try:
            Store(self.store, self.home).close()
        except FormatError:  # the header is damaged: nothing leads to the content
            how = "'index scan' makes another once it is moved away"
        return FormatError(error.where, f"{error.what}; it is the default store: {how}")

    def watch(self, target: Store) -> None:
        """Detects a rollback (an older copy put back), and reports the store's last commit to the index.

        After a rollback it marks the store doubted, in a commit: all bitmaps in it count as dirty all over. Without an
        index it only refuses a copy of a store that the default store knows.

        Raises:
            BitmapError: the store is a copy of another store.
            As `Store` and `Store.change`.
        """
        if self.index.exists:
            self._check_copy_and_age(target)
        else:
            self._refuse_copy(target)

    def report(self, target: Store) -> None:
        """Reports a commit to the index; see `HostPort.report`. Errors are ignored, because the commit is durable."""
        if self.index.exists:
            with contextlib.suppress(Error):
                self._check_copy_and_age(target)
                self._pool.believe(target)

    def expect(self, target: Store) -> str | None:
        """Tells a store the last commit that the index has seen of it. If the store lacks it, it is rolled back.

        Returns:
            The path of the store at that time; None if the index has seen no commit of it.
        """
        try:
            seen = self.asking(lambda index: index.seen(target.uuid)) if self.index.exists else None
        except ForbiddenError:
            return None  # as without an index; look-ups of names report the error
        if seen is None:
            return None
        target.expect(seen.commit)
        if seen.path == target.abspath and target.is_elsewhere():
            target.suspect()
        return seen.path

    def _check_copy_and_age(self, target: Store) -> None:
        self._refuse_copy(target)
        if not target.is_rolled_back():
            self._saw(target)
            return
        try:
            with target.change():
                pass  # an empty change: the commit marks the store doubted
            logger(__name__).warning("%s: an older copy was put back: all its bitmaps are dirty now", target.path)
        except StorageError as error:
            what = f"was rolled back to an older commit; open it once as one who may write it ({error.what})"
            raise StorageError(target.path, what, error.errno) from error

    def _originals(self, target: Store) -> Iterator[str]:
        """The paths of that store in the default stores: the chosen one, the normal one, the one beside the index."""
        usual = os.path.join(os.path.dirname(self.index.path), USUAL_STORE)
        normal = [] if self.fallback is None else [self.fallback.home]
        for home in dict.fromkeys([self.home, *normal, usual]):
            if home != target.abspath and (path := self._original(target, home)):
                yield path

    def _original(self, target: Store, home: str) -> str | None:
        """The path of that store in a default store; None if it is not known there, or known at this path."""

        def look(snapshot: Snapshot) -> list[str]:
            if snapshot.header.uuid == target.uuid:
                return [home]

            def carriers(index: Index, number: int) -> list[bytes]:
                return [member.name for found, member in index.carriers(target.uuid) if found == number]

            records = self._records(snapshot, carriers)
            known = [record for record in records if record.kind == store.KIND_CONTAINER]
            return [os.fsdecode(record.path) for record in known if record.uuid == target.uuid]

        with contextlib.suppress(Error), self.kept(home) as default:
            paths = default.read(look)
            return paths[0] if paths and target.abspath not in paths else None
        return None

    def records_on(self, snapshot: Snapshot, path: str, place: FilePlace) -> Iterable[Record]:
        """The nodes of a store of which some may be an image: all that are it, and perhaps others.

        Args:
            snapshot: of the store.
            path: of the image, absolute.
            place: which file the image is.

        Raises:
            FormatError: a part of the store that may have one cannot be read.
        """
        paths = {os.fsencode(path), os.fsencode(os.path.realpath(path))}
        return self._records(snapshot, lambda index, number: index.on_image(number, paths, place))

    def _records(self, snapshot: Snapshot, names: Callable[[Index, int], list[bytes]]) -> Iterable[Record]:
        """Records of a store: those that the index names, where it knows the store as of this commit; else all.

        Args:
            snapshot: of the store.
            names: asks the index for names, given the number of the store in it.
        """

        def ask(index: Index) -> list[bytes] | None:
            for renewed in (False, True):
                known = index.container(snapshot.file.abspath)
                if known and known.condition == SOUND and known.commit_id == snapshot.header.commit_id:
                    return names(index, known.number)
                if not renewed:
                    for _ in index.refresh([snapshot.file.abspath]):
                        pass
            return None

        found = None
        if self.index.exists:
            with contextlib.suppress(Error):
                found = self.asking(ask)
        table = snapshot.table()
        return table if found is None else [record for name in found if (record := table.get(name))]

    def original_of(self, target: Store) -> str | None:
        """The path of the store of which this one is a copy; None if it is not known to be a copy."""
        before = self.expect(target) if self.index.exists else None
        paths = self._originals(target) if before is None else [before]
        return next((path for path in paths if path != target.abspath and self._is_copy(target, path)), None)

    def refuse_copy_at(self, path: str) -> None:
        """Refuses a change of the store at a path, which may be damaged, if it is a copy of another.

        Raises:
            BitmapError: it is a copy.
        """
        with contextlib.ExitStack() as stack:
            try:
                target = stack.enter_context(self.kept(path))
            except Error:
                return  # nobody can tell; whoever repairs it does so as far as it can be read
            self._refuse_copy(target)

    def _refuse_copy(self, target: Store) -> None:
        if path := self.original_of(target):
            what = f"a copy of {path}, with its identity; 'store new-identity' gives it one of its own"
            raise BitmapError(target.path, what)
        elsewhere = target.is_elsewhere()
        if elsewhere and not target.is_rolled_back():  # else all is dirty, whatever has been put back
            what = (
                "a copy of a file that is not found, or put back from one; 'store new-identity' makes it another store"
            )
            raise BitmapError(target.path, what)
        if elsewhere is None:
            what = (
                "%s: whether it is a copy cannot be told: its file system has another name since, and none that lasts"
            )
            logger(__name__).warning(what, target.path)

    @staticmethod
    def _is_copy(target: Store, path: str) -> bool:
        if is_same_file(path, target.abspath):
            return False
        with contextlib.suppress(Error), Store(path) as other:
            return other.uuid == target.uuid
        return False

    def _saw(self, target: Store) -> None:
        with contextlib.suppress(StorageError):
            self.asking(lambda index: index.saw(target))

    def asking(self, question: Callable[[Index], T]) -> T:
        """Asks the index. Replaces a damaged index by one that has only the commits seen of stores, and asks that.

        Where the index cannot be used, memory stands in for it, and what it needs is read anew.

        Args:
            question: updates the index as far as it needs. It is called again if another, empty index has replaced the
                index meanwhile.

        Raises:
            ForbiddenError: the index must not be used.
            StorageError: the index is replaced again and again, or what is in its place is no index.
        """
        self.require_trusted_index()
        with self.index.question():
            return self._answer(question)

    def _answer(self, question: Callable[[Index], T]) -> T:
        for _ in range(_ATTEMPTS):
            try:
                before = self.index.database
                answer = question(self.index)
                if self.index.database is before:
                    return answer
            except (DamagedError, layout.BadValueError):
                logger(__name__).warning("%s: the index is damaged, and begun anew", self.index.path)
                try:
                    from dirtmap.engine.index.renewal import examine, renew

                    renew(self.index.path, examine(self.index.path).seen)
                except (ForbiddenError, MisplacedError):
                    raise
                except DatabaseError as error:
                    self.index.do_without(error)
            except (ForbiddenError, MisplacedError):
                raise
            except DatabaseError as error:
                self.index.do_without(error)
        raise StorageError(self.index.path, "index: is replaced again and again")

    # Which containers there are.

    def stores(self) -> list[str]:
        """The paths of all stores of the host that can be read, if only partly. Brings the index up to date for them.

        Empty if there is no default store.

        Raises:
            FormatError: the default store is damaged.
        """
        return self.readable(self.survey())

    @staticmethod
    def readable(survey: dict[str, Error | None]) -> list[str]:
        """The stores of a `survey` that can be read, if only partly."""
        return [path for path, problem in survey.items() if _is_readable(problem)]

    def remembered(self) -> list[str]:
        """The paths of the default store and of the stores that it remembers. Needs no index.

        Empty if there is no default store.

        Raises:
            FormatError: the default store is damaged.
        """
        if not self.exists:
            return []

        def known(index: Index, number: int) -> list[bytes]:
            return [member.name for member in index.others(number)]

        try:
            with self.kept(self.home) as default:
                records = default.read(lambda snapshot: list(self._records(snapshot, known)))
        except FormatError as error:
            raise self._advised(self.home, error) from error
        others = [record for record in records if record.kind == store.KIND_CONTAINER and any(record.uuid)]
        return [self.home, *(os.fsdecode(record.path) for record in others)]

    def problems(self) -> list[Error]:
        """What is wrong with stores that exist. Whether a name is in what cannot be read cannot be told."""
        return [problem for problem in self.survey().values() if problem]

    def hiding(self, name: bytes) -> Iterator[Error]:
        """What is wrong with stores that may have a node or device of that name, or know a store that may."""
        for path, problem in self.survey().items():
            if isinstance(problem, PartlyDamagedError) and path != self.home and not problem.may_hide(name):
                continue
            if problem:
                yield problem

    def survey(self) -> dict[str, Error | None]:
        """The paths of all existing stores of the host, the default store first, and what is wrong with each."""
        if not self.exists:
            return {}

        def learn(index: Index) -> dict[str, Error | None]:
            home, problem = self._refresh_store(index, self.home)
            found: dict[str, Error | None] = {self.home: problem}
            for path in index.stores(home.number):
                try:
                    if path != self.home:
                        _, found[path] = self._refresh_store(index, path)
                except DatabaseError:
                    raise
                except Error as error:
                    if not is_gone(path):
                        found[path] = error
            return found

        return self.asking(learn)

    def _refresh_store(self, index: Index, path: str) -> tuple[Container, PartlyDamagedError | None]:
        """The index's record of a store, brought up to date, and why that is not all of it.

        Raises:
            Error: the store cannot be read.
        """
        self.require_trusted(path)
        if (known := index.unchanged(path)) is not None:
            return known, None
        index.open()  # without an index no rollback can be detected
        with self.opened(path):
            pass
        for container, problem in index.refresh([path]):
            if problem is None or isinstance(problem, PartlyDamagedError):
                return container, problem
            raise self._advised(path, problem)
        raise StorageError(path, "is being replaced")

    def containers(self) -> list[str]:
        """The paths of all containers of the host, stores first, including those that are gone or damaged."""
        if not self.exists:
            return []
        return self.asking(lambda index: self._containers(index, self.stores()))

    @staticmethod
    def _containers(index: Index, stores: list[str]) -> list[str]:
        found = list(stores)
        for path in stores:
            container = index.container(path)
            if container is None:
                raise DamagedError(index.path, "another index has taken its place")
            found += [os.fsdecode(member.path) for member in index.others(container.number)]
        return list(dict.fromkeys(found))

    def refresh(self, *, force_share: bool = False) -> tuple[dict[int, Container], list[Error]]:
        """Brings the index up to date with all containers.

        Returns:
            The readable containers by their number in the index; and why others could not be read, or not all.
        """

        def learn(index: Index) -> tuple[dict[int, Container], list[Error]]:
            survey = self.survey()
            problems = {path: problem for path, problem in survey.items() if problem}
            paths = self._containers(index, self.readable(survey))
            left = dict.fromkeys(paths)
            sound = {}
            for container, problem in index.refresh(paths, force_share=force_share):
                left.pop(container.path)
                if problem:
                    problems.setdefault(container.path, problem)
                if _is_readable(problem) and _is_readable(problems.get(container.path)):
                    sound[container.number] = container
            for path in left:
                try:
                    probe_path(path)
                except StorageError as error:
                    problems.setdefault(path, error)
            return sound, [problems[path] for path in paths if path in problems]

        return self.asking(learn) if self.exists else ({}, [])


def _is_readable(problem: Error | None) -> bool:
    """True of a store that has no problem, or says something all the same."""
    return problem is None or isinstance(problem, PartlyDamagedError)
