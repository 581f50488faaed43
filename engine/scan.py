"""Finds the images and stores below folders, and has the default store remember where they are.

    folders ---> files that look like containers ---> index ---> places of the default store

A scan moves no bitmap and changes no image. A name that is in an image but in no store comes back by it; an image that
was moved is found by its UUID. Where two files could be meant, neither is taken.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from dirtmap.engine.host import Host, remember_container
from dirtmap.engine.index.reading import Container
from dirtmap.engine.namespace import decode_name
from dirtmap.engine.probe import probe_path
from dirtmap.engine.store import devices
from dirtmap.engine.store.identity import identity_of, is_twin
from dirtmap.engine.store.store import Change, Store
from dirtmap.fmt import store
from dirtmap.fmt.directory import FLAG_IN_USE
from dirtmap.fmt.errors import Error, StorageError
from dirtmap.fmt.index import DAMAGED, HELD, QCOW2, STORE, Member
from dirtmap.fmt.store import Identity, Record


@dataclass(slots=True)
class Summary:
    """What a scan has found.

    Attributes:
        images: qcow2 images.
        stores: store files.
        bitmaps: in all of them.
        inconsistent: of those, the ones that were left in use.
        held: images that another process has open for writing.
        damaged: what cannot be read, with the reason where it was read just now.
        twins: (path, original): images that carry another's identity.
        copies: (path, original): stores that do.
        clashes: (path, name): images or stores whose name is another's.
        moved: (path, name): images that are elsewhere now.
        gone: (path, name): images that are remembered and not there.
        learned: how many containers were not known before.
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
    learned: int = 0


