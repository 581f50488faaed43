"""How fast a disk is backed up that is served and written to meanwhile, and how long these writes wait for that.

The disk is on an XFS in a loop device, which clones it, and the repository is not. 200 writes of 4 KiB a second are
what a quiet guest does, and leave the processors to the copy. They go where all is dirty already, so that the backup
has as much to copy as without them.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import fio, frozen
from support.frozen import Served
from support.measuring import Against, Peer
from support.nbd import WRITE, Client

SECTION = "Backups"
DIRTMAP = Path(sys.executable).with_name("dirtmap")
ALONE, WITHOUT = "the same without writes", "the same without a backup"
SIZE, CHANGED, RUN = 8 << 30, 256 << 20, 1 << 20
PER_SECOND = 200
BEFORE_SECONDS, AFTER_SECONDS = 0.5, 0.2  # for which is written before and after a backup: fio takes a while to begin


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A sparse disk of 8 GiB, served, with a backup."""
    with (
        frozen.file_system("xfs", tmp_path, monkeypatch, size=2 << 30) as where,
        Served(where, "drive0", SIZE) as served,
    ):
        back_up(served, tmp_path)
        yield served
    shutil.rmtree(tmp_path)


def change(disk: Served) -> None:
    """Writes what the next increment has."""
    with Client(disk.sock) as client:
        for at in range(0, CHANGED, RUN):
            assert client.ask(WRITE, at, RUN) == 0
    subprocess.run(["sync", "-f", disk.path], check=True)


def back_up(disk: Served, folder: Path) -> float:
    """Makes a backup; returns how long that takes, in seconds."""
    begun = time.perf_counter()
    subprocess.run([DIRTMAP, "backup", "create", disk.name, folder / "repo"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


@contextlib.contextmanager
def load(disk: Served) -> Iterator[list[float]]:
    """Writes go on until the end of the block; yields what has the longest wait of one after it, in seconds."""
    with fio.steady(disk.sock, PER_SECOND, CHANGED) as waits:
        time.sleep(BEFORE_SECONDS)
        yield waits
        time.sleep(AFTER_SECONDS)


def test_time(against: Against, disk: Served, tmp_path: Path) -> None:
    def run() -> dict[str, float]:
        change(disk)
        alone = back_up(disk, tmp_path)
        change(disk)
        with load(disk):
            return {"meanwhile": back_up(disk, tmp_path), ALONE: alone}

    what = f"`backup create`, an increment of 256 MiB of a served disk, with {PER_SECOND} writes of 4 KiB a second"
    against.told(what, "meanwhile", run, {ALONE: Peer(lambda: None)})


def test_waits(against: Against, disk: Served, tmp_path: Path) -> None:
    def run() -> dict[str, float]:
        change(disk)
        with load(disk) as waits:
            took = back_up(disk, tmp_path)
        with load(disk) as others:
            time.sleep(took)
        return {"meanwhile": waits[0], WITHOUT: others[0]}

    what = f"the longest wait of {PER_SECOND} writes of 4 KiB a second, while their disk is backed up"
    against.told(what, "meanwhile", run, {WITHOUT: Peer(lambda: None)})
