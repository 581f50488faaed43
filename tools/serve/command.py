"""`dirtmap serve`: its options, and what it does about signals. See `dirtmap.tools.serve`."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Self

import click

from dirtmap.tools import options
from dirtmap.tools.listening.announcing import notify, pid_file
from dirtmap.tools.listening.options import environment, listener_of, listening, refuse_contradictions
from dirtmap.tools.output import complain, write_json
from dirtmap.tools.running import handled, run
from dirtmap.tools.serve.building import built_filter
from dirtmap.tools.serve.serving import adopt as take_over
from dirtmap.tools.serve.serving import serve

if TYPE_CHECKING:
    from dirtmap.engine import Host
    from dirtmap.tools.serve.serving import Serving


def _print_filter(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        print(built_filter())
        ctx.exit()


@options.command(
    "serve",
    examples="""
    dirtmap serve drive0 --unix /run/drive0.sock
    dirtmap serve drive0 --run 'nbdcopy new.raw "$uri"'
    dirtmap serve drive0 --port 10809 -- --filter=rate rate=100M
    dirtmap serve drive0 --bind 192.0.2.1 --port 10809 --tls /etc/pki/nbdkit
    dirtmap serve drive0 --adopt
    nbdkit --filter=$(dirtmap serve --filter-path) file disk.raw dirtmap-session=LIVE
    """,
)
@options.target
@click.argument("arguments", metavar="[-- NBDKIT_ARGUMENT...]", nargs=-1, type=click.UNPROCESSED)
@listening
@click.option("--adopt", is_flag=True, help='Take over what a killed "dirtmap serve" has left: its nbdkit goes on.')
@click.option("--read-only", is_flag=True, help="Clients can only read. Nothing is tracked.")
@click.option(
    "--filter-path",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_filter,
    help="Build nbdkit's filter if that is needed, print where it is, and exit.",
)
@options.reporting
@click.pass_context
def serve_command(
    ctx: click.Context,
    host: Host,
    target: str,
    arguments: tuple[str, ...],
    unix: str | None,
    port: int | None,
    bind: str,
    tls: str | None,
    adopt: bool,
    read_only: bool,
    command: str | None,
    pidfile: str | None,
    quiet: bool,
    output: str,
) -> None:
    """Serve a raw disk over NBD, and mark what is written.

    TARGET is a node or a device whose disk is a raw file or a block device. nbdkit serves it, with a filter that marks
    each write, zero and trim before it is made. Any NBD client can use it: QEMU, nbdcopy, fio. A qcow2 image is
    refused: QEMU keeps its bitmaps by itself.

    No QEMU can open the disk meanwhile. If this process is killed, nbdkit and its clients go on, and what they write is
    still marked; --adopt takes it over then. If nbdkit is killed, nothing is lost either.

    Prints a line once it is ready, "ready:" and a URI, or with --output=json an object. SIGINT, SIGTERM or SIGHUP end
    it, with exit status 0. With --run, the end of COMMAND does, whose exit status it has, and nothing is printed;
    without --unix and --port it listens on a Unix socket of its own then.
    """
    refuse_contradictions(unix, port, bind, command, output, elsewhere=adopt)
    if adopt and (unix is not None or port is not None or tls is not None or read_only or arguments):
        raise click.UsageError("With --adopt the server is there already, as it was started.")
    status = 0
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_Stop())
        if adopt:
            begun = take_over(host, target)
        else:
            listener = listener_of(stack, unix, port, bind, tls)
            begun = serve(host, target, listener, read_only=read_only, arguments=arguments)
        with begun as serving, stop.ends(serving), pid_file(pidfile):
            for note in serving.notes if not quiet else ():
                complain(f"{target}: {note}")
            if command is None:
                _tell_ready(target, serving, output, quiet=quiet)
            notify("READY=1")
            if command is not None:
                status = run(["/bin/sh", "-c", command], environment([serving.uri]))
                if not status:
                    serving.require_running()
            else:
                serving.wait()
            notify("STOPPING=1")
    if status:
        ctx.exit(status)


def _tell_ready(target: str, serving: Serving, output: str, *, quiet: bool) -> None:
    if quiet:
        return
    if output == "json":
        write_json({"target": target, "uri": serving.uri, "virtual-size": serving.size, "live": serving.live})
    else:
        print("ready:", serving.uri)
    sys.stdout.flush()


class _Stop:
    """What a signal does that asks this process to end.

    It is only noted: an exception from a handler could come in the middle of what the tracker does, and end it there.
    """

    def __init__(self) -> None:
        self._asked = False
        self._serving: Serving | None = None

    def __enter__(self) -> Self:
        self._handling = handled(self._ask, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self._handling.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._handling.__exit__(None, None, None)

    @contextlib.contextmanager
    def ends(self, serving: Serving) -> Iterator[None]:
        """From now on, and if one has come already, it ends this one."""
        self._serving = serving
        if self._asked:
            serving.stop()
        try:
            yield
        finally:
            self._serving = None

    def _ask(self, *_: object) -> None:
        self._asked = True
        if self._serving is not None:
            self._serving.stop()
