"""The way in: finds out what kind of container a target is and hands it to the room that knows it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from dirtmap.engine.fileio import open_file
from dirtmap.engine.namespace import ImageInfo
from dirtmap.fmt import qcow2
from dirtmap.fmt.errors import FormatError, StorageError

if TYPE_CHECKING:
    from dirtmap.engine.qcow2.check import CheckReport
    from dirtmap.engine.qcow2.image import Image, Recovery


def resolve(target: str | os.PathLike[str]) -> str:
    """The path that a target means: ``file:`` in front says that it is one.

    Raises:
        StorageError: ``node:`` or ``device:`` in front; names need the index.
    """
    text = os.fspath(target)
    for prefix in ("node:", "device:"):
        if text.startswith(prefix):
            raise StorageError(text, "nodes and devices are not known yet; name the image's file")
    return text.removeprefix("file:")


def open(target: str | os.PathLike[str], *, force_share: bool = False) -> Image:
    """Opens an image's bitmaps.

    Args:
        target: a path.
        force_share: read although another process writes to the image; what it has in memory is not seen.

    Raises:
        FormatError: not a qcow2 image, one that QEMU would refuse, or one that is unsafe to use.
        LockedError: open for writing elsewhere.
        StorageError: cannot be opened or read.
    """
    from dirtmap.engine.qcow2.image import Image

    path = resolve(target)
    image = Image(path, force_share=force_share)
    return image


def describe(target: str | os.PathLike[str], *, force_share: bool = False) -> ImageInfo:
    """An image and all its bitmaps without their bits, as of one moment. Arguments and errors as `open`."""
    from dirtmap.engine.qcow2.image import describe

    with open_file(resolve(target)) as file:
        return describe(file, force_share=force_share)


def recover(target: str | os.PathLike[str], names: Iterable[str] = ()) -> list[Recovery]:
    """Makes inconsistent bitmaps usable; see `dirtmap.engine.qcow2.image.recover`."""
    from dirtmap.engine.qcow2.image import recover

    return recover(resolve(target), names)


def check(
    target: str | os.PathLike[str],
    *,
    repair: str | None = None,
    force_share: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Checks an image and mends it; see `dirtmap.engine.qcow2.check.check`."""
    from dirtmap.engine.qcow2.check import check

    return check(resolve(target), repair=repair, force_share=force_share, progress=progress)


def dump(target: str | os.PathLike[str], *, with_hex: bool = False, force_share: bool = False) -> dict[str, Any]:
    """Every structure on disk, as far as it can be read; see `dirtmap.engine.qcow2.dump.dump`."""
    from dirtmap.engine.qcow2.dump import dump

    return dump(resolve(target), with_hex=with_hex, force_share=force_share)


def probe(path: str) -> str | None:
    """``qcow2`` or None, from the first bytes.

    Raises:
        StorageError: cannot be opened or read.
    """
    with open_file(path) as file:
        return "qcow2" if file.read(0, 4) == qcow2.MAGIC else None


def require_format(path: str, wanted: str | None) -> None:
    """Holds a user's ``-f`` against what the file is.

    Raises:
        FormatError: it is something else.
    """
    found = probe(path)
    if wanted and wanted != found:
        raise FormatError(path, f"not of format {wanted}")
