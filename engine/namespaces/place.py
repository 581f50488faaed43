"""`Place`: what is remembered about a qcow2 image outside of it. Without a record nothing is, and no store is read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from dirtmap.fmt.errors import BitmapError

if TYPE_CHECKING:
    from dirtmap.engine.model.bitmap import Bitmap
    from dirtmap.engine.model.infos import ImageInfo


class Place:
    """What is remembered about a qcow2 image outside of it; this one is of an image that no store has a record of.

    `dirtmap.engine.namespaces.stored_place.StoredPlace` is that of any other.

    Attributes:
        store: the path of the store that has the record; None.
        node: the name of the node in the record; empty.
    """

    store: str | None = None

    @property
    def node(self) -> str:
        """See `Place`."""
        return ""

    def held(self) -> dict[str, str]:
        """Which bitmaps are held, and by whom: none."""
        return {}

    def checkpoints(self, recording: Mapping[str, bool] | None) -> list[str]:
        """The chain of its checkpoints: none."""
        return []

    def began(self) -> dict[str, int]:
        """When they began, in ns since 1970: none."""
        return {}

    def keep_checkpoints(self, chain: list[str]) -> None:
        """Nobody keeps it."""

    @contextlib.contextmanager
    def changing(self, path: str) -> Iterator[None]:
        """Around a change of the image at ``path``, of which nobody takes note."""
        yield

    @contextlib.contextmanager
    def hold(self, where: str, names: list[str], owner: str) -> Iterator[None]:
        """Refuses to hold bitmaps.

        Raises:
            BitmapError: always.
        """
        raise BitmapError(where, "only bitmaps of an image with a name can be held; 'node add' gives it one")
        yield

    def refuse_twin(self, path: str) -> None:
        """Refuses a copy, which nobody knows."""

    def is_checked_out(self, path: str) -> bool:
        """True if a tracker has, or had, its bitmaps: no."""
        return False

    def refuse_moved(self, path: str) -> None:
        """Refuses an image that was moved while it was tracked, which nobody knows."""


NO_PLACE = Place()


def remembered(info: ImageInfo, place: Place, content: Callable[[str], Bitmap | None] = lambda name: None) -> ImageInfo:
    """An image's description with what its place adds: which bitmaps are held, and which are checkpoints.

    Args:
        info: of the image.
        place: of the image.
        content: the bitmaps of the image, as `written_since` asks for them.
    """
    held = place.held()
    # Where the directory, or a part of it, is damaged, a bitmap that is not listed may still be there.
    chain = place.checkpoints(None if info.errors else {bitmap.name: bitmap.recording for bitmap in info.bitmaps})
    if held:
        info = replace(info, bitmaps=tuple(replace(bitmap, busy=bitmap.name in held) for bitmap in info.bitmaps))
    if chain:
        from dirtmap.engine.model.checkpoints import shown, written_since

        info = shown(info, chain, place.began(), written_since(chain, content))
    return info
