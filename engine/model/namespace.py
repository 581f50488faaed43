"""What both containers show: a `Namespace` of bitmaps to read, and the `Transaction` that changes one."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from dirtmap.engine.model.naming import a_checkpoint, decode_name, encode_name, label, not_found
from dirtmap.fmt import geometry
from dirtmap.fmt.directory import MAX_DATA_BYTES, name_fault
from dirtmap.fmt.errors import BitmapError, Error

if TYPE_CHECKING:
    from dirtmap.engine.model.bitmap import Bitmap
    from dirtmap.engine.session.status import Status
    from dirtmap.engine.tracking.home import Home
    from dirtmap.engine.tracking.tracker import Tracker


@dataclass(frozen=True, slots=True)
class BitmapInfo:
    """A bitmap without its bits.

    Attributes:
        name: unique in its namespace.
        granularity: bytes of the disk for each bit.
        recording: QEMU goes on tracking into it.
        inconsistent: left in use by a writer that did not finish; its bits mean nothing until `recover`.
        busy: held by an operation.
        count: dirty bytes in whole granules, as QEMU counts; None where inconsistent, or damaged.
        namespace: in a store, the namespace's UUID as text.
        node: in a store, the node's name; None of a device's bitmap.
        device: in a store, the device's name; None of a node's bitmap.
    """

    name: str
    granularity: int
    recording: bool
    inconsistent: bool
    busy: bool
    count: int | None
    namespace: str | None = None
    node: str | None = None
    device: str | None = None

    @property
    def damaged(self) -> bool:
        """True where its bits are not what was written; what is wrong is among the errors of its `ImageInfo`."""
        return self.count is None and not self.inconsistent


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """An image and its bitmaps as of one moment.

    Attributes:
        path: as it was opened.
        format: ``qcow2`` or ``dirtmap``.
        size: of the virtual disk, bytes; None for a store as a whole.
        cluster_size: bytes.
        bitmaps: in the order of the directory.
        notes: what a user should know although nothing is wrong with the image, a line each.
        node: the image's name, or None.
        uuid: of its namespace, as text, or None.
        doubt: why all bitmaps count as all dirty, or None; of a store, one such reason.
        errors: what is damaged, a line each; such a bitmap is left out, or has no ``count``.
    """

    path: str
    format: str
    size: int | None
    cluster_size: int
    bitmaps: tuple[BitmapInfo, ...]
    notes: tuple[str, ...] = ()
    node: str | None = None
    uuid: str | None = None
    doubt: str | None = None
    errors: tuple[str, ...] = ()


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


# Why a bitmap is all dirty that was inconsistent: whoever recovers it keeps writers out.
LEFT_IN_USE = "left in use by a writer that did not finish"


@dataclass(frozen=True, slots=True)
class Recovery:
    """What `Namespace.recover` did for one bitmap: its ``name``, and ``how``: ``all dirty: ``, say, and why it is."""

    name: str
    how: str


class Transaction(MutableMapping[str, "Bitmap"]):
    """A namespace's bitmaps while they are being changed: a mapping of names to bitmaps, in the order of the directory.

    A bitmap got from it is a working copy: marking it changes what will be committed. A bitmap put into it is copied.

    Attributes:
        where: the image, for messages.
        size: of the virtual disk, bytes.
        default_granularity: bytes; for bitmaps added without one.
        checkpoints: the chain of `dirtmap.engine.model.checkpoints`, as it will be. Others rely on what they have: it
            may grow, or be taken over, and nothing else.
    """

    def __init__(
        self,
        where: str,
        size: int,
        default_granularity: int,
        bitmaps: Mapping[str, Bitmap],
        held: Mapping[str, str] | None = None,
        checkpoints: Iterable[str] = (),
    ) -> None:
        self.where = where
        self.size = size
        self.default_granularity = default_granularity
        self._bitmaps = dict(bitmaps)
        self._held = {name: (who, self._bitmaps[name].copy()) for name, who in (held or {}).items() if name in bitmaps}
        for name in self._held:
            self._bitmaps[name].busy = True
        self.checkpoints = list(checkpoints)
        self._relied_on = {name: self._bitmaps[name].copy() for name in self.checkpoints if name in bitmaps}
        self._open = True

    def __getitem__(self, name: str) -> Bitmap:
        self._require_open()
        try:
            return self._bitmaps[name]
        except KeyError:
            raise not_found(self.where, name) from None

    def __setitem__(self, name: str, bitmap: Bitmap) -> None:
        self._require_open()
        self.refuse_held(name)
        where = f"{self.where}: {label(name)}"
        if fault := name_fault(encode_name(name)):
            raise BitmapError(where, fault)
        if bitmap.size != self.size:
            what = f"made for a disk of {bitmap.size} bytes, and this one has {self.size}"
            raise BitmapError(where, what)
        if not geometry.is_granularity(bitmap.granularity):
            raise BitmapError(where, f"granularity {bitmap.granularity} is not a power of two from 512 bytes to 2 GiB")
        needed = geometry.packed_bytes(self.size, bitmap.granularity)
        if needed > MAX_DATA_BYTES:  # refused here, before anyone asks for so many bits
            what = f"granularity {bitmap.granularity} needs {needed} bytes of bits, more than {MAX_DATA_BYTES}"
            raise BitmapError(where, what)
        self._bitmaps[name] = bitmap.copy()
        self._bitmaps[name].busy = False

    def __delitem__(self, name: str) -> None:
        self[name]
        self.refuse_held(name)
        if name in self._relied_on:
            self._hand_over(name)
        del self._bitmaps[name]

    def _hand_over(self, name: str) -> None:
        """Has the checkpoint before one that is removed take over what it has."""
        from dirtmap.engine.model import checkpoints

        heir = checkpoints.heir(self.checkpoints, name)
        gone = self._bitmaps[name]
        older = self._bitmaps.get(heir) if heir is not None else None
        if heir is None or (older and not older.inconsistent and not gone.inconsistent):
            if heir is not None and older:
                self[heir] = checkpoints.take_over(older, gone)
                self._relied_on[heir] = self._bitmaps[heir].copy()
            self.checkpoints = checkpoints.without(self.checkpoints, name)
        else:
            self.checkpoints = checkpoints.broken(self.checkpoints, name)
        del self._relied_on[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bitmaps)

    def __len__(self) -> int:
        return len(self._bitmaps)

    def rename(self, name: str, new: str) -> None:
        """Gives a bitmap another name, in its old place of the order.

        Raises:
            BitmapError: no such bitmap, or the new name is taken or not allowed.
        """
        bitmap = self[name]
        self.refuse_held(name)
        self.refuse_checkpoint(name)
        if new in self:
            raise BitmapError(f"{self.where}: {label(new)}", "the name is taken")
        self[new] = bitmap
        self._bitmaps = {new if key == name else key: value for key, value in self._bitmaps.items() if key != new}

    def judge(self) -> None:
        """Refuses to commit where the bits of a held bitmap were changed in place, or a checkpoint has lost some.

        Raises:
            BitmapError: names the bitmap, and who holds it.
        """
        for name, (_, bitmap) in self._held.items():
            if self._bitmaps[name]._source is not bitmap._source:
                self.refuse_held(name)
        for name, before in self._relied_on.items():
            now = self._bitmaps[name]
            changed = now._source is None or now._source is not before._source
            if now.recording != before.recording or (changed and not before.inconsistent and (before - now).count):
                self.refuse_checkpoint(name)

    def refuse_checkpoint(self, name: str) -> None:
        """Refuses a checkpoint.

        Raises:
            BitmapError: names it.
        """
        if name in self._relied_on:
            raise a_checkpoint(self.where, name)

    def refuse_held(self, name: str) -> None:
        """Refuses a bitmap that is held.

        Raises:
            BitmapError: names it and who holds it.
        """
        if name in self._held:
            raise BitmapError(f"{self.where}: {label(name)}", f"busy: held by {self._held[name][0]}")

    def close(self) -> None:
        """Ends it: nothing got from it afterwards would be committed."""
        self._open = False

    def _require_open(self) -> None:
        if not self._open:
            raise Error(self.where, "the transaction has ended")
