"""`dirtmap mark`: makes ranges dirty."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dirtmap.tools import options
from dirtmap.tools.inputs import read_input
from dirtmap.tools.targets import transaction

if TYPE_CHECKING:
    from dirtmap.engine import Host


@options.command(
    "mark",
    examples="""
    dirtmap mark disk.qcow2 monday 1M 64K
    qemu-img map --output=json overlay.qcow2 | dirtmap mark disk.qcow2 monday --from -
    rbd diff --from-snap mon --format json pool/disk >changed && dirtmap mark disk.qcow2 monday --from changed
    """,
)
@options.target
@options.bitmap
@click.argument("offset", type=options.SIZE, required=False)
@click.argument("length", type=options.SIZE, required=False)
@click.option(
    "--from",
    "source",
    metavar="FILE",
    type=click.Path(allow_dash=True),
    help='Ranges from FILE; "-" is standard input.',
)
@options.changing
def mark_command(
    host: Host, target: str, bitmap: str, offset: int | None, length: int | None, source: str | None
) -> None:
    """Make parts of the disk dirty in a bitmap.

    Marks LENGTH bytes at OFFSET, or all ranges that FILE lists: every granule that a range touches becomes dirty. FILE
    holds the JSON of "nbdinfo --map" (its dirty extents are marked), of "qemu-img map" (what the top image holds, data
    or zeros; a raw image holds all of itself) or of "rbd diff" (all, since discarded ones changed, too), or lines of
    "offset length", each of which ends with a newline. All ranges are marked, or none. An empty FILE is an error, as a
    program leaves one that fails; an empty JSON array says that there is nothing to mark.
    """
    from dirtmap.engine import changes

    if source is None:
        if offset is None or length is None:
            raise click.UsageError("Missing OFFSET and LENGTH, or --from FILE.")
        with transaction(host, target) as bitmaps:
            changes.mark(bitmaps, bitmap, [offset], [length])
        return
    if offset is not None:
        raise click.UsageError("OFFSET and LENGTH do not go with --from.")
    from dirtmap.tools.extents import parse_extents

    extents = parse_extents(*read_input(source))
    with transaction(host, target) as bitmaps:
        extents.require_inside(bitmaps.size)
        changes.mark(bitmaps, bitmap, extents.offsets, extents.lengths)
