"""Disks on XFS behind `dirtmap serve`, a writer whose order tells what a copy of them must have, and such copies."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import pytest

from support import volumes
from support.cli import COMMAND
from support.nbd import WRITE, Client
from support.tracking import make_node

SLOT = 4096  # bytes of each write


@pytest.fixture
def xfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system that clones files, with the default store; what serves its disks is ended before it is."""
    with file_system("xfs", tmp_path, monkeypatch) as where:
        yield where


@pytest.fixture
def btrfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """As `xfs`; one that can make snapshots, too."""
    with file_system("btrfs", tmp_path, monkeypatch) as where:
        yield where


@contextlib.contextmanager
def file_system(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, size: int = 0) -> Iterator[Path]:
    """One of ``size`` bytes, or as small as can be; see `xfs`."""
    with volumes.loops(), volumes.volume(volumes.make(kind, folder / "volume", size=size), folder / kind) as where:
        monkeypatch.setenv("DIRTMAP_STORE", str(where / "default.dmap"))
        try:
            yield where
        finally:
            _end_servers(f"={os.environ['DIRTMAP_LIVE']}".encode())


def _end_servers(what: bytes) -> None:
    """Kills those with that in their arguments. An nbdkit outlives whoever has started it: not a test."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(b"nbdkit\0") and what in path.read_bytes():
                _kill(int(path.parent.name))


def _kill(pid: int) -> None:
    """Kills a process that need not be a child, and waits for its end."""
    end = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(end, signal.SIGKILL)
        select.select([end], [], [], 60)
    finally:
        os.close(end)


class Served:
    """`dirtmap serve NAME` in a process of its own, until the end of the block; a node of the default store.

    Attributes:
        path: of the disk.
        sock: where it is served.
    """

    def __init__(self, folder: Path, name: str, size: int) -> None:
        self.name, self.path, self.sock = name, make_node(folder, size, name), folder / f"{name}.sock"

    def start(self, *arguments: str) -> None:
        where = [] if "--adopt" in arguments else ["--unix", str(self.sock)]
        command = [COMMAND, "serve", self.name, *where, *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline().startswith("ready")

    def kill(self) -> None:
        """The tracker alone: nbdkit goes on."""
        self.process.kill()
        self._wait()

    def kill_nbdkit(self) -> None:
        """And with it the writes of clients."""
        _end_servers(f"={self.path}\0".encode())

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self._wait()

    def _wait(self) -> None:
        self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()


class Writer:
    """Writes a number to each of some disks in turn, and then the next number, until the end of the block.

    The n-th write goes to slot n * 7919 of the disk, so the numbers that a copy has tell after which write it was made.

    Attributes:
        submitted: the number that is, or was, written last.
        acknowledged: the last one that all disks have.
    """

    def __init__(self, socks: Sequence[Path], slots: int, *, start: int = 1) -> None:
        self.submitted = self.acknowledged = start - 1
        self._socks, self._slots, self._ended = socks, slots, False
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Self:
        self._thread.start()
        while not self.acknowledged and self._thread.is_alive():
            time.sleep(0.001)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._thread.join(60)
        assert not self._thread.is_alive()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _work(self) -> None:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):  # where a server is killed
            clients = [stack.enter_context(Client(sock)) for sock in self._socks]
            while not self._ended:
                self.submitted += 1
                number = self.submitted
                for client in clients:
                    client.send(WRITE, slot_of(number, self._slots) * SLOT, SLOT, data=number.to_bytes(8, "big") * 512)
                    assert client.receive() == 0
                self.acknowledged = number
                time.sleep(0.001)  # leaves the processor to others


def slot_of(number: int, slots: int) -> int:
    return number * 7919 % slots


def last_write(content: bytes, slots: int) -> int:
    """The number of the last write that a copy has. Fails unless it has exactly what was written up to that one."""
    found = [int.from_bytes(content[at * SLOT : at * SLOT + 8], "big") for at in range(slots)]
    last = max(found)
    expected = [0] * slots
    for number in range(max(1, last - slots * 8), last + 1):
        expected[slot_of(number, slots)] = number
    assert found == expected
    for at, number in enumerate(found):
        assert content[at * SLOT : (at + 1) * SLOT] == number.to_bytes(8, "big") * 512
    return last
