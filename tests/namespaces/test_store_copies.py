"""A copy of a store is refused where any store of the host tells that it is one, without an index as well."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support.cli import dirtmap, error_of, json_of

from dirtmap.engine.storefile.place import is_elsewhere
from dirtmap.engine.system.file import File, open_file
from dirtmap.fmt.identity import FilePlace

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A default store beside the index, with a node and a bitmap, copied, and no index."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIRTMAP_STORE", raising=False)
    Path("one.raw").write_bytes(bytes(MIB))
    dirtmap("node", "add", "one", "one.raw")
    dirtmap("add", "one", "b")
    shutil.copy("default.dmap", "copy.dmap")
    shutil.rmtree("index")
    return tmp_path


_CHANGES = (
    ["add", "one", "c"],
    ["node", "remove", "one"],
    ["store", "compact", "copy.dmap"],
    ["check", "-r", "all", "copy.dmap"],
    ["check", "-r", "leaks", "copy.dmap"],
)


def _options(command: list[str], chosen: bool) -> list[str]:
    return ["--store", "copy.dmap"] if chosen and command[0] not in ("store", "check") else []


@pytest.mark.parametrize("command", _CHANGES, ids=" ".join)
@pytest.mark.parametrize("by", ["option", "variable"])
def test_a_copy_of_the_store_beside_the_index(
    folder: Path, monkeypatch: pytest.MonkeyPatch, by: str, command: list[str]
) -> None:
    before = Path("copy.dmap").read_bytes()
    with monkeypatch.context() as patch:
        if by == "variable":
            patch.setenv("DIRTMAP_STORE", "copy.dmap")
        assert "a copy of" in error_of(*command, *_options(command, by == "option"))
    assert Path("copy.dmap").read_bytes() == before
    dirtmap("add", "one", "d")  # the original stays the one
    assert [bitmap["name"] for bitmap in json_of("list", "one")[0]["bitmaps"]] == ["b", "d"]


def test_a_copy_of_a_store_that_was_chosen_once(folder: Path) -> None:
    """The normal default store remembers those that were chosen."""
    Path("two.raw").write_bytes(bytes(MIB))
    dirtmap("node", "add", "two", "two.raw", "--store", "chosen.dmap")
    shutil.copy("chosen.dmap", "another.dmap")
    shutil.rmtree("index")
    assert "a copy of" in error_of("add", "two", "b", "--store", "another.dmap")
    dirtmap("add", "two", "b", "--store", "chosen.dmap")


def test_a_copy_is_adopted_and_a_store_is_moved(folder: Path) -> None:
    dirtmap("store", "new-identity", "copy.dmap")
    dirtmap("store", "compact", "copy.dmap")
    dirtmap("check", "-r", "all", "copy.dmap")
    shutil.rmtree("index", ignore_errors=True)
    os.rename("default.dmap", "moved.dmap")
    dirtmap("add", "one", "c", "--store", "moved.dmap")


@pytest.mark.parametrize("command", _CHANGES, ids=" ".join)
def test_a_copy_where_the_original_is_known_to_nobody(folder: Path, command: list[str]) -> None:
    """Neither the store beside the index nor the chosen one says where the original is."""
    os.rename("default.dmap", "original.dmap")
    shutil.rmtree("index", ignore_errors=True)
    before = Path("copy.dmap").read_bytes()
    assert "a copy of" in error_of(*command, *_options(command, True))
    assert Path("copy.dmap").read_bytes() == before
    dirtmap("add", "one", "c", "--store", "original.dmap")
    dirtmap("add", "one", "d", "--store", "original.dmap")  # the commit has left it where it is


@pytest.mark.parametrize("command", [["list", "one"], ["store", "compact", "default.dmap"], ["add", "one", "c"]])
def test_a_store_put_back_where_the_index_knows_it_is_all_dirty(folder: Path, command: list[str]) -> None:
    dirtmap("list", "one")  # makes the index
    dirtmap("clear", "one", "b")
    shutil.copy("default.dmap", "copy.dmap")
    os.replace("copy.dmap", "default.dmap")  # lacks nothing, as far as the index can tell
    dirtmap(*command)
    assert [(extent["offset"], extent["length"]) for extent in json_of("map", "--dirty", "one", "b")] == [(0, MIB)]
    assert dirtmap("check", "default.dmap").error == ""


def test_a_store_put_back_from_a_backup_is_confirmed_and_all_dirty(folder: Path) -> None:
    os.replace("copy.dmap", "default.dmap")
    assert "put back from one; 'store new-identity'" in error_of("list", "one")
    assert [finding["where"] for finding in json_of("check", "default.dmap")["findings"]] == ["place extension"]
    said = dirtmap("store", "new-identity", "default.dmap").error
    assert "all dirty now: all bitmaps: the store may lack commits" in said
    dirtmap("add", "one", "c")
    (listed,) = json_of("list", "one")
    assert {bitmap["name"]: bitmap["count"] for bitmap in listed["bitmaps"]} == {"b": MIB, "c": 0}


def test_a_renamed_and_a_compacted_store_are_no_copies(folder: Path) -> None:
    os.remove("copy.dmap")
    os.rename("default.dmap", "moved.dmap")
    os.link("moved.dmap", "linked.dmap")
    for store in ("moved.dmap", "linked.dmap"):
        dirtmap("add", "one", store, "--store", store)
    os.remove("linked.dmap")
    dirtmap("store", "compact", "moved.dmap")
    shutil.rmtree("index", ignore_errors=True)
    dirtmap("add", "one", "c", "--store", "moved.dmap")
    assert dirtmap("check", "moved.dmap").error == ""


_LASTING = b"file system name"


@pytest.mark.parametrize(
    ("said", "now", "elsewhere"),
    [
        (FilePlace(_LASTING, 7, 0), FilePlace(_LASTING, 7, 0), False),
        (FilePlace(_LASTING, 7, 5), FilePlace(_LASTING, 7, 0), False),
        (FilePlace(_LASTING, 7, 5), FilePlace(_LASTING, 7, 5), False),
        (FilePlace(_LASTING, 7, 5), FilePlace(_LASTING, 7, 6), True),
        (FilePlace(_LASTING, 7, 5), FilePlace(_LASTING, 8, 5), True),
        (FilePlace(_LASTING, 7, 5), FilePlace(_LASTING[::-1], 7, 5), True),
        (FilePlace(bytes(8) + b"devno 12", 7, 0), FilePlace(bytes(8) + b"devno 12", 8, 0), True),
        (FilePlace(bytes(8) + b"devno 12", 7, 0), FilePlace(bytes(8) + b"devno 13", 7, 0), None),
        (FilePlace(bytes(8) + b"devno 12", 7, 0), FilePlace(bytes(8) + b"devno 13", 8, 0), None),
        (FilePlace(bytes(8) + b"devno 12", 7, 0), FilePlace(_LASTING, 7, 0), None),
    ],
)
def test_what_tells_a_copy(
    folder: Path, monkeypatch: pytest.MonkeyPatch, said: FilePlace, now: FilePlace, elsewhere: bool | None
) -> None:
    monkeypatch.setattr(File, "place", lambda file: now)
    with open_file("default.dmap") as file:
        assert is_elsewhere(said, file) is elsewhere


def test_a_store_on_a_file_system_that_has_another_name_now_is_said_and_not_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(File, "place", lambda file: FilePlace(bytes(8) + b"devno 12", file.status.st_ino, 0))
        dirtmap("add", "one", "c")
    shutil.rmtree("index")
    caplog.clear()
    dirtmap("list", "one")
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "whether it is a copy cannot be told: its file system has another name since, and none that lasts"
    ]
    dirtmap("add", "one", "d")
    caplog.clear()
    dirtmap("list", "one")
    assert not caplog.records
