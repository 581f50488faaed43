"""Options of the commands that serve over NBD, and what a command that they run finds in its environment."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import TypeVar
from urllib.parse import parse_qs, urlsplit

import click

from dirtmap.tools.listening.listener import LOOPBACK, Listener
from dirtmap.tools.surroundings import given

_F = TypeVar("_F", bound=Callable[..., object])

_OPTIONS = (
    click.option("--unix", metavar="SOCK", type=click.Path(), help="Listen on a Unix socket, for this user alone."),
    click.option("--port", type=click.IntRange(1, 65535), help="Listen on a TCP port."),
    click.option(
        "--bind",
        metavar="ADDRESS",
        default=LOOPBACK,
        show_default=True,
        help="With --port, the IP address. One that other machines reach needs --tls.",
    ),
    click.option(
        "--tls",
        metavar="DIR",
        type=click.Path(),
        help="Demand TLS. DIR has ca-cert.pem, server-cert.pem and server-key.pem; "
        "clients need a certificate of that CA.",
    ),
    click.option(
        "--run",
        "command",
        metavar="COMMAND",
        help="Serve while a shell runs COMMAND, which has $uri, $unixsocket and $port.",
    ),
    click.option(
        "--pidfile", metavar="FILE", type=click.Path(), help="Write the process number to FILE once it is ready."
    ),
)


def listening(function: _F) -> _F:
    """Gives a command ``--unix``, ``--port``, ``--bind``, ``--tls``, ``--run`` (as ``command``) and ``--pidfile``."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def refuse_contradictions(
    unix: str | None, port: int | None, bind: str, command: str | None, output: str, *, elsewhere: bool = False
) -> None:
    """Holds the options against each other.

    Args:
        unix: of ``--unix``.
        port: of ``--port``.
        bind: of ``--bind``.
        command: of ``--run``.
        output: of ``--output``.
        elsewhere: the server listens already, so nothing has to say where.

    Raises:
        click.UsageError: they contradict each other, or none says where to listen.
    """
    if unix is not None and port is not None:
        raise click.UsageError("--unix and --port exclude each other.")
    if bind != LOOPBACK and port is None:
        raise click.UsageError("--bind goes with --port.")
    if unix is None and port is None and command is None and not elsewhere:
        raise click.UsageError("Where to listen? --unix, --port or --run says it.")
    if command is not None and output == "json":
        raise click.UsageError("--output=json goes not with --run: what is printed is COMMAND's.")


def listener_of(
    stack: contextlib.ExitStack, unix: str | None, port: int | None, bind: str, tls: str | None
) -> Listener:
    """Where the options say to listen; without ``--unix`` and ``--port``, on a socket that is gone with the stack.

    Raises:
        ArgumentError: as `Listener`.
    """
    if unix is None and port is None:
        unix = os.path.join(stack.enter_context(tempfile.TemporaryDirectory(prefix="dirtmap-")), "sock")
    return Listener(unix if unix is None else os.path.abspath(unix), port, bind, tls)


def environment(uris: Sequence[str]) -> dict[str, str]:
    """The environment of a command that ``--run`` has. Source of its variables: nbdkit-captive(1).

    Args:
        uris: of the exports, all of one server.
    """
    found = urlsplit(uris[0])
    unix = parse_qs(found.query, errors="surrogateescape").get("socket", [""])[0]
    port = "" if found.port is None else str(found.port)
    return {**given(), "uri": " ".join(uris), "unixsocket": unix, "port": port}
