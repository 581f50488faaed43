"""Scans folders for images and stores, and records in the host's stores where they are.

    folders ---> files that look like containers ---> index ---> places, in the store that has them, or the default one

A scan moves no bitmap and changes no image. A name that an image has and no store knows is learned from the image.
An image that was moved is found by its UUID. If several files have the same UUID, the one with the recorded inode is
the original. If none has that inode, none is recorded.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from dirtmap.engine.host.host import Host
from dirtmap.engine.host.registry import remember_container
from dirtmap.engine.host.stores import Stores
from dirtmap.engine.identity import identity_of, is_twin
from dirtmap.engine.index.reading import Container, look
from dirtmap.engine.model.naming import decode_name
from dirtmap.engine.namespaces import devices
from dirtmap.engine.namespaces.whereabouts import is_checked_out
from dirtmap.engine.qcow2.reading import read_identity
from dirtmap.engine.storefile.directory import rename_record
from dirtmap.engine.storefile.file import Change, Store
from dirtmap.engine.system.file import existing, is_gone, is_same_file
from dirtmap.engine.system.probe import probe_path
from dirtmap.fmt import store
from dirtmap.fmt.directory import FLAG_IN_USE
from dirtmap.fmt.errors import Error, StorageError, printable
from dirtmap.fmt.identity import Identity
from dirtmap.fmt.index import DAMAGED, HELD, KIND_FAULTY, KIND_QCOW2, KIND_STORE, SOUND, Member
from dirtmap.fmt.store import Record


@dataclass(slots=True)
class Summary:
    """The result of a scan.

    Attributes:
        images: number of qcow2 images.
        stores: number of stores.
        bitmaps: number of bitmaps in those that can be read, twins included.
        inconsistent: number of those bitmaps that were left in use.
        held: images that another process has open for writing.
        damaged: (path, reason): containers that cannot be read; the reason names the field.
        twins: (path, original): images that carry the identity of another image.
        copies: (path, original): stores that carry the identity of another store.
        clashes: (path, name): images or stores with a name that belongs to another.
        moved: (path, name): images with a new path or a new name.
        gone: (path, name): images whose recorded path no longer exists.
        unreadable: (path, reason): folders and files that may not be read, so that their content is unknown.
        learned: number of containers that can be read and were not known before.
    """

    images: int = 0
    stores: int = 0
    bitmaps: int = 0
    inconsistent: int = 0
    held: list[str] = field(default_factory=list)
    damaged: list[tuple[str, str]] = field(default_factory=list)
    twins: list[tuple[str, str]] = field(default_factory=list)
    copies: list[tuple[str, str]] = field(default_factory=list)
    clashes: list[tuple[str, str]] = field(default_factory=list)
    moved: list[tuple[str, str]] = field(default_factory=list)
    gone: list[tuple[str, str]] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    learned: int = 0


def scan(
    host: Host,
    paths: Iterable[str],
    *,
    force_share: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Scans folders, and records what it finds.

    Args:
        host: the host whose default store and index are updated.
        paths: folders or files.
        force_share: reads images even while another process writes to them.
        progress: called with (files done, files in all).

    Raises:
        StorageError: a path does not exist, or the store or the index cannot be written.
    """
    summary = Summary()
    roots = [os.path.realpath(existing(path)) for path in paths]  # one path per file, whichever link leads to it
    stores = host._parts.stores
    with stores.opened(make=True):
        pass
    stores.stores()
    files = list(_files(roots, summary))
    found: list[Container] = []
    remembered = {*stores.containers(), *roots}
    stores.index.open()
    known_paths = stores.index.paths()
    asked: list[str] = []

    def candidates() -> Iterator[str]:
        for done, (path, known) in enumerate(files):
            if progress and done % 64 == 0:
                progress(done, len(files))
            if known or path in known_paths or _is_container(path, summary):
                asked.append(path)
                yield path
        if progress:
            progress(len(files), len(files))

    for container, problem in stores.index.refresh(candidates(), force_share=force_share):
        found.append(container)
        summary.images += container.kind == KIND_QCOW2
        summary.stores += container.kind == KIND_STORE
        if container.kind == KIND_FAULTY and container.path not in remembered:
            continue  # only the index knows that it once was a container
        if container.condition == DAMAGED:
            summary.damaged.append((container.path, _what(stores, problem, container.path)))
        elif container.condition == HELD:
            summary.held.append(container.path)
    read = {container.path for container in found}
    for path in asked:
        if path not in read:
            _is_container(path, summary)
    _Registration(host, summary, roots).take_in(found)
    in_use = {container.number: 0 for container in found if container.condition == SOUND}
    for claim in stores.index.claims():
        if claim.container in in_use:
            summary.bitmaps += 1
            in_use[claim.container] += bool(claim.flags & FLAG_IN_USE)
    for container in found:
        if in_use.get(container.number) and not _is_checked_out(host, container):
            summary.inconsistent += in_use[container.number]
    return summary


