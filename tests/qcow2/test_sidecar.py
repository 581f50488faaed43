"""Sidecars: written without QEMU, opened by QEMU, which records into their bitmaps."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import qemu
from support.cli import dirtmap, error_of

import dirtmap.engine as dm
from dirtmap.engine.qcow2.sidecar import make_sidecar

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


def test_it_leads_to_its_disk_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU takes a relative name as relative to the folder that it is started in."""
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "disk.raw").write_bytes(bytes(MIB))
    monkeypatch.chdir(tmp_path / "here")
    dirtmap("sidecar", "disk.raw", "../there/disk.qcow2")
    for folder in ("", "here", "there"):
        monkeypatch.chdir(tmp_path / folder)
        qemu.qemu_io(tmp_path / "there/disk.qcow2", "write -P 7 0 512")
    assert (tmp_path / "here/disk.raw").read_bytes().startswith(b"\7" * 512)
    assert not any((tmp_path / "there/disk.raw").read_bytes())


def test_it_is_not_begun_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, sidecar = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.touch()
    os.truncate(raw, 1 << 40)
    status = os.statvfs(tmp_path)
    few = os.statvfs_result((status.f_bsize, status.f_frsize, *status[2:4], 1, *status[5:10]))
    monkeypatch.setattr(os, "statvfs", lambda _: few)
    with pytest.raises(dm.StorageError, match="there is room for"):
        make_sidecar(str(raw), str(sidecar))
    assert not sidecar.exists()
