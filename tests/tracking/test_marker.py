"""Marks from other processes than the tracker's: markers that die, trackers that die, and the gate."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.devices import DEVICE, NODE, make, qcow2, raw_here
from support.tracking import GRANULE, make_node, model_of, wait_for_beat

import dirtmap.engine as dm
from dirtmap.engine.session import livefile
from dirtmap.engine.storefile.file import Store
from dirtmap.engine.storefile.session import session_of
from dirtmap.engine.system import file as fileio
from dirtmap.fmt import live
from dirtmap.fmt.errors import GoneError

SIZE = 64 << 20
REGION = 1 << 20


def dirty(bitmap: dm.Bitmap) -> list[int]:
    return np.flatnonzero(model_of(bitmap)).tolist()  # type: ignore[no-any-return]


class Process:
    """A child that does something, says so, and waits until it is killed or let go on to its end."""

    def __init__(self, act: Callable[[Callable[[], None]], object]) -> None:
        self._map = mmap.mmap(-1, 8)
        self._words = (ctypes.c_uint32 * 2).from_buffer(self._map)
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                signal.alarm(60)
                act(self._stop)
                status = 0
            finally:
                os._exit(status)

    def _stop(self) -> None:
        self._words[0] += 1
        turn = self._words[0]
        while self._words[1] < turn:
            time.sleep(0.001)

    def reached(self, turn: int = 1) -> None:
        """Waits until it has stopped so many times."""
        while self._words[0] < turn:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            assert not done, status
            time.sleep(0.001)

    def go_on(self) -> None:
        self._words[1] += 1

    def ends(self) -> None:
        self.go_on()
        assert os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) == 0

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[dm.Handle]:
    make_node(tmp_path, SIZE)
    with dm.open("node:drive0") as opened:
        yield opened


def folder_of(tracker: dm.Tracker) -> str:
    return tracker.live


def test_another_process_marks_and_the_tracker_sees_it_at_once(node: dm.Handle) -> None:
    with node.track(save_interval=0) as tracker:

        def act(stop: Callable[[], None]) -> None:
            with dm.Marker(folder_of(tracker)) as marker:
                assert marker.size == SIZE
                marker.mark(0, 1)
                marker.mark_many([3 * GRANULE, 5 * GRANULE], [1, 0])
                with marker.write(7 * GRANULE, GRANULE + 1):
                    stop()
                stop()
                marker.mark(9 * GRANULE, 1)  # in the interval of a cut of which it was told nothing

        process = Process(act)
        process.reached()
        assert dirty(tracker.bitmap("b0")) == [0, 3, 7, 8]
        assert tracker._kernel.in_flight == 1
        process.go_on()
        process.reached(2)
        assert tracker._kernel.in_flight == 0
        tracker.checkpoint("monday")
        process.ends()
        assert dirty(tracker.changed_since("monday")) == [9]
        with pytest.raises(ValueError, match="not inside a disk"), dm.Marker(folder_of(tracker)) as marker:
            marker.begin(SIZE, 1)
    assert dirty(node["b0"]) == [0, 3, 7, 8, 9]


def test_a_cut_waits_for_the_writes_of_other_processes(node: dm.Handle) -> None:
    with node.track(save_interval=0) as tracker:

        def act(stop: Callable[[], None]) -> None:
            with dm.Marker(folder_of(tracker)) as marker, marker.write(0, 1):
                stop()

        process, done = Process(act), threading.Event()
        process.reached()
        thread = threading.Thread(target=lambda: (tracker.checkpoint("monday"), done.set()))
        thread.start()
        assert not done.wait(0.2)
        process.ends()
        assert done.wait(60)
        thread.join()
        assert dirty(tracker.changed_since("monday")) == []


def test_what_a_killed_marker_had_in_flight_is_dirty_in_the_next_interval_too(node: dm.Handle) -> None:
    with node.track(save_interval=0) as tracker:

        def act(stop: Callable[[], None]) -> None:
            marker = dm.Marker(folder_of(tracker))
            marker.mark(0, 1)
            marker.end(marker.begin(GRANULE, 1))
            tickets = marker.begin(2 * GRANULE, 2 * GRANULE), marker.begin(10 * GRANULE, 0)
            stop()
            assert tickets

        process = Process(act)
        process.reached()
        process.kill()
        tracker.checkpoint("monday")
        assert dirty(tracker.changed_since("monday")) == [2, 3]
        tracker.checkpoint("tuesday")
        assert dirty(tracker.changed_since("tuesday")) == []
        assert tracker._kernel.in_flight == 0
    assert dirty(node["b0"]) == [0, 1, 2, 3]


def test_a_cut_that_fails_leaves_what_a_killed_marker_had_in_flight_to_the_next(
    node: dm.Handle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with node.track(save_interval=0) as tracker:

        def act(stop: Callable[[], None]) -> None:
            marker = dm.Marker(folder_of(tracker))
            ticket = marker.begin(2 * GRANULE, 1)
            stop()
            assert ticket

        process = Process(act)
        process.reached()
        process.kill()
        with monkeypatch.context() as patched:
            patched.setattr(tracker, "_changing", lambda *_: (_ for _ in ()).throw(dm.StorageError("x", "full")))
            with pytest.raises(dm.StorageError, match="full"):
                tracker.checkpoint("monday")
        tracker.checkpoint("tuesday")
        assert dirty(tracker.changed_since("tuesday")) == [2]


def test_a_region_that_another_process_touches_first_is_in_the_log(node: dm.Handle) -> None:
    with node.track(save_interval=0, region_size=REGION) as tracker:

        def act(stop: Callable[[], None]) -> None:
            with dm.Marker(folder_of(tracker)) as marker:
                marker.mark(5 * REGION, 1)
                stop()
                marker.mark(5 * REGION, 1)

        process = Process(act)
        process.reached()
        assert node.tracking().regions == 1
        tracker.save()
        assert node.tracking().regions == 0
        process.ends()
        assert node.tracking().regions == 1


def test_a_failed_sync_in_another_process_ends_the_session(node: dm.Handle) -> None:
    tracker = node.track(save_interval=0, region_size=REGION)

    class Failing(fileio.File):
        def sync(self) -> None:
            raise dm.SyncError(self.path, "sync: injected")

    def act(stop: Callable[[], None]) -> None:
        with fileio.using(Failing), dm.Marker(folder_of(tracker)) as marker:
            with pytest.raises(dm.SyncError, match="injected"):
                marker.mark(0, 1)
            with pytest.raises(dm.SyncError, match="not used any more"):
                marker.mark(0, 1)
        stop()

    process = Process(act)
    process.reached()
    for call in (lambda: tracker.mark(0, 1), lambda: tracker.begin(0, 1), tracker.save):
        with pytest.raises(dm.SyncError, match="failed sync of another process"):
            call()
    assert node.tracking().poisoned
    process.ends()
    with pytest.raises(dm.SyncError):
        tracker.close()
    assert {item.how.partition(":")[0] for item in node.recover()} == {"logged regions"}


def test_a_session_that_is_over_takes_no_marker_and_refuses_those_that_it_has(node: dm.Handle) -> None:
    with node.track(save_interval=0) as tracker:
        folder = folder_of(tracker)
        marker = dm.Marker(folder)
        marker.mark(0, 1)
    with pytest.raises(dm.StorageError, match="has ended"):
        marker.mark(GRANULE, 1)
    marker.close()
    with pytest.raises(dm.StorageError, match="no live files"):
        dm.Marker(folder)
    assert dirty(node["b0"]) == [0]

    def die(stop: Callable[[], None]) -> None:
        node.track(save_interval=0).mark(GRANULE, 1)
        stop()

    process = Process(die)
    process.reached()
    process.kill()
    with pytest.raises(GoneError, match="nobody marks"):
        dm.Marker(folder)
    assert dirty(node["b0"]) == [0, 1]
    assert node.tracking().how.startswith("exact")


def test_a_forked_child_cannot_use_its_parents_marker(node: dm.Handle) -> None:
    with node.track(save_interval=0) as tracker, dm.Marker(folder_of(tracker)) as marker:
        marker.mark(0, 1)

        def act(_: Callable[[], None]) -> None:
            with pytest.raises(dm.StorageError, match="forked"):
                marker.mark(GRANULE, 1)
            marker.close()

        Process(act).ends()
        marker.mark(2 * GRANULE, 1)
        assert dirty(tracker.bitmap("b0")) == [0, 2]


# A tracker dies, and markers go on.


def marking(folder: str, stop: Callable[[], None]) -> None:
    with dm.Marker(folder) as marker:
        marker.mark(10 * GRANULE, 1)
        stop()
        ticket = marker.begin(11 * GRANULE, 1)
        stop()
        marker.end(ticket)
        marker.mark(12 * GRANULE, 1)


def left_to_a_marker(target: str) -> tuple[Process, dm.Handle]:
    """A tracker that has died while a marker goes on."""

    def track(stop: Callable[[], None]) -> None:
        with dm.open(target) as image:
            tracker = image.track(save_interval=0)
            tracker.mark(0, 1)
            tracker.checkpoint("monday")
            tracker.mark(GRANULE, 1)
            tracker.save()
            tracker.mark(2 * GRANULE, 1)
            tracker.checkpoint("tuesday")
            tracker.mark(3 * GRANULE, 1)
            stop()

    first = Process(track)
    first.reached()
    image = dm.open(target)
    folder = image.tracking().live
    marker = Process(lambda stop: marking(folder, stop))
    marker.reached()
    first.kill()
    return marker, image


@pytest.mark.parametrize("making", [raw_here, qcow2])
@pytest.mark.parametrize("target", [DEVICE, NODE])
def test_a_new_tracker_takes_over_a_session_in_which_others_mark(
    tmp_path: Path, making: Callable[[Path], Path], target: str
) -> None:
    make(tmp_path, making)
    marker, image = left_to_a_marker(target)
    with contextlib.closing(image):
        status = image.tracking()
        assert (status.alive, status.kept) == (True, False)
        with pytest.raises(dm.LockedError, match="its tracker has died, and others mark"):
            image.recover()
        with image.track(save_interval=0) as tracker:
            assert (image.tracking().alive, image.tracking().kept, image.tracking().pid) == (True, True, os.getpid())
            with pytest.raises(dm.LockedError):
                image.track()
            assert tracker.checkpoints() == ["monday", "tuesday"]
            assert dirty(tracker.changed_since("monday")) == [1, 2, 3, 10]
            assert dirty(tracker.changed_since("tuesday")) == [3, 10]
            marker.go_on()
            marker.reached(2)
            done = threading.Event()
            thread = threading.Thread(target=lambda: (tracker.checkpoint("wednesday"), done.set()))
            thread.start()
            assert not done.wait(0.1)  # for the other's write
            marker.ends()
            assert done.wait(60)
            thread.join()
            for number in range(5):
                tracker.mark((20 + number) * GRANULE, 1)
                tracker.save()
                tracker.checkpoint(f"c{number}")
            assert set(dirty(tracker.changed_since("tuesday"))) == {3, 10, 11, 12, *range(20, 25)}
            since = dirty(tracker.changed_since("wednesday"))
            assert set(since) >= {20, 21, 22, 23, 24}
        assert image.tracking() is None


def test_only_when_nobody_is_left_recovery_decides(tmp_path: Path) -> None:
    make_node(tmp_path, SIZE)
    marker, image = left_to_a_marker("node:drive0")
    with contextlib.closing(image):
        assert image.tracking().alive
        marker.kill()
        assert not image.tracking().alive
        assert image.tracking().how.startswith("exact")
        assert {item.how.partition(":")[0] for item in image.recover()} == {"exact"}
        assert dirty(image["b0"]) == [0, 1, 2, 3, 10]
        assert image.tracking() is None


# The gate.


def make_two(folder: Path) -> None:
    for name in ("one", "two"):
        make_node(folder, SIZE, name)


def test_disks_are_cut_at_one_instant(tmp_path: Path) -> None:
    """A process writes to both in turn, the same to either: while both gates are closed, nothing is written."""
    make_two(tmp_path)
    memory = mmap.mmap(-1, 16)
    written = (ctypes.c_uint64 * 2).from_buffer(memory)
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(dm.open(f"node:{name}")) for name in ("one", "two")]
        trackers = [stack.enter_context(node.track(save_interval=0)) for node in nodes]
        folders = [folder_of(tracker) for tracker in trackers]

        def act(stop: Callable[[], None]) -> None:
            markers = [dm.Marker(folder) for folder in folders]
            for granule in itertools.count():
                for disk, marker in enumerate(markers):
                    with marker.write(granule * GRANULE % SIZE, 1):
                        written[disk] += 1
                if granule == 20:
                    stop()

        process = Process(act)
        process.reached()
        process.go_on()
        for number in range(20):
            with dm.gate(*trackers):
                before = list(written)
                for tracker in trackers:
                    tracker.checkpoint(f"c{number}")
                assert list(written) == before
            assert before[0] - before[1] in (0, 1)
        assert written[0] > 21
        process.kill()


def test_no_write_begins_while_the_gate_is_closed(node: dm.Handle) -> None:
    with node.track(save_interval=0) as tracker:
        begun = threading.Event()

        def write() -> None:
            with tracker.write(0, 1):
                begun.set()

        with dm.gate(tracker):
            thread = threading.Thread(target=write)
            thread.start()
            assert not begun.wait(0.2)
            tracker.mark(GRANULE, 1)  # does not wait
            assert 1 in dirty(tracker.bitmap("b0"))
        assert begun.wait(60)
        thread.join()
        with tracker.write(0, 1), pytest.raises(dm.BitmapError, match="same thread"), dm.gate(tracker):
            pass
        with dm.gate(tracker), pytest.raises(dm.LockedError), dm.gate(tracker):
            pass
        tracker.end(tracker.begin(0, 1))  # it is open


def test_a_gate_is_opened_by_the_death_of_who_closed_it(node: dm.Handle) -> None:
    with node.track(save_interval=0) as tracker:

        def act(stop: Callable[[], None]) -> None:
            marker = dm.Marker(folder_of(tracker))
            marker.close_gate()
            stop()

        process, begun = Process(act), threading.Event()
        process.reached()
        thread = threading.Thread(target=lambda: (tracker.end(tracker.begin(0, 1)), begun.set()))
        thread.start()
        assert not begun.wait(0.2)
        with pytest.raises(dm.LockedError), dm.gate(tracker):
            pass
        process.kill()
        assert begun.wait(5)
        thread.join()


def test_a_write_does_not_wait_for_ever_and_who_closed_the_gate_learns_it(
    node: dm.Handle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "PATIENCE_NS", 100_000_000)
    with node.track(save_interval=0) as tracker:
        thread = threading.Thread(target=lambda: tracker.end(tracker.begin(0, 1)))
        with pytest.raises(dm.StorageError, match="could not wait any longer"), dm.gate(tracker):
            both(thread.start, thread.join)
        with tracker_write_elsewhere(tracker), pytest.raises(dm.StorageError, match="did not end"), dm.gate(tracker):
            pass
        tracker.end(tracker.begin(0, 1))


def both(*acts: Callable[[], object]) -> None:
    for act in acts:
        act()


@contextlib.contextmanager
def tracker_write_elsewhere(tracker: dm.Tracker) -> Iterator[None]:
    ticket = tracker.begin(0, 1)
    yield
    tracker.end(ticket)


def test_a_marker_gives_signs_of_life_while_there_is_no_tracker(tmp_path: Path) -> None:
    make_node(tmp_path, SIZE)
    marker, image = left_to_a_marker("node:drive0")
    with contextlib.closing(image):
        died = time.time_ns()
        wait_for_beat(tmp_path / "default.dmap", SIZE, died)
        assert image.tracking().seen * 1e9 > died
        with image.track(save_interval=0) as tracker:
            assert set(dirty(tracker.bitmap("b0"))) == {0, 1, 2, 3, 10}
            marker.kill()


def test_nobody_else_gets_the_live_files_while_a_marker_lives(tmp_path: Path) -> None:
    """A tracker with a copy of the store would, as the folder is named after the node."""
    make_node(tmp_path, SIZE)
    marker, image = left_to_a_marker("node:drive0")
    with contextlib.closing(image):
        folder = image.tracking().live
        with pytest.raises(dm.LockedError, match="another store has its live files here"):
            livefile.Folder(folder)
        with Store(str(tmp_path / "default.dmap")) as target:
            record = target.record(b"drive0")
        assert record
        session = session_of(record)
        assert session
        livefile.remove_session(folder, session.uuid)
        assert sorted(os.listdir(folder)) == ["bits", "control", "markers", "socket"]
        marker.kill()
        livefile.Folder(folder).close()
        livefile.remove_session(folder, session.uuid)
        assert not os.path.exists(folder)


def test_a_marker_that_is_closed_in_a_write_counts_until_that_has_ended(node: dm.Handle) -> None:
    with node.track(save_interval=0) as tracker:
        marker = dm.Marker(tracker.live)
        marker.mark(0, 1)
        ticket = marker.begin(GRANULE, 1)
        marker.close()
        for act in (marker.mark, marker.begin):
            with pytest.raises(dm.StorageError, match="closed"):
                act(0, 1)
        done = threading.Event()
        thread = threading.Thread(target=lambda: (tracker.checkpoint("monday"), done.set()))
        thread.start()
        assert not done.wait(0.2)
        markers = os.path.join(tracker.live, "markers")
        assert count_of_locks(markers) == 2  # the tracker's slot, and this one
        marker.end(ticket)
        assert done.wait(60)
        thread.join()
        assert count_of_locks(markers) == 1
        assert dirty(tracker.changed_since("monday")) == []
        assert dirty(tracker.bitmap("b0")) == [0, 1]


def count_of_locks(path: str) -> int:
    """How many slots are locked."""
    with fileio.open_file(path) as file:
        return sum(file.locked_by_other(slot) for slot in range(live.MAX_SLOTS))


def test_more_writes_in_flight_than_a_slot_has_room_for(node: dm.Handle) -> None:
    with node.track(save_interval=0) as tracker:
        tickets = [tracker.begin(number * GRANULE, 1) for number in range(3 * live.MAX_FLIGHTS)]
        assert tracker._kernel.in_flight == len(tickets)
        assert tracker._kernel.flying(1, False) == len(tickets)
        for ticket in tickets:
            tracker.end(ticket)
        tracker.checkpoint("monday")
        assert dirty(tracker.changed_since("monday")) == []


def test_threads_that_have_ended_leave_their_slots_to_others(node: dm.Handle) -> None:
    with node.track(save_interval=0) as tracker:
        for number in range(20):
            thread = threading.Thread(target=tracker.mark, args=(number * GRANULE, 1))
            thread.start()
            thread.join()
        assert count_of_locks(os.path.join(tracker.live, "markers")) <= 3
        assert len(dirty(tracker.bitmap("b0"))) == 20


def test_what_is_not_made_by_a_tracker_or_a_marker_marks_nothing() -> None:
    with pytest.raises(TypeError, match="write method"), dm.Write():
        pass
    dm.Ticket().end()
    unmade = dm.Marker.__new__(dm.Marker)
    for act in (unmade.mark, unmade.begin):
        with pytest.raises(ValueError, match="not attached"):
            act(0, 1)
