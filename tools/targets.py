"""What commands do with targets: open one for a change, take a bitmap, tell whether two are one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from dirtmap.fmt.errors import printable
from dirtmap.tools.output import complain

if TYPE_CHECKING:
    from dirtmap.engine import Bitmap, Host, Namespace, Transaction


@contextlib.contextmanager
def transaction(host: Host, target: str) -> Iterator[Transaction]:
    """The target's bitmaps, to be changed: all of it lands at the end of the block, or nothing.

    Raises:
        dirtmap.engine.Error: as `dirtmap.engine.Namespace.transaction`.
    """
    # Reading proves nothing here: the transaction locks and judges the image anew, and knows better who holds it.
    with host.open(target, force_share=True) as image:
        tracking = image.tracking()
        doubt = None if tracking else image.doubt()
        with image.transaction() as bitmaps:
            yield bitmaps
        tell_doubt(image, doubt)
        for note in bitmaps.notes:
            complain(f"{image.path}: {note}")
    if tracking:  # it has died, or we would have been refused
        complain(f"{image.path}: recovered first: {tracking.how}")


def same_image(host: Host, one: str, other: str) -> bool:
    """True where both targets mean the same bitmaps, whatever the names of their file.

    Raises:
        dirtmap.engine.Error: one of them is not there.
    """
    # Where one is not there, opening it tells more.
    return host.locate(one).node == host.locate(other).node and same_container(host, one, other)


def same_container(host: Host, one: str, other: str) -> bool:
    """True where one commit can change both: they are one image, or nodes of one store. Errors as `same_image`."""
    return host.locate(one).is_in_one_file(host.locate(other))


def address(host: Host, target: str) -> dict[str, str]:
    """What JSON says of a target: the container's ``filename``, and ``node`` or ``device``, where it has a name.

    Raises:
        dirtmap.engine.Error: as `Host.locate`, or the image cannot be read.
    """
    place = host.locate(target)
    if place.node is not None:
        return {"filename": place.path, "device" if place.is_device else "node": place.node}
    name = host.name_of(place)
    return {"filename": place.path} | ({"node": name} if name is not None else {})


def tell_doubt(image: Namespace, doubt: str | None) -> None:
    """Says on standard error why all of an image's bitmaps count as all dirty, if they do."""
    if doubt:
        complain(f"{image.path}: {printable(image.name or '')}: its bitmaps count as all dirty: {doubt}")


def usable(where: str, bitmaps: Mapping[str, Bitmap], name: str) -> Bitmap:
    """That bitmap, for its bits to be used.

    Raises:
        BitmapError: it is not there or inconsistent; names it.
    """
    from dirtmap.engine import changes

    return changes.usable(where, bitmaps, name)
