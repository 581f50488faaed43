"""Compaction: who owns the new file, what killed ones leave, what a copy must not take over, and when there is none."""

from __future__ import annotations

import os
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from support.cli import dirtmap, error_of, json_of
from support.damage import Sound, make_sound, read_everything

import dirtmap.engine as dm
from dirtmap.engine.namespaces.compact import compact
from dirtmap.engine.storefile import header as headers
from dirtmap.engine.storefile.file import Store
from dirtmap.fmt import index as layout
from dirtmap.fmt import store

MIB = 1 << 20


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two nodes in a default store, with a clean bitmap each."""
    monkeypatch.chdir(tmp_path)
    for name, where in (("STORE", "s.dmap"), ("INDEX", "index"), ("LIVE", "live")):
        monkeypatch.setenv(f"DIRTMAP_{name}", str(tmp_path / where))
    for name in ("one", "two"):
        Path(f"{name}.raw").write_bytes(bytes(MIB))
        dirtmap("node", "add", name, f"{name}.raw")
        dirtmap("add", name, "b")
    return tmp_path


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("how", ["compact", "mend"])
def test_the_owner_stays(how: str) -> None:
    os.chown("s.dmap", 12345, 54321)
    os.chmod("s.dmap", 0o640)
    if how == "compact":
        dirtmap("store", "compact", "s.dmap")
    else:
        with open("s.dmap", "r+b") as file:
            for block in store.COPIES[0]:
                file.seek(block * store.BLOCK)
                file.write(bytes(store.BLOCK))
        dirtmap("check", "-r", "all", "s.dmap")
    status = os.stat("s.dmap")
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (12345, 54321, 0o640)


def test_what_a_killed_one_has_left_goes() -> None:
    left = [f"s.dmap.{uuid.uuid4().hex}.tmp" for _ in range(2)]
    mine = [f"other.dmap.{uuid.uuid4().hex}.tmp", "s.dmap.tmp", "s.dmap.1234.tmp", f"s.dmap.{uuid.uuid4().hex}.tmp.x"]
    for name in left + mine:
        Path(name).touch()
    dirtmap("store", "compact", "s.dmap")
    assert [os.path.exists(name) for name in left] == [False, False]
    assert all(os.path.exists(name) for name in mine)


def test_a_copy_leaves_the_sessions_to_the_original(folder: Path) -> None:
    Path("live").mkdir()
    with dm.open("node:one") as image, image.track() as tracker:
        tracker.mark(0, 1)
        Path("copy.dmap").write_bytes(Path("s.dmap").read_bytes())
        told = dirtmap("store", "new-identity", "copy.dmap").error
        assert "all dirty now: node 'one', bitmap 'b': its tracker is the original's" in told
        live = [path for path in (folder / "live").rglob("*") if path.is_file()]
        assert live
        here = ("--store", "copy.dmap", "--index", "other")
        for node, dirty in (("one", MIB), ("two", 0)):
            assert sum(e["length"] for e in json_of("map", "--dirty", f"node:{node}", "b", *here)) == dirty
        dirtmap("recover", "node:one", *here)
        dirtmap("clear", "node:one", "b", *here)
        assert dm.check("copy.dmap").findings == []
        assert all(path.exists() for path in live)
    assert [e["length"] for e in json_of("map", "--dirty", "node:one", "b")] == [65536]


def test_a_store_in_use_keeps_its_identity() -> None:
    Path("live").mkdir()
    before = Path("s.dmap").read_bytes()[56:72]
    with dm.open("node:one") as image:
        with image.hold("b"):
            assert "node 'one': bitmap 'b': busy: held by" in error_of("store", "new-identity", "s.dmap")
        with image.track() as tracker:
            assert "node 'one': tracked by" in error_of("store", "new-identity", "s.dmap")
            tracker.mark(0, 1)
    assert [e["length"] for e in json_of("map", "--dirty", "node:one", "b")] == [65536]
    assert Path("s.dmap").read_bytes()[56:72] == before
    dirtmap("store", "new-identity", "s.dmap")
    assert Path("s.dmap").read_bytes()[56:72] != before


def number_all(path: str, generation: int) -> None:
    """Gives the newest header another generation, and the other slot the one before."""
    data = Path(path).read_bytes()
    chosen = headers.choose(path, data[: store.RESERVED])
    with open(path, "r+b") as file:
        for slot, number in ((chosen.slot, generation), (1 - chosen.slot, generation - 1)):
            header = replace(chosen.header, generation=number)
            for block, raw in headers.pair(header, slot, followed=slot != chosen.slot):
                file.seek(block * store.BLOCK)
                file.write(raw)


@pytest.mark.parametrize("generation", [store.MAX_GENERATION, store.MAX_GENERATION - 1])
def test_the_last_generation_is_refused_for_change_only(generation: int) -> None:
    number_all("s.dmap", generation)
    if generation < store.MAX_GENERATION:
        dirtmap("mark", "one", "b", 0, 1)
    before = Path("s.dmap").read_bytes()
    assert "so high that no commit can follow" in error_of("mark", "one", "b", MIB // 2, 1)
    for act in ("compact", "new-identity"):
        assert "so high that no commit can follow" in error_of("store", act, "s.dmap")
    assert Path("s.dmap").read_bytes() == before
    dirtmap("list", "one")
    assert dm.check("s.dmap").corruptions == 0


def test_a_store_does_not_count_on_from_a_generation_that_is_made_up() -> None:
    good = Path("s.dmap").read_bytes()
    number_all("s.dmap", layout.MAX_SEEN + 1)
    dirtmap("list", "one")
    Path("s.dmap").write_bytes(good)
    dirtmap("mark", "one", "b", 0, 1)
    with Store("s.dmap") as target:
        assert target.read(lambda snapshot: snapshot.header.generation) < 100


@pytest.fixture
def sound(folder: Path) -> Sound:
    """Another store, with bitmaps that have something in them."""
    (folder / "sound").mkdir()
    return make_sound(folder / "sound")


def test_compaction_through_a_link_leaves_the_link(sound: Sound, folder: Path) -> None:
    link = folder / "link"
    link.symlink_to(sound.path)
    compact(str(link))
    assert link.is_symlink()
    assert read_everything(sound) == sound.bits.keys()
    assert sound.read() != sound.data


def test_compaction_of_a_store_with_two_names_is_refused(sound: Sound, folder: Path) -> None:
    os.link(sound.path, folder / "second")
    with pytest.raises(dm.StorageError, match="hard link"):
        compact(sound.path)
    assert sound.read() == sound.data
