"""`Lookup`: whatever happens to a container, no answer is what is not so any more; and what an answer takes."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import qemu
from support.alone import alone
from support.many import MIB, make_host, raw, settle

import dirtmap.engine as dm
from dirtmap.engine.index import database
from dirtmap.engine.storefile.file import Store, create

Answer = tuple[str, str, int] | None | type[dm.Error]
NAMES = ("b", "added")


class Here:
    """A host of three stores, where ``node1`` is in ``store1.dmap``, and so is ``there``, in ``there.qcow2``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home, self.index = make_host(folder, 3)
        self.image, self.there, self.store = folder / "q.qcow2", folder / "there.qcow2", folder / "store1.dmap"
        qemu.create(self.there, MIB)
        with dm.Host(self.store, self.index) as other:
            other.add_qcow2("there", str(self.there))
            for node in ("there", "node1"):
                with other.open(node) as opened, opened.transaction() as bitmaps:
                    bitmaps["b"] = dm.Bitmap(MIB)
        settle()
        self.asked = 0

    @property
    def host(self) -> dm.Host:
        return dm.Host(self.home, self.index)

    def nodes(self) -> list[str]:
        return ["node0", "node1", "image", "there", "device", "renamed"]

    @property
    def elsewhere(self) -> dm.Host:
        """A program with another index: what it changes is not told to this one."""
        return dm.Host(self.home, str(self.folder / "elsewhere"))

    def change(self, node: str, change: Callable[[dm.Transaction], object]) -> None:
        with self.elsewhere as host, host.open(node) as opened, opened.transaction() as bitmaps:
            change(bitmaps)

    def truth(self, node: str, name: str) -> Answer:
        """What a host says that begins with a new index."""
        return self.truths([(node, name)])[node, name]

    def truths(self, questions: list[tuple[str, str]]) -> dict[tuple[str, str], Answer]:
        """The same for several questions; each node has a host of its own, which tells of all its bitmaps."""
        infos = {node: self._info(node) for node in dict.fromkeys(node for node, _ in questions)}
        return {(node, name): self._of(infos[node], name) for node, name in questions}

    def _info(self, node: str) -> dm.ImageInfo | type[dm.Error] | None:
        self.asked += 1
        with dm.Host(self.home, str(self.folder / f"truth{self.asked}")) as host:
            try:
                with host.open(node) as opened:
                    return opened.info()
            except dm.BitmapNotFoundError as error:
                return None if "neither a file nor a node" in str(error) else type(error)
            except dm.Error as error:
                return type(error)

    @staticmethod
    def _of(info: dm.ImageInfo | type[dm.Error] | None, name: str) -> Answer:
        if not isinstance(info, dm.ImageInfo):
            return info
        assert info.uuid
        found = [bitmap.granularity for bitmap in info.bitmaps if bitmap.name == name]
        return (os.path.abspath(info.path), info.uuid, found[0]) if found else None


def answer(lookup: dm.Lookup, node: str, name: str) -> Answer:
    try:
        found = lookup.find(node, name)
    except dm.Error as error:
        return type(error)
    return found and (found.path, str(uuid.UUID(bytes=found.uuid)), found.granularity)


