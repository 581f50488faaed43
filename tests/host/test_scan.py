"""A scan of generated images, sound and damaged, alone and twins, free and held: it tells exactly what is there."""

from __future__ import annotations

import os
import random
import shutil
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from support import qemu
from support.cli import dirtmap, error_of, json_of
from support.craft import Craft
from support.hostless import name_image

from dirtmap.engine.index import database
from dirtmap.engine.namespaces.nodes import add_node
from dirtmap.engine.storefile.file import Store, create
from dirtmap.engine.system import file as fileio
from dirtmap.engine.system.file import File
from dirtmap.fmt import qcow2

SHM = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where to be quick
SIZE = 1 << 20
FLAG_IN_USE = 1


class Quick(File):
    """A file whose syncs cost nothing, and of which is counted what is read beyond its magic numbers."""

    examined: ClassVar[Counter[str]] = Counter()

    def read(self, offset: int, length: int) -> bytes:
        Quick.examined[self.path] += length > len(qcow2.MAGIC)
        return super().read(offset, length)

    def locked_by_other(self, offset: int, length: int = 1) -> bool:
        Quick.examined[self.path] += 1
        return super().locked_by_other(offset, length)

    def sync(self) -> None:
        self._refuse_if_poisoned()


@dataclass
class Expected:
    """What a scan ought to find; paths as text."""

    images: int = 0
    stores: int = 0
    bitmaps: int = 0
    inconsistent: int = 0
    new: int = 0
    damaged: set[str] = field(default_factory=set)
    twins: set[tuple[str, str]] = field(default_factory=set)
    clashes: set[tuple[str, str]] = field(default_factory=set)
    gone: set[tuple[str, str | None]] = field(default_factory=set)
    moved: set[tuple[str, str]] = field(default_factory=set)
    held: set[str] = field(default_factory=set)

    def required(self, done: dict[str, Any]) -> None:
        """Holds what a scan has told against it."""
        for key in ("images", "stores", "bitmaps", "inconsistent", "new"):
            assert done[key] == getattr(self, key), key
        assert set(done["held"]) == self.held
        assert {each["filename"] for each in done["damaged"]} == self.damaged
        assert {(each["filename"], each["original"]) for each in done["twins"]} == self.twins
        for key in ("clashes", "gone", "moved"):
            assert {(each["filename"], each["node"]) for each in done[key]} == getattr(self, key), key
        for value in done.values():
            assert not isinstance(value, list) or len(value) == len({str(each) for each in value})


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Images with no bitmap, with one and with two, and one with two of which one is inconsistent."""
    folder = tmp_path_factory.mktemp("templates")
    made = []
    for count in range(3):
        path = folder / f"{count}.qcow2"
        qemu.create(path, SIZE, "cluster_size=4096")
        for number in range(count):
            qemu.qemu_img("bitmap", "--add", path, f"b{number}")
        made.append(path.read_bytes())
    craft = Craft(made[2])
    flags = craft.entry(0, "flags")
    made.append(bytes(craft.set(flags, craft.get(flags) | FLAG_IN_USE).data))
    return made


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to scan, with the store and the index beside it."""
    with tempfile.TemporaryDirectory(dir=SHM) as name, fileio.using(Quick):
        monkeypatch.setenv("DIRTMAP_STORE", f"{name}/default.dmap")
        monkeypatch.setenv("DIRTMAP_INDEX", f"{name}/index")
        Path(name, "images").mkdir()
        yield Path(name, "images")
        for known in list(database._connected):
            database._connected.pop(known).close()


