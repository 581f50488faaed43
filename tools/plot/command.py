"""`dirtmap plot`: draws where a disk is dirty. See `dirtmap.tools.plot`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dirtmap.fmt.errors import ArgumentError
from dirtmap.fmt.spelling import escaped
from dirtmap.tools import options
from dirtmap.tools.output import colourful, write_json
from dirtmap.tools.targets import address, tell_damage, tell_doubt
from dirtmap.tools.times import iso_time

if TYPE_CHECKING:
    from dirtmap.engine import Handle, Host
    from dirtmap.tools.plot.reading import Picture, Row


@options.command(
    "plot",
    examples="""
    dirtmap plot disk.qcow2
    dirtmap plot drive0 monday tuesday wednesday
    dirtmap plot drive0 -o drive0.png
    dirtmap plot drive0 -o drive0.html
    dirtmap plot --output=json drive0 monday | jq '.[].cells[].offset'
    """,
)
@options.target
@click.argument("bitmaps", metavar="[BITMAP]...", type=options.BITMAP, nargs=-1)
@click.option(
    "-o",
    "out",
    type=click.Path(),
    metavar="FILE",
    help="Make a file, or replace it: .png, .svg, or .html, a page with zoom that tells the extents.",
)
@options.force_share
@options.reporting
def plot_command(
    host: Host,
    target: str,
    bitmaps: tuple[str, ...],
    out: str | None,
    force_share: bool,
    quiet: bool,
    output: str,
) -> None:
    """Draw where the disk is dirty, one bitmap below the other.

    Without a BITMAP, draws all bitmaps, and then all checkpoints, oldest first; a checkpoint shows what was written
    until the next one. The disk is shared out among cells, which are darker the more of them is dirty; whatever is
    dirty is to be seen, however small. An inconsistent bitmap, or one that counts as dirty because of a doubt, is drawn
    with "?" or in orange, and the reason is named.

    Files need the extra "plot": pip install 'dirtmap[plot]'. In JSON, "cells" has those that are not clean, with how
    much of each is dirty and how many extents begin in it; a list has one object for each bitmap.
    """
    if out is not None:
        from dirtmap.tools.plot.files import ENDINGS, require_library, write

        if output == "json":
            raise click.UsageError("-o does not go with --output=json.")
        if Path(out).suffix.lower() not in ENDINGS:
            raise click.UsageError(f"-o takes a FILE that ends in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}.")
        require_library(out)
    from dirtmap.tools.plot import reading, terminal

    in_terminal = out is None and output == "human"
    with host.open(target, force_share=force_share) as image:
        if out is not None:
            _refuse_the_disk(image, out)
        picture = reading.read(image, bitmaps, terminal.columns_for if in_terminal else None)
        tell_doubt(image, picture.doubt)
        for row in picture.rows:
            tell_damage(image, row.name, row.damage)
    if out is not None:
        write(picture, out)
    elif quiet:
        return
    elif output == "json":
        there = address(host, target)
        write_json([_document(picture, row, there) for row in picture.rows])
    else:
        for line in terminal.draw(picture, colour=colourful()):
            print(line)


def _refuse_the_disk(image: Handle, out: str) -> None:
    """Keeps a picture from replacing what it is a picture of.

    Raises:
        ArgumentError: the file is the container, or the disk.
    """
    import dirtmap.engine as dm

    try:
        paths = [image.path, image.disk().path]
    except dm.Error:
        paths = [image.path]  # a disk that is nowhere is not there to be replaced
    if any(os.path.exists(path) and os.path.exists(out) and os.path.samefile(path, out) for path in paths):
        raise ArgumentError(out, "has the disk or its bitmaps; -o would replace it")


def _document(picture: Picture, row: Row, there: dict[str, str]) -> dict[str, Any]:
    starts, ends = picture.edges[:-1], picture.edges[1:]
    some = row.cells.levels > 0
    columns = starts[some], (ends - starts)[some], row.cells.dirty[some], row.cells.extents[some]
    return {
        **there,
        "name": escaped(row.name),
        "virtual-size": picture.size,
        "granularity": row.granularity,
        "checkpoint": row.checkpoint,
        "began": iso_time(row.began),
        "count": row.count,
        "doubt": row.doubt,
        "incomplete": row.incomplete,
        "cell-size": int(picture.edges[1]) if len(picture.edges) > 1 else 0,
        "cells": [
            {"offset": offset, "length": length, "dirty": dirty, "extents": extents}
            for offset, length, dirty, extents in zip(*(column.tolist() for column in columns), strict=True)
        ],
    }
