"""The way in: what a target means, which kind of container holds it, and the room that knows that kind.

"disk.qcow2", "file:a b"      a path: a qcow2 image, or a whole store
"drive0", "node:drive0"       a node or device, wherever its container is; see `dirtmap.engine.host.resolver`
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from dirtmap.engine.model.namespace import ImageInfo, Namespace, Recovery, Transaction
from dirtmap.engine.model.naming import encode_name
from dirtmap.engine.system.file import open_file
from dirtmap.engine.system.probe import STORE, index_folder, probe, probe_path
from dirtmap.fmt.errors import (
    BitmapError,
    BitmapNotFoundError,
    Error,
    FormatError,
    LockedError,
    StorageError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from dirtmap.engine.host.registry import Host
    from dirtmap.engine.model.report import CheckReport


@dataclass(frozen=True, slots=True)
class Place:
    """What a target was found to mean.

    Attributes:
        path: of the container.
        node: the namespace of a store, or None: the container as a whole.
        is_device: the namespace is a device's, as a target that is a name tells.
    """

    path: str
    node: str | None = None
    is_device: bool = False

    def __str__(self) -> str:
        return self.path if self.node is None else f"{self.path}: {self.node}"


@dataclass(frozen=True, slots=True)
class Named:
    """A target still to be looked up, in a default store and with an index of the user's choice."""

    text: str
    store: str | None = None
    index: str | None = None

    def __str__(self) -> str:
        return self.text


Target = str | os.PathLike[str] | Place | Named


def default_store(index: str | None = None) -> str:
    """Where the default store is: ``$DIRTMAP_STORE``, else ``default.dmap`` beside the index."""
    if path := os.environ.get("DIRTMAP_STORE"):
        return path
    return os.path.join(os.path.dirname(default_index(index)), "default.dmap")


def default_index(index: str | None = None) -> str:
    """Where the index is: as given, else ``$DIRTMAP_INDEX``, else the place that is usual for the user."""
    if path := index or os.environ.get("DIRTMAP_INDEX"):
        return path
    if os.geteuid() == 0:
        return "/var/lib/dirtmap/index"
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(state, "dirtmap", "index")


def this_host(store: str | None = None, index: str | None = None) -> Host:
    """The host as a default store and an index tell of it; the usual ones where None."""
    from dirtmap.engine.host.registry import Host

    usual = Host(default_store(index), default_index(index))
    if store is None or os.path.abspath(store) == usual.home:
        return usual
    return Host(store, default_index(index), usual)


def remember(store: str | None, index: str | None = None) -> None:
    """Has the usual default store know a store that was chosen, so that what is in it is found without choosing it.

    Where that cannot be written, it stays as it is: whoever chose the store can choose it again.
    """
    if store is not None:
        with contextlib.suppress(Error):
            this_host(None, index).remember_store(store)


def locate(target: Target, store: str | None = None, index: str | None = None) -> Place:
    """Finds out what a target means, without opening it.

    Args:
        target: a path, a node's name or a device's; ``file:``, ``node:`` or ``device:`` in front says which.
        store: the default store, which knows the others; the usual one where None.
        index: path of the index; the usual one where None.

    Raises:
        BitmapError: it could be either; or the name is not unique.
        BitmapNotFoundError: neither a file nor a name.
        StorageError: not a file, and there is no store to look names up in.
    """
    if isinstance(target, Place):
        return target
    if isinstance(target, Named):
        return locate(target.text, target.store or store, target.index or index)
    text = os.fspath(target)
    if text.startswith("file:"):
        return Place(text.removeprefix("file:"))
    where = store or default_store(index)
    kind = next((kind for kind in ("node", "device") if text.startswith(f"{kind}:")), None)
    is_file = kind is None and os.path.lexists(text)
    if is_file and ("/" in text or "." in text or not os.path.exists(where)):
        return Place(text)
    if not os.path.exists(where):
        what = "" if kind else "no such file, and "
        raise StorageError(
            text, f"{what}no store at {where} to look the {kind or 'name'} up in; 'index scan' makes one"
        )
    found = this_host(where, index).resolve(text.removeprefix(f"{kind}:"))
    if found is not None and kind is not None and (kind == "device") != found.is_device:
        found = None
    if is_file and found:
        what = f"both a file and a {found.what} of {found.store}: say file:{text} or {found.what}:{text}"
        raise BitmapError(text, what)
    if is_file:
        return Place(text)
    if found is None:
        what = f"no {kind} of {where}" if kind else f"neither a file nor a node or device of {where}"
        raise BitmapNotFoundError(text, what)
    return Place(found.container, found.name if found.in_store else None, found.is_device)


def require_format(target: Target, wanted: str | None) -> None:
    """Holds a user's ``-f`` against what the container is.

    Raises:
        FormatError: it is something else.
    """
    path = locate(target).path
    if wanted and wanted != probe_path(path):
        raise FormatError(path, f"not of format {wanted}")


