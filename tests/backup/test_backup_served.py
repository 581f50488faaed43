"""Backups of disks that are being written: each is the disk as it was at one moment, and no write is missed."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from support import frozen
from support.backups import back_up, counted_acts, qcow2_disk, same
from support.child import died_of
from support.cli import dirtmap, error_of, json_of
from support.frozen import SLOT, Served, Writer, last_write, slot_of
from support.nbd import WRITE, Client
from support.tracking import make_node
from support.volumes import attached, loops

import dirtmap.engine as dm
from dirtmap.engine.host.instant import Instant
from dirtmap.engine.model.namespace import Namespace
from dirtmap.fmt import live
from dirtmap.tools.backup import (
    Repository,
    comparing,
    create,
    creating,
    freezing,
    prune,
    restore,
    state,
    verify,
    verify_disk,
    verifying,
)
from dirtmap.tools.export import Listener, export
from dirtmap.tools.serve.serving import serve

MIB, GRANULE = 1 << 20, 65536
SLOTS, SIZE = 512, 4 << 20  # all but the first half stays empty

xfs, btrfs = frozen.xfs, frozen.btrfs


def restored(repository: Path, disk: str, number: int | None = None) -> bytes:
    out = repository.with_name("out")
    with dm.Host() as host:
        restore(host, repository, disk, out, at=None if number is None else str(number), form="raw", force=True)
    return out.read_bytes()


def test_a_snapshot_may_take_as_long_as_writes_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            begun.append(self)

    monkeypatch.setattr(live, "PATIENCE_NS", 1_000_000)
    monkeypatch.setattr(subprocess, "Popen", Noted)
    with pytest.raises(dm.StorageError, match=r"still runs after 0\.001 seconds"):
        freezing._run("exec sleep 100")
    assert begun[0].poll() is None, "it may have suspended a device"
    begun[0].kill()
    begun[0].wait()


def checkpoints(target: str) -> list[str]:
    return [each["name"] for each in json_of("checkpoint", "list", target)["checkpoints"]]


def wait_for(writer: Writer, number: int) -> None:
    while writer.acknowledged < number:
        assert writer.is_alive
        time.sleep(0.001)


def granules(first: int, last: int) -> set[int]:
    """Those that the writes with these numbers went to."""
    return {slot_of(number, SLOTS) * SLOT // GRANULE for number in range(first, last + 1)}


def test_the_root_of_a_device_that_is_served(xfs: Path, tmp_path: Path) -> None:
    """Its bitmaps are changed through the device's tracker; what checkpoints the device has stays as it is."""
    repository, path = tmp_path / "repo", make_node(xfs, SIZE)
    dirtmap("device", "add", "vda", "--root", "drive0")
    with dm.open("device:vda") as device, device.track(save_interval=0) as tracker, path.open("r+b") as file:
        tracker.checkpoint("mine")
        for night, kind in enumerate(("full", "incremental", "incremental")):
            with tracker.write(night * GRANULE, GRANULE):
                file.write(bytes([65 + night]) * GRANULE)
                file.flush()
            made = back_up(repository, "node:drive0")
            assert (made.kind, made.frozen) == (kind, "reflink")
            assert made.copied == GRANULE
            assert restored(repository, "drive0") == path.read_bytes()
        assert not verify(repository)
        assert tracker.checkpoints() == ["mine"]
        assert tracker.changed_since("mine").count == 3 * GRANULE


