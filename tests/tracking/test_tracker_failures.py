"""One failure at a time: what a tracker that was interrupted, killed, forked or refused by its disk still keeps."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.failing import COUNT, SIZE, killed, node_with_live_files
from support.tracking import GRANULE, lost, model_of

import dirtmap.engine as dm
from dirtmap.engine.session.intent import IntentLog
from dirtmap.engine.system import file as fileio
from dirtmap.engine.tracking.arena import Arena
from dirtmap.engine.tracking.recorder import Recorder
from dirtmap.engine.tracking.tracker import Tracker
from dirtmap.fmt.errors import Error
from dirtmap.fmt.structures.live import CONTROL


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return node_with_live_files(tmp_path, monkeypatch)


@pytest.fixture
def image(folder: Path) -> Iterator[dm.Namespace]:
    with dm.open("node:drive0") as opened:
        yield opened


def after_power_loss(folder: Path, work: Callable[[Tracker], object]) -> dm.Namespace:
    """The image, not recovered, after a tracker that did some work and lost its power."""
    killed(work)
    shutil.rmtree(folder / "live")
    return dm.open("node:drive0")


@pytest.mark.parametrize("cut", [False, True])
def test_what_was_written_during_a_backup_and_saved_is_there_after_the_backup_and_a_power_loss(
    folder: Path, cut: bool
) -> None:
    def work(tracker: Tracker) -> None:
        tracker.mark(0, 1)
        tracker.take("b0")
        tracker.mark(40 << 20, 1)
        tracker.save()
        if cut:
            tracker.checkpoint("between")
        tracker.drop("b0")

    with after_power_loss(folder, work) as image:
        assert np.flatnonzero(model_of(image["b0"])).tolist() == [(40 << 20) // GRANULE]


def test_a_save_between_the_swap_and_the_commit_of_a_cut_takes_nothing_from_it(folder: Path) -> None:
    def work(tracker: Tracker) -> None:
        ticket = tracker.begin(0, 1)
        cut = threading.Thread(target=lambda: tracker.checkpoint("monday"))
        cut.start()
        while tracker._kernel.interval == 0:
            time.sleep(0)
        tracker.mark(40 << 20, 1)  # of the new interval
        tracker.save()
        tracker.save()
        assert tracker.bitmap("b0").count  # nor does a reader wait
        tracker.end(ticket)
        cut.join(60)

    with after_power_loss(folder, work) as image:
        assert model_of(image["monday"])[(40 << 20) // GRANULE]
        assert model_of(image["b0"])[[0, (40 << 20) // GRANULE]].all()


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (np.uint16(60000), np.uint16(10000)),
        (65535, np.uint16(65535)),
        (np.uint8(200), np.uint8(200)),
        (np.int32(65535), np.int32(70000)),
        (np.uint32(65535), 2),
        (np.uint64(65535), np.uint64(3)),
        (np.int64(131072), np.int8(5)),
        (np.int8(5), 65536),
    ],
)
def test_integers_of_numpy_mark_what_integers_mark(image: dm.Namespace, offset: Any, length: Any) -> None:
    with image.track(save_interval=0) as tracker:
        tracker.mark(8 * GRANULE, 1)  # now the region is known
        tracker.clear("b0")
        tracker.mark(offset, length)
        expected = dm.Bitmap(SIZE)
        expected.mark(int(offset), int(length))
        assert tracker.bitmap("b0").packed() == expected.packed()


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (np.int32(65535), np.int32(2**31 - 1)),
        (np.uint32(65535), np.uint32(2**32 - 60000)),
        (10, np.int64(2**63 - 1)),
        (np.uint64(10), np.uint64(2**64 - 5)),
        (np.int16(-5), 2),
        (np.int8(-1), 1),
    ],
)
def test_integers_of_numpy_outside_the_disk_are_refused(image: dm.Namespace, offset: Any, length: Any) -> None:
    with image.track(save_interval=0) as tracker:
        tracker.mark(8 * GRANULE, 1)
        tracker.clear("b0")
        with pytest.raises(ValueError, match="not inside a disk"):
            tracker.mark(offset, length)
        assert tracker.bitmap("b0").count == 0


def test_a_cut_that_was_interrupted_while_it_waited_leaves_its_writes_to_the_next(image: dm.Namespace) -> None:
    def alarm(*_: object) -> None:
        raise TimeoutError

    with image.track(save_interval=0) as tracker:
        ticket = tracker.begin(0, 1)
        before = signal.signal(signal.SIGALRM, alarm)
        try:
            for _ in range(2):
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                with pytest.raises(TimeoutError):
                    tracker.take("b0")
            tracker.save()
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(TimeoutError):
                tracker.take("b0")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        tracker.mark(GRANULE, 1)
        tracker.end(ticket)
        assert np.flatnonzero(model_of(tracker.take("b0"))).tolist() == [0, 1]


def test_a_cut_inside_a_write_of_the_same_thread_is_refused(image: dm.Namespace) -> None:
    with image.track(save_interval=0) as tracker:
        with tracker.write(0, 1), pytest.raises(dm.BitmapError, match="wait for itself"):
            tracker.checkpoint("monday")
        write = tracker.write(GRANULE, 1)
        with write, pytest.raises(dm.BitmapError, match="begun once"), write:
            pass
        tracker.checkpoint("monday")
        assert tracker.checkpoints() == ["monday"]


def test_no_mark_returns_that_the_last_save_has_not(folder: Path) -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for number in range(20):
            returned = np.zeros(COUNT, np.uint8)

            def work(tracker: Tracker, returned: Any, seed: int) -> None:
                at = seed
                try:
                    while True:
                        at = (at * 1103515245 + 12345) % COUNT
                        tracker.end(tracker.begin(at * GRANULE, 1))
                        returned[at] = 1
                except Error:
                    pass

            with dm.open("node:drive0") as image:
                tracker = image.track(save_interval=0, region_size=1 << 20)
                threads = [threading.Thread(target=work, args=(tracker, returned, number + i)) for i in range(4)]
                for thread in threads:
                    thread.start()
                time.sleep(0.002)
                tracker.close()
                for thread in threads:
                    thread.join()
                assert not lost(returned, image["b0"])
                with image.transaction() as bitmaps:
                    bitmaps["b0"] = dm.Bitmap(SIZE)
    finally:
        sys.setswitchinterval(before)


def test_a_mark_looks_for_the_end_behind_its_first_step(image: dm.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end comes in the middle of a mark, where it logs its region."""
    tracker = image.track(save_interval=0)
    real = tracker._kernel._sync
    calls: dict[str, Callable[[], object]] = {
        "begin": lambda: tracker.begin(0, 1),
        "mark": lambda: tracker.mark(0, 1),
        "many": lambda: tracker.mark_many([0], [1]),
    }

    def ended() -> None:
        real()
        tracker._kernel.fail(dm.StorageError("x", "the tracker is closed"))

    monkeypatch.setattr(tracker._kernel, "_sync", ended)
    for call in calls.values():
        with pytest.raises(dm.StorageError, match="closed"):
            call()
    with pytest.raises(dm.StorageError, match="closed"):
        tracker.close()
    assert image["b0"].count == 0


