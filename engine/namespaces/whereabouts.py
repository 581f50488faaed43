"""`place_of`: finds the place of a qcow2 image, and loads what reads stores only where there is one.

`is_checked_out`: whether its bitmaps are in a store instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dirtmap.engine.namespaces.place import NO_PLACE, Place

if TYPE_CHECKING:
    from dirtmap.engine.namespaces.ports import HostPort


def place_of(host: HostPort, name: str, uuid: bytes) -> Place:
    """The place of a qcow2 image on a host; `NO_PLACE` if no store of the host has a record of it.

    Args:
        host: of the image.
        name: of the node, as the image has it.
        uuid: of the namespace, as the image has it, 16 bytes.
    """
    found = host.place_of(name, uuid)
    if found is None:
        return NO_PLACE
    from dirtmap.engine.namespaces.stored_place import StoredPlace  # with all that reads stores

    return StoredPlace(host, *found, uuid)


def is_checked_out(host: HostPort, name: str, uuid: bytes, path: str) -> bool:
    """True if a tracker has the bitmaps of the qcow2 image at ``path``, or had them when it died; see `place_of`."""
    return place_of(host, name, uuid).is_checked_out(path)