def _what(stores: Stores, problem: Error | None, path: str) -> str:
    """The field and the fault of a damaged container. Reads it again if that was found by an earlier scan."""
    if problem is None:
        with contextlib.suppress(StorageError):
            again = look(stores.index.readers, lambda key: None, path, None, force_share=True)
            problem = again.problem if again else None
    return str(problem).removeprefix(f"{printable(path)}: ") if problem else "as found before"


def _is_checked_out(host: Host, container: Container) -> bool:
    """True for a qcow2 image whose bitmaps are checked out by a tracker."""
    return container.kind == KIND_QCOW2 and any(
        is_checked_out(host._parts, decode_name(member.name), member.uuid, container.path)
        for member in host._parts.stores.index.members(container.number)
        if member.name
    )


def _files(roots: list[str], summary: Summary) -> Iterator[tuple[str, bool]]:
    """Regular files at or below those paths, each once, and whether the caller named it. Links are not followed."""
    seen: set[tuple[int, int]] = set()
    for root in sorted(roots, key=os.path.isdir):
        if not os.path.isdir(root):
            try:
                status = os.stat(root)
            except OSError as error:
                raise StorageError(root, error.strerror or str(error), error.errno) from error
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                yield root, True
            continue
        waiting = [root]
        while waiting:
            folder = waiting.pop()
            try:
                with os.scandir(folder) as entries:
                    device = os.stat(folder).st_dev
                    ordered = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                if folder == root:
                    raise StorageError(root, error.strerror or str(error), error.errno) from error
                _tell_unreadable(summary, folder, error)
                continue
            for entry in ordered:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    inode = (device, entry.inode())
                    if inode not in seen:
                        seen.add(inode)
                        yield entry.path, False


def _is_container(path: str, summary: Summary) -> bool:
    try:
        return probe_path(path) is not None
    except StorageError as error:
        _tell_unreadable(summary, path, error)
        return False


def _tell_unreadable(summary: Summary, path: str, error: OSError | StorageError) -> None:
    """Records what cannot be read, unless it is gone meanwhile."""
    if not is_gone(path):
        summary.unreadable.append(
            (path, error.what if isinstance(error, StorageError) else error.strerror or str(error))
        )


