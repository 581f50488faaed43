"""`dirtmap mark`: marks ranges of the disk dirty in a bitmap."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dirtmap.tools import options
from dirtmap.tools.extents import FORMATS, read_extents
from dirtmap.tools.inputs import open_input
from dirtmap.tools.targets import transaction

if TYPE_CHECKING:
    from dirtmap.engine import Host


@options.command(
    "mark",
    examples="""
    dirtmap mark disk.qcow2 monday 1M 64K
    qemu-img map --output=json overlay.qcow2 | dirtmap mark disk.qcow2 monday --from -
    rbd diff --from-snap mon --format json pool/disk >changed && dirtmap mark disk.qcow2 monday --from changed
    era_invalidate --written-since 7 /dev/vg/meta | dirtmap mark data monday --from - --block-size 2M
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
@click.option(
    "--from-format",
    "form",
    type=click.Choice(list(FORMATS)),
    help="What FILE is.  [default: what its content tells]",
)
@click.option("--block-size", type=options.SIZE, help='Bytes of a block of "era", as the device was made with.')
@options.changing
def mark_command(
    host: Host,
    target: str,
    bitmap: str,
    offset: int | None,
    length: int | None,
    source: str | None,
    form: str | None,
    block_size: int | None,
) -> None:
    """Make parts of the disk dirty in a bitmap.

    Marks LENGTH bytes at OFFSET, or all ranges that FILE lists: every granule that a range touches becomes dirty. All
    ranges are marked, or none.

    FILE is, by --from-format: "nbdinfo", the JSON of "nbdinfo --map=qemu:dirty-bitmap:NAME" or "dirtmap map" (what is
    dirty is marked); "qemu-img", that of "qemu-img map" (what the top image holds, data or zeros, and all data below; a
    raw image holds all of itself); "rbd", that of "rbd diff --from-snap" (all, discarded ranges as well); "lines" of
    "offset length", each of which ends with a newline; "thin-delta", the XML of "thin_delta" (all but <same>); "era",
    that of "era_invalidate", with --block-size; "vmware", the JSON of QueryChangedDiskAreas, or an array of its pages;
    "csi", an array of the messages of the Kubernetes call GetMetadataDelta; "xapi", the base64 of
    VDI.list_changed_blocks, which its content does not tell.

    A FILE that is about another disk, or about a part of the disk only, is an error, as far as FILE tells. So is an
    empty FILE, because a program that fails leaves one. An empty JSON array says that there is nothing to mark. FILE
    may have an entry for each 512 bytes of the disk, at least 65536 and at most 16777216 entries, and 512 bytes an
    entry.
    """
    from dirtmap.engine import Bitmap, changes

    if source is None:
        if offset is None or length is None:
            raise click.UsageError("Missing OFFSET and LENGTH, or --from FILE.")
        if form is not None or block_size is not None:
            raise click.UsageError("--from-format and --block-size go with --from only.")
        with transaction(host, target) as bitmaps:
            changes.mark(bitmaps, bitmap, [offset], [length])
        return
    if offset is not None:
        raise click.UsageError("OFFSET and LENGTH do not go with --from.")
    # The image is not open while FILE is read, because the program at the other end of a pipe may be reading it.
    with host.open(target, force_share=True) as image:
        found = Bitmap(image.size, image[bitmap].granularity)
    with open_input(source) as file:
        read_extents(file, found.size, found.mark_many, form, block_size)
    with transaction(host, target) as bitmaps:
        changes.merge(bitmaps, bitmap, [found])
