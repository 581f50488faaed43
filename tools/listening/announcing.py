"""Tells others that the server is ready: the service manager that has started it, and whoever reads a file."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from dirtmap.fmt.errors import StorageError


def notify(state: str) -> None:
    """Tells the service manager, if there is one. Source: sd_notify(3).

    Args:
        state: such as ``READY=1``.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # an abstract one
        address = "\0" + address[1:]
    # A service manager that is gone is no reason not to serve.
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager,
    ):
        manager.sendto(state.encode(), address)


@contextlib.contextmanager
def pid_file(path: str | None) -> Iterator[None]:
    """Has the number of this process in a file until the end of the block. One that is there is overwritten.

    Raises:
        StorageError: it cannot be written.
    """
    if path is None:
        yield
        return
    content = f"{os.getpid()}\n"
    try:
        Path(path).write_text(content)
    except (OSError, ValueError) as error:
        raise StorageError(path, getattr(error, "strerror", None) or str(error)) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            if Path(path).read_text() == content:  # else it is another process's by now
                Path(path).unlink()
