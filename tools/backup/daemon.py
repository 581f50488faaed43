"""`Daemon`: a qemu-storage-daemon that reads and writes images for this process, and ends with it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
from typing import Any, Self

from dirtmap.fmt.errors import Error, StorageError
from dirtmap.tools.backup.files import failing
from dirtmap.tools.backup.nbd import ALLOCATION, Connection

_SECONDS = 60  # that it has to end in, once it was asked to
# Ends with this process, however that ends; also where that has ended before the kernel was told.
_TIED = ["setpriv", "--pdeathsig", "KILL", "sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"']


class Daemon:
    """A qemu-storage-daemon with some images, each of them an export. Ended with the block.

    At the end of the block it ends in good order, so that what was written is in the files; after an exception it is
    killed.

    Args:
        nodes: of each export, by its name: what ``blockdev-add`` takes. What is not ``read-only`` can be written.
        listener: a socket that it is to be reached at, listened to already; None for one that only this process finds.

    Raises:
        StorageError: QEMU is not there, or cannot open an image.
    """

    def __init__(self, nodes: dict[str, dict[str, Any]], listener: socket.socket | None = None) -> None:
        self._nodes, self._listener = nodes, listener

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._errors = stack.enter_context(tempfile.TemporaryFile())
            listener = self._listener
            if listener is None:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dirtmap-"))  # nobody else may enter
                # Listened to before it starts, so that nobody has to try until it does.
                listener = stack.enter_context(socket.socket(socket.AF_UNIX))
                with failing(folder):  # a socket's path has 107 bytes at most
                    listener.bind(os.path.join(folder, "nbd"))
                    listener.listen()
            self._address = listener.getsockname()
            self._process = self._start(listener)
            stack.callback(self._kill)
            listener.close()  # if the daemon ends, whoever connects is told
            self._connections: list[Connection] = []
            stack.callback(self._disconnect)
            self._stack = stack.pop_all()
        return self

    def _start(self, listener: socket.socket) -> subprocess.Popen[bytes]:
        number = listener.fileno()
        command = [*_TIED, str(os.getpid()), "qemu-storage-daemon"]
        # Without a number of connections, the hundred-and-first waits for ever: one goes to each image of a chain.
        command += ["--nbd-server", f"addr.type=fd,addr.str={number},max-connections=0"]
        for name, node in self._nodes.items():
            writable = "off" if node.get("read-only") else "on"
            command += ["--blockdev", json.dumps({"node-name": name, **node})]
            export = f"type=nbd,id=export-{name},node-name={name},name={name},writable={writable},allocation-depth=on"
            command += ["--export", export]
        if not shutil.which("qemu-storage-daemon"):
            raise StorageError("qemu-storage-daemon", "no such command; it is part of QEMU")
        try:
            return subprocess.Popen(
                command,
                pass_fds=[number],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                start_new_session=True,  # an interrupt is for us
            )
        except OSError as error:
            raise StorageError(command[0], error.strerror or str(error), error.errno) from error

    def connect(self, name: str, context: str = ALLOCATION) -> Connection:
        """A connection to an export; it is closed with the daemon.

        Raises:
            StorageError: as the class.
        """
        try:
            connection = Connection(self._address, name, self._nodes[name]["file"]["filename"], context)
        except StorageError as error:
            raise self.failure(error) from error
        self._connections.append(connection)
        return connection

    def failure(self, error: Error) -> Error:
        """An error of a connection, or what the daemon has said before it ended of that."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.2)
        if self._process.poll() is None:
            return error
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        return StorageError("qemu-storage-daemon", said[-1].partition(": ")[2] if said else "has ended")

    def ended(self) -> Error:
        """Waits until it has ended, and tells why."""
        self._process.wait()
        return self.failure(StorageError("qemu-storage-daemon", "has ended"))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._stack:
            if kind is not None or not self._connections:  # nothing was asked of it, and it may not be up yet
                return
            self._disconnect()
            self._process.terminate()
            if self._process.wait(_SECONDS):
                raise self.failure(StorageError("qemu-storage-daemon", "has failed"))

    def _disconnect(self) -> None:
        while self._connections:
            self._connections.pop().close()

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()
