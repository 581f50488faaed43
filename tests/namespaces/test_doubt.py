"""What is said where bitmaps are in doubt or damaged, and names and identities where something else goes wrong."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from support import qemu
from support.cli import dirtmap, error_of, json_of

import dirtmap.engine as dm
from dirtmap.engine.model import content
from dirtmap.engine.storefile.directory import read_entries
from dirtmap.engine.storefile.file import Change, Store
from dirtmap.fmt import store

MIB = 1 << 20


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two raw nodes with bitmaps in a default store, and a qcow2 node."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIRTMAP_STORE", str(tmp_path / "s.dmap"))
    monkeypatch.setenv("DIRTMAP_INDEX", str(tmp_path / "index"))
    for name in ("one", "two"):
        Path(f"{name}.raw").write_bytes(bytes(MIB))
        dirtmap("node", "add", name, f"{name}.raw")
        for bitmap in ("monday", "tuesday"):
            dirtmap("add", name, bitmap)
            dirtmap("mark", name, bitmap, 0, 1)
    qemu.create(tmp_path / "q.qcow2", MIB)
    dirtmap("node", "add", "q", "q.qcow2")
    return tmp_path


def lose_a_commit() -> None:
    shutil.copy("s.dmap", "old.dmap")
    dirtmap("mark", "one", "monday", MIB // 2, 1)
    shutil.copy("old.dmap", "s.dmap")


def test_confirm_says_so_where_a_doubt_is_not_about_the_image() -> None:
    lose_a_commit()
    assert "the store lost a commit; 'dirtmap recover' settles it" in error_of("node", "confirm", "one")
    assert set(json_of("recover", "one")["recovered"][0].values()) == {"monday", "all dirty: the store lost a commit"}
    dirtmap("node", "confirm", "one")


def test_whoever_uses_a_doubted_bitmap_is_told() -> None:
    os.utime("one.raw", ns=(1, 1))
    for command in (("map", "one", "monday"), ("copy", "one", "monday", "q"), ("mark", "one", "monday", 0, 1)):
        assert "one: its bitmaps count as all dirty: the image has changed" in dirtmap(*command).error, command
    assert dirtmap("map", "one", "monday").error == ""  # the mark has made them dirty
    assert dirtmap("map", "two", "monday").error == ""


def test_recover_says_why_all_is_dirty() -> None:
    os.utime("one.raw", ns=(1, 1))
    why = "all dirty: the image has changed while nobody tracked it"
    assert dirtmap("recover", "one").out.splitlines() == [f"monday: {why}", f"tuesday: {why}"]


def test_json_tells_a_doubt() -> None:
    os.utime("one.raw", ns=(1, 1))
    told = json_of("list", "one", "two", "q", "s.dmap")
    changed = "the image has changed while nobody tracked it"
    assert [each["doubt"] for each in told] == [changed, None, None, changed]


def spoil(where: str, node: str = "one", number: int = 0) -> None:
    with Store("s.dmap") as target:
        record = target.record(node.encode())
        assert record
        entry = target.read(lambda snapshot: read_entries(snapshot, record))[number]
    with open("s.dmap", "r+b") as file:
        file.seek(entry.table_offset if where != "directory" else record.directory.offset + store.OWNER_SIZE + 40)
        if where == "first chunk":  # that of a tree with nodes: its place is the first thing in the root
            file.seek(int.from_bytes(file.read(8), "big"))
        file.write(b"\x55\xaa\x55\xaa")


def test_a_damaged_directory_hides_no_other_namespace() -> None:
    spoil("directory")
    for target_name, count in (("one", 0), ("s.dmap", 2)):
        result = dirtmap("list", "--output=json", target_name, status=1)
        assert "node 'one'" in result.error
        (document,) = json.loads(result.out)
        assert result.error == f"dirtmap: {document['errors'][0]}\n"
        found = [(b["name"], b["count"], b["damaged"]) for b in document["bitmaps"]]
        assert found == [("monday", 65536, False), ("tuesday", 65536, False)][:count]
    assert "no bitmaps" not in dirtmap("list", "one", status=1).out


def test_damaged_bits_are_dirty_and_said_to_be() -> None:
    spoil("bits")
    for target_name in ("one", "s.dmap"):
        result = dirtmap("list", "--output=json", target_name)
        (document,) = json.loads(result.out)
        (note,) = document["notes"]
        assert result.error.endswith(f"s.dmap: {note}\n")
        assert note.startswith("node 'one': bitmap 'monday': bits are damaged at 0x")
        assert note.endswith(", so 16 granules of 16 must count as dirty; recover makes that last")
        assert [b["count"] for b in document["bitmaps"]][:2] == [MIB, 65536]
    mapped = dirtmap("map", "one", "monday")
    assert mapped.out.split() == ["0", f"{MIB}", "1", "dirty"]
    assert "'monday': its bits are damaged at 0x" in mapped.error
    assert dirtmap("map", "one", "tuesday").error == ""
    assert json_of("check", "s.dmap", status=2)["corruptions"] == 1
    assert dirtmap("recover", "one").out.startswith("monday: partly dirty: its bits are damaged at 0x")
    assert dirtmap("list", "one").error == ""
    assert [b["count"] for b in json_of("list", "one")[0]["bitmaps"]] == [MIB, 65536]
    assert dirtmap("check", "s.dmap").out


@pytest.mark.parametrize("large", [content.LARGE, 8], ids=["loaded", "by parts"])
def test_what_was_written_since_a_checkpoint_says_which_part_of_it_is_damaged(
    large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "LARGE", large)
    with dm.open("one") as image, image.track() as tracker:
        for number, name in enumerate(("c1", "c2", "c3")):
            tracker.checkpoint(name)
            tracker.mark(number << 16, 1)
    spoil("bits", number=3)
    mapped = dirtmap("map", "one", "--since", "c1")
    assert mapped.out.split() == ["0", f"{MIB}", "1", "dirty"]
    assert "node 'one': 'since c1': its bits are damaged at 0x" in mapped.error
    assert "'since c1 until c3': its bits are" in dirtmap("map", "one", "--since", "c1", "--until", "c3").error
    for sound in (("--since", "c1", "--until", "c2"), ("--since", "c3")):
        assert dirtmap("map", "one", *sound).error == ""
    assert "'c2': its bits are damaged at 0x" in dirtmap("export", "one", "--since", "c1", "--run", "true").error
    with dm.open("one") as image, image.track() as tracker:
        assert (tracker.changed_since("c1").damage or "").startswith("bits are damaged at 0x")
        assert "'since c1': its bits are" in dirtmap("map", "one", "--since", "c1").error
        assert tracker.changed_since("c3").damage is None


@pytest.mark.parametrize("size", [MIB, 1 << 32])
def test_a_backup_says_what_it_copies_because_of_damage(size: int) -> None:
    Path("three.raw").touch()
    os.truncate("three.raw", size)
    dirtmap("node", "add", "three", "three.raw")
    dirtmap("backup", "create", "three", "repository")
    with dm.open("three") as image, image.track() as tracker:
        tracker.mark(0, 1)
    spoil("bits" if size == MIB else "first chunk", "three")
    made = dirtmap("backup", "create", "three", "repository").out
    if size == MIB:
        assert ", full: all of the disk counts as written: its bits are damaged at 0x" in made
    else:
        assert ", incremental: some of the disk counts as written: its bits are damaged at 0x" in made
        assert "\n  2 GiB dirty, " in made


def test_a_node_list_tells_the_size_of_an_image_that_was_resized() -> None:
    qemu.qemu_img("resize", "-q", "q.qcow2", "2M")
    assert {node["name"]: node["virtual-size"] for node in json_of("node", "list")}["q"] == 2 * MIB


@pytest.mark.parametrize("act", ["rename", "remove"])
def test_an_image_keeps_its_identity_where_the_store_fails(act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with dm.open("q.qcow2") as image:
        before = image.name, image.uuid

    def full(change: Change) -> None:
        raise dm.StorageError("s.dmap", "no space left on device")

    host = dm.this_host()
    with monkeypatch.context() as patch:
        patch.setattr(Change, "commit", full)
        with pytest.raises(dm.StorageError, match="no space"):
            host.rename_node("q", "p") if act == "rename" else host.remove_node("q")
    with dm.open("q.qcow2") as image:
        assert (image.name, image.uuid) == before
    with dm.open("node:q") as image:
        assert image.uuid == before[1]


def test_a_copy_of_a_store_is_told_without_an_index() -> None:
    dirtmap("store", "create", "other.dmap")
    Path("third.raw").write_bytes(bytes(MIB))
    dirtmap("node", "add", "third", "third.raw", "--store", "other.dmap")
    shutil.copy("other.dmap", "copy.dmap")
    shutil.copy("s.dmap", "default-copy.dmap")
    shutil.rmtree("index")
    assert "a copy of" in error_of("list", "copy.dmap")
    assert "a copy of" in error_of("list", "default-copy.dmap")
    dirtmap("list", "other.dmap")
    assert [each["name"] for each in json_of("node", "list")] == ["one", "q", "third", "two"]


def test_python_gets_errors_of_ours_only(folder: Path) -> None:
    (folder / "three.raw").write_bytes(bytes(1 << 20))
    with pytest.raises(dm.StorageError, match="Not a directory"):
        dm.this_host(store="one.raw/x/s.dmap").add_node("r", "three.raw")
    for path in ("a\0b", "\ud800"):
        with pytest.raises(dm.StorageError):
            dm.this_host().add_node("r", path)
    with dm.open("node:one") as image, dm.open("q.qcow2") as qcow2:
        assert "\ud800" not in image
        assert "\ud800" not in qcow2
    (folder / "elsewhere").mkdir()
    os.environ["DIRTMAP_STORE"] = "none.dmap"  # the fixture's patch ends with the test
    where = {"store": str(folder / "s.dmap"), "index": str(folder / "elsewhere/index")}
    assert dm.check("node:one", **where).findings == []
    assert dm.dump("node:one", **where)
