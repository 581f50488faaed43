"""`dirtmap merge`: ORs bitmaps into another one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dirtmap.tools import options
from dirtmap.tools.targets import same_image, transaction, usable

if TYPE_CHECKING:
    from dirtmap.engine import Host


@options.command(
    "merge",
    examples="""
    dirtmap merge disk.qcow2 week monday tuesday
    dirtmap merge disk.qcow2 week monday -b overlay.qcow2
    """,
)
@options.target
@options.bitmap
@click.argument("sources", metavar="SOURCE...", type=options.SOURCE, nargs=-1, required=True)
@click.option("-b", "source_target", metavar="SOURCE_TARGET", type=options.TARGET, help="Where the sources are.")
@options.changing
def merge_command(host: Host, target: str, bitmap: str, sources: tuple[str, ...], source_target: str | None) -> None:
    """Merge bitmaps into BITMAP.

    BITMAP becomes dirty wherever a SOURCE is, and keeps its granularity: a dirty granule of a SOURCE makes every
    granule dirty that it touches. The sources stay as they are. They may be in another image of the same virtual size.
    """
    from dirtmap.engine import changes

    with transaction(host, target) as bitmaps:
        if source_target is None or same_image(host, target, source_target):
            changes.merge(bitmaps, bitmap, (usable(bitmaps.where, bitmaps, name) for name in sources))
        else:
            with host.open(source_target) as image:
                changes.merge(bitmaps, bitmap, (usable(image.where, image, name) for name in sources))
