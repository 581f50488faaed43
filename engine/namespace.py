"""What both containers show of a namespace: `BitmapInfo`, `ImageInfo`, and the `Transaction` that changes one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dirtmap.fmt import geometry
from dirtmap.fmt.directory import name_fault
from dirtmap.fmt.errors import BitmapError, BitmapNotFoundError, Error

if TYPE_CHECKING:
    from dirtmap.engine.bitmap import Bitmap


def decode_name(name: bytes) -> str:
    """A bitmap name from disk as text; bytes that are not UTF-8 become lone surrogates, and back with `encode_name`."""
    return name.decode("utf-8", "surrogateescape")


def encode_name(name: str) -> bytes:
    """A bitmap name as it is stored.

    Raises:
        BitmapError: it holds a lone surrogate that stands for no byte.
    """
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise BitmapError(f"bitmap {name!a}", "the name cannot be encoded") from error


@dataclass(frozen=True, slots=True)
class BitmapInfo:
    """A bitmap without its bits.

    Attributes:
        name: unique in its namespace.
        granularity: bytes of the disk for each bit.
        recording: QEMU goes on tracking into it.
        inconsistent: left in use by a writer that did not finish; its bits mean nothing until `recover`.
        busy: held by an operation.
        count: dirty bytes in whole granules, as QEMU counts; None where inconsistent.
    """

    name: str
    granularity: int
    recording: bool
    inconsistent: bool
    busy: bool
    count: int | None


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """An image and its bitmaps as of one moment.

    Attributes:
        path: as it was opened.
        format: ``qcow2``.
        size: of the virtual disk, bytes.
        cluster_size: bytes.
        bitmaps: in the order of the directory.
        notes: what a user should know although nothing is wrong with the image, a line each.
    """

    path: str
    format: str
    size: int
    cluster_size: int
    bitmaps: tuple[BitmapInfo, ...]
    notes: tuple[str, ...] = ()


class Transaction(MutableMapping[str, "Bitmap"]):
    """A namespace's bitmaps while they are being changed: a mapping of names to bitmaps, in the order of the directory.

    A bitmap got from it is a working copy: marking it changes what will be committed. A bitmap put into it is copied.

    Attributes:
        where: the image, for messages.
        size: of the virtual disk, bytes.
        default_granularity: bytes; for bitmaps added without one.
    """

    def __init__(self, where: str, size: int, default_granularity: int, bitmaps: Mapping[str, Bitmap]) -> None:
        self.where = where
        self.size = size
        self.default_granularity = default_granularity
        self._bitmaps = dict(bitmaps)
        self._open = True

    def __getitem__(self, name: str) -> Bitmap:
        self._require_open()
        try:
            return self._bitmaps[name]
        except KeyError:
            raise not_found(self.where, name) from None

    def __setitem__(self, name: str, bitmap: Bitmap) -> None:
        self._require_open()
        where = f"{self.where}: {label(name)}"
        if fault := name_fault(encode_name(name)):
            raise BitmapError(where, fault)
        if bitmap.size != self.size:
            what = f"made for a disk of {bitmap.size} bytes, and this one has {self.size}"
            raise BitmapError(where, what)
        if not geometry.is_granularity(bitmap.granularity):
            raise BitmapError(where, f"granularity {bitmap.granularity} is not a power of two from 512 bytes to 2 GiB")
        self._bitmaps[name] = bitmap.copy()

    def __delitem__(self, name: str) -> None:
        self[name]
        del self._bitmaps[name]

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
        if new in self:
            raise BitmapError(f"{self.where}: {label(new)}", "the name is taken")
        self[new] = bitmap
        self._bitmaps = {new if key == name else key: value for key, value in self._bitmaps.items() if key != new}

    def close(self) -> None:
        """Ends it: nothing got from it afterwards would be committed."""
        self._open = False

    def _require_open(self) -> None:
        if not self._open:
            raise Error(self.where, "the transaction has ended")


def label(name: str) -> str:
    """How messages name a bitmap: always valid text, odd bytes escaped."""
    text = encode_name(name).decode("utf-8", "backslashreplace")
    return f"bitmap '{text}'"


def not_found(where: str, name: str) -> BitmapNotFoundError:
    """The error for a name that is not there."""
    return BitmapNotFoundError(f"{where}: {label(name)}", "there is no such bitmap")
