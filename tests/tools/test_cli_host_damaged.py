"""Names across a host where a store or an image is damaged or replaced: only its own names are gone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support import qemu
from support.cli import dirtmap, error_of, json_of
from support.hosts import KIB, SIZE, make_host, mapped, names, refused

import dirtmap.engine as dm


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_host(tmp_path, monkeypatch)
    return tmp_path


def _without_table(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: 16 * KIB] + bytes(len(data) - 16 * KIB))


def _without_headers(path: Path) -> None:
    path.write_bytes(bytes(16 * KIB) + path.read_bytes()[16 * KIB :])


def _text(path: Path) -> None:
    path.write_text("hello\n")


def _cut(path: Path) -> None:
    os.truncate(path, 10 * KIB)


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("damage", [_without_table, _without_headers, _text, _cut])
def test_a_damaged_store_hides_only_its_own_names(damage: Callable[[Path], None], indexed: bool) -> None:
    for target in ("one", "other", "q0"):
        dirtmap("add", target, "b")
    assert len(json_of("find", "b")) == 3
    damage(Path("other.dmap"))
    told = "other.dmap: "
    commands: list[tuple[str | int, ...]] = [
        *(("list", "other"), ("list", "nothing"), ("node", "rename", "two", "new"), ("node", "add", "new", "two.raw")),
        *(("node", "add", "other", "two.raw"), ("device", "add", "new", "--root", "two"), ("node", "remove", "two")),
    ]
    for command in [("list", "one"), ("map", "d0"), ("find",), ("list",), ("node", "list"), *commands]:
        if not indexed:
            shutil.rmtree("index")
        if command in commands:
            assert told in refused(*command), command
        elif command[0] == "list" and len(command) > 1:
            assert names("one") == ["b"]
        elif command[0] == "map":
            dirtmap("add", "d0", "x")
            assert mapped("d0", "x") == []
        else:
            done = dirtmap(*command, *["b"] * (command[0] == "find"), status=1)
            assert told in done.error
            assert done.error.count("\n") == 1
            assert "one" in done.out
            assert "q0" in done.out
            assert "other" not in done.out
    assert told in dirtmap("index", "rebuild").error
    done = dirtmap("index", "verify")
    assert "all as the containers say" in done.out
    assert done.error.startswith("dirtmap: left out: ")
    assert told in done.error
    with dm.Lookup(dm.this_host()) as lookup:
        assert lookup.find("one", "b")
        with pytest.raises(dm.Error, match=r"other\.dmap"):
            lookup.find("other", "b")


@pytest.mark.parametrize("damage", [_without_table, _without_headers, _text])
def test_a_store_that_is_none_any_more_is_forgotten_by_a_scan(damage: Callable[[Path], None]) -> None:
    whole = Path("other.dmap").read_bytes()
    damage(Path("other.dmap"))
    Path("elsewhere").mkdir()
    assert json_of("index", "scan", "elsewhere")["damaged"] == []
    assert "other.dmap" in refused("list", "nothing")
    for again in (False, True):
        found = [Path(item["filename"]).name for item in json_of("index", "scan", ".")["damaged"]]
        assert found == ([] if again and damage is not _without_table else ["other.dmap"])
    if damage is not _without_table:
        assert "neither a file nor a node" in refused("list", "other")
        Path("three.raw").write_bytes(bytes(1 << 20))
        dirtmap("node", "add", "other", "three.raw")
        dirtmap("node", "remove", "other")
    Path("other.dmap").write_bytes(whole)
    dirtmap("index", "scan", ".")
    assert names("other") == []


def test_a_damaged_default_store_says_what_to_do() -> None:
    _without_table(Path("default.dmap"))
    for command in (["list", "one"], ["find", "b"], ["list"], ["node", "add", "x", "one.raw"], ["index", "scan", "."]):
        assert "'check -r all' may mend it, or 'index scan' make another once it is moved away" in refused(*command)
    dirtmap("check", "-r", "all", "default.dmap")
    dirtmap("index", "scan", ".")
    assert names("q0") == []
    _text(Path("default.dmap"))
    for command in (["list", "q0"], ["node", "add", "x", "one.raw"], ["index", "scan", "."], ["node", "list"]):
        assert refused(*command).count("'index scan' makes another once it is moved away") == 1
        assert "check -r" not in refused(*command)
    os.rename("default.dmap", "away")
    dirtmap("index", "scan", ".")
    assert (names("q0"), names("other")) == ([], [])


def test_without_a_default_store_nothing_is_said_to_be_right() -> None:
    os.remove("default.dmap")
    for command in (["list", "one"], ["map", "q0", "b"], ["list", "node:one"]):
        message = refused(*command)
        assert "default.dmap" in message
        assert "'index scan' makes one" in message
    assert dm.this_host()._parts.stores.index.seen(b"x" * 16) is None
    before = dm.this_host()._parts.stores.index.all_seen()
    assert before
    for command in (["index", "verify"], ["index", "rebuild"]):
        message = refused(*command)
        assert "default.dmap: there is no default store" in message
        assert "'index scan' makes one" in message
    assert dm.this_host()._parts.stores.index.all_seen() == before
    for command in (["node", "list"], ["device", "list"], ["list"], ["find", "b"]):
        assert "default.dmap: no such store" in refused(*command)


def overwritten(path: str, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


DAMAGES: dict[str, tuple[Callable[[str], object], str]] = {
    "no image": (lambda path: Path(path).write_bytes(b"zz"), "header.magic: not a qcow2 image"),
    "empty": (lambda path: Path(path).write_bytes(b""), "header.magic: not a qcow2 image"),
    "another version": (lambda path: overwritten(path, 4, b"\0\0\0\x09"), "header.version: 9 is neither 2 nor 3"),
    "a broken chain": (lambda path: overwritten(path, 112, b"\1\2\3\4\xff"), "header extensions: "),
    "another image": (lambda path: qemu.create(Path(path), SIZE), "is not its image any more"),
    "a store": (lambda path: [os.remove(path), dirtmap("store", "create", path)], "is not its image any more"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_replaced_image_is_named_as_that_and_forgotten(damage: str) -> None:
    act, said = DAMAGES[damage]
    dirtmap("add", "q1", "b")
    act("q1.qcow2")
    data = Path("q1.qcow2").read_bytes()
    for command in (("list", "q1"), ("map", "q1", "b"), ("add", "q1", "c"), ("recover", "q1"), ("clear", "q1", "b")):
        assert said in error_of(*command), command
    assert said in error_of("device", "add", "d1", "--root", "q1")
    if said == "is not its image any more":
        assert "'index scan' finds one that was moved" in error_of("check", "q1")
        assert "'index scan' finds one that was moved" in error_of("dump", "q1")
    else:
        assert said in json_of("dump", "q1")["stopped"] or said.split(":")[0] in json_of("dump", "q1")["stopped"]
        assert "q1.qcow2" in (error_of("check", "q1") if "magic" in said else dirtmap("check", "q1", status=2).out)
    dirtmap("node", "remove", "q1")
    assert Path("q1.qcow2").read_bytes() == data
    assert "q1" not in {node["name"] for node in json_of("node", "list")}
    os.remove("q1.qcow2")
    qemu.create(Path("q1.qcow2"), SIZE)
    dirtmap("node", "add", "q1", "q1.qcow2")


def test_an_image_with_bad_bitmaps_is_not_forgotten() -> None:
    """They can be mended, and it has its identity."""
    dirtmap("add", "q1", "b")
    (entry,) = (s for s in json_of("dump", "q1")["structures"] if s["name"].startswith("directory entry"))
    overwritten("q1.qcow2", entry["offset"] + 12, b"\xff\xff\xff\xff")
    assert "flags" in error_of("node", "remove", "q1")
    dirtmap("check", "-r", "all", "q1")
    dirtmap("node", "remove", "q1")
