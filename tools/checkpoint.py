"""`dirtmap checkpoint`: points in time since which a tracker knows what was written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dirtmap.fmt.errors import BitmapNotFoundError, printable
from dirtmap.fmt.spelling import escaped
from dirtmap.tools import options
from dirtmap.tools.output import write_json
from dirtmap.tools.targets import address, transaction

if TYPE_CHECKING:
    from dirtmap.engine import Host


@click.group("checkpoint")
def checkpoint_command() -> None:
    """Begin, end and list checkpoints: what was written since each is known."""


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
    """List the checkpoints of TARGET, oldest first.

    What was written since one is in it and in all later ones. Where a checkpoint was taken away by a program that knows
    nothing of them, not all of it is known any more: "complete" is false then, and a backup has to be a full one.
    """
    info = host.describe(target, force_share=True)
    sizes = {bitmap.name: bitmap.granularity for bitmap in info.bitmaps}
    if quiet:
        return
    if output == "json":
        found = [
            {"name": escaped(name), "granularity": sizes.get(name), "complete": name not in info.incomplete}
            for name in info.checkpoints
        ]
        write_json({**address(host, target), "checkpoints": found})
        return
    for name in info.checkpoints:
        print(printable(name) + ("  (not all that was written since is known)" if name in info.incomplete else ""))


for _command in (add_command, remove_command, list_command):
    checkpoint_command.add_command(_command)
