"""Operations on the nodes of a store: which images it knows, by which names, and for which it holds bitmaps.

A qcow2 image keeps its bitmaps, its name and its UUID itself. The store remembers the image's *place*, the path and
inode, so that a copy of the file, which has the same UUID, can be told from the original.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from dirtmap.engine.identity import carries, disk_size, identity_of, is_twin, lasting_identity
from dirtmap.engine.model.naming import decode_name, encode_name
from dirtmap.engine.namespaces.condition import Condition, doubts, refuse_session, refuse_tracked
from dirtmap.engine.namespaces.image import Image, Naming
from dirtmap.engine.namespaces.ports import HostPort
from dirtmap.engine.storefile.directory import header_doubts, no_namespace, release_bits, rename_record, require_free
from dirtmap.engine.storefile.file import Change, Snapshot, Store
from dirtmap.engine.storefile.session import require_known
from dirtmap.engine.system.file import is_same_file, rename_file, replace_file, sync_folder
from dirtmap.engine.system.foreign import require_raw
from dirtmap.engine.system.probe import STORE, probe_path
from dirtmap.fmt import store
from dirtmap.fmt.errors import BitmapError, Error, FormatError, StorageError, counted, printable
from dirtmap.fmt.identity import FilePlace, Identity
from dirtmap.fmt.store import Record

KINDS = store.KIND_NODE, store.KIND_PLACE  # the kinds of records that are nodes


# Given a snapshot of a store, the path of an image and which file it is: the nodes of the store that are on the image,
# and perhaps others. See `Stores.records_on`, which need not read all.
OnImage = Callable[[Snapshot, str, FilePlace], Iterable[Record]]


def _all_records(snapshot: Snapshot, path: str, place: FilePlace) -> Iterable[Record]:
    """For a store whose host is not known."""
    return snapshot.table()


def add_node(target: Store, name: str, image: str, *, raw: bool = False, on_image: OnImage = _all_records) -> None:
    """Gives an image a namespace of its own.

    Args:
        target: the store that will hold its bitmaps.
        name: of the node; unique among the nodes and devices of the store.
        image: path of the image; stored as an absolute one.
        on_image: finds the nodes on the image.
        raw: the image is a raw disk, although it looks like an image of another format.

    Raises:
        BitmapError: the name is taken, or the image is another node's, or a store.
        FormatError: the image is of another format than raw.
        StorageError: the status of the image cannot be read.
    """
    raw_name = encode_name(name)
    path = os.path.abspath(image)
    identity = identity_of(path)
    _require_disk(path, raw=raw)
    with target.change() as change:
        require_free(change, raw_name)
        refuse_second_name(on_image(change.snapshot, path, identity.place), path, identity, *KINDS)
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
    return [
        Node(
            name=decode_name(record.name),
            uuid=str(uuid.UUID(bytes=record.uuid)),
            path=os.fsdecode(record.path),
            size=_size_of(record),
            bitmaps=None if record.kind == store.KIND_PLACE else record.nb_bitmaps,
            doubt=doubt,
        )
        for record, doubt in doubts(target, KINDS, broken)
    ]


def _size_of(record: Record) -> int:
    """The size of the disk in bytes. Asks a qcow2 image, if it can be read: a resize of it changes no store."""
    if record.kind == store.KIND_PLACE:
        with suppress(StorageError):
            return disk_size(os.fsdecode(record.path))
    return record.size


def add_qcow2(
    host: HostPort,
    target: Store,
    name: str,
    image: str,
    *,
    new_identity: bool = False,
    on_image: OnImage = _all_records,
) -> None:
    """Gives a qcow2 image a name and a UUID, written into the image, and remembers its place.

    Args:
        host: of the image.
        target: the store that remembers the place.
        name: of the node; unique in the store.
        image: path of the image.
        new_identity: the image is a copy of another one, and becomes a node of its own.
        on_image: finds the nodes on the image.

    Raises:
        BitmapError: the name is taken, or the image already has another one.
        StorageError: the status of the image cannot be read.
        As `Naming.set`.
    """
    path = os.path.abspath(image)
    with Image(path, host) as opened, opened.naming() as naming, target.change() as change:
        known = change.table.get(encode_name(name))
        if known:
            refuse_session(f"{target.path}: {known.label}", known)
        mine = known and naming.identity is not None and known.uuid == naming.identity[1]
        if known and (new_identity or not mine or is_twin(known, path)):
            raise BitmapError(f"{target.path}: {known.label}", "the name is taken")
        if naming.identity is not None and naming.identity[0] != name and not new_identity:
            what = f"is node '{naming.identity[0]}' already; rename that, or say --new-identity if it is a copy"
            raise BitmapError(path, what)
        # A node that was added while the image was raw: its bitmaps would miss what is written through this node.
        identity = identity_of(path)
        refuse_second_name(on_image(change.snapshot, path, identity.place), path, identity, store.KIND_NODE)
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
                identity=Identity(*identity_of(path).place),
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
        now = _condition(change, name, died=True)
        record = now.record
        if record.kind == store.KIND_PLACE and naming is None:
            # The bitmaps are gone with the image, and what has taken its place has nothing of ours. What a dead tracker
            # had of the bitmaps is of no use.
            now.end_session(change)
            with suppress(FormatError):  # if the directory is damaged, its bits are unknown, and leak
                for entry in now.entries:
                    release_bits(change, record, entry)
                change.release(record.directory)
            change.table.remove(record.name)
            return
        refuse_session(now.where, now.record)
        if naming is not None and naming.identity == (name, record.uuid):
            _refuse_with_bitmaps(now.where, naming.bitmaps())
            naming.remove()
        _refuse_with_bitmaps(now.where, record.nb_bitmaps)
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
    where = f"{target.path}: {record.label}"
    (refuse_tracked if gone else refuse_session)(where, record)
    if gone and not (os.path.exists(record.path) and carries(record)):
        yield None
        return
    refuse_session(where, record)
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
        now = _condition(change, name)
        record = now.record
        require_free(change, encode_name(new))
        now.refuse_held()
        if naming is not None and naming.identity != (name, record.uuid):
            what = f"{os.fsdecode(record.path)} is not its image any more; 'index scan' finds where that is"
            raise BitmapError(now.where, what)
        count = record.nb_bitmaps if naming is None else naming.bitmaps()
        if count and not with_bitmaps:
            what = f"has {counted(count, 'bitmap')}, whose addresses would change; --with-bitmaps renames them, too"
            raise BitmapError(now.where, what)
        if naming is not None:
            naming.set(new)
        change.table.put(rename_record(change, record, encode_name(new)))


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
        now = _stored(change, name, died=True)
        record = now.record
        identity = lasting_identity(os.fsdecode(record.path))
        if identity.size == record.size:
            what = f"its image has {record.size} bytes, as before: there is no new size to adopt"
            raise BitmapError(now.where, what)
        now.refuse_unrecovered()
        now.refuse_held()
        # The caller explains the new size and times; nothing else may differ.
        explained = Identity(*record.identity.place, identity.size, identity.mtime_ns, identity.ctime_ns)
        doubted = Condition(change.snapshot, replace(record, identity=explained)).doubted
        now.rewrite(change, replace(record, size=identity.size, identity=identity), doubted=doubted)
        return identity.size


def confirm_node(target: Store, name: str) -> None:
    """States that a node's bitmaps are right for its image as it is now, although the image looks changed.

    Raises:
        BitmapError: there is no such node, its size has changed, or its bitmaps are in doubt for another reason.
        StorageError: the status of the image cannot be read.
    """
    with target.change() as change:
        now = _stored(change, name)
        record = now.record
        identity = lasting_identity(os.fsdecode(record.path))
        if identity.size != record.size:
            what = f"its image has {identity.size} bytes now; 'node resize' adopts the new size"
            raise BitmapError(now.where, what)
        if record.nb_bitmaps and (doubt := header_doubts(change.snapshot, record)):
            what = f"counts as all dirty, whatever its image is like: {doubt}; 'dirtmap recover' settles it"
            raise BitmapError(now.where, what)
        change.table.put(replace(record, identity=identity))


@dataclass(frozen=True, slots=True)
class Relocation:
    """What became of an image whose node was pointed to another place.

    Attributes:
        kept: the node's bitmaps stay as they are. Else they are all dirty now, or were before it was moved.
        before: what the image looked like right before it was moved; None where it was not, or where somebody has
            changed it meanwhile.
        now: what it looks like in its new place.
    """

    kept: bool
    before: Identity | None
    now: Identity


def relocate_node(
    target: Store,
    name: str,
    path: str,
    *,
    confirm: bool = False,
    move: bool = False,
    raw: bool = False,
    on_image: OnImage = _all_records,
) -> Relocation:
    """Points a raw node to the place where its image is now, or moves the image there.

    A crash in between leaves a store that names a place where the image is not: its bitmaps count as all dirty.

    Args:
        target: the store that has the node.
        name: of the node.
        path: where the image is, or, with ``move``, will be: absolute, in the same file system.
        confirm: the caller vouches that it is the same disk, moved and not written to. Its size and its time have to
            say so, too; of a block device the medium.
        move: rename the file; what was right stays right.
        raw: the image is a raw disk, although it looks like an image of another format. The file that the node had
            before needs no such word.
        on_image: finds the nodes on the image.

    Raises:
        LockedError: it is tracked.
        BitmapError: no such node, a bitmap is held, or the image is a store, another node's, or of another size.
        FormatError: the image is of another format than raw.
        StorageError: the image cannot be looked at, or renamed.
    """
    moved = ""
    try:
        with target.change() as change:
            now = _condition(change, name)
            record = now.record
            if record.kind != store.KIND_NODE:
                what = "is a qcow2 image, which says itself what it is; 'index scan' finds where it is"
                raise BitmapError(f"{target.path}: node '{printable(name)}'", what)
            now.refuse_held()
            old = os.fsdecode(record.path)
            if move:
                if os.path.lexists(path):
                    raise StorageError(path, "exists already")
                sound = not now.doubted
                before = identity_of(old)
                rename_file(old, path)
                moved = old
                renamed = identity_of(path)
                sync_folder(path)
                sync_folder(old)
                identity = lasting_identity(path)
                # The rename has given it a new time of the last change. Any other one is somebody else's.
                alone = identity == renamed == replace(before, ctime_ns=renamed.ctime_ns)
                kept = sound and alone and _looks_same(record.identity, identity)
                recorded = identity if kept else record.identity
                change.table.put(replace(record, path=os.fsencode(path), identity=recorded))
                return Relocation(kept, before if alone else None, identity)
            identity = identity_of(path)
            if not identity.is_file(record.identity):
                _require_disk(path, raw=raw)
            on_it = on_image(change.snapshot, path, identity.place)
            others = (other for other in on_it if other.name != record.name)
            refuse_second_name(others, path, identity, *KINDS)
            if identity.size != record.size:
                what = f"has {identity.size} bytes, and the node's image {record.size}: it is not the same disk"
                raise BitmapError(path, what)
            identity = lasting_identity(path)
            new = replace(record, path=os.fsencode(path), identity=identity)
            kept = confirm and not header_doubts(change.snapshot, record) and _looks_same(record.identity, identity)
            if kept:
                change.table.put(new)
            else:
                now.rewrite(change, new, doubted=True)
            return Relocation(kept, None, identity)
    except BaseException:
        with suppress(Error):
            known = target.record(encode_name(name)) if moved else None
            if known is not None and known.path == os.fsencode(moved):
                replace_file(path, moved)
        raise


def _require_disk(path: str, *, raw: bool) -> None:
    """Refuses what cannot be the disk of a node whose bitmaps are in a store; ``raw`` as `add_node`."""
    if probe_path(path) == STORE:
        raise BitmapError(path, "a store, and not the image of a disk")
    if not raw:
        require_raw(path)


def _looks_same(before: Identity, now: Identity) -> bool:
    """True where nothing speaks against an image being the one that it was, in another place."""
    return (before.size, before.mtime_ns) == (now.size, now.mtime_ns) and (before.mtime_ns != 0 or before.is_file(now))


def _condition(change: Change, name: str, *, died: bool = False) -> Condition:
    """The condition of a node that is not tracked. With ``died`` its tracker may have died without being recovered."""
    record = change.table.get(encode_name(name))
    if record is None or record.kind not in KINDS:
        raise no_namespace(change.snapshot.file.path, encode_name(name))
    require_known(change.snapshot.file.path, record)
    now = Condition(change.snapshot, record)
    if died:
        refuse_tracked(now.where, now.record)
    else:
        refuse_session(now.where, now.record)
    return now


def _stored(change: Change, name: str, *, died: bool = False) -> Condition:
    """Like `_condition`, of a node whose bitmaps the store holds."""
    now = _condition(change, name, died=died)
    if now.record.kind != store.KIND_NODE:
        raise BitmapError(now.where, "keeps its bitmaps itself; QEMU resizes them with the image")
    return now
