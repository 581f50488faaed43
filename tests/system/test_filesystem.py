"""Which file is meant: known again wherever its file system is mounted, and told from every other."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cli import dirtmap, error_of
from support.hosts import ALL, make_host, mapped
from support.qemu import create
from support.volumes import attached, loops, make, mounted, require_root, volume

from dirtmap.engine.identity import identity_of
from dirtmap.engine.system import filesystem
from dirtmap.engine.system.filesystem import place_of

MIB = 1 << 20
KINDS = ["ext4", "xfs", "btrfs"]
_BTRFS_IOC_SNAP_CREATE_V2 = 1 << 30 | 4096 << 16 | 0x94 << 8 | 23


@pytest.fixture
def disks() -> Iterator[None]:
    with loops():
        yield


def unnamed(path: Path) -> bytes:
    return bytes(8) + os.stat(path).st_dev.to_bytes(8, "big")


@pytest.mark.usefixtures("disks")
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_the_same_one_after_a_mount_under_another_number(kind: str, tmp_path: Path) -> None:
    image = make(kind, tmp_path / "image")
    with volume(image, tmp_path / "a") as here:
        (here / "file").touch()
        found, device = place_of(str(here / "file")), os.stat(here / "file").st_dev
        assert found.filesystem[:8] != bytes(8)
        assert found.birth
    with volume(image, tmp_path / "b", behind=1) as here:
        assert place_of(str(here / "file")) == found
        if kind != "btrfs":  # which has no device's number
            assert os.stat(here / "file").st_dev != device
        os.unlink(here / "file")
        (here / "file").touch()
        assert place_of(str(here / "file")) != found


@pytest.mark.usefixtures("disks")
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_the_same_one_through_two_mounts_and_another_one_elsewhere(kind: str, tmp_path: Path) -> None:
    for name in ("image", "other"):
        make(kind, tmp_path / name)
    with attached(tmp_path / "image") as device, mounted(device, tmp_path / "a"), mounted(device, tmp_path / "b"):
        (tmp_path / "a/file").touch()
        found = place_of(str(tmp_path / "a/file"))
        assert place_of(str(tmp_path / "b/file")) == found
        with volume(tmp_path / "other", tmp_path / "c") as other:
            (other / "file").touch()
            assert place_of(str(other / "file")).filesystem != found.filesystem


@pytest.mark.usefixtures("disks")
def test_a_file_in_a_snapshot_is_another_one(tmp_path: Path) -> None:
    with volume(make("btrfs", tmp_path / "image"), tmp_path / "a") as here:
        (here / "file").touch()
        fd = os.open(here, os.O_RDONLY)
        try:
            arguments = bytearray(struct.pack("=qQQ32x4040s", fd, 0, 0, b"snapshot"))
            fcntl.ioctl(fd, _BTRFS_IOC_SNAP_CREATE_V2, arguments)
        finally:
            os.close(fd)
        one, other = (place_of(str(here / name)) for name in ("file", "snapshot/file"))
        assert one[1:] == other[1:]
        assert one.filesystem != other.filesystem


@pytest.mark.usefixtures("disks")
def test_who_must_not_read_a_file_on_xfs_is_told_all_the_same(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, volume(make("xfs", tmp_path / "image"), Path(folder)) as here:
        (here / "file").touch(0o600)
        (here / "folder").mkdir()
        (here / "folder/file").touch(0o600)
        wanted = [place_of(str(here / name)) for name in ("file", "folder/file")]
        here.chmod(0o755)
        (here / "folder").chmod(0o711)
        os.seteuid(65534)
        try:
            assert place_of(str(here / "file")) == wanted[0]
            with pytest.raises(PermissionError, match="file system's UUID"):
                place_of(str(here / "folder/file"))
        finally:
            os.seteuid(0)


@pytest.mark.usefixtures("disks")
def test_inodes_of_128_bytes_have_no_birth(tmp_path: Path) -> None:
    with volume(make("ext4", tmp_path / "image", "-I", "128"), tmp_path / "a") as here:
        (here / "file").touch()
        found = place_of(str(here / "file"))
        assert found.birth == 0
        assert found.filesystem[:4] == b"ext4"


@pytest.mark.usefixtures("disks")
def test_a_uuid_of_zeros_is_none(tmp_path: Path) -> None:
    with volume(make("ext4", tmp_path / "image", "-U", "clear"), tmp_path / "a") as here:
        assert place_of(str(here)).filesystem == unnamed(here)


def test_file_systems_on_nothing_have_no_lasting_name(tmp_path: Path) -> None:
    require_root()
    with mounted("none", tmp_path / "a", "-t", "tmpfs") as here:
        (here / "file").touch()
        assert place_of(str(here / "file")).filesystem == unnamed(here / "file")


def test_overlayfs_has_no_lasting_name_and_a_file_that_is_written_to_gets_to_be_another(tmp_path: Path) -> None:
    require_root()
    lower, upper, work = (tmp_path / name for name in ("lower", "upper", "work"))
    for folder in (lower, upper, work):
        folder.mkdir()
    (lower / "file").write_bytes(b"x")
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    with mounted("none", tmp_path / "a", "-t", "overlay", "-o", options) as here:
        found = place_of(str(here / "file"))
        assert found.filesystem == unnamed(here / "file")
        (here / "file").write_bytes(b"y")
        assert place_of(str(here / "file")) != found


@pytest.mark.usefixtures("disks")
def test_overlayfs_with_the_numbers_of_the_file_system_below_it_is_told_from_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Linux 4.17 to 5.6 have it for a file of the upper layer; which of the two is seen first does not matter."""
    with volume(make("ext4", tmp_path / "image"), tmp_path / "a") as here:
        (here / "file").touch()
        assert place_of(str(here / "file")).filesystem[:4] == b"ext4"
        with monkeypatch.context() as patch:
            patch.setattr(filesystem, "_kind", lambda _: 0x794C7630)
            assert place_of(str(here / "file")).filesystem == unnamed(here / "file")
        assert place_of(str(here / "file")).filesystem[:4] == b"ext4"