class Maker:
    """Makes files to be found, and says what a scan ought to tell of them."""

    def __init__(self, folder: Path, templates: list[bytes]) -> None:
        self.folder, self.templates = folder, templates
        self.chance = random.Random(1)
        self.expected = Expected()
        self.number = 0
        self.plain: list[Path] = []
        self.named: list[Path] = []

    def path(self, suffix: str = "qcow2") -> Path:
        """In some folder, at some depth."""
        self.number += 1
        folder = self.folder
        for _ in range(self.chance.randrange(4)):
            folder = folder / f"folder {self.chance.randrange(6)}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{self.number}.{suffix}"

    def image(self, name: str | None = None, template: int | None = None) -> Path:
        path = self.path()
        template = self.chance.randrange(len(self.templates)) if template is None else template
        path.write_bytes(self.templates[template])
        if name is not None:
            name_image(path, name)
        self.expected.images += 1
        self.expected.bitmaps += min(template, 2)
        self.expected.inconsistent += template == 3
        return path

    def add_plain(self) -> None:
        self.plain.append(self.image())
        self.expected.new += 1

    def add_named(self) -> None:
        self.named.append(self.image(f"n{self.number}"))
        self.expected.new += 1

    def add_twins(self) -> None:
        """Two that nobody knows yet: neither is taken."""
        one, other = self.image(f"t{self.number}", 1), self.path()
        shutil.copy(one, other)
        self.expected.images += 1
        self.expected.bitmaps += 1
        self.expected.twins |= {(str(one), str(other)), (str(other), str(one))}

    def add_twin_of_known(self) -> None:
        original = self.image(None, 2)
        dirtmap("node", "add", f"k{self.number}", original)
        copy = self.path()
        shutil.copy(original, copy)
        self.expected.images += 1
        self.expected.bitmaps += 2
        self.expected.twins.add((str(copy), str(original)))

    def add_clash(self) -> None:
        """Two of one name that nobody knows yet: neither is taken."""
        name = f"c{self.number}"
        self.expected.clashes |= {(str(self.image(name)), name) for _ in range(2)}

    def add_clash_with_known(self) -> None:
        name = f"known{self.number}"
        dirtmap("node", "add", name, self.image())
        self.expected.clashes.add((str(self.image(name)), name))

    def add_damaged(self) -> None:
        path = self.path()
        data = bytearray(self.templates[2])
        kind = self.chance.randrange(4)
        if kind == 0:
            del data[self.chance.randrange(8, 100) :]
        elif kind == 1:
            data[4:72] = self.chance.randbytes(68)
        elif kind == 2:
            craft = Craft(data)
            data = craft.set(craft.bitmaps("directory_offset"), 77).data
        else:
            craft = Craft(data)
            data = craft.set(craft.entry(0, "granularity_bits"), 99).data
        path.write_bytes(data)
        self.expected.images += 1
        self.expected.damaged.add(str(path))

    def add_store(self) -> None:
        path = self.path("dmap")
        create(str(path))
        raw = self.path("raw")
        raw.touch()
        os.truncate(raw, SIZE)
        with Store(str(path)) as target:
            add_node(target, f"stored{self.number}", str(raw))
        dirtmap("add", f"stored{self.number}", "b", "--store", path, "--index", f"{self.folder}/../other-index")
        self.expected.stores += 1
        self.expected.bitmaps += 1
        self.expected.new += 1

    def add_damaged_store(self) -> None:
        path = self.path("dmap")
        path.write_bytes(b"DMS\xfc" + self.chance.randbytes(20_000))
        self.expected.stores += 1
        self.expected.damaged.add(str(path))

    def add_other(self) -> None:
        """What is no container, or is one that is found already."""
        path = self.path()
        kind = self.chance.randrange(11)
        if kind == 0:
            path.write_bytes(b"")
        elif kind == 1:
            path.write_bytes(b"QFI")
        elif kind == 2:
            path.write_bytes(self.chance.randbytes(5000))
        elif kind == 3:
            path.mkdir()
        elif kind == 4:
            os.mkfifo(path)
        elif kind == 5:
            path.symlink_to("nowhere")
        elif kind == 6:
            path.symlink_to(path.parent, target_is_directory=True)  # a circle
        elif kind == 7:
            path.write_bytes(b"\0" * 4096 + b"QFI\xfb")
        elif kind == 8 and len(os.fspath(path)) < 100:
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(os.fspath(path))
        elif self.plain:
            original = self.chance.choice(self.plain)
            path.symlink_to(original) if kind == 9 else path.with_name(f"~{path.name}").symlink_to(original)

    def add_some(self, count: int) -> None:
        kinds = {
            **{self.add_plain: 40, self.add_named: 20, self.add_twins: 2, self.add_twin_of_known: 2},
            **{self.add_clash: 2, self.add_clash_with_known: 2, self.add_damaged: 8, self.add_store: 2},
            **{self.add_damaged_store: 1, self.add_other: 20},
        }
        for make in self.chance.choices(list(kinds), list(kinds.values()), k=count):
            make()
        time.sleep(0.06)  # what is younger may change without looking different, and is read again


def known_paths() -> set[str]:
    return {each["filename"] for each in json_of("list", status=1)}


