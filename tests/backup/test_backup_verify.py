"""Verifying finds every damage of a repository, and every write that a bitmap has missed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.backup_damage import DAMAGE
from support.backups import back_up, image_of, make_nights, qcow2_disk, raw_disk, write_raw
from support.cli import dirtmap, error_of, json_of
from support.qemu import StorageDaemon, qemu_io

import dirtmap.engine as dm
from dirtmap.tools.backup import Backup, Repository, Sample, comparing, verify, verify_disk
from dirtmap.tools.backup.direct import DirectImage

GRANULE = 65536


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_nights(tmp_path_factory.mktemp("nights"))[0]


@pytest.fixture
def repository(made_once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made_once, tmp_path / "repo")


def test_nothing_is_wrong(repository: Path, tmp_path: Path) -> None:
    assert verify(repository) == []
    told = json_of("backup", "verify", repository)
    assert told == {"faults": [], "data": told["data"], "compared": told["data"]}
    assert told["data"] > 0
    assert "no faults" in dirtmap("backup", "verify", repository).out
    disk = qcow2_disk(tmp_path / "disk.qcow2")
    for _ in range(2):
        back_up(repository, disk)
        qemu_io(disk, "write -qz 1M 1M", "write -qP 5 9M 1k")
    assert verify(repository) == []


def test_without_qemu_nothing_is_called_damaged(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert error_of("backup", "verify", repository) == "qemu-img: No such file or directory; it is part of QEMU"


def write_beside(repository: Path, backup: Backup) -> None:
    """What other tools would read, although no document lists it."""
    qemu_io(image_of(repository, backup), "write -qP 1 23M 64k")


def fill_a_hole(repository: Path, backup: Backup) -> None:
    """The same where the document says that all is zero, or lists nothing; the length stays."""
    qemu_io(image_of(repository, backup), "write -qz -u 22M 64k" if backup.parent else "write -qP 1 22M 64k")


@pytest.mark.parametrize("harm", [*DAMAGE, write_beside, fill_a_hole])
@pytest.mark.parametrize("number", [3, pytest.param(1, marks=pytest.mark.long)])
def test_damage_is_found(repository: Path, harm: Callable[[Path, Backup], None], number: int) -> None:
    backup = Repository(repository).backups()[number - 1]
    harm(repository, backup)
    done = dirtmap("backup", "verify", repository, status=2)
    assert backup.id in done.error
    assert "fault" in done.out


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_a_write_behind_the_bitmap_s_back_is_found(tmp_path: Path, kind: str) -> None:
    repository = tmp_path / "repo"
    disk = qcow2_disk(tmp_path / "disk.qcow2") if kind == "qcow2" else raw_disk(tmp_path / "data.raw")
    target = str(disk) if kind == "qcow2" else "data"

    def write(at: int, data: int) -> None:
        if kind == "qcow2":
            qemu_io(disk, f"write -qP {data} {at} 512")
        else:
            write_raw(disk, {at: bytes([data]) * 512})

    back_up(repository, target)
    back_up(repository, target)
    for at in (0, 7 << 20, 20 << 20):
        write(at, 77)
    assert "no differences" in dirtmap("backup", "verify", repository, target).out
    bitmap = Repository(repository).backups()[-1].bitmap
    told = {"disk": "data" if kind == "raw" else "disk.qcow2", "number": 2}
    if kind == "qcow2":
        dirtmap("clear", disk, bitmap)
        write(0, 77)
        missed = [7 << 20, 20 << 20]
    else:
        with open(disk, "r+b") as file:
            file.seek(9 << 20)
            file.write(b"\1")
        dirtmap("node", "confirm", "data")
        missed = [9 << 20]
    found = json_of("backup", "verify", repository, target, status=2)
    differences = [{"offset": at, "length": GRANULE} for at in missed]
    assert found == {**told, "differences": differences, "data": found["data"], "compared": found["data"]}
    assert found["data"] < 5 << 20


def test_what_cannot_be_verified_is_said(tmp_path: Path) -> None:
    disk, repository = qcow2_disk(tmp_path / "disk.qcow2"), tmp_path / "repo"
    made = back_up(repository, disk)
    assert "no backup of 'data'" in error_of("backup", "verify", repository, raw_disk(tmp_path / "data.raw") and "data")
    with StorageDaemon(disk):
        assert error_of("backup", "verify", "--wait=0", repository, disk)
    dirtmap("remove", disk, made.bitmap)
    assert "not in the image any more" in error_of("backup", "verify", repository, disk)


def test_a_sample_is_of_whole_pieces_and_each_has_its_chance(tmp_path: Path) -> None:
    """Of 16 MiB of data, one piece in eight is read; one of them differs, and is found by one in eight."""
    repository, disk = tmp_path / "repo", qcow2_disk(tmp_path / "disk.qcow2", 64 << 20)
    qemu_io(disk, "write -qP 3 16M 16M", "write -qz 0 16M")
    back_up(repository, disk)
    bitmap = back_up(repository, disk).bitmap
    qemu_io(disk, "write -qP 4 20M 1")
    dirtmap("clear", disk, bitmap)
    chosen, found = set(), 0
    with pytest.MonkeyPatch.context() as patch, dm.Host() as host:
        for number in range(16):
            patch.setattr(comparing.random.SystemRandom, "random", lambda _, number=number: number / 16)
            sample = Sample(1 / 8)
            differences = verify_disk(host, repository, str(disk), sample=sample)[1]
            assert (sample.data, sample.chosen) == (16 << 20, 2 << 20)
            chosen.add(bool(differences))
            found += len(differences)
    assert (chosen, found) == ({True, False}, 2)


def test_what_was_sampled_is_said(repository: Path, tmp_path: Path) -> None:
    assert "16 MiB" not in dirtmap("backup", "verify", repository).out
    told = json_of("backup", "verify", "--sample=50%", repository)
    assert 0 < told["compared"] < told["data"]
    said = dirtmap("backup", "verify", "--sample", "12.5%", repository).out
    assert re.search(r": sampled \S+ \S+ of \S+ MiB \([0-9.]+%\), no faults\n", said)
    disk = qcow2_disk(tmp_path / "disk.qcow2")
    back_up(tmp_path / "own", disk)
    said = dirtmap("backup", "verify", "--sample=1%", tmp_path / "own", disk).out
    assert re.search(r"disk.qcow2: sampled .* of 3.1 MiB \(.*%\), no differences", said)
    for wrong in ("0%", "101%", "1", "-1%", "%", "1e1%"):
        assert "no share" in error_of("backup", "verify", f"--sample={wrong}", repository)


def test_images_are_read_where_something_differs_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, repository = raw_disk(tmp_path / "data.raw"), tmp_path / "repo"
    back_up(repository, "data")
    asked: list[int] = []
    read = DirectImage.read
    monkeypatch.setattr(DirectImage, "read", lambda self, *where: asked.append(where[0]) or read(self, *where))
    assert "no differences" in dirtmap("backup", "verify", repository, "data").out
    assert asked == []
    write_raw(disk, {5 << 20: b"\1"})
    assert "no differences" in dirtmap("backup", "verify", repository, "data").out
    assert asked == [5 << 20]
