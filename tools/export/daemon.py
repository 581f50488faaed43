"""`Daemon`: a qemu-storage-daemon that serves disks and the bitmaps in carriers. It is spoken to over QMP."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import subprocess
import tempfile
from typing import TYPE_CHECKING, Any, Self

from dirtmap.fmt.errors import Error, StorageError
from dirtmap.tools.export.carrier import SECTOR, carrier_size

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dirtmap.engine import Disk
    from dirtmap.tools.listening.listener import Listener

PROGRAM = "qemu-storage-daemon"
# What it takes to serve, and the Debian package of each.
_NEEDED = {PROGRAM: "qemu-system-common", "qemu-img": "qemu-utils", "setpriv": "util-linux"}
_PATIENCE_SECONDS = 10.0


def require_programs() -> None:
    """Refuses to begin where a program is missing.

    Raises:
        StorageError: names it, and its package.
    """
    for program, package in _NEEDED.items():
        if shutil.which(program) is None:
            raise StorageError(program, f"no such program; Debian has it in the package {package}")


class Daemon:
    """A qemu-storage-daemon, until the end of the block.

    It ends, too, when the thread dies that started it, with its process or alone: nobody would hold the bitmaps any
    more. It is in a session of its own, so that an interrupt from the terminal does not reach it.

    Args:
        inherited: descriptors that it gets, for disks that have no other path than ``/proc/self/fd/N``.

    Raises:
        StorageError: it did not start.
    """

    def __init__(self, inherited: Iterable[int] = ()) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  closed with the daemon
        command = ["setpriv", "--pdeathsig", "TERM", "--", PROGRAM, "--chardev", "stdio,id=qmp", "--monitor", "qmp"]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                pass_fds=tuple(inherited),
                umask=0o077,  # its socket is for this user alone
                start_new_session=True,
                env={key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"},
            )
        except OSError as error:
            self._said.close()
            raise StorageError(command[0], error.strerror or str(error), error.errno) from error
        try:
            self._next()
            self._do(PROGRAM, "qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open_disk(self, node: str, disk: Disk, *, force_share: bool) -> int:
        """Opens a disk as a node, for reading.

        Args:
            node: its name.
            disk: where it is.
            force_share: although somebody writes to it.

        Returns:
            The size of the disk as QEMU has it, in bytes.

        Raises:
            StorageError: it cannot be opened; the error has what QEMU said.
        """
        driver = "host_device" if stat.S_ISBLK(_mode(disk.path)) else "file"
        file = {"driver": driver, "filename": disk.path}
        return self._open(disk.path, node, disk.format, file, force_share=force_share)

    def open_carrier(self, node: str, path: str) -> int:
        """Opens a carrier as a node. Result and errors as `open_disk`."""
        return self._open(path, node, "qcow2", {"driver": "file", "filename": path}, force_share=False)

    def _open(self, where: str, node: str, driver: str, file: dict[str, Any], *, force_share: bool) -> int:
        options = {"node-name": node, "driver": driver, "read-only": True, "force-share": force_share, "file": file}
        self._do(where, "blockdev-add", **options)
        nodes = self._do(where, "query-named-block-nodes", flat=True)
        (size,) = (found["image"]["virtual-size"] for found in nodes if found["node-name"] == node)
        return int(size)

    def listen(self, listener: Listener) -> None:
        """Begins to listen; there are no exports yet.

        Raises:
            StorageError: it cannot; the error has what QEMU said.
        """
        where = listener.unix if listener.unix is not None else f"{listener.bind}:{listener.port}"
        secured = {}
        if listener.tls is not None:
            options = {"endpoint": "server", "dir": os.path.abspath(listener.tls), "verify-peer": True}
            self._do(listener.tls, "object-add", **{"qom-type": "tls-creds-x509", "id": "tls"}, **options)
            secured = {"tls-creds": "tls"}
        self._do(where, "nbd-server-start", addr=listener.address(), **secured)

    def add_export(self, name: str, node: str, bitmaps: Iterable[tuple[str, str]]) -> None:
        """Serves a node, from now on.

        Args:
            name: of the export; unique.
            node: the disk.
            bitmaps: of which node each is, and its name.

        Raises:
            StorageError: it cannot; the error has what QEMU said.
        """
        options = {"type": "nbd", "id": f"export-{node}", "node-name": node, "name": name, "writable": False}
        told = [{"node": node, "name": bitmap} for node, bitmap in bitmaps]
        self._do(name, "block-export-add", **options, bitmaps=told)

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


def require_sizes(where: str, size: int, disk: int, carrier: int) -> None:
    """Refuses to serve a disk with bitmaps of another size: what they lack would be told clean.

    Args:
        where: names the disk in messages.
        size: of the disk that the bitmaps are about, in bytes.
        disk: the size of what is served, as QEMU has it.
        carrier: the size of the bitmaps, as QEMU has it.

    Raises:
        StorageError: they differ by a sector or more, or the disk is larger.
    """
    if abs(disk - size) >= SECTOR:
        raise StorageError(where, f"has {disk} bytes, and the bitmaps are of a disk of {size}")
    if carrier < max(disk, carrier_size(size)):
        raise StorageError(where, f"has {disk} bytes, and its bitmaps {carrier}: the rest would be told clean")


def _mode(path: str) -> int:
    try:
        return os.stat(path).st_mode
    except OSError as error:
        raise StorageError(path, error.strerror or str(error), error.errno) from error


def _close(pipe: Any) -> None:
    with contextlib.suppress(OSError):  # what was not written to one that has ended
        pipe.close()