def scan(
    host: Host,
    paths: Iterable[str],
    *,
    force_share: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Looks through folders, and takes in what is found.

    Args:
        host: whose default store and index learn.
        paths: folders or files.
        force_share: read images although another process writes to them.
        progress: called with (files done, files in all).

    Raises:
        StorageError: a path is not there, or the store or the index cannot be written.
    """
    summary = Summary()
    roots = [os.path.abspath(path) for path in paths]
    with host.opened(make=True):
        pass
    host.stores()
    files = list(_files(roots))
    found: list[Container] = []
    host.index.open()
    known_paths = host.index.paths()

    def candidates() -> Iterator[str]:
        for done, (path, known) in enumerate(files):
            if progress and done % 64 == 0:
                progress(done, len(files))
            if known or path in known_paths or _is_container(path):
                yield path
        if progress:
            progress(len(files), len(files))

    for container, problem in host.index.refresh(candidates(), force_share=force_share):
        summary.images += container.kind == QCOW2
        summary.stores += container.kind == STORE
        if container.condition == DAMAGED:
            summary.damaged.append((container.path, problem.what if problem else "as found before"))
        elif container.condition == HELD:
            summary.held.append(container.path)
        else:
            found.append(container)
    _Registration(host, summary, roots).take_in(found)
    in_use = dict.fromkeys((container.number for container in found), 0)
    for claim in host.index.claims():
        if claim.container in in_use:
            summary.bitmaps += 1
            in_use[claim.container] += bool(claim.flags & FLAG_IN_USE)
    for container in found:
        if in_use[container.number] and not _is_checked_out(host, container):
            summary.inconsistent += in_use[container.number]
    return summary


def _is_checked_out(host: Host, container: Container) -> bool:
    return any(
        host.is_checked_out(container, decode_name(member.name)) for member in host.index.members(container.number)
    )


def _files(roots: list[str]) -> Iterator[tuple[str, bool]]:
    """Regular files at or below those paths, each once, and whether it was named itself. Links are not followed."""
    seen: set[tuple[int, int]] = set()
    for root in sorted(roots, key=os.path.isdir):
        if not os.path.isdir(root):
            if not os.path.exists(root):
                raise StorageError(root, "No such file or directory")
            status = os.stat(root)
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
                    raise StorageError(root, error.strerror or str(error)) from error
                continue  # not ours to read, or gone meanwhile
            for entry in ordered:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    inode = (device, entry.inode())
                    if inode not in seen:
                        seen.add(inode)
                        yield entry.path, False


def _is_container(path: str) -> bool:
    try:
        return probe_path(path) is not None
    except StorageError:
        return False  # not ours to read, or gone meanwhile


class _Registration:
    """Brings the places of the default store up to date with what was found."""

    def __init__(self, host: Host, summary: Summary, roots: list[str]) -> None:
        self._host, self._summary, self._roots = host, summary, roots

    def take_in(self, found: list[Container]) -> None:
        """Remembers what is new, and where moved images are now."""
        index = self._host.index
        self._host.stores()  # brings the index up to date with them
        home = index.container(self._host.home)
        assert home is not None
        places = {os.fsdecode(member.path): member for member in index.members(home.number) if member.path}
        news: list[tuple[Container, Member | None]] = []
        carriers: dict[bytes, list[str]] = {}
        names: dict[bytes, set[bytes]] = {}
        stores: dict[bytes, list[str]] = {}
        for container in found:
            if container.kind == STORE:
                stores.setdefault(container.uuid, []).append(container.path)
            place = places.get(container.path)
            same = place is not None and place.uuid == container.uuid
            if container.kind == STORE or not any(container.uuid):
                if not same and container.path != self._host.home:
                    news.append((container, None))
                continue
            (member,) = index.members(container.number)
            carriers.setdefault(member.uuid, []).append(container.path)
            names.setdefault(member.name, set()).add(member.uuid)
            if not same or place is None or place.name != member.name:
                news.append((container, member))
        there = {container.path for container in found}
        gone = [item for item in places.items() if item[0] not in there and not os.path.exists(item[0])]
        dropped = [place for path, place in gone if place.kind == store.KIND_CONTAINER and self._is_below(path)]
        moved: list[tuple[bytes, str]] = []
        if news or dropped:
            with self._host.opened() as target, target.change() as change:
                for container, new in news:
                    if container.kind == STORE:
                        self._take_in_store(change, container, stores)
                    elif new is None:
                        self._remember(change, container.path, container.uuid)
                    else:
                        self._place(change, container, new, carriers, names, moved)
                for place in dropped:  # nothing but its place was known, and there it is not any more
                    if change.table.get(place.name):
                        change.table.remove(place.name)
        for image_uuid, path in moved:
            for where, on_it in self._host.devices_of(image_uuid).items():
                with self._host.opened(where) as target:
                    devices.move_roots(target, on_it, path)
        elsewhere = {image_uuid for image_uuid, _ in moved}
        for path, place in gone:
            named = place.kind != store.KIND_CONTAINER
            # A device's image is that of its root, and told with it. What nobody named is no news where nobody looked.
            if place.kind == store.KIND_DEVICE or place.uuid in elsewhere or not (named or self._is_below(path)):
                continue
            self._summary.gone.append((path, decode_name(place.name) if named else ""))

    def _is_below(self, path: str) -> bool:
        return any(path == root or path.startswith(root.rstrip("/") + "/") for root in self._roots)

    def _take_in_store(self, change: Change, container: Container, found: dict[bytes, list[str]]) -> None:
        """Remembers a store, unless it is a copy of the default store, or of one that is known or was found as well."""
        if container.path == self._host.home:
            return
        known = [os.fsdecode(record.path) for record in change.table if record.uuid == container.uuid]
        if container.path not in known:
            others = [path for path in known if _has_uuid(path, container.uuid)] or found[container.uuid]
            if change.header.uuid == container.uuid:
                others = [self._host.home]
            for original in others:
                if original != container.path and not _is_same_file(original, container.path):
                    self._summary.copies.append((container.path, original))
                    return
        self._remember(change, container.path, container.uuid)

    def _remember(self, change: Change, path: str, container_uuid: bytes) -> None:
        self._summary.learned += remember_container(change, path, container_uuid)

    def _place(
        self,
        change: Change,
        container: Container,
        member: Member,
        carriers: dict[bytes, list[str]],
        names: dict[bytes, set[bytes]],
        moved: list[tuple[bytes, str]],
    ) -> None:
        name, path = decode_name(member.name), container.path
        known = change.table.get(member.name)
        if known is None:
            twins = [other for other in carriers[member.uuid] if other != path]
            if twins:
                self._summary.twins.append((path, twins[0]))
                return
            if len(names[member.name]) > 1 or member.name.startswith(store.CONTAINER_PREFIX):
                self._summary.clashes.append((path, name))
                return
            self._summary.learned += 1
        elif known.kind != store.KIND_PLACE or known.uuid != member.uuid:
            self._summary.clashes.append((path, name))
            return
        elif os.fsdecode(known.path) == path:
            if _is_file(path, known.identity):
                return
            # Another file is in its place. Where it itself is elsewhere, it is the original still.
            for other in carriers[member.uuid]:
                if _is_file(other, known.identity):
                    self._summary.twins.append((path, other))
                    return
        elif is_twin(known, path):
            self._summary.twins.append((path, os.fsdecode(known.path)))
            return
        elif _is_same_file(os.fsdecode(known.path), path):
            return  # under another name, by a hard link
        else:
            self._summary.moved.append((path, name))
            moved.append((member.uuid, path))
        record = known or Record(
            name=member.name, kind=store.KIND_PLACE, uuid=member.uuid, size=0, generation=change.generation
        )
        change.table.put(
            replace(
                record,
                # That of its bitmaps, while they are in the store.
                size=record.size if record.nb_bitmaps else member.size,
                path=os.fsencode(path),
                identity=replace(identity_of(path), mtime_ns=0, size=0),
            )
        )
        if change.table.get(store.container_name(os.fsencode(path))):
            change.table.remove(store.container_name(os.fsencode(path)))


def _is_file(path: str, identity: Identity) -> bool:
    found = identity_of(path)
    return (found.device, found.inode) == (identity.device, identity.inode)


def _has_uuid(path: str, store_uuid: bytes) -> bool:
    try:
        with Store(path) as target:
            return target.read(lambda snapshot: snapshot.header.uuid) == store_uuid
    except Error:
        return False


def _is_same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False
