"""`dirtmap hold`: keeps a bitmap from changing while a backup reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dirtmap.tools import options
from dirtmap.tools.running import run

if TYPE_CHECKING:
    from dirtmap.engine import Host


@options.command(
    "hold",
    examples="""
    dirtmap hold drive0 monday -- sh -c 'dirtmap map --dirty drive0 monday | copy-extents'
    """,
)
@options.target
@options.bitmap
@click.argument("command", nargs=-1, required=True, type=options.WORD)
@click.option("--owner", metavar="TEXT", help="Who holds it, for others to read.  [default: the command's name]")
@options.changing
@click.pass_context
def hold_command(
    ctx: click.Context, host: Host, target: str, bitmap: str, command: tuple[str, ...], owner: str | None
) -> None:
    """Run a command while a bitmap is held.

    A held bitmap is busy: nobody can remove, clear, rename, move or change it. The hold ends with the command, or when
    the process of "dirtmap hold" dies. SIGTERM and SIGHUP are passed on to the command. Exit status: that of the
    command.
    """
    with host.open(target) as image, image.hold(bitmap, owner or command[0]):
        status = run(command)
    ctx.exit(status)
