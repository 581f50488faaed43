"""`dirtmap device`: another root, and what a device has after others have changed its root."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support import qemu
from support.cli import dirtmap, json_of
from support.hosts import ALL, KIB, MIB, SIZE, fill_device, make_host, mapped, names, refused


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_host(tmp_path, monkeypatch)
    return tmp_path


def test_another_root_makes_all_dirty_unless_the_content_is_unchanged() -> None:
    fill_device()
    for node in ("q0", "q1"):
        dirtmap("add", node, "b")
        dirtmap("mark", node, "b", 3 * MIB, 1)
    dirtmap("device", "set-root", "d0", "q1", "--content-unchanged")
    assert (mapped("d0", "b"), mapped("d0", "empty")) == ([(MIB, 64 * KIB)], [])
    assert json_of("device", "list")[0]["root"] == "q1"
    dirtmap("device", "set-root", "d0", "one")
    assert (mapped("d0", "b"), mapped("d0", "empty")) == (ALL, ALL)
    assert json_of("device", "list")[0]["root"] == "one"
    dirtmap("clear", "d0", "b")
    dirtmap("mark", "d0", "b", 0, 1)
    dirtmap("device", "set-root", "d0", "q0", "--content-unchanged")
    assert (mapped("d0", "b"), mapped("d0", "empty")) == ([(0, 64 * KIB)], ALL)
    # Bitmaps of nodes never moved.
    assert [mapped(node, "b") for node in ("q0", "q1")] == [[(3 * MIB, 64 * KIB)]] * 2
    assert names("one") == []
    dirtmap("node", "remove", "one")


def test_a_root_of_another_size() -> None:
    fill_device()
    for name, size in (("large", 2 * SIZE), ("small", SIZE // 2)):
        qemu.create(Path(f"{name}.qcow2"), size)
        dirtmap("node", "add", name, f"{name}.qcow2")
        message = refused("device", "set-root", "d0", name, "--content-unchanged")
        assert "the content is not unchanged" in message
        dirtmap("device", "set-root", "d0", name)
        assert mapped("d0", "b") == mapped("d0", "empty") == [(0, size)]
        assert json_of("list", "d0")[0]["virtual-size"] == size
        assert json_of("device", "list")[0]["virtual-size"] == size
        assert json_of("check", "default.dmap")["findings"] == []


def test_the_content_is_not_unchanged_where_the_old_root_was_changed_by_others() -> None:
    """`--content-unchanged` vouches for this step only."""
    fill_device()
    os.utime("q0.qcow2", ns=(1, 1))
    dirtmap("device", "set-root", "d0", "q1", "--content-unchanged")
    assert mapped("d0", "b") == ALL


def test_a_root_written_by_others_makes_a_device_all_dirty() -> None:
    fill_device()
    qemu.qemu_io(Path("q0.qcow2"), "write 0 64k")
    assert "changed while nobody tracked it" in dirtmap("list", "d0").error
    assert mapped("d0", "b") == ALL
    dirtmap("recover", "d0")
    dirtmap("clear", "d0", "b")
    assert mapped("d0", "b") == []


def test_bitmaps_in_the_root_change_and_the_device_is_as_right_as_before() -> None:
    fill_device()
    for target in ("q0", "q0.qcow2"):
        dirtmap("add", target, "x")
        dirtmap("mark", target, "x", 0, 1)
        dirtmap("rename", target, "x", "y")
        dirtmap("copy", "one", "none", "q0", status=1)
        dirtmap("copy", "d0", "b", target)
        dirtmap("move", "d0", "b", target, "--as", "z")
        assert mapped("d0", "empty") == []
        dirtmap("move", target, "z", "d0", "--as", "b")
        assert mapped("d0", "b") == [(MIB, 64 * KIB)]
        dirtmap("remove", target, "b")
        dirtmap("remove", target, "y")
        document = {"actions": [{"type": "block-dirty-bitmap-add", "data": {"node": target, "name": "t"}}]}
        dirtmap("transaction", "-", given=json.dumps(document))
        dirtmap("node", "rename", "q0", "qq", "--with-bitmaps")
        dirtmap("node", "rename", "qq", "q0", "--with-bitmaps")
        dirtmap("remove", target, "t")
    assert (mapped("d0", "b"), mapped("d0", "empty")) == ([(MIB, 64 * KIB)], [])


def test_a_device_in_another_store() -> None:
    dirtmap("device", "add", "d1", "--root", "other", "--store", "other.dmap")
    dirtmap("add", "d1", "b")
    assert json_of("list", "d1")[0]["bitmaps"][0]["device"] == "d1"
    assert "root of device 'd1'" in refused("node", "remove", "other")
    assert "remove or move them first" in refused("device", "remove", "d1")
    dirtmap("device", "set-root", "d1", "q0")
    assert mapped("d1", "b") == ALL
    assert [(d["name"], d["root"]) for d in json_of("device", "list")] == [("d0", "q0"), ("d1", "q0")]
    dirtmap("clear", "d1", "b")
    dirtmap("add", "q0", "x")
    assert mapped("d1", "b") == []
    assert "the name is taken" in refused("device", "add", "d1", "--root", "one")
