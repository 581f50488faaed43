"""Nodes whose place or bitmaps are in another store than the default one: as safe there, and named as uniquely."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support import qemu
from support.cli import COMMAND, dirtmap, error_of, json_of

import dirtmap.engine as dm
from dirtmap.engine.storefile.file import Store, create

KIB, MIB = 1 << 10, 1 << 20
SIZE = 8 * MIB


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A qcow2 node `x` whose place is in another store, with a bitmap; and the usual default store, which knows it."""
    monkeypatch.chdir(tmp_path)
    qemu.create(Path("a.qcow2"), SIZE)
    create("other.dmap")
    dirtmap("node", "add", "x", "a.qcow2", "--store", "other.dmap")
    dirtmap("add", "x", "b")
    return tmp_path


def names(target: str) -> list[str]:
    return [bitmap["name"] for bitmap in json_of("list", target)[0]["bitmaps"]]


def mapped(target: str, name: str) -> list[tuple[int, int]]:
    return [(e["offset"], e["length"]) for e in json_of("map", "--dirty", target, name)]


@pytest.mark.parametrize("holder", [[], ["--store", "other.dmap"]])
def test_a_hold_counts_whichever_store_is_chosen(holder: list[str]) -> None:
    command = [COMMAND, "hold", *holder, "x", "b", "--", "sh", "-c", "echo held; read line"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE) as holding:
        assert holding.stdout
        assert holding.stdout.readline() == b"held\n"
        for target in ("x", "a.qcow2", "./a.qcow2"):
            for store in ([], ["--store", "other.dmap"]):
                assert "busy: held by" in error_of("remove", *store, target, "b")
        assert json_of("list", "x")[0]["bitmaps"][0]["busy"]
        holding.communicate(b"\n")
    assert holding.returncode == 0
    dirtmap("remove", "x", "b")


def test_a_hold_in_the_default_store_counts_where_another_is_chosen() -> None:
    qemu.create(Path("d.qcow2"), SIZE)
    dirtmap("node", "add", "d", "d.qcow2")
    dirtmap("add", "d", "b")
    with dm.open("d").hold("b"):
        for store in ("other.dmap", "none.dmap"):
            assert "busy: held by" in error_of("remove", "d.qcow2", "b", "--store", store)


def test_a_twin_of_an_image_of_another_store() -> None:
    shutil.copy("a.qcow2", "c.qcow2")
    for act in (["list"], ["add", "foo"], ["map", "b"], ["recover"]):
        assert "a copy of" in error_of(act[0], "c.qcow2", *act[1:])
    (twin,) = json_of("index", "scan", ".")["twins"]
    assert [os.path.basename(twin[key]) for key in ("filename", "original")] == ["c.qcow2", "a.qcow2"]
    dirtmap("node", "add", "--new-identity", "y", "c.qcow2")
    assert names("c.qcow2") == names("a.qcow2") == ["b"]


def test_a_device_on_an_image_of_another_store_stays_right() -> None:
    dirtmap("device", "add", "d", "--root", "x")
    dirtmap("add", "d", "m")
    dirtmap("add", "x", "more")
    dirtmap("remove", "a.qcow2", "more")
    assert mapped("d", "m") == []


def test_a_moved_image_of_another_store(tmp_path: Path) -> None:
    dirtmap("mark", "x", "b", MIB, 1)
    dirtmap("device", "add", "d", "--root", "x")
    dirtmap("add", "d", "m")
    os.rename("a.qcow2", "b.qcow2")
    done = json_of("index", "scan", ".")
    assert [(os.path.basename(each["filename"]), each["node"]) for each in done["moved"]] == [("b.qcow2", "x")]
    assert (done["new"], done["gone"]) == (0, [])
    assert mapped("d", "m") == [(0, SIZE)]  # the new name came with a new time of the last change
    dirtmap("device", "set-root", "d", "x", "--content-unchanged")
    for _ in range(2):
        assert mapped("x", "b") == [(MIB, 64 * KIB)]
        assert mapped("d", "m") == []
        assert [node["name"] for node in json_of("node", "list")] == ["x"]
        shutil.rmtree(tmp_path / "index")
    with Store("default.dmap") as target:
        assert target.record(b"x") is None


