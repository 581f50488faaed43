"""The table of the kinds of containers. Another kind is one more class, in a module of its own, and one more row.

A method imports the rooms of its kind when it is called: whoever has images only never loads what stores need.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final

from dirtmap.engine.host.kind import Address, Kind, KindPort, Progress, Tracking
from dirtmap.engine.system import probe
from dirtmap.fmt.errors import BitmapError, BitmapNotFoundError, Error, LockedError

if TYPE_CHECKING:
    from dirtmap.engine.index.reading import KindReader
    from dirtmap.engine.model.infos import Disk, ImageInfo, Recovery
    from dirtmap.engine.model.namespace import Namespace
    from dirtmap.engine.model.report import CheckReport
    from dirtmap.engine.model.transaction import Transaction
    from dirtmap.engine.namespaces.place import Place
    from dirtmap.engine.storefile.file import Store
    from dirtmap.engine.system.file import File
    from dirtmap.engine.tracking.tracker import Tracker


def _remembered(host: KindPort, info: ImageInfo, node: str, image_uuid: str) -> ImageInfo:
    """The description of a damaged image, with what its place adds; what cannot be read is among its errors."""
    import uuid
    from dataclasses import replace

    from dirtmap.engine.namespaces.place import remembered
    from dirtmap.engine.namespaces.whereabouts import place_of

    try:
        place = place_of(host, node, uuid.UUID(image_uuid).bytes)
        place.refuse_twin(info.path)
        return remembered(info, place)
    except Error as error:
        return replace(info, errors=(*info.errors, str(error)))


class Qcow2Kind(Kind):
    """qcow2 images: each has the bitmaps of one node, in itself or, while it is tracked, in a store."""

    name = probe.QCOW2
    number = 1

    def probe(self, file: File) -> bool:
        """See `Kind`."""
        return probe.is_qcow2(file)

    @contextlib.contextmanager
    def open(self, host: KindPort, address: Address, *, force_share: bool) -> Iterator[Namespace]:
        """See `Kind`."""
        from dirtmap.engine.namespaces.image import Image

        path = address.path
        try:
            image = Image(path, host, force_share=force_share)
        except LockedError:
            if (found := self._checked_out(host, path)) is None:
                raise
            yield found  # whoever has the image open: its bitmaps are in the store
            return
        with image:
            image.place.refuse_twin(image.path)
            found = self._checked_out(host, path) if image.place.is_checked_out(image.path) else None
            if found is None:
                image.place.refuse_moved(image.path)
                yield image
        if found is not None:
            yield found

    def name_of(self, path: str) -> str | None:
        """See `Kind`."""
        from dirtmap.engine.qcow2.reading import read_identity

        identity = read_identity(path)
        return None if identity is None else identity[0]

    @staticmethod
    def _place_of(host: KindPort, node: str, image_uuid: str) -> Place:
        """The place record of an image that says that it is this node, and has this UUID."""
        import uuid

        from dirtmap.engine.namespaces.whereabouts import place_of

        return place_of(host, node, uuid.UUID(image_uuid).bytes)

    @staticmethod
    def _checked_out(host: KindPort, path: str) -> Namespace | None:
        """The bitmaps that a tracker has, or had when it died; None where they are in the image."""
        from dirtmap.engine.qcow2.reading import read_identity

        if (identity := read_identity(path)) is None:
            return None
        place = Qcow2Kind._place_of(host, *identity)
        if place.store is None or not place.is_checked_out(path):
            place.refuse_moved(path)
            return None
        from dirtmap.engine.namespaces.checked_out import CheckedOutImage

        return CheckedOutImage(path, host, place.store, place.node)

    def describe(self, host: KindPort, address: Address, file: File, *, force_share: bool) -> ImageInfo:
        """See `Kind`. Reads the image once, and of one without a name nothing else.

        Only if the bitmaps are not in the image, because a tracker has them or had them, it is opened as any other.
        """
        from dirtmap.engine.qcow2.reading import describe

        try:
            info, tracked = describe(file, force_share=force_share, locking=host.locking)
            if info.node is None or info.uuid is None:
                return info
            if info.errors:  # with one, nothing else opens the image
                return _remembered(host, info, info.node, info.uuid)
            from dirtmap.engine.namespaces.place import remembered  # what reads stores is needed from here on

            place = self._place_of(host, info.node, info.uuid)
            place.refuse_twin(address.path)
            if not tracked and not place.is_checked_out(address.path):
                place.refuse_moved(address.path)
                info = remembered(info, place)
                if not info.checkpoints:  # else bits have to be read
                    return info
        except LockedError:
            pass  # perhaps by its tracker
        return super().describe(host, address, file, force_share=force_share)

    def recover(self, host: KindPort, address: Address, names: Iterable[str]) -> list[Recovery]:
        """See `Kind`. Works on images that cannot be opened because of other bitmaps."""
        from dirtmap.engine.namespaces.image import recover
        from dirtmap.engine.namespaces.place import NO_PLACE
        from dirtmap.engine.qcow2.reading import read_identity

        path = address.path
        if (found := self._checked_out(host, path)) is not None:
            with found:
                return found.recover(names)
        place: Place = NO_PLACE
        if identity := read_identity(path):
            place = self._place_of(host, *identity)
            place.refuse_twin(path)
        return recover(path, names, place=place, locking=host.locking)

    @contextlib.contextmanager
    def transaction(self, host: KindPort, addresses: list[Address]) -> Iterator[list[Transaction]]:
        """See `Kind`. All of them are one image."""
        # The transaction locks and judges the image anew, and knows better who holds it.
        with self.open(host, addresses[0], force_share=True) as image, image.transaction() as bitmaps:
            yield [bitmaps] * len(addresses)

    def disk(self, host: KindPort, namespace: Namespace) -> Disk:
        """See `Kind`."""
        import os

        from dirtmap.engine.model.infos import Disk

        return Disk(os.path.abspath(namespace.path), self.name)

    def track(self, host: KindPort, namespace: Namespace, tracking: Tracking) -> Tracker:
        """See `Kind`."""
        from dirtmap.engine.host.tracked import track_image

        return track_image(host, namespace, tracking)

    def check(
        self, host: KindPort, path: str, *, repair: str | None, force_share: bool, progress: Progress | None
    ) -> CheckReport:
        """See `Kind`."""
        from dirtmap.engine.qcow2.check import check

        if repair is not None and (found := self._checked_out(host, path)) is not None:
            with found:
                status = found.tracking()
            if status and status.alive:
                raise LockedError(path, status.refusal)
            raise BitmapError(path, "its tracker has died; 'dirtmap recover' first")
        return check(path, repair=repair, force_share=force_share, progress=progress, locking=host.locking)

    def dump(self, path: str, *, with_hex: bool, force_share: bool) -> dict[str, Any]:
        """See `Kind`."""
        from dirtmap.engine.qcow2.dump import dump

        return dump(path, with_hex=with_hex, force_share=force_share)

    def reader(self, opened: Callable[[str], AbstractContextManager[Store]]) -> KindReader:
        """See `Kind`."""
        from dirtmap.engine.index.reading import KindReader, read_image

        return KindReader(
            self.number, self.probe, lambda get, file, blank, known, force_share: read_image(file, blank, force_share)
        )


class StoreKind(Kind):
    """Stores: each has the bitmaps of any number of nodes and devices."""

    name = probe.STORE
    number = 2
    is_image = False

    def probe(self, file: File) -> bool:
        """See `Kind`."""
        return probe.is_store(file)

    @contextlib.contextmanager
    def open(self, host: KindPort, address: Address, *, force_share: bool) -> Iterator[Namespace]:
        """See `Kind`."""
        from dirtmap.engine.namespaces.stored import StoredImage

        with host.opened(address.path) as target:
            yield StoredImage(target, self._named(address), host)

    @staticmethod
    def _named(address: Address) -> str:
        if address.node is None:
            raise BitmapError(address.path, "a store of many images: name one of its nodes")
        return address.node

    def describe(self, host: KindPort, address: Address, file: File, *, force_share: bool) -> ImageInfo:
        """See `Kind`. A store's path stands for all that it holds."""
        if address.node is not None:
            return super().describe(host, address, file, force_share=force_share)
        from dirtmap.engine.namespaces.stored import describe_store

        with host.opened(address.path) as target:
            return describe_store(target)

    @contextlib.contextmanager
    def transaction(self, host: KindPort, addresses: list[Address]) -> Iterator[list[Transaction]]:
        """See `Kind`."""
        from dirtmap.engine.model.naming import encode_name
        from dirtmap.engine.namespaces.changing import transaction
        from dirtmap.engine.namespaces.recover import recover_tracked_device

        names = [self._named(address) for address in addresses]
        with host.opened(addresses[0].path) as target:
            for name in names:
                recover_tracked_device(host, target, encode_name(name))
            with transaction(target) as namespaces:
                yield [namespaces[name] for name in names]

    def disk(self, host: KindPort, namespace: Namespace) -> Disk:
        """See `Kind`. A device's disk is its root's."""
        import os
        import uuid

        from dirtmap.engine.model.infos import Disk
        from dirtmap.engine.namespaces.stored import StoredImage
        from dirtmap.fmt import store

        assert isinstance(namespace, StoredImage)
        record = namespace.record()
        if record.kind != store.KIND_DEVICE:
            return Disk(os.fsdecode(record.path), "raw")
        root = host.open_node(record.root_uuid)
        if root is None:
            missing = uuid.UUID(bytes=record.root_uuid)
            raise BitmapNotFoundError(namespace.where, f"its root, {missing}, is not known; 'index scan' finds it")
        with contextlib.closing(root):
            return root.disk()

    def track(self, host: KindPort, namespace: Namespace, tracking: Tracking) -> Tracker:
        """See `Kind`."""
        from dirtmap.engine.host.tracked import track_stored

        return track_stored(host, namespace, tracking)

    def check(
        self, host: KindPort, path: str, *, repair: str | None, force_share: bool, progress: Progress | None
    ) -> CheckReport:
        """See `Kind`."""
        from dirtmap.engine.namespaces.store_check import check

        if repair is not None:
            host.refuse_copy_at(path)
        return check(path, repair=repair, progress=progress, expect=host.expect, locking=host.locking)

    def dump(self, path: str, *, with_hex: bool, force_share: bool) -> dict[str, Any]:
        """See `Kind`."""
        from dirtmap.engine.namespaces.store_dump import dump

        return dump(path, with_hex=with_hex)

    def reader(self, opened: Callable[[str], AbstractContextManager[Store]]) -> KindReader:
        """See `Kind`."""
        from dirtmap.engine.index.reading import KindReader, read_store

        return KindReader(
            self.number,
            self.probe,
            lambda get, file, blank, known, force_share: read_store(opened(blank.path), get, blank, known),
        )


KINDS: Final[tuple[Kind, ...]] = (Qcow2Kind(), StoreKind())
