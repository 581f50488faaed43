"""What commands share about targets: opens one for a change, reads a bitmap, tells whether two are the same."""

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
    """The bitmaps of the target, to be changed. At the end of the block all changes are durable, or none is made.

    Raises:
        dirtmap.engine.Error: as `dirtmap.engine.Namespace.transaction`.
    """
    # Opened without a reader's lock: the transaction locks and validates the image anew, and names a holder better.
    with host.open(target, force_share=True) as image:
        tracking = image.tracking()
        doubt = None if tracking else image.doubt()
        with image.transaction() as bitmaps:
            yield bitmaps
        tell_doubt(image, doubt)
        for note in bitmaps.notes:
            complain(f"{image.path}: {note}")
    if tracking and not tracking.alive:
        complain(f"{image.path}: recovered first: {tracking.how}")


def same_image(host: Host, one: str, other: str) -> bool:
    """True if both targets mean the same bitmaps, whatever paths lead to their file.

    Raises:
        dirtmap.engine.Error: one of them does not exist.
    """
    # If one does not exist, opening it gives a better error.
    return host.locate(one).node == host.locate(other).node and same_container(host, one, other)


def same_container(host: Host, one: str, other: str) -> bool:
    """True if one commit can change both: they are one image, or nodes of one store. Errors as `same_image`."""
    return host.locate(one).is_in_one_file(host.locate(other))


def address(host: Host, target: str) -> dict[str, str]:
    """The JSON keys of a target: the container's ``filename``, and ``node`` or ``device`` if it has a name.

    Raises:
        dirtmap.engine.Error: as `Host.locate`, or the image cannot be read.
    """
    place = host.locate(target)
    if place.node is not None:
        return {"filename": place.path, "device" if place.is_device else "node": place.node}
    name = host.name_of(place)
    return {"filename": place.path} | ({"node": name} if name is not None else {})


def tell_doubt(image: Namespace, doubt: str | None) -> None:
    """Prints on standard error why all bitmaps of an image count as dirty all over, if they do."""
    if doubt:
        complain(f"{image.path}: {printable(image.name or '')}: its bitmaps count as all dirty: {doubt}")


def tell_damage(image: Namespace, name: str, damage: str | None) -> None:
    """Prints on standard error what of a bitmap's bits was damaged, and so counts as dirty, if any was."""
    if damage:
        complain(f"{image.where}: '{printable(name)}': its {damage}; recover makes that last")


def usable(where: str, bitmaps: Mapping[str, Bitmap], name: str) -> Bitmap:
    """A bitmap whose bits can be used.

    Raises:
        BitmapError: the bitmap does not exist or is inconsistent; the error names it.
    """
    from dirtmap.engine import changes

    return changes.usable(where, bitmaps, name)
