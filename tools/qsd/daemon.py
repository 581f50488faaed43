"""`Daemon`: a qemu-storage-daemon, which opens images and serves them. It is spoken to over QMP."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from typing import TYPE_CHECKING, Any, Self

from dirtmap.fmt.errors import Error, StorageError
from dirtmap.tools.surroundings import given

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dirtmap.tools.listening.listener import Listener

PROGRAM = "qemu-storage-daemon"
# What it takes, and the Debian package of each.
_NEEDED = {PROGRAM: "qemu-system-common", "qemu-img": "qemu-utils", "setpriv": "util-linux"}
# It ends with the thread that has started it, also where that has ended before the kernel was told.
_TIED = ("setpriv", "--pdeathsig", "TERM", "--", "sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"')
_PATIENCE_SECONDS = 10.0  # for one that is given up
_LAST_SECONDS = 60.0  # for one that has something to write yet


def require_programs() -> None:
    """Refuses to begin where a program is missing.

    Raises:
        StorageError: names it, and its package.
    """
    for program, package in _NEEDED.items():
        if shutil.which(program) is None:
            raise StorageError(program, f"no such program; Debian has it in the package {package}")


class Daemon:
    """A qemu-storage-daemon, until the end of the block. It starts while this process goes on.

    It ends, too, when the thread dies that started it, with its process or alone. It is in a session of its own, so
    that an interrupt from the terminal does not reach it.

    Args:
        fds: descriptors of this process that it has, too; it opens them as ``/proc/self/fd/N``.

    Raises:
        StorageError: a program is missing.
    """

    def __init__(self, fds: Iterable[int] = ()) -> None:
        require_programs()
        self._is_ready = False
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  closed with the daemon
        command = [*_TIED, str(os.getpid()), PROGRAM, "--chardev", "stdio,id=qmp", "--monitor", "qmp"]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                pass_fds=tuple(fds),
                umask=0o077,  # its socket is for this user alone
                start_new_session=True,
                env=given(without="NOTIFY_SOCKET"),
            )
        except OSError as error:
            self._said.close()
            raise StorageError(command[0], error.strerror or str(error), error.errno) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, where: str, name: str, node: dict[str, Any]) -> int:
        """Opens an image.

        Args:
            where: names it in messages.
            name: of the node that it becomes.
            node: what ``blockdev-add`` takes, but for the name; see `dirtmap.tools.qsd.nodes`.

        Returns:
            The size of the disk as QEMU has it, in bytes.

        Raises:
            StorageError: it cannot be opened; the error has what QEMU said.
        """
        self._do(where, "blockdev-add", **{"node-name": name, **node})
        nodes = self._do(where, "query-named-block-nodes", flat=True)
        (size,) = (found["image"]["virtual-size"] for found in nodes if found["node-name"] == name)
        return int(size)

    def listen(self, listener: Listener, *, unlimited: bool = False) -> None:
        """Begins to listen; there are no exports yet.

        Args:
            listener: where.
            unlimited: as many clients as come at a time; else as many as QEMU has as its own limit.

        Raises:
            StorageError: it cannot; the error has what QEMU said.
        """
        options: dict[str, Any] = {"addr": listener.address()}
        if unlimited:
            options["max-connections"] = 0
        if listener.tls is not None:
            secret = {"endpoint": "server", "dir": os.path.abspath(listener.tls), "verify-peer": True}
            self._do(listener.tls, "object-add", **{"qom-type": "tls-creds-x509", "id": "tls"}, **secret)
            options["tls-creds"] = "tls"
        self._do(listener.where, "nbd-server-start", **options)

    def add_export(
        self, name: str, node: str, bitmaps: Iterable[tuple[str, str]] = (), *, writable: bool = False
    ) -> None:
        """Serves a node, from now on.

        Args:
            name: of the export; unique.
            node: the disk.
            bitmaps: of which node each is, and its name.
            writable: clients may write to it.

        Raises:
            StorageError: it cannot; the error has what QEMU said.
        """
        options = {"type": "nbd", "id": f"export-{node}", "node-name": node, "name": name, "writable": writable}
        told = [{"node": node, "name": bitmap} for node, bitmap in bitmaps]
        self._do(name, "block-export-add", **options, bitmaps=told, **{"allocation-depth": True})

    def wait(self) -> None:
        """Waits until it has ended, which nobody asked it to.

        Raises:
            Error: always; with what it said.
        """
        self._process.wait()
        raise self._ended()

    def require_running(self) -> None:
        """Refuses to go on where it has ended by itself.

        Raises:
            Error: it has; with what it said.
        """
        if self._process.poll() is not None:
            raise self._ended()

    def finish(self) -> None:
        """Ends it in good order: what was written to images is in their files then.

        Raises:
            Error: it has failed.
        """
        self._do(PROGRAM, "quit")
        try:
            status = self._process.wait(_LAST_SECONDS)
        except subprocess.TimeoutExpired:
            raise StorageError(PROGRAM, f"has not ended within {_LAST_SECONDS:.0f} s") from None
        if status:
            raise self._ended()

    def close(self) -> None:
        """Ends it."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._said.close)
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                stack.callback(_close, pipe)
            self._process.terminate()
            try:
                self._process.wait(_PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:  # a client, or the disk, keeps it
                self._process.kill()
                self._process.wait()

    def _do(self, where: str, command: str, /, **arguments: Any) -> Any:
        """Runs a QMP command, and returns what it returns."""
        if not self._is_ready:
            self._is_ready = True
            self._next()  # its greeting
            self._do(PROGRAM, "qmp_capabilities")
        assert self._process.stdin is not None
        line = json.dumps({"execute": command, "arguments": arguments}, ensure_ascii=False) + "\n"
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except UnicodeEncodeError:
            raise StorageError(where, f"not UTF-8, as {PROGRAM} needs its paths") from None
        except OSError:
            self._process.wait()
            raise self._ended() from None
        while "return" not in (answer := self._next()):
            if "error" in answer:
                raise StorageError(where, f"{PROGRAM}: {answer['error']['desc']}")
        return answer["return"]

    def _next(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise self._ended()
        return dict(json.loads(line))

    def _ended(self) -> Error:
        status = self._process.returncode
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        self._said.seek(0)
        said = " ".join(self._said.read().decode(errors="replace").split())
        return Error(PROGRAM, f"{how}: {said}" if said else how)


def _close(pipe: Any) -> None:
    with contextlib.suppress(OSError):  # what was not written to one that has ended
        pipe.close()
