"""What others write to an image while nobody tracks it, or behind a dead tracker's back, and how that is noticed."""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.tracking import GRANULE, make_node, model_of

import dirtmap.engine as dm
from dirtmap.engine import identity
from dirtmap.engine.identity import identity_of, lasting_identity
from dirtmap.engine.session import verdict, view
from dirtmap.engine.system import process
from dirtmap.engine.tracking import kernel
from dirtmap.engine.tracking.tracker import Tracker
from dirtmap.fmt.errors import StorageError

SIZE = 8 << 20
HOUR = 3600 * 10**9


def died(folder: Path, work: Callable[[Tracker, Path], object], before: Callable[[], object] | None = None) -> Path:
    """An image whose tracker did some work and was killed; returns its path."""
    path = make_node(folder, SIZE)
    pid = os.fork()
    if pid == 0:
        try:
            if before:
                before()
            tracker = dm.open("node:drive0").track(save_interval=0, region_size=1 << 20)
            work(tracker, path)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    return path


def written(tracker: Tracker, path: Path) -> None:
    with path.open("r+b") as file, tracker.write(0, GRANULE):
        file.write(b"x")
        file.flush()


def marked(tracker: Tracker, path: Path) -> None:
    with path.open("r+b") as file:
        tracker.mark(0, GRANULE)
        file.write(b"x")


def overwrite(path: Path, data: bytes = b"others") -> None:
    with path.open("r+b") as file:
        file.seek(5 * GRANULE)
        file.write(data)


def put_back(path: Path, status: os.stat_result) -> None:
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def how() -> str:
    with dm.open("node:drive0") as image:
        return str(image.tracking().how)


# A time that is put back


@pytest.mark.parametrize("work", [written, marked])
@pytest.mark.parametrize("lost", [False, True])
def test_a_write_whose_time_is_put_back_is_noticed(
    tmp_path: Path, work: Callable[[Tracker, Path], object], lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = died(tmp_path, work)
    if lost:
        monkeypatch.setattr(view, "DURABLE_TOLERANCE_SECONDS", 0.1)
        with dm.open("node:drive0") as image:
            shutil.rmtree(image.tracking().live)
    assert how().startswith("logged regions" if lost else "exact")
    time.sleep(0.6)
    before = os.stat(path)
    overwrite(path)
    put_back(path, before)
    assert identity_of(str(path)).mtime_ns == before.st_mtime_ns
    assert how() == "all dirty: the image has changed while nobody tracked it"
    with dm.open("node:drive0") as image:
        image.recover()
        assert model_of(image["b0"]).all()


@pytest.mark.parametrize("program", [["touch", "-r"], ["cp", "-p", "--no-preserve=xattr"]])
def test_programs_that_put_a_time_back_are_noticed(tmp_path: Path, program: list[str]) -> None:
    path = died(tmp_path, lambda tracker, path: None)
    other = tmp_path / "other"
    shutil.copy2(path, other)
    assert how().startswith("exact")
    time.sleep(0.05)
    overwrite(other if program[0] == "cp" else path)
    put_back(other, os.stat(path) if program[0] == "cp" else os.stat(other))
    subprocess.run([*program, other, path], check=True)
    assert os.stat(path).st_mtime_ns == os.stat(other).st_mtime_ns
    assert how().startswith("all dirty")


def test_a_write_whose_time_is_put_back_is_noticed_where_nobody_has_tracked(tmp_path: Path) -> None:
    path = make_node(tmp_path, SIZE)
    before = os.stat(path)
    time.sleep(0.05)
    overwrite(path)
    put_back(path, before)
    with dm.open("node:drive0") as image:
        assert model_of(image["b0"]).all()


def test_a_write_before_tracking_whose_time_is_put_back_is_noticed(tmp_path: Path) -> None:
    path = make_node(tmp_path, SIZE)
    before = os.stat(path)
    time.sleep(0.05)
    overwrite(path)
    put_back(path, before)
    with dm.open("node:drive0") as image, image.track() as tracker:
        assert model_of(tracker.bitmap("b0")).all()


def test_a_sign_of_life_is_given_where_only_the_time_of_the_last_change_tells(tmp_path: Path) -> None:
    path = make_node(tmp_path, SIZE)
    with dm.open("node:drive0") as image, image.track(save_interval=0) as tracker:
        seen = tracker._beat(0)
        assert tracker._beat(seen) == seen
        before = os.stat(path)
        time.sleep(0.05)
        overwrite(path)
        put_back(path, before)
        assert tracker._beat(seen) > seen


# A page that was dirty already


def mapped(path: Path) -> mmap.mmap:
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), SIZE)


