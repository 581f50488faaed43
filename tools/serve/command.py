"""`dirtmap serve`: its options, and what it does about signals. See `dirtmap.tools.serve`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Self
from urllib.parse import parse_qs, urlsplit

import click

from dirtmap.tools import options
from dirtmap.tools.export.announcing import notify, pid_file
from dirtmap.tools.export.listener import LOOPBACK, Listener
from dirtmap.tools.output import complain, write_json
from dirtmap.tools.running import run
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
@click.option("--unix", metavar="SOCK", type=click.Path(), help="Listen on a Unix socket, for this user alone.")
@click.option("--port", type=click.IntRange(1, 65535), help="Listen on a TCP port.")
@click.option(
    "--bind",
    metavar="ADDRESS",
    default=LOOPBACK,
    show_default=True,
    help="With --port, the IP address. One that other machines reach needs --tls.",
)
@click.option(
    "--tls",
    metavar="DIR",
    type=click.Path(),
    help="Demand TLS. DIR has ca-cert.pem, server-cert.pem and server-key.pem; clients need a certificate of that CA.",
)
@click.option("--adopt", is_flag=True, help='Take over what a killed "dirtmap serve" has left: its nbdkit goes on.')
@click.option("--read-only", is_flag=True, help="Clients can only read. Nothing is tracked.")
@click.option(
    "--run",
    "command",
    metavar="COMMAND",
    help="Serve while a shell runs COMMAND, which has $uri, $unixsocket and $port.",
)
@click.option("--pidfile", metavar="FILE", type=click.Path(), help="Write the process number to FILE once it is ready.")
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
    if unix is not None and port is not None:
        raise click.UsageError("--unix and --port exclude each other.")
    if adopt and (unix is not None or port is not None or tls is not None or read_only or arguments):
        raise click.UsageError("With --adopt the server is there already, as it was started.")
    if unix is None and port is None and command is None and not adopt:
        raise click.UsageError("Where to listen? --unix, --port or --run says it.")
    if command is not None and output == "json":
        raise click.UsageError("--output=json goes not with --run: what is printed is COMMAND's.")
    status = 0
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_Stop())
        if adopt:
            begun = take_over(host, target)
        else:
            if unix is None and port is None:
                unix = os.path.join(stack.enter_context(tempfile.TemporaryDirectory(prefix="dirtmap-")), "sock")
            listener = Listener(unix if unix is None else os.path.abspath(unix), port, bind, tls)
            begun = serve(host, target, listener, read_only=read_only, arguments=arguments)
        with begun as serving, stop.ends(serving), pid_file(pidfile):
            for note in serving.notes if not quiet else ():
                complain(f"{target}: {note}")
            if command is None:
                _tell_ready(target, serving, output, quiet=quiet)
            notify("READY=1")
            if command is not None:
                status = run(["/bin/sh", "-c", command], {**os.environ, **_variables(serving.uri)})
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


def _variables(uri: str) -> dict[str, str]:
    """What a command finds in its environment. Source of the names: nbdkit-captive(1)."""
    found = urlsplit(uri)
    unix = parse_qs(found.query).get("socket", [""])[0]
    return {"uri": uri, "unixsocket": unix, "port": "" if found.port is None else str(found.port)}


class _Stop:
    """What a signal does that asks this process to end.

    It is only noted: an exception from a handler could come in the middle of what the tracker does, and end it there.
    """

    def __init__(self) -> None:
        self._asked = False
        self._serving: Serving | None = None

    def __enter__(self) -> Self:
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        for number, handler in self._before.items():
            if handler is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

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