def test_a_forked_child_can_close_and_says_nothing_in_the_parents_name(image: dm.Namespace) -> None:
    with image.track(save_interval=0) as tracker:
        ready = threading.Event()

        def hold() -> None:
            with tracker._lock, tracker._cuts, tracker._spare_guard, tracker._kernel.guard:
                ready.set()
                time.sleep(0.2)

        holder = threading.Thread(target=hold)
        holder.start()
        ready.wait(60)
        write = tracker.write(0, 1)
        with write:
            control = Path(tracker._kernel.folder) / "control"
            fields = control.read_bytes()
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    signal.alarm(20)
                    write.__exit__(None, None, None)
                    for act in (lambda: tracker.begin(0, 1), lambda: tracker.mark(0, 1), lambda: tracker.save()):
                        with pytest.raises(Error, match="forked"):
                            act()  # type: ignore[no-untyped-call]
                    tracker.close()
                    status = 0
                finally:
                    os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            beat = CONTROL.field("heartbeat").offset
            now = control.read_bytes()
            assert now[:beat] + now[beat + 8 :] == fields[:beat] + fields[beat + 8 :]
        holder.join()


class SlowSync(fileio.File):
    """A disk that takes its time with the store's syncs."""

    def sync(self) -> None:
        if self.path.endswith(".dmap"):
            time.sleep(0.4)
        super().sync()


