"""Acts on the nodes of a store: which images there are, under which names, and which of them it holds bitmaps for.

A qcow2 image keeps its bitmaps, its name and its UUID itself; the store remembers its *place*, so that a copy of the
file, which carries the same UUID, is told from the original.
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
    refuse_unsettled,
    rewrite,
)
from dirtmap.engine.namespaces.image import Image, Naming
from dirtmap.engine.namespaces.ports import HostPort
from dirtmap.engine.storefile.directory import header_doubts, no_namespace, read_entries, release_bits, require_free
from dirtmap.engine.storefile.file import Change, Snapshot, Store
from dirtmap.engine.system.file import is_same_file
from dirtmap.engine.system.probe import STORE, probe_path
from dirtmap.fmt import store
from dirtmap.fmt.errors import BitmapError, Error, FormatError, StorageError, counted, printable
from dirtmap.fmt.store import Identity, Record

KINDS = store.KIND_NODE, store.KIND_PLACE  # of nodes


def add_node(target: Store, name: str, image: str) -> None:
    """Gives an image a namespace of its own.

    Args:
        target: the store that will hold its bitmaps.
        name: of the node; unique among the nodes and devices of the store.
        image: its path; remembered as an absolute one.

    Raises:
        BitmapError: the name is taken, or the image is another node's, or a store.
        StorageError: the image cannot be looked at.
    """
    raw_name = encode_name(name)
    path = os.path.abspath(image)
    identity = identity_of(path)
    if probe_path(path) == STORE:
        raise BitmapError(image, "a store, and not the image of a disk")
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
    """Refuses a second node on one image: what is written through one would be missing in the other's bitmaps.

    Args:
        records: of the nodes that there are.
        path: of the image.
        identity: of the image.
        kinds: of nodes that count. Of qcow2 images the image itself says which node it is.

    Raises:
        BitmapError: names the node that it is.
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
        size: of its disk, bytes.
        bitmaps: how many it has in the store; None where they are in the image itself.
        doubt: why they count as all dirty, or None.
    """

    name: str
    uuid: str
    path: str
    size: int
    bitmaps: int | None
    doubt: str | None


def nodes(target: Store, broken: list[FormatError] | None = None) -> list[Node]:
    """All nodes of a store, by name.

    Args:
        target: the store.
        broken: takes in why a bucket cannot be read; None: that is raised.
    """

    def look(snapshot: Snapshot) -> list[tuple[store.Record, str | None]]:
        table = snapshot.table()
        return [(record, doubts(snapshot, record)) for record in (table if broken is None else table.readable(broken))]

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
    """Of a qcow2 image, what it says itself, if it can be read: whoever resizes it tells no store."""
    if record.kind == store.KIND_PLACE:
        with suppress(StorageError):
            return disk_size(os.fsdecode(record.path))
    return record.size


def add_qcow2(host: HostPort, target: Store, name: str, image: str, *, new_identity: bool = False) -> None:
    """Gives a qcow2 image a name and a UUID, written into the image, and remembers its place.

    Args:
        host: of the image.
        target: the store that remembers places.
        name: of the node; unique in the store.
        image: its path.
        new_identity: it is a copy of another image, and becomes one of its own.

    Raises:
        BitmapError: the name is taken, or the image has another one already.
        StorageError: the image cannot be looked at.
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
        # One that was raw when it became a node: what is written to this node would be missing in that one's bitmaps.
        refuse_second_name(change.table, path, identity_of(path), store.KIND_NODE)
        if new_identity or naming.identity is None:
            image_uuid = naming.set(name, uuid.uuid4().bytes if new_identity else None)
        else:
            image_uuid = naming.identity[1]
        if change.table.get(store.container_name(os.fsencode(path))):
            change.table.remove(store.container_name(os.fsencode(path)))  # found by a scan, before it had a name
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
    """Forgets a node; a qcow2 image loses its identity, where it is still there and known by it.

    Raises:
        BitmapError: there is none of that name, or it has bitmaps.
    """
    with _its_image(host, target, name, gone=True) as naming, target.change() as change:
        record = _record(change, name, died=True)
        where = f"{target.path}: {record.label}"
        if record.kind == store.KIND_PLACE and naming is None:
            # With the image its bitmaps are gone, and nothing of ours is in what has taken its place; what a tracker
            # had of them when it died is of no use.
            end_session(change, record)
            with suppress(FormatError):  # else what it leads to is not known, and leaks
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
    """A qcow2 node's image, locked to change its identity: before the store, as the lock order has it.

    The identity is put back where the block fails, and the store goes on saying that the image has it.

    Args:
        host: of the image.
        target: the store that remembers the image's place.
        name: of the node.
        gone: the image need not be there.

    Yields:
        None for a node that is no qcow2 image, and for an image that is ``gone``.
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
    """Gives a node another name.

    Args:
        host: of a qcow2 image.
        target: the store that knows it.
        name: what it is called now.
        new: what it will be called.
        with_bitmaps: also where it has bitmaps.

    Raises:
        BitmapError: there is none of that name, the new one is taken, a bitmap is held, or it has bitmaps and
            ``with_bitmaps`` is not said: their addresses change.
    """
    with _its_image(host, target, name) as naming, target.change() as change:
        record = _record(change, name)
        where = f"{target.path}: {record.label}"
        require_free(change, encode_name(new))
        refuse_held(target.path, record)
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
    """Adopts the size that a node's image has now: old bits stay, new space is dirty.

    The caller vouches that the image was resized and nothing else. Whatever else puts its bitmaps in doubt, another
    file in its image's place or a lost commit, makes all of them dirty.

    Returns:
        The new size, bytes.

    Raises:
        BitmapError: there is no such node, its size has not changed, or a bitmap is held or too fine for the new size.
        StorageError: the image cannot be looked at.
    """
    with target.change() as change:
        record = _stored(change, name, died=True)
        identity = lasting_identity(os.fsdecode(record.path))
        if identity.size == record.size:
            what = f"its image has {record.size} bytes, as before: there is no new size to adopt"
            raise BitmapError(f"{target.path}: {record.label}", what)
        refuse_unsettled(change.snapshot, record)
        refuse_held(target.path, record)
        # Another size at another time is what the caller has just explained.
        explained = replace(record.identity, size=identity.size, mtime_ns=identity.mtime_ns)
        doubted = doubts(change.snapshot, replace(record, identity=explained)) is not None
        rewrite(change, record, replace(record, size=identity.size, identity=identity), doubted=doubted)
        return identity.size


def confirm_node(target: Store, name: str) -> None:
    """States that a node's bitmaps are right for the image as it is now, though it looks changed.

    Raises:
        BitmapError: there is no such node, its size has changed, or its bitmaps are in doubt for another reason.
        StorageError: the image cannot be looked at.
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


def _record(change: Change, name: str, *, died: bool = False) -> Record:
    """The record of a node that nobody tracks; with ``died``, of one whose tracker has died, too."""
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
