"""`Nbdkit`: the server: started here, or found where the program has died that started it."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from dirtmap.fmt.errors import Error, StorageError
from dirtmap.tools.surroundings import given

if TYPE_CHECKING:
    from dirtmap.engine import Disk
    from dirtmap.tools.listening.listener import Listener

_PATIENCE_SECONDS: Final = 2.0
_PAUSE_SECONDS: Final = 0.01
_SESSION: Final = "dirtmap-session="


@dataclass(frozen=True, slots=True)
class Session:
    """What the filter needs.

    Attributes:
        filter: path of the filter.
        live: the folder of the session's live files.
        locks: the descriptor that keeps QEMU's locks on the disk for as long as nbdkit runs.
    """

    filter: str
    live: str
    locks: int


class Nbdkit:
    """A running nbdkit. It goes on when this process dies, so that its clients do.

    Args:
        uri: for its clients.
        descriptor: of its process.
        socket: the path of its Unix socket, if it is to be removed in the end.
        child: its process, if it is a child of this one.
    """

    def __init__(
        self, uri: str, descriptor: int, *, socket: str | None = None, child: subprocess.Popen[bytes] | None = None
    ) -> None:
        self.uri, self._socket, self._descriptor, self._child = uri, socket, descriptor, child

    @classmethod
    def start(cls, listener: Listener, disk: Disk, session: Session | None, arguments: Sequence[str]) -> Nbdkit:
        """Starts one, and waits until it is ready. What it complains of goes to standard error.

        Args:
            listener: where it listens.
            disk: a raw file or a block device.
            session: where it marks what it writes; None serves the disk read-only.
            arguments: more of them, as nbdkit has them. Filters among them come before dirtmap's.

        Raises:
            Error: it did not start.
        """
        with tempfile.TemporaryDirectory(prefix="dirtmap-") as folder:
            ready = Path(folder, "pid")
            command = ["nbdkit", "--foreground", f"--pidfile={ready}", *_listening(listener)]
            command += ["file", f"file={disk.path}"]  # options may follow: getopt_long(3)
            if session is not None:
                command += [_SESSION + session.live, "dirtmap-outlive=true"]
            command += arguments
            command.append(
                "--readonly" if session is None else f"--filter={session.filter}"
            )  # the last: next to the plugin
            try:
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    umask=0o077,  # its socket is for this user alone
                    start_new_session=True,  # an interrupt from the terminal is for us
                    pass_fds=[] if session is None else [session.locks],
                    env=given(without="NOTIFY_SOCKET"),
                )
            except OSError as error:
                raise StorageError("nbdkit", error.strerror or str(error), error.errno) from error
            started = cls(listener.uri(""), os.pidfd_open(child.pid), child=child)
            try:
                while not _is_written(ready):
                    started.require_running()
                    time.sleep(_PAUSE_SECONDS)
            except BaseException:
                started.close()
                raise
        return started

    @classmethod
    def find(cls, live: str) -> Nbdkit | None:
        """The one that marks in the session with these live files; None if there is none that can be seen."""
        for name in filter(str.isdigit, os.listdir("/proc")):
            if (arguments := _arguments_of(name)) is None or _SESSION + live not in arguments:
                continue
            with contextlib.suppress(ProcessLookupError):
                descriptor = os.pidfd_open(int(name))
                if _arguments_of(name) == arguments:  # the number is not another process's by now
                    listener = _listener_of(arguments)
                    if listener is None:
                        return cls("", descriptor)
                    return cls(listener.uri(""), descriptor, socket=listener.unix)
                os.close(descriptor)
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """A descriptor that becomes readable when it ends."""
        return self._descriptor

    def has_ended(self, seconds: float = 0) -> bool:
        """Whether it has ended, or does within so many seconds."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def require_running(self) -> None:
        """Refuses to go on where it has ended by itself.

        Raises:
            Error: it has.
        """
        if not self.has_ended():
            return
        if self._child is None:
            raise Error("nbdkit", "has ended")
        status = self._child.wait()
        raise Error("nbdkit", f"was killed by signal {-status}" if status < 0 else f"ended with status {status}")

    def release(self) -> None:
        """Lets it go on without this process."""
        os.close(self._descriptor)
        self._descriptor = -1

    def send_signal(self, number: int) -> None:
        """Sends it a signal, if it is there."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._descriptor, number)

    def close(self) -> None:
        """Ends it; kills one that does not end in some seconds.

        What it has answered is not lost by that, and what it is about to write is marked.
        """
        if self._descriptor < 0:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            self.send_signal(number)
            if self.has_ended(_PATIENCE_SECONDS):
                break
        if self._child is not None:
            self._child.wait()
        self.release()
        if self._socket is not None:
            with contextlib.suppress(OSError):
                Path(self._socket).unlink()


def _listening(listener: Listener) -> list[str]:
    if listener.unix is not None:
        where = ["--unix", listener.unix]
    else:
        where = ["--ipaddr", listener.bind, "--port", str(listener.port)]
    if listener.tls is not None:
        where += ["--tls=require", f"--tls-certificates={os.path.abspath(listener.tls)}", "--tls-verify-peer"]
    return where


def _listener_of(arguments: list[str]) -> Listener | None:
    """What `_listening` has made arguments of; None where somebody else has said it in another way."""
    from dirtmap.tools.listening.listener import LOOPBACK, Listener

    values = dict(itertools.pairwise(arguments))
    tls = next((value.partition("=")[2] for value in arguments if value.startswith("--tls-certificates=")), None)
    try:
        port = int(values["--port"]) if "--port" in values else None
        return Listener(values.get("--unix"), port, values.get("--ipaddr", LOOPBACK), tls)
    except (ValueError, Error):
        return None


def _is_written(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _arguments_of(number: str) -> list[str] | None:
    """The arguments of a process that is an nbdkit; None of another one."""
    try:
        arguments = Path("/proc", number, "cmdline").read_bytes().split(b"\0")[:-1]
    except OSError:
        return None
    is_server = bool(arguments) and os.path.basename(arguments[0]) == b"nbdkit"
    return [os.fsdecode(argument) for argument in arguments] if is_server else None