def open(target: Target, *, store: str | None = None, index: str | None = None, force_share: bool = False) -> Namespace:
    """Opens the bitmaps of an image.

    Args:
        target: a path, a node's name or a device's.
        store: the default store, which knows the others; the usual one where None.
        index: path of the index; the usual one where None.
        force_share: read a qcow2 image although another process writes to it; what it has in memory is not seen.

    Raises:
        FormatError: neither a qcow2 image nor in a store, one that QEMU would refuse, or one that is unsafe to use.
        BitmapError: no such node or device, the target is ambiguous, or a copy of something else.
        LockedError: open for writing elsewhere.
        StorageError: cannot be opened or read.
    """
    place = locate(target, store, index)
    here = _host_of(target, store, index)
    if place.node is not None:
        from dirtmap.engine.namespaces.stored import StoredImage
        from dirtmap.engine.storefile.file import Store

        with contextlib.ExitStack() as stack:
            opened = stack.enter_context(Store(place.path))
            here().look_after(opened)
            stored = StoredImage(opened, place.node)
            stored.look_after = here().look_after
            stored.find_node = lambda node: _open_node(node, here)
            name = place.node
            stored.change_root = lambda root, unchanged: here().set_root(name, root, content_unchanged=unchanged)
            stack.pop_all()
            return stored
    if probe_path(place.path) == STORE:
        raise _a_whole_store(place.path)
    from dirtmap.engine.namespaces.image import Image

    try:
        image = Image(place.path, force_share=force_share)
    except LockedError:
        if (tracked := _tracked(place.path, here)) is not None:
            return tracked  # whoever has it open: the bitmaps are in the store
        raise
    try:
        if image.uuid is not None and image.name is not None and here.exists():
            here().refuse_twin(image.path, image.name, image.uuid)
            if (tracked := _tracked(image.path, here, (image.name, image.uuid))) is not None:
                image.close()
                return tracked
            here().keep(image)
    except BaseException:
        image.close()
        raise
    return image


def _open_node(node: bytes, here: _HostOf) -> Namespace | None:
    """Opens the node of a UUID; None where no store of the host has it."""
    found = here().by_uuid(node)
    if found is None or found.is_device:
        return None
    place = Place(found.store, found.name) if found.in_store else Place(found.path)
    image = open(place, store=found.store, index=here.index)
    if image.uuid is not None and UUID(image.uuid).bytes == node:
        return image
    image.close()
    return None


def _a_whole_store(path: str) -> BitmapError:
    return BitmapError(path, "a store of many images: name one of its nodes")


def _tracked(path: str, here: _HostOf, identity: tuple[str, str] | None = None) -> Namespace | None:
    """The bitmaps of a qcow2 image that a tracker has, or had when it died; None where they are in the image.

    Args:
        path: the image.
        here: the host, one of whose stores remembers the image's place.
        identity: its name and UUID, where they are known.
    """
    if not here.exists():
        return None
    if identity is None:
        from dirtmap.engine.namespaces.image import read_identity

        identity = read_identity(path)
    if identity is None:
        return None
    place = here().is_checked_out(path, *identity)
    if place is None:
        here().refuse_moved(path, *identity)
        return None
    from dirtmap.engine.namespaces.checked_out import TrackedImage

    return TrackedImage(path, place.store, place.name)


def _refuse_tracked(path: str, here: _HostOf) -> None:
    """Refuses a qcow2 image whose bitmaps are checked out, for acts that do not recover them first.

    Raises:
        LockedError: names the tracker.
        BitmapError: that has died.
    """
    if (tracked := _tracked(path, here)) is not None:
        with tracked:
            status = tracked.tracking()
        if status and status.alive:
            raise LockedError(path, f"tracked by {status.tracker}; ask it, or end it first")
        raise BitmapError(path, "its tracker has died; 'dirtmap recover' first")


class _HostOf:
    """The host that a target is to be seen in, made when it is needed."""

    def __init__(self, store: str | None, index: str | None) -> None:
        # Absolute: the process may change its folder before they are needed.
        self.store, self.index = os.path.abspath(store or default_store(index)), os.path.abspath(default_index(index))

    def __call__(self) -> Host:
        return this_host(self.store, self.index)

    def exists(self) -> bool:
        """True where there is a default store: the one that was chosen, or the usual one, which is asked, too."""
        return os.path.exists(self.store) or os.path.exists(default_store(self.index))


def _host_of(target: Target, store: str | None, index: str | None) -> _HostOf:
    if isinstance(target, Named):
        return _HostOf(target.store or store, target.index or index)
    return _HostOf(store, index)


def describe(
    target: Target, *, store: str | None = None, index: str | None = None, force_share: bool = False
) -> ImageInfo:
    """An image and all its bitmaps without their bits, as of one moment; a store's path stands for all it holds.

    Arguments and errors as `open`.
    """
    place = locate(target, store, index)
    here = _host_of(target, store, index)
    if place.node is not None:
        with open(place, store=here.store, index=here.index) as image:
            return image.info()
    with open_file(place.path) as file:
        if probe(file) == STORE:
            from dirtmap.engine.namespaces.stored import describe_store

            with here().opened(place.path) as opened:
                return describe_store(opened)
        from dirtmap.engine.namespaces.image import describe

        try:
            info = describe(file, force_share=force_share)
        except LockedError:
            if (tracked := _tracked(place.path, here)) is None:
                raise
            with tracked:
                return tracked.info()
    if info.uuid is None or info.node is None or not here.exists():
        return info
    here().refuse_twin(info.path, info.node, info.uuid)
    if (tracked := _tracked(place.path, here, (info.node, info.uuid))) is not None:
        with tracked:
            return tracked.info()
    return here().marked_busy(info)


