"""Operations on the devices of a store. A device is a disk as a guest sees it; it has a root node and own bitmaps.

A device names its root by UUID. Its record also has the path of the root's image, and what that image looked like when
the device's bitmaps were last known to be right.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass, replace

from dirtmap.engine.identity import disk_size, lasting_identity
from dirtmap.engine.model.naming import decode_name, encode_name
from dirtmap.engine.namespaces.condition import Condition, doubts, refuse_session, refuse_tracked
from dirtmap.engine.storefile.directory import header_doubts, require_free
from dirtmap.engine.storefile.file import Change, Snapshot, Store
from dirtmap.engine.storefile.session import require_known
from dirtmap.fmt import store
from dirtmap.fmt.errors import BitmapError, BitmapNotFoundError, FormatError, counted
from dirtmap.fmt.identity import Identity
from dirtmap.fmt.store import Record


@dataclass(frozen=True, slots=True)
class Root:
    """A node as a device sees it: its UUID as 16 bytes, and the absolute path of its image."""

    uuid: bytes
    path: str


@dataclass(frozen=True, slots=True)
class Device:
    """A device of a store.

    Attributes:
        name: unique among nodes and devices.
        uuid: of its namespace, as text.
        root_uuid: of its root node, as text.
        path: of the root's image.
        size: of the disk, in bytes.
        bitmaps: number of its bitmaps.
        doubt: why they count as dirty all over, or None.
    """

    name: str
    uuid: str
    root_uuid: str
    path: str
    size: int
    bitmaps: int
    doubt: str | None


def devices(target: Store, broken: list[FormatError] | None = None) -> list[Device]:
    """All devices of a store, sorted by name.

    Args:
        target: the store.
        broken: takes in why a part of the namespace table cannot be read; None: that is raised.
    """
    return [
        Device(
            name=decode_name(record.name),
            uuid=str(uuid.UUID(bytes=record.uuid)),
            root_uuid=str(uuid.UUID(bytes=record.root_uuid)),
            path=os.fsdecode(record.path),
            size=record.size,
            bitmaps=record.nb_bitmaps,
            doubt=doubt,
        )
        for record, doubt in doubts(target, [store.KIND_DEVICE], broken)
    ]


def add_device(target: Store, name: str, root: Root) -> None:
    """Adds a device without bitmaps.

    Raises:
        BitmapError: the name is taken.
        StorageError: the status of the root's image cannot be read.
    """
    raw_name = encode_name(name)
    identity, size = lasting_identity(root.path, of_disk=True), disk_size(root.path)
    with target.change() as change:
        require_free(change, raw_name)
        change.table.put(
            Record(
                name=raw_name,
                kind=store.KIND_DEVICE,
                uuid=uuid.uuid4().bytes,
                root_uuid=root.uuid,
                size=size,
                generation=change.generation,
                path=os.fsencode(root.path),
                identity=identity,
            )
        )


def set_root(target: Store, name: str, root: Root, *, content_unchanged: bool = False) -> None:
    """Gives a device another root node.

    Args:
        target: the store of the device.
        name: of the device.
        root: the new root.
        content_unchanged: the caller vouches that the new root reads as the old one did, so the bitmaps stay as they
            are; where it is the old one, that it reads as it did, although it looks changed. Otherwise all of them
            become dirty all over.

    Raises:
        LockedError: the device is tracked; the error names the process.
        BitmapError: no such device, a bitmap is held, or ``content_unchanged`` for a root of another size.
        StorageError: the status of the root's image cannot be read.
    """
    identity, size = lasting_identity(root.path, of_disk=True), disk_size(root.path)
    with target.change() as change:
        record = require_device(change, name)
        now = Condition(change.snapshot, record)
        refuse_tracked(now.where, now.record)
        now.refuse_held()
        if content_unchanged and size != record.size:
            what = f"has {record.size} bytes, and the new root {size}: the content is not unchanged"
            raise BitmapError(now.where, what)
        new = replace(
            record,
            root_uuid=root.uuid,
            size=size,
            path=os.fsencode(root.path),
            identity=identity,
            generation=change.generation,
        )
        # Bitmaps that were in doubt stay so: the caller vouches for this step, not for what happened earlier. Where
        # there is no step, it can only be the image that the caller vouches for.
        same = root.uuid == record.root_uuid and not record.tracked
        doubt = header_doubts(change.snapshot, record) if same else now.doubt
        doubted = not content_unchanged or bool(record.nb_bitmaps and doubt)
        if doubted or now.view:
            now.rewrite(change, new, doubted=doubted)
        else:
            change.table.put(new)


def remove_device(target: Store, name: str) -> None:
    """Removes a device.

    Raises:
        BitmapError: no such device, it has bitmaps, or its tracker died and is yet to be recovered.
        LockedError: the device is tracked.
    """
    with target.change() as change:
        record = require_device(change, name)
        now = Condition(change.snapshot, record)
        refuse_session(now.where, now.record)
        if record.nb_bitmaps:
            raise BitmapError(now.where, f"has {counted(record.nb_bitmaps, 'bitmap')}; remove or move them first")
        change.table.remove(record.name)


def confirm_roots(target: Store, names: list[bytes], before: Identity, after: Identity) -> None:
    """Updates the recorded image identity of devices after a change that leaves what a guest reads as it was.

    Args:
        target: the store of the devices.
        names: of the devices, raw bytes.
        before: identity of the image before the change; a device that has another one recorded is left alone.
        after: identity of the image after the change.
    """
    with target.change() as change:
        for name in names:
            record = change.table.get(name)
            if record and record.kind == store.KIND_DEVICE and record.identity == before:
                change.table.put(replace(record, identity=after))


def move_roots(target: Store, names: list[bytes], path: str) -> None:
    """Updates the recorded path of the root's image in devices. It is the same file under another path."""
    with target.change() as change:
        for name in names:
            record = change.table.get(name)
            if record and record.kind == store.KIND_DEVICE and record.path != os.fsencode(path):
                change.table.put(replace(record, path=os.fsencode(path)))


