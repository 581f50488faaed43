"""Names and identities: nodes of a store, qcow2 images that carry their own, copies that are told from originals."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support import hostless, qemu
from support.hostless import image as image_of
from support.hostless import stored

import dirtmap.engine as dm
from dirtmap.engine import identity as looks
from dirtmap.engine.identity import identity_of, lasting_identity
from dirtmap.engine.model import changes
from dirtmap.engine.namespaces import nodes
from dirtmap.engine.namespaces.nodes import add_node
from dirtmap.engine.storefile.directory import read_entries
from dirtmap.engine.storefile.file import Store, create

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
    hostless.add_image(store, "drive0", path)
    before = identity(path)
    assert before[0] == "drive0"
    QEMU_ACTS[act](path)
    assert identity(path) == before
    qemu.check(path)


def test_a_converted_image_has_none(store: Store) -> None:
    hostless.add_image(store, "drive0", qcow2("disk.qcow2"))
    qemu.qemu_img("convert", "-O", "qcow2", "disk.qcow2", "other.qcow2")
    assert identity("other.qcow2") == (None, None)


def test_an_identity_moves_a_backing_file_name_out_of_its_way(store: Store) -> None:
    qcow2("base.qcow2")
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2")
    hostless.add_image(store, "top", "top.qcow2")
    assert qemu.info("top.qcow2")["backing-filename"] == "base.qcow2"
    hostless.name_image("top.qcow2", "a-much-longer-name-than-that")
    with image_of("top.qcow2") as image:
        assert list(image) == []
    assert qemu.info("top.qcow2")["backing-filename"] == "base.qcow2"
    qemu.qemu_img("bitmap", "--add", "top.qcow2", "b")
    assert identity("top.qcow2")[0] == "a-much-longer-name-than-that"


def test_names_change_often_and_bitmaps_stay(store: Store) -> None:
    path = qcow2("disk.qcow2")
    with dm.open(path) as image, image.transaction() as bitmaps:
        changes.add(bitmaps, "b")
        bitmaps["b"].mark(MIB, 1)
    with image_of(path) as image:
        for number in range(40):
            with image.naming() as naming:
                naming.set("n" * (number % 9 + 1))
            assert image.name == "n" * (number % 9 + 1)
        first = image.uuid
        with image.naming() as naming:
            naming.set("n", uuid.uuid4().bytes)
        assert image.uuid != first
        with image.naming() as naming:
            naming.remove()
        assert (image.name, image.uuid) == (None, None)
    assert qemu.dirty(path, "b") == [(MIB, 65536)]
    qemu.check(path)


@pytest.mark.parametrize("how", ["path", "hard link", "symbolic link", "replaced"])
def test_an_image_is_no_second_node(store: Store, how: str) -> None:
    add_node(store, "raw0", raw("disk.raw"))
    path = "disk.raw" if how in ("path", "replaced") else "link.raw"
    if how == "hard link":
        os.link("disk.raw", path)
    elif how == "symbolic link":
        os.symlink("disk.raw", path)
    elif how == "replaced":
        os.replace(raw("other.raw"), "disk.raw")
    with pytest.raises(dm.BitmapError, match="is node 'raw0' already"):
        add_node(store, "raw1", path)
    os.unlink("disk.raw")
    if how == "hard link":  # the first node's image is gone from its place
        add_node(store, "raw1", path)


def test_an_image_is_no_node_of_a_second_store(store: Store) -> None:
    add_node(store, "raw0", raw("disk.raw"))
    create("default.dmap")
    host = dm.this_host("default.dmap", "index")
    host._parts.registry.remember_store("nodes.dmap")
    with pytest.raises(dm.BitmapError, match="is node 'raw0' already"):
        host.add_node("raw1", "disk.raw")


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_raw_node_that_was_made_qcow2_since_gets_no_second_name(store: Store, elsewhere: bool) -> None:
    """On a block device nothing else tells that the bitmaps of the first miss what is written to the second."""
    add_node(store, "raw0", raw("disk.raw"))
    qemu.create(Path("disk.raw"), MIB)
    before = Path("disk.raw").read_bytes()
    host = dm.this_host("default.dmap" if elsewhere else "nodes.dmap", "index")
    if elsewhere:
        create("default.dmap")
        host._parts.registry.remember_store("nodes.dmap")
    with pytest.raises(dm.BitmapError, match="is node 'raw0' already"):
        host.add_qcow2("q0", "disk.raw")
    assert Path("disk.raw").read_bytes() == before
    hostless.remove(store, "raw0")
    hostless.add_image(store, "q0", "disk.raw")
    hostless.add_image(store, "q0", "disk.raw")


def test_a_store_is_no_image(store: Store) -> None:
    with pytest.raises(dm.BitmapError, match="a store"):
        add_node(store, "self", "nodes.dmap")
    assert nodes.nodes(store) == []


def test_a_copied_file_is_a_twin_and_refused(store: Store) -> None:
    path = qcow2("disk.qcow2")
    qemu.qemu_img("bitmap", "--add", path, "b")
    hostless.add_image(store, "drive0", path)
    shutil.copy(path, "copy.qcow2")
    before = Path("copy.qcow2").read_bytes()
    for act in (dm.open, dm.describe, dm.recover):
        with pytest.raises(dm.BitmapError, match=r"a copy of .*disk\.qcow2, with its identity"):
            act("copy.qcow2")
    with pytest.raises(dm.BitmapError, match="the name is taken"):
        hostless.add_image(store, "drive0", "copy.qcow2")
    assert Path("copy.qcow2").read_bytes() == before
    assert identity(path)[0] == "drive0"  # the original is as it was
    hostless.add_image(store, "drive1", "copy.qcow2", new_identity=True)
    assert identity("copy.qcow2")[0] == "drive1"
    assert identity("copy.qcow2")[1] != identity(path)[1]


def test_a_moved_file_is_no_twin(store: Store) -> None:
    hostless.add_image(store, "drive0", qcow2("disk.qcow2"))
    os.rename("disk.qcow2", "elsewhere.qcow2")
    assert identity("elsewhere.qcow2")[0] == "drive0"
    hostless.add_image(store, "drive0", "elsewhere.qcow2")  # remembers the new place
    with dm.open("drive0") as image:
        assert image.path.endswith("elsewhere.qcow2")


def test_nodes_are_found_by_name_in_either_container(store: Store) -> None:
    add_node(store, "raw0", raw("disk.raw"))
    hostless.add_image(store, "drive0", qcow2("disk.qcow2"))
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
    hostless.add_image(store, "drive0", qcow2("disk.qcow2"))
    add_node(store, "taken", raw("other.raw"))
    for name in ("raw0", "drive0"):
        with dm.open(name) as image, image.transaction() as bitmaps:
            changes.add(bitmaps, "b")
        with pytest.raises(dm.BitmapError, match="has 1 bitmap;"):
            hostless.remove(store, name)
        with pytest.raises(dm.BitmapError, match="addresses would change"):
            hostless.rename(store, name, "new")
        with pytest.raises(dm.BitmapError, match="the name is taken"):
            hostless.rename(store, name, "taken", with_bitmaps=True)
        hostless.rename(store, name, f"{name}-new", with_bitmaps=True)
        assert list(dm.open(f"{name}-new")) == ["b"]
        assert not dm.check(store.path).findings
        with dm.open(f"{name}-new") as image, image.transaction() as bitmaps:
            changes.remove(bitmaps, "b")
        hostless.remove(store, f"{name}-new")
    assert [node.name for node in nodes.nodes(store)] == ["taken"]
    assert identity("disk.qcow2") == (None, None)


def test_a_rename_takes_the_directory_along_and_leaves_bits_and_doubt(store: Store) -> None:
    add_node(store, "raw0", raw("disk.raw"))
    with dm.open("raw0") as image, image.transaction() as bitmaps:
        changes.add(bitmaps, "b")
        bitmaps["b"].mark(MIB, 1)
    before = store.record(b"raw0")
    hostless.rename(store, "raw0", "new", with_bitmaps=True)
    after = store.record(b"new")
    assert before
    assert after
    assert after.directory != before.directory
    assert after == replace(before, name=b"new", directory=after.directory), "its generation tells of doubt"
    with dm.open("new") as image:
        assert image["b"].count == 65536
    with open(store.path, "r+b") as file:
        file.seek(after.directory.offset + 40)
        file.write(b"?")
    hostless.rename(store, "new", "newer", with_bitmaps=True)  # what is damaged stays so, and can be recovered
    with dm.open("newer") as image, pytest.raises(dm.FormatError, match="its checksum is wrong"):
        list(image)
    with dm.open("newer") as image:
        image.recover()
        assert list(image)
    assert not dm.check(store.path).corruptions


@pytest.mark.parametrize(("size", "expected"), [(2 * GIB, [(MIB, 65536), (GIB, GIB)]), (MIB, [])])
def test_a_new_size_is_adopted_on_request(store: Store, size: int, expected: list[tuple[int, int]]) -> None:
    add_node(store, "raw0", raw("disk.raw"))
    with dm.open("raw0") as image, image.transaction() as bitmaps:
        changes.add(bitmaps, "b")
        bitmaps["b"].mark(MIB, 1)
    os.truncate("disk.raw", size)
    with pytest.raises(dm.BitmapError, match="'node resize' adopts the new size"):
        dm.open("raw0")["b"]
    with dm.open("raw0") as image, pytest.raises(dm.BitmapError, match="resize"), image.transaction() as bitmaps:
        bitmaps["b"].mark(0, 1)
    with dm.open("raw0") as image, pytest.raises(dm.BitmapError, match="resize"):
        image.track()  # which recovers first, and must not adopt the size with it
    assert nodes.resize_node(store, "raw0") == size
    with pytest.raises(dm.BitmapError, match="no new size"):
        nodes.resize_node(store, "raw0")
    with dm.open("raw0") as image:
        assert image.size == size
        assert qemu.extents(image["b"]) == expected
    assert dm.check("nodes.dmap").findings == []


def with_a_bitmap(store: Store, **arguments: int) -> None:
    """A node raw0 of 1 GiB, with the clean bitmap b."""
    add_node(store, "raw0", raw("disk.raw"))
    with dm.open("raw0") as image, image.transaction() as bitmaps:
        changes.add(bitmaps, "b", **arguments)


def test_a_resize_explains_no_other_doubt(store: Store) -> None:
    with_a_bitmap(store)
    os.utime("disk.raw", ns=(1, 1))
    with pytest.raises(dm.BitmapError, match="no new size"):
        nodes.resize_node(store, "raw0")
    assert dm.open("raw0")["b"].count == GIB


def test_another_file_in_an_images_place_is_all_dirty_at_its_size(store: Store) -> None:
    with_a_bitmap(store)
    os.replace(raw("other.raw", 2 * GIB), "disk.raw")
    nodes.resize_node(store, "raw0")
    assert dm.open("raw0")["b"].count == 2 * GIB
    assert dm.describe("raw0").notes == ()


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("size", [MIB, 2 * GIB])
def test_recover_adopts_a_new_size_all_dirty(store: Store, size: int, damaged: bool) -> None:
    with_a_bitmap(store)
    with dm.open("raw0") as image, image.transaction() as bitmaps:
        bitmaps["b"].mark(MIB, 1)
    if damaged:
        table = next(entry for entry in store.read(lambda s: read_entries(s, s.record(b"raw0"))))
        with open("nodes.dmap", "r+b") as file:
            file.seek(table.table_offset)
            file.write(b"\x55")
    os.truncate("disk.raw", size)
    with dm.open("raw0") as image:
        with pytest.raises(dm.BitmapNotFoundError):
            image.recover(["nobody"])
        assert [(item.name, item.how.split(":")[0]) for item in image.recover()] == [("b", "all dirty")]
    with dm.open("raw0") as image:
        assert (image.size, image["b"].size, image["b"].count) == (size, size, size)
    assert dm.describe("raw0").notes == ()
    assert dm.check("nodes.dmap").findings == []


def test_recover_adopts_a_new_size_of_a_device(store: Store) -> None:
    add_node(store, "raw0", raw("disk.raw"))
    host = dm.this_host()
    host.add_device("disk0", "raw0")
    with dm.open("disk0") as image, image.transaction() as bitmaps:
        changes.add(bitmaps, "b")
    os.truncate("disk.raw", 2 * GIB)
    with dm.open("disk0") as image:
        image.recover()
        assert image["b"].count == 2 * GIB


def test_a_bitmap_too_fine_for_the_new_size_can_be_renamed_and_removed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "dirtmap.fmt.store.MAX_CHUNKS", (4 << 40) // 512 // 32768 - 1
    )  # no file is as large as it takes
    with_a_bitmap(store, granularity=512)
    with dm.open("raw0") as image, image.transaction() as bitmaps:
        changes.add(bitmaps, "coarse")
    os.truncate("disk.raw", 4 << 40)
    with pytest.raises(dm.BitmapError, match="granularity 512 is too fine"):
        nodes.resize_node(store, "raw0")
    with dm.open("raw0") as image:
        with image.transaction() as bitmaps:
            bitmaps.rename("b", "fine")
            bitmaps["coarse"] = bitmaps["coarse"].replace(recording=False)
        with pytest.raises(dm.BitmapError, match="resize"), image.transaction() as bitmaps:
            bitmaps["copy"] = bitmaps["fine"].recovered()
        with image.transaction() as bitmaps:
            del bitmaps["fine"]
    assert dm.describe("raw0").errors  # and what is left is still in doubt
    with dm.open("raw0") as image:
        image.recover()
        assert (image["coarse"].count, image["coarse"].recording) == (4 << 40, False)
    assert dm.check("nodes.dmap").findings == []


def test_a_node_without_bitmaps_takes_the_size_of_its_disk(store: Store) -> None:
    add_node(store, "raw0", raw("disk.raw"))
    os.truncate("disk.raw", 2 * GIB)
    with dm.open("raw0") as image, image.transaction() as bitmaps:
        changes.add(bitmaps, "b")
        bitmaps["b"].mark(GIB, 1)
    assert qemu.extents(dm.open("raw0")["b"]) == [(GIB, 65536)]


def test_a_write_right_after_a_bitmap_was_made_shows(store: Store) -> None:
    """Also where the clock for files has hardly moved on: the image itself was written to just before."""
    for _ in range(20):
        with contextlib.suppress(FileNotFoundError), Store("nodes.dmap"):
            os.unlink("nodes.dmap")
        create("nodes.dmap")
        with Store("nodes.dmap") as fresh:
            add_node(fresh, "raw0", raw("disk.raw"))
            with open("disk.raw", "r+b", buffering=0) as file, stored(fresh, "raw0") as image:
                file.write(b"x")
                with image.transaction() as bitmaps:
                    changes.add(bitmaps, "b")
                file.write(b"y")
                assert image["b"].count == GIB


@pytest.mark.parametrize("which", ["mtime_ns", "ctime_ns"])
def test_an_identity_waits_for_a_clock_of_whole_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    path = raw(str(tmp_path / "disk.raw"))
    second = time.time_ns() // 10**9 * 10**9
    now = second + 10**9 // 2
    waits: list[float] = []
    monkeypatch.setattr(time, "time_ns", lambda: now)
    monkeypatch.setattr(time, "sleep", waits.append)
    for then, wait in ((second, 1.5), (second + 10**9, 2), (now - 10**7, 0.01), (second - 5 * 10**9, 0)):
        found = replace(identity_of(path), **({"mtime_ns": 1, "ctime_ns": 1} | {which: then}))
        monkeypatch.setattr(looks, "identity_of", lambda path, found=found: found)
        waits.clear()
        assert lasting_identity(path) == found
        assert sum(waits) == pytest.approx(wait)


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


CHANGES: dict[str, Callable[[], object]] = {
    "written, and its time put back": lambda: put_back("disk.raw"),
    "a hard link": lambda: os.link("disk.raw", "link.raw"),
    "another mode": lambda: os.chmod("disk.raw", 0o640),
    "renamed, and back": lambda: [os.rename("disk.raw", "n"), os.rename("n", "disk.raw")],
}


def put_back(path: str) -> None:
    before = os.stat(path)
    with open(path, "r+b") as file:
        file.write(b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("act", CHANGES)
def test_what_changes_the_time_of_the_last_change_alone_is_a_change_and_can_be_confirmed(
    store: Store, act: str
) -> None:
    with_a_bitmap(store)
    mtime = os.stat("disk.raw").st_mtime_ns
    CHANGES[act]()
    assert os.stat("disk.raw").st_mtime_ns == mtime
    assert dm.open("raw0")["b"].count == GIB
    nodes.confirm_node(store, "raw0")
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
