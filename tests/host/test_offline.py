"""Where a disk is, and that it stays as it is while `Host.offline` keeps it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.qemu import StorageDaemon, ToolError, create, qemu_io, run
from support.tracking import make_node

import dirtmap.engine as dm

MIB = 1 << 20


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return make_node(tmp_path, MIB, "data")


def write_raw(path: Path) -> str:
    return run("qemu-io", "-f", "raw", "-c", "write 0 512", str(path))


def test_where_a_disk_is(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A raw disk is raw although its guest has written the header of a qcow2 image into it."""
    image = tmp_path / "disk.qcow2"
    create(image, MIB)
    raw.write_bytes(image.read_bytes()[:65536].ljust(MIB, b"\0"))
    monkeypatch.chdir(tmp_path)
    with dm.Host() as host:
        host.add_qcow2("system", "disk.qcow2")
        host.add_device("drive0", "data")
        host.add_device("drive1", "system")
        found = {}
        for target in ("node:data", "disk.qcow2", "device:drive0", "device:drive1"):
            with host.open(target) as opened:
                found[target] = opened.disk()
    here, there = dm.Disk(str(raw), "raw"), dm.Disk(str(image), "qcow2")
    assert found == {"node:data": here, "disk.qcow2": there, "device:drive0": here, "device:drive1": there}


def test_nobody_writes_to_a_disk_that_is_kept_offline(raw: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    create(image, MIB, f"data_file={tmp_path / 'data'},data_file_raw=on")
    with dm.Host() as host, host.offline(dm.Disk(str(raw), "raw")), host.offline(dm.Disk(str(image), "qcow2")):
        with host.offline(dm.Disk(str(raw), "raw")), dm.open(image), dm.open("data"):
            pass  # readers are many
        run("qemu-io", "-r", "-f", "raw", "-c", "read 0 512", str(raw))
        with pytest.raises(ToolError, match='Failed to get "write" lock'):
            write_raw(raw)
        with pytest.raises(ToolError, match='Failed to get "write" lock'):
            write_raw(tmp_path / "data")
        with pytest.raises(ToolError, match='Failed to get "write" lock'):
            qemu_io(image, "write 0 512")
        with pytest.raises(dm.LockedError), dm.Host(wait=0).transaction([image]):
            pass
    write_raw(raw)
    qemu_io(image, "write 0 512")


def test_a_disk_that_is_being_written_is_not_kept(tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    create(image, MIB)
    with StorageDaemon(image) as daemon, dm.Host() as host:
        refused = f"open for writing by qemu-storage-da \\(process {daemon.pid}\\)"
        with pytest.raises(dm.LockedError, match=refused), host.offline(dm.Disk(str(image), "qcow2")):
            pytest.fail("it was kept")


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.rename(other, path)


@pytest.mark.parametrize("change", [lambda path: os.utime(path), replace, lambda path: os.truncate(path, 2 * MIB)])
def test_whoever_takes_no_locks_is_noticed(raw: Path, change: Callable[[Path], object]) -> None:
    disk = dm.Disk(str(raw), "raw")
    with dm.Host() as host:
        with pytest.raises(dm.LockedError, match="written to, changed or replaced"), host.offline(disk):
            change(raw)
        with pytest.raises(ZeroDivisionError), host.offline(disk):
            _ = change(raw), 1 / 0
