"""`Namespace`: the interface of every kind of container to the bitmaps of one image or device."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Self

from dirtmap.engine.model.infos import ImageInfo, Recovery
from dirtmap.engine.model.naming import as_stored, decode_name, encode_name, label, not_found
from dirtmap.engine.model.transaction import Transaction
from dirtmap.fmt.errors import BitmapError, LockedError

if TYPE_CHECKING:
    from dirtmap.engine.model.bitmap import Bitmap
    from dirtmap.engine.model.infos import Status


class Namespace(Mapping[str, "Bitmap"], abc.ABC):
    """The bitmaps of an image or device: a read-only mapping of names to frozen `Bitmap` values, in directory order.

    Every look-up reads the container again, so an answer is never older than the question. The answer is a value that
    belongs to the caller.

    Attributes:
        path: of the container, as it was opened.
        format: of the container: ``qcow2`` or ``dirtmap``.
        name: of the node or device; None if it has none.
        uuid: of the namespace, as text; None if it has none.
        size: of the virtual disk when it was opened, in bytes.
        cluster_size: of the container, in bytes.
    """

    path: str
    format: str
    name: str | None
    uuid: str | None
    size: int
    cluster_size: int

    @property
    def where(self) -> str:
        """How messages name the namespace: the container and, in a store, the node or device."""
        return self.path

    @abc.abstractmethod
    def info(self) -> ImageInfo:
        """Describes the namespace and all its bitmaps, without their bits, as of one moment."""

    @abc.abstractmethod
    def transaction(self) -> contextlib.AbstractContextManager[Transaction]:
        """Changes the bitmaps. At the end of the block all changes are durable; after an exception none is made.

        Raises:
            LockedError: another process is writing to the container, or has locked it against writers.
            FormatError: the container is damaged, or unsafe to change.
            UnsupportedError: the container may not be written to.
            BitmapError: the change breaks a rule of the format.
            StorageError: the operating system failed. Either the old bitmaps stand, or the new ones.
        """

    @abc.abstractmethod
    def recover(self, names: Iterable[str] = ()) -> list[Recovery]:
        """Makes bitmaps usable whose bits cannot be trusted. Leaves all others alone.

        Args:
            names: which bitmaps; if empty, all that need it.
        """

    def recover_session(self) -> None:
        """Recovers what a dead tracker has left. Every change does this first.

        Raises:
            FormatError: the bitmaps can no longer be told; `recover` gives up what is lost.
            As `transaction`.
        """

    def doubt(self) -> str | None:
        """Why all bitmaps count as dirty all over; None if they do not."""
        return None

    def tracking(self) -> Status | None:
        """The session of the image's tracker, alive, or dead and not yet recovered; None if there is no session."""
        return None

    @abc.abstractmethod
    def hold(self, name: str, owner: str = "dirtmap") -> contextlib.AbstractContextManager[Bitmap]:
        """Holds a bitmap for the time of a backup: it is busy, and nobody can remove, clear, move or change it.

        The hold ends with the block, or with the process, however that ends. It counts for every process on the
        machine, in whichever container. A forked child does not hold: the hold is its parent's. The container in which
        holds are remembered, a store, is not compacted meanwhile.

        Args:
            name: of the bitmap.
            owner: the name of the holder, for messages to others.

        Yields:
            The bitmap, frozen. Its bits may be read when they are asked for: those of a large bitmap of a tracked image
            only inside the block, and not in a forked child.

        Raises:
            BitmapNotFoundError: there is no such bitmap.
            BitmapError: the bitmap is inconsistent; or the qcow2 image has no node name, so that no store knows it.
            GoneError: at the end, another file has taken the store's place, and what was held may have been changed.
        """

    @contextlib.contextmanager
    def hold_all(self, names: Iterable[str], owner: str = "dirtmap") -> Iterator[Mapping[str, Bitmap]]:
        """Holds several bitmaps; see `hold`. Where the container can, by one commit; all of them, or none.

        Yields:
            The bitmaps, which are read one by one when they are asked for, and stay as they are meanwhile.
        """
        with contextlib.ExitStack() as stack:
            for name in dict.fromkeys(names):
                stack.enter_context(self.hold(name, owner))
            yield self

    def changed_since(self, name: str, until: str | None = None) -> Bitmap:
        """What was written since a checkpoint began, and before a later one did; a value of the caller's own.

        Of a disk that is tracked, too: all that was marked before the call is in it.

        Args:
            name: of the checkpoint.
            until: the later one; None for all that was written since.

        Raises:
            BitmapNotFoundError: there is no such checkpoint.
            BitmapError: it is not known any more, as another program has removed or disabled a checkpoint; or ``until``
                is not a later one.
            LockedError: the checkpoints have changed meanwhile.
        """
        from dirtmap.engine.model.checkpoints import between

        names = between(self.where, self.info(), name, until)
        first, *others = [self[each].required(f"{self.where}: {label(each)}") for each in names]
        changed = first.copy()
        for other in others:
            changed |= other
        if between(self.where, self.info(), name, until)[: len(names)] != names:
            raise LockedError(self.where, "its checkpoints have changed meanwhile; try again")
        return changed

    @abc.abstractmethod
    def close(self) -> None:
        """Closes the container's file."""

    @abc.abstractmethod
    def _names(self) -> list[bytes]:
        """The names, as stored, in the order of the directory."""

    @abc.abstractmethod
    def _load(self, name: bytes) -> Bitmap | None:
        """The bitmap of that name with its bits, frozen; None if there is none."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getitem__(self, name: str) -> Bitmap:
        """Reads the bitmap of that name, as it is now.

        Raises:
            BitmapNotFoundError: there is no such bitmap.
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
