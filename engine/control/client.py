"""`Conversation`: asks the tracker of a disk, from another process or from this one."""

from __future__ import annotations

import os
import socket
from typing import Any, Self

from dirtmap.engine.control import wire
from dirtmap.fmt.errors import LockedError, StorageError


class Conversation:
    """A connection to a tracker. What it has been asked to hold, it holds until the end of the block.

    Args:
        where: names the image in errors.
        said: who tracks the image, as errors say it.
        folder: of the live files.

    Raises:
        LockedError: it cannot be reached from here.
    """

    def __init__(self, where: str, said: str, folder: str) -> None:
        self.where = where
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            with wire.place(folder) as path:
                self._socket.connect(path)
            if wire.user_of(self._socket) not in (os.geteuid(), 0):
                raise PermissionError(0, "another user listens there")
        except OSError as error:
            self._socket.close()
            path = os.path.join(folder, wire.NAME)
            what = f"{said}; it cannot be asked from here: {path}: {error.strerror or error}"
            raise LockedError(where, what) from error

    def ask(self, act: str, **arguments: Any) -> Any:
        """Asks, and waits for the answer. Errors of the tracker are raised here."""
        return self.ask_for_data(act, **arguments)[0]

    def ask_for_data(self, act: str, **arguments: Any) -> tuple[Any, bytes]:
        """Like `ask`, where the answer has bytes as well."""
        try:
            wire.send(self._socket, {"act": act, **arguments})
            found = wire.receive(self._socket)
        except OSError as error:
            raise StorageError(self.where, f"its tracker hung up: {error.strerror}", error.errno) from error
        if found is None:
            raise StorageError(self.where, "its tracker has ended before it answered")
        wire.raised(found[0])
        return found[0].get("answer"), found[1]

    def close(self) -> None:
        """Ends it."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
