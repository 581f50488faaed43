"""A bitmap that was lost is rebuilt: what has changed since its backup is dirty, and nothing that is equal."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import qemu
from support.backups import back_up, lose, qcow2_disk, raw_disk, same, write_raw
from support.child import died_of
from support.cli import dirtmap, error_of, json_of, listed, mapped
from support.qemu import qemu_io

import dirtmap.engine as dm
from dirtmap.tools.backup import Backup, comparing, rebuild, rebuilding
from dirtmap.tools.backup.raw import RawSource
from dirtmap.tools.listening.listener import Listener
from dirtmap.tools.serve.serving import serve

GRANULE = 65536
MIB = 1 << 20
NODE = Path("data")


def granules(before: bytes, now: bytes) -> set[int]:
    """The naive model: which granules are not equal."""
    return {at for at in range(0, len(now), GRANULE) if before[at : at + GRANULE] != now[at : at + GRANULE]}


def dirty(target: Path, bitmap: str) -> set[int]:
    return {at for offset, length in mapped(target, bitmap) for at in range(offset, offset + length, GRANULE)}


def content(disk: Path) -> bytes:
    """What a guest reads."""
    if disk.suffix != ".qcow2":
        return disk.read_bytes()
    raw = disk.with_suffix(".copy")
    qemu.qemu_img("convert", "-O", "raw", disk, raw)
    return raw.read_bytes()


def made(folder: Path, kind: str) -> tuple[Path, Path, Backup]:
    """A disk, its target, and its backup."""
    disk = qcow2_disk(folder / "disk.qcow2") if kind == "qcow2" else raw_disk(folder / "data.raw")
    target = disk if kind == "qcow2" else NODE
    return disk, target, back_up(folder / "repo", target)


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_the_next_backup_is_an_increment(tmp_path: Path, kind: str) -> None:
    disk, target, backup = made(tmp_path, kind)
    repository = tmp_path / "repo"
    before = content(disk)
    # Zeros over data, data over zeros, part of a granule, what is there already, the end, and a piece as a whole.
    lose(disk, [(70_000, 99, 0), (12 * MIB, MIB, 1), (20 * MIB, 512, 3), (5 * MIB, 512, before[5 * MIB])])
    lose(disk, [(len(before) - 13, 13, 9)] if kind == "raw" else [(2 * MIB, MIB, 8)])
    now = content(disk)
    told = json_of("rebuild", target, backup.bitmap, "--against", repository)
    expected = granules(before, now)
    assert dirty(target, backup.bitmap) == expected
    assert (told["disk"], told["number"], told["bitmap"]) == (backup.disk, 1, backup.bitmap)
    assert told["differing"] == len(expected) * GRANULE
    assert 0 < told["compared"] < 8 * MIB
    assert told["tracked"] is False
    shown = listed(target)
    assert list(shown) == [backup.bitmap]
    assert shown[backup.bitmap]["recording"]
    if kind == "qcow2":
        qemu.check(disk)
        (bitmap,) = qemu.info(disk)["format-specific"]["data"]["bitmaps"]
        assert (bitmap["name"], bitmap["flags"]) == (backup.bitmap, ["auto"])
        qemu_io(disk, "write -qP 7 22M 512")
    else:
        write_raw(disk, {22 * MIB: b"\7" * 512})
    after = back_up(repository, target)
    assert (after.kind, after.dirty) == ("incremental", (len(expected) + 1) * GRANULE)
    same(repository, after, disk)
    assert "no differences" in dirtmap("backup", "verify", repository, target).out


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_it_is_what_a_naive_comparison_finds(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Over a chain of several backups, of which later ones cover parts of pieces."""
    folder = tmp_path_factory.mktemp("naive")
    offset = st.integers(0, 24 * MIB)
    write = st.tuples(offset, st.sampled_from([1, 4096, 70_000, 2 * MIB]), st.integers(0, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIRTMAP_STORE", str(folder / "store.dmap"))
        patch.setenv("DIRTMAP_INDEX", str(folder / "index"))
        disk, target, backup = made(folder, "raw")
        size = disk.stat().st_size
        for _ in range(data.draw(st.integers(0, 2))):
            writes = data.draw(st.lists(write, max_size=4))
            write_raw(disk, {at: bytes([value]) * min(length, size - at) for at, length, value in writes})
            backup = back_up(folder / "repo", target)
        before = content(disk)
        lost = data.draw(st.lists(write, min_size=1, max_size=5))
        lose(disk, [(at, min(length, size - at), value) for at, length, value in lost])
        with dm.Host() as host:
            rebuild(host, "data", backup.bitmap, folder / "repo")
        assert dirty(target, backup.bitmap) == granules(before, content(disk))


def test_nothing_is_read_where_neither_has_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, _, backup = made(tmp_path, "raw")
    lose(disk, [(12 * MIB, GRANULE, 1)])
    asked: set[int] = set()
    read = RawSource.read

    def noted(self: RawSource, offset: int, length: int) -> int:
        asked.update(range(offset // GRANULE, (offset + length - 1) // GRANULE + 1))
        return read(self, offset, length)

    monkeypatch.setattr(RawSource, "read", noted)
    with dm.Host() as host:
        done = rebuild(host, "data", backup.bitmap, tmp_path / "repo")
    last = (disk.stat().st_size - 1) // GRANULE
    assert asked <= {*range(80, 96), 192, last - 1, last}
    assert done.compared < 2 * MIB


def test_one_that_was_removed_is_made_anew(tmp_path: Path) -> None:
    for kind in ("qcow2", "raw"):
        disk, target, backup = made(tmp_path, kind)
        dirtmap("remove", target, backup.bitmap)
        lose(disk, [(12 * MIB, 1, 1)])
        dirtmap("rebuild", target, backup.bitmap, "--against", tmp_path / "repo")
        assert dirty(target, backup.bitmap) == {12 * MIB}
        assert back_up(tmp_path / "repo", target).kind == "incremental"


def test_other_checkpoints_stay_and_a_later_one_that_is_all_dirty_is_named(tmp_path: Path) -> None:
    disk, _, backup = made(tmp_path, "raw")
    with dm.open("data") as image, image.track() as tracker:
        tracker.checkpoint("mine")
    lose(disk, [(12 * MIB, 1, 1)])
    arguments = ("rebuild", "data", backup.bitmap, "--against", tmp_path / "repo")
    assert "'mine': calls all of the disk dirty" in error_of(*arguments)
    assert "mine" in listed(NODE)
    # One that is exact is no obstacle: here that of another repository.
    dirtmap("checkpoint", "remove", "data", "mine")
    other = back_up(tmp_path / "other", "data")
    lose(disk, [(13 * MIB, 1, 1)])
    dirtmap("rebuild", "data", other.bitmap, "--against", tmp_path / "other")
    assert dirty(NODE, other.bitmap) == {13 * MIB}
    dirtmap(*arguments)
    assert dirty(NODE, backup.bitmap) == {12 * MIB, 13 * MIB}
    assert [back_up(tmp_path / name, "data").dirty // GRANULE for name in ("repo", "other")] == [2, 1]


def test_what_a_later_checkpoint_has_counts_for_an_earlier_one(tmp_path: Path) -> None:
    """Written after the first, and back again after the second: between the two it has changed."""
    disk, _, backup = made(tmp_path, "raw")
    write_raw(disk, {12 * MIB: b"\1"})
    with dm.open("data") as image, image.track() as tracker:
        tracker.checkpoint("second")
    write_raw(disk, {12 * MIB: b"\0"})
    dirtmap("rebuild", "data", backup.bitmap, "--against", tmp_path / "repo")
    assert dirty(NODE, backup.bitmap) == {12 * MIB}


def test_it_is_refused_against_another_backup(tmp_path: Path) -> None:
    disk, repository = qcow2_disk(tmp_path / "disk.qcow2"), tmp_path / "repo"
    first, second = back_up(repository, disk), back_up(repository, disk)
    against = ("--against", repository)
    assert "ended when backup 2 was made" in error_of("rebuild", disk, first.bitmap, *against)
    assert "what changed in between is lost" in error_of("rebuild", disk, second.bitmap, *against, "--at=1")
    dirtmap("add", disk, "own")
    assert "no backup of 'disk.qcow2' at which bitmap 'own' began" in error_of("rebuild", disk, "own", *against)
    elsewhere = back_up(tmp_path / "other", disk)
    assert "at which" in error_of("rebuild", disk, elsewhere.bitmap, *against)
    before = listed(disk)
    raw_disk(tmp_path / "data.raw")
    assert "no backup of 'data'" in error_of("rebuild", "data", second.bitmap, *against)
    assert "neither a regular file" in error_of("rebuild", tmp_path, second.bitmap, *against)
    assert "No such file" in error_of("rebuild", disk, second.bitmap, "--against", tmp_path / "none")
    assert listed(disk) == before
    dirtmap("rebuild", disk, second.bitmap, *against, "--at=2")


def test_a_disk_of_another_size_is_refused(tmp_path: Path) -> None:
    disk, target, backup = made(tmp_path, "qcow2")
    qemu.qemu_img("resize", "-q", disk, "40M")
    assert "had 25165824 at backup 1" in error_of("rebuild", target, backup.bitmap, "--against", tmp_path / "repo")


def during(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Does something once the disk has been read."""

    def compare(*arguments: object) -> None:
        comparing.compare(*arguments)  # type: ignore[arg-type]
        act()

    monkeypatch.setattr(rebuilding, "compare", compare)


def is_of_no_use(target: Path | str, name: str, kind: str) -> bool:
    """Whether nobody can take a lost bitmap for one that has missed nothing: it is gone, or calls all dirty."""
    shown = listed(target)
    return name not in shown if kind == "qcow2" else shown[name]["count"] > 24 * MIB


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_a_disk_that_changes_meanwhile_is_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, target, backup = made(tmp_path, kind)
    lose(disk, [(12 * MIB, 1, 1)])
    with monkeypatch.context() as patch:
        during(patch, lambda: os.utime(disk))
        said = error_of("rebuild", target, backup.bitmap, "--against", tmp_path / "repo")
    assert "was written to" in said
    assert is_of_no_use(target, backup.bitmap, kind)
    # QEMU and serve cannot even open it.
    opened: list[int] = []
    with monkeypatch.context() as patch:
        command = ["qemu-io", "-f", kind, "-c", "write 0 512", str(disk)]
        during(patch, lambda: opened.append(subprocess.run(command, capture_output=True, check=False).returncode))
        dirtmap("rebuild", target, backup.bitmap, "--against", tmp_path / "repo")
    assert opened == [1]
    assert dirty(target, backup.bitmap) == {12 * MIB}


def test_what_qemu_writes_after_the_comparison_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the end of the comparison and the commit anybody may open the image."""
    disk, _, backup = made(tmp_path, "qcow2")
    end = rebuilding.state.end_rebuilding

    def late(*arguments: object, **named: bool) -> None:
        qemu_io(disk, "write -qP 5 9M 512")
        end(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(rebuilding.state, "end_rebuilding", late)
    lose(disk, [(12 * MIB, 1, 1)])
    dirtmap("rebuild", disk, backup.bitmap, "--against", tmp_path / "repo")
    assert dirty(disk, backup.bitmap) == {9 * MIB, 12 * MIB}


@pytest.mark.parametrize("own", [True, False])
def test_a_tracked_disk_may_be_written_to_meanwhile(tmp_path: Path, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a tracker of this process, or of another one."""
    disk, _, backup = made(tmp_path, "raw")
    before = content(disk)
    lose(disk, [(12 * MIB, 1, 1)])
    program = (
        "import os, sys, random, dirtmap.engine as dm\n"
        "chooser = random.Random(7)\n"
        "with dm.open('data') as image, image.track() as tracker:\n"
        "    file = os.open(sys.argv[1], os.O_RDWR)\n"
        "    print('ready', flush=True)\n"
        "    for line in sys.stdin:\n"
        "        for _ in range(int(line)):\n"
        "            at = chooser.randrange(24 << 20)\n"
        "            with tracker.write(at, 1):\n"
        "                os.pwrite(file, bytes([chooser.randrange(256)]), at)\n"
        "        print('done', flush=True)\n"
    )
    if own:
        ended = threading.Event()
        with dm.open("data") as image, image.track() as tracker, open(disk, "r+b", buffering=0) as file:

            def work() -> None:
                chooser = random.Random(7)
                while not ended.wait(0.001):
                    at = chooser.randrange(24 << 20)
                    with tracker.write(at, 1):
                        os.pwrite(file.fileno(), bytes([chooser.randrange(256)]), at)

            worker = threading.Thread(target=work)
            worker.start()
            try:
                told = json_of("rebuild", "data", backup.bitmap, "--against", tmp_path / "repo")
            finally:
                ended.set()
                worker.join()
    else:
        command = [sys.executable, "-c", program, disk]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdin
            assert other.stdout
            assert other.stdout.readline() == "ready\n"

            def write(number: int) -> None:
                print(number, file=other.stdin, flush=True)
                assert other.stdout
                assert other.stdout.readline() == "done\n"

            during(monkeypatch, lambda: write(20))
            told = json_of("rebuild", "data", backup.bitmap, "--against", tmp_path / "repo")
            write(10)
            other.stdin.close()
    assert told["tracked"] is True
    found, changed = dirty(NODE, backup.bitmap), granules(before, content(disk))
    assert changed <= found
    assert 12 * MIB in found
    if not own:
        assert len(found) <= 31  # and not all
    after = back_up(tmp_path / "repo", "data")
    assert after.kind == "incremental"
    same(tmp_path / "repo", after, disk)


def test_a_served_disk_is_rebuilt_while_clients_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, _, backup = made(tmp_path, "raw")
    before = content(disk)
    lose(disk, [(12 * MIB, 1, 1)])
    with dm.Host() as host, serve(host, "data", Listener(unix=str(tmp_path / "sock"))):

        def write(at: int) -> None:
            command = ["qemu-io", "-f", "raw", "-c", f"write -P 5 {at} 512", f"nbd+unix:///?socket={tmp_path}/sock"]
            subprocess.run(command, check=True, capture_output=True)

        write(2 * MIB)
        during(monkeypatch, lambda: write(9 * MIB))
        assert json_of("rebuild", "data", backup.bitmap, "--against", tmp_path / "repo")["tracked"] is True
        write(14 * MIB)
        assert dirty(NODE, backup.bitmap) == granules(before, content(disk))
    assert dirty(NODE, backup.bitmap) == {2 * MIB, 9 * MIB, 12 * MIB, 14 * MIB}


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_killed_in_the_middle_it_has_done_nothing(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, target, backup = made(tmp_path, kind)
    lose(disk, [(12 * MIB, 1, 1)])

    def killed() -> None:
        with pytest.MonkeyPatch.context() as patch, dm.Host() as host:
            during(patch, lambda: os.kill(os.getpid(), signal.SIGKILL))
            rebuild(host, str(target), backup.bitmap, tmp_path / "repo")

    for _ in range(2):
        assert died_of(killed) == signal.SIGKILL
        assert is_of_no_use(target, backup.bitmap, kind)
    assert len([name for name in listed(target) if name != backup.bitmap]) == 1  # has the writes meanwhile
    if kind == "qcow2":
        qemu.check(disk)
    dirtmap("rebuild", target, backup.bitmap, "--against", tmp_path / "repo")
    assert list(listed(target)) == [backup.bitmap]
    assert dirty(target, backup.bitmap) == {12 * MIB}
    # Nor does it harm a bitmap that is right: what it has goes into the next backup.
    assert died_of(killed) == signal.SIGKILL
    after = back_up(tmp_path / "repo", target)
    assert (after.kind, after.dirty) == ("incremental", GRANULE)
    same(tmp_path / "repo", after, disk)


def test_a_damaged_backup_is_no_base(tmp_path: Path) -> None:
    disk, target, backup = made(tmp_path, "raw")
    lose(disk, [(5 * MIB, 1, 1)])
    image = tmp_path / "repo" / f"{backup.id}.qcow2"
    data = bytearray(image.read_bytes())
    at = data.rindex(b"\7" * 4096)
    data[at : at + 4096] = b"\1" * 4096
    image.write_bytes(data)
    assert "damaged" in error_of("rebuild", target, backup.bitmap, "--against", tmp_path / "repo")
    assert listed(NODE)[backup.bitmap]["count"] > 24 * MIB
