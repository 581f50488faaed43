"""The way in: what a target means, which kind of container holds it, and the room that knows that kind.

"disk.qcow2", "file:a b"      a path: a qcow2 image, or a whole store
"drive0", "node:drive0"       a namespace of the store given, else of the default store
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dirtmap.engine.fileio import File, open_file
from dirtmap.engine.namespace import ImageInfo, Namespace, Recovery, Transaction
from dirtmap.fmt import qcow2
from dirtmap.fmt.errors import (
    BitmapError,
    BitmapNotFoundError,
    FormatError,
    LockedError,
    StorageError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from dirtmap.engine.report import CheckReport

QCOW2, STORE = "qcow2", "dirtmap"
_STORE_MAGIC = b"DMS\xfb"  # fmt.store.MAGIC; that module is imported only where there is a store


@dataclass(frozen=True, slots=True)
class Place:
    """What a target was found to mean.

    Attributes:
        path: of the container.
        node: the namespace of a store, or None: the container as a whole.
    """

    path: str
    node: str | None = None

    def __str__(self) -> str:
        return self.path if self.node is None else f"{self.path}: {self.node}"


@dataclass(frozen=True, slots=True)
class Named:
    """A target still to be looked up, in a store of the user's choice."""

    text: str
    store: str

    def __str__(self) -> str:
        return self.text


Target = str | os.PathLike[str] | Place | Named


def default_store() -> str:
    """Where the default store is: ``$DIRTMAP_STORE``, else ``default.dmap`` beside the index."""
    if path := os.environ.get("DIRTMAP_STORE"):
        return path
    if index := os.environ.get("DIRTMAP_INDEX"):
        folder = os.path.dirname(index)
    elif os.geteuid() == 0:
        folder = "/var/lib/dirtmap"
    else:
        state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
        folder = os.path.join(state, "dirtmap")
    return os.path.join(folder, "default.dmap")


def locate(target: Target, store: str | None = None) -> Place:
    """Finds out what a target means, without opening it.

    Args:
        target: a path or a node's name; ``file:`` or ``node:`` in front says which.
        store: where nodes are looked up; the default store where None.

    Raises:
        BitmapError: it could be either.
        StorageError: neither a file nor, for want of a store, a node.
    """
    if isinstance(target, Place):
        return target
    if isinstance(target, Named):
        return locate(target.text, target.store)
    text = os.fspath(target)
    if text.startswith("file:"):
        return Place(text.removeprefix("file:"))
    if text.startswith("device:"):
        raise StorageError(text, "devices are not known yet")
    where = store or default_store()
    explicit = text.startswith("node:")
    name = text.removeprefix("node:")
    is_file = not explicit and os.path.lexists(text)
    if is_file and ("/" in text or "." in text or not os.path.exists(where)):
        return Place(text)
    if not os.path.exists(where):
        what = f"no store at {where} to look the node up in" if explicit else "no such file, and no store to look in"
        raise StorageError(text, what)
    node = _find_node(where, name)
    if is_file and node:
        raise BitmapError(text, f"both a file and a node of {where}: say file:{text} or node:{text}")
    if is_file:
        return Place(text)
    if node is None:
        raise BitmapNotFoundError(text, f"no node of {where}" if explicit else f"neither a file nor a node of {where}")
    return node


def _find_node(path: str, name: str) -> Place | None:
    from dirtmap.engine.store.nodes import place_of
    from dirtmap.engine.store.store import Store

    with Store(path) as store:
        found = place_of(store, name)
        return None if found is None else Place(*found)


def probe(path: str) -> str | None:
    """``qcow2``, ``dirtmap`` (a store) or None.

    Raises:
        StorageError: cannot be opened or read.
    """
    with open_file(path) as file:
        return _kind(file)


def _kind(file: File) -> str | None:
    if file.read(0, 4) == qcow2.MAGIC:
        return QCOW2
    # Any of the four header copies: damage to one must not hide a store.
    return STORE if any(file.read(at, 4) == _STORE_MAGIC for at in range(0, 4 * 4096, 4096)) else None


def require_format(target: Target, wanted: str | None) -> None:
    """Holds a user's ``-f`` against what the container is.

    Raises:
        FormatError: it is something else.
    """
    path = locate(target).path
    if wanted and wanted != probe(path):
        raise FormatError(path, f"not of format {wanted}")


def open(target: Target, *, store: str | None = None, force_share: bool = False) -> Namespace:
    """Opens the bitmaps of an image.

    Args:
        target: a path or a node's name.
        store: where nodes are looked up; the default store where None.
        force_share: read a qcow2 image although another process writes to it; what it has in memory is not seen.

    Raises:
        FormatError: neither a qcow2 image nor in a store, one that QEMU would refuse, or one that is unsafe to use.
        BitmapError: no such node, or the target is ambiguous.
        LockedError: open for writing elsewhere.
        StorageError: cannot be opened or read.
    """
    place = locate(target, store)
    if place.node is not None:
        from dirtmap.engine.store.namespace import StoredImage
        from dirtmap.engine.store.store import Store

        with contextlib.ExitStack() as stack:
            stored = StoredImage(stack.enter_context(Store(place.path)), place.node)
            stack.pop_all()
            return stored
    if probe(place.path) == STORE:
        raise BitmapError(place.path, "a store of many images: name one of its nodes")
    from dirtmap.engine.qcow2.image import Image

    try:
        image = Image(place.path, force_share=force_share)
    except LockedError:
        if tracked := _tracked(place.path, store):
            return tracked  # whoever has it open: the bitmaps are in the store
        raise
    try:
        if image.uuid is not None and image.name is not None:
            _refuse_twin(image.path, image.name, image.uuid, store)
            if tracked := _tracked(image.path, store, (image.name, image.uuid)):
                image.close()
                return tracked
    except BaseException:
        image.close()
        raise
    return image


