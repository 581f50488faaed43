"""Acts on the nodes of a store: which images there are, under which names, and which of them it holds bitmaps for.

A qcow2 image keeps its bitmaps, its name and its UUID itself; the store remembers its *place*, so that a copy of the
file, which carries the same UUID, is told from the original.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace

from dirtmap.engine.identity import carries, disk_size, identity_of, is_twin, lasting_identity
from dirtmap.engine.model.naming import decode_name, encode_name
from dirtmap.engine.namespaces.condition import (
    doubts,
    end_session,
    header_doubts,
    no_namespace,
    read_entries,
    refuse_held,
    refuse_session,
    refuse_tracked,
    refuse_unsettled,
    release_bits,
    require_free,
    rewrite,
)
from dirtmap.engine.namespaces.image import Image
from dirtmap.engine.storefile.file import Change, Store
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


def nodes(target: Store) -> list[Node]:
    """All nodes, by name."""
    found = target.read(lambda snapshot: [(record, doubts(snapshot, record)) for record in snapshot.table()])
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


def add_qcow2(target: Store, name: str, image: str, *, new_identity: bool = False) -> None:
    """Gives a qcow2 image a name and a UUID, written into the image, and remembers its place.

    Args:
        target: the store that remembers places.
        name: of the node; unique in the store.
        image: its path.
        new_identity: it is a copy of another image, and becomes one of its own.

    Raises:
        BitmapError: the name is taken, or the image has another one already.
        StorageError: the image cannot be looked at.
        As `Image.set_identity`.
    """
    path = os.path.abspath(image)
    with target.change() as change, Image(path) as opened:
        known = change.table.get(encode_name(name))
        if known:
            refuse_session(target.path, known)
        mine = known and opened.uuid and known.uuid == uuid.UUID(opened.uuid).bytes
        if known and (new_identity or not mine or is_twin(known, path)):
            raise BitmapError(f"{target.path}: {known.label}", "the name is taken")
        if opened.name not in (None, name) and not new_identity:
            what = f"is node '{opened.name}' already; rename that, or say --new-identity if it is a copy"
            raise BitmapError(path, what)
        # One that was raw when it became a node: what is written to this node would be missing in that one's bitmaps.
        refuse_second_name(change.table, path, identity_of(path), store.KIND_NODE)
        if new_identity or opened.name is None:
            opened.set_identity(name, new_uuid=new_identity)
        assert opened.uuid is not None  # it has an identity now
        if change.table.get(store.container_name(os.fsencode(path))):
            change.table.remove(store.container_name(os.fsencode(path)))  # found by a scan, before it had a name
        change.table.put(
            Record(
                name=encode_name(name),
                kind=store.KIND_PLACE,
                uuid=uuid.UUID(opened.uuid).bytes,
                size=opened.size,
                generation=change.generation,
                path=os.fsencode(path),
                identity=replace(identity_of(path), mtime_ns=0, size=0),
                extensions=known.extensions if known and mine else (),
            )
        )


def is_checked_out(target: Store, path: str, name: str, image_uuid: str) -> bool:
    """True where a tracker has a qcow2 image's bitmaps, or had them when it died; not for a copy of the file."""
    record = target.record(encode_name(name))
    if record is None or record.uuid != uuid.UUID(image_uuid).bytes or not record.tracked:
        return False
    return is_same_file(path, record.path)


def refuse_moved(target: Store, path: str, name: str, image_uuid: str) -> None:
    """Refuses a qcow2 image that was moved while its bitmaps were checked out, until its place is known again.

    Raises:
        BitmapError: says what makes it known.
    """
    record = target.record(encode_name(name))
    if record is None or record.uuid != uuid.UUID(image_uuid).bytes or not record.tracked:
        return
    if not is_checked_out(target, path, name, image_uuid) and not is_twin(record, path):
        what = (
            f"node '{printable(name)}', moved while a tracker had its bitmaps; 'index scan' finds it, then recover it"
        )
        raise BitmapError(path, what)


