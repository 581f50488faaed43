"""`Namespace`: what every kind of container gives: the bitmaps of one image or device, to read and to change."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

from dirtmap.engine.model.infos import ImageInfo, Recovery
from dirtmap.engine.model.naming import decode_name, encode_name, not_found
from dirtmap.engine.model.transaction import Transaction
from dirtmap.fmt.errors import BitmapError

if TYPE_CHECKING:
    from dirtmap.engine.model.bitmap import Bitmap
    from dirtmap.engine.model.infos import Status
    from dirtmap.engine.tracking.home import Home
    from dirtmap.engine.tracking.tracker import Tracker


class Namespace(Mapping[str, "Bitmap"], abc.ABC):
    """An image's or device's bitmaps: a read-only mapping of names to frozen `Bitmap` values, in the directory's order.

    Every look-up reads the container anew, so an answer is never older than the question, and is a value of the
    caller's own.

    Attributes:
        path: of the container, as it was opened.
        format: of the container: ``qcow2`` or ``dirtmap``.
        name: of the node or device; None where it has none.
        uuid: of the namespace, as text; None where it has none.
        size: of the virtual disk, bytes, when it was opened.
        cluster_size: of the container, bytes.
    """

    path: str
    format: str
    name: str | None
    uuid: str | None
    size: int
    cluster_size: int

    @property
    def where(self) -> str:
        """How messages name it: the container and, in a store, the node or device."""
        return self.path

    @abc.abstractmethod
    def info(self) -> ImageInfo:
        """The namespace and all its bitmaps, without their bits, as of one moment."""

    @abc.abstractmethod
    def transaction(self) -> contextlib.AbstractContextManager[Transaction]:
        """Changes the bitmaps: at the end of the block all changes are durable; after an exception there are none.

        Raises:
            LockedError: another process is writing to the container, or holds it against writers.
            FormatError: the container is damaged, or unsafe to change.
            UnsupportedError: the container may not be written to.
            BitmapError: what was asked for breaks a rule of the format.
            StorageError: the operating system failed; the old bitmaps stand, or the new ones do.
        """

    @abc.abstractmethod
    def recover(self, names: Iterable[str] = ()) -> list[Recovery]:
        """Makes bitmaps usable whose bits cannot be relied on; others are left alone.

        Args:
            names: which; none for all that need it.
        """

    def settle(self) -> None:
        """Recovers what a tracker has left that died, as every change does first.

        Raises:
            FormatError: the bitmaps cannot be told any more; `recover` gives up what is lost.
            As `transaction`.
        """

    def doubt(self) -> str | None:
        """Why all bitmaps count as all dirty; None where they do not."""
        return None

    def tracking(self) -> Status | None:
        """Who tracks the image, or did until it died without being recovered since; None where nobody does."""
        return None

    @abc.abstractmethod
    def track(self, **options: Any) -> Tracker:
        """Begins to track writes to the image: no other process changes its bitmaps until the tracker is closed.

        What an earlier tracker has left when it died is recovered first. Of a device: its root node is tracked with it,
        and the tracker's acts are about the device's bitmaps.

        Args:
            options: by keyword, all optional:

                live: the folder for live files; on a tmpfs, or they do not survive what they are for at the speed they
                    have. None, as a rule: ``$DIRTMAP_LIVE``, else ``/dev/shm``.
                intent: ``"region"``, as a rule: after a power loss dirty is what was saved and the regions of the disk
                    written to since; ``"off"``: all, and no write waits for a log.
                region_size: bytes of each such region, a power of two from 1 MiB. None, as a rule: the smallest that
                    divides the disk into 2048 regions at most.
                save_interval: seconds between saves, 60 as a rule; 0 for none but those asked for.
                store: of a qcow2 image only: the store that remembers the image's place, and keeps its bitmaps
                    meanwhile. None, as a rule: the one that knows the image, else the default store.

        Raises:
            TypeError: there is no such option, or it is of another type.
            LockedError: the image is tracked, or in use, already; names by whom.
            BitmapError: the image has no name or identity, or its size has changed; or an option has no such value.
            StorageError: there is no room for the live files or the log.
        """

    @abc.abstractmethod
    def _track_with(self, device: Home, options: dict[str, Any], make: Callable[..., Tracker]) -> Tracker:
        """As `track`, of a device's root: feeds the device's bitmaps, too; by a tracker of the caller's making."""

    @abc.abstractmethod
    def hold(self, name: str, owner: str = "dirtmap") -> contextlib.AbstractContextManager[Bitmap]:
        """Holds a bitmap for the time of a backup: it is busy, and nobody can remove, clear, move or change it.

        The hold ends with the block, or with the process.

        Args:
            name: of the bitmap.
            owner: what others are told who ask.

        Yields:
            The bitmap, frozen.

        Raises:
            BitmapNotFoundError: there is none of that name.
            BitmapError: inconsistent; or a qcow2 image without a name, so that no store knows it.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Closes the container's file."""

    @abc.abstractmethod
    def _names(self) -> list[bytes]:
        """The names as stored."""

    @abc.abstractmethod
    def _load(self, name: bytes) -> Bitmap | None:
        """The bitmap of that name with its bits, frozen; None where there is none."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getitem__(self, name: str) -> Bitmap:
        """The bitmap as it is now.

        Raises:
            BitmapNotFoundError: there is none of that name.
        """
        bitmap = self._load(encode_name(name))
        if bitmap is None:
            raise not_found(self.where, name)
        return bitmap

    def __contains__(self, name: object) -> bool:
        with contextlib.suppress(BitmapError):  # a name that no bitmap can have
            return isinstance(name, str) and encode_name(name) in self._names()
        return False

    def __iter__(self) -> Iterator[str]:
        return map(decode_name, self._names())

    def __len__(self) -> int:
        return len(self._names())
