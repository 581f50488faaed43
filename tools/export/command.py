"""`dirtmap export`: its options, and what it does about signals. See `dirtmap.tools.export`."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

import click

from dirtmap.fmt.errors import printable
from dirtmap.tools import options
from dirtmap.tools.export import export
from dirtmap.tools.listening.announcing import pid_file
from dirtmap.tools.listening.options import listener_of, listening, refuse_contradictions
from dirtmap.tools.listening.stopping import Stop, attend
from dirtmap.tools.output import complain, write_json

if TYPE_CHECKING:
    from dirtmap.engine import Host
    from dirtmap.tools.export import Serving


@options.command(
    "export",
    examples="""
    dirtmap export drive0 --unix /run/drive0.sock
    nbdinfo --map=qemu:dirty-bitmap:monday 'nbd+unix:///drive0?socket=/run/drive0.sock'
    dirtmap export drive0 --run 'nbdcopy "$uri" copy.raw'
    dirtmap export drive0 drive1 --bitmap monday --since sunday --port 10809
    dirtmap export drive0 drive1 --reflink --since monday --unix /run/backup.sock
    dirtmap export drive0 --source /dev/vg0/snapshot --bind 192.0.2.1 --port 10809 --tls /etc/pki/qemu
    """,
)
@click.argument("targets", metavar="TARGET...", type=options.TARGET, nargs=-1, required=True)
@click.option(
    "--bitmap",
    "bitmaps",
    metavar="NAME",
    type=options.BITMAP,
    multiple=True,
    help="A bitmap to serve; may be given several times.  [default: all that can be used]",
)
@click.option(
    "--since",
    metavar="CHECKPOINT",
    type=options.BITMAP,
    help="Serve what was written since CHECKPOINT, too, as bitmap since-CHECKPOINT.",
)
@listening
@click.option(
    "--source",
    "sources",
    metavar="PATH",
    type=click.Path(),
    multiple=True,
    help="Serve a frozen copy of the disk, such as a snapshot, in place of it; one for each TARGET, in their order.",
)
@click.option(
    "--reflink",
    is_flag=True,
    help="Serve clones of raw disks that are tracked, as XFS and btrfs make them, of the same instant as the bitmaps.",
)
@click.option("--live", is_flag=True, help="Serve a disk that is being written: what is read is not of one instant.")
@options.reporting
@click.pass_context
def export_command(
    ctx: click.Context,
    host: Host,
    targets: tuple[str, ...],
    bitmaps: tuple[str, ...],
    since: str | None,
    unix: str | None,
    port: int | None,
    bind: str,
    tls: str | None,
    command: str | None,
    sources: tuple[str, ...],
    reflink: bool,
    live: bool,
    pidfile: str | None,
    quiet: bool,
    output: str,
) -> None:
    """Serve disks and their bitmaps over NBD, read-only.

    Each TARGET becomes an export of its name, whose metadata contexts are base:allocation and, for each bitmap NAME,
    qemu:dirty-bitmap:NAME, as QEMU has them: nbdinfo, libnbd and qemu-img read them. QEMU's qemu-storage-daemon does
    the serving. The bitmaps are as of the beginning, and busy until the end; see "dirtmap hold".

    QEMU cannot write to the disk meanwhile, and if anybody else has changed its file, that is an error at the end. A
    disk that is being written is refused, unless --reflink makes a frozen copy, of one that "dirtmap serve" or another
    program tracks, --source has one, or --live says that you know.

    Prints a line once it is ready, "ready:" and a URI for each TARGET, or with --output=json a list of exports. SIGINT,
    SIGTERM or SIGHUP end it, with exit status 0. With --run, the end of COMMAND does, whose exit status it has, and
    nothing is printed; without --unix and --port it listens on a Unix socket of its own then.
    """
    refuse_contradictions(unix, port, bind, command, output)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(Stop())
        listener = listener_of(stack, unix, port, bind, tls)
        with (
            export(
                host, targets, listener, bitmaps=bitmaps, since=since, sources=sources, live=live, reflink=reflink
            ) as serving,
            pid_file(pidfile),
        ):
            _tell(serving, quiet=quiet)
            status = attend(stop, serving, serving.uris, command, lambda: _tell_ready(serving, output, quiet=quiet))
    if status:
        ctx.exit(status)


def _tell(serving: Serving, *, quiet: bool) -> None:
    """Says what is not as a user may expect it, on standard error."""
    for each in serving.exports if not quiet else ():
        for note in each.notes:
            complain(f"{each.target}: {note}")
        for name, why in each.left_out.items():
            complain(f"{each.target}: '{printable(name)}' is left out: {why}")


def _tell_ready(serving: Serving, output: str, *, quiet: bool) -> None:
    if quiet:
        return
    if output == "json":
        write_json(
            [
                {
                    "target": each.target,
                    "export": each.name,
                    "uri": each.uri,
                    "virtual-size": each.size,
                    "bitmaps": list(each.bitmaps),
                    "left-out": each.left_out,
                    "notes": list(each.notes),
                }
                for each in serving.exports
            ]
        )
    else:
        print("ready:", *serving.uris)
    sys.stdout.flush()
