"""`Namespace`: what every kind of container gives: the bitmaps of one image or device, to read and to change."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Self

from dirtmap.engine.model.infos import ImageInfo, Recovery
from dirtmap.engine.model.naming import as_stored, decode_name, encode_name, not_found
from dirtmap.engine.model.transaction import Transaction
from dirtmap.fmt.errors import BitmapError

if TYPE_CHECKING:
    from dirtmap.engine.model.bitmap import Bitmap
    from dirtmap.engine.model.infos import Status


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
    def hold(self, name: str, owner: str = "dirtmap") -> contextlib.AbstractContextManager[Bitmap]:
        """Holds a bitmap for the time of a backup: it is busy, and nobody can remove, clear, move or change it.

        The hold ends with the block, or with the process, however that ends. It counts for every process on the
        machine, in whichever container. A forked child does not hold: the hold is its parent's. The container in which
        holds are remembered, a store, is not compacted meanwhile.

        Args:
            name: of the bitmap.
            owner: what others are told who ask.

        Yields:
            The bitmap, frozen.

        Raises:
            BitmapNotFoundError: there is none of that name.
            BitmapError: inconsistent; or a qcow2 image without a name, so that no store knows it.
            GoneError: at the end, another file has taken the store's place, and what was held may have been changed.
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
        bitmap = self._load(encode_name(as_stored(self.where, name)))
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