@pytest.fixture
def mappings(tmp_path: Path) -> None:
    """Skips where a write through a mapping to a clean page does not change the file's time, as on a tmpfs."""
    path = tmp_path / "tried"
    path.write_bytes(bytes(SIZE))
    with mapped(path) as memory:
        memory.flush()
        before = os.stat(path).st_mtime_ns
        time.sleep(0.05)
        memory[0] = 1
        if os.stat(path).st_mtime_ns == before:
            pytest.skip("this file system notices no write to a mapping")


@pytest.mark.usefixtures("mappings")
def test_a_write_to_a_page_that_was_dirty_when_the_identity_was_taken_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(SIZE))
    with mapped(path) as memory:
        memory[0] = 1
        found = lasting_identity(str(path))
        time.sleep(0.05)
        memory[0] = 2
        assert identity_of(str(path)) != found


@pytest.mark.usefixtures("mappings")
def test_a_bitmap_that_is_changed_while_a_page_is_dirty_gets_what_is_written_to_it_next(tmp_path: Path) -> None:
    path = make_node(tmp_path, SIZE)
    with mapped(path) as memory:
        memory[0] = 1
        with dm.open("node:drive0") as image, image.transaction() as bitmaps:
            bitmaps["b0"].clear(0, SIZE)
        with dm.open("node:drive0") as image:
            assert not model_of(image["b0"]).any()
        time.sleep(0.05)
        memory[0] = 2
        with dm.open("node:drive0") as image:
            assert model_of(image["b0"]).all()


def test_an_image_that_is_written_to_without_pause_has_no_lasting_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, times = tmp_path / "image", []

    def written_to(*times_ns: int) -> None:
        times.append(times_ns)
        os.utime(path, ns=(0, 10**9 * len(times)))

    path.write_bytes(bytes(512))
    monkeypatch.setattr(identity, "_wait_out", written_to)
    with pytest.raises(StorageError, match="without pause"):
        lasting_identity(str(path))
    assert len(times) == identity._ROUNDS


# A clock that is set


def ahead() -> None:
    """In a child: a clock that is an hour ahead."""
    real = time.time_ns
    time.time_ns = lambda: real() + HOUR


@pytest.mark.parametrize("work", [written, marked])
def test_a_write_after_a_clock_that_was_ahead_was_set_right_is_noticed(
    tmp_path: Path, work: Callable[[Tracker, Path], object]
) -> None:
    path = died(tmp_path, work, ahead)
    overwrite(path)
    assert how().startswith("all dirty: the clock was set back")
    with dm.open("node:drive0") as image:
        image.recover()
        assert model_of(image["b0"]).all()


def test_after_a_power_loss_too(tmp_path: Path) -> None:
    path = died(tmp_path, written, ahead)
    with dm.open("node:drive0") as image:
        shutil.rmtree(image.tracking().live)
    overwrite(path)
    assert how().startswith("all dirty: the clock was set back")


def test_a_clock_that_was_set_forward_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    died(tmp_path, written)
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + HOUR)
    assert how().startswith("exact")


def test_an_image_that_was_not_written_to_is_right_whatever_the_clock(tmp_path: Path) -> None:
    died(tmp_path, lambda tracker, path: None, ahead)
    assert how().startswith("exact")


def test_a_tracker_whose_clock_is_set_back_takes_its_times_from_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "HEARTBEAT_SECONDS", 0.02)
    make_node(tmp_path, SIZE)
    real, lead = time.time_ns, [HOUR]
    monkeypatch.setattr(time, "time_ns", lambda: real() + lead[0])
    with dm.open("node:drive0") as image, image.track(save_interval=0) as tracker:
        with tracker.write(0, 1):
            pass
        fields = tracker._kernel.fields
        for step in (0, HOUR, -HOUR, 0):
            lead[0] = step
            deadline = time.monotonic() + 5
            while abs(fields[kernel.CLOCK] - process.clock_offset()) > process.CLOCK_TOLERANCE_NS:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert fields[kernel.EVENT] <= time.time_ns()
            assert abs(fields[kernel.HEARTBEAT] - time.time_ns()) < 10**9


def test_the_offset_of_the_clock_stays_as_it_is() -> None:
    first = process.clock_offset()
    for _ in range(200):
        assert abs(process.clock_offset() - first) < process.CLOCK_TOLERANCE_NS
