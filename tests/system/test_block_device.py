"""Block devices: what is behind a device's number, and what becomes of bitmaps where that is something else."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.alone import alone

import dirtmap.engine as dm
from dirtmap.engine.host.kind import Address
from dirtmap.engine.namespaces.nodes import add_node
from dirtmap.engine.storefile.file import Store, create
from dirtmap.engine.system import medium
from dirtmap.engine.system.medium import medium_of

MIB = 1 << 20
DISK, PARTITION = os.makedev(8, 0), os.makedev(8, 2)


class Host:
    """The part of sysfs that is looked at, and the boot."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.disk, self.folder = folder / "devices/sda", folder
        self.boot = bytes(16)
        numbers = folder / "numbers"
        numbers.mkdir()
        for number, path in ((DISK, "sda"), (PARTITION, "sda/sda2")):
            (folder / "devices" / path).mkdir(parents=True)
            (numbers / f"{os.major(number)}:{os.minor(number)}").symlink_to(f"../devices/{path}")
        self.write("sda2/partition", "2")
        self.write("sda2/start", "2048")
        self.write("diskseq", "7")
        self.write("removable", "0")
        monkeypatch.setattr(medium, "_SYSFS", str(numbers))
        monkeypatch.setattr(medium, "boot_id", lambda: self.boot)

    def write(self, name: str, content: str) -> None:
        path = self.disk / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ["dm/uuid", "md/uuid", "device/wwid", "wwid", "serial", "device/cid"])
def test_a_disk_with_a_name_that_lasts_is_known_again_after_a_boot(host: Host, name: str) -> None:
    host.write(name, "LVM-abc")
    before = medium_of(DISK)
    host.boot = b"another boot    "
    host.write("diskseq", "3")
    assert medium_of(DISK) == before
    host.write(name, "LVM-xyz")
    assert medium_of(DISK) != before


@pytest.mark.parametrize("removable", [False, True])
def test_any_other_disk_is_another_one_after_a_boot_and_whenever_it_is_attached(host: Host, removable: bool) -> None:
    host.write("serial", "a card reader's" if removable else "")
    host.write("removable", str(int(removable)))
    seen = {medium_of(DISK)}
    host.write("diskseq", "8")
    seen.add(medium_of(DISK))
    host.boot = b"another boot    "
    seen.add(medium_of(DISK))
    assert len(seen) == 3


def test_a_partition_is_that_of_its_disk_with_its_place(host: Host) -> None:
    host.write("wwid", "naa.5000")
    seen = {medium_of(DISK), medium_of(PARTITION)}
    host.write("sda2/start", "4096")
    seen.add(medium_of(PARTITION))
    host.write("wwid", "naa.5001")
    seen.add(medium_of(PARTITION))
    assert len(seen) == 4


def test_where_sysfs_tells_nothing_only_the_boot_counts(host: Host) -> None:
    number = os.makedev(9, 9)
    before = medium_of(number)
    assert medium_of(number) == before
    host.boot = b"another boot    "
    assert medium_of(number) != before


class Loop:
    """A loop device over a file."""

    def __init__(self, file: Path) -> None:
        if os.geteuid():
            pytest.skip("only root may attach a file as a disk")
        found = subprocess.run(["losetup", "--find", "--show", file], check=False, capture_output=True, text=True)
        if found.returncode:
            pytest.skip(f"no file can be attached as a disk here: {found.stderr}")
        self.path = found.stdout.strip()

    def detach(self) -> None:
        subprocess.run(["losetup", "--detach", self.path], check=True)

    def attach(self, file: Path) -> None:
        subprocess.run(["losetup", self.path, file], check=True)


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    for name in ("one", "two"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 8 * MIB)
    with alone("loop"):  # a detached device's number must not go to another test before it is attached again
        loop = Loop(tmp_path / "one")
        yield loop
        loop.detach()


def test_another_disk_behind_the_same_number_makes_all_dirty(loop: Loop, tmp_path: Path) -> None:
    place = Address(str(tmp_path / "s.dmap"), "disk")
    create(place.path)
    with Store(place.path) as target:
        add_node(target, "disk", loop.path)
    with dm.open(place) as image, image.transaction() as bitmaps:
        bitmaps["b0"] = dm.Bitmap.from_extents(8 * MIB, [MIB], [1])
    with dm.open(place) as image, image.track() as tracker, tracker.write(2 * MIB, 4096):
        fd = os.open(loop.path, os.O_WRONLY)
        os.pwrite(fd, b"x" * 4096, 2 * MIB)
        os.close(fd)
    with dm.open(place) as image:
        assert image.doubt() is None
        assert image["b0"].count == 2 * 65536
    loop.detach()
    loop.attach(tmp_path / "two")
    with dm.open(place) as image:
        assert image.doubt() == "the image has changed while nobody tracked it"
        assert image["b0"].count == 8 * MIB


def test_a_disk_grows_while_it_is_tracked(loop: Loop, tmp_path: Path) -> None:
    place = Address(str(tmp_path / "s.dmap"), "disk")
    create(place.path)
    with Store(place.path) as target:
        add_node(target, "disk", loop.path)
    with dm.open(place) as image, image.transaction() as bitmaps:
        bitmaps["b0"] = dm.Bitmap(8 * MIB, MIB)
    with dm.open(place) as image, image.track() as tracker:
        tracker.mark(MIB, 1)
        with pytest.raises(dm.BitmapError, match=f"has {8 * MIB} bytes, and is to have {10 * MIB}"):
            tracker.resize(10 * MIB)
        os.truncate(tmp_path / "one", 10 * MIB)
        subprocess.run(["losetup", "--set-capacity", loop.path], check=True)
        tracker.resize(10 * MIB)
        tracker.mark(10 * MIB - 1, 1)
    with dm.open(place) as image:
        assert image.doubt() is None
        assert image.size == 10 * MIB
        offsets, lengths = image["b0"].extents()
    assert (offsets.tolist(), lengths.tolist()) == ([MIB, 8 * MIB], [MIB, 2 * MIB])
