"""An answer that lacks something says so: images that could not be read, a store that is not there, another size."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import qemu
from support.cli import dirtmap, error_of, json_of

import dirtmap.engine as dm

MIB = 1 << 20
SHORT = [("list",), ("find", "b"), ("node", "list"), ("device", "list")]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIRTMAP_INDEX", str(tmp_path / "state/index"))
    monkeypatch.delenv("DIRTMAP_STORE", raising=False)
    (tmp_path / "images").mkdir()
    return tmp_path


def image(name: str, *, named: bool = False) -> Path:
    path = Path("images", name).absolute()
    qemu.qemu_img("create", "-q", "-f", "qcow2", path, "4M")
    dirtmap("add", path, "b")
    if named:
        dirtmap("node", "add", path.stem, path, "--store", "else.dmap", "--index", "else")
    return path


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Another process has it open for writing, and closes it in good order."""
    with qemu.StorageDaemon(path) as daemon:
        yield
        daemon.quit()


def require_whole(path: Path) -> None:
    assert [found["filename"] for found in json_of("find", "b")] == [str(path)]
    assert str(path) in [found["filename"] for found in json_of("list")]


def require_told(path: Path, why: str) -> None:
    """Both answers name the image, and exit with 1."""
    for command in (("find", "b"), ("list",)):
        done = dirtmap(*command, status=1)
        assert f"dirtmap: {path}: " in done.error
        assert why in done.error


@pytest.mark.parametrize("named", [False, True])
def test_an_image_that_was_held_when_it_was_found_is_tried_again(named: bool) -> None:
    path = image("a.qcow2", named=named)
    with held(path):
        dirtmap("index", "scan", "images")
        require_told(path, "open for writing by")
        for command in (("find", "b"), ("list",)):
            assert str(path) in dirtmap(*command, "-U").out
    require_whole(path)
    dirtmap("index", "scan", "images")
    require_whole(path)
    if named:
        dirtmap("map", "node:a", "b")
    dirtmap("index", "rebuild")
    require_whole(path)


def test_a_named_image_that_was_held_when_it_was_found_is_known_by_its_name() -> None:
    path, moved = image("a.qcow2", named=True), Path("images/moved.qcow2").absolute()
    with held(path):
        assert json_of("index", "scan", "images")["new"] == 1
        assert [(node["name"], node["filename"]) for node in json_of("node", "list")] == [("a", str(path))]
        assert "open for writing by" in error_of("map", "node:a", "b")
        assert json_of("list", "-U", "node:a")[0]["filename"] == str(path)
        path.rename(moved)
        assert "index scan" in error_of("map", "node:a", "b")
        assert json_of("index", "scan", "images")["moved"] == [{"filename": str(moved), "node": "a"}]
        require_told(moved, "open for writing by")
        assert json_of("list", "-U", "node:a")[0]["filename"] == str(moved)
        again = moved.rename(moved.with_name("again.qcow2"))
    dirtmap("index", "scan", "images")
    require_whole(again)
    dirtmap("map", "node:a", "b")


def test_a_held_image_whose_name_is_anothers_is_told_and_left_out() -> None:
    path = image("a.qcow2", named=True)
    Path("raw").write_bytes(bytes(MIB))
    dirtmap("node", "add", "a", "raw")
    with held(path):
        assert json_of("index", "scan", "images")["clashes"] == [{"filename": str(path), "node": "a"}]
        assert [node["filename"] for node in json_of("node", "list")] == [os.path.abspath("raw")]
    assert json_of("index", "scan", "images")["clashes"] == [{"filename": str(path), "node": "a"}]


def test_an_image_that_was_damaged_when_it_was_found_is_tried_again() -> None:
    path = image("a.qcow2")
    whole = path.read_bytes()
    path.write_bytes(whole[:24] + b"\xff" * 8 + whole[32:])  # its size
    dirtmap("index", "scan", "images")
    require_told(path, "size")
    path.write_bytes(whole)
    require_whole(path)


def test_a_store_that_was_damaged_when_it_was_found_is_tried_again() -> None:
    Path("raw").write_bytes(bytes(MIB))
    dirtmap("node", "add", "n", "raw", "--store", "images/s.dmap", "--index", "else/index")
    dirtmap("add", "node:n", "b", "--store", "images/s.dmap", "--index", "else/index")
    path = Path("images/s.dmap").absolute()
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole[at : at + 4] + bytes(4092) for at in range(0, len(whole), 4096)))
    dirtmap("index", "scan", "images")
    require_told(path, "s.dmap")
    path.write_bytes(whole)
    dirtmap("index", "scan", "images")
    require_whole(path)
    dirtmap("map", "node:n", "b")


