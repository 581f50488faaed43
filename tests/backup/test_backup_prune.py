"""Pruning leaves every backup that stays as it was, whenever it ends."""

from __future__ import annotations

import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
from support.backup_damage import flip_data
from support.backups import back_up, counted_acts, image_of, qcow2_disk, raw_disk, same, write_raw
from support.child import died_of
from support.cli import dirtmap, error_of, json_of
from support.qemu import bitmaps, info, qemu_img, qemu_io

import dirtmap.engine as dm
from dirtmap.tools.backup import Repository, prune, restore, verify


def numbers(repository: Path) -> list[int]:
    return [backup.number for backup in Repository(repository).backups()]


def as_before(repository: Path, contents: list[bytes], folder: Path) -> None:
    """Fails unless each backup restores to what it was, and QEMU alone reads the newest so."""
    with dm.Host() as host:
        for number in numbers(repository):
            restore(host, repository, "data", folder / "out", at=str(number), force=True)
            assert (folder / "out").read_bytes() == contents[number - 1]
    assert verify(repository) == []


def read_by_qemu(repository: Path, content: bytes, folder: Path) -> None:
    (folder / "expected").write_bytes(content)
    newest = Repository(repository).backups()[-1].id
    qemu_img("compare", "-q", "-f", "raw", "-F", "qcow2", folder / "expected", repository / f"{newest}.qcow2")


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_stay(nights: tuple[Path, list[bytes]], tmp_path: Path, keep: int) -> None:
    repository, contents = nights
    removed = json_of("backup", "prune", "--keep", keep, repository)
    assert [backup["number"] for backup in removed] == list(range(1, 5 - keep))
    assert numbers(repository) == list(range(5 - keep, 5))
    first = Repository(repository).backups()[0]
    assert (first.kind, first.parent, first.reason) == ("full", None, "pruned")
    assert "backing-filename" not in info(image_of(repository, first))
    as_before(repository, contents, tmp_path)
    read_by_qemu(repository, contents[-1], tmp_path)
    assert len(list(repository.iterdir())) == 2 + 2 * keep
    assert prune(repository, keep) == []


def test_the_next_backup_is_an_increment_and_removes_bitmaps(tmp_path: Path) -> None:
    image, raw, repository = qcow2_disk(tmp_path / "disk.qcow2"), raw_disk(tmp_path / "data.raw"), tmp_path / "repo"
    for night in range(3):
        back_up(repository, image, "data")
        qemu_io(image, f"write -qP {night + 1} {night}M 512")
        write_raw(raw, {night << 20: bytes([night + 1]) * 512})
    prune(repository, 1, disk="data")
    assert len(Repository(repository).backups("disk.qcow2")) == 3
    prune(repository, 1)
    back_up(repository, image, "data")
    for name, disk in (("disk.qcow2", image), ("data", raw)):
        older, made = Repository(repository).backups(name)
        assert (made.number, made.kind, made.copied) == (4, "incremental", 65536)
        same(repository, made, disk)
        kept = list(bitmaps(image)) if disk == image else json_of("list", "data")[0]["checkpoints"]
        assert sorted(kept) == sorted([older.bitmap, made.bitmap])


def test_damage_is_not_carried_on(nights: tuple[Path, list[bytes]]) -> None:
    repository, _ = nights
    flip_data(repository, Repository(repository).backups()[2])
    assert "damaged" in error_of("backup", "prune", "--keep=1", repository)
    assert numbers(repository) == [1, 2, 3, 4]
    assert error_of("backup", "prune", "--keep=1", repository, "other")
    assert "keep" in error_of("backup", "prune", "--keep=0", repository)
    os.truncate(Repository(repository).document(Repository(repository).backups()[0]), 3)
    assert "not the document" in error_of("backup", "prune", "--keep=4", repository)


def acts_of(repository: Path, at: int | None = None) -> int:
    """How many acts a pruning makes on the disk; it dies at that one."""
    with counted_acts(at) as acts:
        prune(repository, 2)
    return acts()


@pytest.mark.parametrize("step", [6, pytest.param(1, marks=pytest.mark.long)])
def test_killed_at_every_act(nights: tuple[Path, list[bytes]], tmp_path: Path, step: int) -> None:
    original, contents = nights
    acts = acts_of(shutil.copytree(original, tmp_path / "whole"))
    assert acts > 12
    for at in sorted({*range(0, acts, step), acts - 6}):  # with one document removed, and the other not
        repository = shutil.copytree(original, tmp_path / f"killed-{at}")
        assert died_of(partial(acts_of, repository, at)) == signal.SIGKILL
        assert numbers(repository)[-2:] == [3, 4]
        read_by_qemu(repository, contents[-1], tmp_path)
        as_before(repository, contents, tmp_path)
        dirtmap("backup", "prune", "-q", "--keep=2", repository)
        assert numbers(repository) == [3, 4]
        assert len(list(repository.iterdir())) == 6
        as_before(repository, contents, tmp_path)
