"""Compressed backups are smaller, and all that is done with backups is done with them."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from support.backups import SIZE, held, image_of, qcow2_disk, raw_disk, write_raw
from support.cli import dirtmap, error_of, json_of
from support.qemu import check, info, qemu_img, qemu_io

from dirtmap.tools.backup import Listener, Repository, mount

TEXT = b"what is written again and again, " * 4000


def test_nights(tmp_path: Path) -> None:
    disk, repository, chooser = raw_disk(tmp_path / "data.raw"), tmp_path / "repo", random.Random(8)
    contents = []
    for night in range(4):
        places = [chooser.randrange(SIZE - len(TEXT)) for _ in range(5)]
        write_raw(disk, dict.fromkeys(places, TEXT) | {chooser.randrange(SIZE): b"odd"})
        if night == 2:
            write_raw(disk, {5 << 20: bytes(3 << 20), SIZE: b"the end"})  # the disk ends inside of a cluster
        (made,) = json_of("backup", "create", *(["--compress=zstd"] if night != 1 else []), "data", repository)
        assert made["compression"] == (None if night == 1 else "zstd")
        contents.append(disk.read_bytes())
    backups = Repository(repository).backups()
    for backup, content in zip(backups, contents, strict=True):
        image = image_of(repository, backup)
        check(image)
        if backup.compression:
            assert info(image)["format-specific"]["data"]["compression-type"] == "zstd"
            assert backup.image_size < backup.copied
        (tmp_path / "expected").write_bytes(content)
        qemu_img("compare", "-q", "-f", "raw", "-F", "qcow2", tmp_path / "expected", image)
        dirtmap("backup", "restore", "--force", f"--at={backup.number}", repository, "data", tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == content
    with mount(repository, "data", Listener(unix=str(tmp_path / "socket"))) as mounted:
        qemu_img("compare", "-q", "-f", "raw", "-F", "raw", tmp_path / "expected", mounted.uri)
    dirtmap("backup", "verify", repository)
    dirtmap("backup", "prune", "--keep=2", repository)
    oldest, newest = Repository(repository).backups()
    assert (oldest.parent, oldest.compression) == (None, "zstd")
    assert oldest.image_size < oldest.copied
    dirtmap("backup", "verify", repository)
    dirtmap("backup", "verify", repository, "data")
    qemu_img("compare", "-q", "-f", "raw", "-F", "qcow2", disk, image_of(repository, newest))


def test_an_increment_has_what_is_dirty(tmp_path: Path) -> None:
    disk, repository = qcow2_disk(tmp_path / "disk.qcow2"), tmp_path / "repo"
    dirtmap("backup", "create", "--compress=zstd", disk, repository)
    qemu_io(disk, "write -qP 5 1M 64k", "write -qz 15M 128k", "write -qP 6 20M 1k")
    dirtmap("backup", "create", "--compress=zstd", disk, repository)
    backup = Repository(repository).backups()[-1]
    assert held(repository, backup) == [(1 << 20, 65536), (15 << 20, 131072), (20 << 20, 65536)]
    qemu_img("compare", "-q", disk, image_of(repository, backup))


def test_what_is_damaged_is_said(tmp_path: Path) -> None:
    disk, repository = qcow2_disk(tmp_path / "disk.qcow2"), tmp_path / "repo"
    dirtmap("backup", "create", "--compress=zstd", disk, repository)
    image = image_of(repository, Repository(repository).backups()[0])
    whole = image.read_bytes()
    told = info(image)
    assert told["format-specific"]["data"]["compression-type"] == "zstd"
    for at in range(len(whole) - 400, len(whole), 100):  # compressed data are written last
        image.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        if whole[at]:
            dirtmap("backup", "restore", repository, "disk.qcow2", tmp_path / "out", status=1)
            assert not (tmp_path / "out").exists()


def test_only_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = qcow2_disk(tmp_path / "disk.qcow2")
    assert "--compress" in error_of("backup", "create", "--compress=lz4", disk, tmp_path / "repo")
    qemu = shutil.which("qemu-img")
    (tmp_path / "bin").mkdir()
    script = f'#!/bin/sh\ncase "$*" in *zstd*) echo "qemu-img: no zstd" >&2; exit 1;; esac\nexec {qemu} "$@"\n'
    (tmp_path / "bin" / "qemu-img").write_text(script)
    (tmp_path / "bin" / "qemu-img").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    assert "no zstd" in error_of("backup", "create", "--compress=zstd", disk, tmp_path / "repo")
    assert not list((tmp_path / "repo").glob("*.tmp"))
    dirtmap("backup", "create", disk, tmp_path / "repo")