def relocate_roots(
    target: Store,
    names: list[bytes],
    path: str,
    *,
    now: Identity,
    before: Identity | None = None,
    confirmed: bool = False,
) -> None:
    """Takes note that a raw root is elsewhere. The devices' bitmaps are all dirty where that was not seen or confirmed.

    Args:
        target: the store of the devices.
        names: of the devices, raw bytes.
        path: of the root's image, as it is now.
        now: what that looks like there.
        before: what it looked like before dirtmap itself has moved it.
        confirmed: the caller vouches that it was moved and not written to.

    Raises:
        LockedError: a device is tracked.
        BitmapError: a bitmap is held.
    """
    with target.change() as change:
        for name in names:
            record = change.table.get(name)
            if record is None or record.kind != store.KIND_DEVICE:
                continue
            condition = Condition(change.snapshot, record)
            _refuse_relocation(condition)
            new, known = replace(record, path=os.fsencode(path), identity=now), record.identity
            same = confirmed and (known.size, known.mtime_ns) == (now.size, now.mtime_ns)
            if known == before or same:
                change.table.put(new)
            else:
                condition.rewrite(change, new, doubted=True)


def refuse_relocation(target: Store, names: list[bytes]) -> None:
    """Refuses another place for the root of devices of which one is tracked or held. Errors as `relocate_roots`."""

    def refuse(snapshot: Snapshot) -> None:
        for name in names:
            if record := snapshot.record(name):
                _refuse_relocation(Condition(snapshot, record))

    target.read(refuse)


def _refuse_relocation(now: Condition) -> None:
    refuse_session(now.where, now.record)
    now.refuse_held()


def require_device(change: Change, name: str) -> Record:
    """The record of a device.

    Raises:
        BitmapNotFoundError: there is no such device.
    """
    record = change.table.get(encode_name(name))
    if record is None or record.kind != store.KIND_DEVICE:
        label = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        raise BitmapNotFoundError(f"{change.snapshot.file.path}: device '{label}'", "there is no such device")
    require_known(change.snapshot.file.path, record)
    return record