@pytest.fixture
def here() -> Iterator[Here]:
    """In memory where that can be: every truth begins with a new index, which is synced several times."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Here(Path(folder))


def overwrite(path: Path, data: bytes) -> None:
    """Puts other content into a file that stays the same one, and looks as old as it did."""
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def by_qemu(command: str, *arguments: str) -> Callable[[Here], object]:
    return lambda here: qemu.qemu_img("bitmap", command, *arguments, here.image, "b" if command != "--add" else "added")


def other_granularity(node: str) -> Callable[[Here], object]:
    def change(here: Here) -> None:
        here.change(node, lambda bitmaps: bitmaps.__delitem__("b"))
        here.change(node, lambda bitmaps: bitmaps.__setitem__("b", dm.Bitmap(MIB, 4096)))

    return change


def renamed(node: str) -> Callable[[Here], object]:
    def rename(here: Here) -> None:
        with here.elsewhere as host:
            host.rename_node(node, "renamed", with_bitmaps=True)

    return rename


def name_given_to_another(here: Here) -> None:
    renamed("node1")(here)
    with here.elsewhere as host:
        host.add_node("node1", raw(here.folder / "new.raw"))
    here.change("node1", lambda bitmaps: bitmaps.__setitem__("added", dm.Bitmap(MIB)))


def replaced_by_another_image(here: Here) -> None:
    qemu.create(here.folder / "new.qcow2", MIB)
    qemu.qemu_img("bitmap", "--add", here.folder / "new.qcow2", "b")
    os.rename(here.folder / "new.qcow2", here.image)


def another_image_written_over_it(here: Here) -> None:
    qemu.create(here.folder / "new.qcow2", MIB)
    qemu.qemu_img("bitmap", "--add", here.folder / "new.qcow2", "b")
    overwrite(here.image, (here.folder / "new.qcow2").read_bytes())


def a_twin_in_its_place(here: Here) -> None:
    shutil.copy(here.image, here.folder / "twin.qcow2")
    os.rename(here.image, here.folder / "original.qcow2")
    os.rename(here.folder / "twin.qcow2", here.image)
    qemu.qemu_img("bitmap", "--remove", here.image, "b")


def a_twin_beside_it(here: Here) -> None:
    shutil.copy(here.image, here.folder / "twin.qcow2")
    qemu.qemu_img("bitmap", "--add", here.folder / "twin.qcow2", "added")
    with here.host as host:
        dm.scan(host, [str(here.folder)])


def moved_and_scanned(here: Here) -> None:
    os.rename(here.image, here.folder / "moved.qcow2")
    with here.host as host:
        dm.scan(host, [str(here.folder)])


def rolled_back(path: str, node: str) -> Callable[[Here], object]:
    """Before it, a copy was made, and the bitmap ``added``, which the lookup has seen."""

    def put_back(here: Here) -> None:
        overwrite(here.folder / path, (here.folder / f"{path}.old").read_bytes())

    put_back.prepare = (path, node)  # type: ignore[attr-defined]
    return put_back


def another_store_in_its_place(here: Here) -> None:
    create(str(here.folder / "new.dmap"))
    os.rename(here.folder / "new.dmap", here.store)


def compacted(here: Here) -> None:
    with here.host as host:
        host.compact(str(here.store))
    here.change("node1", lambda bitmaps: bitmaps.__setitem__("added", bitmaps.pop("b")))


def without_index(here: Here) -> None:
    shutil.rmtree(here.index)
    by_qemu("--remove")(here)
    here.change("node1", lambda bitmaps: bitmaps.__setitem__("added", bitmaps.pop("b")))


ACTS: dict[str, Callable[[Here], object]] = {
    "nothing": lambda here: None,
    "QEMU adds": by_qemu("--add"),
    "QEMU removes": by_qemu("--remove"),
    "QEMU disables": by_qemu("--disable"),
    "another granularity in an image": other_granularity("image"),
    "another granularity in a store": other_granularity("node1"),
    "another granularity of a device": other_granularity("device"),
    "a node is renamed": renamed("node1"),
    "an image's node is renamed": renamed("there"),
    "a name is given to another node": name_given_to_another,
    "an image is replaced": replaced_by_another_image,
    "an image is written over": another_image_written_over_it,
    "an image is moved": lambda here: os.rename(here.image, here.folder / "moved.qcow2"),
    "an image is moved and scanned": moved_and_scanned,
    "an image is removed": lambda here: here.image.unlink(),
    "an image is emptied": lambda here: overwrite(here.image, bytes(MIB)),
    "a twin takes its place": a_twin_in_its_place,
    "a twin is made": a_twin_beside_it,
    "an image is rolled back": rolled_back("q.qcow2", "image"),
    "a store is rolled back": rolled_back("store1.dmap", "node1"),
    "the default store is rolled back": rolled_back("default.dmap", "node0"),
    "a store is compacted": compacted,
    "a store is removed": lambda here: here.store.unlink(),
    "a store is replaced": another_store_in_its_place,
    "the index is removed": without_index,
}


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS.keys())
def test_no_answer_is_what_is_not_so(here: Here, act: Callable[[Here], object]) -> None:
    if prepare := getattr(act, "prepare", None):
        path, node = prepare
        shutil.copy(here.folder / path, here.folder / f"{path}.old")
        here.change(node, lambda bitmaps: bitmaps.__setitem__("added", dm.Bitmap(MIB)))
        settle()
    # Those that are there first: the long way to what is not there brings the index up to date.
    questions = [(node, name) for name in NAMES for node in here.nodes()]
    with here.host as host, dm.Lookup(host) as lookup:
        before = here.truths(questions)
        for _ in range(2):
            assert {q: answer(lookup, *q) for q in questions} == before
        act(here)
        for _ in range(2):
            said = {q: answer(lookup, *q) for q in questions}
            assert said == here.truths(questions)
            settle()


def test_a_store_written_over_answers_nothing(here: Here) -> None:
    """Whoever had the store open answers neither for the old one nor for the new one."""
    create(str(here.folder / "new.dmap"))
    with here.host as host, dm.Lookup(host) as lookup:
        for _ in range(2):
            assert lookup.find("node1", "b")
        overwrite(here.store, (here.folder / "new.dmap").read_bytes())
        for name in NAMES:
            with pytest.raises(dm.GoneError):
                lookup.find("node1", name)
    with here.host as host, dm.Lookup(host) as lookup, pytest.raises(dm.BitmapError, match="a copy of a file"):
        lookup.find("node1", "b")


def test_bitmaps_of_a_damaged_directory_are_not_said_to_be_missing(here: Here) -> None:
    with Store(str(here.store)) as store:
        record = store.record(b"node1")
    assert record
    data = bytearray(here.store.read_bytes())
    data[record.directory.offset] ^= 0xFF
    overwrite(here.store, bytes(data))
    with here.host as host, dm.Lookup(host) as lookup, pytest.raises(dm.FormatError, match="directory"):
        lookup.find("node1", "b")


def test_a_tracked_image_has_what_its_tracker_has(here: Here) -> None:
    with here.host as host, dm.Lookup(host) as lookup:
        assert lookup.find("image", "b")
        with host.open("image") as image, image.track(save_interval=0) as tracker:
            tracker.remove("b")
            tracker.add("added", 4096)
            settle()
            for _ in range(2):
                assert lookup.find("image", "b") is None
                assert answer(lookup, "image", "added") == here.truth("image", "added") != None  # noqa: E711
        assert lookup.find("image", "b") is None
        assert answer(lookup, "image", "added") == here.truth("image", "added")


def test_an_index_that_was_put_back_says_nothing(here: Here) -> None:
    """What it says fits neither what was remembered of a container nor the container."""
    old = {path.name: path.read_bytes() for path in Path(here.index).iterdir()}
    with here.host as host, dm.Lookup(host) as lookup:
        qemu.qemu_img("bitmap", "--add", here.image, "added")
        other_granularity("node1")(here)
        by_qemu("--remove")(here)
        settle()
        for node in ("image", "node1"):
            for name in NAMES:
                lookup.find(node, name)
        if known := database._connected.pop(os.path.realpath(here.index), None):
            known.close()
        for name, data in old.items():
            Path(here.index, name).write_bytes(data)
        for node in ("image", "node1"):
            for name in NAMES:
                assert answer(lookup, node, name) == here.truth(node, name)


def test_an_answer_takes_no_lock_and_opens_nothing(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [(node, "b") for node in ("node0", "node1", "image", "there", "device")]
    with here.host as host, dm.Lookup(host) as lookup:
        for _ in range(2):  # the first time the index learns, the second time files are opened
            before = [lookup.find(*question) for question in questions]

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("a file is opened or locked")

        with monkeypatch.context() as patched:
            for module, name in ((os, "open"), (fcntl, "fcntl"), (fcntl, "flock"), (fcntl, "lockf")):
                patched.setattr(module, name, refuse)
            assert [lookup.find(*question) for question in questions] == before
    assert all(before)


def test_files_that_stay_open_are_bounded(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dirtmap.engine.host.lookup._MOST_STORES", 2)
    monkeypatch.setattr("dirtmap.engine.host.lookup._MOST_IMAGES", 1)
    with here.host as host, dm.Lookup(host) as lookup:
        for _ in range(3):
            for node in ("node0", "node1", "node2", "image", "there"):
                assert answer(lookup, node, "b") == here.truth(node, "b") != None  # noqa: E711
                assert len(lookup._stores) <= 2
                assert len(lookup._images) <= 1


@pytest.fixture
def attach(tmp_path: Path) -> Iterator[Callable[[Path], str]]:
    """Attaches a file as a disk, for the time of the test."""
    attached: list[str] = []

    def attach(file: Path) -> str:
        done = subprocess.run(["losetup", "--find", "--show", file], check=False, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file can be attached as a disk here: {done.stderr}")
        attached.append(done.stdout.strip())
        return attached[-1]

    with alone("loop"):
        yield attach
        for device in attached:
            subprocess.run(["losetup", "--detach", device], check=True)


def test_an_image_on_a_block_device(here: Here, attach: Callable[[Path], str]) -> None:
    """What ``stat`` tells of a device says nothing of what is on it."""
    disk = here.folder / "disk"
    disk.touch()
    os.truncate(disk, 8 * MIB)
    loop = attach(disk)
    device = here.folder / "device"  # another node of the same device, as in a container
    os.mknod(device, 0o600 | 0o060000, os.stat(loop).st_rdev)
    qemu.qemu_img("create", "-f", "qcow2", loop, str(MIB))
    with here.host as host:
        host.add_qcow2("disk", str(device))
        here.change("disk", lambda bitmaps: bitmaps.__setitem__("b", dm.Bitmap(MIB)))
        settle()
        with dm.Lookup(host) as lookup:
            assert answer(lookup, "disk", "b") == here.truth("disk", "b") != None  # noqa: E711
            qemu.qemu_img("bitmap", "--remove", loop, "b")
            qemu.qemu_img("bitmap", "--add", loop, "added")
            assert lookup.find("disk", "b") is None
            assert answer(lookup, "disk", "added") == here.truth("disk", "added") != None  # noqa: E711
            assert [match.holder for match in host.find("added")] == ["disk"]


def test_an_image_where_times_are_in_whole_seconds(here: Here, attach: Callable[[Path], str]) -> None:
    """What was changed twice in a second looks the same after the second change."""
    disk, folder = here.folder / "disk", here.folder / "mounted"
    disk.touch()
    os.truncate(disk, 16 * MIB)
    folder.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-I", "128", disk], check=True, capture_output=True)
    done = subprocess.run(["mount", attach(disk), folder], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr}")
    try:
        image = folder / "image.qcow2"
        qemu.create(image, MIB)
        with here.host as host:
            host.add_qcow2("slow", str(image))
            here.change("slow", lambda bitmaps: bitmaps.__setitem__("b", dm.Bitmap(MIB)))
            for old, new in (("b", "added"), ("added", "b")) * 2:  # until it grows no more
                here.change("slow", lambda bitmaps, old=old, new=new: bitmaps.rename(old, new))
            with dm.Lookup(host) as lookup:
                time.sleep(1 - time.time() % 1)  # so that all that follows is in one second
                here.change("slow", lambda bitmaps: bitmaps["b"].mark(0, 65536))
                time.sleep(0.2)
                for _ in range(2):
                    assert lookup.find("slow", "b")
                here.change("slow", lambda bitmaps: bitmaps.rename("b", "added"))
                for name in NAMES:
                    assert answer(lookup, "slow", name) == here.truth("slow", name)
    finally:
        subprocess.run(["umount", folder], check=True)
