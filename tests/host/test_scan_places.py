"""What a scan takes for the original and what for a copy, what for moved, gone or hidden, in whichever store it is."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import qemu
from support.cli import dirtmap, error_of, json_of

import dirtmap.engine as dm
from dirtmap.engine.host.host import Host
from dirtmap.engine.host.scan import scan
from dirtmap.engine.identity import identity_of
from dirtmap.engine.storefile.file import Store, create
from dirtmap.engine.storefile.table import NamespaceTable
from dirtmap.engine.system import file as fileio
from dirtmap.engine.system.file import File
from dirtmap.fmt.store import KIND_NODE, Record

KIB, MIB = 1 << 10, 1 << 20
SIZE = 8 * MIB


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A qcow2 node with a bitmap, in a folder; the store and the index are above it."""
    (tmp_path / "im").mkdir()
    monkeypatch.chdir(tmp_path / "im")
    qemu.create(Path("a.qcow2"), SIZE)
    dirtmap("node", "add", "a", "a.qcow2")
    dirtmap("add", "a", "b")
    return tmp_path / "im"


def mapped(target: str, name: str = "b") -> list[tuple[int, int]]:
    return [(e["offset"], e["length"]) for e in json_of("map", "--dirty", target, name)]


def scanned(*paths: str) -> dict[str, Any]:
    done: dict[str, Any] = json_of("index", "scan", *(paths or (".",)))
    return done


def short(entries: list[dict[str, str]], *keys: str) -> list[tuple[str, ...]]:
    """What a scan told of, by the last part of its paths, in order."""
    return sorted(tuple(os.path.basename(each[key] or "") for key in ("filename", *keys)) for each in entries)


def nodes() -> list[tuple[str, str]]:
    """The name of each node, and of its image's file."""
    return [(node["name"], os.path.basename(node["filename"])) for node in json_of("node", "list")]


# Which one is the original.


@pytest.mark.parametrize("copy", ["0-copy.qcow2", "copy.qcow2", "sub/copy.qcow2"])
def test_the_moved_image_is_the_original_whatever_is_found_first(copy: str) -> None:
    os.mkdir("sub")
    shutil.copy("a.qcow2", copy)
    dirtmap("mark", "a", "b", MIB, 1)
    os.rename("a.qcow2", "sub/m.qcow2")
    done = scanned()
    assert short(done["moved"], "node") == [("m.qcow2", "a")]
    assert short(done["twins"], "original") == [("copy.qcow2" if "-" not in copy else copy, "m.qcow2")]
    assert mapped("a") == [(MIB, 64 * KIB)]
    assert "a copy of" in error_of("list", copy)


def test_of_copies_alone_none_is_the_original() -> None:
    for name in ("one", "two"):
        shutil.copy("a.qcow2", name)
    os.remove("a.qcow2")
    for _ in range(2):
        done = scanned()
        assert short(done["twins"], "original") == [("one", "two"), ("two", "one")]
        assert done["moved"] == []
        assert short(done["gone"], "node") == [("a.qcow2", "a")]
    assert nodes() == [("a", "a.qcow2")]
    # The only one that is left is the image, as one that was moved to another file system.
    os.remove("one")
    assert short(scanned()["moved"]) == [("two",)]
    assert mapped("a") == []


def test_an_original_that_is_held_is_none_the_less_the_original() -> None:
    shutil.copy("a.qcow2", "copy")
    os.rename("a.qcow2", "m.qcow2")
    with qemu.StorageDaemon(Path("m.qcow2")) as daemon:
        done = scanned()
        assert short(done["twins"], "original") == [("copy", "m.qcow2")]
        assert short(done["moved"]) == [("m.qcow2",)]  # it says itself which image it is
        daemon.quit()
    assert scanned()["moved"] == []
    assert nodes() == [("a", "m.qcow2")]


