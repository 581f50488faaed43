"""`Host`: the nodes and devices of a host, and which changes of them would break an address.

Each act is refused before anything is written if it would. What names mean: see `dirtmap.engine.host.resolver`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace

from dirtmap.engine.host.resolver import Found, Names
from dirtmap.engine.identity import identity_of, identity_of_disk, lasting_identity
from dirtmap.engine.model.infos import ImageInfo
from dirtmap.engine.model.naming import decode_name, encode_name
from dirtmap.engine.namespaces import devices, nodes
from dirtmap.engine.namespaces.condition import refuse_tracked
from dirtmap.engine.namespaces.image import Image
from dirtmap.engine.namespaces.place import Keeper, holding
from dirtmap.engine.qcow2.reading import read_identity
from dirtmap.engine.storefile.chain import checkpoints_of, with_checkpoints
from dirtmap.engine.storefile.deferred import afterwards, changing_a_store
from dirtmap.engine.storefile.file import Change, Store
from dirtmap.engine.storefile.holds import held_by
from dirtmap.engine.system.file import is_same_file
from dirtmap.fmt import store
from dirtmap.fmt.errors import BitmapError, Error, StorageError, printable

RESERVED = store.CONTAINER_PREFIX.decode()


class Host(Names):
    """The nodes and devices of all stores that a default store knows. Arguments and attributes as `Names`."""

    def _require_free(self, name: str) -> None:
        if name.startswith(RESERVED):
            raise BitmapError(f"node '{name}'", f"names that begin with '{RESERVED}' are reserved")
        for found in self.asked(lambda here: here.claims(name)):
            raise BitmapError(f"{found.store}: {found.what} '{name}'", "the name is taken")
        self._require_all_stores()

    def add_node(self, name: str, image: str) -> None:
        """A node whose bitmaps the default store holds; see `nodes.add_node`."""
        self._require_free(name)
        self._refuse_second_name(image, *nodes.KINDS)
        with self.opened(make=True) as target:
            nodes.add_node(target, name, image)

    def _refuse_second_name(self, image: str, *kinds: int) -> None:
        """Refuses an image that is a node of such a kind in any store but the default one; see `nodes`."""
        path = os.path.abspath(image)
        for other in self.every_store():
            if other != self.home:
                with Store(other) as known:
                    records = known.read(lambda snapshot: list(snapshot.table()))
                nodes.refuse_second_name(records, path, identity_of(path), *kinds)

    def add_qcow2(self, name: str, image: str, *, new_identity: bool = False) -> None:
        """A node that is a qcow2 image; see `nodes.add_qcow2`."""
        found = self._unique(name)
        if found is None or found.kind != store.KIND_PLACE or found.store != self.store:
            self._require_free(name)
        if new_identity and (identity := read_identity(image)) and (place := self.place_of(*identity)):
            self._refuse_original(image, place)
        self._refuse_second_name(image, store.KIND_NODE)
        with self.opened(make=True) as target:
            nodes.add_qcow2(target, name, image, new_identity=new_identity)

    @staticmethod
    def _refuse_original(image: str, place: Found) -> None:
        """Refuses a new identity for what is no copy: its tracker, holds and devices know it by the one it has."""
        if is_same_file(place.path, image):
            what = f"is node '{printable(place.name)}' itself, and no copy; 'node rename' gives it another name"
            raise BitmapError(image, what)

    def remember_store(self, path: str) -> None:
        """Has the default store know another store, so that names in it are found.

        Raises:
            As `opened`.
        """
        path = os.path.realpath(path)  # as a scan finds it
        if path == os.path.realpath(self.home):
            return
        with Store(path) as other:
            store_uuid = other.read(lambda snapshot: snapshot.header.uuid)
        with self.opened(make=True) as target:
            name = store.container_name(os.fsencode(path))
            known = target.record(name)
            if known is None or known.uuid != store_uuid:
                with target.change() as change:
                    remember_container(change, path, store_uuid)

    def remove_node(self, name: str) -> None:
        """Forgets a node.

        Raises:
            BitmapError: there is none of that name, it has bitmaps, or is a device's root.
            Error: a store cannot be read that may have such a device.
        """
        found = self.require(name, store.KIND_NODE, store.KIND_PLACE)
        for names in self.devices_of(found.uuid).values():
            what = f"root of device '{decode_name(names[0])}'; give that another with 'device set-root', or remove it"
            raise BitmapError(f"{found.store}: node '{name}'", what)
        self._require_all_stores()  # one that cannot be read may have a device on it
        with self.opened(found.store) as target:
            nodes.remove_node(target, name)

    def rename_node(self, name: str, new: str, *, with_bitmaps: bool = False) -> None:
        """Gives a node another name; see `nodes.rename_node`."""
        found = self.require(name, store.KIND_NODE, store.KIND_PLACE)
        self._require_free(new)
        with changing_a_store(), self.opened(found.store) as target:
            nodes.rename_node(target, name, new, with_bitmaps=with_bitmaps, keep=self.keep)

    def resize_node(self, name: str) -> int:
        """Adopts the size that a node's image has now; see `nodes.resize_node`."""
        with self.opened(self.require(name, store.KIND_NODE, store.KIND_PLACE).store) as target:
            return nodes.resize_node(target, name)

    def confirm_node(self, name: str) -> None:
        """States that a node's bitmaps are right; see `nodes.confirm_node`."""
        with self.opened(self.require(name, store.KIND_NODE, store.KIND_PLACE).store) as target:
            nodes.confirm_node(target, name)

    def add_device(self, name: str, root: str) -> None:
        """A device on a node, in the default store; see `devices.add_device`."""
        self._require_free(name)
        found = self.root(root)
        with self.opened(make=True) as target:
            devices.add_device(target, name, found)

    def set_root(self, name: str, root: str, *, content_unchanged: bool = False) -> None:
        """Gives a device another root; see `devices.set_root`."""
        found = self.require(name, store.KIND_DEVICE)
        with self.opened(found.store) as target:
            devices.set_root(target, name, self.root(root), content_unchanged=content_unchanged)

    def remove_device(self, name: str) -> None:
        """Forgets a device; see `devices.remove_device`."""
        found = self.require(name, store.KIND_DEVICE)
        with self.opened(found.store) as target:
            devices.remove_device(target, name)

    def refuse_tracked(self, path: str) -> None:
        """Refuses a raw image that is tracked as a node; by its path, so that no index is needed.

        Raises:
            LockedError: names the tracker.
            FormatError: the default store is damaged.
        """
        for where in self.remembered():
            try:
                with Store(where) as target:
                    records = target.read(lambda snapshot: list(snapshot.table()))
            except Error:
                continue  # another store, which keeps nobody from using what is not in it
            for record in records:
                if record.tracked and is_same_file(record.path, path):
                    refuse_tracked(where, record)

    # Images with a name.

    def refuse_twin(self, path: str, name: str, image_uuid: str) -> None:
        """Refuses an image that carries the identity of another file; see `nodes.refuse_twin`."""
        if place := self.place_of(name, image_uuid):
            with self.open_store(place.store) as target:
                nodes.refuse_twin(target, path, place.name, image_uuid)

    def keep(self, image: Image) -> None:
        """Has an image with a name know what the host keeps about it."""
        if image.name is not None and image.uuid is not None:
            image.keeper = self.keeper_of(image.path, image.name, image.uuid)

    def keeper_of(self, path: str, name: str, image_uuid: str) -> Keeper:
        """What the host keeps about the image at a path, if one of its stores has its place."""
        place = self.place_of(name, image_uuid)
        return Keeper() if place is None else _Keeper(self, replace(place, path=os.path.abspath(path)))

    def marked_busy(self, info: ImageInfo) -> ImageInfo:
        """The same, with the bitmaps busy that are held."""
        if (
            info.node is None
            or info.uuid is None
            or not (held := self.keeper_of(info.path, info.node, info.uuid).held())
        ):
            return info
        return replace(info, bitmaps=tuple(replace(bitmap, busy=bitmap.name in held) for bitmap in info.bitmaps))