@contextlib.contextmanager
def transaction(
    targets: Iterable[Target], *, store: str | None = None, index: str | None = None
) -> Iterator[dict[Target, Transaction]]:
    """Changes the bitmaps of several targets in one commit of the container that holds them all.

    Args:
        targets: paths or names; the same image may be named in several ways.
        store: the default store; the usual one where None.
        index: path of the index; the usual one where None.

    Yields:
        The transaction of each target. At the end of the block all changes are durable; after an exception there are
        none.

    Raises:
        UnsupportedError: they are in different containers, and nothing can commit two at once.
        As `Namespace.transaction`.
    """
    places = {target: locate(target, store, index) for target in targets}
    if not places:
        yield {}
        return
    first, *others = places
    for target in others:
        if not _same_file(places[first].path, places[target].path):
            raise UnsupportedError(str(target), f"in another container than '{first}', and one commit cannot span two")
    if places[first].node is None:
        # The transaction locks and judges the image anew, and knows better who holds it.
        with open(places[first], store=store, index=index, force_share=True) as image, image.transaction() as bitmaps:
            yield dict.fromkeys(places, bitmaps)
        return
    from dirtmap.engine.namespaces.condition import settle_device
    from dirtmap.engine.namespaces.stored import transaction as store_transaction

    here = _host_of(first, store, index)()
    with here.opened(places[first].path) as target_store:
        for place in places.values():
            settle_device(target_store, encode_name(place.node or ""))
        with store_transaction(target_store) as namespaces:
            yield {target: namespaces[place.node or ""] for target, place in places.items()}


def _same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError as error:
        raise StorageError(other, error.strerror or str(error)) from error


def recover(
    target: Target, names: Iterable[str] = (), *, store: str | None = None, index: str | None = None
) -> list[Recovery]:
    """Makes bitmaps usable whose bits cannot be relied on; works on images that `open` refuses for other bitmaps.

    Args:
        target: a path, a node's name or a device's.
        names: which; none for all that need it.
        store: the default store; the usual one where None.
        index: path of the index; the usual one where None.
    """
    place = locate(target, store, index)
    here = _host_of(target, store, index)
    if place.node is not None:
        with open(place, store=here.store, index=here.index) as image:
            return image.recover(names)
    if probe_path(place.path) == STORE:
        raise _a_whole_store(place.path)
    from dirtmap.engine.namespaces.image import Keeper, read_identity, recover

    if (tracked := _tracked(place.path, here)) is not None:
        with tracked:
            return tracked.recover(names)
    identity = read_identity(place.path)
    keeper = Keeper()
    if identity and here.exists():
        here().refuse_twin(place.path, *identity)
        keeper = here().keeper_of(place.path, *identity)
    return recover(place.path, names, keeper=keeper)


def check(
    target: Target,
    *,
    repair: str | None = None,
    store: str | None = None,
    index: str | None = None,
    force_share: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Checks a container and mends it.

    ``store`` and ``index`` as `open`; else see `dirtmap.engine.qcow2.check.check` and
    `dirtmap.engine.namespaces.store_check.check`. Of ``repair``, a value that neither knows is an `ArgumentError`,
    before anything is read.
    """
    from dirtmap.engine.model.report import require_repair

    require_repair(str(target), repair)
    path = locate(target, store, index).path
    here = _host_of(target, store, index)
    if probe_path(path) == STORE:
        from dirtmap.engine.namespaces.store_check import check as check_store

        return check_store(path, repair=repair, progress=progress, expect=here().expect)
    from dirtmap.engine.qcow2.check import check

    if repair is not None:
        _refuse_tracked(path, here)
    return check(path, repair=repair, force_share=force_share, progress=progress)


def dump(
    target: Target,
    *,
    with_hex: bool = False,
    store: str | None = None,
    index: str | None = None,
    force_share: bool = False,
) -> dict[str, Any]:
    """Every structure on disk, as far as it can be read; see `dirtmap.engine.qcow2.dump.dump`.

    ``store`` and ``index`` as `open`. ``target`` may also be the path of an index, or of its ``data.mdb``.
    """
    path = locate(target, store, index).path
    if folder := index_folder(path):
        from dirtmap.engine.index.dump import dump as dump_index

        return dump_index(folder, with_hex=with_hex)
    if probe_path(path) == STORE:
        from dirtmap.engine.namespaces.store_dump import dump as dump_store

        return dump_store(path, with_hex=with_hex)
    from dirtmap.engine.qcow2.dump import dump

    return dump(path, with_hex=with_hex, force_share=force_share)
