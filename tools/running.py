"""Runs a command that a user gives to one of ours, and lets it end with ours."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from dirtmap.fmt.errors import Error
from dirtmap.tools.surroundings import given

if TYPE_CHECKING:
    from types import FrameType


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], object], *numbers: int) -> Iterator[None]:
    """Has signals handled until the end of the block, but for those that this process was told to ignore.

    Args:
        handler: called with the number of the signal.
        numbers: of the signals.
    """
    import signal

    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number, found in before.items():
            if found is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, handler)
        yield
    finally:
        for number, found in before.items():
            signal.signal(number, found)


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Runs a command to its end, and returns its exit status as a shell has it: of a signal, 128 and its number.

    Passes on signals that ask this process to end; otherwise the command would go on without what ours does for it.

    Args:
        command: the program and its arguments.
        environment: of the command; None for that which the user gave to this one.

    Raises:
        Error: it cannot be run.
    """
    import signal
    import subprocess

    if environment is None:
        environment = given()
    begun: list[subprocess.Popen[bytes]] = []
    early: list[int] = []

    def pass_on(number: int, _: object) -> None:
        if begun:
            begun[0].send_signal(number)
        else:
            early.append(number)

    try:
        with handled(pass_on, signal.SIGTERM, signal.SIGHUP), subprocess.Popen(command, env=environment) as process:
            begun.append(process)
            for told in early:
                process.send_signal(told)
            try:
                status = process.wait()
            except BaseException:
                process.kill()
                raise
    except FileNotFoundError:
        raise Error(command[0], "no such command") from None
    except OSError as error:
        raise Error(command[0], error.strerror or str(error)) from error
    return status if status >= 0 else 128 - status
