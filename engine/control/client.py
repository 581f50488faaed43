"""`Conversation`: asks the tracker of a disk, from another process or from this one."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Final, Self

from dirtmap.engine.control import wire
from dirtmap.fmt.errors import Error, LockedError, StorageError

_PATIENCE: Final = 60.0  # seconds for which an answer is waited for; a cut waits for the writes in flight
_LOOK: Final = 1.0  # seconds until it is looked whether the tracker lives
# What cannot be told to have been done or not where no answer comes.
_LASTING: Final = "change", "checkpoint", "rebuild", "stop"


class Conversation:
    """A connection to a tracker. What it has been asked to hold, it holds until the end of the block.

    Threads may share it, which ask one after the other. A forked child may not: it would get the parent's answers.

    Args:
        where: names the image in errors.
        said: who tracks the image, as errors say it.
        folder: of the live files.
        lives: whether the tracker gives signs of life.

    Raises:
        LockedError: it cannot be reached from here.
    """

    def __init__(self, where: str, said: str, folder: str, lives: Callable[[], bool]) -> None:
        self.where, self.folder, self._said, self._lives = where, folder, said, lives
        self._turn, self._process = threading.Lock(), os.getpid()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(_PATIENCE)
        try:
            with wire.place(folder) as path:
                self._socket.connect(path)
            if (user := wire.user_of(self._socket)) not in (os.geteuid(), 0):
                raise PermissionError(0, f"user {user} listens there, who has to ask himself")
        except OSError as error:
            self._socket.close()
            path = os.path.join(folder, wire.NAME)
            what = f"{said}; it cannot be asked from here: {path}: {error.strerror or error}"
            raise LockedError(where, what) from error

    def ask(self, act: str, **arguments: Any) -> Any:
        """Asks, and waits for the answer. Errors of the tracker are raised here.

        Raises:
            StorageError: it gives no answer, and no sign of life; or it has hung up.
            Error: this is a fork of the process that began the conversation.
        """
        return self.ask_for_data(act, **arguments)[0]

    def ask_for_data(self, act: str, data: bytes = b"", **arguments: Any) -> tuple[Any, bytes]:
        """Like `ask`, where the question and the answer may have bytes as well."""
        if os.getpid() != self._process:
            raise Error(self.where, "its tracker is asked by the process that this one was forked from")
        with self._turn:
            found = self._exchange(act, data, arguments)
        wire.raised(found[0])
        return found[0].get("answer"), found[1]

    def _exchange(self, act: str, data: bytes, arguments: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        unknown = "; whether that was done is not known: look before you ask again" if act in _LASTING else ""
        try:
            with contextlib.suppress(BrokenPipeError):  # it may have said why
                wire.send(self._socket, {"act": act, **arguments}, data)
            found = self._answer()
        except TimeoutError as error:
            self.close()  # so that a tracker that was stopped does not do it later
            what = f"{self._said}, which gives no answer: it may be stopped{unknown}"
            raise StorageError(self.where, what, errno.ETIMEDOUT) from error
        except OSError as error:
            raise StorageError(self.where, f"its tracker hung up: {error.strerror}{unknown}", error.errno) from error
        except BaseException:
            self.close()  # else the answer that is still to come would be taken for that to the next question
            raise
        if found is None:
            raise StorageError(self.where, f"its tracker has ended before it answered{unknown}")
        return found

    def _answer(self) -> tuple[dict[str, Any], bytes] | None:
        deadline, silent = time.monotonic() + _PATIENCE, 0
        while not wire.comes(self._socket, _LOOK):
            silent = 0 if self._lives() else silent + 1  # once it may be that the clock was set, or the machine slept
            if time.monotonic() > deadline or silent > 1:
                raise TimeoutError
        return wire.receive(self._socket)

    def close(self) -> None:
        """Ends it."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