def test_disks_are_of_one_moment_and_a_night_costs_what_was_written(xfs: Path, tmp_path: Path) -> None:
    """Whichever process dies between the nights; beside an image that is offline."""
    repository, image = tmp_path / "repo", qcow2_disk(tmp_path / "disk.qcow2")
    with contextlib.ExitStack() as stack:
        disks = [stack.enter_context(Served(xfs, name, SIZE)) for name in ("drive0", "drive1")]
        kept: dict[int, list[bytes]] = {}
        last = since = 0
        for night in range(1, 4):
            with Writer([disk.sock for disk in disks], SLOTS, start=last + 1) as writer:
                wait_for(writer, last + 5)
                before = writer.acknowledged
                with dm.Host() as host:
                    made = create(host, ["drive0", str(image), "drive1"], repository)
                after = writer.submitted
            kept[night] = [restored(repository, name) for name in ("drive0", "drive1")]
            first, second = (last_write(content, SLOTS) for content in kept[night])
            assert before <= second <= first <= after
            assert first - second <= 1
            same(repository, made[1], image)
            if night > 1:
                assert {backup.kind for backup in made} == {"incremental"}
                for backup in made[::2]:
                    assert backup.copied + backup.zeros <= backup.dirty
                    assert backup.dirty <= len(granules(since, after)) * GRANULE
            since = before
            assert [backup.frozen for backup in made] == ["reflink", "offline", "reflink"]
            last = writer.submitted
            if night == 1:  # the tracker alone
                disks[0].kill()
                assert "its tracker has died, and others mark" in error_of("backup", "create", "drive0", repository)
                disks[0].start("--adopt")
            elif night == 2:  # both
                disks[0].kill()
                disks[0].kill_nbdkit()
                made = [back_up(repository, "drive0")]
                assert made[0].kind == "incremental"
                assert made[0].frozen == "offline"
                disks[0].start()
        for night, number in ((1, 1), (2, 2), (3, 4)):
            assert restored(repository, "drive0", number) == kept[night][0]
            assert restored(repository, "drive1", night) == kept[night][1]
        prune(repository, 2)
        back_up(repository, "drive0")
        assert len(checkpoints("drive0")) == 3
    assert verify(repository) == []


def snapshot_of(disk: Path) -> str:
    return f"cp --reflink=always {disk} {disk.with_name('snap')}"


def test_a_snapshot_that_a_command_makes_is_of_that_very_instant(xfs: Path, tmp_path: Path) -> None:
    repository, snap = tmp_path / "repo", xfs / "snap"
    with Served(xfs, "drive0", SIZE) as disk, Writer([disk.sock], SLOTS) as writer:
        arguments = ["backup", "create", "drive0", repository, "--source", snap, "--snapshot", snapshot_of(disk.path)]
        for _ in range(2):
            before = writer.acknowledged
            (made,) = json_of(*arguments)
            assert made["frozen"] == "source"
            assert restored(repository, "drive0") == snap.read_bytes()
            assert before <= last_write(snap.read_bytes(), SLOTS) <= writer.submitted
            assert f"{snap}: is there already" in error_of(*arguments)
            snap.unlink()
        assert made["kind"] == "incremental"
        left = len(checkpoints("drive0"))
        assert "exit 3: ended with status 3" in error_of(*arguments[:-1], "exit 3")
        assert f"{snap}: open: No such file" in error_of(*arguments[:-1], "true")
        said = error_of(*arguments[:-1], f"truncate -s 1M {snap}")
        assert "has 1048576 bytes, and the disk 4194304" in said
        assert len(checkpoints("drive0")) <= left + 1
        made = back_up(repository, "drive0")
        assert (made.kind, made.frozen) == ("incremental", "reflink")
        last_write(restored(repository, "drive0"), SLOTS)


def test_a_snapshot_that_is_there_may_be_of_any_moment_since_the_last_backup(xfs: Path, tmp_path: Path) -> None:
    repository, snap = tmp_path / "repo", xfs / "snap"
    arguments = ["backup", "create", "drive0", repository, "--source", snap]

    def take() -> None:
        snap.unlink(missing_ok=True)
        subprocess.run(snapshot_of(disk.path), shell=True, check=True)

    with Served(xfs, "drive0", SIZE) as disk, Client(disk.sock) as client:

        def write(at: int) -> None:
            """Two times: what the second one writes must be in the next backup, whenever the snapshot is made."""
            client.send(WRITE, at * GRANULE, SLOT, data=os.urandom(SLOT))
            assert client.receive() == 0

        write(0)
        take()
        assert "--snapshot COMMAND makes it at the right moment" in error_of(*arguments)
        back_up(repository, "drive0")
        for night in range(2):
            write(1)
            write(2 + night)
            take()
            write(1)
            write(5 + night)
            (made,) = json_of(*arguments)
            assert made["kind"] == "incremental"
            assert restored(repository, "drive0") == snap.read_bytes()
            if night == 1:  # a backup that failed has begun a checkpoint that is younger than the snapshot
                write(1)
                take()
                write(1)
                write(9)

                def attempt() -> None:
                    with counted_acts(3):
                        back_up(repository, "drive0")

                assert died_of(attempt) == signal.SIGKILL
                (made,) = json_of(*arguments)
                assert restored(repository, "drive0") == snap.read_bytes()
        made = back_up(repository, "drive0")
        assert made.kind == "incremental"
        assert restored(repository, "drive0") == disk.path.read_bytes()
        # What came before the last checkpoint is not copied again.
        write(1)
        made = back_up(repository, "drive0")
        assert made.dirty == GRANULE
        assert restored(repository, "drive0") == disk.path.read_bytes()


