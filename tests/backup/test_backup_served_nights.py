"""Nights of a served disk under load, and deaths of whatever takes part: each backup is the disk at one moment."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from support import frozen
from support.frozen import SLOT, Served, Writer, last_write

import dirtmap.engine as dm
from dirtmap.tools.backup import Repository, restore, verify

NIGHTS = 30
SIZE, SLOTS = 64 << 20, 2048

xfs = frozen.xfs

# Makes a backup, and tells what the clone had when it was made.
_BACKUP = """
import sys
from hashlib import file_digest
import dirtmap.engine as dm
from dirtmap.tools.backup import create, freezing
freeze, seen = freezing.Written.freeze, []
def noting(self, instant):
    freeze(self, instant)
    with open(self.disk.path, "rb") as file:
        seen.append(file_digest(file, "sha256").hexdigest())
freezing.Written.freeze = noting
with dm.Host() as host:
    (made,) = create(host, ["drive0"], sys.argv[1])
print(*seen)
"""


class Night:
    """The disk, what writes to it, and its repository."""

    def __init__(self, folder: Path, volume: Path, seed: int) -> None:
        self.repository, self.disk, self.chance = folder / "repo", Served(volume, "drive0", SIZE), random.Random(seed)
        self.acknowledged = 0
        self.digests: dict[int, str] = {}

    @contextlib.contextmanager
    def loaded(self) -> Iterator[Writer]:
        """fio writes to the upper part of the disk, as fast as guests do, and a writer of numbers to the lower."""
        uri = f"nbd+unix:///?socket={self.disk.sock}"
        options = [f"--offset={SLOTS * SLOT}", f"--size={SIZE - SLOTS * SLOT}", "--rw=randwrite", "--bsrange=4k-64k"]
        options += [
            "--random_distribution=zipf:1.2",
            "--iodepth=4",
            "--rate_iops=100",
            "--thread",
            "--time_based",
            "--runtime=600",
        ]
        command = [
            "fio",
            "--name=a",
            "--ioengine=nbd",
            f"--uri={uri}",
            f"--randseed={self.chance.randrange(1 << 30)}",
            *options,
        ]
        load = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self.repository.parent
        )
        try:
            with Writer([self.disk.sock], SLOTS, start=self.acknowledged + 1) as writer:
                yield writer
        finally:
            self.acknowledged = writer.acknowledged
            load.kill()
            load.wait()

    def begin(self) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", _BACKUP, self.repository], stdout=subprocess.PIPE, text=True)

    def attempt(self) -> subprocess.Popen[str]:
        """A backup that comes to some point until it returns."""
        process = self.begin()
        time.sleep(self.chance.random() * 2)
        return process

    def back_up(self, writer: Writer) -> None:
        """A backup that succeeds, and is held against the clone, and against what the writer has written."""
        before = writer.acknowledged
        with self.begin() as process:
            said, _ = process.communicate()
        assert process.returncode == 0
        made = Repository(self.repository).at("drive0", None)
        self.digests[made.number] = said.strip()
        content = self.restored(made.number)
        assert before <= last_write(content[: SLOTS * SLOT], SLOTS) <= writer.submitted

    def restored(self, number: int) -> bytes:
        out = self.repository.with_name("out")
        with dm.Host() as host:
            restore(host, self.repository, "drive0", out, at=str(number), form="raw", force=True)
        content = out.read_bytes()
        assert sha256(content).hexdigest() == self.digests[number]
        return content


def killed(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@pytest.mark.long
def test_nights_of_a_served_disk(xfs: Path, tmp_path: Path) -> None:
    night = Night(tmp_path, xfs, 7)
    night.disk.start()
    with night.loaded() as writer:
        night.back_up(writer)
    for number in range(NIGHTS):
        what = ["nothing", "backup", "tracker", "tracker and nbdkit", "all"][number % 5]
        with night.loaded() as writer:
            time.sleep(night.chance.random())
            if what == "backup":
                killed(night.attempt())
            elif what == "tracker":
                night.disk.kill()
                time.sleep(night.chance.random())
                night.disk.start("--adopt")
            elif what != "nothing":
                process = night.attempt() if what == "all" else None
                night.disk.kill()
                if process is not None:
                    killed(process)
                night.disk.kill_nbdkit()
        if what in ("tracker and nbdkit", "all"):
            night.disk.start()
        with night.loaded() as writer:
            time.sleep(night.chance.random())
            night.back_up(writer)
    night.disk.process.send_signal(signal.SIGTERM)
    night.disk.process.communicate()
    for number in night.digests:
        night.restored(number)
    backups = Repository(night.repository).backups()
    assert [backup.kind for backup in backups[1:]] == ["incremental"] * (len(backups) - 1)
    assert verify(night.repository) == []
    full, copied = len(backups) * SIZE >> 20, sum(backup.copied for backup in backups) >> 20
    print(f"{len(night.digests)} nights compared: {copied} MiB copied, and {full} MiB by as many full backups")
