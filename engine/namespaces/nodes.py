"""Operations on the nodes of a store: which images it knows, by which names, and for which it holds bitmaps.

A qcow2 image keeps its bitmaps, its name and its UUID itself. The store remembers the image's *place*, the path and
inode, so that a copy of the file, which has the same UUID, can be told from the original.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from dirtmap.engine.identity import carries, disk_size, identity_of, is_twin, lasting_identity
from dirtmap.engine.model.naming import decode_name, encode_name
from dirtmap.engine.namespaces.condition import (
    doubts,
    end_session,
    refuse_held,
    refuse_session,
    refuse_tracked,
    refuse_unrecovered,
    rewrite,
)
from dirtmap.engine.namespaces.image import Image, Naming
from dirtmap.engine.namespaces.ports import HostPort
from dirtmap.engine.storefile.directory import header_doubts, no_namespace, read_entries, release_bits, require_free
from dirtmap.engine.storefile.file import Change, Snapshot, Store
from dirtmap.engine.system.file import is_same_file, replace_file, sync_folder
from dirtmap.engine.system.foreign import require_raw
from dirtmap.engine.system.probe import STORE, probe_path
from dirtmap.fmt import store
from dirtmap.fmt.errors import BitmapError, Error, FormatError, StorageError, counted, printable
from dirtmap.fmt.store import Identity, Record

KINDS = store.KIND_NODE, store.KIND_PLACE  # the kinds of records that are nodes


def add_node(target: Store, name: str, image: str, *, raw: bool = False) -> None:
    """Gives an image a namespace of its own.

    Args:
        target: the store that will hold its bitmaps.
        name: of the node; unique among the nodes and devices of the store.
        image: path of the image; stored as an absolute one.
        raw: the image is a raw disk, although it looks like an image of another format.

    Raises:
        BitmapError: the name is taken, or the image is another node's, or a store.
        FormatError: the image is of another format than raw.
        StorageError: the status of the image cannot be read.
    """
    raw_name = encode_name(name)
    path = os.path.abspath(image)
    identity = identity_of(path)
    if probe_path(path) == STORE:
        raise BitmapError(image, "a store, and not the image of a disk")
    if not raw:
        require_raw(path)
    with target.change() as change:
        require_free(change, raw_name)
        refuse_second_name(change.table, path, identity, *KINDS)
        change.table.put(
            Record(
                name=raw_name,
                kind=store.KIND_NODE,
                uuid=uuid.uuid4().bytes,
                size=identity.size,
                generation=change.generation,
                path=os.fsencode(path),
                identity=identity,
            )
        )


def refuse_second_name(records: Iterable[Record], path: str, identity: Identity, *kinds: int) -> None:
    """Refuses a second node on one image: bitmaps of one node would miss what is written through the other.

    Args:
        records: of the existing nodes.
        path: of the image.
        identity: of the image.
        kinds: kinds of nodes that count. For qcow2 images it is the image that says which node it is.

    Raises:
        BitmapError: the image is a node; the error names it.
    """
    for record in records:
        maybe = record.identity.is_file(identity) or record.path == os.fsencode(path)
        if record.kind in kinds and maybe and is_same_file(record.path, path):
            raise BitmapError(path, f"is node '{printable(decode_name(record.name))}' already")


@dataclass(frozen=True, slots=True)
class Node:
    """A node of a store.

    Attributes:
        name: unique in the store.
        uuid: of its namespace, as text.
        path: of its image.
        size: of its disk, in bytes.
        bitmaps: number of its bitmaps in the store; None if they are in the image itself.
        doubt: why they count as dirty all over, or None.
    """

    name: str
    uuid: str
    path: str
    size: int
    bitmaps: int | None
    doubt: str | None


def nodes(target: Store, broken: list[FormatError] | None = None) -> list[Node]:
    """All nodes of a store, sorted by name.

    Args:
        target: the store.
        broken: takes in why a part of the namespace table cannot be read; None: that is raised.
    """

    def look(snapshot: Snapshot) -> list[tuple[store.Record, str | None]]:
        table = snapshot.table()
        return [
            (record, doubts(snapshot, record))
            for record in (table if broken is None else table.readable(broken.append))
        ]

    found = target.read(look)
    return sorted(
        (
            Node(
                name=decode_name(record.name),
                uuid=str(uuid.UUID(bytes=record.uuid)),
                path=os.fsdecode(record.path),
                size=_size_of(record),
                bitmaps=None if record.kind == store.KIND_PLACE else record.nb_bitmaps,
                doubt=doubt,
            )
            for record, doubt in found
            if record.kind in KINDS
        ),
        key=lambda node: node.name,
    )


def _size_of(record: Record) -> int:
    """The size of the disk in bytes. Asks a qcow2 image, if it can be read: a resize of it changes no store."""
    if record.kind == store.KIND_PLACE:
        with suppress(StorageError):
            return disk_size(os.fsdecode(record.path))
    return record.size


def add_qcow2(host: HostPort, target: Store, name: str, image: str, *, new_identity: bool = False) -> None:
    """Gives a qcow2 image a name and a UUID, written into the image, and remembers its place.

    Args:
        host: of the image.
        target: the store that remembers the place.
        name: of the node; unique in the store.
        image: path of the image.
        new_identity: the image is a copy of another one, and becomes a node of its own.

    Raises:
        BitmapError: the name is taken, or the image already has another one.
        StorageError: the status of the image cannot be read.
        As `Naming.set`.
    """
    path = os.path.abspath(image)
    with Image(path, host) as opened, opened.naming() as naming, target.change() as change:
        known = change.table.get(encode_name(name))
        if known:
            refuse_session(target.path, known)
        mine = known and naming.identity is not None and known.uuid == naming.identity[1]
        if known and (new_identity or not mine or is_twin(known, path)):
            raise BitmapError(f"{target.path}: {known.label}", "the name is taken")
        if naming.identity is not None and naming.identity[0] != name and not new_identity:
            what = f"is node '{naming.identity[0]}' already; rename that, or say --new-identity if it is a copy"
            raise BitmapError(path, what)
        # A node that was added while the image was raw: its bitmaps would miss what is written through this node.
        refuse_second_name(change.table, path, identity_of(path), store.KIND_NODE)
        if new_identity or naming.identity is None:
            image_uuid = naming.set(name, uuid.uuid4().bytes if new_identity else None)
        else:
            image_uuid = naming.identity[1]
        if change.table.get(store.container_name(os.fsencode(path))):
            change.table.remove(store.container_name(os.fsencode(path)))  # a scan recorded it before it had a name
        change.table.put(
            Record(
                name=encode_name(name),
                kind=store.KIND_PLACE,
                uuid=image_uuid,
                size=naming.size,
                generation=change.generation,
                path=os.fsencode(path),
                identity=replace(identity_of(path), mtime_ns=0, size=0),
                extensions=known.extensions if known and mine else (),
            )
        )


def remove_node(host: HostPort, target: Store, name: str) -> None:
    """Removes a node. A qcow2 image loses its identity, if it is still in its place and has the node's name and UUID.

    Raises:
        BitmapError: there is no such node, it has bitmaps, or its tracker died and is yet to be recovered.
        LockedError: the node is tracked.
    """
    with _its_image(host, target, name, gone=True) as naming, target.change() as change:
        record = _record(change, name, died=True)
        where = f"{target.path}: {record.label}"
        if record.kind == store.KIND_PLACE and naming is None:
            # The bitmaps are gone with the image, and what has taken its place has nothing of ours. What a dead tracker
            # had of the bitmaps is of no use.
            end_session(change, record)
            with suppress(FormatError):  # if the directory is damaged, its bits are unknown, and leak
                for entry in read_entries(change.snapshot, record):
                    release_bits(change, record, entry)
                change.release(record.directory)
            change.table.remove(record.name)
            return
        refuse_session(target.path, record)
        if naming is not None and naming.identity == (name, record.uuid):
            _refuse_with_bitmaps(where, naming.bitmaps())
            naming.remove()
        _refuse_with_bitmaps(where, record.nb_bitmaps)
        change.table.remove(record.name)


@contextmanager
def _its_image(host: HostPort, target: Store, name: str, *, gone: bool = False) -> Iterator[Naming | None]:
    """Locks the image of a qcow2 node to change its identity. The image comes before the store in the lock order.

    If the block fails, the identity is restored, provided that the store still says that the image has it.

    Args:
        host: of the image.
        target: the store that remembers the place of the image.
        name: of the node.
        gone: whether the image may be missing.

    Yields:
        None for a node that is not a qcow2 image, and for a missing image.
    """
    record = target.record(encode_name(name))
    if record is None or record.kind != store.KIND_PLACE:
        yield None
        return
    _refuse_session_of(target.path, record, died=gone)
    if gone and not (os.path.exists(record.path) and carries(record)):
        yield None
        return
    refuse_session(target.path, record)
    with Image(os.fsdecode(record.path), host) as image, image.naming() as naming:
        before = naming.identity
        try:
            yield naming
        except Error:
            with suppress(Error):
                now = target.record(encode_name(name))
                if before is not None and naming.identity != before and now and now.uuid == record.uuid:
                    naming.set(*before)
            raise


def _refuse_with_bitmaps(where: str, count: int) -> None:
    if count:
        raise BitmapError(where, f"has {counted(count, 'bitmap')}; remove or move them first")


def rename_node(host: HostPort, target: Store, name: str, new: str, *, with_bitmaps: bool = False) -> None:
    """Renames a node.

    Args:
        host: of a qcow2 image.
        target: the store that has the node.
        name: its present name.
        new: its new name.
        with_bitmaps: allows the renaming of a node that has bitmaps, whose addresses change with it.

    Raises:
        BitmapError: there is no such node, the new name is taken, a bitmap is held, or the node has bitmaps and
            ``with_bitmaps`` is False.
    """
    with _its_image(host, target, name) as naming, target.change() as change:
        record = _record(change, name)
        where = f"{target.path}: {record.label}"
        require_free(change, encode_name(new))
        refuse_held(change.snapshot, record)
        if naming is not None and naming.identity != (name, record.uuid):
            what = f"{os.fsdecode(record.path)} is not its image any more; 'index scan' finds where that is"
            raise BitmapError(where, what)
        count = record.nb_bitmaps if naming is None else naming.bitmaps()
        if count and not with_bitmaps:
            what = f"has {counted(count, 'bitmap')}, whose addresses would change; --with-bitmaps renames them, too"
            raise BitmapError(where, what)
        if naming is not None:
            naming.set(new)
        change.table.remove(record.name)
        change.table.put(replace(record, name=encode_name(new)))


def resize_node(target: Store, name: str) -> int:
    """Adopts the present size of a node's image. Old bits stay; new space is dirty.

    The caller vouches that the image was resized and nothing else. If its bitmaps are in doubt for another reason, say
    another file in the image's place or a lost commit, all of them become dirty all over.

    Returns:
        The new size, in bytes.

    Raises:
        BitmapError: no such node, its size has not changed, or a bitmap is held or too fine for the new size.
        StorageError: the status of the image cannot be read.
    """
    with target.change() as change:
        record = _stored(change, name, died=True)
        identity = lasting_identity(os.fsdecode(record.path))
        if identity.size == record.size:
            what = f"its image has {record.size} bytes, as before: there is no new size to adopt"
            raise BitmapError(f"{target.path}: {record.label}", what)
        refuse_unrecovered(change.snapshot, record)
        refuse_held(change.snapshot, record)
        # The caller explains the new size and mtime; nothing else may differ.
        explained = replace(record.identity, size=identity.size, mtime_ns=identity.mtime_ns)
        doubted = doubts(change.snapshot, replace(record, identity=explained)) is not None
        rewrite(change, record, replace(record, size=identity.size, identity=identity), doubted=doubted)
        return identity.size


def confirm_node(target: Store, name: str) -> None:
    """States that a node's bitmaps are right for its image as it is now, although the image looks changed.

    Raises:
        BitmapError: there is no such node, its size has changed, or its bitmaps are in doubt for another reason.
        StorageError: the status of the image cannot be read.
    """
    with target.change() as change:
        record = _stored(change, name)
        identity = lasting_identity(os.fsdecode(record.path))
        if identity.size != record.size:
            what = f"its image has {identity.size} bytes now; 'node resize' adopts the new size"
            raise BitmapError(f"{target.path}: {record.label}", what)
        if record.nb_bitmaps and (doubt := header_doubts(change.snapshot, record)):
            what = f"counts as all dirty, whatever its image is like: {doubt}; 'dirtmap recover' settles it"
            raise BitmapError(f"{target.path}: {record.label}", what)
        change.table.put(replace(record, identity=identity))


def relocate_node(target: Store, name: str, path: str, *, confirm: bool = False, move: bool = False) -> bool:
    """Points a raw node to the place where its image is now, or moves the image there.

    A crash in between leaves a store that names a place where the image is not: its bitmaps count as all dirty.

    Args:
        target: the store that has the node.
        name: of the node.
        path: where the image is, or, with ``move``, will be: absolute, in the same file system.
        confirm: the caller vouches that it is the same disk, moved and not written to. Its size and its time have to
            say so, too; of a block device the medium.
        move: rename the file; what was right stays right.

    Returns:
        True where its bitmaps stay as they are; False where they are all dirty now, or were before a ``move``.

    Raises:
        LockedError: it is tracked.
        BitmapError: no such node, a bitmap is held, or the image is a store's, another node's, of another format or of
            another size.
        StorageError: the image cannot be looked at, or renamed.
    """
    where, moved = f"{target.path}: node '{printable(name)}'", ""
    try:
        with target.change() as change:
            record = _record(change, name)
            if record.kind != store.KIND_NODE:
                raise BitmapError(
                    where, "is a qcow2 image, which says itself what it is; 'index scan' finds where it is"
                )
            refuse_held(change.snapshot, record)
            old = os.fsdecode(record.path)
            if move:
                if os.path.lexists(path):
                    raise StorageError(path, "exists already")
                sound = doubts(change.snapshot, record) is None
                replace_file(old, path)
                moved = old
                sync_folder(old)
                now = lasting_identity(path)
                kept = sound and _looks_same(record.identity, now)
                change.table.put(replace(record, path=os.fsencode(path), identity=now if kept else record.identity))
                return kept
            now = identity_of(path)
            if not now.is_file(record.identity) and (found := probe_path(path)) is not None:
                raise BitmapError(path, f"of format {found}, and the node's image is raw")
            others = (other for other in change.table if other.name != record.name)
            refuse_second_name(others, path, now, *KINDS)
            if now.size != record.size:
                what = f"has {now.size} bytes, and the node's image {record.size}: it is not the same disk"
                raise BitmapError(path, what)
            now = lasting_identity(path)
            new = replace(record, path=os.fsencode(path), identity=now)
            kept = confirm and not header_doubts(change.snapshot, record) and _looks_same(record.identity, now)
            if kept:
                change.table.put(new)
            else:
                rewrite(change, record, new, doubted=True)
            return kept
    except BaseException:
        with suppress(Error):
            known = target.record(encode_name(name)) if moved else None
            if known is not None and known.path == os.fsencode(moved):
                replace_file(path, moved)
        raise


def _looks_same(before: Identity, now: Identity) -> bool:
    """True where nothing speaks against an image being the one that it was, in another place."""
    return (before.size, before.mtime_ns) == (now.size, now.mtime_ns) and (before.mtime_ns != 0 or before.is_file(now))


def _record(change: Change, name: str, *, died: bool = False) -> Record:
    """The record of a node that is not tracked. With ``died`` its tracker may have died without being recovered."""
    record = change.table.get(encode_name(name))
    if record is None or record.kind not in KINDS:
        raise no_namespace(change.snapshot.file.path, encode_name(name))
    _refuse_session_of(change.snapshot.file.path, record, died=died)
    return record


def _refuse_session_of(path: str, record: Record, *, died: bool) -> None:
    (refuse_tracked if died else refuse_session)(path, record)


def _stored(change: Change, name: str, *, died: bool = False) -> Record:
    record = _record(change, name, died=died)
    if record.kind != store.KIND_NODE:
        where = f"{change.snapshot.file.path}: {record.label}"
        raise BitmapError(where, "keeps its bitmaps itself; QEMU resizes them with the image")
    return record
