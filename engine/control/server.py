"""`Server`: answers questions at the control socket, in threads of its own."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final

from dirtmap.engine.control import wire
from dirtmap.fmt.errors import Error, StorageError

# What answers in one conversation: gets what is asked, with its bytes, and returns what to answer, with bytes.
Answering = Callable[[dict[str, Any], bytes], tuple[Any, bytes]]
_MOST: Final = 64  # conversations at a time
_MOST_BYTES: Final = 1 << 20  # of bits in a question: a part of a bitmap's
# Seconds that a conversation may take to begin, and a message to go on; between two messages it may take any time.
_PATIENCE: Final = 10.0
_PAUSE: Final = 0.1


class Server:
    """Listens until `close`.

    Args:
        folder: of the live files, which the caller holds.
        begin: called for each conversation, in a thread of its own. Its block lasts as long. What it yields answers, or
            raises an `Error` for what cannot be done.

    Raises:
        StorageError: it cannot listen.
    """

    def __init__(self, folder: str, begin: Callable[[], AbstractContextManager[Answering]]) -> None:
        self._folder, self._begin = folder, begin
        self._guard, self._closed = threading.Lock(), False
        self._peers: dict[socket.socket, int] = {}  # and the threads that talk to them
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            with wire.place(folder) as path:
                with contextlib.suppress(FileNotFoundError):  # a dead tracker's
                    os.unlink(path)  # noqa: TID251  a socket
                self._listener.bind(path)
                os.chmod(path, 0o600)  # nobody else gets into the folder anyway
            self._listener.listen()
        except OSError as error:
            self._listener.close()
            raise StorageError(os.path.join(folder, wire.NAME), error.strerror or str(error), error.errno) from error
        threading.Thread(target=self._listen, name="dirtmap control", daemon=True).start()

    def close(self) -> None:
        """Ends all conversations. That of this very thread, if it is one, ends when it has answered."""
        with self._guard:
            self._closed = True
            peers = list(self._peers.items())
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # so the thread wakes up, and closes it
        for peer, thread in peers:
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RD if thread == threading.get_ident() else socket.SHUT_RDWR)
        with contextlib.suppress(OSError), wire.place(self._folder) as path:
            os.unlink(path)  # noqa: TID251  a socket

    def abandon(self) -> None:
        """Lets go in a forked child: all of it is the parent's."""
        self._listener.close()
        for peer in self._peers:
            peer.close()

    def _listen(self) -> None:
        with self._listener:
            while True:
                try:
                    peer, _ = self._listener.accept()
                except OSError:
                    if self._closed:
                        return
                    time.sleep(_PAUSE)  # say, there is no descriptor left in this process
                    continue
                if wire.user_of(peer) not in (os.geteuid(), 0):
                    peer.close()
                    continue
                with self._guard:
                    welcome = not self._closed and len(self._peers) < _MOST
                    if welcome:
                        self._peers[peer] = 0
                try:
                    if not welcome:
                        raise RuntimeError(f"its tracker is asked by {_MOST} others already; try again")
                    threading.Thread(target=self._talk, args=(peer,), name="dirtmap control", daemon=True).start()
                except RuntimeError as error:  # also where there can be no more threads
                    peer.setblocking(False)
                    with contextlib.suppress(OSError):
                        wire.send(peer, wire.written(StorageError(self._folder, str(error))))
                    self._forget(peer)

    def _talk(self, peer: socket.socket) -> None:
        with self._guard:
            if peer in self._peers:
                self._peers[peer] = threading.get_ident()
        peer.settimeout(_PATIENCE)
        patience: float | None = _PATIENCE
        try:
            with contextlib.suppress(OSError, Error), self._begin() as answer:
                while wire.comes(peer, patience) and (asked := wire.receive(peer, _MOST_BYTES)) is not None:
                    if wire.has_hung_up(peer):  # who has given up is told nothing, and so nothing is done
                        return
                    patience = None
                    try:
                        said, data = answer(*asked)
                    except Error as error:
                        wire.send(peer, wire.written(error))
                    except Exception as error:
                        wire.send(peer, wire.written(Error(self._folder, f"a bug: {type(error).__name__}: {error}")))
                    else:
                        wire.send(peer, {"answer": said}, data)
        finally:
            self._forget(peer)

    def _forget(self, peer: socket.socket) -> None:
        with self._guard:
            self._peers.pop(peer, None)
        peer.close()