def refuse_twin(target: Store, path: str, name: str, image_uuid: str) -> None:
    """Refuses a qcow2 image that carries the identity of another file.

    Raises:
        BitmapError: names the original, and how to mend it.
    """
    record = target.record(encode_name(name))
    if record and record.uuid == uuid.UUID(image_uuid).bytes and is_twin(record, path):
        original = os.fsdecode(record.path)
        what = f"a copy of {original}, with its identity; 'node add --new-identity' gives it one of its own"
        raise BitmapError(path, what)


def remove_node(target: Store, name: str) -> None:
    """Forgets a node; a qcow2 image loses its identity, where it is still there and known by it.

    Raises:
        BitmapError: there is none of that name, or it has bitmaps.
    """
    with _identity_put_back(target, name) as changed, target.change() as change:
        record = _record(change, name, died=True)
        where = f"{target.path}: {record.label}"
        if record.kind == store.KIND_PLACE and not (os.path.exists(record.path) and carries(record)):
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
        if record.kind == store.KIND_PLACE:
            with Image(os.fsdecode(record.path)) as image:
                if _is_its_image(record, image):
                    _refuse_with_bitmaps(where, len(image))
                    changed.append(record)
                    image.set_identity(None)
        _refuse_with_bitmaps(where, record.nb_bitmaps)
        change.table.remove(record.name)


@contextmanager
def _identity_put_back(target: Store, name: str) -> Iterator[list[Record]]:
    """Gives a qcow2 image its identity back where the store's commit fails and goes on saying that the image has it.

    Yields:
        To be filled with the record of the image, once that is changed.
    """
    changed: list[Record] = []
    try:
        yield changed
    except Error:
        with suppress(Error):
            for record in changed:
                if (now := target.record(encode_name(name))) and now.uuid == record.uuid:
                    with Image(os.fsdecode(record.path)) as image:
                        image.set_identity(name, image_uuid=record.uuid)
        raise


def _is_its_image(record: Record, image: Image) -> bool:
    """True of the image that a place remembers; one of another name is what a rename left that was killed halfway."""
    name = None if image.name is None else encode_name(image.name)
    return name == record.name and image.uuid is not None and uuid.UUID(image.uuid).bytes == record.uuid


def _refuse_with_bitmaps(where: str, count: int) -> None:
    if count:
        raise BitmapError(where, f"has {counted(count, 'bitmap')}; remove or move them first")


def rename_node(
    target: Store,
    name: str,
    new: str,
    *,
    with_bitmaps: bool = False,
    keep: Callable[[Image], None] = lambda image: None,
) -> None:
    """Gives a node another name.

    Args:
        target: the store that knows it.
        name: what it is called now.
        new: what it will be called.
        with_bitmaps: also where it has bitmaps.
        keep: called with a qcow2 image before it is changed.

    Raises:
        BitmapError: there is none of that name, the new one is taken, a bitmap is held, or it has bitmaps and
            ``with_bitmaps`` is not said: their addresses change.
    """
    with _identity_put_back(target, name) as changed, target.change() as change:
        record = _record(change, name)
        where = f"{target.path}: {record.label}"
        require_free(change, encode_name(new))
        refuse_held(target.path, record)
        with ExitStack() as stack:
            image = None
            if record.kind == store.KIND_PLACE:
                image = stack.enter_context(Image(os.fsdecode(record.path)))
                if not _is_its_image(record, image):
                    raise BitmapError(
                        where, f"{image.path} is not its image any more; 'index scan' finds where that is"
                    )
                keep(image)
            count = record.nb_bitmaps if image is None else len(image)
            if count and not with_bitmaps:
                what = f"has {counted(count, 'bitmap')}, whose addresses would change; --with-bitmaps renames them, too"
                raise BitmapError(where, what)
            if image is not None:
                changed.append(record)
                image.set_identity(new)
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
    (refuse_tracked if died else refuse_session)(change.snapshot.file.path, record)
    return record


def _stored(change: Change, name: str, *, died: bool = False) -> Record:
    record = _record(change, name, died=died)
    if record.kind != store.KIND_NODE:
        where = f"{change.snapshot.file.path}: {record.label}"
        raise BitmapError(where, "keeps its bitmaps itself; QEMU resizes them with the image")
    return record
