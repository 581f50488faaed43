"""`Names`: what a name means across all containers of a host.

    default store ---places---> images and stores ---what they say---> index ---> a name's namespace, verified there

The default store remembers where this host's containers are; the containers say what is in them; the index only makes
that fast. So every answer is the same without an index, and one that the index gives is verified before it is used.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from dirtmap.engine.index.database import DamagedError
from dirtmap.engine.index.database import replace as replace_database
from dirtmap.engine.index.index import Index
from dirtmap.engine.index.reading import Container
from dirtmap.engine.namespace import decode_name, encode_name
from dirtmap.engine.qcow2.image import read_identity
from dirtmap.engine.store import nodes
from dirtmap.engine.store.devices import Root
from dirtmap.engine.store.store import Snapshot, Store, create
from dirtmap.fmt import index as layout
from dirtmap.fmt import store
from dirtmap.fmt.directory import FLAG_IN_USE
from dirtmap.fmt.errors import BitmapError, BitmapNotFoundError, Error, StorageError, printable
from dirtmap.fmt.index import QCOW2, SOUND, Member

T = TypeVar("T")

_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class Found:
    """What a name was found to mean.

    Attributes:
        name: of the node or device.
        kind: ``KIND_NODE`` or ``KIND_DEVICE``, in a store; ``KIND_PLACE``, a qcow2 image.
        uuid: of the namespace, 16 bytes.
        root_uuid: of a device's root.
        store: the store that has its record.
        path: of the image; of a device, that of its root.
        size: of the disk, bytes.
    """

    name: str
    kind: int
    uuid: bytes
    root_uuid: bytes
    store: str
    path: str
    size: int

    @property
    def is_device(self) -> bool:
        """True of a device, False of a node."""
        return self.kind == store.KIND_DEVICE

    @property
    def what(self) -> str:
        """``node`` or ``device``."""
        return "device" if self.is_device else "node"

    @property
    def in_store(self) -> bool:
        """True where its bitmaps are in a store, False where they are in the image itself."""
        return self.kind != store.KIND_PLACE

    @property
    def container(self) -> str:
        """The path of the container that has its bitmaps."""
        return self.store if self.in_store else self.path


@dataclass(frozen=True, slots=True)
class Hit:
    """A bitmap that was found by its name: in which container, and of which node, device or unnamed image."""

    container: Container
    kind: str
    holder: str
    bitmap: str
    uuid: bytes
    flags: int
    granularity: int

    @property
    def in_image(self) -> bool:
        """True where the container is a qcow2 image."""
        return self.container.kind == QCOW2


class Names:
    """The containers that a default store knows, and an index of them.

    Args:
        store: path of the default store; it need not exist.
        index: path of the index; it is made on first need.

    Attributes:
        store: as given.
        home: the same as an absolute path.
        index: the index.
    """

    def __init__(self, store: str, index: str) -> None:
        self.store = store
        self.home = os.path.abspath(store)
        self.index = Index(index)

    # Stores, and whether they are what was last seen.

    @contextlib.contextmanager
    def opened(self, path: str | None = None, *, make: bool = False) -> Iterator[Store]:
        """A store, looked after: a rollback is found before any answer, and what is committed is remembered.

        Args:
            path: which; the default store where None.
            make: the default store, where it does not exist yet.

        Raises:
            BitmapError: it is a copy of another store.
            As `Store` and `Store.change`.
        """
        path = path or self.store
        if make and path == self.store and not os.path.exists(path):
            try:
                os.makedirs(os.path.dirname(self.home), mode=0o700, exist_ok=True)
            except (OSError, ValueError) as error:
                raise StorageError(path, getattr(error, "strerror", None) or str(error)) from error
            with contextlib.suppress(StorageError):  # another process was faster
                create(path)
        with Store(path) as target:
            self.look_after(target)
            yield target

    def look_after(self, target: Store) -> None:
        """Commits the suspicion that a store was rolled back, and has its later commits remembered.

        Where there is no index yet, it only refuses a copy of a store that the default store knows.

        Raises:
            As `opened`.
        """
        header = target.read(lambda snapshot: snapshot.header)
        indexed = os.path.isdir(self.index.path)
        seen = self._asking(lambda index: index.seen(header.uuid)) if indexed else None
        if seen is None:
            self._refuse_copy(target, self._original(target, header.uuid), header.uuid)
        if not indexed:
            return
        target.committed = lambda: self._saw(target)
        if seen is None:
            self._saw(target)
            return
        generation, commit_id, path = seen
        self._refuse_copy(target, path, header.uuid)
        if (header.generation, header.commit_id) == (generation, commit_id) or header.generation > generation:
            if path != os.path.abspath(target.path) or header.generation > generation:
                self._saw(target)
            return
        with target.change() as change:
            now = change.header
            if now.generation > generation or (now.generation, now.commit_id) == (generation, commit_id):
                return  # another process was faster
            change.doubt_everything()
            change.generation = max(change.generation, generation + 1)

    def _original(self, target: Store, store_uuid: bytes) -> str | None:
        """Where the default store says that the store of a UUID is; None where it does not know, or that is here."""
        here = os.path.abspath(target.path)
        if here == self.home or not os.path.exists(self.home):
            return None

        def look(snapshot: Snapshot) -> list[str]:
            if snapshot.header.uuid == store_uuid:
                return [self.home]
            known = [record for record in snapshot.table() if record.kind == store.KIND_CONTAINER]
            return [os.fsdecode(record.path) for record in known if record.uuid == store_uuid]

        with contextlib.suppress(Error), Store(self.home) as default:
            paths = default.read(look)
            return paths[0] if paths and here not in paths else None
        return None

    def _refuse_copy(self, target: Store, path: str | None, store_uuid: bytes) -> None:
        if path is not None and path != os.path.abspath(target.path) and self._is_copy(target, path, store_uuid):
            what = f"a copy of {path}, with its identity; 'store new-identity' gives it one of its own"
            raise BitmapError(target.path, what)

    @staticmethod
    def _is_copy(target: Store, path: str, store_uuid: bytes) -> bool:
        try:
            if os.path.samefile(path, target.path):
                return False
            with Store(path) as other:
                return other.read(lambda snapshot: snapshot.header.uuid) == store_uuid
        except (Error, OSError):
            return False

    def _saw(self, target: Store) -> None:
        # The store's commit is durable; an index that cannot be written must not make it look failed.
        with contextlib.suppress(StorageError):
            self._asking(lambda index: index.saw(target))

    def _asking(self, question: Callable[[Index], T]) -> T:
        """Asks the index; a damaged one is put aside, and a new one asked.

        Args:
            question: brings the index up to date with what it needs: it is asked again where another index has taken
                the old one's place meanwhile, which is empty.
        """
        for _ in range(_ATTEMPTS):
            try:
                before = self.index.database
                answer = question(self.index)
                if self.index.database is before:
                    return answer
            except (DamagedError, layout.BadValueError):
                replace_database(self.index.path, even_if_good=True)
        raise StorageError(self.index.path, "index: is replaced again and again")

    # Which containers there are.

    def stores(self) -> list[str]:
        """The paths of all stores of the host, with the index up to date for them; none where there is no default."""
        if not os.path.exists(self.store):
            return []

        def learn(index: Index) -> list[str]:
            first = self._refresh_store(index, self.home)
            others = index.stores(first.number) if first else []
            return [self.home, *(path for path in others if path != self.home and self._refresh_store(index, path))]

        return self._asking(learn)

    def _refresh_store(self, index: Index, path: str) -> Container | None:
        """What the index knows of a store, now; None where it is gone."""
        index.open()  # there has to be one before a rollback can be seen
        try:
            with self.opened(path):
                pass
        except StorageError:
            if path == self.home:
                raise
        for container, problem in index.refresh([path]):
            if problem:
                raise problem
            return container
        return None

    def containers(self) -> list[str]:
        """The paths of all containers of the host, stores first; those that are gone included."""

        def read(index: Index) -> list[str]:
            found = self.stores()
            for path in list(found):
                container = index.container(path)
                if container is None:
                    raise DamagedError(index.path, "another index has taken its place")
                found += [
                    os.fsdecode(member.path)
                    for member in index.members(container.number)
                    if member.kind in (store.KIND_PLACE, store.KIND_CONTAINER)
                ]
            return list(dict.fromkeys(found))

        return self._asking(read) if os.path.exists(self.store) else []

    def refresh(self, *, force_share: bool = False) -> dict[int, Container]:
        """Makes the index say what all containers say now.

        Returns:
            The containers that are sound, by their number in the index.
        """

        def learn(index: Index) -> dict[int, Container]:
            found = index.refresh(self.containers(), force_share=force_share)
            return {container.number: container for container, _ in found if container.condition == SOUND}

        return self._asking(learn) if os.path.exists(self.store) else {}

    # What names mean.

    def resolve(self, name: str) -> Found | None:
        """The node or device of that name, as its container says; None where there is none.

        Raises:
            BitmapError: the name is not unique; names both places.
            BitmapNotFoundError: its image is not where it was.
            As `opened`.
        """
        found = self._unique(name)
        if found:
            _require_its_image(found)
        return found

    def _unique(self, name: str) -> Found | None:
        found = self._claims(name)
        # What the default store itself has under that name keeps it, whatever other stores turn up.
        found = [claim for claim in found if claim.store == self.store] or found
        if len(found) > 1:
            one, other = found[:2]
            what = f"names a namespace of {one.store}, and another of {other.store}; say which with --store"
            raise BitmapError(f"node '{printable(name)}'", what)
        return found[0] if found else None

    def _claims(self, name: str) -> list[Found]:
        raw_name = encode_name(name)
        unique: dict[bytes, Found] = {}
        for found in self._in_stores(lambda index: index.namespaces(raw_name)):
            unique.setdefault(found.uuid, found)
        return list(unique.values())

    def _in_stores(self, claims: Callable[[Index], list[tuple[int, Member]]]) -> list[Found]:
        """Those of an index's claims that a store of the host makes."""

        def ask(index: Index) -> list[Found]:
            stores = self.stores()
            return [
                self._found(path, member)
                for path, member in ((index.path_of(number), member) for number, member in claims(index))
                if path in stores and member.kind != store.KIND_CONTAINER
            ]

        return self._asking(ask) if os.path.exists(self.store) else []

    def _found(self, path: str, member: Member) -> Found:
        return Found(
            name=decode_name(member.name),
            kind=member.kind,
            uuid=member.uuid,
            root_uuid=member.root_uuid,
            store=self.store if path == self.home else path,
            path=os.fsdecode(member.path),
            size=member.size,
        )

    def by_uuid(self, namespace_uuid: bytes) -> Found | None:
        """The node of that UUID, as far as a store of the host knows it."""
        found = self._in_stores(lambda index: index.carriers(namespace_uuid))
        return found[0] if found else None

    def devices_of(self, root: bytes) -> dict[str, list[bytes]]:
        """The devices whose root has that UUID: raw names by the path of their store."""
        names: dict[str, list[bytes]] = {}
        for found in self._in_stores(lambda index: index.devices(root)):
            names.setdefault(found.store, []).append(encode_name(found.name))
        return names

    def _is_checked_out(self, path: str, name: str, image_uuid: bytes) -> bool:
        with Store(self.home) as target:
            return nodes.is_checked_out(target, path, name, str(uuid.UUID(bytes=image_uuid)))

    def find(self, bitmap: str, *, force_share: bool = False) -> list[Hit]:
        """Every bitmap of that name, in all containers that can be read, ordered by holder."""
        raw_name = encode_name(bitmap)

        def ask(index: Index) -> list[Hit]:
            sound = self.refresh(force_share=force_share)
            hits = []
            for holder, claims in index.find(raw_name):
                for claim in claims:
                    if container := sound.get(claim.container):
                        kind = _kind_of(index, container, holder)
                        name, granularity = decode_name(holder[1:]), 1 << claim.granularity_bits
                        flags = claim.flags
                        in_use = flags & FLAG_IN_USE and container.kind == QCOW2
                        if in_use and self._is_checked_out(container.path, name, claim.uuid):
                            flags &= ~FLAG_IN_USE  # its tracker has what the image lacks
                        hits.append(Hit(container, kind, name, bitmap, claim.uuid, flags, granularity))
            return sorted(hits, key=lambda hit: (hit.holder, hit.container.path))

        return self._asking(ask) if os.path.exists(self.store) else []

    def require(self, name: str, *kinds: int) -> Found:
        """The node or device of that name.

        Raises:
            BitmapNotFoundError: there is none, or it is of another kind.
        """
        found = self._unique(name)
        if found is None or (kinds and found.kind not in kinds):
            what = "device" if kinds == (store.KIND_DEVICE,) else "node"
            text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            other = f"; it is a {store.KIND_NAMES[found.kind]}" if found and found.kind != store.KIND_PLACE else ""
            raise BitmapNotFoundError(f"{self.store}: {what} '{text}'", f"there is no such {what}{other}")
        return found

    def root(self, name: str) -> Root:
        """A node, to be a device's root.

        Raises:
            BitmapNotFoundError: there is no such node, or its image is not where it was.
        """
        found = self.require(name, store.KIND_NODE, store.KIND_PLACE)
        _require_its_image(found)
        return Root(found.uuid, found.path)


def _require_its_image(found: Found) -> None:
    """Refuses a node whose image is not where it was.

    Raises:
        BitmapNotFoundError: says what can be done.
    """
    if found.in_store:
        return
    where = f"node '{printable(found.name)}'"
    try:
        identity = read_identity(found.path)
    except StorageError as error:
        what = f"its image cannot be read ({error}); 'index scan' finds one that was moved"
        raise BitmapNotFoundError(where, what) from None
    if identity != (found.name, str(uuid.UUID(bytes=found.uuid))):
        what = f"{found.path} is not its image any more; 'index scan' finds one that was moved"
        raise BitmapNotFoundError(where, what)


def _kind_of(index: Index, container: Container, holder: bytes) -> str:
    """What a holder of bitmaps in a container is: ``image``, ``node`` or ``device``."""
    if holder[:1] != layout.NAMED:
        return "image"
    kinds = {member.kind for number, member in index.namespaces(holder[1:]) if number == container.number}
    return "device" if store.KIND_DEVICE in kinds else "node"
