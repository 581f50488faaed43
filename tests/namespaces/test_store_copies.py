"""A copy of a store is refused where any store of the host tells that it is one, without an index as well."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support.cli import dirtmap, error_of, json_of

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


@pytest.mark.xfail(strict=True, reason="needs the next store format")
def test_a_copy_where_the_original_is_known_to_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the store beside the index nor the chosen one says where the original is."""
    os.rename("default.dmap", "original.dmap")
    shutil.rmtree("index", ignore_errors=True)
    assert "a copy of" in error_of("add", "one", "c", "--store", "copy.dmap")
