"""`dirtmap add`, `remove`, `clear`, `enable`, `disable`, `rename`: changes to one bitmap."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dirtmap.tools import options
from dirtmap.tools.targets import transaction

if TYPE_CHECKING:
    from dirtmap.engine import Host


@options.command(
    "add",
    examples="""
    dirtmap add disk.qcow2 monday
    dirtmap add -g 128K --disabled disk.qcow2 archive
    """,
)
@options.target
@options.new_bitmap
@click.option(
    "-g",
    "--granularity",
    type=options.SIZE,
    help="Bytes of the disk for each bit, a power of two from 512 to 2G.  "
    "[default: 64K; in a qcow2 image its cluster size, 4K to 64K]",
)
@click.option("--disabled", is_flag=True, help="Do not record into it.")
@options.changing
def add_command(host: Host, target: str, bitmap: str, granularity: int | None, disabled: bool) -> None:
    """Add a new, empty bitmap.

    QEMU records writes to the disk in it from the next time it opens the image, unless the bitmap is added disabled.
    """
    from dirtmap.engine import changes

    with transaction(host, target) as bitmaps:
        changes.add(bitmaps, bitmap, granularity, recording=not disabled)


@options.command(
    "remove",
    examples="""
    dirtmap remove disk.qcow2 monday
    """,
)
@options.target
@options.bitmap
@options.changing
def remove_command(host: Host, target: str, bitmap: str) -> None:
    """Remove a bitmap.

    An inconsistent bitmap can be removed as well.
    """
    from dirtmap.engine import changes

    with transaction(host, target) as bitmaps:
        changes.remove(bitmaps, bitmap)


@options.command(
    "clear",
    examples="""
    dirtmap clear disk.qcow2 monday
    """,
)
@options.target
@options.bitmap
@options.changing
def clear_command(host: Host, target: str, bitmap: str) -> None:
    """Make all of a bitmap clean.

    From then on the bitmap tells what was written since this moment.
    """
    from dirtmap.engine import changes

    with transaction(host, target) as bitmaps:
        changes.clear(bitmaps, bitmap)


@options.command(
    "enable",
    examples="""
    dirtmap enable disk.qcow2 monday
    """,
)
@options.target
@options.bitmap
@options.changing
def enable_command(host: Host, target: str, bitmap: str) -> None:
    """Let QEMU record into a bitmap.

    Writes are recorded from the next time that QEMU opens the image; what was written meanwhile is not known to the
    bitmap.
    """
    from dirtmap.engine import changes

    with transaction(host, target) as bitmaps:
        changes.set_recording(bitmaps, bitmap, True)


@options.command(
    "disable",
    examples="""
    dirtmap disable disk.qcow2 monday
    """,
)
@options.target
@options.bitmap
@options.changing
def disable_command(host: Host, target: str, bitmap: str) -> None:
    """Keep QEMU from recording into a bitmap.

    The bitmap stays as it is until it is enabled again, cleared or merged into.
    """
    from dirtmap.engine import changes

    with transaction(host, target) as bitmaps:
        changes.set_recording(bitmaps, bitmap, False)


@options.command(
    "rename",
    examples="""
    dirtmap rename disk.qcow2 monday week-14
    """,
)
@options.target
@options.bitmap
@click.argument("new", type=options.NAME)
@options.changing
def rename_command(host: Host, target: str, bitmap: str, new: str) -> None:
    """Give a bitmap another name.

    Its content and its place among the others stay. A name that is taken is refused.
    """
    from dirtmap.engine import changes

    with transaction(host, target) as bitmaps:
        changes.rename(bitmaps, bitmap, new)
