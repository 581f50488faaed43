"""Sidecars: written without QEMU, opened by QEMU, which records into their bitmaps."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import qemu
from support.cli import dirtmap, error_of

import dirtmap.engine as dm

MIB = 1 << 20
GIB = 1 << 30


@pytest.mark.parametrize("size", [512, 10 * MIB, GIB + 512, 65 * GIB, 2 << 40, 0])
def test_qemu_opens_it_and_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.chdir(tmp_path)
    Path("disk.raw").write_bytes(b"before")
    os.truncate("disk.raw", size)
    dirtmap("sidecar", "disk.raw", "disk.qcow2")
    info = qemu.info("disk.qcow2")
    assert info["virtual-size"] == size
    assert info["format-specific"]["data"]["data-file-raw"] is True
    qemu.check("disk.qcow2")
    if not size:
        return
    assert dm.check("disk.qcow2").findings == []
    dirtmap("add", "disk.qcow2", "b", "-g", "64K")
    last = size - 512
    qemu.qemu_io(Path("disk.qcow2"), f"write -P 7 {last} 512")
    with open("disk.raw", "rb") as raw:
        raw.seek(last)
        assert raw.read() == bytes([7]) * 512
    assert qemu.extents(dm.open("disk.qcow2")["b"]) == [(last // 65536 * 65536, size - last // 65536 * 65536)]
    qemu.check("disk.qcow2")


def test_the_raw_disk_reads_as_before(tmp_path: Path) -> None:
    raw, sidecar = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(os.urandom(3 * MIB))
    before = raw.read_bytes()
    dirtmap("sidecar", raw, sidecar)
    qemu.qemu_img("compare", "-q", "-f", "raw", "-F", "qcow2", raw, sidecar)
    assert raw.read_bytes() == before


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    raw, sidecar = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(b"odd")
    assert "not a multiple of 512" in error_of("sidecar", raw, sidecar)
    assert not sidecar.exists()
    raw.write_bytes(bytes(512))
    sidecar.write_bytes(b"mine")
    assert error_of("sidecar", raw, sidecar) == f"{sidecar}: open: File exists"
    assert sidecar.read_bytes() == b"mine"
    assert error_of("sidecar", tmp_path / "none", sidecar).endswith("open: No such file or directory")


def test_qemu_opens_it_wherever_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        os.mkdir(name)
    Path("disk.raw").write_bytes(bytes(MIB))
    dirtmap("sidecar", "disk.raw", "one/disk.qcow2")
    for folder in (".", "one", "two"):
        monkeypatch.chdir(tmp_path / folder)
        qemu.check(os.path.relpath(tmp_path / "one/disk.qcow2"))
