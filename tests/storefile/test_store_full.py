"""The disk is full, or fails: an error, the old state, and a store that is as usable as before."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import crash, store_crash
from support.crash import Fault
from support.hostless import stored
from support.store_crash import Judge, contents

import dirtmap.engine as dm
from dirtmap.engine.model import changes
from dirtmap.engine.namespaces.changing import transaction
from dirtmap.engine.namespaces.compact import compact
from dirtmap.engine.namespaces.nodes import add_node
from dirtmap.engine.storefile.file import Store, create
from dirtmap.engine.system import file as fileio
from dirtmap.engine.system.file import File

EFFORT = crash.Effort(pieces=6, most=16, random=16)
SIZE = (64 << 20) + 1536
LEVEL = 512  # bytes


def made(path: Path, folder: Path) -> None:
    """A store with three nodes, used for a while; images in that folder."""
    create(str(path))
    with Store(str(path)) as target:
        for name in "abc":
            image = folder / f"disk {name}"
            image.touch()
            os.truncate(image, SIZE)
            add_node(target, name, str(image))
            with stored(target, name).transaction() as bitmaps:
                changes.add(bitmaps, "b0", 4096)
                scatter(bitmaps["b0"], 1)


def scatter(bitmap: dm.Bitmap, seed: int) -> None:
    rng = random.Random(seed)
    bitmap.mark_many([rng.randrange(SIZE) for _ in range(400)], [1] * 400)


def change(path: Path) -> None:
    """Changes of several nodes, with more clusters than are free."""
    with Store(str(path)) as target, transaction(target) as namespaces:
        for name, granularity in (("a", 512), ("b", 4096), ("c", 1024)):
            if "b1" in namespaces[name]:
                changes.remove(namespaces[name], "b1")
            changes.add(namespaces[name], "b1", granularity)
            scatter(namespaces[name]["b1"], 2)
            scatter(namespaces[name]["b0"], 3)


def compacting(path: Path) -> None:
    compact(str(path))


OPERATIONS = {"change": change, "compact": compacting}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    path = tmp_path / "stores" / "store"
    path.parent.mkdir()
    made(path, folder)
    return path


def require_old(path: Path, before: bytes) -> None:
    """The old state, sound, and nothing else in the folder."""
    assert contents(path.read_bytes()) == contents(before)
    report = dm.check(str(path))
    assert (report.corruptions, report.leaks, report.check_errors) == (0, 0, 0)
    assert os.listdir(path.parent) == [path.name]


def fails(operate: Callable[[Path], None], path: Path, message: str) -> bool:
    """Whether the operation ends with that error."""
    try:
        operate(path)
    except dm.StorageError as error:
        if message not in str(error):
            raise
        return True
    return False


@contextlib.contextmanager
def files_up_to(limit: int) -> Iterator[None]:
    """While active, no file gets longer than that, in bytes; what still fits is written."""

    class Small(File):
        def write(self, offset: int, data: bytes | memoryview) -> None:
            fits = max(limit - offset, 0)
            super().write(offset, memoryview(data)[:fits])
            if len(data) > fits:
                raise self._failed("write", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    with fileio.using(Small):
        yield


@pytest.mark.parametrize("name", OPERATIONS)
def test_files_that_must_not_grow(name: str, path: Path) -> None:
    operate = OPERATIONS[name]
    before = path.read_bytes()
    operate(path)
    after = contents(path.read_bytes())
    first = 0 if operate is compacting else len(before)
    levels = range(first, path.stat().st_size, LEVEL if operate is change else 4 * LEVEL)
    assert len(levels) > 30
    for limit in levels:
        path.write_bytes(before)
        with files_up_to(limit), pytest.raises(dm.StorageError, match="No space left on device"):
            operate(path)
        require_old(path, before)
        operate(path)
        assert contents(path.read_bytes()) == after
        assert dm.check(str(path)).findings == []


def test_no_room_for_a_new_store(tmp_path: Path) -> None:
    path = tmp_path / "store"
    for limit in range(0, 6 * 4096, LEVEL):
        with files_up_to(limit), pytest.raises(dm.StorageError, match="No space left on device"):
            create(str(path))
        assert not path.exists()
    create(str(path))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 384 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=384k", "tmpfs", folder]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("only root may mount a file system, and not everywhere")
    yield folder
    subprocess.run(["umount", folder], check=True)


def free(folder: Path) -> int:
    """Clusters of 4 KiB."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize // 4096


