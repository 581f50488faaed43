"""What a namespace may ask of its host. The host is above it, so it is known here by these ports alone."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from dirtmap.engine.storefile.file import Store
    from dirtmap.engine.system.locks import Locking


class HostPort(Protocol):
    """The host of a namespace, given to its constructor and never replaced.

    Implemented by `dirtmap.engine.host.parts.Parts`.

    Attributes:
        locking: how whoever acts for this host takes the locks of images and stores.
    """

    locking: Locking

    def opened(self, path: str | None = None) -> AbstractContextManager[Store]:
        """A store of the host, for the time of the block; the default store where ``path`` is None.

        Called by whoever reads or changes a store that it does not have open: recovery, a check-in, holds on the
        bitmaps of a qcow2 image. The store was checked for a rollback, and its commits are reported to the index.

        Raises:
            BitmapError: it is a copy of another store.
            FormatError, StorageError: it is damaged, or cannot be opened.
        """

    def watch(self, store: Store) -> None:
        """Checks a store that the caller has opened itself for a rollback, and reports its last commit to the index.

        Called by a tracker when it begins. Errors as `opened`.
        """

    def report(self, store: Store) -> None:
        """Reports a store's last commit to the index, by which a rollback to one before it is noticed.

        Called after each commit, once this thread holds no store; by a tracker when it suits it, since a cut must not
        wait for it. Raises nothing: the commit is durable whatever happens here, and the next look reports it.
        """

    def devices_on(self, root: bytes) -> dict[str, list[bytes]]:
        """The devices whose root node has that UUID: their raw names, by the absolute path of their store.

        Called before a change of a qcow2 image's metadata, which must not look like a change of what a guest reads.
        """

    def place_of(self, name: str, uuid: bytes) -> tuple[str, bytes] | None:
        """Which store remembers a qcow2 image: its path, and the raw name of the record; None where none does.

        Called when an image that carries an identity is opened; see `dirtmap.engine.namespaces.place.place_of`.

        Args:
            name: of the node, as the image says it.
            uuid: 16 bytes, as the image says it.
        """
