"""`dirtmap checkpoint`: points in time since which a tracker knows what was written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dirtmap.fmt.errors import BitmapNotFoundError, printable
from dirtmap.fmt.spelling import escaped
from dirtmap.tools import options
from dirtmap.tools.output import write_json
from dirtmap.tools.sizes import human_size
from dirtmap.tools.targets import address, transaction
from dirtmap.tools.times import iso_time, local_time

if TYPE_CHECKING:
    from dirtmap.engine import Host


@click.group("checkpoint")
def checkpoint_command() -> None:
    """Begin, end and list points in time, to tell later writes."""


@options.command(
    "add",
    examples="""
    dirtmap checkpoint add drive0 noon
    dirtmap checkpoint add system data logs noon
    """,
)
@click.argument("targets", metavar="TARGET...", type=options.TARGET, nargs=-1, required=True)
@click.argument("name", type=options.NAME)
@click.option("-g", "--granularity", type=options.SIZE, help="Bytes of the disk for each bit.  [default: 64K]")
@options.changing
def add_command(host: Host, targets: tuple[str, ...], name: str, granularity: int | None) -> None:
    """Begin a checkpoint of each TARGET, at one instant.

    Each has to be tracked, by "dirtmap serve" or another program, which is asked for it. Of several, no write is under
    way at that instant; all of them get the checkpoint, or none.
    """
    host.checkpoint(targets, name, granularity)


@options.command(
    "remove",
    examples="""
    dirtmap checkpoint remove drive0 noon
    """,
)
@options.target
@click.argument("name", type=options.BITMAP)
@options.changing
def remove_command(host: Host, target: str, name: str) -> None:
    """Remove a checkpoint.

    The one before it takes over what was written since, so that nothing is lost. TARGET need not be tracked.
    """
    with transaction(host, target) as bitmaps:
        if name not in bitmaps.checkpoints:
            raise BitmapNotFoundError(f"{bitmaps.where}: '{printable(name)}'", "there is no such checkpoint")
        del bitmaps[name]


@options.command(
    "list",
    examples="""
    dirtmap checkpoint list drive0
    dirtmap checkpoint list --output=json drive0 | jq -r '.checkpoints[].name'
    """,
)
@options.target
@options.reporting
def list_command(host: Host, target: str, quiet: bool, output: str) -> None:
    """List the checkpoints of TARGET, oldest first: since when each is, and how much was written since.

    "since" is in bytes, in whole granules. Where a program that knows nothing of checkpoints has taken one away, it is
    not known any more: it is null then, and a backup has to be a full one. "began" is null for a checkpoint that was
    begun by a program that did not write it down.
    """
    with host.open(target, force_share=True) as image:
        info = image.info()
    there = {bitmap.name: bitmap for bitmap in info.bitmaps}
    found = [(name, there.get(name)) for name in info.checkpoints]
    if quiet:
        return
    if output == "json":
        shown = [
            {
                "name": escaped(name),
                "began": iso_time(bitmap.began if bitmap else None),
                "since": bitmap.since if bitmap else None,
            }
            for name, bitmap in found
        ]
        write_json({**address(host, target), "checkpoints": shown})
        return
    for name, bitmap in found:
        since = "not known" if bitmap is None or bitmap.since is None else human_size(bitmap.since)
        began = "" if bitmap is None or bitmap.began is None else f" {local_time(bitmap.began)}"
        print(f"{printable(name)}: {since} written since{began}")


for _command in (add_command, remove_command, list_command):
    checkpoint_command.add_command(_command)