def test_a_moved_image_keeps_what_a_dead_tracker_left() -> None:
    dirtmap("add", "a", "old", "--disabled")
    dirtmap("mark", "a", "old", 3 * MIB, 1)
    code = f"""
import os, signal, dirtmap.engine as dm
tracker = dm.open("a").track()
tracker.mark({MIB}, 1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    os.rename("a.qcow2", "m.qcow2")
    assert short(scanned()["moved"]) == [("m.qcow2",)]
    dirtmap("recover", "a")
    assert set(mapped("a")) >= {(MIB, 64 * KIB)}
    assert set(mapped("a", "old")) >= {(3 * MIB, 64 * KIB)}


# A name that was changed in the image only.


def _renamed_in_the_image_only(new: str) -> None:
    """`node rename a NEW`, killed between the image's commit and the store's."""
    code = f"""
import os, signal, dirtmap.engine as dm
from dirtmap.engine.storefile.file import Change
Change.commit = lambda change: os.kill(os.getpid(), signal.SIGKILL)
dm.this_host().rename_node("a", {new!r}, with_bitmaps=True)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL


@pytest.mark.parametrize("moved", [False, True])
def test_a_rename_that_was_killed_halfway(moved: bool) -> None:
    dirtmap("mark", "a", "b", MIB, 1)
    dirtmap("device", "add", "d", "--root", "a")
    dirtmap("add", "d", "of-d")
    with dm.open("a").hold("b"):
        (before,) = (record for record in _records() if record.name == b"a")
    _renamed_in_the_image_only("new")
    with dm.open("a.qcow2").hold("b", "a backup"):
        assert "held by 'a backup'" in error_of("remove", "a.qcow2", "b")
    path = "a.qcow2"
    if moved:
        path = "m.qcow2"
        os.rename("a.qcow2", path)
    assert "is not its image any more" in error_of("node", "rename", "a", "other") or moved
    for times in range(2):
        done = scanned()
        assert short(done["moved"], "node") == ([] if times else [(path, "new")])
        assert (done["new"], done["clashes"], done["twins"], done["gone"]) == (0, [], [], [])
    assert nodes() == [("new", path)]
    (after,) = (record for record in _records() if record.name == b"new")
    assert after.uuid == before.uuid
    assert mapped("new") == [(MIB, 64 * KIB)]
    assert json_of("device", "list")[0]["root"] == "new"
    dirtmap("device", "remove", "d", status=1)
    dirtmap("remove", "d", "of-d")
    dirtmap("device", "remove", "d")
    dirtmap("remove", "new", "b")
    dirtmap("node", "remove", "new")
    assert json_of("list", path)[0]["bitmaps"] == []


def test_a_node_is_not_removed_from_an_image_of_another_name() -> None:
    dirtmap("remove", "a", "b")
    _renamed_in_the_image_only("new")
    before = Path("a.qcow2").read_bytes()
    dirtmap("node", "remove", "a")
    assert Path("a.qcow2").read_bytes() == before
    assert scanned()["new"] == 1
    assert nodes() == [("new", "a.qcow2")]


def _records() -> list[Any]:
    with Store(os.environ["DIRTMAP_STORE"]) as target:
        return target.read(lambda snapshot: list(snapshot.table()))


# Gone, hidden, and reached twice.


def test_every_name_of_what_is_gone() -> None:
    Path("r.raw").write_bytes(bytes(SIZE))
    create("o.dmap")
    scanned("o.dmap")
    # A second node on one image is refused, but there may be some from before.
    for name, path in (("r1", os.environ["DIRTMAP_STORE"]), ("r2", os.environ["DIRTMAP_STORE"]), ("r3", "o.dmap")):
        with Store(path) as target, target.change() as change:
            record = Record(name.encode(), KIND_NODE, uuid.uuid4().bytes, SIZE, change.generation)
            change.table.put(replace(record, path=os.fsencode(Path("r.raw").absolute()), identity=identity_of("r.raw")))
    for number, root in enumerate(("a", "r2")):
        dirtmap("device", "add", f"d{number}", "--root", root)
    os.remove("r.raw")
    os.remove("a.qcow2")
    done = scanned()
    assert short(done["gone"], "node") == [("a.qcow2", "a"), *(("r.raw", f"r{n}") for n in (1, 2, 3))]


def test_the_image_of_a_root_is_known_at_the_next_scan() -> None:
    dirtmap("device", "add", "d", "--root", "a")
    with Store(os.environ["DIRTMAP_STORE"]) as target:
        before = target.headers()
        scanned()
        assert target.headers() == before


