"""Any backup is restored, byte for byte, into whatever form; what is damaged is said, and never restored."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.backup_damage import DAMAGE
from support.backups import SIZE, back_up, qcow2_disk, raw_disk
from support.cli import dirtmap, error_of, json_of
from support.qemu import StorageDaemon, check, qemu_img, qemu_io, run
from support.volumes import attached, loops, mounted

import dirtmap.engine as dm
from dirtmap.tools.backup import Backup, Piece, Repository, restore
from dirtmap.tools.backup.chain import visible
from dirtmap.tools.backup.opened import Images
from dirtmap.tools.qsd import nodes


def test_every_night_is_restored(nights: tuple[Path, list[bytes]], tmp_path: Path) -> None:
    repository, contents = nights
    times = [backup.time for backup in Repository(repository).backups()]
    for number, content in enumerate(contents, 1):
        raw, image = tmp_path / f"{number}.raw", tmp_path / f"{number}.qcow2"
        dirtmap("backup", "restore", f"--at={number}", repository, "data", raw)
        assert raw.read_bytes() == content
        assert raw.stat().st_blocks * 512 < 8 << 20
        dirtmap("backup", "restore", "-q", "--at", times[number - 1], repository, "data", image)
        check(image)
        qemu_img("compare", "-q", "-f", "raw", "-F", "qcow2", raw, image)
    dirtmap("backup", "restore", repository, "data", tmp_path / "newest")
    assert (tmp_path / "newest").read_bytes() == contents[-1]
    assert "is there already" in error_of("backup", "restore", repository, "data", tmp_path / "newest")
    dirtmap("backup", "restore", "--force", "--at=1", repository, "data", tmp_path / "newest")
    assert (tmp_path / "newest").read_bytes() == contents[0]
    for when in ("5", "2001-01-01", "yesterday"):
        assert error_of("backup", "restore", "--at", when, repository, "data", tmp_path / "none")
    assert "data" in error_of("backup", "restore", repository, "other", tmp_path / "none")
    assert not list(tmp_path.glob("*.tmp"))


def test_paths_may_be_relative(
    nights: tuple[Path, list[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(nights[0])
    dirtmap("backup", "restore", ".", "data", "out.raw")
    assert (nights[0] / "out.raw").read_bytes() == nights[1][-1]
    monkeypatch.chdir(tmp_path)
    back_up(Path("new"), qcow2_disk(Path("disk.qcow2")))
    dirtmap("backup", "restore", "new", "disk.qcow2", "again.qcow2")
    qemu_img("compare", "-q", "disk.qcow2", "again.qcow2")


def test_a_damaged_store_keeps_nobody_from_restoring_a_file(nights: tuple[Path, list[bytes]], tmp_path: Path) -> None:
    (tmp_path / "default.dmap").write_bytes(bytes(70_000))
    (tmp_path / "out").touch()
    dirtmap("backup", "restore", "--force", nights[0], "data", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == nights[1][-1]


def test_disks_of_no_bytes_and_of_one(tmp_path: Path) -> None:
    repository = tmp_path / "repo"
    for name, content in (("none", b""), ("one", b"1")):
        (tmp_path / name).write_bytes(content)
        with dm.Host() as host:
            host.add_node(name, str(tmp_path / name))
        for _ in range(2):
            back_up(repository, name)
        dirtmap("backup", "restore", repository, name, tmp_path / f"{name}.out")
        assert (tmp_path / f"{name}.out").read_bytes() == content
        dirtmap("backup", "verify", repository, f"node:{name}")
    dirtmap("backup", "prune", "--keep=1", repository)
    dirtmap("backup", "verify", repository)


def test_a_daemon_that_was_asked_nothing_just_ends() -> None:
    with Images():
        pass


def test_a_server_has_a_connection_for_each_image_of_a_long_chain(tmp_path: Path) -> None:
    disk = qcow2_disk(tmp_path / "disk.qcow2")
    with Images() as opened:
        opened.open("disk", nodes.image(str(disk), "qcow2"))
        connections = [opened.connect("disk") for _ in range(150)]
        assert {connection.size for connection in connections} == {SIZE}


def test_a_link_stays_one(nights: tuple[Path, list[bytes]], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("out")
    for flags in ([], ["--force"]):
        dirtmap("backup", "restore", *flags, nights[0], "data", tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "out").read_bytes() == nights[1][-1]


def test_what_is_in_use_is_not_replaced(nights: tuple[Path, list[bytes]], tmp_path: Path) -> None:
    running, tracked = qcow2_disk(tmp_path / "disk.qcow2"), raw_disk(tmp_path / "data.raw")
    with StorageDaemon(running):
        assert "open for writing" in error_of("backup", "restore", "--force", nights[0], "data", running)
    with dm.open("data") as image, image.track():
        assert "tracked by" in error_of("backup", "restore", "--force", nights[0], "data", tracked)


def test_what_is_listed(nights: tuple[Path, list[bytes]]) -> None:
    repository, _ = nights
    listed = json_of("backup", "list", repository)
    assert [(backup["disk"], backup["number"]) for backup in listed] == [("data", number) for number in range(1, 5)]
    assert listed == json_of("backup", "list", repository, "data")
    told = json_of("backup", "info", repository, "data", "--at=3")
    assert told["chain"] == [backup["id"] for backup in listed[2::-1]]
    assert {**listed[2], "image": told["image"], "chain": told["chain"]} == told
    assert dirtmap("backup", "list", repository).out.count("incremental") == 3
    assert "needs   backup 2, backup 1" in dirtmap("backup", "info", repository, "data", "--at=3").out
    assert "no backup of 'x'; it has those of data" in error_of("backup", "list", repository, "x")
    Path(Repository(repository).document(Repository(repository).backups()[0])).write_text("{}")
    assert "not the document" in dirtmap("backup", "list", repository, status=1).error


@pytest.mark.parametrize("harm", DAMAGE)
@pytest.mark.parametrize("number", [1, 3])
def test_damage_is_said_and_never_restored(
    tmp_path: Path, nights: tuple[Path, list[bytes]], harm: Callable[[Path, Backup], None], number: int
) -> None:
    repository, contents = nights
    harm(repository, Repository(repository).backups()[number - 1])
    out = tmp_path / "out"
    assert error_of("backup", "restore", "--at=4", repository, "data", out)
    assert not list(tmp_path.glob("out*"))
    if number == 3:  # what does not need it
        dirtmap("backup", "restore", "-q", "--at=2", repository, "data", out)
        assert out.read_bytes() == contents[1]


def test_a_block_device_is_restored(nights: tuple[Path, list[bytes]], tmp_path: Path) -> None:
    repository, contents = nights
    size = len(contents[0])
    (tmp_path / "device").write_bytes(b"\xff" * (32 << 20))
    with loops(), attached(tmp_path / "device") as device:
        with dm.Host() as host:
            host.add_node("device", device)
        run("mkfs.ext4", "-q", device)
        with mounted(device, tmp_path / "mnt"):
            assert "busy" in error_of("backup", "restore", "--force", repository, "data", device)
        Path(device).write_bytes(b"\xff" * (32 << 20))
        dirtmap("add", "device", "b")
        assert "--force insists" in error_of("backup", "restore", repository, "data", device)
        dirtmap("backup", "restore", "--force", "--at=2", repository, "data", device)
        restored = Path(device).read_bytes()
        assert restored[:size] == contents[1]
        assert restored[size:] == b"\xff" * ((32 << 20) - size)
        with dm.open("device") as image:
            assert image["b"].count == 32 << 20


def test_a_block_device_that_is_too_small(nights: tuple[Path, list[bytes]], tmp_path: Path) -> None:
    (tmp_path / "device").write_bytes(b"\xff" * SIZE)  # the disk has some bytes more
    with loops(), attached(tmp_path / "device") as device:
        said = error_of("backup", "restore", "--force", nights[0], "data", device)
        assert said == f"{device}: has {SIZE} bytes, and the disk has {len(nights[1][0])}"
        assert Path(device).read_bytes() == b"\xff" * SIZE


def test_while_a_block_device_is_restored_nobody_mounts_it(nights: tuple[Path, list[bytes]], tmp_path: Path) -> None:
    tried = list[str]()
    (tmp_path / "device").write_bytes(bytes(32 << 20))
    with loops(), attached(tmp_path / "device") as device, dm.Host() as host:

        def watch(*_: object) -> None:
            if not tried:
                with pytest.raises(OSError, match="busy") as error:
                    os.close(os.open(device, os.O_RDWR | os.O_EXCL))
                tried.append(str(error.value))

        restore(host, nights[0], "data", device, force=True, watch=watch)
    assert tried


def test_a_restored_file_over_a_node_makes_its_bitmaps_dirty(tmp_path: Path) -> None:
    disk, repository = raw_disk(tmp_path / "data.raw"), tmp_path / "repo"
    made = back_up(repository, "data")
    dirtmap("backup", "restore", "--force", repository, "data", disk)
    with dm.open("data") as image:
        assert image[made.bitmap].count >= image.size
    assert back_up(repository, "data").reason == "all-dirty"


def test_a_qcow2_disk_is_restored_as_qcow2(tmp_path: Path) -> None:
    disk, repository = qcow2_disk(tmp_path / "disk.qcow2"), tmp_path / "repo"
    back_up(repository, disk)
    qemu_io(disk, "write -qz 1M 1M")
    back_up(repository, disk)
    dirtmap("backup", "restore", repository, "disk.qcow2", tmp_path / "out.qcow2")
    qemu_img("compare", "-q", "-f", "qcow2", "-F", "qcow2", disk, tmp_path / "out.qcow2")


LAYER = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 9)), max_size=6)


@given(st.lists(LAYER, min_size=1, max_size=4))
def test_what_can_be_seen_of_layers(layers: list[list[tuple[int, int]]]) -> None:
    made: list[list[Piece]] = []
    for depth, layer in enumerate(layers):
        at, pieces = 0, []
        for gap, length in layer:
            pieces.append(Piece(at + gap, length, bytes([depth]) * 32))
            at += gap + length
        made.append(pieces)
    expected: dict[int, tuple[int, Piece]] = {}
    for depth in reversed(range(len(made))):
        expected |= {at: (depth, piece) for piece in made[depth] for at in range(piece.offset, piece.end)}
    found = list(visible(made))
    assert {at: (part.depth, part.piece) for part in found for at in range(part.start, part.end)} == expected
    assert all(one.end <= other.start for one, other in itertools.pairwise(found))