def test_a_tracker_that_dies_in_a_slow_save_was_alive(folder: Path) -> None:
    ready = mmap.mmap(-1, 1)
    pid = os.fork()
    if pid == 0:
        try:
            with fileio.using(SlowSync):
                tracker = dm.open("node:drive0").track(save_interval=0.5)
                fd = os.open(folder / "drive0.raw", os.O_WRONLY)
                for number in range(1000):
                    tracker.mark(number * 512, 512)
                    os.pwrite(fd, b"x", number * 512)
                    ready[0] = max(ready[0], tracker._session.log > 0)
                    time.sleep(0.01)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 60
    while not ready[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(1.3)  # in the middle of the next save, with its three syncs
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with dm.open("node:drive0") as image:
        assert {item.how.partition(":")[0] for item in image.recover()} == {"exact"}


def test_what_fails_in_the_background_does_not_keep_saves_from_theirs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise dm.StorageError("tmpfs", "No space left on device")

    with dm.open("node:drive0") as image, image.track(save_interval=0.3) as tracker:
        tracker.checkpoint("monday")
        monkeypatch.setattr(Arena, "prepare", full)
        monkeypatch.setattr(Recorder, "_beat", full)
        tracker.mark(0, 1)
        deadline = time.monotonic() + 60
        while (tracker._kernel.logged or tracker._frozen) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not tracker._kernel.logged
        assert not tracker._frozen
        monkeypatch.undo()


def test_a_sign_of_life_on_disk_and_a_mark_sync_one_after_the_other(
    image: dm.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells of a failed write once: to the sync of whoever comes first."""
    inside = [0]
    together = [0]

    def slowly(real: Callable[..., None]) -> Callable[..., None]:
        def act(*args: Any) -> None:
            inside[0] += 1
            together[0] = max(together[0], inside[0])
            time.sleep(0.02)
            real(*args)
            inside[0] -= 1

        return act

    monkeypatch.setattr(IntentLog, "sync", slowly(IntentLog.sync))
    monkeypatch.setattr(IntentLog, "beat", slowly(IntentLog.beat))
    with image.track(save_interval=0, region_size=1 << 20) as tracker:
        beats = threading.Thread(target=lambda: [tracker._beat(0) for _ in range(20)])
        beats.start()
        for region in range(20):
            tracker.mark(region << 20, 1)
        beats.join()
    assert together[0] == 1


def test_a_tracker_that_refuses_gathers_no_tracebacks(image: dm.Namespace) -> None:
    tracker = image.track(save_interval=0)
    tracker.close()
    for call in (lambda: tracker.mark(0, 1), lambda: tracker.begin(0, 1), tracker.save):
        found = []
        for _ in range(3):
            with pytest.raises(dm.StorageError, match="closed") as caught:
                call()
            depth, traceback = 0, caught.value.__traceback__
            while traceback:
                depth, traceback = depth + 1, traceback.tb_next
            found.append(depth)
        assert len(set(found)) == 1


class FailingCommit(fileio.File):
    """A disk that fails at the last write of a store's commit: the commit is durable all the same."""

    failing = False
    writes = 0

    def write(self, offset: int, data: bytes | memoryview) -> None:
        header = self.path.endswith(".dmap") and offset < 4 * 4096
        if FailingCommit.failing and header:
            FailingCommit.writes += 1
            if FailingCommit.writes == 2:
                FailingCommit.failing = False
                raise dm.StorageError(self.path, "write: No space left on device")
        super().write(offset, data)


def fail_next_commit() -> None:
    FailingCommit.failing, FailingCommit.writes = True, 0


def test_a_backup_that_ends_after_a_save_that_was_durable_and_failed(folder: Path) -> None:
    def work(tracker: Tracker) -> None:
        tracker.take("b0")
        tracker.mark(5 * GRANULE, 1)
        tracker.checkpoint("between")
        fail_next_commit()
        with contextlib.suppress(Error):
            tracker.save()
        assert not FailingCommit.failing
        tracker.drop("b0")

    for live_files in (True, False):
        with fileio.using(FailingCommit):
            killed(work)
        if not live_files:
            shutil.rmtree(folder / "live")
        with dm.open("node:drive0") as image:
            assert 5 in np.flatnonzero(model_of(image["b0"]))
            image.recover()
            with image.transaction() as bitmaps:
                del bitmaps["between"]


def test_a_session_whose_first_commit_was_durable_and_failed(folder: Path) -> None:
    with dm.open("node:drive0") as image, image.transaction() as bitmaps:
        bitmaps["b0"] = dm.Bitmap.from_extents(SIZE, [0], [1])
    with fileio.using(FailingCommit), dm.open("node:drive0") as image:
        fail_next_commit()
        with pytest.raises(dm.StorageError):
            image.track()
        assert {item.how.partition(":")[0] for item in image.recover()} <= {"exact"}
        assert np.flatnonzero(model_of(image["b0"])).tolist() == [0]
        with image.track() as tracker:
            tracker.mark(GRANULE, 1)
        assert np.flatnonzero(model_of(image["b0"])).tolist() == [0, 1]


def test_a_cut_that_waits_ends_with_the_tracker(image: dm.Namespace) -> None:
    tracker = image.track(save_interval=0)
    ticket = tracker.begin(0, 1)
    failed: list[Error] = []

    def cut() -> None:
        try:
            tracker.checkpoint("monday")
        except Error as error:
            failed.append(error)

    thread = threading.Thread(target=cut)
    thread.start()
    while tracker._kernel.interval == 0:
        time.sleep(0)
    tracker.close()
    thread.join(30)
    assert not thread.is_alive()
    assert "closed" in str(failed[0])
    tracker.end(ticket)
    assert np.flatnonzero(model_of(image["b0"])).tolist() == [0]
    assert list(image) == ["b0", "taken"]


def test_close_in_a_signal_handler_in_the_middle_of_a_save(
    image: dm.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = image.track(save_interval=0.3)

    def close(*_: object) -> None:
        tracker.close()

    before = signal.signal(signal.SIGALRM, close)
    began = time.monotonic()
    try:
        tracker.mark(0, 1)
        with fileio.using(SlowSync), contextlib.suppress(Error):
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            while True:
                tracker.save()
                tracker.mark(GRANULE, 1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < 60
    image.recover()
    assert 0 in np.flatnonzero(model_of(image["b0"]))


def test_a_save_in_the_background_that_failed_is_tried_again(
    image: dm.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = [True]

    class Full(fileio.File):
        def write(self, offset: int, data: bytes | memoryview) -> None:
            if failing[0] and self.path.endswith(".dmap"):
                raise dm.StorageError(self.path, "write: No space left on device")
            super().write(offset, data)

    with image.track(save_interval=0.2) as tracker, fileio.using(Full):
        tracker.mark(0, 1)
        deadline = time.monotonic() + 30
        while tracker.last_error is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(1)
        assert "No space left" in str(tracker.last_error)
        failing[0] = False
        while tracker.last_error is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert tracker._is_log_saved()


def test_a_bitmap_that_could_not_be_taken_is_not(image: dm.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    with image.track(save_interval=0) as tracker:
        tracker.mark(0, 1)

        def fail(*_: object) -> None:
            raise dm.StorageError("x", "read: Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(tracker._home, "read", fail)
            with pytest.raises(dm.StorageError, match="Input"):
                tracker.take("b0")
        assert np.flatnonzero(model_of(tracker.take("b0"))).tolist() == [0]


def test_a_ticket_ends_its_own_write_only(image: dm.Namespace) -> None:
    with image.track(save_interval=0) as tracker:
        ticket = tracker.begin(0, 1)
        tracker.end(ticket)
        other = tracker.begin(0, 1)
        tracker.end(ticket)
        assert tracker._kernel.in_flight == 1
        tracker.end(other)
        assert tracker._kernel.in_flight == 0