def _tracked(path: str, store: str | None, identity: tuple[str, str] | None = None) -> Namespace | None:
    """The bitmaps of a qcow2 image that a tracker has, or had when it died; None where they are in the image.

    Args:
        path: the image.
        store: what remembers its place.
        identity: its name and UUID, where they are known.
    """
    where = store or default_store()
    if not os.path.exists(where):
        return None
    if identity is None:
        from dirtmap.engine.qcow2.image import read_identity

        identity = read_identity(path)
    if identity is None:
        return None
    from dirtmap.engine.store.nodes import is_checked_out
    from dirtmap.engine.store.store import Store

    with Store(where) as target:
        if not is_checked_out(target, path, *identity):
            return None
    from dirtmap.engine.tracking.checkout import TrackedImage

    return TrackedImage(path, where, identity[0])


def _refuse_twin(path: str, name: str, uuid: str, store: str | None) -> None:
    """Where no store remembers the image, there is nothing to compare it with."""
    where = store or default_store()
    if os.path.exists(where):
        from dirtmap.engine.store.nodes import refuse_twin
        from dirtmap.engine.store.store import Store

        with Store(where) as target:
            refuse_twin(target, path, name, uuid)


def describe(target: Target, *, store: str | None = None, force_share: bool = False) -> ImageInfo:
    """An image and all its bitmaps without their bits, as of one moment; a store's path stands for all it holds.

    Arguments and errors as `open`.
    """
    place = locate(target, store)
    if place.node is not None:
        with open(place) as image:
            return image.info()
    with open_file(place.path) as file:
        if _kind(file) == STORE:
            from dirtmap.engine.store.namespace import describe_store

            return describe_store(place.path)
        from dirtmap.engine.qcow2.image import describe

        try:
            info = describe(file, force_share=force_share)
        except LockedError:
            if not (tracked := _tracked(place.path, store)):
                raise
            with tracked:
                return tracked.info()
    if info.uuid is not None and info.node is not None:
        _refuse_twin(info.path, info.node, info.uuid, store)
        if tracked := _tracked(place.path, store, (info.node, info.uuid)):
            with tracked:
                return tracked.info()
    return info


@contextlib.contextmanager
def transaction(targets: Iterable[Target], *, store: str | None = None) -> Iterator[dict[Target, Transaction]]:
    """Changes the bitmaps of several targets in one commit of the container that holds them all.

    Args:
        targets: paths or nodes' names; the same image may be named in several ways.
        store: where nodes are looked up.

    Yields:
        The transaction of each target. At the end of the block all changes are durable; after an exception there are
        none.

    Raises:
        UnsupportedError: they are in different containers, and nothing can commit two at once.
        As `Namespace.transaction`.
    """
    places = {target: locate(target, store) for target in targets}
    first, *others = places
    for target in others:
        if not _same_file(places[first].path, places[target].path):
            raise UnsupportedError(str(target), f"in another container than '{first}', and one commit cannot span two")
    if places[first].node is None:
        # The transaction locks and judges the image anew, and knows better who holds it.
        with open(places[first], store=store, force_share=True) as image, image.transaction() as bitmaps:
            yield dict.fromkeys(places, bitmaps)
        return
    from dirtmap.engine.store.namespace import transaction as store_transaction
    from dirtmap.engine.store.store import Store

    with Store(places[first].path) as target_store, store_transaction(target_store) as namespaces:
        yield {target: namespaces[place.node or ""] for target, place in places.items()}


def _same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError as error:
        raise StorageError(other, error.strerror or str(error)) from error


def recover(target: Target, names: Iterable[str] = (), *, store: str | None = None) -> list[Recovery]:
    """Makes bitmaps usable whose bits cannot be relied on; works on images that `open` refuses for other bitmaps.

    Args:
        target: a path or a node's name.
        names: which; none for all that need it.
        store: where nodes are looked up.
    """
    place = locate(target, store)
    if place.node is not None:
        with open(place) as image:
            return image.recover(names)
    from dirtmap.engine.qcow2.image import read_identity, recover

    if tracked := _tracked(place.path, store):
        with tracked:
            return tracked.recover(names)
    if identity := read_identity(place.path):
        _refuse_twin(place.path, *identity, store)
    return recover(place.path, names)


def check(
    target: Target,
    *,
    repair: str | None = None,
    force_share: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Checks a container and mends it.

    See `dirtmap.engine.qcow2.check.check` and `dirtmap.engine.store.check.check`.
    """
    path = locate(target).path
    if probe(path) == STORE:
        from dirtmap.engine.store.check import check as check_store

        return check_store(path, repair=repair, progress=progress)
    from dirtmap.engine.qcow2.check import check

    return check(path, repair=repair, force_share=force_share, progress=progress)


def dump(target: Target, *, with_hex: bool = False, force_share: bool = False) -> dict[str, Any]:
    """Every structure on disk, as far as it can be read; see `dirtmap.engine.qcow2.dump.dump`."""
    path = locate(target).path
    if probe(path) == STORE:
        from dirtmap.engine.store.dump import dump as dump_store

        return dump_store(path, with_hex=with_hex)
    from dirtmap.engine.qcow2.dump import dump

    return dump(path, with_hex=with_hex, force_share=force_share)


def resolve(target: Target) -> str:
    """The path of the container that a target is in. Errors as `locate`."""
    return locate(target).path