def scanned(folder: Path, *options: str) -> tuple[dict[str, Any], set[str]]:
    """What a scan told, and which files it read.

    Not counting stores, whose newest commit is always asked for, and what is damaged, which is read again to say how.
    """
    Quick.examined.clear()
    done = json_of("index", "scan", *options, folder)
    damaged = {each["filename"] for each in done["damaged"]}
    assert not any(each["what"] == "as found before" for each in done["damaged"])
    examined = {path for path, times in Quick.examined.items() if times and not path.endswith(".dmap")}
    return done, examined - damaged


def examine(folder: Path, templates: list[bytes], count: int) -> None:
    maker = Maker(folder, templates)
    maker.add_some(count)
    expected = maker.expected
    locked = maker.plain[:2]
    for path in locked:  # of which it is known what they hold
        path.write_bytes(templates[1])
    expected.bitmaps = expected.inconsistent = 0
    done, _ = scanned(folder)
    expected.bitmaps, expected.inconsistent = _counted(folder, expected)
    expected.required(done)
    assert not json_of("index", "verify")["faults"]

    # Nothing has changed: nothing is read, and all is said again.
    expected.new = 0
    for _ in range(2):
        done, examined = scanned(folder)
        expected.required(done)
        assert examined == set()

    # One has changed, one is new: those are read.
    qemu.qemu_img("bitmap", "--add", maker.plain[5], "new")
    maker.add_plain()
    time.sleep(0.06)
    done, examined = scanned(folder)
    expected.bitmaps, expected.inconsistent = _counted(folder, expected)
    expected.required(done)
    assert examined == {str(maker.plain[5]), str(maker.plain[-1])}

    # Some are held: they are skipped, unless -U.
    expected.new = 0
    with qemu.StorageDaemon(locked[0]), qemu.StorageDaemon(locked[1]) as daemon:
        assert daemon.bitmaps().keys() == {"b0"}
        expected.held, expected.bitmaps = {str(path) for path in locked}, expected.bitmaps - 2
        time.sleep(0.06)
        for _ in range(2):
            done, examined = scanned(folder)
            expected.required(done)
            assert examined == expected.held
        expected.held, expected.bitmaps, expected.inconsistent = set(), expected.bitmaps + 2, expected.inconsistent + 2
        done, _ = scanned(folder, "-U")
        expected.required(done)
        expected.held, expected.bitmaps, expected.inconsistent = (
            {str(path) for path in locked},
            expected.bitmaps - 2,
            expected.inconsistent - 2,
        )
        expected.required(scanned(folder)[0])
        daemon.quit()

    # One of them was let go in good order, the other was killed and left its bitmap in use.
    time.sleep(0.06)
    expected.held, expected.bitmaps, expected.inconsistent = set(), expected.bitmaps + 2, expected.inconsistent + 1
    expected.required(scanned(folder)[0])

    # Some are gone, some elsewhere.
    gone, moved = maker.plain[7], maker.named[1]
    name = json_of("list", moved)[0]["bitmaps"][0]["node"] if json_of("list", moved)[0]["bitmaps"] else None
    (node,) = (each["name"] for each in json_of("node", "list") if each["filename"] == str(moved))
    assert name in (None, node)
    lost = len(json_of("list", gone)[0]["bitmaps"]), sum(b["inconsistent"] for b in json_of("list", gone)[0]["bitmaps"])
    for link in folder.rglob("*"):
        if link.is_symlink() and os.readlink(link) in (str(gone), str(moved)):
            link.unlink()
    gone.unlink()
    elsewhere = moved.with_name("elsewhere")
    moved.rename(elsewhere)
    time.sleep(0.06)
    expected.images -= 1
    expected.bitmaps -= lost[0]
    expected.inconsistent -= lost[1]
    expected.gone, expected.moved = {(str(gone), None)}, {(str(elsewhere), node)}
    done, examined = scanned(folder)
    expected.required(done)
    assert examined == {str(elsewhere)}
    expected.gone, expected.moved = set(), set()
    done, examined = scanned(folder)
    expected.required(done)
    assert examined == set()
    assert json_of("list", f"node:{node}")[0]["filename"] == str(elsewhere)
    assert json_of("index", "verify")["faults"] == []