# What it looks like to those who remember images.


@pytest.mark.usefixtures("disks")
def test_bitmaps_stay_as_they_are_where_a_file_system_comes_back_under_another_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_host(tmp_path, monkeypatch)
    image, where = make("ext4", tmp_path / "image"), tmp_path / "a"
    with volume(image, where):
        (where / "disk.raw").write_bytes(bytes(8 * MIB))
        dirtmap("node", "add", "disk", where / "disk.raw")
        dirtmap("add", "disk", "b")
        assert mapped("disk", "b") == []
        device = os.stat(where).st_dev
    assert mapped("disk", "b") == ALL
    with volume(image, where, behind=1):
        assert os.stat(where).st_dev != device
        assert mapped("disk", "b") == []
        assert dirtmap("list", "disk").error == ""


@pytest.mark.usefixtures("disks")
def test_an_image_on_a_copy_of_its_file_system_is_a_copy_where_both_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_host(tmp_path, monkeypatch)
    image, copy = make("ext4", tmp_path / "image"), tmp_path / "copy"
    with volume(image, tmp_path / "a") as here:
        create(here / "disk.qcow2", 8 * MIB)
        dirtmap("node", "add", "disk", here / "disk.qcow2")
        dirtmap("add", "disk", "b")
    shutil.copy(image, copy)
    with volume(image, tmp_path / "a") as here, volume(copy, tmp_path / "b", behind=1) as there:
        assert identity_of(str(here / "disk.qcow2")) == identity_of(str(there / "disk.qcow2"))
        assert "a copy of" in error_of("list", there / "disk.qcow2")
        assert "a twin of" in dirtmap("index", "scan", there).error
        assert mapped("disk", "b") == mapped(here / "disk.qcow2", "b") == []
    with volume(copy, tmp_path / "b", behind=1) as there:
        assert "is node 'disk' now" in dirtmap("index", "scan", there).error
        assert mapped("disk", "b") == []


# Without a file system of their own.


def test_a_path_its_links_and_its_descriptor_lead_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    os.link(path, tmp_path / "link")
    os.symlink(path, tmp_path / "symlink")
    (tmp_path / "other").touch()
    found = place_of(str(path))
    assert len(found.filesystem) == 16
    assert found.inode == os.stat(path).st_ino
    assert found == place_of(str(tmp_path / "link")) == place_of(str(tmp_path / "symlink"))
    assert found != place_of(str(tmp_path / "other"))
    with path.open() as file:
        assert place_of(file.fileno()) == found
    os.rename(path, tmp_path / "renamed")
    assert place_of(str(tmp_path / "renamed")) == found


def test_what_cannot_be_looked_at(tmp_path: Path) -> None:
    for path in (str(tmp_path / "nothing"), "a\0b"):
        with pytest.raises((OSError, ValueError)):
            place_of(path)


def test_a_library_without_statx_knows_no_birth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.touch()
    found = place_of(str(path))
    ctypes, libc = filesystem._libc()
    old = types.SimpleNamespace(fstatfs=libc.fstatfs)
    monkeypatch.setattr(filesystem, "_libc", lambda: (ctypes, old))
    assert place_of(str(path)) == found._replace(birth=0)
