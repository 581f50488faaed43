"""Acts on the devices of a store: what a guest sees, with a root node, and bitmaps of its own.

A device names its root by UUID, and remembers where the root's image is and what it looked like when the device's
bitmaps were last known to be right.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass, replace

from dirtmap.engine.identity import disk_size, lasting_identity
from dirtmap.engine.model.naming import decode_name, encode_name
from dirtmap.engine.namespaces.condition import (
    doubts,
    refuse_held,
    refuse_session,
    refuse_tracked,
    rewrite,
    tracked_view,
)
from dirtmap.engine.storefile.directory import require_free
from dirtmap.engine.storefile.file import Change, Snapshot, Store
from dirtmap.fmt import store
from dirtmap.fmt.errors import BitmapError, BitmapNotFoundError, FormatError, counted
from dirtmap.fmt.store import Identity, Record


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
        size: of the disk, bytes.
        bitmaps: how many it has.
        doubt: why they count as all dirty, or None.
    """

    name: str
    uuid: str
    root_uuid: str
    path: str
    size: int
    bitmaps: int
    doubt: str | None


def devices(target: Store, broken: list[FormatError] | None = None) -> list[Device]:
    """All devices of a store, by name.

    Args:
        target: the store.
        broken: takes in why a bucket cannot be read; None: that is raised.
    """

    def look(snapshot: Snapshot) -> list[tuple[store.Record, str | None]]:
        table = snapshot.table()
        return [
            (record, doubts(snapshot, record))
            for record in (table if broken is None else table.readable(broken))
            if record.kind == store.KIND_DEVICE
        ]

    found = target.read(look)
    return sorted(
        (
            Device(
                name=decode_name(record.name),
                uuid=str(uuid.UUID(bytes=record.uuid)),
                root_uuid=str(uuid.UUID(bytes=record.root_uuid)),
                path=os.fsdecode(record.path),
                size=record.size,
                bitmaps=record.nb_bitmaps,
                doubt=doubt,
            )
            for record, doubt in found
        ),
        key=lambda device: device.name,
    )


def add_device(target: Store, name: str, root: Root) -> None:
    """A new device, without bitmaps.

    Raises:
        BitmapError: the name is taken.
        StorageError: the root's image cannot be looked at.
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
        target: the store that the device is in.
        name: of the device.
        root: the new one.
        content_unchanged: the caller vouches that the new root reads as the old one did: its bitmaps stay as they are.
            Else all of them are dirty from now on.

    Raises:
        LockedError: it is tracked; names by whom.
        BitmapError: no such device, a bitmap is held, or the content cannot be the same since the size is not.
        StorageError: the root's image cannot be looked at.
    """
    identity, size = lasting_identity(root.path, of_disk=True), disk_size(root.path)
    with target.change() as change:
        record = require_device(change, name)
        where = f"{target.path}: {record.label}"
        refuse_tracked(target.path, record)
        refuse_held(target.path, record)
        if content_unchanged and size != record.size:
            raise BitmapError(where, f"has {record.size} bytes, and the new root {size}: the content is not unchanged")
        new = replace(
            record,
            root_uuid=root.uuid,
            size=size,
            path=os.fsencode(root.path),
            identity=identity,
            generation=change.generation,
        )
        # What was in doubt before stays so: the caller vouches for this step, not for what happened earlier.
        doubted = not content_unchanged or doubts(change.snapshot, record) is not None
        if doubted or tracked_view(change.snapshot, record):
            rewrite(change, record, new, doubted=doubted)
        else:
            change.table.put(new)


def remove_device(target: Store, name: str) -> None:
    """Forgets a device.

    Raises:
        BitmapError: no such device, or it has bitmaps.
    """
    with target.change() as change:
        record = require_device(change, name)
        refuse_session(target.path, record)
        if record.nb_bitmaps:
            where = f"{target.path}: {record.label}"
            raise BitmapError(where, f"has {counted(record.nb_bitmaps, 'bitmap')}; remove or move them first")
        change.table.remove(record.name)


def confirm_roots(target: Store, names: list[bytes], before: Identity, after: Identity) -> None:
    """Takes note that what changed in an image was not what a guest reads: devices on it stay as right as they were.

    Args:
        target: the store that the devices are in.
        names: of the devices, raw.
        before: what the image looked like before the change.
        after: and behind it.
    """
    with target.change() as change:
        for name in names:
            record = change.table.get(name)
            if record and record.kind == store.KIND_DEVICE and record.identity == before:
                change.table.put(replace(record, identity=after))


def move_roots(target: Store, names: list[bytes], path: str) -> None:
    """Takes note that the image of devices' root is elsewhere now, the same file under another path."""
    with target.change() as change:
        for name in names:
            record = change.table.get(name)
            if record and record.kind == store.KIND_DEVICE and record.path != os.fsencode(path):
                change.table.put(replace(record, path=os.fsencode(path)))


def require_device(change: Change, name: str) -> Record:
    """The device's record.

    Raises:
        BitmapNotFoundError: there is none of that name.
    """
    record = change.table.get(encode_name(name))
    if record is None or record.kind != store.KIND_DEVICE:
        label = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        raise BitmapNotFoundError(f"{change.snapshot.file.path}: device '{label}'", "there is no such device")
    return record
