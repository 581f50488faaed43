"""`Registry`: adds, changes and removes the nodes and devices of a host, and refuses changes that break an address.

It refuses before anything is written. What names mean: see `dirtmap.engine.host.resolver`.
"""

from __future__ import annotations

import os
import uuid

from dirtmap.engine.host.resolver import NodeMatch, Resolver
from dirtmap.engine.host.stores import Stores
from dirtmap.engine.identity import identity_of
from dirtmap.engine.model.naming import decode_name, encode_name
from dirtmap.engine.namespaces import devices, nodes
from dirtmap.engine.namespaces.condition import refuse_tracked
from dirtmap.engine.namespaces.ports import HostPort
from dirtmap.engine.qcow2.reading import read_identity
from dirtmap.engine.storefile.file import Change
from dirtmap.engine.system.file import is_same_file
from dirtmap.fmt import store
from dirtmap.fmt.directory import name_fault
from dirtmap.fmt.errors import BitmapError, Error, printable
from dirtmap.fmt.store import Record

RESERVED = store.CONTAINER_PREFIX.decode()
_PREFIXES = ("file:", "node:", "device:")  # of targets
_SHOWN = 64  # characters of a name that cannot be


class Registry:
    """The nodes and devices of all stores that a default store knows.

    Args:
        stores: of the host.
        names: resolves names on the host.
        host: given to the images that are opened.
    """

    def __init__(self, stores: Stores, names: Resolver, host: HostPort) -> None:
        self._stores, self._names, self._host = stores, names, host

    @staticmethod
    def _require_usable(name: str, what: str = "node") -> None:
        """Refuses a name that no command could find again.

        Raises:
            BitmapError: says why.
        """
        if (fault := _name_fault(name)) is not None:
            raise BitmapError(f"{what} '{name if len(name) <= _SHOWN else name[:_SHOWN] + '...'}'", fault)

    def _require_free(self, name: str, what: str = "node") -> None:
        self._require_usable(name, what)
        for found in self._names.asked(lambda here: here.claims(name)):
            raise BitmapError(f"{found.store}: {found.what} '{name}'", "the name is taken")
        self._names.require_all_stores(name)

    def add_node(self, name: str, image: str, *, raw: bool = False) -> None:
        """Adds a node whose bitmaps the default store holds; see `nodes.add_node`."""
        self._require_free(name)
        self._refuse_second_name(image, *nodes.KINDS)
        with self._stores.opened(make=True) as target:
            nodes.add_node(target, name, image, raw=raw, on_image=self._stores.records_on)

    def _refuse_second_name(self, image: str, *kinds: int) -> None:
        """Refuses an image that is a node of these kinds in any store but the default one; see `nodes`."""
        path = os.path.abspath(image)
        for other in self._names.every_store():
            if other != self._stores.home:
                nodes.refuse_second_name(self._on_image(other, path), path, identity_of(path), *kinds)

    def _on_image(self, where: str, path: str) -> list[Record]:
        """The nodes of a store of which some may be the image at a path; see `Stores.records_on`."""
        place = identity_of(path).place
        with self._stores.kept(where) as known:
            return known.read(lambda snapshot: list(self._stores.records_on(snapshot, path, place)))

    def add_qcow2(self, name: str, image: str, *, new_identity: bool = False) -> None:
        """Adds a node that is a qcow2 image; see `nodes.add_qcow2`."""
        self._require_usable(name)
        found = self._names.unique(name)
        if found is None or found.kind != store.KIND_PLACE or found.store != self._stores.store:
            self._require_free(name)
        if (
            new_identity
            and (identity := read_identity(image))
            and (place := self._names.place_of(identity[0], uuid.UUID(identity[1]).bytes))
        ):
            self._refuse_original(image, place)
        self._refuse_second_name(image, store.KIND_NODE)
        with self._stores.opened(make=True) as target:
            on_image = self._stores.records_on
            nodes.add_qcow2(self._host, target, name, image, new_identity=new_identity, on_image=on_image)

    @staticmethod
    def _refuse_original(image: str, place: NodeMatch) -> None:
        """Refuses a new identity for an original: its tracker, holds and devices refer to the identity it has."""
        if is_same_file(place.path, image):
            what = f"is node '{printable(place.name)}' itself, and no copy; 'node rename' gives it another name"
            raise BitmapError(image, what)

    def remember_store(self, path: str) -> None:
        """Records another store in the default store, so that names in it are found.

        Raises:
            As `Stores.opened`.
        """
        path = os.path.realpath(path)  # as a scan finds it
        if path == os.path.realpath(self._stores.home):
            return
        with self._stores.kept(path) as other:
            store_uuid = other.read(lambda snapshot: snapshot.header.uuid)
        with self._stores.opened(make=True) as target:
            name = store.container_name(os.fsencode(path))
            known = target.record(name)
            if known is None or known.uuid != store_uuid:
                with target.change() as change:
                    remember_container(change, path, store_uuid)

    def remove_node(self, name: str) -> None:
        """Removes a node.

        Raises:
            BitmapError: no such node, it has bitmaps, or it is the root of a device.
            Error: a store that may have such a device cannot be read.
        """
        found = self._names.require(name, store.KIND_NODE, store.KIND_PLACE)
        for names in self._names.devices_of(found.uuid).values():
            what = f"root of device '{decode_name(names[0])}'; give that another with 'device set-root', or remove it"
            raise BitmapError(f"{found.store}: node '{name}'", what)
        for problem in self._stores.problems():  # an unreadable store may have a device on this node
            raise problem
        with self._stores.opened(found.store) as target:
            nodes.remove_node(self._host, target, found.name)

    def rename_node(self, name: str, new: str, *, with_bitmaps: bool = False) -> None:
        """Renames a node; see `nodes.rename_node`."""
        found = self._names.require(name, store.KIND_NODE, store.KIND_PLACE)
        self._require_free(new)
        with self._stores.opened(found.store) as target:
            nodes.rename_node(self._host, target, found.name, new, with_bitmaps=with_bitmaps)

    def resize_node(self, name: str) -> int:
        """Adopts the present size of a node's image; see `nodes.resize_node`. Returns it, in bytes."""
        found = self._names.require(name, store.KIND_NODE, store.KIND_PLACE)
        with self._stores.opened(found.store) as target:
            return nodes.resize_node(target, found.name)

    def confirm_node(self, name: str) -> None:
        """States that a node's bitmaps are right; see `nodes.confirm_node`."""
        found = self._names.require(name, store.KIND_NODE, store.KIND_PLACE)
        with self._stores.opened(found.store) as target:
            nodes.confirm_node(target, found.name)

    def relocate_node(self, name: str, path: str, *, confirm: bool, move: bool, raw: bool) -> bool:
        """Points a raw node, and the devices on it, to another place; see `nodes.relocate_node`.

        Returns:
            True where its bitmaps stay as they are; False where they are all dirty now, or were before a ``move``.
        """
        found = self._names.require(name, store.KIND_NODE, store.KIND_PLACE)
        path = os.path.abspath(path)
        if not move:
            for other in self._names.every_store():
                others = [record for record in self._on_image(other, path) if record.uuid != found.uuid]
                nodes.refuse_second_name(others, path, identity_of(path), *nodes.KINDS)
        for problem in self._stores.problems():  # an unreadable store may have a device on this node
            raise problem
        on_it = self._names.devices_of(found.uuid)
        for where, names in on_it.items():
            with self._stores.opened(where) as target:
                devices.refuse_relocation(target, names)
        with self._stores.opened(found.store) as target:
            how = {"confirm": confirm, "move": move, "raw": raw}
            done = nodes.relocate_node(target, found.name, path, **how, on_image=self._stores.records_on)
        confirmed = done.kept and not move
        for where, names in on_it.items():
            with self._stores.opened(where) as target:
                devices.relocate_roots(target, names, path, now=done.now, before=done.before, confirmed=confirmed)
        return done.kept

    def add_device(self, name: str, root: str) -> None:
        """Adds a device on a node, in the default store; see `devices.add_device`."""
        self._require_free(name, "device")
        found = self._names.root(root)
        with self._stores.opened(make=True) as target:
            devices.add_device(target, name, found)

    def set_root(self, name: str, root: str, *, content_unchanged: bool = False) -> None:
        """Gives a device another root; see `devices.set_root`."""
        found = self._names.require(name, store.KIND_DEVICE)
        with self._stores.opened(found.store) as target:
            devices.set_root(target, found.name, self._names.root(root), content_unchanged=content_unchanged)

    def remove_device(self, name: str) -> None:
        """Removes a device; see `devices.remove_device`."""
        found = self._names.require(name, store.KIND_DEVICE)
        with self._stores.opened(found.store) as target:
            devices.remove_device(target, found.name)

    def refuse_tracked_image(self, path: str) -> None:
        """Refuses a raw image that is tracked as a node; see `dirtmap.engine.namespaces.condition.refuse_tracked`.

        Needs no index; with one it reads only records that may be of the image.

        Raises:
            LockedError: the image is tracked; the error names the process.
            FormatError: the default store is damaged.
        """
        for where in self._stores.remembered():
            try:
                records = self._on_image(where, os.path.abspath(path))
            except Error:
                continue  # damage to one store does not forbid images of others
            for record in records:
                if record.tracked and is_same_file(record.path, path):
                    refuse_tracked(f"{where}: {record.label}", record)


def _name_fault(name: str) -> str | None:
    """Why no command could find a node or device of that name; None where every one can."""
    if name.startswith(RESERVED):
        return f"names that begin with '{RESERVED}' are reserved"
    if prefix := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None):
        return f"a name cannot begin with '{prefix}', which says what kind of target follows"
    if name.startswith("-"):
        return "a name cannot begin with '-', as options do"
    if any(character < " " or character == "\x7f" for character in name):
        return "a name cannot have control characters"
    fault = name_fault(encode_name(name))
    return None if fault is None else f"the {fault}"


def remember_container(change: Change, path: str, container_uuid: bytes) -> bool:
    """Records in a store the path of a container that it does not know by a name.

    Args:
        change: of the default store.
        path: of the container, absolute.
        container_uuid: of a store, 16 bytes; zeros for an image.

    Returns:
        True if the path was not known before.
    """
    name = store.container_name(os.fsencode(path))
    known = change.table.get(name)
    if known is None or known.uuid != container_uuid:
        change.table.put(
            store.Record(
                name=name,
                kind=store.KIND_CONTAINER,
                uuid=container_uuid,
                size=0,
                generation=change.generation,
                path=os.fsencode(path),
            )
        )
    return known is None
