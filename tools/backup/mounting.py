"""Serves a disk as it was at a backup, read-only, over NBD; see `mount`."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote

from dirtmap.fmt.errors import StorageError
from dirtmap.tools.backup import files, images
from dirtmap.tools.backup.daemon import Daemon
from dirtmap.tools.backup.document import Backup
from dirtmap.tools.backup.repository import WAIT_SECONDS, Repository

_LOOPBACK = "127.0.0.1"
_EXPORT = "disk"


@dataclass(frozen=True)
class Mounted:
    """A disk that is being served.

    Attributes:
        backup: as of which it is.
        uri: where, as NBD programs take it.
    """

    backup: Backup
    uri: str
    _daemon: Daemon

    def wait(self) -> None:
        """Waits until the server ends, which it does not by itself.

        Raises:
            StorageError: it has ended.
        """
        raise self._daemon.ended()


@contextlib.contextmanager
def mount(
    repository: str | os.PathLike[str],
    disk: str,
    *,
    at: str | None = None,
    unix: str | None = None,
    port: int | None = None,
    wait: float = WAIT_SECONDS,
) -> Iterator[Mounted]:
    """Serves a disk as it was at a backup, until the end of the block.

    QEMU has the images open from before the block begins, so that backups can be made and pruned meanwhile. Digests are
    not looked at. The disk's size is rounded up to 512 bytes. The thread that enters the block has to last as long.

    Args:
        repository: the path of its folder.
        disk: its name in the repository.
        at: the number of a backup, or a time, see `Repository.at`; None for the newest.
        unix: the path of a socket, which must not be there; None with ``port``.
        port: of 127.0.0.1; 0 for any that is free; None with ``unix``.
        wait: seconds to wait for a process that writes to the repository.

    Raises:
        ArgumentError: there is no such backup.
        FormatError: the images are not on each other as the documents say.
        StorageError: the socket is there, or the port is taken; or QEMU cannot open the images.
    """
    place = Repository(repository)
    with contextlib.ExitStack() as stack:
        with place.reading(wait):
            backup = place.at(disk, at)
            place.require_sound(backup)
            listener = stack.enter_context(_listener(unix, port))
            address = listener.getsockname()
            node = images.node(place.image(backup), "qcow2")
            daemon = stack.enter_context(Daemon({_EXPORT: node}, listener))
            daemon.connect(_EXPORT).close()  # it has opened the images by now
        if unix is None:
            uri = f"nbd://{_LOOPBACK}:{address[1]}/{_EXPORT}"
        else:
            uri = f"nbd+unix:///{_EXPORT}?socket={quote(os.path.abspath(unix))}"
        yield Mounted(backup, uri, daemon)


@contextlib.contextmanager
def _listener(unix: str | None, port: int | None) -> Iterator[socket.socket]:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_INET if unix is None else socket.AF_UNIX))
        where = f"port {port}" if unix is None else unix
        try:
            if unix is None:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((_LOOPBACK, port or 0) if unix is None else unix)
            if unix is not None:
                stack.callback(files.discard, unix)
                os.chmod(unix, 0o600)  # nobody can connect before it listens
            listener.listen()
        except OSError as error:
            raise StorageError(where, error.strerror or str(error), error.errno) from error
        yield listener
