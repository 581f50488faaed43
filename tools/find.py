"""`dirtmap find`: finds every bitmap of a name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dirtmap.fmt.errors import Error, counted, printable
from dirtmap.fmt.spelling import spellings
from dirtmap.tools import options
from dirtmap.tools.output import complain, write_json, write_table
from dirtmap.tools.sizes import human_size

if TYPE_CHECKING:
    from dirtmap.engine import BitmapMatch, Host


@options.command(
    "find",
    examples="""
    dirtmap find backup
    dirtmap find --output=json backup | jq -r '.[].filename'
    """,
)
@click.argument("bitmap", type=options.NAME)
@options.force_share
@options.named
@options.speaking
@click.pass_context
def find_command(ctx: click.Context, host: Host, bitmap: str, force_share: bool, quiet: bool, output: str) -> None:
    """Find every bitmap of that name on this host.

    Looks in all images and stores that are known; "dirtmap index scan" finds them. Each bitmap is shown with the node
    or device that it is attached to, or with the path of an image that has no name. If a container cannot be read, the
    others are shown, and the exit status is 1.
    """
    options.tell_no_store(host, quiet=quiet)
    problems: list[Error] = []
    hits: list[BitmapMatch] = []
    for spelling in spellings(bitmap):
        problems = []
        hits = host.find(spelling, force_share=force_share, told=problems.append)
        if hits:
            break
    for problem in problems:
        complain(str(problem))
    if not quiet:
        _show(bitmap, hits, output)
    if problems:
        ctx.exit(1)


def _show(bitmap: str, hits: list[BitmapMatch], output: str) -> None:
    if output == "json":
        write_json(
            [
                {
                    "node": hit.holder if hit.kind == "node" else None,
                    "device": hit.holder if hit.kind == "device" else None,
                    "name": hit.bitmap,
                    "filename": hit.path,
                    "format": hit.format,
                    "namespace": hit.namespace,
                    "granularity": hit.granularity,
                    "recording": hit.recording,
                    "inconsistent": hit.inconsistent,
                }
                for hit in hits
            ]
        )
        return
    rows = [
        (
            printable(hit.holder) if hit.kind != "image" else "",
            hit.kind,
            human_size(hit.granularity),
            "inconsistent" if hit.inconsistent else "recording" if hit.recording else "disabled",
            printable(hit.path),
        )
        for hit in hits
    ]
    title = f"{printable(bitmap)}: {counted(len(rows), 'bitmap')}"
    write_table(title, ("ATTACHED TO", "KIND", "GRANULARITY", "STATE", "FILE"), rows, right=(2,))
