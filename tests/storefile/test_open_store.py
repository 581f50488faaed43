"""What is open stays what it was: in another folder, with another file in its place, or an older copy of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support import qemu
from support.cli import COMMAND, dirtmap, json_of
from support.hostless import index_at

import dirtmap.engine as dm
from dirtmap.engine.index.index import SeenCommit
from dirtmap.engine.namespaces.compact import compact
from dirtmap.engine.storefile.file import Store, create
from dirtmap.engine.storefile.header import Seen

MIB = 1 << 20
SIZE = 4 * MIB
ALL = [(0, SIZE)]


def make(folder: Path) -> None:
    """Two nodes in the store `s.dmap` and an image, each with an empty bitmap `m`; under names that recur elsewhere."""
    here = os.getcwd()
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    for name in ("data", "other"):
        Path(f"{name}.raw").touch()
        os.truncate(f"{name}.raw", SIZE)
        dirtmap("node", "add", name, f"{name}.raw")
    qemu.create(Path("q.qcow2"), SIZE)
    dirtmap("node", "add", "q", "q.qcow2")
    dirtmap("device", "add", "d", "--root", "data")
    for name in ("data", "other", "q", "d"):
        dirtmap("add", name, "m")
    os.chdir(here)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIRTMAP_STORE", "s.dmap")
    monkeypatch.setenv("DIRTMAP_INDEX", "index")
    return tmp_path


def mapped(target: str, name: str = "m") -> list[tuple[int, int]]:
    return [(e["offset"], e["length"]) for e in json_of("map", "--dirty", target, name)]


def change(image: dm.Namespace) -> None:
    with image.transaction() as bitmaps:
        bitmaps["m"].mark(0, 1)


def hold(image: dm.Namespace) -> None:
    with image.hold("m"):
        assert os.path.basename(os.getcwd()) == "B"
    change(image)


def track(image: dm.Namespace) -> None:
    with image.track() as tracker:
        tracker.mark(0, 1)


@pytest.mark.parametrize("act", [change, hold, track])
@pytest.mark.parametrize("target", ["data", "q", "d", "q.qcow2"])
def test_what_was_opened_by_a_relative_path_stays_the_same(
    folder: Path, target: str, act: Callable[[dm.Namespace], None]
) -> None:
    make(folder / "A")
    make(folder / "B")
    os.chdir("A")
    with dm.open(target) as image:
        os.chdir("../B")
        act(image)
        assert image["m"].count == 65536
    touched = [("data", "d") if act is track and target == "d" else (target.removesuffix(".qcow2"),)]
    for name in ("data", "other", "q", "d"):
        assert mapped(name) == [], name
    os.chdir("../A")
    for name in ("data", "other", "q", "d"):
        expected = [(0, 65536)] if name in touched[0] else []
        assert mapped(name) == expected, name


def test_a_host_stays_the_same(folder: Path) -> None:
    make(folder / "A")
    make(folder / "B")
    os.chdir("A")
    host = dm.this_host()
    os.chdir("../B")
    shutil.copy("../A/data.raw", "../A/new.raw")
    host.add_node("new", "../A/new.raw")
    assert host._parts.names.resolve("new")
    assert not [node for node in json_of("node", "list") if node["name"] == "new"]
    os.chdir("../A")
    assert [node for node in json_of("node", "list") if node["name"] == "new"]


@pytest.mark.parametrize("in_place", [False, True])
def test_another_store_in_its_place_is_refused(folder: Path, in_place: bool) -> None:
    make(folder / "A")
    make(folder / "B")
    before = Path("B/s.dmap").read_bytes()
    with dm.open("data", store="A/s.dmap", index="A/index") as image:
        if in_place:
            shutil.copy("B/s.dmap", "A/s.dmap")
        else:
            os.rename("B/s.dmap", "A/s.dmap")
        with pytest.raises(dm.Error, match="was replaced since it was opened"):
            change(image)
        with pytest.raises(dm.Error, match="was replaced since it was opened"):
            _ = image["m"]
    assert Path("A/s.dmap").read_bytes() == before


# Rolled back while it is open.


def put_back(in_place: bool) -> None:
    if in_place:
        Path("s.dmap").write_bytes(Path("old").read_bytes())
    else:
        shutil.copy("old", "new")
        os.rename("new", "s.dmap")


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("index", [False, True])
def test_a_rollback_under_an_open_store_makes_all_dirty(folder: Path, in_place: bool, index: bool) -> None:
    make(folder)
    with dm.open("data") as image:
        shutil.copy("s.dmap", "old")
        change(image)
        if not index:
            shutil.rmtree("index")
        put_back(in_place)
        assert image["m"].count == SIZE  # the handle itself knows better than the file
        assert any("the store lost a commit" in note for note in image.info().notes)
        with image.transaction() as bitmaps:
            bitmaps["m"].clear(0, MIB)
        assert image["m"].count == SIZE - MIB
    for name, expected in (("data", [(MIB, SIZE - MIB)]), ("other", ALL), ("d", ALL)):
        assert mapped(name) == expected, name
    assert mapped("q") == []


def test_a_commit_on_a_rollback_is_not_taken_for_the_lost_one(folder: Path) -> None:
    """Both have the same number."""
    make(folder)
    shutil.copy("s.dmap", "old")
    with dm.open("data") as image:
        dirtmap("mark", "other", "m", 0, 1)
        put_back(True)
        for _ in range(3):  # the first has the number of the lost one, the next ones pass it
            change(image)
    assert mapped("other") == mapped("data") == mapped("d") == ALL


def test_a_rollback_during_a_hold_is_found(folder: Path) -> None:
    make(folder)
    dirtmap("hold", "data", "m", "--", "sh", "-c", f"cp s.dmap o; {COMMAND} mark other m 0 1; cp o s.dmap")
    assert mapped("other") == mapped("data") == mapped("d") == ALL


def test_a_rollback_while_it_is_tracked_is_found(folder: Path) -> None:
    make(folder)
    with dm.open("data") as image, image.track(save_interval=0) as tracker:
        shutil.copy("s.dmap", "old")
        tracker.mark(0, 1)
        tracker.save()
        put_back(True)
    assert mapped("data") == mapped("other") == ALL


def test_an_index_keeps_the_commit_that_it_has_seen(folder: Path) -> None:
    create("x")
    with Store("x") as target:
        where = target.abspath
    index = index_at(str(folder / "own"))
    for generation, kept in ((5, 5), (4, 5), (5, 5), (6, 6)):
        index.remember_seen(SeenCommit(b"u" * 16, Seen(generation, bytes([generation]) * 16), where))
        assert index.seen(b"u" * 16) == (b"u" * 16, (kept, bytes([kept]) * 16), where)
    index.remember_seen(SeenCommit(b"u" * 16, Seen(6, b"other".ljust(16)), where))
    assert index.seen(b"u" * 16) == (b"u" * 16, (6, bytes([6]) * 16), where)


def test_a_compaction_under_an_open_store_is_no_rollback(folder: Path) -> None:
    make(folder)
    with dm.open("data") as image:
        change(image)
        compact("s.dmap")
        assert image["m"].count == 65536
        change(image)
        assert image["m"].count == 65536
    assert mapped("other") == mapped("d") == []


def test_what_was_seen_is_missing_where_it_is_neither_there_nor_followed() -> None:
    seen = Seen(5, b"a")
    assert [seen.is_missing_at(Seen(*now)) for now in ((4, b"a"), (5, b"b"), (5, b"a"), (6, b"b"))] == [1, 1, 0, 0]


def test_who_may_not_write_a_rolled_back_store_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(folder)
    shutil.copy("s.dmap", "old")
    dirtmap("mark", "other", "m", 0, 1)
    put_back(True)
    real = os.open

    def read_only(path: str, flags: int, *rest: int) -> int:
        if os.fsdecode(path).endswith("s.dmap") and flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied")
        return real(path, flags, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", read_only)
        with pytest.raises(dm.Error, match=r"s\.dmap: was rolled back to an older commit; .* may write it .*denied"):
            dm.open("other")
    assert mapped("other") == ALL
