"""`dirtmap hold`: keep a bitmap from changing while a backup reads it."""

from __future__ import annotations

import click

import dirtmap.engine as dm
from dirtmap.engine.containers import Target
from dirtmap.fmt.errors import Error
from dirtmap.tools import options


@options.command(
    "hold",
    examples="""
    dirtmap hold drive0 monday -- sh -c 'dirtmap map --dirty drive0 monday | copy-extents'
    """,
)
@options.target
@options.bitmap
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--owner", metavar="TEXT", help="Who holds it, for others to read.  [default: the command's name]")
@options.changing
@click.pass_context
def hold_command(ctx: click.Context, target: Target, bitmap: str, command: tuple[str, ...], owner: str | None) -> None:
    """Run a command while a bitmap is held.

    A held bitmap is busy: nobody can remove, clear, rename, move or change it. The hold ends with the command; one
    whose process has died counts no more. Exit status: that of the command.
    """
    import subprocess

    with dm.open(target) as image, image.hold(bitmap, owner or command[0]):
        try:
            status = subprocess.run(command, check=False).returncode
        except FileNotFoundError:
            raise Error(command[0], "no such command") from None
        except OSError as error:
            raise Error(command[0], error.strerror or str(error)) from error
    ctx.exit(status if status >= 0 else 128 - status)
