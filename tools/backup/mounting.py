"""Serves a disk as it was at a backup, read-only, over NBD; see `mount`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dirtmap.tools.backup.repository import WAIT_SECONDS, Repository
from dirtmap.tools.qsd import nodes
from dirtmap.tools.qsd.daemon import Daemon

if TYPE_CHECKING:
    import os

    from dirtmap.tools.backup.document import Backup
    from dirtmap.tools.listening.listener import Listener

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
            Error: it has ended; with what it said.
        """
        self._daemon.wait()

    def require_running(self) -> None:
        """Refuses to call it served where the server has ended. Errors as `wait`."""
        self._daemon.require_running()


@contextlib.contextmanager
def mount(
    repository: str | os.PathLike[str],
    disk: str,
    listener: Listener,
    *,
    at: str | None = None,
    wait: float = WAIT_SECONDS,
) -> Iterator[Mounted]:
    """Serves a disk as it was at a backup, until the end of the block.

    QEMU has the images open from before the block begins, so that backups can be made and pruned meanwhile. Digests are
    not looked at. The disk's size is rounded up to 512 bytes. The thread that enters the block has to last as long.

    Args:
        repository: the path of its folder.
        disk: its name in the repository.
        listener: where to serve it.
        at: the number of a backup, or a time, see `Repository.at`; None for the newest.
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
            stack.enter_context(listener.reserved())
            daemon = stack.enter_context(Daemon())
            path = place.image(backup)
            daemon.open(path, _EXPORT, nodes.image(path, "qcow2"))
            daemon.listen(listener)
            daemon.add_export(_EXPORT, _EXPORT)
        yield Mounted(backup, listener.uri(_EXPORT), daemon)