def _counted(folder: Path, expected: Expected) -> tuple[int, int]:
    """How many bitmaps there are in what is sound, and how many of them are inconsistent: by QEMU, and by dirtmap."""
    bitmaps = inconsistent = 0
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_file() or str(path) in expected.damaged:
            continue
        with path.open("rb") as file:
            magic = file.read(4)
        if magic == b"QFI\xfb":
            craft = Craft(path)
            try:
                flags = [craft.get(craft.entry(index, "flags")) for index in range(len(craft.entries()))]
            except KeyError:
                continue
            bitmaps += len(flags)
            inconsistent += sum(flag & FLAG_IN_USE for flag in flags)
        elif magic == b"DMS\xfc":
            bitmaps += 1
    return bitmaps, inconsistent


def test_a_scan_of_generated_images(folder: Path, templates: list[bytes]) -> None:
    examine(folder, templates, 500)


@pytest.mark.long
def test_a_scan_of_ten_thousand_images(folder: Path, templates: list[bytes]) -> None:
    examine(folder, templates, 10_000)


def test_hard_links_are_one_image(folder: Path, templates: list[bytes]) -> None:
    for name in ("a", "b"):
        (folder / f"{name}.qcow2").write_bytes(templates[1])
    dirtmap("node", "add", "a", folder / "a.qcow2")
    (folder / "sub").mkdir()
    for name in ("a", "b"):
        os.link(folder / f"{name}.qcow2", folder / "sub" / f"link to {name}.qcow2")
    for where in (folder, folder / "sub", folder):
        done, _ = scanned(where)
        assert (done["images"], done["bitmaps"]) == (2, 2)
        assert done["twins"] == done["moved"] == done["clashes"] == done["gone"] == []
    assert json_of("list", "a")[0]["filename"] == str(folder / "a.qcow2")


def test_folders_that_cannot_be_read(folder: Path, templates: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "closed").mkdir()
    for path in (folder / "a.qcow2", folder / "closed" / "b.qcow2"):
        path.write_bytes(templates[1])
    scan = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)  # root reads any folder
        assert scanned(folder)[0]["images"] == 1
        assert error_of("index", "scan", folder / "closed").endswith("closed: Permission denied")
    assert scanned(folder)[0]["images"] == 2
    assert error_of("index", "scan", folder / "none").endswith("none: No such file or directory")


def test_files_can_be_named_and_paths_overlap(folder: Path, templates: list[bytes]) -> None:
    path = folder / "a.qcow2"
    path.write_bytes(templates[2])
    (folder / "text").write_text("text")
    done = json_of("index", "scan", path)
    assert (done["images"], done["bitmaps"], done["new"]) == (1, 2, 1)
    done = json_of("index", "scan", path, folder, folder, folder / ".")
    assert (done["images"], done["bitmaps"], done["new"]) == (1, 2, 0)
    done = json_of("index", "scan", folder / "text")
    assert [each["filename"] for each in done["damaged"]] == [str(folder / "text")]


def test_a_scan_says_it_in_words(folder: Path, templates: list[bytes]) -> None:
    for name in ("a", "b", "c"):
        (folder / f"{name}.qcow2").write_bytes(templates[3])
    (folder / "bad.qcow2").write_bytes(b"QFI\xfb")
    dirtmap("node", "add", "a", folder / "a.qcow2")
    shutil.copy(folder / "a.qcow2", folder / "copy.qcow2")
    name_image(folder / "b.qcow2", "a")
    with qemu.StorageDaemon(folder / "c.qcow2"):
        done = dirtmap("index", "scan", folder)
    assert done.out == (
        "5 images, 0 stores, 6 bitmaps, 3 of them inconsistent; 0 new, 0 moved, 1 held, 1 damaged, 1 twin, "
        "1 name that clashes, 0 gone, 0 unreadable\n"
    )
    assert sorted(line.split(": ")[2].split(";")[0] for line in done.error.splitlines()) == [
        *("a twin of " + str(folder / "a.qcow2"), "damaged", "its name 'a' is another's", "skipped")
    ]
    assert dirtmap("index", "scan", "-q", folder).out == ""


def test_another_scan_of_a_folder_forgets_nothing_elsewhere(folder: Path, templates: list[bytes]) -> None:
    for name in ("one", "two"):
        (folder / name).mkdir()
        (folder / name / "x.qcow2").write_bytes(templates[1])
    scanned(folder)
    (folder / "one" / "x.qcow2").unlink()
    assert scanned(folder / "two")[0]["gone"] == []
    assert len(known_paths()) == 2
    assert [each["node"] for each in scanned(folder / "one")[0]["gone"]] == [None]
    assert len(json_of("list")) == 2
