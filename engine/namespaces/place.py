"""What a store remembers about a bitmap beside its bits: holds, and the place of a qcow2 image."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from dirtmap.engine.model.naming import encode_name
from dirtmap.engine.namespaces.condition import refuse_tracked
from dirtmap.engine.storefile import holds
from dirtmap.engine.storefile.directory import no_namespace
from dirtmap.fmt.errors import BitmapError

if TYPE_CHECKING:
    from dirtmap.engine.storefile.file import Store


class Keeper:
    """What a host keeps about an image outside of it. This one keeps nothing.

    Attributes:
        store: the path of the store that remembers the image's place; None where none is known to.
    """

    store: str | None = None

    def held(self) -> dict[str, str]:
        """Which bitmaps are held, and by whom."""
        return {}

    def checkpoints(self, recording: Mapping[str, bool]) -> list[str]:
        """The chain of its checkpoints; see `dirtmap.engine.storefile.chain.checkpoints_of`."""
        return []

    def keep_checkpoints(self, chain: list[str]) -> None:
        """Remembers another chain."""

    def look_after(self, target: Store) -> None:
        """Has commits of a store remembered; see `dirtmap.engine.host.stores.Stores.look_after`."""

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Around a change of the image's metadata, which leaves the guest's data alone."""
        yield

    def hold(self, where: str, name: str, owner: str) -> contextlib.AbstractContextManager[None]:
        """Holds a bitmap for the time of the block.

        Args:
            where: how messages name the bitmap.
            name: of the bitmap.
            owner: what others are told who ask.

        Raises:
            BitmapError: there is no place to remember that.
        """
        raise BitmapError(where, "only bitmaps of an image with a name can be held; 'node add' gives it one")


@contextlib.contextmanager
def holding(target: Store, node: bytes, name: str, owner: str) -> Iterator[None]:
    """A hold on a bitmap, in the record of its namespace, for the time of the block; see `Namespace.hold`."""
    taken = holds.hold(encode_name(name), owner)

    def change_holds(add: bool) -> None:
        with target.change() as change:
            record = change.table.get(node)
            if record is None:
                if add:
                    raise no_namespace(target.path, node)
                return  # and with it the hold
            if add:
                refuse_tracked(target.path, record)  # its tracker takes bitmaps for backups
            others = [found for found in holds.living(record) if found.token != taken.token]
            change.table.put(holds.with_holds(record, [*others, taken] if add else others))

    change_holds(True)
    try:
        yield
    finally:
        change_holds(False)
