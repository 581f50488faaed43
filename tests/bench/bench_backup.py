"""How fast disks are backed up and restored, beside what copies as much without bitmaps or digests.

All of it syncs what it has written. It runs as a process of its own, but for the plain copy of extents and what is
called from Python.

What fills the page cache takes as long as the memory for that takes: nothing right after a large file was removed, and
2 ms a MiB, twice as long as the copy itself, once a hypervisor has taken back what its guest does not use. So that
ratios do not depend on what ran before, `copy_file_range` gives up what it has written, as dirtmap does, and `qemu-img
convert` runs once as it is and once past the page cache.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.measuring import Against, Peer

import dirtmap.engine as dm
from dirtmap.tools import backup

SECTION = "Backups"
DIRTMAP = Path(sys.executable).with_name("dirtmap")
SIZE = 64 << 30
TOGETHER, KEPT = 8, 64  # extents: as many as are passed on at a time, and as may stay in the page cache
RUN = 1 << 20  # bytes of an extent
EXTENTS = sorted(place * RUN for place in random.Random(5).sample(range(SIZE // RUN), SIZE // RUN // 100))  # 1 %
CONTENT = random.Random(3).randbytes(RUN)


def process(*command: str | Path) -> None:
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A sparse disk of 64 GiB, the node ``data``."""
    monkeypatch.setenv("DIRTMAP_STORE", str(tmp_path / "store.dmap"))
    monkeypatch.setenv("DIRTMAP_INDEX", str(tmp_path / "index"))
    path = tmp_path / "data.raw"
    with open(path, "wb") as file:
        file.truncate(SIZE)
    with dm.Host() as host:
        host.add_node("data", str(path))
    yield path
    shutil.rmtree(tmp_path)


def write(disk: Path) -> None:
    """Writes to 1 % of the disk as a program does that tracks it."""
    with dm.open("data") as image, image.track() as tracker, open(disk, "r+b") as file:
        for at in EXTENTS:
            with tracker.write(at, RUN):
                file.seek(at)
                file.write(CONTENT)
        file.flush()
        os.fsync(file.fileno())


def copy_extents(disk: Path, out: Path, *, digests: bool) -> None:
    """Copies the extents to a sparse file, and syncs it; a second thread makes a digest of each."""
    with open(disk, "rb") as source, open(out, "wb") as target, ThreadPoolExecutor(1) as pool:
        target.truncate(SIZE)
        if digests:
            for at in EXTENTS:
                pool.submit(lambda at: hashlib.sha256(os.pread(source.fileno(), RUN, at)).digest(), at)
        for number, at in enumerate(EXTENTS):
            done = 0
            while done < RUN:
                done += os.copy_file_range(source.fileno(), target.fileno(), RUN - done, at + done, at + done)
            if number % TOGETHER == TOGETHER - 1:
                begin = EXTENTS[max(0, number + 1 - KEPT)]
                os.posix_fadvise(target.fileno(), begin, at + RUN - begin, os.POSIX_FADV_DONTNEED)
        os.fsync(target.fileno())
    out.unlink()


def converts(source: Path, given: str, out: Path, form: str) -> dict[str, Peer]:
    """`qemu-img convert`, through the page cache and past it, whose result is synced."""

    def run(*options: str) -> None:
        process("qemu-img", "convert", *options, "-f", given, "-O", form, source, out)
        with open(out, "rb") as file:
            os.fsync(file.fileno())
        out.unlink()

    return {
        "`qemu-img convert`": Peer(run, 1.2),
        "`qemu-img convert -t none`": Peer(lambda: run("-t", "none"), 1.2),
    }


@pytest.mark.parametrize("how", ["backup create", "dirtmap.tools.backup.create"])
def test_increment(against: Against, disk: Path, tmp_path: Path, how: str) -> None:
    """By the command, which has to start Python and import numpy; and by one that runs, as the plain copies do."""
    process(DIRTMAP, "backup", "create", "data", tmp_path / "repo")
    write(disk)
    out = tmp_path / "copy"

    def from_python() -> None:
        with dm.Host() as host:
            backup.create(host, ["data"], tmp_path / "repo")

    def command() -> None:
        process(DIRTMAP, "backup", "create", "data", tmp_path / "repo")

    peers = {
        "copy_file_range": Peer(lambda: copy_extents(disk, out, digests=False), 1.3),
        "the same, and digests in a second thread": Peer(lambda: copy_extents(disk, out, digests=True), 1.3),
    }
    against(
        f"`{how}`, an increment of 1 % of a raw disk of 64 GiB",
        command if how == "backup create" else from_python,
        peers,
        rounds=5,
        warm=0 if how == "backup create" else 1,
        before=lambda: write(disk),
    )


def test_full(against: Against, disk: Path, tmp_path: Path) -> None:
    write(disk)
    against(
        "`backup create`, all of a raw disk of 64 GiB, 1 % of it data, to qcow2",
        lambda: process(DIRTMAP, "backup", "create", "data", tmp_path / "repo"),
        converts(disk, "raw", tmp_path / "copy", "qcow2"),
        rounds=3,
        warm=0,
        before=lambda: shutil.rmtree(tmp_path / "repo", ignore_errors=True),
    )


def test_restore(against: Against, disk: Path, tmp_path: Path) -> None:
    repository, out = tmp_path / "repo", tmp_path / "out.raw"
    for _ in range(2):
        write(disk)
        process(DIRTMAP, "backup", "create", "data", repository)
    newest = max(repository.glob("*.qcow2"))
    against(
        "`backup restore` of it from a chain of two to a raw file",
        lambda: process(DIRTMAP, "backup", "restore", repository, "data", out),
        converts(newest, "qcow2", tmp_path / "copy", "raw"),
        rounds=3,
        warm=0,
        before=lambda: out.unlink(missing_ok=True),
    )