class _Keeper(Keeper):
    """Holds on the bitmaps of a qcow2 image are in the record of its place; devices on it stay right."""

    def __init__(self, host: Host, found: Found) -> None:
        self._host, self._found = host, found
        self.store = host.home if found.store == host.store else os.path.abspath(found.store)

    def look_after(self, target: Store) -> None:
        self._host.look_after(target)

    def held(self) -> dict[str, str]:
        with self._host.open_store(self._found.store) as target:
            record = target.record(encode_name(self._found.name))
        return held_by(record) if record else {}

    def checkpoints(self, recording: Mapping[str, bool]) -> list[str]:
        with self._host.open_store(self._found.store) as target:
            record = target.record(encode_name(self._found.name))
        return checkpoints_of(f"{target.path}: {record.label}", record, recording) if record else []

    def keep_checkpoints(self, chain: list[str]) -> None:
        def keep() -> None:
            with self._host.opened(self._found.store) as target, target.change() as change:
                record = change.table.get(encode_name(self._found.name))
                same = record is not None and record.uuid == self._found.uuid
                if record and same and (kept := with_checkpoints(record, chain)) != record:
                    change.table.put(kept)

        afterwards(keep)

    def _look(self, *, lasting: bool = False) -> store.Identity | None:
        with contextlib.suppress(StorageError):
            path = self._found.path
            return lasting_identity(path, of_disk=True) if lasting else identity_of_disk(path)
        return None

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        on_it = self._host.devices_of(self._found.uuid)
        before = self._look() if on_it else None
        try:
            yield
        finally:
            if before is not None and (after := self._look(lasting=True)) is not None and after != before:

                def confirm() -> None:
                    for path, names in on_it.items():
                        with self._host.opened(path) as target:
                            devices.confirm_roots(target, names, before, after)

                afterwards(confirm)

    @contextlib.contextmanager
    def hold(self, where: str, name: str, owner: str) -> Iterator[None]:
        with (
            self._host.opened(self._found.store) as target,
            holding(target, encode_name(self._found.name), name, owner),
        ):
            yield


def remember_container(change: Change, path: str, container_uuid: bytes) -> bool:
    """Has a store know where a container is that has no place there by name.

    Args:
        change: of the default store.
        path: absolute.
        container_uuid: of a store; zeros for an image.

    Returns:
        True where it did not know.
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
