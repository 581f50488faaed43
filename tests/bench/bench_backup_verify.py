"""A disk held against its backup, to verify or to rebuild a bitmap, beside `cmp` of two files of the same content.

All is in the page cache, so that no disk hides what it costs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest
from support import qemu
from support.measuring import Against, Peer

import dirtmap.engine as dm
from dirtmap.tools import backup

SECTION = "A disk beside its backup"
SIZE = 1 << 29
AIM = 1.25  # of the time: 0.8 of the speed


@pytest.fixture(scope="module", params=["raw", "qcow2"])
def disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A disk of 512 MiB, of which three quarters are data, with a full backup and an increment, and a copy of it."""
    folder = tmp_path_factory.mktemp("compared")
    path = folder / "disk.raw"
    with open(path, "wb") as file:
        file.truncate(SIZE)
        for _ in range(SIZE * 3 // 4 >> 20):
            file.write(os.urandom(1 << 20))
    if request.param == "qcow2":
        qemu.qemu_img("convert", "-O", "qcow2", path, path := folder / "disk.qcow2")
    with host_of(path) as host:
        if request.param == "raw":
            host.add_node("disk", str(path))
        for _ in range(2):
            backup.create(host, [target_of(path)], folder / "repo")
    shutil.copyfile(folder / "disk.raw", folder / "copy")
    yield path
    shutil.rmtree(folder)


def host_of(path: Path) -> dm.Host:
    return dm.Host(str(path.with_name("store.dmap")), str(path.with_name("index")))


def target_of(path: Path) -> str:
    return str(path) if path.suffix == ".qcow2" else "node:disk"


def peers_of(path: Path) -> dict[str, Peer]:
    """Of raw files of the same content; a rebuild changes an image, whose disk QEMU can compare all the same."""
    raw, copy = path.with_name("disk.raw"), path.with_name("copy")

    def run(*command: object) -> Callable[[], object]:
        return lambda: subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)

    found = {"cmp": Peer(run("cmp", raw, copy), AIM)}
    if path.suffix == ".qcow2":
        found["qemu-img compare"] = Peer(run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", path, copy))
    return found


def test_verify(against: Against, disk: Path) -> None:
    with host_of(disk) as host:

        def ours() -> None:
            assert backup.verify_disk(host, disk.with_name("repo"), target_of(disk))[1] == []

        against(f"verify a {disk.suffix[1:]} disk, 384 MiB of data, by its backup", ours, peers_of(disk), rounds=5)


def test_rebuild(against: Against, disk: Path) -> None:
    repository = disk.with_name("repo")
    bitmap = backup.Repository(repository).backups()[-1].bitmap
    with host_of(disk) as host:

        def ours() -> None:
            assert backup.rebuild(host, target_of(disk), bitmap, repository).differing == 0

        what = f"rebuild the bitmap of a {disk.suffix[1:]} disk, 384 MiB of data, by its backup"
        against(what, ours, peers_of(disk), rounds=5)


def test_verify_the_repository(against: Against, disk: Path) -> None:
    """All images are read and hashed."""

    def ours() -> None:
        assert backup.verify(disk.with_name("repo")) == []

    def digests() -> None:
        """Of the same bytes, on all processors: nothing that verifies by digests is faster."""
        with open(disk, "rb") as file, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            places = range(0, SIZE * 3 // 4, 1 << 20)
            deque(pool.map(lambda at: sha256(os.pread(file.fileno(), 1 << 20, at)).digest(), places), maxlen=0)

    if disk.suffix == ".raw":
        peers = {"cmp": peers_of(disk)["cmp"], "the digests alone": Peer(digests, limit=True)}
        against("verify a repository, 384 MiB of data", ours, peers, rounds=5)