class _Registration:
    """Updates the recorded places of the host's containers: each in the store that has it, else in the default store.

    Args:
        host: the host whose stores are updated.
        summary: is told what became of each container.
        roots: the paths below which everything was scanned.
    """

    def __init__(self, host: Host, summary: Summary, roots: list[str]) -> None:
        self._stores, self._names, self._summary, self._roots = host._parts.stores, host._parts.names, summary, roots
        # The members that each store remembers or holds, by the path of the store, the default store first.
        self._members: dict[str, list[Member]] = {}
        # Both by image UUID: the store that has the image's place and the name there; the files that carry the UUID.
        self._places: dict[bytes, tuple[str, bytes]] = {}
        self._carriers: dict[bytes, list[str]] = {}
        self._images: list[tuple[Container, Member]] = []  # with a name
        self._uuids: dict[bytes, set[bytes]] = {}  # by name, the UUIDs of the images found
        self._owners: dict[bytes, dict[bytes, str]] = {}  # by name of a node or device: UUID to store
        self._moved: list[tuple[bytes, str]] = []

    def take_in(self, found: list[Container]) -> None:
        """Records what is new, and where moved images are now."""
        self._take_in_containers(found)
        self._look(found)
        self._tell_clashes(found)
        for where, images in self._news().items():
            with self._stores.opened(where) as target, target.change() as change:
                for container, member in images:
                    self._place(change, container, member)
        for image_uuid, path in self._moved:
            for where, on_it in self._names.devices_of(image_uuid).items():
                with self._stores.opened(where) as target:
                    devices.move_roots(target, on_it, path)
        self._take_in_unread(found)
        self._tell_gone(found)

    def _take_in_containers(self, found: list[Container]) -> None:
        """Records stores, and images without a name. Removes the records of those that are gone."""
        index = self._stores.index
        self._stores.stores()  # brings the index up to date with them
        home = index.container(self._stores.home)
        assert home is not None
        known = {os.fsdecode(member.path): member for member in index.members(home.number) if _is_unnamed(member)}
        news = [
            container
            for container in found
            if container.condition == SOUND
            and (container.kind == KIND_STORE or not any(container.uuid))
            and (container.path not in known or known[container.path].uuid != container.uuid)
            and not (container.kind == KIND_STORE and self._is_home(container.path))
        ]
        there = {container.path for container in found}
        # Containers without a name are reported gone only below the scanned paths.
        gone = [path for path in known if path not in there and self._is_below(path) and is_gone(path)]
        self._summary.gone += [(path, "") for path in gone]
        # A file that was a store and is none any more cannot be repaired as a store.
        faulty = {container.path for container in found if container.kind == KIND_FAULTY}
        lost = [path for path, place in known.items() if path in faulty and any(place.uuid)]
        if not news and not gone and not lost:
            return
        stores: dict[bytes, list[str]] = {}
        for container in found:
            if container.kind == KIND_STORE:
                stores.setdefault(container.uuid, []).append(container.path)
        with self._stores.opened() as target, target.change() as change:
            recorded = _stores_in(change) if any(container.kind == KIND_STORE for container in news) else {}
            for container in news:
                if container.kind == KIND_STORE:
                    self._take_in_store(change, container, stores, recorded)
                else:
                    self._remember(change, container.path, container.uuid)
            for path in (*gone, *lost):  # only its path was known, and it is not there any more
                if change.table.get(known[path].name):
                    change.table.remove(known[path].name)

    def _take_in_unread(self, found: list[Container]) -> None:
        """Remembers what cannot be read now, so that it is tried again; forgets what has proven to be a copy since.

        Without that nobody would be told that answers lack what is in it. What may be a copy is left out, as one is
        that can be read.
        """
        known = {member.path for members in self._members.values() for member in members}
        known |= {member.path for _, member in self._images}  # has a place now, or another has its name
        unread = [
            container.path
            for container in found
            if container.condition != SOUND
            and container.kind != KIND_FAULTY
            and os.fsencode(container.path) not in known
            and not self._is_home(container.path)
            and not self._may_be_copy(container.path)
        ]
        copies = [store.container_name(os.fsencode(path)) for path, _ in (*self._summary.twins, *self._summary.copies)]
        at_home = {member.name for member in self._members[self._stores.home] if not any(member.uuid)}
        copies = [name for name in copies if name in at_home]
        if not unread and not copies:
            return
        with self._stores.opened() as target, target.change() as change:
            for path in unread:
                remember_container(change, path, bytes(16))
            for name in copies:
                if change.table.get(name):
                    change.table.remove(name)

    def _may_be_copy(self, path: str) -> bool:
        """True of an image that cannot be read and says that it is one which is known, or was found as well."""
        image_uuid = _identity(path)
        return image_uuid is not None and (image_uuid in self._places or len(self._carriers.get(image_uuid, ())) > 1)

    def _look(self, found: list[Container]) -> None:
        """Collects what the stores know, and which images carry which name and UUID."""
        index = self._stores.index
        for path in self._stores.stores():
            container = index.container(path)
            self._members[path] = index.members(container.number) if container else []
            for member in self._members[path]:
                if member.kind == store.KIND_PLACE:
                    self._places.setdefault(member.uuid, (path, member.name))
                if not _is_unnamed(member):
                    self._owners.setdefault(member.name, {}).setdefault(member.uuid, path)
        for container in found:
            if container.condition != SOUND:
                # It cannot be used now, but it may be the original of which others are copies.
                if image_uuid := _identity(container.path):
                    self._carriers.setdefault(image_uuid, []).append(container.path)
                    if container.condition == HELD and (held := self._as_it_says(container.path)) is not None:
                        self._images.append((container, held))
                        self._uuids.setdefault(held.name, set()).add(held.uuid)
            elif container.kind == KIND_QCOW2 and any(container.uuid):
                for member in index.members(container.number):  # none if another process has since found it held
                    self._images.append((container, member))
                    self._carriers.setdefault(member.uuid, []).append(container.path)
                    self._uuids.setdefault(member.name, set()).add(member.uuid)

    def _as_it_says(self, path: str) -> Member | None:
        """What an image that another process writes to says of itself: its name and UUID, which nobody changes then.

        So it is found by them later, wherever it is. Which bitmaps it has counts when it can be read.
        """
        with contextlib.suppress(StorageError):
            read = look(self._stores.index.readers, lambda key: None, path, None, force_share=True)
            if read is not None and read.container.condition == SOUND:
                for _, members in read.leaves.values():
                    return next((member for member, _ in members if member.name), None)
        return None

    def _news(self) -> dict[str, list[tuple[Container, Member]]]:
        """Images with an unknown or outdated place, or several carriers, by the store that has the place."""
        known = {
            (member.path, member.uuid, member.name)
            for members in self._members.values()
            for member in members
            if member.kind == store.KIND_PLACE
        }
        news: dict[str, list[tuple[Container, Member]]] = {}
        for container, member in self._images:
            as_it_is = (os.fsencode(container.path), member.uuid, member.name) in known
            if not as_it_is or len(self._carriers[member.uuid]) > 1:
                where, _ = self._places.get(member.uuid, (self._stores.home, b""))
                news.setdefault(where, []).append((container, member))
        return news

    def _tell_clashes(self, found: list[Container]) -> None:
        """Reports stores that have a name which belongs to another."""
        for container in found:
            if container.kind == KIND_STORE and not self._is_home(container.path):
                for member in self._members.get(container.path, ()):
                    if not _is_unnamed(member) and self._is_taken(member, container.path):
                        self._summary.clashes.append((container.path, decode_name(member.name)))

    def _is_taken(self, member: Member, path: str | None = None) -> bool:
        """True if the name belongs to another namespace in a store, other than the store at ``path``."""
        owners = self._owners.get(member.name, {})
        return any(owner != member.uuid and where != path for owner, where in owners.items())

    def _tell_gone(self, found: list[Container]) -> None:
        """Reports named images that are gone. A device's image is that of its root, and reported as that."""
        there = {container.path for container in found}
        elsewhere = {image_uuid for image_uuid, _ in self._moved}
        named = [
            (os.fsdecode(member.path), member)
            for members in self._members.values()
            for member in members
            if member.kind in (store.KIND_NODE, store.KIND_PLACE) and member.uuid not in elsewhere
        ]
        gone = {path for path in {path for path, _ in named} if path not in there and is_gone(path)}
        self._summary.gone += [(path, decode_name(member.name)) for path, member in named if path in gone]

    def _is_home(self, path: str) -> bool:
        return path == self._stores.home or is_same_file(path, self._stores.home)

    def _is_below(self, path: str) -> bool:
        return any(path == root or path.startswith(root.rstrip("/") + "/") for root in self._roots)

    def _take_in_store(
        self, change: Change, container: Container, found: dict[bytes, list[str]], recorded: dict[bytes, list[str]]
    ) -> None:
        """Records a store, unless it is a copy of the default store, of a known store, or of one just found.

        Args:
            change: of the default store.
            container: the store.
            found: the stores that the scan has found, by UUID.
            recorded: those that the default store knows, by UUID; takes this one in.
        """
        known = recorded.setdefault(container.uuid, [])
        if container.path not in known:
            others = [path for path in known if _has_uuid(path, container.uuid)]
            if any(is_same_file(path, container.path) for path in others):
                return  # under another name, by a link
            others = others or found[container.uuid]
            if change.header.uuid == container.uuid:
                others = [self._stores.home]
            for original in others:
                if original != container.path:
                    self._summary.copies.append((container.path, original))
                    return
            known.append(container.path)
        self._remember(change, container.path, container.uuid)

    def _remember(self, change: Change, path: str, container_uuid: bytes) -> None:
        self._summary.learned += remember_container(change, path, container_uuid)

    def _place(self, change: Change, container: Container, member: Member) -> None:
        """Updates the place of an image, unless another file is the original."""
        name, path = decode_name(member.name), container.path
        known = change.table.get(member.name)
        if known is None and member.uuid in self._places:
            # A rename was killed before it reached the store. The name in the image is the right one.
            known = change.table.get(self._places[member.uuid][1])
        others = [other for other in self._carriers[member.uuid] if other != path]
        if known is None:
            if others:
                self._summary.twins.append((path, others[0]))
                return
            if len(self._uuids[member.name]) > 1 or member.name.startswith(store.CONTAINER_PREFIX):
                self._summary.clashes.append((path, name))
                return
        elif known.kind != store.KIND_PLACE or known.uuid != member.uuid:
            self._summary.clashes.append((path, name))
            return
        elif (original := _original(known, path, others)) is not None:
            self._summary.twins.append((path, original))
            return
        if (known is None or known.name != member.name) and self._is_taken(member):
            self._summary.clashes.append((path, name))
            return
        if known is None:
            self._summary.learned += 1
        elif is_same_file(os.fsdecode(known.path), path):
            if known.name == member.name and _is_file(path, known.identity):
                return
            path = os.fsdecode(known.path)  # keeps the recorded path if a link leads to the same file
        else:
            self._moved.append((member.uuid, path))
        if known is not None and (os.fsdecode(known.path), known.name) != (path, member.name):
            self._summary.moved.append((path, name))
            known = rename_record(change, known, member.name)
        record = known or Record(
            name=member.name, kind=store.KIND_PLACE, uuid=member.uuid, size=0, generation=change.generation
        )
        change.table.put(
            replace(
                record,
                # While the bitmaps are checked out into the store, the size is that of the bitmaps.
                size=record.size if record.nb_bitmaps else member.size,
                path=os.fsencode(path),
                identity=Identity(*identity_of(path).place),
            )
        )
        if change.table.get(store.container_name(os.fsencode(path))):
            change.table.remove(store.container_name(os.fsencode(path)))


