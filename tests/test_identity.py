"""Names and identities: nodes of a store, qcow2 images that carry their own, copies that are told from originals."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support import qemu

import dirtmap.engine as dm
from dirtmap.engine import changes
from dirtmap.engine.qcow2.image import Image
from dirtmap.engine.store import nodes
from dirtmap.engine.store.nodes import add_node
from dirtmap.engine.store.store import Store, create

MIB = 1 << 20
GIB = 1 << 30


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIRTMAP_STORE", "nodes.dmap")
    create("nodes.dmap")
    with Store("nodes.dmap") as opened:
        yield opened


def raw(name: str, size: int = GIB) -> str:
    Path(name).touch()
    os.truncate(name, size)
    return name


def qcow2(name: str, size: int = GIB, options: str = "") -> str:
    qemu.create(Path(name), size, options)
    return name


def identity(path: str) -> tuple[str | None, str | None]:
    with dm.open(path) as image:
        return image.name, image.uuid


QEMU_ACTS = {
    "bitmap added": lambda p: qemu.qemu_img("bitmap", "--add", p, "other"),
    "bitmap added and removed": lambda p: [qemu.qemu_img("bitmap", *a, p, "x") for a in (["--add"], ["--remove"])],
    "written": lambda p: qemu.qemu_io(Path(p), "write 1M 1M"),
    "resized": lambda p: qemu.qemu_img("resize", "-q", p, "2G"),
    "amended": lambda p: qemu.qemu_img("amend", "-o", "lazy_refcounts=on", p),
    "snapshot taken": lambda p: qemu.qemu_img("snapshot", "-c", "s", p),
    "checked": lambda p: qemu.qemu_img("check", "-q", "-r", "all", p),
    "rebased": lambda p: qemu.qemu_img("rebase", "-q", "-u", "-b", "", p),
}


@pytest.mark.parametrize("act", QEMU_ACTS)
@pytest.mark.parametrize("bitmap_first", [False, True])
def test_qemu_keeps_an_identity(store: Store, act: str, bitmap_first: bool) -> None:
    path = qcow2("disk.qcow2")
    if bitmap_first:
        qemu.qemu_img("bitmap", "--add", path, "first")
    nodes.add_qcow2(store, "drive0", path)
    before = identity(path)
    assert before[0] == "drive0"
    QEMU_ACTS[act](path)
    assert identity(path) == before
    qemu.check(path)


def test_a_converted_image_has_none(store: Store) -> None:
    nodes.add_qcow2(store, "drive0", qcow2("disk.qcow2"))
    qemu.qemu_img("convert", "-O", "qcow2", "disk.qcow2", "other.qcow2")
    assert identity("other.qcow2") == (None, None)


def test_an_identity_moves_a_backing_file_name_out_of_its_way(store: Store) -> None:
    qcow2("base.qcow2")
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2")
    nodes.add_qcow2(store, "top", "top.qcow2")
    assert qemu.info("top.qcow2")["backing-filename"] == "base.qcow2"
    with Image("top.qcow2") as image:
        image.set_identity("a-much-longer-name-than-that")
        assert list(image) == []
    assert qemu.info("top.qcow2")["backing-filename"] == "base.qcow2"
    qemu.qemu_img("bitmap", "--add", "top.qcow2", "b")
    assert identity("top.qcow2")[0] == "a-much-longer-name-than-that"


def test_names_change_often_and_bitmaps_stay(store: Store) -> None:
    path = qcow2("disk.qcow2")
    with dm.open(path) as image, image.transaction() as bitmaps:
        changes.add(bitmaps, "b")
        bitmaps["b"].mark(MIB, 1)
    with Image(path) as image:
        for number in range(40):
            image.set_identity("n" * (number % 9 + 1))
            assert image.name == "n" * (number % 9 + 1)
        first = image.uuid
        image.set_identity("n", new_uuid=True)
        assert image.uuid != first
        image.set_identity(None)
        assert (image.name, image.uuid) == (None, None)
    assert qemu.dirty(path, "b") == [(MIB, 65536)]
    qemu.check(path)


def test_a_copied_file_is_a_twin_and_refused(store: Store) -> None:
    path = qcow2("disk.qcow2")
    qemu.qemu_img("bitmap", "--add", path, "b")
    nodes.add_qcow2(store, "drive0", path)
    shutil.copy(path, "copy.qcow2")
    before = Path("copy.qcow2").read_bytes()
    for act in (dm.open, dm.describe, dm.recover):
        with pytest.raises(dm.BitmapError, match=r"a copy of .*disk\.qcow2, with its identity"):
            act("copy.qcow2")
    with pytest.raises(dm.BitmapError, match="the name is taken"):
        nodes.add_qcow2(store, "drive0", "copy.qcow2")
    assert Path("copy.qcow2").read_bytes() == before
    assert identity(path)[0] == "drive0"  # the original is as it was
    nodes.add_qcow2(store, "drive1", "copy.qcow2", new_identity=True)
    assert identity("copy.qcow2")[0] == "drive1"
    assert identity("copy.qcow2")[1] != identity(path)[1]


def test_a_moved_file_is_no_twin(store: Store) -> None:
    nodes.add_qcow2(store, "drive0", qcow2("disk.qcow2"))
    os.rename("disk.qcow2", "elsewhere.qcow2")
    assert identity("elsewhere.qcow2")[0] == "drive0"
    nodes.add_qcow2(store, "drive0", "elsewhere.qcow2")  # remembers the new place
    with dm.open("drive0") as image:
        assert image.path.endswith("elsewhere.qcow2")


def test_nodes_are_found_by_name_in_either_container(store: Store) -> None:
    add_node(store, "raw0", raw("disk.raw"))
    nodes.add_qcow2(store, "drive0", qcow2("disk.qcow2"))
    for name in ("raw0", "drive0", "node:drive0"):
        with dm.open(name) as image, image.transaction() as bitmaps:
            changes.add(bitmaps, f"of-{name}")
    assert list(dm.open("raw0")) == ["of-raw0"]
    assert set(qemu.bitmaps("disk.qcow2")) == {"of-drive0", "of-node:drive0"}
    with pytest.raises(dm.BitmapNotFoundError, match="neither a file nor a node"):
        dm.open("nowhere")
    raw("raw0")
    with pytest.raises(dm.BitmapError, match="both a file and a node"):
        dm.open("raw0")
    assert dm.describe("node:raw0").bitmaps[0].node == "raw0"


def test_a_node_with_bitmaps_is_neither_renamed_nor_removed(store: Store) -> None:
    add_node(store, "raw0", raw("disk.raw"))
    nodes.add_qcow2(store, "drive0", qcow2("disk.qcow2"))
    add_node(store, "taken", raw("other.raw"))
    for name in ("raw0", "drive0"):
        with dm.open(name) as image, image.transaction() as bitmaps:
            changes.add(bitmaps, "b")
        with pytest.raises(dm.BitmapError, match="has 1 bitmaps"):
            nodes.remove_node(store, name)
        with pytest.raises(dm.BitmapError, match="addresses would change"):
            nodes.rename_node(store, name, "new")
        with pytest.raises(dm.BitmapError, match="the name is taken"):
            nodes.rename_node(store, name, "taken", with_bitmaps=True)
        nodes.rename_node(store, name, f"{name}-new", with_bitmaps=True)
        assert list(dm.open(f"{name}-new")) == ["b"]
        with dm.open(f"{name}-new") as image, image.transaction() as bitmaps:
            changes.remove(bitmaps, "b")
        nodes.remove_node(store, f"{name}-new")
    assert [node.name for node in nodes.nodes(store)] == ["taken"]
    assert identity("disk.qcow2") == (None, None)


@pytest.mark.parametrize(
    ("size", "expected"), [(2 * GIB, [(MIB, 65536), (GIB, GIB)]), (MIB, []), (GIB, [(MIB, 65536)])]
)
def test_a_new_size_is_adopted_on_request(store: Store, size: int, expected: list[tuple[int, int]]) -> None:
    add_node(store, "raw0", raw("disk.raw"))
    with dm.open("raw0") as image, image.transaction() as bitmaps:
        changes.add(bitmaps, "b")
        bitmaps["b"].mark(MIB, 1)
    os.truncate("disk.raw", size)
    if size != GIB:
        with pytest.raises(dm.BitmapError, match="'node resize' adopts the new size"):
            dm.open("raw0")["b"]
        with dm.open("raw0") as image, pytest.raises(dm.BitmapError, match="resize"), image.transaction():
            pass
    assert nodes.resize_node(store, "raw0") == size
    with dm.open("raw0") as image:
        assert image.size == size
        assert qemu.extents(image["b"]) == expected
    assert dm.check("nodes.dmap").findings == []


def test_an_image_changed_by_others_counts_as_all_dirty(store: Store) -> None:
    add_node(store, "raw0", raw("disk.raw"))
    with dm.open("raw0") as image, image.transaction() as bitmaps:
        changes.add(bitmaps, "b")
    assert dm.open("raw0")["b"].count == 0
    Path("disk.raw").open("r+b").close()
    os.utime("disk.raw", ns=(1, 1))
    assert "changed while nobody tracked it" in dm.describe("raw0").notes[0]
    assert dm.open("raw0")["b"].count == GIB
    nodes.confirm_node(store, "raw0")
    assert dm.open("raw0")["b"].count == 0
    os.utime("disk.raw", ns=(2, 2))
    with dm.open("raw0") as image:
        assert [r.name for r in image.recover()] == ["b"]
        assert image.recover() == []
    assert dm.describe("raw0").notes == ()
    assert dm.open("raw0")["b"].count == GIB  # it was made dirty, and stays so until someone clears it
    with dm.open("raw0") as image, image.transaction() as bitmaps:
        changes.clear(bitmaps, "b")
    assert dm.open("raw0")["b"].count == 0


def test_names_are_unique_in_a_namespace_and_free_elsewhere(store: Store) -> None:
    for number in range(50):
        add_node(store, f"n{number}", raw(f"disk{number}"))
    with dm.transaction([f"n{number}" for number in range(50)]) as by_name:
        for number in range(50):
            changes.add(by_name[f"n{number}"], "backup")
            by_name[f"n{number}"]["backup"].mark(number * MIB, 1)
    for number in range(50):
        assert qemu.extents(dm.open(f"n{number}")["backup"]) == [(number * MIB, 65536)]
    with pytest.raises(dm.BitmapError, match="the name is taken"):
        add_node(store, "n7", "disk7")


def test_a_transaction_over_namespaces_is_all_or_nothing(store: Store) -> None:
    for name in ("a", "b"):
        add_node(store, name, raw(f"disk-{name}"))
    before = Path("nodes.dmap").read_bytes()

    def act() -> None:
        with dm.transaction(["a", "b"]) as by_name:
            changes.add(by_name["a"], "x")
            changes.remove(by_name["b"], "missing")

    with pytest.raises(dm.BitmapNotFoundError):
        act()
    assert Path("nodes.dmap").read_bytes() == before
    qcow2("disk.qcow2")
    with pytest.raises(dm.UnsupportedError, match="another container"), dm.transaction(["a", "disk.qcow2"]):
        pass


def test_bitmaps_move_between_a_store_and_an_image_bit_for_bit(store: Store) -> None:
    add_node(store, "raw0", raw("disk.raw", 3 * GIB + 12345 * 512))
    path = qcow2("disk.qcow2", 3 * GIB + 12345 * 512)
    for granularity in (512, 65536, 1 << 22):
        with dm.open("raw0") as image, image.transaction() as bitmaps:
            changes.add(bitmaps, f"g{granularity}", granularity)
            bitmaps[f"g{granularity}"].mark_many([0, 5 * MIB, 3 * GIB], [1, 3 * MIB, 12345 * 512])
        with dm.open("raw0") as there, dm.open(path) as here, here.transaction() as bitmaps:
            changes.put(bitmaps, f"g{granularity}", there[f"g{granularity}"])
        assert qemu.dirty(path, f"g{granularity}") == qemu.extents(dm.open("raw0")[f"g{granularity}"])
    qemu.check(path)
