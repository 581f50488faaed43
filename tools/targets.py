"""What commands do with targets: open one for a change, take a bitmap, tell whether two are one, ask all stores."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

import dirtmap.engine as dm
from dirtmap.engine.host.opening import Target, locate
from dirtmap.engine.system.file import is_same_file
from dirtmap.fmt.errors import printable
from dirtmap.tools.output import complain

if TYPE_CHECKING:
    from dirtmap.engine import Bitmap, Host, Transaction
    from dirtmap.engine.storefile.file import Store

T = TypeVar("T")


@contextlib.contextmanager
def transaction(target: Target) -> Iterator[Transaction]:
    """The target's bitmaps, to be changed: all of it lands at the end of the block, or nothing.

    Raises:
        dirtmap.engine.Error: as `dirtmap.engine.Namespace.transaction`.
    """
    # Reading proves nothing here: the transaction locks and judges the image anew, and knows better who holds it.
    with dm.open(target, force_share=True) as image:
        tracking = image.tracking()
        doubt = None if tracking else image.doubt()
        with image.transaction() as bitmaps:
            yield bitmaps
        tell_doubt(image, doubt)
    if tracking:  # it has died, or we would have been refused
        complain(f"{image.path}: recovered first: {tracking.how}")


def same_image(one: Target, other: Target, store: str | None = None, index: str | None = None) -> bool:
    """True where both targets mean the same bitmaps, whatever the names of their file.

    Raises:
        dirtmap.engine.Error: one of them is not there.
    """
    first, second = locate(one, store, index), locate(other, store, index)
    # Where one is not there, opening it tells more.
    return first.node == second.node and is_same_file(first.path, second.path)


def same_container(one: Target, other: Target, store: str | None = None, index: str | None = None) -> bool:
    """True where one commit can change both: they are one image, or nodes of one store. Errors as `same_image`."""
    return is_same_file(locate(one, store, index).path, locate(other, store, index).path)


def address(target: Target) -> dict[str, str]:
    """What JSON says of a target: the container's ``filename``, and ``node`` or ``device``, where it has a name.

    Raises:
        dirtmap.engine.Error: as `locate`, or the image cannot be read.
    """
    place = locate(target)
    if place.node is not None:
        return {"filename": place.path, "device" if place.is_device else "node": place.node}
    from dirtmap.engine.qcow2.reading import read_identity

    identity = read_identity(place.path)
    return {"filename": place.path} | ({"node": identity[0]} if identity else {})


def gather(host: Host, read: Callable[[Store], Iterable[T]]) -> tuple[list[T], bool]:
    """What all stores of a host say, and False where one could not be read, of which it complains.

    Raises:
        dirtmap.engine.Error: the default store is damaged.
    """
    found: list[T] = []
    problems = host.problems()
    for path in host.stores():
        try:
            with host.opened(path) as opened:
                found += read(opened)
        except dm.Error as error:
            problems.append(error)
    for problem in problems:
        complain(str(problem))
    return found, not problems


def tell_doubt(image: dm.Namespace, doubt: str | None) -> None:
    """Says on standard error why all of an image's bitmaps count as all dirty, if they do."""
    if doubt:
        complain(f"{image.path}: {printable(image.name or '')}: its bitmaps count as all dirty: {doubt}")


def usable(where: str, bitmaps: Mapping[str, Bitmap], name: str) -> Bitmap:
    """That bitmap, for its bits to be used.

    Raises:
        BitmapError: it is not there or inconsistent; names it.
    """
    from dirtmap.engine.model import changes
    from dirtmap.engine.model.naming import label

    bitmap = bitmaps[name]
    changes.require_usable(bitmap, f"{where}: {label(name)}")
    return bitmap
