"""`dirtmap hold`: keeps a bitmap from changing while a backup reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dirtmap.fmt.errors import Error
from dirtmap.tools import options

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
        try:
            status = _run(command)
        except FileNotFoundError:
            raise Error(command[0], "no such command") from None
        except OSError as error:
            raise Error(command[0], error.strerror or str(error)) from error
    ctx.exit(status if status >= 0 else 128 - status)


def _run(command: tuple[str, ...]) -> int:
    """Runs a command to its end, and returns its exit status.

    Passes on signals that ask this process to end; otherwise the command would go on without the hold.
    """
    import signal
    import subprocess

    begun: list[subprocess.Popen[bytes]] = []
    early: list[int] = []

    def pass_on(number: int, _: object) -> None:
        if begun:
            begun[0].send_signal(number)
        else:
            early.append(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, pass_on)
        with subprocess.Popen(command) as process:
            begun.append(process)
            for told in early:
                process.send_signal(told)
            try:
                return process.wait()
            except BaseException:
                process.kill()
                raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
