"""Recovers namespaces of a store: those whose tracker died, and those whose bitmaps cannot be relied on."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from dirtmap.engine.identity import lasting_identity_now
from dirtmap.engine.model.infos import LEFT_IN_USE, Recovery
from dirtmap.engine.model.naming import decode_name, label, not_found
from dirtmap.engine.namespaces.changing import changing
from dirtmap.engine.namespaces.condition import Condition, refuse_tracked, size_now
from dirtmap.engine.namespaces.ports import HostPort
from dirtmap.engine.session.peers import path_of, unrecovered
from dirtmap.engine.storefile.directory import damage_of, no_namespace
from dirtmap.engine.storefile.file import Change, Store
from dirtmap.engine.storefile.session import peer_of
from dirtmap.engine.system.log import logger
from dirtmap.fmt import store
from dirtmap.fmt.errors import Error
from dirtmap.fmt.identity import Identity
from dirtmap.fmt.live import Peer
from dirtmap.fmt.store import Record


def recover_record(change: Change, now: Condition, names: list[str]) -> list[Recovery]:
    """Recovers the named bitmaps, or all, of a namespace whose directory is whole; see `Namespace.recover`."""
    if now.size_now != now.record.size:
        return _recover_resized(change, now, names)
    recovered = []
    entries = {decode_name(entry.name): entry for entry in now.entries}
    with changing(change, now) as bitmaps:
        for name in names or list(bitmaps):
            bitmap = bitmaps[name]
            why = now.doubt
            if why is None and bitmap.inconsistent:
                why = LEFT_IN_USE
            if why is not None:
                bitmaps[name] = bitmap.recovered()
                recovered.append(Recovery(name, f"all dirty: {why}"))
            elif damage := damage_of(now.snapshot, now.record, entries[name]):
                # What was damaged is dirty as it was read, and no longer what the store has.
                bitmaps[name] = bitmap._anew()
                recovered.append(Recovery(name, f"partly dirty: its {damage}"))
            elif now.view:
                recovered.append(Recovery(name, now.view.how))
    return recovered


def _recover_resized(change: Change, now: Condition, names: list[str]) -> list[Recovery]:
    """Recovers a namespace whose disk has another size now: adopts that size, and makes all its bitmaps all dirty.

    Where the tracker died that had the disk grow, the old bits are recovered, and the new space is dirty.
    """
    record = now.record
    refuse_tracked(now.where, now.record)
    now.refuse_unrecovered()
    now.refuse_held()
    found = [decode_name(entry.name) for entry in now.entries]
    for name in names:
        if name not in found:
            raise not_found(now.where, name)
    view, size = now.view, now.size_now
    if (
        view
        and view.identity
        and view.identity.size == size
        and now.growing
        and not now.doubted
        and not any(damage_of(change.snapshot, record, entry) for entry in now.entries)
    ):
        now.rewrite(change, replace(record, size=size, identity=view.identity), doubted=False)
        dirty = f"all dirty: {LEFT_IN_USE}"
        return [
            Recovery(name, dirty if entry.in_use else f"{view.how}; from byte {record.size} on it is new, and dirty")
            for name, entry in zip(found, now.entries, strict=True)
        ]
    identity = lasting_identity_now(record)
    size = size_now(record)  # looked at after the identity, so that a later change of the size is seen
    now.rewrite(change, replace(record, size=size, identity=identity), doubted=True)
    return [Recovery(name, f"all dirty: the disk has {size} bytes now, and had {record.size}") for name in found]


def log_recovered(where: str, recovered: list[Recovery]) -> None:
    """Logs what a recovery did, once it is durable.

    Args:
        where: how messages name the namespace.
        recovered: what was done to each bitmap.
    """
    for item in recovered:
        logger(__name__).info("%s: %s recovered: %s", where, label(item.name), item.how)


def recover_tracked_device(host: HostPort, target: Store, name: bytes) -> None:
    """Recovers the device that was tracked with a node, if it is not yet recovered. The node comes after it.

    The session of one tracker is in two records, that of the device and that of its root node. The device ends its
    session first: see `dirtmap.engine.session.peers`. A device has no device of its own, so this is no recursion.

    Args:
        host: opens the store of the device.
        target: the store that has the node's session.
        name: of the node, raw bytes. A namespace without such a session is left alone.

    Raises:
        LockedError: the tracker is alive.
        FormatError: the directory of the device is damaged; recover the device by its own name.
        BitmapError: the root of the device has another size now.
    """
    record = target.record(name)
    peer = unrecovered(target.abspath, record) if record is not None and record.tracked else None
    if record is None or peer is None:
        return
    refuse_tracked(f"{target.path}: {record.label}", record)
    if peer.store:
        with host.opened(path_of(target.abspath, peer)) as other:
            recover_session(other, peer.name)
    else:
        recover_session(target, peer.name)


def recover_session(target: Store, name: bytes) -> None:
    """Recovers all bitmaps of one namespace in one commit; see `recover_record`.

    Raises:
        BitmapError: there is no such namespace.
        As `recover_record`.
    """
    with target.change() as change:
        record = change.table.get(name)
        if record is None:
            raise no_namespace(target.path, name)
        recovered = recover_record(change, Condition(change.snapshot, record), [])
    log_recovered(f"{target.path}: {record.label}", recovered)


def confirm(host: HostPort, change: Change, root: Record, before: Identity | None, after: Identity | None) -> None:
    """Updates the device's recorded image identity after a check-in, which leaves what a guest reads as it was.

    If that fails, or a crash comes first, the device becomes all dirty.

    Args:
        host: opens the store of the device.
        change: of the store that has the root.
        root: record of the root node, with the session.
        before: identity of the image before the check-in; None if it could not be read.
        after: identity of the image after it; None if it could not be read.
    """
    if before and after and (peer := peer_of(root)):
        if not peer.store:
            _confirm(change, peer, before, after)
            return
        with (
            contextlib.suppress(Error),
            host.opened(path_of(change.snapshot.file.abspath, peer)) as other,
            other.change() as there,
        ):
            _confirm(there, peer, before, after)


def _confirm(change: Change, peer: Peer, before: Identity, after: Identity) -> None:
    record = change.table.get(peer.name)
    ended = record is not None and not record.tracked
    same = record is not None and record.uuid == peer.uuid and record.kind == store.KIND_DEVICE
    if record and ended and same and record.identity == before:
        change.table.put(replace(record, identity=after))
