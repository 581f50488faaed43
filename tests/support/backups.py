"""Disks to back up, and what QEMU says of their backups."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dirtmap.engine as dm
from dirtmap.engine.system import file as fileio
from dirtmap.engine.system.file import File
from dirtmap.tools.backup import Backup, Repository, create, files
from support.medium import Medium
from support.qemu import Map, ToolError, check, merged, qemu_img, qemu_io
from support.qemu import create as make_image

SIZE = 24 << 20


def qcow2_disk(path: Path, size: int = SIZE) -> Path:
    """An image with some data."""
    make_image(path, size)
    qemu_io(path, "write -qP 7 0 3M", "write -qP 9 10M 70k", "write -qz 15M 64k")
    return path


def raw_disk(path: Path, size: int = SIZE + 13, name: str = "data") -> Path:
    """A node of the default store, with some data and an odd size."""
    with open(path, "wb") as file:
        file.truncate(size)
        file.seek(5 << 20)
        file.write(b"\7" * 70_000)
        file.seek(size - 5)
        file.write(b"\1\2\3\4\5")
    with dm.Host() as host:
        host.add_node(name, str(path))
    return path


def settled_io(disk: Path, *commands: str) -> None:
    """`qemu_io`, again while a daemon has the image: it ends a moment after the process that started it was killed."""
    for _ in range(200):
        try:
            qemu_io(disk, *commands)
            return
        except ToolError as error:
            if "lock" not in str(error):
                raise
            time.sleep(0.05)
    raise AssertionError("QEMU goes on")


def write_raw(path: Path, writes: dict[int, bytes], name: str = "data") -> None:
    """Writes to a raw disk as a program does that tracks it."""
    with dm.open(name) as image, image.track() as tracker, open(path, "r+b") as file:
        for offset, data in writes.items():
            with tracker.write(offset, len(data)):
                file.seek(offset)
                file.write(data)
                file.flush()


def lose(disk: Path, writes: list[tuple[int, int, int]]) -> None:
    """Writes (offset, length, value) after which nobody knows what was written: QEMU is killed, or nothing tracks."""
    if disk.suffix == ".qcow2":
        commands = [f"write -qP {value} {at} {length}" for at, length, value in writes]
        words = [word for command in [*commands, "flush", "sigraise 9"] for word in ("-c", command)]
        assert subprocess.run(["qemu-io", "-f", "qcow2", *words, disk], check=False).returncode == -signal.SIGKILL
        return
    with open(disk, "r+b") as file:
        for at, length, value in writes:
            file.seek(at)
            file.write(bytes([value]) * length)


@contextlib.contextmanager
def counted_acts(at: int | None = None, medium: Medium | None = None) -> Iterator[Callable[[], int]]:
    """Counts what is done to the disk until the end of the block; before that act, this process dies.

    An act is each write, sync, renaming and removal of a repository's file, and each write and sync of the engine's.

    Args:
        at: the act.
        medium: is told of all, and keeps what is on it when the process dies, or else at the end of the block.

    Yields:
        What says how many there were.
    """
    act, acts = files._act, 0

    one = threading.Lock()  # a tracker has threads that write

    def reach() -> None:
        nonlocal acts
        with one:
            if acts == at:
                if medium is not None:
                    medium.keep()
                os.kill(os.getpid(), signal.SIGKILL)
            acts += 1

    @contextlib.contextmanager
    def counted(what: str, path: str) -> Iterator[None]:
        reach()
        with act(what, path):
            yield
        if medium is not None:
            medium.done(what, path)

    class Counted(File):
        def write(self, offset: int, data: bytes | memoryview) -> None:
            reach()
            if medium is not None:
                medium.changes(self.abspath)
            super().write(offset, data)

        def truncate(self, size: int) -> None:
            reach()
            if medium is not None:
                medium.changes(self.abspath)
            super().truncate(size)

        def sync(self) -> None:
            reach()
            super().sync()
            if medium is not None:
                medium.synced(self.abspath)

    with pytest.MonkeyPatch.context() as patch, fileio.using(Counted):
        patch.setattr(files, "_act", counted)
        yield lambda: acts
        if medium is not None:
            medium.keep()


def back_up(repository: Path, *targets: str | Path) -> Backup:
    """The backup of the last target."""
    with dm.Host() as host:
        return create(host, [str(target) for target in targets], repository)[-1]


def image_of(repository: Path, backup: Backup) -> Path:
    """The image of a backup."""
    return Path(Repository(repository).image(backup))


def same(repository: Path, backup: Backup, disk: Path) -> None:
    """Fails unless the backup reads as the disk does, and its image is clean."""
    image = image_of(repository, backup)
    qemu_img("compare", "-q", "-f", backup.format, "-F", "qcow2", disk, image)
    check(image)


def held(repository: Path, backup: Backup) -> Map:
    """What the image of a backup itself holds, zeros included."""
    told: list[dict[str, Any]] = json.loads(qemu_img("map", "--output=json", image_of(repository, backup)))
    return merged((run["start"], run["length"]) for run in told if run["depth"] == 0 and run["present"])


def make_nights(folder: Path) -> tuple[Path, list[bytes]]:
    """A repository with four backups of the disk ``data``, and what that had at each; outside of any host."""
    disk, repository, chooser = folder / "data.raw", folder / "repo", random.Random(3)
    contents = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIRTMAP_STORE", str(folder / "store.dmap"))
        patch.setenv("DIRTMAP_INDEX", str(folder / "index"))
        raw_disk(disk)
        for night in range(4):
            places = (chooser.randrange(SIZE) for _ in range(6))
            write_raw(disk, {at: bytes([night]) * min(100_000, SIZE - at) for at in places})
            back_up(repository, "data")
            contents.append(disk.read_bytes())
    return repository, contents
