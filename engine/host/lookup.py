"""`Lookup`: answers `(node, name)` again and again, each answer held against its container, without taking a lock.

    index ---claim---> container, unchanged ---what it said---> answer
                       container, changed or not known ---the long way, by `Host`---> answer

What a container said last is good as long as it is unchanged:

store          its header copies are byte for byte the same, so all that they lead to is: one ``stat``, one read
qcow2 image    ``stat`` tells of the file what it did when the index read it, where that was long enough after it was
               written; and the store that remembers its place, held as above, still does, and has no tracker for it

So an answer takes at most three system calls, however many stores the host has.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from dirtmap.engine.host.host import Host
from dirtmap.engine.host.kind import Address
from dirtmap.engine.host.resolver import NodeMatch
from dirtmap.engine.index.reading import Container, fingerprint, is_unchanged
from dirtmap.engine.model.naming import encode_name
from dirtmap.engine.namespaces.whereabouts import is_checked_out
from dirtmap.engine.storefile.directory import read_entries
from dirtmap.engine.storefile.file import Snapshot, Store
from dirtmap.fmt import store
from dirtmap.fmt.errors import BitmapError, GoneError, StorageError
from dirtmap.fmt.index import KIND_STORE, Claim

_MOST_STORES = 256  # that stay open
_MOST_IMAGES = 16384  # that are remembered


@dataclass(frozen=True, slots=True)
class BitmapAddress:
    """Where a bitmap is: its container's path, the UUID of its namespace as 16 bytes, its granularity in bytes."""

    path: str
    uuid: bytes
    granularity: int


@dataclass(frozen=True, slots=True)
class _Said:
    """What a container says of a node or device.

    Attributes:
        path: of the container, absolute.
        uuid: of the namespace, 16 bytes.
        granularities: of its bitmaps, bytes by raw name.
        is_place: of a store: the bitmaps are in an image.
        tracked: of a store: a tracker has the bitmaps, or had when it died.
    """

    path: str
    uuid: bytes
    granularities: dict[bytes, int]
    is_place: bool = False
    tracked: bool = False

    def address(self, name: str) -> BitmapAddress | None:
        """Where a bitmap is that it has; None of one that it does not have."""
        granularity = self.granularities.get(encode_name(name))
        return None if granularity is None else BitmapAddress(self.path, self.uuid, granularity)


@dataclass(slots=True)
class _OpenStore:
    """A store that stays open, and what it has said, by namespace, since its header copies are as they are."""

    store: Store
    headers: bytes | None = None
    said: dict[str, _Said] = field(default_factory=dict)

    def says(self, node: str) -> _Said | None:
        """What it says now; None where it knows no such node, or another file has taken its place."""
        headers = self.store.headers()
        if headers is None:
            return None
        if headers != self.headers:
            self.headers, self.said = headers, {}
        said = self.said.get(node)
        if said is None:
            try:
                said = _read_said(self.store, node)
            except GoneError:
                return None
            if said is not None:
                self.said[node] = said
        return said


@dataclass(frozen=True, slots=True)
class _Image:
    """A qcow2 image, as it was when the index read it.

    Attributes:
        known: what the index knew of it.
        node: its name.
        said: what it said then.
        place: the number, in the index, of the store that remembers its place.
    """

    known: Container
    node: str
    said: _Said
    place: int