@pytest.mark.parametrize("name", OPERATIONS)
def test_full_file_system(name: str, disk: Path, tmp_path: Path) -> None:
    operate = OPERATIONS[name]
    path = disk / "store"
    made(path, tmp_path)
    before = path.read_bytes()
    operate(path)
    after = contents(path.read_bytes())
    path.write_bytes(before)
    filler = disk / "filler"
    outcomes = []
    for left in range(free(disk)):
        path.write_bytes(before)
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 4096 * (free(disk) - left))
        assert free(disk) == left
        outcomes.append(fails(operate, path, "No space left on device"))
        filler.unlink()
        if outcomes[-1]:
            require_old(path, before)
            operate(path)
        assert contents(path.read_bytes()) == after
        assert dm.check(str(path)).findings == []
    assert outcomes == sorted(outcomes, reverse=True), "more room never hurts"
    assert set(outcomes) == {True, False}


@pytest.mark.parametrize("copies", [(), (0, 3)], ids=["sound", "mending"])
def test_failed_write_or_sync(copies: tuple[int, ...], path: Path) -> None:
    """Whatever fails, every state that a crash then leaves is old or new."""
    data = bytearray(path.read_bytes())
    store_crash.damage(data, *copies)
    path.write_bytes(data)
    good = crash.record(path, change)
    judge = Judge(good)
    writes = [step for epoch in good.epochs for step in epoch]
    faults = [Fault("sync", number) for number in range(len(good.epochs))]
    for number, step in enumerate(writes):
        assert isinstance(step, crash.Write)
        faults += [Fault("write", number, done) for done in {0, min(len(step.data), 512), len(step.data) // 2}]
    for fault in faults:
        path.write_bytes(data)

        def operate(path: Path) -> None:
            with pytest.raises(dm.StorageError, match="injected"):
                change(path)

        recording = crash.record(path, operate, fault=fault)
        crash.explore(store_crash.shredded(recording), judge, EFFORT)
        judge(bytearray(path.read_bytes()))
        # Before the header's first copy is written, an error means the old state; after that, either.
        if fault.action == "write" and fault.number < len(writes) - 2:
            assert contents(path.read_bytes()) == judge.old
        change(path)
        assert contents(path.read_bytes()) == judge.new


def failing(number: int) -> Callable[[int], None]:
    """A sync that fails when it is called for that time."""
    calls = iter(range(number + 1))

    def fdatasync(fd: int) -> None:
        if next(calls, None) == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    return fdatasync


@pytest.mark.parametrize("name", OPERATIONS)
def test_input_output_error_of_each_sync(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operate = OPERATIONS[name]
    before = path.read_bytes()
    operate(path)
    after = contents(path.read_bytes())
    number = 0
    while True:
        path.write_bytes(before)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", failing(number))
            if not fails(operate, path, "sync: Input/output error"):
                break
        assert contents(path.read_bytes()) in (contents(before), after)
        assert os.listdir(path.parent) == [path.name]
        operate(path)
        assert contents(path.read_bytes()) == after
        assert dm.check(str(path)).findings == []
        number += 1
    assert number == {"change": 3, "compact": 6}[name]


def test_a_handle_is_poisoned_by_a_failed_sync(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel would call the next sync a success."""
    before = path.read_bytes()
    with fileio.open_file(str(path), writable=True) as file:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", failing(0))
            with pytest.raises(dm.StorageError, match="sync: Input/output error"):
                file.sync()
        for act in (lambda: file.write(0, b"x"), lambda: file.truncate(0), file.sync):
            with pytest.raises(dm.StorageError, match="not used any more after a failed sync"):
                act()
    assert path.read_bytes() == before


def test_a_change_ends_with_the_first_failed_sync(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens afterwards, nothing more is written through that handle."""
    steps: list[str] = []

    class Watched(File):
        def write(self, offset: int, data: bytes | memoryview) -> None:
            steps.append("write")
            super().write(offset, data)

        def sync(self) -> None:
            steps.append("sync")
            super().sync()

    for number in range(3):
        steps.clear()
        with fileio.using(Watched), monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", failing(number))
            with pytest.raises(dm.StorageError, match="sync"):
                change(path)
        assert steps.count("sync") == number + 1
        assert steps[-1] == "sync"
