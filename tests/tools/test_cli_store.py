"""`dirtmap store`, `node`, and the bitmap commands on nodes of a store."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

import pytest
from support import qemu
from support.cli import dirtmap, error_of, json_of

import dirtmap.engine as dm
from dirtmap.fmt import store
from dirtmap.fmt.parsers.directory import DIRECTORY_ENTRY

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with two nodes, which is the default one, and a qcow2 image."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIRTMAP_STORE", "default.dmap")
    for name in ("one.raw", "two.raw"):
        Path(name).touch()
        os.truncate(name, GIB)
    qemu.create(Path("disk.qcow2"), GIB)
    dirtmap("store", "create", "default.dmap")
    dirtmap("node", "add", "one", "one.raw")
    dirtmap("node", "add", "two", "two.raw")
    return tmp_path


def mapped(target: str, name: str) -> list[tuple[int, int]]:
    return [(e["offset"], e["length"]) for e in json_of("map", "--dirty", target, name)]


def test_every_bitmap_command_works_on_a_node() -> None:
    dirtmap("add", "one", "a", "-g", "128K", "--disabled")
    dirtmap("mark", "one", "a", "1M", "1")
    dirtmap("add", "one", "b")
    dirtmap("mark", "one", "b", "0", "64K")
    dirtmap("merge", "one", "a", "b")
    assert mapped("one", "a") == [(0, 128 * KIB), (MIB, 128 * KIB)]
    dirtmap("clear", "one", "b")
    dirtmap("rename", "one", "b", "c")
    dirtmap("disable", "one", "c")
    dirtmap("enable", "one", "a")
    bitmaps = json_of("list", "one")[0]["bitmaps"]
    assert all(uuid.UUID(bitmap.pop("uuid")) and bitmap.pop("generation") > 3 for bitmap in bitmaps)
    assert bitmaps == [
        {
            **{"name": name, "granularity": granularity, "flags": flags, "recording": bool(flags)},
            **{"inconsistent": False, "damaged": False, "busy": False, "count": count},
            **{"checkpoint": False, "began": None, "since": None},
            **{"namespace": json_of("node", "list")[0]["uuid"], "node": "one"},
        }
        for name, granularity, flags, count in (("a", 128 * KIB, ["auto"], 256 * KIB), ("c", 64 * KIB, [], 0))
    ]
    dirtmap("remove", "one", "c")
    dirtmap("copy", "one", "a", "one", "--as", "again")
    assert [b["name"] for b in json_of("list", "default.dmap")[0]["bitmaps"]] == ["a", "again"]
    assert json_of("check", "default.dmap")["findings"] == []
    assert dirtmap("recover", "one").status == 0


def test_recover_of_a_whole_store_asks_for_a_node() -> None:
    before = Path("default.dmap").read_bytes()
    assert error_of("recover", "default.dmap") == "default.dmap: a store of many images: name one of its nodes"
    assert error_of("recover", "default.dmap", "b").endswith("name one of its nodes")
    assert Path("default.dmap").read_bytes() == before


def test_what_is_not_there_is_named_with_its_node(folder: Path) -> None:
    dirtmap("add", "disk.qcow2", "b")
    missing = "default.dmap: node 'one': bitmap 'x': there is no such bitmap"
    for command in (["map", "one", "x"], ["hold", "one", "x", "true"], ["copy", "one", "x", "disk.qcow2"]):
        assert error_of(*command) == missing
    what = "disk.qcow2: bitmap 'b': only bitmaps of an image with a name can be held; 'node add' gives it one"
    assert error_of("hold", "disk.qcow2", "b", "true") == what


@pytest.mark.parametrize("target", ["one", "disk.qcow2"])
def test_a_change_within_a_change_is_told_from_that_of_another_process(target: str) -> None:
    with (
        dm.open(target) as image,
        image.transaction(),
        dm.open(target, force_share=True) as again,
        pytest.raises(dm.LockedError, match="by this very process"),
        again.transaction(),
    ):
        pass


def test_the_same_name_in_every_namespace() -> None:
    for node, offset in (("one", "0"), ("two", "1M"), ("disk.qcow2", "2M")):
        dirtmap("add", node, "backup")
        dirtmap("mark", node, "backup", offset, "1")
    assert [mapped(node, "backup") for node in ("one", "two", "disk.qcow2")] == [
        [(0, 64 * KIB)],
        [(MIB, 64 * KIB)],
        [(2 * MIB, 64 * KIB)],
    ]
    dirtmap("merge", "one", "backup", "backup", "-b", "two")
    dirtmap("merge", "one", "backup", "backup", "-b", "disk.qcow2")
    assert mapped("one", "backup") == [(0, 64 * KIB), (MIB, 64 * KIB), (2 * MIB, 64 * KIB)]


def test_copy_and_move_between_containers() -> None:
    dirtmap("add", "one", "b", "-g", "4K")
    dirtmap("mark", "one", "b", "5M", "12K")
    dirtmap("copy", "one", "b", "disk.qcow2")
    assert qemu.dirty("disk.qcow2", "b") == [(5 * MIB, 12 * KIB)]
    qemu.check("disk.qcow2")
    dirtmap("move", "disk.qcow2", "b", "two")
    assert qemu.bitmaps("disk.qcow2") == {}
    assert mapped("two", "b") == [(5 * MIB, 12 * KIB)]
    dirtmap("move", "two", "b", "one", "--as", "c")
    assert mapped("one", "c") == [(5 * MIB, 12 * KIB)]
    assert json_of("list", "two")[0]["bitmaps"] == []
    before = Path("default.dmap").read_bytes()
    assert "the name is taken" in error_of("move", "one", "c", "one", "--as", "b")
    Path("small.raw").write_bytes(bytes(4096))
    dirtmap("node", "add", "small", "small.raw")
    before = Path("default.dmap").read_bytes()
    assert "made for a disk of" in error_of("copy", "one", "b", "small")
    assert Path("default.dmap").read_bytes() == before


def test_a_transaction_over_nodes_of_one_store() -> None:
    document = """{"actions": [
      {"type": "block-dirty-bitmap-add", "data": {"node": "one", "name": "m"}},
      {"type": "block-dirty-bitmap-add", "data": {"node": "two", "name": "m", "disabled": true}},
      {"type": "block-dirty-bitmap-merge",
       "data": {"node": "two", "target": "m", "bitmaps": [{"node": "one", "name": "m"}]}}
    ]}"""
    dirtmap("transaction", "-", given=document)
    assert [(b["node"], b["name"], b["recording"]) for b in json_of("list", "default.dmap")[0]["bitmaps"]] in (
        [("one", "m", True), ("two", "m", False)],
        [("two", "m", False), ("one", "m", True)],
    )
    before = Path("default.dmap").read_bytes()
    assert "the name is taken" in error_of("transaction", "-", given=document)
    mixed = document.replace('"one"', '"disk.qcow2"')
    assert "in another container" in error_of("transaction", "-", given=mixed)
    assert Path("default.dmap").read_bytes() == before


def test_another_store_than_the_default_one(monkeypatch: pytest.MonkeyPatch) -> None:
    dirtmap("store", "create", "other.dmap", "--cluster-size", "64K")
    with monkeypatch.context() as patch:  # of another host, so that it may have the name, too
        patch.setenv("DIRTMAP_STORE", "other.dmap")
        dirtmap("node", "add", "one", "two.raw")
    dirtmap("add", "one", "b", "--store", "other.dmap")
    dirtmap("mark", "one", "b", "0", "1", "--store", "other.dmap")
    assert json_of("list", "one")[0]["bitmaps"] == []
    assert [b["count"] for b in json_of("list", "one", "--store", "other.dmap")[0]["bitmaps"]] == [64 * KIB]
    assert "b" in dirtmap("list", "other.dmap").out
    assert error_of("list", "one", "--store", "none.dmap").startswith("one: no such file, and no store")


def test_compact_frees_space_and_changes_no_answer() -> None:
    for number in range(20):
        dirtmap("add", "one", f"b{number}", "-g", "512")
        dirtmap("mark", "one", f"b{number}", number * MIB, 1)
    for number in range(19):
        dirtmap("remove", "one", f"b{number}")
    before = json_of("list", "default.dmap")
    done = json_of("store", "compact", "default.dmap")
    assert done["after"] < done["before"]
    assert os.path.getsize("default.dmap") == done["after"]
    assert json_of("list", "default.dmap") == before
    assert json_of("check", "default.dmap")["findings"] == []


def spoil(name: str, byte: int = 0) -> None:
    """Flips a bit in a byte of that structure of the store."""
    (at,) = (each["offset"] for each in json_of("dump", "default.dmap")["structures"] if each["name"] == name)
    with open("default.dmap", "r+b") as file:
        file.seek(at + byte)
        found = file.read(1)[0]
        file.seek(at + byte)
        file.write(bytes([found ^ 1]))


@pytest.mark.parametrize(
    ("structure", "byte", "line", "key"),
    [
        ("bits: node 'two', bitmap 'b'", 0, "node 'two', bitmap 'b': its bits are damaged", "made-dirty"),
        (
            "directory entry: node 'one', bitmap 'b'",
            DIRECTORY_ENTRY.field("extra_data_size").offset,  # so that nothing in it can be told
            "node 'one', 1 of 1 bitmap: directory of node 'one' at 0x",
            "dropped",
        ),
    ],
)
@pytest.mark.parametrize("output", ["human", "json"])
def test_check_says_what_mending_dropped_and_what_it_made_dirty(
    structure: str, byte: int, line: str, key: str, output: str
) -> None:
    for node in ("one", "two"):
        dirtmap("add", node, "b")
        dirtmap("mark", node, "b", "1M", "1")
    spoil(structure, byte)
    if output == "human":
        human = {"made-dirty": "all dirty now", "dropped": "dropped"}[key]
        assert f"\n{human}: {line}" in dirtmap("check", "-r", "all", "default.dmap").out
    else:
        report = json_of("check", "-r", "all", "default.dmap")
        assert (len(report["dropped"]), len(report["made-dirty"])) == ((1, 0) if key == "dropped" else (0, 1))
        assert report[key][0].startswith(line)
    assert json_of("check", "default.dmap")["findings"] == []


def test_a_store_without_a_header_is_reported_as_an_image_without_one_is() -> None:
    with open("default.dmap", "r+b") as file:
        for number in range(store.RESERVED // store.BLOCK):
            file.seek(number * store.BLOCK + 100)
            file.write(b"\xff")
    qemu.patch(Path("disk.qcow2"), 20, b"\xff")
    spoiled = Path("default.dmap").read_bytes()
    for repair in ([], ["-r", "all"]):
        ours, theirs = (json_of("check", *repair, path, status=2) for path in ("default.dmap", "disk.qcow2"))
        assert ours["findings"][0] == {
            "severity": "corruption",
            "where": "header",
            "what": "all four copies are damaged",
        }
        for report in (ours, theirs):
            assert (report["corruptions"], report["check-errors"], report["corruptions-fixed"]) == (1, 1, 0)
            assert report["findings"][1]["what"] == "not checked: the header cannot be relied on"
    assert Path("default.dmap").read_bytes() == spoiled
    # Nothing can mend that.
    assert error_of("list", "one").endswith("it is the default store: 'index scan' makes another once it is moved away")


def test_nodes_are_listed_renamed_resized_confirmed_removed() -> None:
    dirtmap("node", "add", "drive0", "disk.qcow2")
    assert [(n["name"], n["virtual-size"], n["bitmaps"], n["doubt"]) for n in json_of("node", "list")] == [
        ("drive0", GIB, None, None),
        ("one", GIB, 0, None),
        ("two", GIB, 0, None),
    ]
    assert "in the image" in dirtmap("node", "list").out
    dirtmap("add", "one", "b")
    os.truncate("one.raw", 2 * GIB)
    assert "'node resize' adopts the new size" in error_of("mark", "one", "b", "0", "1")
    dirtmap("node", "resize", "one")
    assert mapped("one", "b") == [(GIB, GIB)]
    os.utime("one.raw", ns=(1, 1))
    assert "changed while nobody tracked it" in dirtmap("list", "one").error
    dirtmap("node", "confirm", "one")
    assert dirtmap("list", "one").error == ""
    assert "--with-bitmaps" in error_of("node", "rename", "one", "uno")
    dirtmap("node", "rename", "--with-bitmaps", "one", "uno")
    assert mapped("uno", "b") == [(GIB, GIB)]
    dirtmap("node", "remove", "two")
    assert [n["name"] for n in json_of("node", "list")] == ["drive0", "uno"]


def test_a_copied_image_is_refused_until_it_gets_an_identity_of_its_own() -> None:
    dirtmap("add", "disk.qcow2", "b")
    dirtmap("node", "add", "drive0", "disk.qcow2")
    shutil.copy("disk.qcow2", "copy.qcow2")
    before = Path("copy.qcow2").read_bytes()
    for command in (["list"], ["map"], ["clear"], ["remove"], ["recover"]):
        name = ["b"] if command != ["list"] else []
        assert "with its identity; 'node add --new-identity'" in error_of(*command, "copy.qcow2", *name)
    assert Path("copy.qcow2").read_bytes() == before
    dirtmap("node", "add", "--new-identity", "drive1", "copy.qcow2")
    dirtmap("clear", "drive1", "b")


def test_the_default_store_is_made_on_first_need(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DIRTMAP_STORE")
    monkeypatch.setenv("DIRTMAP_INDEX", str(tmp_path / "state" / "index"))
    dirtmap("node", "add", "one", "one.raw")
    assert (tmp_path / "state" / "default.dmap").stat().st_mode & 0o777 == 0o600
    dirtmap("add", "one", "b")


def test_wrong_usage() -> None:
    assert error_of("store", "create", "default.dmap") == "default.dmap: open: File exists"
    assert "power of two" in error_of("store", "create", "x.dmap", "--cluster-size", "5000")
    assert "outside 4 KiB to 2 MiB" in error_of("store", "create", "x.dmap", "--cluster-size", "512")
    assert "a store of many images" in error_of("map", "default.dmap", "b")
    assert "no such" in error_of("node", "remove", "three")
    assert "the name is taken" in error_of("node", "add", "one", "two.raw")
    assert error_of("node", "add", "three", "none.raw").startswith("none.raw: ")
    assert not Path("x.dmap").exists()


def test_a_dump_shows_every_field_of_what_a_record_is_extended_by() -> None:
    """Holds, sessions with their peers, checkpoints, and the windows of bitmaps."""
    dirtmap("device", "add", "d", "--root", "one")
    for target in ("one", "d", "two"):
        dirtmap("add", target, "m")
    with dm.open("d") as device, device.track() as tracker, dm.open("two") as two, two.hold("m", "backup ü"):
        tracker.checkpoint("monday")
        structures = json_of("dump", "--hex", "default.dmap")["structures"]
        human = dirtmap("dump", "default.dmap").out
    found: dict[str, dict[str, object]] = {}
    for structure in structures:
        if structure["name"].startswith(("namespace record", "directory entry")):
            raw = bytearray(bytes.fromhex(structure["hex"]))
            for field in structure["fields"]:
                start = field["offset"] - structure["offset"]
                raw[start : start + field["length"]] = bytes(field["length"])
                assert field["name"] != "data"
            assert not any(raw), structure["name"]  # nothing but padding is left
            fields = found.setdefault(structure["name"].split(": ")[1], {})
            fields.update({field["name"]: field["value"] for field in structure["fields"]})
    assert (found["node 'two'"]["bitmap"], found["node 'two'"]["owner"]) == ("m", "backup ü")
    assert found["node 'two'"]["process"] == os.getpid()
    assert found["device 'd'"]["[0].name"] == "monday"
    assert human.count("0xc84f4c44") == 1
    for shown in ("hold", "session", "peer", "checkpoints", "token", "live", "log_path", "began"):
        assert f" {shown}" in human, shown