class Lookup:
    """Looks addresses up for a program that asks often; use it as a context manager, in one thread.

    Args:
        host: whose names.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._index = host._parts.stores.index
        # By their number in the index; the one that was opened last is the last.
        self._stores: dict[int, _OpenStore] = {}
        self._images: dict[int, _Image] = {}
        host._parts.stores.require_trusted_index()
        host._parts.stores.stores()

    def close(self) -> None:
        """Closes what is open."""
        for number in list(self._stores):
            self._forget(number)
        self._images.clear()

    def __enter__(self) -> Lookup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def find(self, node: str, name: str) -> BitmapAddress | None:
        """Where a bitmap is; None where there is none of that address.

        Raises:
            BitmapError: the address is not unique, or no name can be so.
            FormatError: what has the bitmaps of that node is damaged.
            As `Resolver.resolve`.
        """
        try:
            claims = self._index.bitmap(node, name)
        except UnicodeEncodeError as error:
            raise BitmapError(f"bitmap {name!a} of {node!a}", "the name cannot be encoded") from error
        if len(claims) == 1 and (found := self._verified(claims[0], node, name)):
            return found
        return self._ask(node, name)

    # The short way: the index has a claim, and the container is as it was, or is asked.

    def _verified(self, claim: Claim, node: str, name: str) -> BitmapAddress | None:
        """Where the container says that the bitmap is; None where it does not, as it is now."""
        number = claim.container
        if number not in self._images and number not in self._stores:
            self._open(claim, node)
        image = self._images.get(number)
        said = self._store_says(number, node) if image is None else self._image_says(image, node)
        return said.address(name) if said is not None and said.uuid == claim.uuid and not said.is_place else None

    def _store_says(self, number: int, node: str) -> _Said | None:
        """What a store that is open says; one that does not know the node is closed, and found anew."""
        opened = self._stores.get(number)
        said = opened.says(node) if opened is not None else None
        if said is None:
            self._forget(number)
        return said

    def _image_says(self, image: _Image, node: str) -> _Said | None:
        """What an image says that is unchanged, of which the host still knows, and which nobody tracks."""
        place = self._store_says(image.place, node)
        if place is not None and place.is_place and not place.tracked and place.uuid == image.said.uuid:
            try:
                if image.node == node and is_unchanged(image.known, fingerprint(image.known.path)):
                    return image.said
            except StorageError:
                pass  # it is gone
        self._images.pop(image.known.number, None)
        return None

    def _forget(self, number: int) -> None:
        if (opened := self._stores.pop(number, None)) is not None:
            opened.store.close()

    def _open(self, claim: Claim, node: str) -> None:
        """Opens the container of a claim, if the host knows it."""
        path = self._index.path_of(claim.container)
        known: Container | None = None if path is None else self._index.container(path)
        if known is None:
            return
        if known.kind == KIND_STORE:
            if known.path in self._host._parts.stores.stores():
                self._open_store(claim.container, known.path)
            return
        found = self._host._parts.names.resolve(node)  # that the host knows it, and where its original is
        if found is None or found.in_store or found.uuid != claim.uuid or found.path != known.path:
            return
        place = self._index.container(self._path(found.store))
        if place is None or (said := self._image_said(found)) is None:
            return
        if place.number not in self._stores:
            self._open_store(place.number, place.path)
        if len(self._images) >= _MOST_IMAGES:
            del self._images[next(iter(self._images))]
        self._images[claim.container] = _Image(said[0], node, said[1], place.number)

    def _open_store(self, number: int, path: str) -> None:
        opened = _OpenStore(Store(path))
        if len(self._stores) >= _MOST_STORES:
            self._forget(next(iter(self._stores)))
        self._stores[number] = opened

    def _image_said(self, found: NodeMatch) -> tuple[Container, _Said] | None:
        """What an image said when the index read it, which need not be what it says now."""
        known = self._index.node_at(found.path, encode_name(found.name))
        if known is None:
            return None
        container, claims = known
        granularities = {
            name: 1 << claim.granularity_bits for name, claim in claims.items() if claim.uuid == found.uuid
        }
        return container, _Said(container.path, found.uuid, granularities)

    # The long way.

    def _ask(self, node: str, name: str) -> BitmapAddress | None:
        """Asks the host, where the index does not know, or says what is not so any more."""
        found = self._host._parts.names.resolve(node)
        if found is None:
            return None
        path = self._path(found.container)
        for _, problem in self._index.refresh([path]):
            if problem:
                raise problem
        said = self._said(found, path)
        return None if said is None else said.address(name)

    def _said(self, found: NodeMatch, path: str) -> _Said | None:
        """What the container of a node says that was read just now."""
        if found.in_store:
            with self._host._parts.opened(path) as target:
                return _read_said(target, found.name)
        if is_checked_out(self._host._parts, found.name, found.uuid, path):
            with self._host.open(Address(path)) as image:
                return _Said(path, found.uuid, {encode_name(one.name): one.granularity for one in image.info().bitmaps})
        said = self._image_said(found)
        return None if said is None else said[1]

    def _path(self, path: str) -> str:
        """The absolute path of a container: the process may have changed its folder since the host was made."""
        return self._host.home if path == self._host.store else os.path.abspath(path)


def _read_said(target: Store, node: str) -> _Said | None:
    """What a store says of a node or device; None where it has none of that name.

    Raises:
        FormatError: its directory is damaged.
        As `Store.read`.
    """

    def read(snapshot: Snapshot) -> _Said | None:
        record = snapshot.record(encode_name(node))
        if record is None:
            return None
        entries = read_entries(snapshot, record)
        granularities = {entry.name: 1 << entry.granularity_bits for entry in entries}
        return _Said(target.abspath, record.uuid, granularities, record.kind == store.KIND_PLACE, record.tracked)

    return target.read(read)
