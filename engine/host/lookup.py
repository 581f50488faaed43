"""`Lookup`: answers `(node, name)` again and again, each answer held against its container, which stays open.

    index ---claim---> container, unchanged ---what it said---> answer
                       container, changed or not known ---the long way, by `Host`---> answer

What a container said last is good as long as it is unchanged. Of a store its header copies tell: while they are byte
for byte the same, so is all that they lead to. Of a qcow2 image its header and what ``stat`` tells of the file, as the
index has seen it. Either takes one or two system calls and no lock.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from dirtmap.engine.host.host import Host
from dirtmap.engine.index.reading import Container, fingerprint, is_unchanged
from dirtmap.engine.model.naming import encode_name
from dirtmap.engine.qcow2.layout import read_head
from dirtmap.engine.storefile.directory import read_entries
from dirtmap.engine.storefile.file import Snapshot, Store
from dirtmap.engine.system.file import File, open_file
from dirtmap.fmt.errors import BitmapError, Error, StorageError
from dirtmap.fmt.index import KIND_STORE, Claim

_MOST_IMAGES = 256  # files that stay open
_HEAD = 1024  # bytes of an image's header that are compared: no change of its bitmaps leaves them all alone


@dataclass(frozen=True, slots=True)
class BitmapAddress:
    """Where a bitmap is: its container's path, the UUID of its namespace as 16 bytes, its granularity in bytes."""

    path: str
    uuid: bytes
    granularity: int


@dataclass(slots=True)
class _OpenStore:
    """A store that stays open, and what it said under these headers: by namespace, its UUID and its bitmaps' names."""

    store: Store
    headers: bytes
    said: dict[str, tuple[bytes, frozenset[bytes]] | None]


@dataclass(slots=True)
class _OpenImage:
    """A qcow2 image that stays open, as it was when it said to be node ``name``, with that UUID as 16 bytes."""

    file: File
    known: Container
    head: bytes
    name: bytes
    uuid: bytes


class Lookup:
    """Looks addresses up for a program that asks often; use it as a context manager, in one thread.

    Args:
        host: whose names.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._index = host._parts.stores.index
        self._stores: dict[int, _OpenStore] = {}
        self._images: dict[int, _OpenImage] = {}
        self._paths: dict[int, str] = {}
        host._parts.stores.require_trusted_index()
        host._parts.stores.stores()

    def close(self) -> None:
        """Closes what is open."""
        for opened in self._stores.values():
            opened.store.close()
        for image in self._images.values():
            image.file.close()
        self._stores.clear()
        self._images.clear()

    def __enter__(self) -> Lookup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def find(self, node: str, name: str) -> BitmapAddress | None:
        """Where a bitmap is; None where there is none of that address.

        Raises:
            BitmapError: the address is not unique, or no name can be so.
            As `Resolver.resolve`.
        """
        try:
            claims = self._index.bitmap(node, name)
        except UnicodeEncodeError as error:
            raise BitmapError(f"bitmap {name!a} of {node!a}", "the name cannot be encoded") from error
        if len(claims) == 1 and self._holds(claims[0], node, name):
            claim = claims[0]
            return BitmapAddress(self._paths[claim.container], claim.uuid, 1 << claim.granularity_bits)
        return self._ask(node, name)

    def _ask(self, node: str, name: str) -> BitmapAddress | None:
        """The long way, where the index does not know, or says what is not so any more."""
        found = self._host._parts.names.resolve(node)
        if found is None:
            return None
        for _, problem in self._index.refresh([os.path.abspath(found.container)]):
            if problem:
                raise problem
        known = self._index.container(os.path.abspath(found.container))
        for claim in self._index.bitmap(node, name):
            if known is not None and claim.container == known.number and claim.uuid == found.uuid:
                return BitmapAddress(known.path, claim.uuid, 1 << claim.granularity_bits)
        return None

    def _holds(self, claim: Claim, node: str, name: str) -> bool:
        """True where the container says so, too, as it is now."""
        if (image := self._images.get(claim.container)) is not None:
            return self._image_holds(image, claim, node)
        opened = self._stores.get(claim.container)
        if opened is None:
            return self._open(claim, node, name)
        headers = opened.store.headers()
        if headers is None:
            opened.store.close()
            del self._stores[claim.container]
            return False
        if headers != opened.headers:
            opened.headers, opened.said = headers, {}
        said = opened.said.get(node)
        if said is None:
            said = opened.said[node] = self._read(opened.store, node)
        return said is not None and said[0] == claim.uuid and encode_name(name) in said[1]

    def _open(self, claim: Claim, node: str, name: str) -> bool:
        """As `_holds`, of a container that is not open yet."""
        path = self._paths[claim.container] = self._index.path_of(claim.container) or ""
        known: Container | None = self._index.container(path)
        if known is None:
            return False
        if known.kind == KIND_STORE:
            if path not in self._host._parts.stores.stores():
                return False
            store = Store(path)
            self._stores[claim.container] = _OpenStore(store, store.headers() or b"", {})
            return self._holds(claim, node, name)
        return self._open_image(claim, known, node)

    def _open_image(self, claim: Claim, known: Container, node: str) -> bool:
        found = self._host._parts.names.resolve(node)  # that the host knows it, and where its original is
        if found is None or found.in_store or found.uuid != claim.uuid or found.path != known.path:
            return False
        try:
            file = open_file(known.path)
        except StorageError:
            return False
        try:
            head = read_head(file)
            image = _OpenImage(file, known, file.read(0, _HEAD), head.name or b"", head.uuid or b"")
            if not self._image_holds(image, claim, node):
                file.close()
                return False
        except Error:
            file.close()
            return False
        if len(self._images) >= _MOST_IMAGES:
            self._images.pop(next(iter(self._images))).file.close()
        self._images[claim.container] = image
        return True

    def _image_holds(self, image: _OpenImage, claim: Claim, node: str) -> bool:
        """True where an image is as it was when the index took in what it says."""
        try:
            same = is_unchanged(image.known, fingerprint(image.known.path)) and image.file.read(0, _HEAD) == image.head
        except StorageError:
            same = False
        if not same and (opened := self._images.pop(claim.container, None)) is not None:
            opened.file.close()
        return same and (image.name, image.uuid) == (encode_name(node), claim.uuid)

    @staticmethod
    def _read(store: Store, node: str) -> tuple[bytes, frozenset[bytes]] | None:
        def read(snapshot: Snapshot) -> tuple[bytes, frozenset[bytes]] | None:
            record = snapshot.record(encode_name(node))
            if record is None:
                return None
            return record.uuid, frozenset(entry.name for entry in read_entries(snapshot, record))

        return store.read(read)