def test_an_image_and_the_store_that_has_its_place_are_found_together() -> None:
    os.remove("default.dmap")
    done = json_of("index", "scan", ".")
    assert done["new"] == 1
    assert [node["name"] for node in json_of("node", "list")] == ["x"]
    assert names("x") == ["b"]


@pytest.mark.parametrize("store", [{}, {"store": "other.dmap"}])
def test_tracking_an_image_of_another_store(store: dict[str, Any]) -> None:
    with dm.open("x", **store).track() as tracker:
        tracker.mark(2 * MIB, 1)
        tracker.save()
        assert "is tracked by" in dirtmap("list", "x").error
    assert mapped("x", "b") == [(2 * MIB, 64 * KIB)]


# Names are unique.


def _raw(*files: str) -> None:
    for name in files:
        Path(name).write_bytes(bytes(SIZE))


def test_a_name_of_the_default_store_is_taken_where_another_is_chosen() -> None:
    _raw("r.raw", "s.raw")
    create("new.dmap")
    dirtmap("node", "add", "r", "r.raw")
    dirtmap("node", "add", "t", "s.raw", "--store", "other.dmap")
    qemu.create(Path("q.qcow2"), SIZE)
    for store in ("new.dmap", "other.dmap"):
        for name in ("r", "t", "x"):
            for image in ("s.raw", "q.qcow2"):
                assert "the name is taken" in error_of("node", "add", name, image, "--store", store)
        assert "the name is taken" in error_of("device", "add", "r", "--root", "t", "--store", "other.dmap")
    assert "the name is taken" in error_of("node", "rename", "t", "r", "--store", "other.dmap")
    assert "the name is taken" in error_of("node", "add", "x", "a.qcow2", "--store", "new.dmap")
    assert names("q.qcow2") == []
    dirtmap("node", "add", "x", "a.qcow2", "--store", "other.dmap")


def test_a_chosen_store_is_of_use_where_the_usual_one_is_not() -> None:
    Path("default.dmap").write_bytes(b"DMS\xfc" + bytes(20_000))
    qemu.create(Path("q.qcow2"), SIZE)
    dirtmap("node", "add", "q", "q.qcow2", "--store", "other.dmap")
    dirtmap("add", "q", "b", "--store", "other.dmap")
    assert len(json_of("find", "b", "--store", "other.dmap")) == 2


def test_a_scan_tells_of_stores_whose_names_are_anothers(tmp_path: Path) -> None:
    _raw("r.raw", "s.raw")
    dirtmap("node", "add", "r", "r.raw")
    elsewhere = {"DIRTMAP_STORE": str(tmp_path / "found.dmap"), "DIRTMAP_INDEX": str(tmp_path / "elsewhere")}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in elsewhere.items():
            patch.setenv(key, value)
        dirtmap("node", "add", "r", "s.raw")
        dirtmap("add", "r", "s")
    for new in (1, 0):
        done = json_of("index", "scan", ".")
        assert [(os.path.basename(each["filename"]), each["node"]) for each in done["clashes"]] == [("found.dmap", "r")]
        assert done["new"] == new
    assert "its name 'r' is another's" in dirtmap("index", "scan", ".").error
    dirtmap("node", "rename", "--with-bitmaps", "r", "r2", "--store", "found.dmap")
    assert json_of("index", "scan", ".")["clashes"] == []
    assert names("r2") == ["s"]


def test_a_scan_tells_of_the_names_of_a_copied_store() -> None:
    _raw("r.raw")
    dirtmap("node", "add", "r", "r.raw")
    shutil.copy("default.dmap", "copy.dmap")
    dirtmap("store", "new-identity", "copy.dmap")
    done = json_of("index", "scan", ".")
    assert [(os.path.basename(each["filename"]), each["node"]) for each in done["clashes"]] == [("copy.dmap", "r")]
    assert error_of("device", "add", "r", "--root", "r").endswith("the name is taken")


