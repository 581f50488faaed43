"""`Parts`: what is behind a host: its stores, what names mean, and who may change nodes and devices.

It is also what kinds of containers, namespaces and trackers ask of their host: see the ports that it implements,
`dirtmap.engine.namespaces.ports.HostPort` and `dirtmap.engine.host.kind.KindPort`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import uuid as uuids
from typing import TYPE_CHECKING

from dirtmap.engine.host.defaults import default_index, default_store
from dirtmap.engine.host.handle import Handle
from dirtmap.engine.host.kind import Address, Kind
from dirtmap.engine.system.file import existing, failure, open_file
from dirtmap.fmt.errors import StorageError

if TYPE_CHECKING:
    from dirtmap.engine.host.registry import Registry
    from dirtmap.engine.host.resolver import Resolver
    from dirtmap.engine.host.stores import Stores
    from dirtmap.engine.storefile.file import Store
    from dirtmap.engine.system.file import File
    from dirtmap.engine.system.locks import Locking


# Of an absolute path it is the same at any time; who makes a host for each of many images asks for few of them.
_normal = functools.lru_cache(maxsize=16)(os.path.normpath)


def _absolute(path: str) -> str:
    return _normal(path) if path.startswith("/") else os.path.abspath(path)


class Parts:
    """What is behind a `Host`, made when it is needed: whoever uses paths alone needs little of it.

    Args:
        store: the default store; the user's normal one where None.
        index: path of the index; the user's normal one where None.
        kinds: of containers.
        locking: how to take the locks of images and stores.
        trust: see `Host`.

    Attributes:
        store: path of the default store, as given.
        home: the same, absolute: the process may change its folder.
        index: path of the index, absolute.
        normal: the user's normal default store, absolute.
        chosen: True where the default store was given, or the environment names it.
        kinds: as given.
        locking: as given.
        trust: as given.
    """

    def __init__(
        self,
        store: str | os.PathLike[str] | None,
        index: str | os.PathLike[str] | None,
        kinds: tuple[Kind, ...],
        locking: Locking,
        *,
        trust: bool,
    ) -> None:
        self.kinds, self.locking, self.trust = kinds, locking, trust
        chosen = None if index is None else existing(os.fspath(index))
        said = os.environ.get("DIRTMAP_STORE") if store is None else existing(os.fspath(store))
        # Absolute: the process may change its folder before they are needed.
        self.index = _absolute(default_index(chosen))
        self.chosen = bool(said)
        self.store = said or default_store(chosen)
        self.home = _absolute(self.store)
        self.normal = self.home if store is None else _absolute(default_store(self.index))
        self._made: tuple[Stores, Resolver, Registry] | None = None
        self._guard = threading.Lock()

    def _all(self) -> tuple[Stores, Resolver, Registry]:
        """What is behind it, made when it is needed: whoever uses paths alone needs none of it."""
        with self._guard:
            if self._made is not None:
                return self._made
            from dirtmap.engine.host.registry import Registry
            from dirtmap.engine.host.resolver import Resolver
            from dirtmap.engine.host.stores import Stores

            fallback = None
            if self.normal != self.home:
                fallback = Stores(self.normal, self.normal, self.index, self.kinds, self.locking, trust=self.trust)
            stores = Stores(self.home, self.store, self.index, self.kinds, self.locking, fallback, trust=self.trust)
            names = Resolver(stores, self.kinds, self)
            self._made = stores, names, Registry(stores, names, self)
            return self._made

    @property
    def stores(self) -> Stores:
        """The containers that the default store knows."""
        return self._all()[0]

    @property
    def names(self) -> Resolver:
        """What names mean."""
        return self._all()[1]

    @property
    def registry(self) -> Registry:
        """The nodes and devices, to be changed."""
        return self._all()[2]

    @property
    def exists(self) -> bool:
        """True where there is a default store: the one that was chosen, or the user's normal one."""
        return os.path.exists(self.home) or os.path.exists(self.normal)

    @property
    def notice(self) -> str | None:
        """See `Stores.notice`."""
        return None if self._made is None else self._made[0].notice

    def has_store(self) -> bool:
        """See `Host.has_store`."""
        try:
            os.stat(self.home)
        except FileNotFoundError as error:
            if os.path.islink(self.home):
                raise StorageError(self.store, "a link to what is not there", error.errno) from error
            if self.chosen:
                raise StorageError(self.store, "no such store; 'store create' makes one", error.errno) from error
            return False
        except (OSError, ValueError) as error:
            raise failure(self.store, "open", error) from error
        return True

    def close(self) -> None:
        """Closes the stores that are open; it may be used again."""
        if self._made is not None:
            self._made[0].close()

    def open_file(self, path: str) -> File:
        """Opens the file at a path. Errors as `dirtmap.engine.system.file.open_file`."""
        return open_file(path, abspath=self.home if path == self.store else None)  # the folder may be another by now

    def kind_in(self, file: File) -> Kind | None:
        """The kind of container that a file is; None where it is none. Errors as `File.read`."""
        for kind in self.kinds:
            if kind.probe(file):
                return kind
        return None

    def kind_of(self, path: str) -> Kind | None:
        """The kind of the container at a path; None where it is none. Errors as `open_file` and `kind_in`."""
        with self.open_file(path) as file:
            return self.kind_in(file)

    def opened(self, path: str | None = None) -> contextlib.AbstractContextManager[Store]:
        """See `HostPort`."""
        return self.stores.opened(path)

    def watch(self, store: Store) -> None:
        """See `HostPort`."""
        self.stores.watch(store)

    def report(self, store: Store) -> None:
        """See `HostPort`."""
        self.stores.report(store)

    def expect(self, store: Store) -> str | None:
        """See `KindPort`; returns where the store was when it was seen last, None where it was not."""
        return self.stores.expect(store)

    def refuse_copy_at(self, path: str) -> None:
        """See `KindPort`."""
        self.stores.refuse_copy_at(path)

    def devices_on(self, root: bytes) -> dict[str, list[bytes]]:
        """See `HostPort`."""
        return self.names.devices_of(root) if self.exists else {}

    def place_of(self, name: str, uuid: bytes) -> tuple[str, bytes] | None:
        """See `HostPort`."""
        from dirtmap.engine.model.naming import encode_name

        found = self.names.place_of(name, uuid) if self.exists else None
        if found is None:
            return None
        return self.home if found.store == self.store else found.store, encode_name(found.name)

    def open_node(self, uuid: bytes) -> Handle | None:
        """See `KindPort`."""
        found = self.names.by_uuid(uuid) if self.exists else None
        if found is None or found.is_device:
            return None
        address = Address(found.store, found.name) if found.in_store else Address(found.path)
        handle = Handle(self, self.kind_of(address.path) or self.kinds[0], address)
        if handle.uuid is not None and uuids.UUID(handle.uuid).bytes == uuid:
            return handle
        handle.close()
        return None

    def change_root(self, device: str, root: str, content_unchanged: bool) -> None:
        """See `KindPort`."""
        self.registry.set_root(device, root, content_unchanged=content_unchanged)
