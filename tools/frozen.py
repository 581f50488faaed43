"""What is read in place of a disk that is being written: its clone, or a frozen copy that somebody else has made."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import dirtmap.engine as dm
from dirtmap.fmt.errors import ArgumentError, StorageError, UnsupportedError, printable

if TYPE_CHECKING:
    from dirtmap.engine import Clone, Disk, Handle


def prepared_clone(stack: contextlib.ExitStack, image: Handle, remedy: str) -> Clone:
    """A clone of a tracked disk, that is still to be taken; see `dm.Clone` and `dm.Instant`.

    Args:
        stack: closes it.
        image: whose disk it is.
        remedy: what can be done where it cannot be cloned.

    Raises:
        UnsupportedError: it cannot be.
    """
    disk = image.disk()
    if disk.format != "raw":
        what = f"a qcow2 image is not cloned, as its program may have some of it in memory; {remedy}"
        raise UnsupportedError(image.where, what)
    try:
        return stack.enter_context(dm.Clone(disk.path))
    except (UnsupportedError, StorageError) as error:
        raise UnsupportedError(error.where, f"{error.what}; {remedy}") from error


def frozen_copy(source: str, disk: Disk) -> Disk:
    """The disk that ``--source`` names.

    Raises:
        ArgumentError: it is the disk itself.
    """
    is_same = False
    with contextlib.suppress(OSError, ValueError):  # who opens it says what is wrong
        is_same = os.path.samefile(source, disk.path)
    if is_same:
        raise ArgumentError("sources", f"{printable(source)} is the disk itself, and no frozen copy of it")
    return dm.Disk(os.path.abspath(source), disk.format)
