"""A device's root: writes into a data file beside it are seen, and another image in its place is not taken for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support import qemu
from support.cli import dirtmap, error_of, json_of

import dirtmap.engine as dm
from dirtmap.engine.identity import identity_of, identity_of_disk

MIB = 1 << 20
SIZE = 4 * MIB
ALL = [(0, SIZE)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mapped(target: str) -> list[tuple[int, int]]:
    return [(e["offset"], e["length"]) for e in json_of("map", "--dirty", target, "m")]


def device(root: str) -> None:
    dirtmap("node", "add", "root", root)
    dirtmap("device", "add", "d", "--root", "root")
    dirtmap("add", "d", "m")
    assert mapped("d") == []


def sidecar() -> None:
    os.mkdir("im")
    Path("im/data.raw").touch()
    os.truncate("im/data.raw", SIZE)
    dirtmap("sidecar", "im/data.raw", "im/side.qcow2")


def qemu_made() -> None:
    os.mkdir("im")
    os.chdir("im")  # QEMU makes the data file where it is itself, and looks for it beside the image
    qemu.create(Path("side.qcow2"), SIZE, "data_file=data.raw")
    os.chdir("..")


@pytest.fixture(params=[sidecar, qemu_made])
def root(request: pytest.FixtureRequest) -> str:
    request.param()
    device("im/side.qcow2")
    return "im/side.qcow2"


def test_a_write_into_an_external_data_file_makes_a_device_dirty(root: str) -> None:
    before = os.stat(root)
    os.chdir("im")
    qemu.qemu_io(Path("side.qcow2"), "write 0 64k")
    os.chdir("..")
    os.utime(root, ns=(before.st_atime_ns, before.st_mtime_ns))  # nothing else tells
    assert mapped("d") == ALL
    assert "has changed while nobody tracked it" in dirtmap("list", "d").error


def put_back(path: Path) -> None:
    before = os.stat(path)
    path.write_bytes(bytes(SIZE))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


REPLACED: dict[str, Callable[[], object]] = {
    "written": lambda: Path("im/data.raw").write_bytes(bytes(SIZE)),
    "a copy in its place": lambda: [shutil.copy2("im/data.raw", "n"), os.rename("n", "im/data.raw")],
    "written, and its time put back": lambda: put_back(Path("im/data.raw")),
    "set back": lambda: os.utime("im/data.raw", (1, 1)),
    "gone": lambda: os.remove("im/data.raw"),
}


@pytest.mark.parametrize("act", REPLACED)
def test_an_external_data_file_that_is_another_makes_a_device_dirty(root: str, act: str) -> None:
    os.utime(root, ns=(2**62, 2**62))  # the image's own time, however late, hides nothing
    dirtmap("device", "set-root", "d", "root", "--content-unchanged")
    dirtmap("clear", "d", "m")
    assert mapped("d") == []
    REPLACED[act]()
    assert mapped("d") == ALL
    if act == "gone":
        assert "external data file, " in dirtmap("list", "d").error
        dirtmap("add", "root", "n")  # its own bitmaps are none of the device's concern
    dirtmap("mark", "d", "m", "0", "1")
    assert mapped("d") == ALL


def test_a_device_on_an_external_data_file_stays_right_where_nothing_is_written(root: str) -> None:
    dirtmap("mark", "d", "m", "0", "1")
    dirtmap("add", "root", "n")  # a change of dirtmap's own
    assert mapped("d") == [(0, 65536)]
    with dm.open("d") as opened, opened.track() as tracker, tracker.write(MIB, 1):
        Path("im/data.raw").open("r+b").close()
        os.utime("im/data.raw")
    assert mapped("d") == [(0, 65536), (MIB, 65536)]
    os.rename(root, "im/moved.qcow2")
    dirtmap("index", "scan", ".")
    assert mapped("d") == ALL  # what gives it a new name gives it another time of the last change
    dirtmap("device", "set-root", "d", "root", "--content-unchanged")
    assert mapped("d") == [(0, 65536), (MIB, 65536)]
    os.utime("im/data.raw")
    assert mapped("d") == ALL


def test_only_an_external_data_file_makes_a_difference(folder: Path) -> None:
    Path("raw").write_bytes(bytes(SIZE))
    qemu.create(Path("plain.qcow2"), SIZE)
    sidecar()
    for path in ("raw", "plain.qcow2"):
        assert identity_of_disk(path) == identity_of(path)
    assert identity_of_disk("im/side.qcow2") != identity_of("im/side.qcow2")


# Another image in the root's place.


def qcow2_image() -> None:
    qemu.create(Path("a.qcow2"), SIZE)


def other_node() -> None:
    qemu.create(Path("a.qcow2"), SIZE)
    dirtmap("node", "add", "other", "a.qcow2")


def larger() -> None:
    qemu.create(Path("a.qcow2"), 2 * SIZE)


def raw_image() -> None:
    Path("a.qcow2").touch()
    os.truncate("a.qcow2", SIZE)


def larger_raw_image() -> None:
    Path("a.qcow2").touch()
    os.truncate("a.qcow2", 2 * SIZE)


CHANGES = [("clear", "d", "m"), ("add", "d", "x"), ("remove", "d", "m"), ("recover", "d"), ("mark", "d", "m", "0", "1")]


@pytest.mark.parametrize("impostor", [qcow2_image, other_node, larger, raw_image, larger_raw_image])
def test_another_image_in_the_roots_place_is_not_taken_for_it(impostor: Callable[[], None]) -> None:
    qemu.create(Path("a.qcow2"), SIZE)
    device("a.qcow2")
    os.mkdir("n")
    os.rename("a.qcow2", "n/a.qcow2")
    impostor()
    assert mapped("d") == ALL
    assert "its root's image is not at" in dirtmap("list", "d").error
    for change in CHANGES:
        assert "its root's image is not at" in error_of(*change), change
    with dm.open("d") as opened, pytest.raises(dm.Error):
        opened.track()
    if impostor is other_node:
        dirtmap("node", "remove", "other")
    os.remove("a.qcow2")
    dirtmap("index", "scan", ".")
    assert mapped("d") == ALL
    dirtmap("device", "set-root", "d", "root", "--content-unchanged")
    assert mapped("d") == []
    qemu.qemu_io(Path("n/a.qcow2"), "write 0 1M")
    assert mapped("d") == ALL
    dirtmap("clear", "d", "m")
    assert mapped("d") == []


def test_the_first_bitmap_is_not_begun_on_another_image() -> None:
    qemu.create(Path("a.qcow2"), SIZE)
    dirtmap("node", "add", "root", "a.qcow2")
    dirtmap("device", "add", "d", "--root", "root")
    os.rename("a.qcow2", "b.qcow2")
    qemu.create(Path("a.qcow2"), SIZE)
    assert "its root's image is not at" in error_of("add", "d", "m")
    os.rename("b.qcow2", "a.qcow2")
    dirtmap("add", "d", "m")
    assert mapped("d") == []


def test_a_device_is_given_another_root_where_its_own_is_lost() -> None:
    qemu.create(Path("a.qcow2"), SIZE)
    device("a.qcow2")
    os.remove("a.qcow2")
    qemu.create(Path("a.qcow2"), SIZE)
    dirtmap("node", "add", "next", "a.qcow2")
    dirtmap("device", "set-root", "d", "next")
    assert mapped("d") == ALL
    dirtmap("clear", "d", "m")
    assert mapped("d") == []