def test_disks_on_btrfs_are_cloned_or_read_from_a_snapshot_of_their_subvolume(btrfs: Path, tmp_path: Path) -> None:
    repository, snap = tmp_path / "repo", btrfs / "snap"
    command = f"btrfs subvolume snapshot -r {btrfs} {snap}"
    with Served(btrfs, "drive0", SIZE) as disk, Writer([disk.sock], SLOTS) as writer:
        assert back_up(repository, "drive0").frozen == "reflink"
        last_write(restored(repository, "drive0"), SLOTS)
        before = writer.acknowledged
        (made,) = json_of(
            "backup", "create", "drive0", repository, "--source", snap / disk.path.name, "--snapshot", command
        )
        assert (made["kind"], made["frozen"]) == ("incremental", "source")
        content = restored(repository, "drive0")
        assert content == (snap / disk.path.name).read_bytes()
        assert before <= last_write(content, SLOTS) <= writer.submitted
        dirtmap("backup", "verify", repository, "drive0")
        with dm.Host() as host, export(host, ["drive0"], Listener(unix=str(tmp_path / "sock")), reflink=True) as served:
            (uri,) = served.uris
            subprocess.run(["nbdcopy", uri, tmp_path / "copy"], check=True)
        last_write((tmp_path / "copy").read_bytes(), SLOTS)


def test_a_block_device_is_read_from_a_snapshot_that_is_another_one(tmp_path: Path) -> None:
    """As LVM makes them: what the command names is a link to the device."""
    medium, copy, snap, repository = (tmp_path / name for name in ("medium", "copy", "snap", "repo"))
    medium.write_bytes(b"\5" * 70_000 + bytes(SIZE - 70_000))
    command = f"cp {medium} {copy} && ln -s $(losetup --find --show --read-only {copy}) {snap}"
    arguments = ["backup", "create", "drive0", repository, "--source", snap, "--snapshot", command]
    with loops(), attached(medium) as device, dm.Host() as host:
        host.add_node("drive0", device)
        with serve(host, "drive0", Listener(unix=str(tmp_path / "sock"))), Client(tmp_path / "sock") as client:
            assert "a block device, which cannot be cloned" in error_of(*arguments[:4])
            for kind in ("full", "incremental"):
                client.ask(WRITE, 9 * GRANULE, GRANULE)
                (made,) = json_of(*arguments)
                subprocess.run(["losetup", "--detach", snap.readlink()], check=True)
                snap.unlink()
                assert (made["kind"], made["frozen"]) == (kind, "source")
                assert restored(repository, "drive0") == copy.read_bytes() == Path(device).read_bytes()
                client.ask(WRITE, 11 * GRANULE, GRANULE)
            assert made["dirty"] == 2 * GRANULE
            dirtmap("backup", "verify", repository, "drive0")


def test_a_live_backup_is_marked_and_the_next_one_is_right(tmp_path: Path) -> None:
    repository = tmp_path / "repo"
    with Served(tmp_path, "drive0", SIZE) as disk:
        said = error_of("backup", "create", "drive0", repository)
        assert said.startswith(f"{disk.path}: cannot be cloned")
        assert said.endswith("; --source reads a snapshot, --live insists")
        assert checkpoints("drive0") == []
        with Writer([disk.sock], SLOTS) as writer:
            wait_for(writer, 3)
            assert "live: not of one moment" in dirtmap("backup", "create", "drive0", repository, "--live").out
            (made,) = json_of("backup", "create", "drive0", repository, "--live")
        assert (made["kind"], made["frozen"]) == ("incremental", "live")
        assert "incremental, live" in dirtmap("backup", "list", repository).out
        assert "live: not of one moment" in dirtmap("backup", "info", repository, "drive0").out
    assert back_up(repository, "drive0").kind == "incremental"
    last_write(restored(repository, "drive0"), SLOTS)
    # As an earlier version has made it.
    path = next(each for each in repository.glob("2*.json") if b'"number": 1,' in each.read_bytes())
    head, _, rest = path.read_bytes().split(b"\n", 2)
    old = head.replace(b', "frozen": "live"', b"")
    assert old != head
    path.write_bytes(old + b'\n"digest": "' + sha256(old).hexdigest().encode() + b'",\n' + rest)
    assert Repository(repository).at("drive0", "1").frozen == "offline"


