"""Verifying finds every damage of a repository, and every write that a bitmap has missed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.backup_damage import DAMAGE
from support.backups import back_up, image_of, make_nights, qcow2_disk, raw_disk, write_raw
from support.cli import dirtmap, error_of, json_of
from support.qemu import StorageDaemon, qemu_io

from dirtmap.tools.backup import Backup, Repository, verify

GRANULE = 65536


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_nights(tmp_path_factory.mktemp("nights"))[0]


@pytest.fixture
def repository(made_once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made_once, tmp_path / "repo")


def test_nothing_is_wrong(repository: Path, tmp_path: Path) -> None:
    assert verify(repository) == []
    assert json_of("backup", "verify", repository) == {"faults": []}
    assert "no faults" in dirtmap("backup", "verify", repository).out
    disk = qcow2_disk(tmp_path / "disk.qcow2")
    for _ in range(2):
        back_up(repository, disk)
        qemu_io(disk, "write -qz 1M 1M", "write -qP 5 9M 1k")
    assert verify(repository) == []


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
    assert found == {**told, "differences": [{"offset": at, "length": GRANULE} for at in missed]}


def test_what_cannot_be_verified_is_said(tmp_path: Path) -> None:
    disk, repository = qcow2_disk(tmp_path / "disk.qcow2"), tmp_path / "repo"
    made = back_up(repository, disk)
    assert "no backup of 'data'" in error_of("backup", "verify", repository, raw_disk(tmp_path / "data.raw") and "data")
    with StorageDaemon(disk):
        assert error_of("backup", "verify", "--wait=0", repository, disk)
    dirtmap("remove", disk, made.bitmap)
    assert "not in the image any more" in error_of("backup", "verify", repository, disk)
