"""Raw disks that are served: by `dirtmap serve`, or by an nbdkit that somebody else has started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import dirtmap.engine as dm
from dirtmap.tools.listening.listener import Listener
from dirtmap.tools.serve.building import built_filter
from dirtmap.tools.serve.nbdkit import Nbdkit
from dirtmap.tools.serve.serving import Serving, serve
from support.cli import COMMAND
from support.tracking import GRANULE

SIZE = 64 << 20

# A test module that uses this fixture gives it a name of its own: ``nothing_goes_on = server.nothing_goes_on``.


@pytest.fixture(autouse=True)
def nothing_goes_on() -> Iterator[None]:
    """An nbdkit outlives whoever has started it: not a test that fails."""
    yield
    live = os.environ["DIRTMAP_LIVE"].encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(b"nbdkit\0") and b"dirtmap-session=" + live in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)


@contextlib.contextmanager
def served(folder: Path, *arguments: str) -> Iterator[tuple[Serving, Path]]:
    with (
        dm.Host() as host,
        serve(host, "node:drive0", Listener(unix=str(folder / "sock")), arguments=arguments) as serving,
    ):
        yield serving, folder / "sock"


def uri_of(sock: Path) -> str:
    return f"nbd+unix:///?socket={sock}"


def granules(ranges: list[tuple[int, int]]) -> set[int]:
    return {at for offset, length in ranges for at in range(offset // GRANULE, (offset + length - 1) // GRANULE + 1)}


@contextlib.contextmanager
def nbdkit(
    image: dm.Handle, folder: Path, kind: str = "", *options: str, plugin: tuple[str, ...] = ("memory", "64M")
) -> Iterator[Path]:
    """nbdkit by its own command line, with another filter between ours and the plugin."""
    status = image.tracking()
    assert status is not None
    below = ["wdelay=500ms"] if kind == "delay" else []
    filters = [f"--filter={built_filter()}", *([f"--filter={kind}"] if kind else [])]
    sock, pid = folder / "own", folder / "own.pid"
    command = ["nbdkit", "-f", "-U", str(sock), "-P", str(pid), *filters, *plugin, *below, *options]
    with subprocess.Popen([*command, f"dirtmap-session={status.live}"], stderr=subprocess.PIPE, text=True) as process:
        try:
            while not pid.exists():
                assert process.poll() is None
                time.sleep(0.01)
            yield sock
        finally:
            process.terminate()
            assert process.stderr is not None
            (folder / "said").write_text(process.stderr.read())


class Started:
    """`dirtmap serve` in a process of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.sock, pidfile = folder / "sock", folder / "pid"
        pidfile.unlink(missing_ok=True)
        where = [] if "--adopt" in arguments else ["--unix", str(self.sock)]
        command = [COMMAND, "serve", "drive0", *where, "--pidfile", str(pidfile), *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.ready = self.process.stdout.readline()
        while self.ready.startswith("{") and "}" not in self.ready:
            self.ready += self.process.stdout.readline()
        with dm.open("node:drive0") as image:
            status = image.tracking()
        assert status is not None
        nbdkit = Nbdkit.find(status.live)
        assert nbdkit is not None
        self.nbdkit = nbdkit

    def kill(self, *, tracker: bool, nbdkit: bool) -> None:
        """Kills one or both, at once, and waits for their end."""
        if tracker:
            self.process.kill()
        if nbdkit:
            signal.pidfd_send_signal(self.nbdkit.fileno(), signal.SIGKILL)
            assert self.nbdkit.has_ended(60)
        if tracker:
            self.process.wait()

    def end(self, number: int = signal.SIGTERM) -> int:
        """Asks it to end; returns its exit status."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        assert self.process.stdout is not None
        self.process.stdout.close()
        status = self.process.wait(60)
        self.nbdkit.release()
        return status
