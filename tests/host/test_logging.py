"""Recoveries, doubts and repairs are logged, a logger a room; nothing is printed unless a program asks for it."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import qemu
from support.hostless import name_image

import dirtmap.engine as dm

MIB = 1 << 20


@pytest.fixture
def node(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    with dm.Host() as host:
        host.add_node("disk", str(path))
        with host.open("disk") as image, image.transaction() as bitmaps:
            bitmaps["b"] = dm.Bitmap(MIB)
    return path


def test_a_doubt_and_a_recovery(node: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dirtmap.engine")
    node.write_bytes(b"x" * MIB)
    dm.recover("disk")
    assert {record.name for record in caplog.records} == {"dirtmap.engine.namespaces"}
    assert "bitmap 'b' recovered: all dirty: the image has changed" in caplog.text


def test_a_change_of_what_is_in_doubt(node: Path, caplog: pytest.LogCaptureFixture) -> None:
    node.write_bytes(b"x" * MIB)
    with dm.open("disk") as image, image.transaction() as bitmaps:
        bitmaps["c"] = dm.Bitmap(MIB)
    assert "all bitmaps are dirty now: the image has changed" in caplog.text


def test_a_rollback(node: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    home = dm.this_host().home
    shutil.copy(home, tmp_path / "old")
    with dm.open("disk") as image, image.transaction() as bitmaps:
        bitmaps["b"].mark(0, 1)
    shutil.copyfile(tmp_path / "old", home)
    with dm.open("disk") as image:
        assert image["b"].count == MIB
    assert [record.name for record in caplog.records if "put back" in record.message] == ["dirtmap.engine.host"]


def test_a_repair(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.create(path, MIB)
    name_image(path, "disk")
    with path.open("ab") as file:
        file.write(bytes(65536))
    qemu.qemu_img("bitmap", "--add", path, "b")
    report = dm.check(path, repair="all")
    assert ("repaired" in caplog.text) == bool(report.leaks_fixed or report.corruptions_fixed)


def test_it_is_silent_by_default(node: Path) -> None:
    node.write_bytes(b"x" * MIB)
    run = "import dirtmap.engine as dm\ndm.recover('disk')"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, check=True, timeout=60)
    assert (done.stdout, done.stderr) == (b"", b"")
