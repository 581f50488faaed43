"""Begins to track an image: chooses the namespaces that its tracker feeds, and makes it.

raw node         the node's namespace in its store
qcow2 node       its bitmaps, checked out into the store that remembers its place
device           its namespace, and that of its root node, which is one of the two above
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace

from dirtmap.engine.host.kind import KindPort, Tracking
from dirtmap.engine.model.namespace import Namespace
from dirtmap.engine.model.naming import decode_name, encode_name, label
from dirtmap.engine.namespaces.check_in import check_in
from dirtmap.engine.namespaces.checked_out import CheckedOutImage
from dirtmap.engine.namespaces.condition import refuse_tracked
from dirtmap.engine.namespaces.image import Image, bitmap_of_slot
from dirtmap.engine.namespaces.stored import StoredImage
from dirtmap.engine.qcow2.commit import Kept, commit, require_writable, set_tracked
from dirtmap.engine.qcow2.layout import Layout, read_layout
from dirtmap.engine.qcow2.reading import write_session
from dirtmap.engine.session.peers import path_of
from dirtmap.engine.storefile.session import peer_of
from dirtmap.engine.system.file import File
from dirtmap.engine.tracking.home import Home
from dirtmap.engine.tracking.recorder import Setup
from dirtmap.engine.tracking.tracker import Tracker
from dirtmap.fmt import directory, store
from dirtmap.fmt.errors import BitmapError, BitmapNotFoundError, printable
from dirtmap.fmt.store import Record


def track_stored(host: KindPort, namespace: Namespace, tracking: Tracking) -> Tracker:
    """Tracks a node or a device of a store; see `dirtmap.engine.host.handle.Handle.track`."""
    assert isinstance(namespace, StoredImage)
    namespace.require_same_size()
    if namespace.record().kind == store.KIND_DEVICE:
        return _track_device(host, namespace, tracking)
    if tracking.store is not None:
        raise TypeError("store is an option of qcow2 images, whose bitmaps are not in a store already")
    home = Home(host, namespace.abspath, encode_name(namespace.name or ""))
    try:
        if home.store.read(home.needs_recovery):
            namespace.recover_session()
        record = home.store.read(home.record)
        homes = [tracking.device, home] if tracking.device else [home]
        setup = Setup(homes, os.fsdecode(record.path), tracking.options, roots=tracking.roots)
        tracker: Tracker = tracking.make(setup)
        return tracker
    except BaseException:
        home.close()
        raise


def _track_device(host: KindPort, device: StoredImage, tracking: Tracking) -> Tracker:
    """Tracks a device, and its root node with it."""
    root = host.open_node(device.record().root_uuid)
    if root is None:
        missing = uuid.UUID(bytes=device.record().root_uuid)
        what = f"its root, {missing}, is not known; 'index scan' finds images and stores"
        raise BitmapNotFoundError(f"{device.path}: device '{printable(device.name or '')}'", what)
    with contextlib.closing(root):
        root.recover_dead()  # and the device before it, as far as they had it in common
        home = Home(host, device.abspath, encode_name(device.name or ""))
        try:
            if home.store.read(home.needs_recovery):
                device.recover_session()
            # Absolute: it is asked for again when the device gets another root.
            options = replace(tracking.options, live=os.path.abspath(tracking.options.live_root))
            chosen = replace(tracking, options=options, device=home)
            return root.track_with(replace(chosen, roots=DeviceRoots(host, device, chosen)))
        except BaseException:
            home.close()
            raise


def adopt(host: KindPort, namespace: Namespace, tracking: Tracking) -> Tracker:
    """Takes over a session whose tracker has died while others mark in it: of a node, of a device, or of both."""
    assert isinstance(namespace, StoredImage | CheckedOutImage)
    own = Home(host, *namespace.address)
    homes = [own]
    try:
        record = own.store.read(own.record)
        if (peer := peer_of(record)) is not None:
            homes.append(Home(host, path_of(own.store.abspath, peer), peer.name))
        homes.sort(key=lambda home: home.store.read(home.record).kind != store.KIND_DEVICE)
        node, device = homes[-1], homes[0] if len(homes) > 1 else None
        root = node.store.read(node.record)
        image, check_in_own, roots = os.fsdecode(root.path), None, None
        if root.kind == store.KIND_PLACE:

            def check_in_own() -> object:
                return check_in(host, image, node.store.abspath, node.name, own=True)

        if isinstance(namespace, StoredImage) and own is device:
            options = replace(tracking.options, live=os.path.abspath(tracking.options.live_root))
            roots = DeviceRoots(host, namespace, replace(tracking, options=options, device=device))
        setup = Setup(homes, image, tracking.options, check_in_own, roots, adopt=True, own=own)
        tracker: Tracker = tracking.make(setup)
        return tracker
    except BaseException:
        for home in homes:
            home.close()
        raise


class DeviceRoots:
    """The roots of a tracked device, one after the other; see `dirtmap.engine.tracking.recorder.Roots`."""

    def __init__(self, host: KindPort, device: StoredImage, tracking: Tracking) -> None:
        self._host, self._tracking = host, tracking
        self._store, self._name = device.abspath, device.name or ""

    @contextlib.contextmanager
    def opened(self) -> Iterator[Callable[[str, bool, Callable[[Setup], object]], object]]:
        """See `Roots`. Opened anew: the tool may have closed the device that it had."""
        with self._host.opened(self._store) as target:
            device = StoredImage(target, self._name, self._host)

            def change(root: str, content_unchanged: bool, begin: Callable[[Setup], object]) -> None:
                try:
                    self._host.change_root(self._name, root, content_unchanged)
                finally:
                    track_stored(self._host, device, replace(self._tracking, device=None, make=begin))

            yield change


def track_image(host: KindPort, namespace: Namespace, tracking: Tracking) -> Tracker:
    """Checks a qcow2 image's bitmaps out and tracks it; see `dirtmap.engine.host.handle.Handle.track`."""
    assert isinstance(namespace, Image)
    image = namespace
    path = os.path.abspath(tracking.store or image.place.store or host.home)
    if image.name is None or image.uuid is None or not os.path.exists(path):
        raise _no_place(image)
    name = encode_name(image.name)
    with write_session(image.path, image.abspath, locking=host.locking) as (file, layout):
        layout.require_sound()
        layout.require_untracked()
        require_writable(layout)
        for slot in layout.slots:
            if slot.entry.in_use:
                where = f"{image.path}: {label(decode_name(slot.entry.name))}"
                raise BitmapError(where, "inconsistent; recover or remove it")
        home = Home(host, path, name)
        try:
            _copy_out(home, image, file, layout)
            image_path = image.abspath  # the tool may change its folder
            homes = [tracking.device, home] if tracking.device else [home]

            def check_in_own() -> object:
                return check_in(host, image_path, home.store.abspath, name, own=True)

            tracker: Tracker = tracking.make(Setup(homes, image_path, tracking.options, check_in_own, tracking.roots))
            try:
                set_tracked(file, layout, True)
                layout = read_layout(file)
                if layout.slots:
                    in_use = [slot.entry.with_flags(set=directory.FLAG_IN_USE) for slot in layout.slots]
                    commit(file, layout, [Kept(entry) for entry in in_use])
            except BaseException:
                tracker.abandon()
                raise
        except BaseException:
            home.close()
            raise
    return tracker


def _no_place(image: Image) -> BitmapError:
    what = "has no place for its bitmaps while it is tracked; 'dirtmap node add NAME IMAGE' gives it one, and a name"
    return BitmapError(image.path, what)


def _copy_out(home: Home, image: Image, file: File, layout: Layout) -> None:
    """Copies the bits into the image's record, which has none before a session."""

    def require_place(record: Record) -> None:
        mine = record.kind == store.KIND_PLACE and image.uuid == str(uuid.UUID(bytes=record.uuid))
        if not mine:
            raise _no_place(image)

    record = home.store.record(home.name)
    if record is None:
        raise _no_place(image)
    require_place(record)
    refuse_tracked(f"{home.store.path}: {record.label}", record)
    with home.change(None) as changed:
        require_place(changed.record)
        changed.record = replace(changed.record, size=layout.header.size)
        changed.session = None
        changed.entries = {}
        for slot in layout.slots:
            changed.put(decode_name(slot.entry.name), bitmap_of_slot(file, layout, slot), None)
