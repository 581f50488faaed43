"""The changes that users ask for, as pure functions on a mapping of names to bitmaps. No I/O, no container.

Each function works on a `Transaction` of any kind of container, whose commit makes all changes durable, or none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

from dirtmap.engine.model.bitmap import WHERE, Bitmap
from dirtmap.engine.model.naming import as_stored, label
from dirtmap.engine.model.transaction import Transaction
from dirtmap.fmt.errors import BitmapError, RangeError


def add(bitmaps: Transaction, name: str, granularity: int | None = None, *, recording: bool = True) -> None:
    """Adds a new, empty bitmap.

    Args:
        bitmaps: the namespace being changed.
        name: must be free.
        granularity: bytes, a power of two from 512 to 2 GiB; None for the container's default.
        recording: False for a disabled bitmap.

    Raises:
        BitmapError: the name is taken or not allowed, or the granularity is not allowed.
    """
    if name in bitmaps:
        raise BitmapError(f"{bitmaps.where}: {label(name)}", "the name is taken")
    chosen = bitmaps.default_granularity if granularity is None else granularity
    with _named(bitmaps, name):
        bitmaps[name] = Bitmap(bitmaps.size, chosen, recording=recording)
        bitmaps.fresh.add(as_stored(bitmaps.where, name))


def put(bitmaps: Transaction, name: str, bitmap: Bitmap) -> None:
    """Adds a copy of a bitmap under a free name.

    Raises:
        BitmapError: the name is taken or not allowed, the disk has another size, or the bitmap is inconsistent.
    """
    if name in bitmaps:
        raise BitmapError(f"{bitmaps.where}: {label(name)}", "the name is taken")
    require_usable(bitmap, f"{bitmaps.where}: {label(name)}")
    bitmaps[name] = bitmap


def remove(bitmaps: Transaction, name: str) -> None:
    """Removes a bitmap, even an inconsistent one.

    Raises:
        BitmapError: no such bitmap, or it is held.
    """
    _usable(bitmaps, name, inconsistent=True)
    del bitmaps[name]


def clear(bitmaps: Transaction, name: str) -> None:
    """Makes all of a bitmap clean.

    Raises:
        BitmapError: no such bitmap, or it is held, inconsistent or a checkpoint.
    """
    bitmap = _usable(bitmaps, name)
    bitmaps.refuse_checkpoint(name)
    bitmaps[name] = Bitmap(bitmap.size, bitmap.granularity, recording=bitmap.recording)


def set_recording(bitmaps: Transaction, name: str, recording: bool) -> None:
    """Enables or disables a bitmap. Errors as `clear`."""
    bitmap = _usable(bitmaps, name)
    bitmaps.refuse_checkpoint(name)
    bitmaps[name] = bitmap.replace(recording=recording)


def merge(bitmaps: Transaction, name: str, sources: Iterable[Bitmap]) -> None:
    """ORs other bitmaps into one, which keeps its granularity. A coarser source bit makes all that it covers dirty.

    Raises:
        BitmapError: no such bitmap, it is held, one of them is inconsistent, or a source's disk has another size.
    """
    target = _usable(bitmaps, name)
    for source in sources:
        where = f"{bitmaps.where}: {label(name)}"
        if source.size != target.size:
            what = f"cannot take a bitmap of a disk of {source.size} bytes: this one has {target.size}"
            raise BitmapError(where, what)
        require_usable(source, where)
        target = target | source.at(target.granularity)
    bitmaps[name] = target


def rename(bitmaps: Transaction, name: str, new: str) -> None:
    """Renames a bitmap, in its place. Errors as `clear`; also where the new name is taken or not allowed."""
    _usable(bitmaps, name)
    bitmaps.rename(name, new)


def mark(bitmaps: Transaction, name: str, offsets: Iterable[int], lengths: Iterable[int]) -> None:
    """Marks ranges dirty, in bytes, all or none.

    Raises:
        RangeError: a range is not inside the disk.
        BitmapError: no such bitmap, or it is held or inconsistent.
    """
    bitmap = _usable(bitmaps, name)
    with _named(bitmaps, name):
        bitmap.mark_many(offsets, lengths)


def recover(bitmaps: Transaction, name: str) -> None:
    """Makes an inconsistent bitmap usable. What it missed is unknown, so it becomes dirty all over."""
    bitmaps[name] = _usable(bitmaps, name, inconsistent=True).recovered()


@contextlib.contextmanager
def _named(bitmaps: Transaction, name: str) -> Iterator[None]:
    """Puts the container and the bitmap's name into errors of a `Bitmap`, which knows neither."""
    try:
        yield
    except (BitmapError, RangeError) as error:
        if error.where != WHERE:
            raise
        raise type(error)(f"{bitmaps.where}: {label(name)}", error.what) from error


def _usable(bitmaps: Transaction, name: str, *, inconsistent: bool = False) -> Bitmap:
    bitmap = bitmaps[name]
    where = f"{bitmaps.where}: {label(name)}"
    if bitmap.busy:
        bitmaps.refuse_held(name)
    if not inconsistent:
        require_usable(bitmap, where)
    return bitmap


def require_usable(bitmap: Bitmap, where: str) -> None:
    """Refuses a bitmap whose bits cannot be trusted.

    Raises:
        BitmapError: the bitmap is inconsistent; the error names ``where``.
    """
    bitmap.required(where)


def usable(where: str, bitmaps: Mapping[str, Bitmap], name: str) -> Bitmap:
    """A bitmap of a mapping, whose bits can be trusted.

    Args:
        where: how messages name the container of the mapping.
        bitmaps: the mapping.
        name: of the bitmap.

    Raises:
        BitmapNotFoundError: the mapping has no such bitmap.
        BitmapError: the bitmap is inconsistent.
    """
    bitmap = bitmaps[name]
    require_usable(bitmap, f"{where}: {label(name)}")
    return bitmap
