"""A raw node whose image was moved: exact where that is known, all dirty and said where it is not."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from support.cli import dirtmap, error_of, json_of
from support.hosts import ALL, make_host, mapped, refused

import dirtmap.engine as dm
from dirtmap.engine.namespaces import nodes
from dirtmap.engine.storefile.file import Change

MIB = 1 << 20
MARKED = [(MIB, 65536)]


@pytest.fixture(autouse=True)
def _host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Node ``one`` with device ``d1`` on it, both with a bitmap ``b``."""
    monkeypatch.setenv("DIRTMAP_INDEX", str(tmp_path / "index"))
    make_host(tmp_path, monkeypatch)
    dirtmap("device", "add", "d1", "--root", "one")
    for target in ("one", "d1"):
        dirtmap("add", target, "b")
        dirtmap("mark", target, "b", MIB, 1)


def paths() -> dict[str, str]:
    return {item["name"]: Path(item["filename"]).name for kind in ("node", "device") for item in json_of(kind, "list")}


def test_moved_and_confirmed_is_exact() -> None:
    os.rename("one.raw", "moved.raw")
    assert mapped("one", "b") == mapped("d1", "b") == ALL
    assert dirtmap("node", "relocate", "--confirm", "one", "moved.raw").error == ""
    assert mapped("one", "b") == mapped("d1", "b") == MARKED
    assert paths()["one"] == paths()["d1"] == "moved.raw"


def test_a_copy_with_its_time_that_is_confirmed_is_exact() -> None:
    shutil.copy2("one.raw", "copy.raw")
    os.unlink("one.raw")
    dirtmap("node", "relocate", "--confirm", "one", "copy.raw")
    assert mapped("one", "b") == mapped("d1", "b") == MARKED


@pytest.mark.parametrize("options", [[], ["--confirm"]])
def test_all_dirty_and_said_otherwise(options: list[str]) -> None:
    os.rename("one.raw", "moved.raw")
    if options:
        os.utime("moved.raw", ns=(1, 1))
    assert "all dirty" in dirtmap("node", "relocate", *options, "one", "moved.raw").error
    assert mapped("one", "b") == mapped("d1", "b") == ALL
    dirtmap("clear", "one", "b")
    assert mapped("one", "b") == []  # and the node is usable again


def test_move_renames_the_file_and_is_exact() -> None:
    assert dirtmap("node", "relocate", "--move", "one", "moved.raw").error == ""
    assert not Path("one.raw").exists()
    assert mapped("one", "b") == mapped("d1", "b") == MARKED


def test_a_write_whose_time_is_put_back_during_a_move_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def sync(path: str) -> None:
        before = os.stat("moved.raw")
        Path("moved.raw").open("r+b").close()
        time.sleep(0.02)
        os.utime("moved.raw", ns=(before.st_atime_ns, before.st_mtime_ns))

    monkeypatch.setattr(nodes, "sync_folder", sync)
    with dm.Host() as host:
        assert not host.relocate_node("one", "moved.raw", move=True)
    assert mapped("one", "b") == mapped("d1", "b") == ALL


def test_move_of_an_image_in_doubt_leaves_it_in_doubt() -> None:
    os.utime("one.raw", ns=(1, 1))
    assert "all dirty" in dirtmap("node", "relocate", "--move", "one", "moved.raw").error
    assert mapped("one", "b") == mapped("d1", "b") == ALL


def test_a_move_whose_commit_fails_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(change: Change) -> None:
        raise dm.StorageError("here", "no")

    with monkeypatch.context() as patch, dm.Host() as host:
        patch.setattr(Change, "commit", fail)
        with pytest.raises(dm.StorageError, match="here: no"):
            host.relocate_node("one", "moved.raw", move=True)
    assert not Path("moved.raw").exists()
    assert mapped("one", "b") == ALL  # it was renamed twice
    dirtmap("node", "confirm", "one")
    assert mapped("one", "b") == MARKED


def test_a_move_that_a_crash_cuts_short_leaves_all_dirty_and_can_be_confirmed() -> None:
    os.rename("one.raw", "moved.raw")  # what is done before the commit
    assert mapped("one", "b") == ALL
    dirtmap("node", "relocate", "--confirm", "one", "moved.raw")
    assert mapped("one", "b") == MARKED


def test_refused() -> None:
    Path("longer.raw").write_bytes(bytes(9 * MIB))
    for path, why in (
        ("two.raw", "is node 'two' already"),
        ("other.raw", "is node 'other' already"),
        ("q0.qcow2", "already"),
        ("plain.qcow2", "a qcow2 image, and not a raw disk"),
        ("other.dmap", "a store, and not the image of a disk"),
        ("longer.raw", "not the same disk"),
        ("nowhere.raw", "No such file"),
    ):
        assert why in refused("node", "relocate", "--confirm", "one", path)
    assert "exists" in refused("node", "relocate", "--move", "one", "two.raw")
    assert "index scan" in refused("node", "relocate", "q0", "plain.qcow2")
    with dm.open("one") as image:
        with image.hold("b"):
            assert "held" in refused("node", "relocate", "--move", "one", "moved.raw")
        with image.track(intent="off"):
            assert "tracked" in refused("node", "relocate", "--move", "one", "moved.raw")
    with dm.open("d1") as device, device.hold("b"):
        assert "held" in refused("node", "relocate", "--move", "one", "moved.raw")
    assert "no such" in error_of("node", "relocate", "nobody", "moved.raw")
