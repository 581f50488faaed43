"""File systems whose locks nobody sees: what needs none works there, and all else is refused, or insisted on."""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.cli import dirtmap, error_of
from support.qemu import create

import dirtmap.engine as dm
from dirtmap.engine.model import changes
from dirtmap.engine.system import file, mounts

MIB = 1 << 20
OFD = (fcntl.F_OFD_SETLK, fcntl.F_OFD_SETLKW, fcntl.F_OFD_GETLK)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A qcow2 image and a node, with a bitmap ``b`` each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIRTMAP_STORE", "default.dmap")
    monkeypatch.setenv("DIRTMAP_INDEX", "index")
    create(tmp_path / "disk.qcow2", MIB)
    Path("one.raw").write_bytes(bytes(MIB))
    dirtmap("node", "add", "one", "one.raw")
    for target in ("one", "disk.qcow2"):
        dirtmap("add", target, "b")
    return tmp_path


def _refusing(number: int) -> Callable[[pytest.MonkeyPatch, Path], str]:
    def prepare(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
        real = fcntl.fcntl

        def refuse(fd: int, command: int, *rest: Any) -> Any:
            if command in OFD:
                raise OSError(number, os.strerror(number))
            return real(fd, command, *rest)

        monkeypatch.setattr(fcntl, "fcntl", refuse)
        return os.strerror(number)

    return prepare


def _mounted(kind: str, mount: str, options: str, said: str) -> Callable[[pytest.MonkeyPatch, Path], str]:
    def prepare(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
        mountinfo = folder / "mountinfo"
        mountinfo.write_text(
            f"21 1 8:1 / / rw - ext4 /dev/root rw\n9 1 0:77 / /mnt {mount} shared:1 - {kind} s {options}\n"
        )
        monkeypatch.setattr(mounts, "MOUNTINFO", str(mountinfo))
        monkeypatch.setattr(os, "major", lambda device: 0)
        monkeypatch.setattr(os, "minor", lambda device: 77)
        return f"on {kind} with the mount option '{said}'"

    return prepare


WAYS = {
    "EOPNOTSUPP": _refusing(errno.EOPNOTSUPP),
    "ENOLCK": _refusing(errno.ENOLCK),
    "EINVAL": _refusing(errno.EINVAL),
    "nfs nolock": _mounted("nfs", "rw,relatime", "rw,vers=3,nolock,addr=::1", "nolock"),
    "nfs local_lock": _mounted("nfs", "rw", "rw,vers=3,local_lock=all", "local_lock=all"),
    "cifs nobrl": _mounted("cifs", "rw", "rw,nobrl", "nobrl"),
}


@pytest.fixture(params=WAYS)
def why(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Why there are no locks."""
    monkeypatch.setattr(file, "_lock_faults", {})  # what was found of the same file system a moment ago
    return WAYS[request.param](monkeypatch, folder)


READ_ALL_THE_SAME = [
    ("list", "-U", "disk.qcow2"),
    ("map", "-U", "disk.qcow2", "b"),
    ("check", "-U", "disk.qcow2"),
    ("dump", "disk.qcow2"),
    ("dump", "-U", "disk.qcow2"),
    ("list", "one"),  # a store is read without locks
    ("dump", "default.dmap"),
]
REFUSED = [
    ("list", "disk.qcow2"),
    ("map", "disk.qcow2", "b"),
    ("check", "disk.qcow2"),
    ("check", "-r", "all", "disk.qcow2"),
    ("mark", "disk.qcow2", "b", "0", "1"),
    ("mark", "one", "b", "0", "1"),
    ("store", "compact", "default.dmap"),
]


def test_some_commands_read_all_the_same(why: str) -> None:
    for command in READ_ALL_THE_SAME:
        dirtmap(*command)


def test_others_are_refused_with_the_reason_or_insist(why: str) -> None:
    for command in REFUSED:
        error = error_of(*command)
        assert why in error
        assert "--no-lock" in error
        dirtmap(*command, "--no-lock")


def test_each_call_insists(why: str) -> None:
    with pytest.raises(dm.UnsupportedError, match=re.escape(why)):
        dm.check("disk.qcow2")
    with dm.open("disk.qcow2", lock=False) as image, image.transaction() as bitmaps:
        changes.add(bitmaps, "opened", None)
    with dm.transaction(["disk.qcow2"], lock=False) as transactions:
        changes.add(transactions["disk.qcow2"], "changed", None)
    with dm.this_host(lock=False) as host:
        assert host.describe("disk.qcow2").bitmaps == dm.describe("disk.qcow2", lock=False).bitmaps
    assert dm.check("disk.qcow2", lock=False).corruptions == 0
    assert dm.recover("disk.qcow2", lock=False) == []
    assert dm.dump("disk.qcow2", lock=False)


def test_a_program_insists(why: str) -> None:
    for target in ("disk.qcow2", "one"):
        with dm.Host(lock=False) as host, host.open(target) as image:
            with image.transaction() as bitmaps:
                changes.add(bitmaps, "new", None)
            assert "new" in image


def test_no_lock_does_not_keep_locks_from_being_taken_where_there_are(folder: Path) -> None:
    with (
        dm.Host(lock=False, wait=0) as host,
        host.open("disk.qcow2", force_share=True) as image,
        image.transaction(),
    ):
        error_of("mark", "disk.qcow2", "b", "0", "1", "--wait", "0", "--no-lock")


def test_nfs_with_locks_is_used_as_any_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "_lock_faults", {})
    _mounted("nfs4", "rw", "rw,vers=4.2,local_lock=none", "")(monkeypatch, folder)
    dirtmap("mark", "disk.qcow2", "b", "0", "1")