def _original(known: Record, path: str, others: list[str]) -> str | None:
    """The file that is the image which a store remembers, if it is not the one at ``path``; None if that is it.

    Args:
        known: the place record of the image.
        path: of a file that carries the image's UUID.
        others: the other files found that carry it.
    """
    there = os.fsdecode(known.path)
    if _is_file(path, known.identity):
        return there if not is_same_file(path, there) and _is_file(there, known.identity) else None
    for other in others:
        if _is_file(other, known.identity):
            return other
    if there == path:
        return None  # it replaced the recorded file, say from a backup
    if is_twin(known, path) or not (is_gone(there) or os.access(there, os.R_OK)):
        return there
    return others[0] if others else None  # moved to another file system, or all are copies


def _is_file(path: str, identity: Identity) -> bool:
    try:
        found = identity_of(path)
    except StorageError:
        return False
    return found.is_file(identity)


def _stores_in(change: Change) -> dict[bytes, list[str]]:
    """The paths of the stores that the default store knows, by their UUIDs; read once for all that a scan finds."""
    found: dict[bytes, list[str]] = {}
    for record in change.table:
        if record.kind == store.KIND_CONTAINER and any(record.uuid):
            found.setdefault(record.uuid, []).append(os.fsdecode(record.path))
    return found


def _is_unnamed(member: Member) -> bool:
    return member.kind == store.KIND_CONTAINER


def _identity(path: str) -> bytes | None:
    """The UUID of an image, 16 bytes, even if the image cannot be read as a whole; None if it has none."""
    try:
        found = read_identity(path)
    except Error:
        return None
    return uuid.UUID(found[1]).bytes if found else None


def _has_uuid(path: str, store_uuid: bytes) -> bool:
    try:
        with Store(path) as target:
            return target.read(lambda snapshot: snapshot.header.uuid) == store_uuid
    except Error:
        return False