def test_one_that_is_gone_again_is_not_told_for_ever() -> None:
    path = image("a.qcow2")
    with held(path):
        dirtmap("index", "scan", "images")
    path.unlink()
    dirtmap("index", "scan", "images")
    assert json_of("find", "b") == []


def test_a_copy_that_was_held_is_left_out_as_any_copy() -> None:
    path = image("a.qcow2")
    dirtmap("node", "add", "a", path)
    Path("images/copy.qcow2").write_bytes(path.read_bytes())
    with held(Path("images/copy.qcow2")):
        dirtmap("index", "scan", "images")
        require_whole(path)
    dirtmap("index", "scan", "images")
    require_whole(path)


def test_one_that_proves_to_be_a_copy_is_forgotten() -> None:
    """It was found before the image whose copy it is."""
    path = image("a.qcow2", named=True)
    Path("copies").mkdir()
    copy, whole = Path("copies/copy.qcow2"), path.read_bytes()
    copy.write_bytes(whole[:24] + b"\xff" * 8 + whole[32:])  # its size: it is damaged, and remembered by its path
    dirtmap("index", "scan", "copies")
    dirtmap("node", "add", "a", path)
    copy.write_bytes(whole)
    assert json_of("index", "scan", "copies", "images")["twins"]
    require_whole(path)


# A store that is not there.


def a_typo() -> str:
    return "tpyo.dmap"


def a_missing_folder() -> str:
    return "no/folder/s.dmap"


def a_dangling_link() -> str:
    Path("s.dmap").symlink_to("nowhere")
    return "s.dmap"


def a_loop() -> str:
    Path("s.dmap").symlink_to("s.dmap")
    return "s.dmap"


def below_a_file() -> str:
    Path("file").touch()
    return "file/s.dmap"


@pytest.mark.parametrize("command", SHORT)
@pytest.mark.parametrize("make", [a_typo, a_missing_folder, a_dangling_link, a_loop, below_a_file])
@pytest.mark.parametrize("how", ["option", "environment"])
def test_a_chosen_store_has_to_be_there(
    monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], make: Callable[[], str], how: str
) -> None:
    path = make()
    if how == "environment":
        monkeypatch.setenv("DIRTMAP_STORE", path)
    told = error_of(*command, *(["--store", path] if how == "option" else []))
    assert told.startswith(f"{path}: ")


@pytest.mark.parametrize("command", SHORT)
def test_the_normal_store_need_not(folder: Path, command: tuple[str, ...]) -> None:
    normal = folder / "state/default.dmap"
    assert dirtmap(*command).error == f"dirtmap: {normal}: no store yet; 'index scan' and 'node add' make it\n"
    assert json_of(*command) == []
    assert dirtmap(*command, "-q").error == ""
    normal.parent.mkdir(exist_ok=True)
    normal.symlink_to("nowhere")
    assert error_of(*command) == f"{normal}: a link to what is not there"


def test_the_engine_tells_them_apart(folder: Path) -> None:
    with dm.Host() as host:
        assert not host.has_store()
        assert host.nodes([]) == []
    with dm.Host(store="tpyo.dmap") as host, pytest.raises(dm.StorageError, match="no such store"):
        host.find("b")


# Another size.


@pytest.mark.parametrize("target", ["node:n", "device:d", "file:s.dmap"])
def test_another_size_is_an_error(target: str) -> None:
    Path("raw").write_bytes(bytes(4 * MIB))
    chosen = "--store", "s.dmap"
    dirtmap("node", "add", "n", "raw", *chosen)
    dirtmap("add", "node:n", "b", *chosen)
    dirtmap("device", "add", "d", "--root", "n", *chosen)
    dirtmap("add", "device:d", "b", *chosen)
    os.truncate("raw", 6 * MIB)
    done = dirtmap("list", target, *chosen, status=1)
    assert f"its image has {6 * MIB} bytes now, and had {4 * MIB}; '" in done.error
    assert "' adopts the new size" in done.error
    (shown,) = json_of("list", target, *chosen, status=1)
    assert str(6 * MIB) in shown["errors"][0]
    if target == "node:n":
        (reason,) = shown["errors"]
        assert error_of("map", target, "b", *chosen) == reason
        dirtmap("node", "resize", "n", *chosen)
        dirtmap("list", target, *chosen)
