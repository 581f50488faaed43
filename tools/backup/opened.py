"""`Images`: images that QEMU reads and writes for this process, and for nobody else."""

from __future__ import annotations

import contextlib
import os
import tempfile
from typing import Any, Self

from dirtmap.tools.backup.nbd import ALLOCATION, Connection
from dirtmap.tools.listening.listener import Listener
from dirtmap.tools.qsd.daemon import Daemon


class Images:
    """A qemu-storage-daemon with some images, each of them an export, at a socket that only this process finds.

    At the end of the block it ends in good order, so that what was written is in the files.

    Raises:
        StorageError: QEMU is not there.
    """

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._daemon = stack.enter_context(Daemon())  # begins to start now, and is asked nothing yet
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dirtmap-"))  # nobody else may enter
            self._listener = Listener(unix=os.path.join(folder, "nbd"))
            self._paths: dict[str, str] = {}
            self._connections: list[Connection] = []
            stack.callback(self._disconnect)
            self._stack = stack.pop_all()
        return self

    def open(self, name: str, node: dict[str, Any]) -> None:
        """Has QEMU open an image.

        Args:
            name: that it gets here.
            node: see `dirtmap.tools.qsd.nodes`. What is not ``read-only`` can be written.

        Raises:
            StorageError: it cannot be opened; the error has what QEMU said.
        """
        path = _path(node)
        if not self._paths:
            # Without a limit: one connection goes to each image of a chain, and those above it would wait for ever.
            self._daemon.listen(self._listener, unlimited=True)
        self._daemon.open(path, name, node)
        self._daemon.add_export(name, name, writable=not node["read-only"])
        self._paths[name] = path

    def connect(self, name: str, context: str = ALLOCATION) -> Connection:
        """A connection to an image; it is closed with the daemon.

        Raises:
            StorageError: the daemon has ended.
        """
        assert self._listener.unix is not None
        connection = Connection(self._listener.unix, name, self._paths[name], context)
        self._connections.append(connection)
        return connection

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._stack:
            if kind is None:
                self._disconnect()
                self._daemon.finish()

    def _disconnect(self) -> None:
        while self._connections:
            self._connections.pop().close()


def _path(node: dict[str, Any]) -> str:
    """Of the file that is below a node."""
    return _path(node["file"]) if "file" in node else str(node["filename"])
