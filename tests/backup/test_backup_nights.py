"""Many nights of writes, backups and prunings, and deaths of each: whatever backup is there is what the disk was."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
from support.backups import back_up, counted_acts, qcow2_disk, raw_disk, same, settled_io
from support.child import died_of

import dirtmap.engine as dm
from dirtmap.tools.backup import Repository, prune, restore, verify

NIGHTS = 30


class Night:
    """A disk of one kind, and what it had at each backup."""

    def __init__(self, folder: Path, kind: str, seed: int) -> None:
        self.kind, self.repository, self.chooser = kind, folder / "repo", random.Random(seed)
        self.disk = qcow2_disk(folder / "disk.qcow2") if kind == "qcow2" else raw_disk(folder / "data.raw")
        self.target, self.name = (str(self.disk), "disk.qcow2") if kind == "qcow2" else ("data", "data")
        self.contents: dict[str, bytes] = {}

    def writes(self) -> None:
        """As a guest does; of a raw disk, by a program that tracks it and may be killed."""
        places = [(self.chooser.randrange(23 << 20) & ~511, self.chooser.randrange(1, 256)) for _ in range(4)]
        if self.kind == "qcow2":
            commands = [f"write -qP {value} {at} {self.chooser.choice([1, 64, 300])}k" for at, value in places]
            settled_io(self.disk, *commands, f"write -qz {places[0][0]} 128k")
            return
        dies = self.chooser.random() < 0.4

        def work() -> None:
            with dm.open("data") as image, image.track() as tracker, open(self.disk, "r+b") as file:
                for at, value in places:
                    with tracker.write(at, 70_000):
                        os.pwrite(file.fileno(), bytes([value]) * 70_000, at)
                if dies:
                    os.kill(os.getpid(), signal.SIGKILL)

        assert died_of(work) == (signal.SIGKILL if dies else 0)

    def killed(self, work: str) -> None:
        """A backup, or a pruning, that is killed at some act, or comes to its end."""
        at = self.chooser.randrange(25)

        def attempt() -> None:
            with counted_acts(at):
                if work == "create":
                    back_up(self.repository, self.target)
                else:
                    prune(self.repository, 3)

        died_of(attempt)

    def remember(self) -> None:
        """What the disk has now is what a backup has that was not there before."""
        for backup in Repository(self.repository).backups():
            if backup.id not in self.contents:
                same(self.repository, backup, self.disk)
                self.contents[backup.id] = self.restored(backup.number)

    def restored(self, number: int) -> bytes:
        out = self.disk.with_name("out")
        with dm.Host() as host:
            restore(host, self.repository, self.name, out, at=str(number), form="raw", force=True)
        return out.read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_nights(tmp_path: Path, kind: str) -> None:
    night = Night(tmp_path, kind, 11)
    full = 0
    back_up(night.repository, night.target)
    night.remember()
    for number in range(NIGHTS):
        night.writes()
        if number % 3 == 1:
            night.killed("create")
            night.remember()
            night.writes()
        made = back_up(night.repository, night.target)
        full += made.kind == "full"
        night.remember()
        if number % 4 == 3:
            night.killed("prune")
    assert full == 0
    for backup in Repository(night.repository).backups():
        assert night.restored(backup.number) == night.contents[backup.id]
    assert verify(night.repository) == []