def test_a_failure_at_any_point_is_made_good_by_the_next(xfs: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repo"
    with Served(xfs, "drive0", SIZE) as disk, Client(disk.sock) as client:
        client.ask(WRITE, 0, GRANULE)
        back_up(repository, "drive0")
        for at in (0, 3):
            client.ask(WRITE, (2 * at + 1) * GRANULE, GRANULE)

            def attempt(at: int = at) -> None:
                with counted_acts(at):
                    back_up(repository, "drive0")

            assert died_of(attempt) == signal.SIGKILL
            client.ask(WRITE, (2 * at + 2) * GRANULE, GRANULE)
            made = back_up(repository, "drive0")
            assert (made.kind, made.dirty) == ("incremental", 2 * GRANULE)
            assert restored(repository, "drive0") == disk.path.read_bytes()
        assert len(checkpoints("drive0")) == 3


@pytest.mark.parametrize("is_cloned", [True, False])
def test_a_served_disk_is_verified_while_it_is_written(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, is_cloned: bool
) -> None:
    folder: Path = request.getfixturevalue("xfs") if is_cloned else tmp_path
    repository, compare = tmp_path / "repo", verifying.compare

    def differences(*behind: int) -> list[int]:
        """What is found, while clients write to a granule, and others behind the bitmap's back, before it is read."""

        def late(*arguments: object) -> None:
            client.ask(WRITE, 40 * GRANULE, GRANULE)
            write_behind(*behind)
            compare(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(verifying, "compare", late)
        with dm.Host() as host:
            found = verify_disk(host, repository, "drive0")[1]
        return [at // GRANULE for offset, length in found for at in range(offset, offset + length, GRANULE)]

    def write_behind(*granules: int) -> None:
        with open(disk.path, "r+b", buffering=0) as file:
            for granule in granules:
                file.seek(granule * GRANULE)
                file.write(b"behind")

    with Served(folder, "drive0", SIZE) as disk, Client(disk.sock) as client, Writer([disk.sock], SLOTS) as writer:
        dirtmap("backup", "create", "drive0", repository, *([] if is_cloned else ["--live"]))
        for _ in range(3):
            wait_for(writer, writer.acknowledged + 5)
            assert differences() == []
        write_behind(45)
        assert differences(50) == ([45] if is_cloned else [45, 50])
        dirtmap("checkpoint", "add", "drive0", "mine")
        assert differences() == [45, 50]
        assert "2 differences" in dirtmap("backup", "verify", repository, "drive0", status=2).out
        client.ask(WRITE, 45 * GRANULE, 2 * GRANULE)
        assert differences() == [50]
        left = checkpoints("drive0")
        dirtmap("checkpoint", "remove", "drive0", left[0])
        assert "the checkpoint of the last backup" in error_of("backup", "verify", repository, "drive0")
        assert len(left) == 2


@pytest.mark.parametrize("is_cloned", [True, False])
def test_verifying_reads_no_bits_while_writes_wait(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, is_cloned: bool
) -> None:
    folder: Path = request.getfixturevalue("xfs") if is_cloned else tmp_path
    now, instant, closed = state.since_now, dm.Host.instant, False

    @contextlib.contextmanager
    def noted(self: dm.Host, images: list[dm.Handle]) -> Iterator[Instant]:
        nonlocal closed
        with instant(self, images) as here:
            closed = True
            yield here
            closed = False

    def reads(*arguments: Any, **how: Any) -> dm.Bitmap:
        assert not closed
        return now(*arguments, **how)

    monkeypatch.setattr(dm.Host, "instant", noted)
    monkeypatch.setattr(state, "since_now", reads)
    with Served(folder, "drive0", SIZE), dm.Host() as host:
        create(host, ["drive0"], tmp_path / "repo", live=not is_cloned)
        assert verify_disk(host, tmp_path / "repo", "drive0")[1] == []


def test_where_there_is_no_room_for_a_clone_the_disk_itself_is_verified(
    xfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: dm.Clone) -> None:
        raise dm.StorageError(self.path, os.strerror(errno.ENOSPC), errno.ENOSPC)

    with Served(xfs, "drive0", SIZE) as disk, Client(disk.sock) as client:
        client.ask(WRITE, 5 * GRANULE, GRANULE)
        dirtmap("backup", "create", "drive0", tmp_path / "repo")
        client.ask(WRITE, 7 * GRANULE, GRANULE)
        monkeypatch.setattr(dm.Clone, "take", full)
        dirtmap("backup", "verify", tmp_path / "repo", "drive0")


def test_what_is_at_the_path_of_a_tracked_disk_is_not_taken_for_it(tmp_path: Path) -> None:
    repository = tmp_path / "repo"
    with Served(tmp_path, "drive0", SIZE) as disk:
        dirtmap("backup", "create", "drive0", repository, "--live")
        bitmap = Repository(repository).backups()[0].bitmap
        disk.path.rename(tmp_path / "moved")
        disk.path.write_bytes(bytes(SIZE))
        for arguments in (
            ["backup", "verify", repository, "drive0"],
            ["rebuild", "drive0", bitmap, "--against", repository],
        ):
            assert "is not what its tracker tracks" in error_of(*arguments)
        (tmp_path / "moved").rename(disk.path)
        disk.kill()
        assert "its tracker has died, and others mark" in error_of("backup", "verify", repository, "drive0")
        disk.start("--adopt")
        dirtmap("rebuild", "drive0", bitmap, "--against", repository)
        dirtmap("backup", "verify", repository, "drive0")


@pytest.mark.parametrize("act", ["verify", "create"])
def test_what_is_read_is_what_was_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str) -> None:
    """Another file is at the disk's path after it was checked, and until the disk is read."""
    repository, moved, other = tmp_path / "repo", tmp_path / "moved", tmp_path / "other"
    check, copy, compare = Instant.require_file, creating.copy, comparing.compare
    with Served(tmp_path, "drive0", SIZE) as disk, Client(disk.sock) as client:
        client.ask(WRITE, 5 * GRANULE, GRANULE)
        dirtmap("backup", "create", "drive0", repository, "--live")
        client.ask(WRITE, 7 * GRANULE, GRANULE)
        other.write_bytes(b"other" * (SIZE // 5))
        os.truncate(other, SIZE)

        def checked(self: Instant, image: Namespace, path: str) -> None:
            check(self, image, path)
            disk.path.rename(moved)
            other.rename(disk.path)

        def put_back() -> None:
            disk.path.rename(other)
            moved.rename(disk.path)

        monkeypatch.setattr(Instant, "require_file", checked)
        monkeypatch.setattr(verifying, "compare", lambda *arguments: (put_back(), compare(*arguments)))
        monkeypatch.setattr(creating, "copy", lambda *arguments: (put_back(), copy(*arguments)))
        if act == "verify":
            dirtmap("backup", "verify", repository, "drive0")
        else:
            dirtmap("backup", "create", "drive0", repository, "--live")
            assert restored(repository, "drive0") == disk.path.read_bytes()


def test_what_is_compared_for_a_rebuilding_is_what_was_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another file is at the disk's path when it is opened, and not any more when it is checked."""
    repository, moved, other = tmp_path / "repo", tmp_path / "moved", tmp_path / "other"
    begin, check = state.begin_rebuilding, Instant.require_file
    with Served(tmp_path, "drive0", SIZE) as disk:
        dirtmap("backup", "create", "drive0", repository, "--live")
        bitmap = Repository(repository).backups()[0].bitmap
        other.write_bytes(bytes(SIZE))

        def begun(*arguments: Any, **how: Any) -> bool:
            found = begin(*arguments, **how)
            disk.path.rename(moved)
            other.rename(disk.path)
            return found

        def checked(self: Instant, image: Namespace, path: str) -> None:
            disk.path.rename(other)
            moved.rename(disk.path)
            check(self, image, path)

        monkeypatch.setattr(state, "begin_rebuilding", begun)
        monkeypatch.setattr(Instant, "require_file", checked)
        assert "is not what its tracker tracks" in error_of("rebuild", "drive0", bitmap, "--against", repository)


def test_usage(tmp_path: Path) -> None:
    make_node(tmp_path, MIB)
    create_ = ["backup", "create", "drive0", tmp_path / "repo"]
    assert "--source has to say" in error_of(*create_, "--snapshot", "true")
    assert "goes with no snapshot" in error_of(*create_, "--live", "--source", "s")
    assert "2 --source for 1 target" in error_of(*create_, "--source", "s", "--source", "t")
    assert "Two --source" in error_of(*create_, "--source", "drive0=s", "--source", "drive0=t")
    assert "is not tracked" in error_of(*create_, "--source", "drive0=s")
    with dm.open("drive0") as image, image.track():
        dirtmap(*create_, "--live")
        assert "is the disk itself" in error_of(*create_, "--source", tmp_path / "drive0.raw")
