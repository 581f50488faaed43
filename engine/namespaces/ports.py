"""`HostPort`: what a namespace may ask of its host. The host is a room above, so it is known here only by this port."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from dirtmap.engine.storefile.file import Store
    from dirtmap.engine.system.locks import Locking


class HostPort(Protocol):
    """The host of a namespace. It is given to the namespace's constructor, and never replaced.

    Implemented by `dirtmap.engine.host.parts.Parts`.

    Attributes:
        locking: how to take the locks of images and stores.
    """

    locking: Locking

    def opened(self, path: str | None = None) -> AbstractContextManager[Store]:
        """Opens a store of the host for the time of the block; the default store if ``path`` is None.

        Called to read or change a store that the caller does not have open: by recovery, by a check-in, and for holds
        on the bitmaps of a qcow2 image. Before the block the store is checked for a rollback. Its commits are reported
        to the index.

        Raises:
            BitmapError: it is a copy of another store.
            FormatError, StorageError: it is damaged, or cannot be opened.
        """

    def watch(self, store: Store) -> None:
        """Checks a store that the caller has opened itself for a rollback, and reports its last commit to the index.

        Called by a tracker when it begins. Errors as `opened`.
        """

    def report(self, store: Store) -> None:
        """Reports a store's last commit to the index, which then notices a rollback to an earlier one.

        Called after each commit, once this thread holds no store. A tracker calls it later, since a cut must not wait
        for it. Raises nothing: the commit is durable whatever happens here. What could not be reported is reported when
        the store is opened next.
        """

    def devices_on(self, root: bytes) -> dict[str, list[bytes]]:
        """The devices whose root node has that UUID: their raw names, by the absolute path of their store.

        Called before a change of a qcow2 image's metadata, because that is no change of what a guest reads: the devices
        have to be told of the image's new identity.
        """

    def place_of(self, name: str, uuid: bytes) -> tuple[str, bytes] | None:
        """The store that has the place of a qcow2 image: its path, and the raw name of the record; None if none has it.

        Called when an image that has a name and a UUID is opened; see `dirtmap.engine.namespaces.place.place_of`.

        Args:
            name: of the node, as the image has it.
            uuid: of the namespace, as the image has it, 16 bytes.
        """
