"""Images of other formats are not taken for raw disks: what is written to them as raw would destroy them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import qemu
from support.cli import dirtmap, error_of, json_of

import dirtmap.engine as dm

MIB = 1 << 20
CLOOP = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"
VMDK_TEXT = b"# Disk DescriptorFile\n\n# as VMware has it\nversion=1\nCID=fffffffe\n"

# Format of qemu-img, its options, and what the message calls it.
MADE = [
    ("vmdk", "subformat=monolithicSparse", "a VMDK image"),
    ("vmdk", "subformat=monolithicFlat", "a VMDK descriptor"),
    ("vmdk", "subformat=streamOptimized", "a VMDK image"),
    ("vpc", "subformat=dynamic", "a VHD (VPC) image"),
    ("vpc", "subformat=fixed", "a VHD (VPC) image"),
    ("vhdx", "", "a VHDX image"),
    ("vdi", "", "a VDI image"),
    ("qed", "", "a QED image"),
    ("parallels", "", "a Parallels image"),
    ("qcow", "", "a qcow image of version 1"),
    ("qcow2", "", "a qcow2 image"),
]

# What is at which offset (from the end, where negative), and what the message calls it.
BY_HAND = [
    (0, b"COWD", "a VMDK image"),
    (0, VMDK_TEXT, "a VMDK descriptor"),
    (0, b"WithouFreSpacExt", "a Parallels image"),
    (0, b"Bochs Virtual HD Image\0", "a Bochs image"),
    (0, CLOOP, "a cloop image"),
    (-511, b"conectix", "a VHD (VPC) image"),
    (-512, b"koly\0\0\0\4\0\0\2\0", "a DMG image"),
    (-700, b"koly\0\0\0\4\0\0\2\0", "a DMG image"),
    (0, b"DMLCTRL2", "a tracker's live file"),
    (0, b"DMLARENA", "a tracker's live file"),
    (0, b"DMLMARKS", "a tracker's live file"),
    (0, b"DML\xfb", "a tracker's intent log"),
]

# What looks like one of them from afar, and is a raw disk.
RAW = [
    (0, b"LUKS\xba\xbe\0\2"),  # an encrypted disk: a guest or dm-crypt writes to it as to a raw one
    (0, b"# a file of text\nversion=4\n"),
    (0, b"# a file of text\nand more\nversion=1\n"),
    (1, b"QFI\xfb\0\0\0\3"),
    (512, b"conectix"),
    (-1024, b"conectix"),
    (-512, b"koly"),
    (0, b"\xeb\x63\x90"),  # a boot sector
    (16, b"\xde\xc0\xef\xbe"),
]


def made_by_hand(path: Path, offset: int, content: bytes) -> None:
    path.write_bytes(bytes(MIB))
    with path.open("r+b") as file:
        file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        file.write(content)


def require_refused(path: Path, what: str) -> None:
    """Both commands refuse it and change nothing, both insist if they are told to."""
    before, store = path.read_bytes(), path.with_name("s.dmap")
    sidecar = path.with_name("sidecar.qcow2")
    refused = f"{path}: {what}, and not a raw disk: "
    assert error_of("sidecar", path, sidecar).startswith(refused)
    assert not sidecar.exists()
    host = dm.Host(store=store, index=path.with_name("index"))
    with host, pytest.raises(dm.FormatError, match="not a raw disk"):
        host.add_node("n", str(path))
    assert host.nodes([]) == []
    arguments = "--store", store, "--index", path.with_name("index")
    if what not in ("a qcow2 image", "a qcow image of version 1"):  # of these it is told what is wrong with them
        assert error_of("node", "add", "n", path, *arguments).startswith(refused)
    size = path.stat().st_size
    with path.with_name("sound").open("wb") as sound:
        sound.truncate(size)
    dirtmap("node", "add", "moved", sound.name, *arguments)
    assert error_of("node", "relocate", "moved", path, *arguments).startswith(refused)
    dirtmap("node", "relocate", "--raw", "moved", path, *arguments)
    dirtmap("node", "relocate", "moved", path.rename(path.with_name("again")), *arguments)  # the file that it had
    dirtmap("node", "remove", "moved", *arguments)
    path.with_name("again").rename(path)
    dirtmap("node", "add", "--raw", "n", path, *arguments)
    dirtmap("add", "node:n", "b", *arguments)
    (shown,) = json_of("list", "node:n", *arguments)
    assert shown["virtual-size"] == path.stat().st_size
    if len(before) % 512 == 0:
        dirtmap("sidecar", "--raw", path, sidecar)
        assert qemu.info(sidecar)["virtual-size"] == len(before)
    assert path.read_bytes() == before


@pytest.mark.parametrize(("kind", "options", "what"), MADE, ids=[f"{kind}-{options}" for kind, options, _ in MADE])
def test_images_of_qemu_img_are_refused(tmp_path: Path, kind: str, options: str, what: str) -> None:
    path = tmp_path / "disk"
    qemu.qemu_img("create", "-q", "-f", kind, *(["-o", options] if options else []), path, "4M")
    require_refused(path, what)


@pytest.mark.parametrize(("offset", "content", "what"), BY_HAND)
def test_other_marks_are_refused(tmp_path: Path, offset: int, content: bytes, what: str) -> None:
    made_by_hand(tmp_path / "disk", offset, content)
    require_refused(tmp_path / "disk", what)


def test_files_of_dirtmap_are_refused(tmp_path: Path) -> None:
    dm.create_store(str(tmp_path / "other.dmap"))
    assert ": a dirtmap store, and not a raw disk" in error_of("sidecar", tmp_path / "other.dmap", tmp_path / "q")
    with dm.Host(store=tmp_path / "s.dmap", index=tmp_path / "index") as host:
        (tmp_path / "raw").write_bytes(bytes(MIB))
        host.add_node("raw", str(tmp_path / "raw"))
        assert host.locate("raw").node == "raw"
    data = tmp_path / "index/data.mdb"
    assert ": an LMDB database, as an index has, and not" in error_of("sidecar", data, tmp_path / "q")
    arguments = "--store", tmp_path / "s.dmap", "--index", tmp_path / "index"
    assert "not a raw disk" in error_of("node", "add", "n", data, *arguments)


@pytest.mark.parametrize(("offset", "content"), RAW)
def test_raw_disks_are_not(tmp_path: Path, offset: int, content: bytes) -> None:
    path = tmp_path / "disk"
    made_by_hand(path, offset, content)
    dirtmap("sidecar", path, tmp_path / "sidecar.qcow2")
    dirtmap("node", "add", "n", path, "--store", tmp_path / "s.dmap", "--index", tmp_path / "index")


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513])
def test_short_files_are_raw(tmp_path: Path, size: int) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(size))
    dirtmap("node", "add", "n", path, "--store", tmp_path / "s.dmap", "--index", tmp_path / "index")
