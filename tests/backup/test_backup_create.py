"""Backups are full or increments, and QEMU reads of each what the disk had; why one is full is said."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.backups import SIZE, back_up, held, image_of, qcow2_disk, raw_disk, same, write_raw
from support.cli import COMMAND, dirtmap, error_of, json_of
from support.qemu import StorageDaemon, bitmaps, extents, info, qemu_img, qemu_io, run
from support.qemu import create as make_image
from support.volumes import attached, loops, mounted, require_root

import dirtmap.engine as dm
from dirtmap.tools.backup import Repository, create, files, rebuild

GRANULARITY = 65536


def ours(path: Path) -> list[str]:
    return [name for name in bitmaps(path) if name.startswith("dirtmap-backup-")]


def test_increments_of_a_qcow2_image_hold_exactly_what_was_written(tmp_path: Path) -> None:
    disk, repository = qcow2_disk(tmp_path / "disk.qcow2"), tmp_path / "repo"
    qemu_img("bitmap", "--add", disk, "other")
    first = back_up(repository, disk)
    assert (first.kind, first.reason, first.number) == ("full", "first", 1)
    assert first.copied == (3 << 20) + 2 * 65536  # nothing that is zero
    same(repository, first, disk)
    chooser = random.Random(4)
    for number in range(2, 5):
        for _ in range(5):
            at, kind = chooser.randrange(SIZE - 300_000) & ~511, chooser.choice(["-z", "-zu", "-P 5", "-P 6"])
            qemu_io(disk, f"write -q {kind} {at} {chooser.randrange(1, 500) * 512}")
        with dm.open(disk) as image:
            dirty = image[image_bitmap(repository)]
        made = back_up(repository, disk)
        assert (made.kind, made.reason, made.number, made.parent) == ("incremental", None, number, first.id)
        assert held(repository, made) == extents(dirty)
        assert made.copied + made.zeros == made.dirty == dirty.count
        same(repository, made, disk)
        assert info(image_of(repository, made))["backing-filename"] == image_of(repository, first).name
        first = made
    found = bitmaps(disk)
    assert len(ours(disk)) == 4
    assert [name for name, (_, flags) in found.items() if "auto" in flags] == ["other", first.bitmap]


def image_bitmap(repository: Path) -> str:
    return Repository(repository).backups()[-1].bitmap


def test_increments_of_a_raw_disk_of_an_odd_size(tmp_path: Path) -> None:
    disk, repository = raw_disk(tmp_path / "data.raw"), tmp_path / "repo"
    size = disk.stat().st_size
    first = back_up(repository, "data")
    same(repository, first, disk)
    assert first.size == size
    write_raw(disk, {0: b"x", 5 << 20: bytes(65536), size - 1: b"y"})
    made = back_up(repository, "data")
    assert (made.kind, made.zeros, made.copied) == ("incremental", 65536, 65536 + size % 65536)
    same(repository, made, disk)
    assert json_of("list", "data")[0]["checkpoints"] == [first.bitmap, made.bitmap]
    again = back_up(repository, "data")
    assert (again.kind, again.pieces) == ("incremental", 0)
    same(repository, again, disk)


def test_zeros_at_the_end_of_an_odd_disk_are_a_zero_cluster(tmp_path: Path) -> None:
    disk, repository = raw_disk(tmp_path / "data.raw"), tmp_path / "repo"
    size = disk.stat().st_size
    back_up(repository, "data")
    write_raw(disk, {size - 5: bytes(5)})
    made = back_up(repository, "data")
    assert (made.copied, made.zeros) == (0, size % GRANULARITY)
    same(repository, made, disk)
    last = json.loads(qemu_img("map", "--output=json", image_of(repository, made)))[-1]
    assert (last["depth"], last["zero"], last["data"]) == (0, True, False)


class Intruder(dm.Host):
    """A host on which somebody writes to a disk just before it is kept offline."""

    @contextlib.contextmanager
    def offline(self, disk: dm.Disk) -> Iterator[None]:
        qemu_io(Path(disk.path), "write -qP 99 17M 1k")
        with super().offline(disk):
            yield


def test_a_write_between_the_bitmap_s_begin_and_the_copy(tmp_path: Path) -> None:
    disk, repository = qcow2_disk(tmp_path / "disk.qcow2"), tmp_path / "repo"
    back_up(repository, disk)
    qemu_io(disk, "write -qP 98 2M 1k")
    with Intruder() as host:
        (made,) = create(host, [str(disk)], repository)
    assert (made.kind, made.copied) == ("incremental", 2 * GRANULARITY)
    same(repository, made, disk)


def test_granules_smaller_than_a_cluster(tmp_path: Path) -> None:
    disk, repository = qcow2_disk(tmp_path / "disk.qcow2"), tmp_path / "repo"
    back_up(repository, disk)
    name = image_bitmap(repository)
    with dm.open(disk) as image, image.transaction() as changed:
        changed[name] = dm.Bitmap(SIZE, 4096)
    qemu_io(disk, "write -qP 1 8k 512")
    made = back_up(repository, disk)
    assert (made.granularity, made.cluster_size, held(repository, made)) == (4096, 4096, [(8192, 4096)])
    same(repository, made, disk)


def lose_bitmap(disk: Path, repository: Path) -> None:
    dirtmap("remove", disk, image_bitmap(repository))


def disable_bitmap(disk: Path, repository: Path) -> None:
    dirtmap("disable", disk, image_bitmap(repository))


def kill_writer(disk: Path, repository: Path) -> None:
    with StorageDaemon(disk) as daemon:
        daemon.io("write -qP 1 0 512")


def recover(disk: Path, repository: Path) -> None:
    kill_writer(disk, repository)
    dirtmap("recover", disk)


def grow(disk: Path, repository: Path) -> None:
    qemu_img("resize", "-q", disk, str(SIZE * 2))


def remove_image(disk: Path, repository: Path) -> None:
    image_of(repository, Repository(repository).backups()[0]).unlink()


def truncate_image(disk: Path, repository: Path) -> None:
    os.truncate(image_of(repository, Repository(repository).backups()[0]), 70_000)


def remove_document(disk: Path, repository: Path) -> None:
    os.unlink(Repository(repository).document(Repository(repository).backups()[0]))


def flip_document(disk: Path, repository: Path) -> None:
    place = Path(Repository(repository).document(Repository(repository).backups()[0]))
    place.write_bytes(place.read_bytes().replace(b'"size": 2', b'"size": 3', 1))


def other_backing(disk: Path, repository: Path) -> None:
    newest = image_of(repository, Repository(repository).backups()[-1])
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", "", newest)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lose_bitmap, "bitmap-missing"),
        pytest.param(disable_bitmap, "bitmap-unusable", marks=pytest.mark.long),
        (kill_writer, "bitmap-unusable"),
        (recover, "all-dirty"),
        (grow, "resized"),
        (remove_image, "chain-broken"),
        pytest.param(truncate_image, "chain-broken", marks=pytest.mark.long),
        pytest.param(remove_document, "chain-broken", marks=pytest.mark.long),
        (flip_document, "chain-broken"),
        (other_backing, "chain-broken"),
    ],
)
def test_why_a_backup_is_full(tmp_path: Path, harm: Callable[[Path, Path], None], reason: str) -> None:
    disk, repository = qcow2_disk(tmp_path / "disk.qcow2", SIZE), tmp_path / "repo"
    back_up(repository, disk)
    back_up(repository, disk)
    harm(disk, repository)
    (said,) = json_of("backup", "create", disk, repository)
    assert (said["kind"], said["reason"], said["parent"]) == ("full", reason, None)
    made = Repository(repository).backups()[-1]
    assert made.why
    same(repository, made, disk)
    qemu_io(disk, "write -qP 8 1M 1k")
    after = back_up(repository, disk)
    assert (after.kind, after.parent, after.copied) == ("incremental", made.id, GRANULARITY)
    same(repository, after, disk)


@pytest.mark.parametrize("is_copy", [False, True], ids=["renamed", "copied"])
def test_a_disk_under_another_name_is_told_which_it_was(tmp_path: Path, is_copy: bool) -> None:
    disk, other, repository = qcow2_disk(tmp_path / "disk.qcow2"), tmp_path / "other.qcow2", tmp_path / "repo"
    back_up(repository, disk)
    last = back_up(repository, disk)
    shutil.copy(disk, other) if is_copy else disk.rename(other)
    (said,) = json_of("backup", "create", other, repository)
    assert (said["kind"], said["reason"], said["number"]) == ("full", "renamed", 1)
    assert (
        said["why"] == f"as its bitmap {last.bitmap} tells, it is 'disk.qcow2' ({disk}) under another name, "
        "or a copy of that"
    )
    qemu_io(other, "write -qP 8 1M 1k")
    after = back_up(repository, other)
    assert (after.kind, after.number, after.why) == ("incremental", 2, None)
    if is_copy:
        assert back_up(repository, disk).kind == "incremental"
    else:
        other.rename(disk)
        made = back_up(repository, disk)
        assert (made.number, made.reason) == (3, "renamed")
        assert "'other.qcow2'" in str(made.why)


def test_nothing_is_made_where_nothing_is_done(tmp_path: Path) -> None:
    disk, repository, folder = qcow2_disk(tmp_path / "disk.qcow2"), tmp_path / "repo", tmp_path / "folder"
    folder.mkdir()
    error_of("backup", "create", "nosuch", repository)
    error_of("backup", "create", disk, tmp_path / "nosuch.qcow2", repository)
    error_of("backup", "create", "nosuch", folder)
    with StorageDaemon(disk):
        assert "held by" in error_of("backup", "create", disk, repository)
    assert (repository.exists(), list(folder.iterdir())) == (False, [])
    assert ours(disk) == []


def test_a_new_repository_stays_once_a_bitmap_has_begun(tmp_path: Path) -> None:
    disk, repository = qcow2_disk(tmp_path / "disk.qcow2"), tmp_path / "repo"

    class Busy(dm.Host):
        def offline(self, disk: dm.Disk) -> contextlib.AbstractContextManager[None]:
            raise dm.LockedError(disk.path, "is in use")

    with Busy() as host, pytest.raises(dm.LockedError):
        create(host, [str(disk)], repository)
    (begun,) = ours(disk)
    assert begun.startswith(Repository(repository).bitmap_prefix)
    assert back_up(repository, disk).reason == "first"
    assert begun not in ours(disk)


def test_who_waited_for_a_repository_that_was_unmade_is_told(tmp_path: Path) -> None:
    place = Repository.made(tmp_path / "repo")
    waiting = Repository(tmp_path / "repo")
    with place.writing():
        place.unmake()
    assert not (tmp_path / "repo").exists()
    Repository.made(tmp_path / "repo")
    with pytest.raises(dm.StorageError, match="another repository is there now"), waiting.writing():
        pass


def test_untracked_writes_to_a_raw_disk_make_a_full_backup(tmp_path: Path) -> None:
    disk, repository = raw_disk(tmp_path / "data.raw"), tmp_path / "repo"
    back_up(repository, "data")
    with open(disk, "r+b") as file:
        file.write(b"untracked")
    made = back_up(repository, "data")
    assert (made.reason, made.parent) == ("all-dirty", None)
    assert "changed while nobody tracked it" in str(made.why)
    same(repository, made, disk)


def test_several_disks_in_any_order(tmp_path: Path) -> None:
    disk, repository = qcow2_disk(tmp_path / "disk.qcow2"), tmp_path / "repo"
    raw, other = raw_disk(tmp_path / "data.raw"), qcow2_disk(tmp_path / "other.qcow2")
    disks = {"data.raw": ("data", raw), "disk.qcow2": (disk, disk), "other.qcow2": (other, other)}
    for turn in (("data.raw", "disk.qcow2", "other.qcow2"), ("other.qcow2", "disk.qcow2", "data.raw")):
        with dm.Host() as host:
            made = create(host, [str(disks[name][0]) for name in turn], repository)
        for name, backup in zip(turn, made, strict=True):
            same(repository, backup, disks[name][1])
        qemu_io(disk, "write -qP 2 5M 1k")
        write_raw(raw, {3: b"z"})
    assert [backup.kind for backup in made] == ["incremental"] * 3
    assert [backup.copied for backup in made] == [0, 65536, 65536]


def test_a_raw_disk_that_has_grown(tmp_path: Path) -> None:
    disk, repository = raw_disk(tmp_path / "data.raw"), tmp_path / "repo"
    back_up(repository, "data")
    os.truncate(disk, SIZE + 70_001)
    assert "node resize" in error_of("backup", "create", "data", repository)
    dirtmap("node", "resize", "data")
    made = back_up(repository, "data")
    assert (made.reason, made.size) == ("resized", SIZE + 70_001)
    same(repository, made, disk)


def test_a_block_device_is_backed_up(tmp_path: Path) -> None:
    (tmp_path / "device").write_bytes(b"\5" * 70_000 + bytes(4 << 20))
    os.truncate(tmp_path / "device", SIZE)
    with loops(), attached(tmp_path / "device") as device:
        with dm.Host() as host:
            host.add_node("device", device)
        same(tmp_path / "repo", back_up(tmp_path / "repo", "device"), Path(device))
        write_raw(Path(device), {9 << 20: b"x"}, "device")
        made = back_up(tmp_path / "repo", "device")
        assert (made.kind, made.copied) == ("incremental", 65536)
        same(tmp_path / "repo", made, Path(device))


def test_one_process_at_a_time(tmp_path: Path) -> None:
    disk, repository = qcow2_disk(tmp_path / "disk.qcow2"), tmp_path / "repo"
    back_up(repository, disk)
    with Repository(repository).reading():
        assert "in use by another" in error_of("backup", "create", "--wait=0", disk, repository)
    with Repository(repository).writing():
        assert "in use by another" in error_of("backup", "verify", "--wait=0", repository)
    assert len(ours(disk)) == 1


def test_a_repository_without_its_lock_gets_one(tmp_path: Path) -> None:
    disk, repository = qcow2_disk(tmp_path / "disk.qcow2"), tmp_path / "repo"
    back_up(repository, disk)
    (repository / "lock").unlink()
    assert "lock: No such file" in error_of("backup", "verify", repository)
    assert back_up(repository, disk).kind == "incremental"
    dirtmap("backup", "verify", repository)


def test_a_repository_that_another_process_has_just_made_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, locked, waits = qcow2_disk(tmp_path / "disk.qcow2"), files.locked, set[float]()

    def noted(path: str, *, shared: bool, wait: float) -> contextlib.AbstractContextManager[None]:
        waits.add(wait)
        return locked(path, shared=shared, wait=wait)

    monkeypatch.setattr(files, "locked", noted)
    with dm.Host() as host:
        create(host, [str(disk)], tmp_path / "repo", wait=77)
    assert waits == {77}


def test_runs_at_once_come_one_after_the_other(tmp_path: Path) -> None:
    disk, repository = qcow2_disk(tmp_path / "disk.qcow2"), tmp_path / "repo"
    raw_disk(tmp_path / "data.raw")
    command = [COMMAND, "backup", "create", "-q", "--wait=60", disk, "data", repository]
    runs = [subprocess.Popen(command) for _ in range(3)]
    assert [each.wait(60) for each in runs] == [0, 0, 0]
    for name, target in (("data", tmp_path / "data.raw"), ("disk.qcow2", disk)):
        backups = Repository(repository).backups(name)
        assert [(backup.number, backup.kind) for backup in backups] == [
            (1, "full"),
            (2, "incremental"),
            (3, "incremental"),
        ]
        same(repository, backups[-1], target)
    assert len(list(repository.iterdir())) == 2 + 12
    assert len(ours(disk)) == 3


def test_disks_in_use_are_refused(tmp_path: Path) -> None:
    disk, repository = qcow2_disk(tmp_path / "disk.qcow2"), tmp_path / "repo"
    raw_disk(tmp_path / "data.raw")
    with StorageDaemon(disk):
        assert "held by qemu-storage-da" in error_of("backup", "create", "--wait=0", disk, repository)
    with dm.open("data") as image, image.track():
        assert "data.raw: cannot be cloned" in error_of("backup", "create", "--wait=0", "data", repository)
    assert not repository.exists()
    assert error_of("backup", "create", "none.qcow2", repository)
    assert "too" in error_of("backup", "create", "data", "data", repository)
    with dm.Host() as host:
        host.add_device("drive0", "data")
    assert "name its root node" in error_of("backup", "create", "drive0", repository)
    made = back_up(repository, disk, "data")
    assert (made.disk, made.kind) == ("data", "full")


def test_a_disk_that_is_written_to_meanwhile_fails(tmp_path: Path) -> None:
    disk, repository = raw_disk(tmp_path / "data.raw"), tmp_path / "repo"
    back_up(repository, "data")
    write_raw(disk, {0: b"x"})

    def interfere(name: str, done: int, total: int) -> None:
        with open(disk, "r+b") as file:
            file.write(b"y")

    with dm.Host() as host, pytest.raises(dm.LockedError, match="written to"):
        create(host, ["data"], repository, watch=interfere)
    assert len(Repository(repository).backups()) == 1
    assert len(list(repository.iterdir())) == 4
    made = back_up(repository, "data")
    assert made.reason == "all-dirty"
    same(repository, made, disk)


def test_a_full_file_system_fails_and_the_next_backup_has_it(tmp_path: Path) -> None:
    disk, repository = qcow2_disk(tmp_path / "disk.qcow2"), tmp_path / "repo"
    require_root()
    with mounted("tmpfs", repository, "-t", "tmpfs", "-o", "size=5m"):
        back_up(repository, disk)
        qemu_io(disk, "write -qP 3 0 2M")
        assert "No space left" in error_of("backup", "create", disk, repository)
        assert len(list(repository.iterdir())) == 4
        qemu_io(disk, "write -qP 3 9M 64k")
        assert run("mount", "-o", "remount,size=9m", str(repository)) == ""
        made = back_up(repository, disk)
        assert (made.kind, made.copied) == ("incremental", (2 << 20) + 65536)
        same(repository, made, disk)


@pytest.mark.parametrize("act", ["create", "rebuild"])
def test_what_a_bitmap_has_missed_is_not_forgotten_by_an_act_that_fails(tmp_path: Path, act: str) -> None:
    disk, repository = qcow2_disk(tmp_path / "disk.qcow2"), tmp_path / "repo"
    back_up(repository, disk)
    (mine,) = ours(disk)
    dirtmap("disable", disk, mine)
    qemu_io(disk, "write -qP 3 0 2M")  # which nothing records

    def fail(name: str, done: int, total: int) -> None:
        raise dm.StorageError("repo", "No space left on device")

    acts = {
        "create": lambda host: create(host, [str(disk)], repository, watch=fail),
        "rebuild": lambda host: rebuild(host, str(disk), mine, repository, watch=fail),
    }
    with dm.Host() as host, pytest.raises(dm.StorageError, match="No space"):
        acts[act](host)
    made = back_up(repository, disk)
    assert made.kind == "full"
    same(repository, made, disk)


def test_a_last_backup_that_is_broken_for_a_moment_only_makes_the_next_ones_full(tmp_path: Path) -> None:
    disk, repository = qcow2_disk(tmp_path / "disk.qcow2"), tmp_path / "repo"
    image = image_of(repository, back_up(repository, disk))

    def fail(name: str, done: int, total: int) -> None:
        raise dm.StorageError("repo", "No space left on device")

    for _ in range(2):
        qemu_io(disk, "write -qP 3 0 2M")
        aside = image.rename(image.with_suffix(".aside"))
        with dm.Host() as host, pytest.raises(dm.StorageError, match="No space"):
            create(host, [str(disk)], repository, watch=fail)
        aside.rename(image)
    made = back_up(repository, disk)
    assert made.kind == "full"
    same(repository, made, disk)


def test_qemu_dies_meanwhile_and_the_next_backup_has_it(tmp_path: Path) -> None:
    disk, repository = tmp_path / "disk.qcow2", tmp_path / "repo"
    make_image(disk, SIZE, "extended_l2=on")  # which only QEMU reads
    back_up(repository, disk)
    qemu_io(disk, "write -qP 3 0 20M")

    def kill(name: str, done: int, total: int) -> None:
        for child in Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)

    with dm.Host() as host, pytest.raises(dm.StorageError, match="has ended"):
        create(host, [str(disk)], repository, watch=kill)
    assert len(list(repository.iterdir())) == 4
    made = back_up(repository, disk)
    assert (made.kind, made.copied) == ("incremental", 20 << 20)
    same(repository, made, disk)


def test_names_that_qemu_takes_for_a_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    disk, repository = qcow2_disk(tmp_path / "disk").rename(tmp_path / "nbd:disk,1.qcow2"), Path("web:1")
    for _ in range(2):
        same(tmp_path / repository, back_up(repository, Path("nbd:disk,1.qcow2")), disk)
    dirtmap("backup", "restore", repository, disk.name, "nbd:out.qcow2")
    dirtmap("backup", "verify", repository)
    assert repository.stat().st_mode & 0o777 == 0o700


def test_images_that_others_are_on_are_never_removed(tmp_path: Path) -> None:
    disk, repository = qcow2_disk(tmp_path / "disk.qcow2"), tmp_path / "repo"
    backups = [back_up(repository, disk) for _ in range(2)]
    remove_document(disk, repository)
    back_up(repository, disk)
    assert image_of(repository, backups[0]).exists()  # the second one's document says that it is on it
    truncated = Path(Repository(repository).document(backups[1]))
    truncated.write_text("")
    back_up(repository, disk)
    assert image_of(repository, backups[0]).exists()  # nobody knows who is on it
    truncated.unlink()
    back_up(repository, disk)
    assert not image_of(repository, backups[0]).exists()


def test_another_disk_of_the_same_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    back_up(tmp_path / "repo", qcow2_disk(tmp_path / "disk.qcow2"))
    other = qcow2_disk(tmp_path / "a" / "disk.qcow2")
    assert "another disk" in error_of("backup", "create", other, tmp_path / "repo")
    (tmp_path / "disk.qcow2").rename(other)  # known by its bitmap
    assert back_up(tmp_path / "repo", other).kind == "incremental"


def test_a_disk_whose_store_was_lost_begins_anew(tmp_path: Path) -> None:
    disk, repository = raw_disk(tmp_path / "data.raw"), tmp_path / "repo"
    back_up(repository, "data")
    (tmp_path / "default.dmap").unlink()
    shutil.rmtree(tmp_path / "index")
    with dm.Host() as host:
        host.add_node("data", str(disk))
    made = back_up(repository, "data")
    assert (made.number, made.reason) == (2, "bitmap-missing")
    same(repository, made, disk)


def test_two_that_make_a_repository_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one makes it when this one has just seen that there is none."""
    touch, uuids = files.touch, []

    def overtaken(path: str) -> None:
        touch(path)
        monkeypatch.setattr(files, "touch", touch)
        uuids.append(Repository.made(tmp_path / "repo").uuid)

    monkeypatch.setattr(files, "touch", overtaken)
    assert [Repository.made(tmp_path / "repo").uuid] == uuids


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    disk = qcow2_disk(tmp_path / "disk.qcow2")
    assert "not empty" in error_of("backup", "create", disk, tmp_path)
    (tmp_path / "repository.json").write_text('{"format": "dirtmap-backup", "version": 2, "uuid": "x"}')
    assert "not that" in error_of("backup", "create", disk, tmp_path)
