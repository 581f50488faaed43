"""What a process does while QEMU serves for it: `Stop` ends it by a signal, and `attend` waits for that."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import click

from dirtmap.tools.listening.announcing import notify
from dirtmap.tools.listening.options import environment
from dirtmap.tools.running import handled, run

if TYPE_CHECKING:
    from types import FrameType


class Served(Protocol):
    """What is served by another program."""

    def wait(self) -> None:
        """Waits until that ends, which nobody asked it to; an error."""

    def require_running(self) -> None:
        """Refuses to go on where it has ended."""


class _Stopped(BaseException):
    """A signal has asked this process to end."""


class Stop:
    """Turns signals that ask the process to end into an exception, the first one; the others find it ending.

    Without that, SIGTERM and SIGHUP would leave temporary files.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._number: int | None = None

    def __enter__(self) -> Stop:
        self._handling = handled(self._stop, *self._SIGNALS)
        self._handling.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._handling.__exit__(None, None, None)
        if self._number is not None and isinstance(error[1], _Stopped):
            raise click.exceptions.Exit(128 + self._number)

    def _stop(self, number: int, _: FrameType | None) -> None:
        if self._number is None:
            self._number = number
            raise _Stopped

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """In this block the signal is what everybody waits for."""
        with contextlib.suppress(_Stopped):
            yield


def attend(stop: Stop, served: Served, uris: Sequence[str], command: str | None, ready: Callable[[], object]) -> int:
    """Stays while something is served: until a signal comes, or for as long as a shell runs a command.

    Args:
        stop: takes the signals.
        served: what is served.
        uris: of the exports.
        command: of ``--run``, or None.
        ready: says that it is ready; not called where there is a command, whose output is its own.

    Returns:
        The exit status.

    Raises:
        Error: the server has ended.
    """
    status = 0
    if command is not None:
        notify("READY=1")
        status = run(["/bin/sh", "-c", command], environment(uris))
        if not status:
            served.require_running()
    else:
        with stop.awaited():
            ready()
            notify("READY=1")
            served.wait()
    notify("STOPPING=1")
    return status
