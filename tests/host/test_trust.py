"""Root believes no store and no index that another user can have written, and follows no link that was planted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support import qemu
from support.cli import dirtmap, error_of, json_of

import dirtmap.engine as dm
from dirtmap.engine.system.trust import distrust

MIB = 1 << 20
USER = 12345  # any but root

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root has what others may not lead astray")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIRTMAP_INDEX", str(tmp_path / "state/inner/index"))
    monkeypatch.delenv("DIRTMAP_STORE", raising=False)
    for name in ("raw", "raw2"):
        Path(name).write_bytes(bytes(MIB))
    dirtmap("node", "add", "n", "raw")
    dirtmap("add", "n", "b")
    return tmp_path


def chown(path: str) -> None:
    os.chown(path, USER, USER)


def group(path: str) -> None:
    Path(path).chmod(0o770)


def world(path: str) -> None:
    Path(path).chmod(0o707)


STORE = "state/inner/default.dmap"
UNSAFE = [
    (act, path)
    for act in (chown, group, world)
    for path in (STORE, "state/inner", "state", "state/inner/index", "state/inner/index/data.mdb")
]
NAMED = [
    ("map", "n", "b"),
    ("list",),
    ("list", "node:n"),
    ("find", "b"),
    ("node", "list"),
    ("device", "list"),
    ("node", "add", "m", "raw2"),
    ("node", "remove", "n"),
    ("index", "scan", "."),
    ("index", "verify"),
    ("index", "rebuild"),
]


@pytest.mark.parametrize(("spoil", "path"), UNSAFE, ids=[f"{act.__name__} {path}" for act, path in UNSAFE])
def test_what_another_user_can_replace_is_refused(folder: Path, spoil: Callable[[str], None], path: str) -> None:
    spoil(path)
    why = f"{folder / path} " + ("belongs to user 12345" if spoil is chown else "can be written by ")
    before = Path(STORE).read_bytes()
    for command in NAMED:
        if "data.mdb" in path and command[0] == "index" and command[1] == "scan":
            continue  # the same, after it has looked at the store
        told = error_of(*command)
        assert "not trusted: " + why in told, command
        assert told.endswith("; --trust insists"), command
    assert Path(STORE).read_bytes() == before
    dirtmap("map", "n", "b", "--trust")
    dirtmap("node", "add", "m", "raw2", "--trust")
    with dm.Host(trust=True) as host:
        assert [node.name for node in host.nodes([])] == ["m", "n"]
        assert dm.index_stats(host)
    with pytest.raises(dm.Error, match="not trusted"):
        dm.open("n")
    with dm.open("n", trust=True) as image, dm.this_host(trust=True) as host:
        assert list(image) == [bitmap.name for bitmap in host.describe("n").bitmaps]
    with dm.transaction(["n"], trust=True) as transactions:
        assert list(transactions["n"]) == ["b"]
    assert dm.describe("n", trust=True).bitmaps
    assert dm.check("n", trust=True).corruptions == 0
    assert dm.recover("n", trust=True) == []
    assert dm.dump("n", trust=True)


def test_the_statistics_of_an_index_are_no_exception() -> None:
    chown("state/inner/index")
    assert "not trusted" in error_of("index", "stats")


def test_a_path_that_is_named_needs_no_trust(folder: Path) -> None:
    qemu.qemu_img("create", "-q", "-f", "qcow2", "theirs.qcow2", "1M")
    dirtmap("add", "theirs.qcow2", "b")
    for path in ("theirs.qcow2", STORE, "raw"):
        chown(path)
    dirtmap("list", "theirs.qcow2")
    dirtmap("map", "theirs.qcow2", "b")
    assert json_of("list", f"file:{STORE}")[0]["bitmaps"]
    dirtmap("check", f"file:{STORE}")
    dirtmap("dump", f"file:{STORE}")


def test_the_image_of_a_node_may_be_another_users() -> None:
    """It is the hypervisor's, as a rule."""
    chown("raw")
    dirtmap("map", "n", "b")


def test_another_store_that_is_not_trusted_hides_only_itself(folder: Path) -> None:
    Path("other").mkdir()
    dirtmap("node", "add", "m", "raw2", "--store", "other/s.dmap")
    dirtmap("add", "m", "b", "--store", "other/s.dmap")
    assert len(json_of("find", "b")) == 2
    chown("other")
    done = dirtmap("find", "b", status=1)
    assert f"dirtmap: {folder}/other/s.dmap: not trusted: {folder}/other belongs to user 12345" in done.error
    assert "raw" in done.out or "default.dmap" in done.out
    dirtmap("map", "n", "b")
    assert "not trusted" in error_of("map", "m", "b")
    dirtmap("map", "m", "b", "--trust")


def test_the_sticky_bit_keeps_others_away() -> None:
    Path("state").chmod(0o1777)
    dirtmap("map", "n", "b")


def test_a_link_on_the_way_is_judged(folder: Path) -> None:
    Path("theirs").mkdir()
    Path("theirs/s.dmap").symlink_to(folder / STORE)
    dirtmap("map", "n", "b", "--store", "theirs/s.dmap")
    os.chown("theirs/s.dmap", USER, USER, follow_symlinks=False)
    assert f"{folder}/theirs/s.dmap belongs to user 12345" in error_of("map", "n", "b", "--store", "theirs/s.dmap")
    os.chown("theirs/s.dmap", 0, 0, follow_symlinks=False)
    chown("theirs")
    assert f"{folder}/theirs belongs to user 12345" in error_of("map", "n", "b", "--store", "theirs/s.dmap")


def test_other_users_judge_for_themselves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chown(STORE)
    assert distrust(str(folder / STORE), set())
    monkeypatch.setattr(os, "geteuid", lambda: USER)
    assert distrust(str(folder / STORE), set()) is None


@pytest.mark.parametrize("suffix", [".guard", ".stamp"])
def test_a_planted_link_is_not_followed(folder: Path, suffix: str) -> None:
    Path("fresh").mkdir()
    guard, victim = Path("fresh/index" + suffix), folder / "victim"
    guard.symlink_to(victim)
    chosen = "--index", "fresh/index", "--store", STORE
    assert error_of("find", "b", *chosen) == (
        f"{folder / guard}: index: a symbolic link, which is not followed; remove it"
    )
    assert not victim.exists()
    guard.unlink()
    dirtmap("find", "b", *chosen)


def test_a_second_file_of_a_trusted_folder_is_looked_at_itself(folder: Path) -> None:
    trusted: set[str] = set()
    paths = [folder / name for name in ("one", "two", "three")]
    for path in paths[:2]:
        path.touch()
        assert distrust(str(path), trusted) is None
    assert str(folder) in trusted
    paths[2].symlink_to(paths[1])
    paths[1].chmod(0o666)
    assert "can be written by every user" in str(distrust(str(paths[2]), trusted))


def test_what_is_not_there_yet_is_not_trusted_once_it_is(folder: Path) -> None:
    trusted: set[str] = set()
    later = folder / "later"
    assert distrust(str(later), trusted) is None
    later.touch()
    later.chmod(0o666)
    assert distrust(str(later), trusted)
