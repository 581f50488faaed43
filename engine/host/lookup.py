"""`Lookup`: answers `(node, name)` again and again, each answer held against its container, which stays open.

What a store said last is good as long as its headers are, byte for byte: so verifying an answer takes one read of them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from dirtmap.engine.host.registry import Host
from dirtmap.engine.index.reading import Container
from dirtmap.engine.model.namespace import Namespace
from dirtmap.engine.model.naming import encode_name
from dirtmap.engine.namespaces.image import Image
from dirtmap.engine.storefile.directory import read_entries
from dirtmap.engine.storefile.file import Snapshot, Store
from dirtmap.fmt.errors import BitmapError, Error
from dirtmap.fmt.index import KIND_STORE, Claim


@dataclass(frozen=True, slots=True)
class Address:
    """Where a bitmap is: its container's path, the UUID of its namespace as 16 bytes, its granularity in bytes."""

    path: str
    uuid: bytes
    granularity: int


@dataclass(slots=True)
class _Opened:
    """A store that stays open, and what it said under these headers: by namespace, its UUID and its bitmaps' names."""

    store: Store
    headers: bytes
    said: dict[str, tuple[bytes, frozenset[bytes]] | None]


class Lookup:
    """Looks addresses up for a program that asks often; use it as a context manager, in one thread.

    Args:
        host: whose names.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._index = host.index
        self._stores: dict[int, _Opened] = {}
        self._paths: dict[int, str] = {}
        host.stores()

    def close(self) -> None:
        """Closes what is open."""
        for opened in self._stores.values():
            opened.store.close()
        self._stores.clear()

    def __enter__(self) -> Lookup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def find(self, node: str, name: str) -> Address | None:
        """Where a bitmap is; None where there is none of that address.

        Raises:
            BitmapError: the address is not unique, or no name can be so.
            As `Host.resolve`.
        """
        try:
            claims = self._index.bitmap(node, name)
        except UnicodeEncodeError as error:
            raise BitmapError(f"bitmap {name!a} of {node!a}", "the name cannot be encoded") from error
        if len(claims) == 1 and self._holds(claims[0], node, name):
            claim = claims[0]
            return Address(self._paths[claim.container], claim.uuid, 1 << claim.granularity_bits)
        return self._ask(node, name)

    def _ask(self, node: str, name: str) -> Address | None:
        """The long way, where the index does not know, or says what is not so any more."""
        found = self._host.resolve(node)
        if found is None:
            return None
        for _, problem in self._index.refresh([os.path.abspath(found.container)]):
            if problem:
                raise problem
        known = self._index.container(os.path.abspath(found.container))
        for claim in self._index.bitmap(node, name):
            if known is not None and claim.container == known.number and claim.uuid == found.uuid:
                return Address(known.path, claim.uuid, 1 << claim.granularity_bits)
        return None

    def _holds(self, claim: Claim, node: str, name: str) -> bool:
        """True where the container says so, too, as it is now."""
        opened = self._stores.get(claim.container) or self._open(claim.container)
        if opened is None:
            return self._image_holds(claim, node, name)
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

    def _open(self, number: int) -> _Opened | None:
        path = self._paths[number] = self._index.path_of(number) or ""
        container: Container | None = self._index.container(path)
        if container is None or container.kind != KIND_STORE or path not in self._host.stores():
            return None
        store = Store(path)
        opened = self._stores[number] = _Opened(store, store.headers() or b"", {})
        return opened

    def _image_holds(self, claim: Claim, node: str, name: str) -> bool:
        found = self._host.resolve(node)
        if found is None or found.in_store or found.uuid != claim.uuid:
            return False
        try:
            with Image(self._paths[claim.container]) as image:
                return _says(image, node, claim.uuid, name)
        except Error:
            return False

    @staticmethod
    def _read(store: Store, node: str) -> tuple[bytes, frozenset[bytes]] | None:
        def read(snapshot: Snapshot) -> tuple[bytes, frozenset[bytes]] | None:
            record = snapshot.record(encode_name(node))
            if record is None:
                return None
            return record.uuid, frozenset(entry.name for entry in read_entries(snapshot, record))

        return store.read(read)


def _says(image: Namespace, node: str, namespace_uuid: bytes, name: str) -> bool:
    import uuid

    return image.name == node and image.uuid == str(uuid.UUID(bytes=namespace_uuid)) and name in image