class Refusing(File):
    """A file that nobody may read, where its name says so."""

    def __init__(self, path: str, **options: bool) -> None:
        if os.path.basename(path).startswith("hidden"):
            raise dm.StorageError(path, "open: Permission denied")
        super().__init__(path, **options)


def test_what_cannot_be_read_is_told_and_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkdir("closed")
    for name in ("hidden1.qcow2", "closed/x.qcow2"):
        qemu.create(Path(name), SIZE)
    scanned()
    os.chmod("hidden1.qcow2", 0)
    qemu.create(Path("hidden2.qcow2"), SIZE)
    dirtmap("node", "add", "x", "closed/x.qcow2")
    shutil.copy("closed/x.qcow2", "copy")
    before = json_of("node", "list")
    look, status = os.scandir, os.stat

    def refuse(act: Any) -> Any:
        def refused(path: Any, *arguments: Any, **options: Any) -> Any:
            if "closed" in os.fspath(path) and (act is look or "closed/" in os.fspath(path)):
                raise PermissionError(13, "Permission denied")
            return act(path, *arguments, **options)

        return refused

    with monkeypatch.context() as patch, fileio.using(Refusing):  # the superuser may read anything
        patch.setattr(os, "scandir", refuse(look))
        patch.setattr(os, "stat", refuse(status))
        patch.setattr(os, "access", lambda path, mode: "closed" not in path)
        done = dirtmap("index", "scan", ".")
        assert done.out.endswith(", 1 twin, 0 names that clash, 0 gone, 3 unreadable\n")
        assert f"{os.path.abspath('closed')}: skipped: Permission denied" in done.error
        found = scanned()
    assert short(found["unreadable"], "what") == [
        ("closed", "Permission denied"),
        *((f"hidden{number}.qcow2", "open: Permission denied") for number in (1, 2)),
    ]
    assert (found["gone"], found["moved"]) == ([], [])
    assert json_of("node", "list") == before
    assert "hidden1.qcow2" in str(json_of("list"))


def test_the_reason_of_damage_is_told_whoever_read_it_first() -> None:
    Path("bad.qcow2").write_bytes(b"QFI\xfb" + bytes(200))
    Path("bad.dmap").write_bytes(b"DMS\xfc" + bytes(20_000))
    told = [short(scanned()["damaged"], "what") for _ in range(2)]
    assert told[0] == told[1]
    assert [path for path, _ in told[0]] == ["bad.dmap", "bad.qcow2"]
    for _, what in told[0]:
        assert what
        assert what != "as found before"


def test_a_container_has_one_path_whichever_link_leads_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    qemu.create(Path("plain.qcow2"), SIZE)
    create("o.dmap")
    create("p.dmap")
    os.symlink(os.getcwd(), "../link")
    os.symlink("plain.qcow2", "plain-link")
    for paths in (["."], ["../link"], ["../link", "."], ["plain-link"]):
        done = scanned(*paths)
        assert done["twins"] == []
    dirtmap("node", "add", "r", "plain.qcow2", "--store", "../link/p.dmap")
    scanned()
    found = [os.path.basename(each["filename"]) for each in json_of("list")]
    assert sorted(found) == ["a.qcow2", "default.dmap", "o.dmap", "p.dmap", "plain.qcow2"]
    monkeypatch.setenv("DIRTMAP_STORE", f"{Path('../link').absolute()}/../default.dmap")
    assert scanned("..")["twins"] == []
    assert len(json_of("list")) == 5


def test_the_default_store_is_read_once_for_all_stores_that_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def copies() -> list[tuple[str, str]]:
        with Host() as host:
            return [(os.path.basename(one), os.path.basename(other)) for one, other in scan(host, ["."]).copies]

    create("a.dmap")
    assert copies() == []
    shutil.copy("a.dmap", "b.dmap")
    create("c.dmap")
    create("d.dmap")
    tables = []
    every = NamespaceTable.__iter__

    def counted(table: NamespaceTable) -> Iterator[Record]:
        tables.append(table)
        return every(table)

    monkeypatch.setattr(NamespaceTable, "__iter__", counted)
    assert copies() == [("b.dmap", "a.dmap")]
    assert len(tables) == 1
