"""`dirtmap copy`, `move`: copies or moves a bitmap from one container to another."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import click

import dirtmap.engine as dm
from dirtmap.fmt.errors import errno_of
from dirtmap.tools import options
from dirtmap.tools.targets import same_container, same_image, tell_doubt, transaction, usable

if TYPE_CHECKING:
    from dirtmap.engine import Host

_dest = click.argument("dest_target", type=options.TARGET)
_as = click.option("--as", "new", metavar="NAME", type=options.NAME, help="Another name for it there.")


@options.command(
    "copy",
    examples="""
    dirtmap copy disk.qcow2 monday overlay.qcow2
    dirtmap copy disk.qcow2 monday disk.qcow2 --as monday-before
    """,
)
@options.target
@options.bitmap
@_dest
@_as
@options.changing
def copy_command(host: Host, target: str, bitmap: str, dest_target: str, new: str | None) -> None:
    """Copy a bitmap to another image, or within one.

    The copy has the same content, granularity and recording flag. DEST_TARGET must have the same virtual size, and the
    name must be free there.
    """
    from dirtmap.engine import changes

    name = bitmap if new is None else new
    if same_image(host, target, dest_target):
        with transaction(host, target) as bitmaps:
            changes.put(bitmaps, name, usable(bitmaps.where, bitmaps, bitmap))
        return
    with host.open(target) as image:
        source = usable(image.where, image, bitmap)
        tell_doubt(image, image.doubt())
    with transaction(host, dest_target) as there:
        changes.put(there, name, source)


@options.command(
    "move",
    examples="""
    dirtmap move disk.qcow2 monday overlay.qcow2
    dirtmap move disk.qcow2 monday overlay.qcow2 --as before-snapshot
    """,
)
@options.target
@options.bitmap
@_dest
@_as
@options.changing
def move_command(host: Host, target: str, bitmap: str, dest_target: str, new: str | None) -> None:
    """Move a bitmap to another image, or within one.

    Copies it as "copy" does, then removes the source. Within one image or store this is one change. Between two, and
    from a disk that is tracked, both are locked and checked first, and the source is removed only when the copy is
    durable: after a crash in between, both have it. So they may where the operating system fails to remove it, as an
    error then tells.
    """
    from dirtmap.engine import changes

    name = bitmap if new is None else new
    if same_container(host, target, dest_target) and not _is_apart(host, target, dest_target):
        with host.transaction([target, dest_target]) as nodes:
            if nodes[target] is nodes[dest_target]:
                changes.rename(nodes[target], bitmap, name)
            else:
                changes.put(nodes[dest_target], name, usable(nodes[target].where, nodes[target], bitmap))
                changes.remove(nodes[target], bitmap)
        return
    with contextlib.ExitStack() as both:
        # Each transaction ends by itself. The destination's ends first, whichever the lock order begins with.
        parts = {part: both.enter_context(contextlib.ExitStack()) for part in (target, dest_target)}
        begun = {}
        for part in host.in_lock_order(parts):
            begun[part] = parts[str(part)].enter_context(transaction(host, str(part)))
        bitmaps, there = begun[target], begun[dest_target]
        changes.put(there, name, usable(bitmaps.where, bitmaps, bitmap))
        changes.remove(bitmaps, bitmap)  # refused before the destination has it
        bitmaps.validate()
        parts[dest_target].close()
        try:
            parts[target].close()
        except dm.Error as error:
            # The copy stays: after a failed sync nobody knows which of the two files has what.
            copied = f"{dest_target} has it as '{name}' for good, and {target} may have '{bitmap}' still"
            what = f"{error.what}; the move is half done: {copied}; if it does, 'dirtmap remove' takes it away"
            raise dm.StorageError(error.where, what, errno_of(error)) from error


def _is_apart(host: Host, target: str, dest_target: str) -> bool:
    """Whether a tracker commits what is done to the source, and not what is done to the destination, in the same store.

    Raises:
        UnsupportedError: it is so the other way round: that tracker would wait for the store, which the source's change
            has locked.
    """
    if same_image(host, target, dest_target):
        return False
    with host.open(target, force_share=True) as source, host.open(dest_target, force_share=True) as dest:
        if source.is_tracked():
            return True
        if dest.is_tracked():
            what = (
                "its tracker commits by itself, and one commit cannot span two: 'dirtmap copy', then 'dirtmap remove'"
            )
            raise dm.UnsupportedError(dest.where, f"tracked; {what}")
        return False
