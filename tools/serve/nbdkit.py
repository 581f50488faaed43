"""`Nbdkit`: the server: started here, or found where the program has died that started it."""

from __future__ import annotations

import contextlib
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

if TYPE_CHECKING:
    from dirtmap.engine import Disk
    from dirtmap.tools.export.listener import Listener

_PATIENCE_SECONDS: Final = 10.0
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

    Attributes:
        pid: its process number.
        socket: the path of its Unix socket; None if it listens elsewhere.
    """

    def __init__(self, pid: int, descriptor: int, socket: str | None, child: subprocess.Popen[bytes] | None) -> None:
        self.pid, self.socket, self._descriptor, self._child = pid, socket, descriptor, child

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
                    env={key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"},
                )
            except OSError as error:
                raise StorageError("nbdkit", error.strerror or str(error), error.errno) from error
            started = cls(child.pid, os.pidfd_open(child.pid), listener.unix, child)
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
                    unix = arguments.index("--unix") + 1 if "--unix" in arguments else len(arguments)
                    return cls(int(name), descriptor, arguments[unix] if unix < len(arguments) else None, None)
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

    def close(self) -> None:
        """Ends it, once what its clients have asked for is done; kills one that does not end in some seconds."""
        if self._descriptor < 0:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, number)
            if self.has_ended(_PATIENCE_SECONDS):
                break
        if self._child is not None:
            self._child.wait()
        os.close(self._descriptor)
        self._descriptor = -1
        if self._child is None and self.socket is not None:
            with contextlib.suppress(OSError):
                Path(self.socket).unlink()


def _listening(listener: Listener) -> list[str]:
    if listener.unix is not None:
        where = ["--unix", listener.unix]
    else:
        where = ["--ipaddr", listener.bind, "--port", str(listener.port)]
    if listener.tls is not None:
        where += ["--tls=require", f"--tls-certificates={os.path.abspath(listener.tls)}", "--tls-verify-peer"]
    return where


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