def test_an_image_whose_name_another_store_has_is_not_taken() -> None:
    _raw("r.raw")
    dirtmap("node", "add", "r", "r.raw", "--store", "other.dmap")
    qemu.create(Path("q.qcow2"), SIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIRTMAP_STORE", str(Path("elsewhere.dmap").absolute()))
        patch.setenv("DIRTMAP_INDEX", str(Path("elsewhere").absolute()))
        dirtmap("node", "add", "r", "q.qcow2")
    os.remove("elsewhere.dmap")
    done = json_of("index", "scan", ".")
    assert [(os.path.basename(each["filename"]), each["node"]) for each in done["clashes"]] == [("q.qcow2", "r")]
    assert sorted(node["name"] for node in json_of("node", "list")) == ["r", "x"]


def test_a_new_identity_is_for_copies(folder: Path) -> None:
    """The original's tracker, holds and devices know it by the identity that it has."""
    for store in ([], ["--store", "other.dmap"]):
        error = error_of("node", "add", *store, "--new-identity", "z", "a.qcow2")
        assert "is node 'x' itself, and no copy" in error
    with dm.open("x") as image, image.track() as tracker:
        assert "no copy" in error_of("node", "add", "--new-identity", "z", "./a.qcow2")
        tracker.mark(0, 1)
    assert mapped("x", "b") == [(0, 65536)]
    shutil.copy("a.qcow2", "c.qcow2")
    dirtmap("node", "add", "--new-identity", "z", "c.qcow2")
    assert mapped("z", "b") == [(0, 65536)]


def test_a_device_counts_whichever_store_is_chosen() -> None:
    create("third.dmap")
    dirtmap("device", "add", "d", "--root", "x")
    dirtmap("add", "d", "m")
    for store in ([], ["--store", "other.dmap"], ["--store", "third.dmap"]):
        dirtmap("add", *store, "a.qcow2", f"n{len(store) and store[1]}")
        assert json_of("list", "d")[0]["bitmaps"][0]["count"] == 0  # a change of dirtmap's own
    for name in names("x"):
        dirtmap("remove", "x", name)
    for store in ([], ["--store", "other.dmap"]):
        assert "root of device 'd'" in error_of("node", "remove", *store, "x")


def test_a_refused_name_leaves_no_store_behind() -> None:
    Path("r.raw").write_bytes(bytes(SIZE))
    assert "the name is taken" in error_of("node", "add", "x", "r.raw", "--store", "new.dmap")
    assert "there is no such node" in error_of("device", "add", "d", "--root", "nothing", "--store", "new.dmap")
    assert not Path("new.dmap").exists()


@pytest.mark.parametrize("act", ["check", "compact", "new-identity"])
def test_a_rollback_that_another_index_has_seen_is_found(act: str) -> None:
    """Whoever always says which index is told by that one."""
    where = ["--store", "mine.dmap", "--index", "mine"]
    Path("r.raw").write_bytes(bytes(SIZE))
    create("mine.dmap")
    dirtmap("node", "add", *where, "r", "r.raw")
    dirtmap("add", *where, "r", "m")
    shutil.copy("mine.dmap", "old")
    dirtmap("mark", *where, "r", "m", "0", "1")
    shutil.copyfile("old", "mine.dmap")  # its place stays: see test_store_copies
    if act == "check":
        with open("mine.dmap", "r+b") as file:  # one header copy, so that there is something to mend
            file.seek(100)
            file.write(b"damage")
        dm.check("mine.dmap", store="mine.dmap", index="mine", repair="all")
    else:
        dirtmap("store", act, "--index", "mine", "mine.dmap")
    with dm.open("r", store="mine.dmap", index="mine") as image:
        assert image["m"].count == SIZE
