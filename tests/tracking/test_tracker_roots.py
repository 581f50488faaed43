"""A tracked device gets another root, or dies while it does; and what is refused then."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support import devices
from support.devices import (
    BOTH,
    DEVICE,
    EXACT,
    NODE,
    both,
    dirty,
    granules,
    in_child,
    no_traces,
    recover,
    sessions,
)
from support.power import SIZE
from support.tracking import GRANULE

import dirtmap.engine as dm
from dirtmap.engine.host import tracked
from dirtmap.engine.host.parts import Parts
from dirtmap.engine.tracking import recorder
from dirtmap.engine.tracking.home import HomeChange
from dirtmap.fmt.store import KIND_DEVICE

path, other = devices.path, devices.other


def test_one_live_session_a_node(path: Path, other: Path) -> None:
    dm.this_host().add_device("disk1", "drive0")
    mine = f"process {os.getpid()}"
    with dm.open("disk0") as image, image.track() as tracker:
        for target in (*BOTH, "disk1"):
            with dm.open(target) as again, pytest.raises(dm.LockedError, match=mine):
                again.track()
        for target in BOTH:
            with pytest.raises(dm.LockedError, match=mine):
                dm.recover(target)
        for unchanged in (False, True):
            with pytest.raises(dm.LockedError, match=mine):
                dm.this_host().set_root("disk0", "other", content_unchanged=unchanged)
        with pytest.raises(dm.LockedError, match=mine):
            dm.this_host().remove_device("disk0")
        tracker.mark(0, 1)
    assert both() == ([0], [0])
    with dm.open(NODE) as image, image.track(), dm.open("disk0") as device, pytest.raises(dm.LockedError, match=mine):
        device.track()
    with dm.open("disk0") as image, image.track():
        pass


def test_set_root_after_a_death_takes_the_session_along(path: Path, other: Path, tmp_path: Path) -> None:
    in_child(lambda: dm.open("disk0").track().mark(3 * GRANULE, 1))
    dm.this_host().set_root("disk0", "other", content_unchanged=True)
    assert both() == ([3], [3])
    assert sessions() == [False, True]
    assert recover(NODE) == {"b0": EXACT}
    no_traces(tmp_path)


def test_a_tracker_gives_its_device_another_root_wherever_the_program_is(
    path: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("live", "elsewhere"):
        (tmp_path / name).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path)
    with dm.open("disk0") as image:
        tracker = image.track(live="live", save_interval=0)
    monkeypatch.chdir("elsewhere")
    with tracker:  # the image that it was made of is closed
        tracker.mark(1 * GRANULE, 1)
        for root in ("other", "drive0"):
            tracker.set_root(root, content_unchanged=True)
            tracker.mark(2 * GRANULE, 1)
        assert list((tmp_path / "live").iterdir())
        assert not list((tmp_path / "elsewhere").iterdir())
    assert dirty(DEVICE, "d0") == [1, 2]


@pytest.mark.parametrize("unchanged", [False, True])
def test_a_tracker_gives_its_device_another_root(path: Path, other: Path, tmp_path: Path, unchanged: bool) -> None:
    with dm.open("other") as image, image.transaction() as bitmaps:
        bitmaps["o"] = dm.Bitmap(SIZE)
    with dm.open("disk0") as image, image.track() as tracker:
        tracker.mark(1 * GRANULE, 1)
        tracker.checkpoint("monday")
        ticket = tracker.begin(2 * GRANULE, 1)
        with pytest.raises(dm.BitmapError, match="in flight"):
            tracker.set_root("other", content_unchanged=unchanged)
        tracker.end(ticket)
        tracker.take("d0")
        with pytest.raises(dm.BitmapError, match="busy"):
            tracker.set_root("other", content_unchanged=unchanged)
        tracker.give_back("d0")
        for wrong in ("nothing", "disk0"):
            with pytest.raises(dm.BitmapError, match="no such node"):
                tracker.set_root(wrong)
            tracker.mark(3 * GRANULE, 1)  # it goes on with the old one
        tracker.set_root("other", content_unchanged=unchanged)
        status = image.tracking()
        assert status
        assert status.alive
        tracker.mark(4 * GRANULE, 1)
        with tracker.write(5 * GRANULE, 1):
            pass
        with dm.open("other") as root:
            assert granules(root["o"]) == [4, 5]
        with dm.open(NODE) as root, root.transaction() as bitmaps:  # it is free
            assert granules(bitmaps["b0"]) == [1, 2, 3]
        expected = [1, 2, 3, 4, 5] if unchanged else list(range(SIZE // GRANULE))
        assert granules(tracker.bitmap("d0")) == granules(image["d0"]) == expected
        assert granules(tracker.changed_since("monday")) == ([2, 3, 4, 5] if unchanged else expected)
    assert sessions() == [False, False]
    with dm.open("disk0") as image:
        assert granules(image["d0"]) == expected
        assert image.info().notes == ()
    no_traces(tmp_path)


def test_a_tracker_that_dies_while_it_changes_the_root_loses_nothing(path: Path, other: Path) -> None:
    for step in ("close", "track_device", "end"):

        def work(step: str = step) -> None:
            with dm.open("disk0") as image:
                tracker = image.track()
                tracker.mark(3 * GRANULE, 1)

                def die(*_: object) -> None:
                    os.kill(os.getpid(), signal.SIGKILL)

                if step == "close":
                    Parts.change_root = die  # type: ignore[method-assign]
                elif step == "track_device":
                    tracked.track_stored = die  # type: ignore[assignment]
                tracker.set_root("other", content_unchanged=True)
                tracker.mark(4 * GRANULE, 1)

        in_child(work)
        with dm.open("disk0") as image:
            image.recover()
            assert granules(image["d0"]) == ([3, 4] if step == "end" else [3])
        with dm.open(NODE) as image:
            assert granules(image["b0"]) == [3]
        dm.this_host().set_root("disk0", "drive0", content_unchanged=True)
        for target, name in (("disk0", "d0"), (NODE, "b0")):
            with dm.open(target) as image, image.transaction() as bitmaps:
                bitmaps[name] = dm.Bitmap(SIZE)


def test_a_tracker_whose_new_root_cannot_be_tracked_has_ended(path: Path, other: Path) -> None:
    with dm.open("other") as image, image.transaction() as bitmaps:
        bitmaps["o"] = dm.Bitmap(SIZE)
    with dm.open("disk0") as image, dm.open("other") as root, root.hold("o"):
        tracker = image.track()
        mark = tracker.mark
        mark(GRANULE, 1)
        with pytest.raises(dm.LockedError, match="held by"):
            tracker.set_root("other", content_unchanged=True)
        for act in (lambda: mark(0, 1), lambda: tracker.begin(0, 1), lambda: tracker.mark_many([0], [1]), tracker.save):
            with pytest.raises(dm.StorageError):
                act()
        tracker.close()
        assert granules(image["d0"]) == [1]
    assert sessions() == [False, False]


def test_other_threads_wait_for_another_root(path: Path, other: Path) -> None:
    faults: list[BaseException] = []
    stop = threading.Event()
    with dm.open("disk0") as image, image.track() as tracker:

        def use() -> None:
            try:
                while not stop.is_set():
                    tracker.bitmap("d0")
                    tracker.save()
            except BaseException as error:
                faults.append(error)

        def cut() -> None:
            number = 0
            try:
                while not stop.is_set():
                    tracker.checkpoint(f"c{number}")
                    tracker.remove(f"c{number}")
                    number += 1
            except BaseException as error:
                faults.append(error)

        threads = [threading.Thread(target=act) for act in (use, cut)]
        for thread in threads:
            thread.start()
        for number in range(6):
            tracker.set_root(("other", "drive0")[number % 2], content_unchanged=True)
            tracker.mark(number * GRANULE, 1)
        stop.set()
        for thread in threads:
            thread.join(60)
        assert not faults
        assert granules(tracker.bitmap("d0")) == list(range(6))


def test_another_root_inside_a_write_is_refused_even_while_a_cut_waits(path: Path, other: Path) -> None:
    with dm.open("disk0") as image, image.track() as tracker:
        cut = threading.Thread(target=lambda: tracker.checkpoint("monday"))
        with tracker.write(0, 1):
            cut.start()
            while tracker._kernel.interval == 0:
                time.sleep(0)
            with pytest.raises(dm.BitmapError, match="in flight"):
                tracker.set_root("other")
        cut.join(60)
        assert tracker.checkpoints() == ["monday"]


def test_a_tracker_of_a_node_has_no_root_to_change(path: Path, other: Path) -> None:
    with dm.open(NODE) as image, image.track() as tracker, pytest.raises(dm.BitmapError, match="no root"):
        tracker.set_root("other")


def test_files_of_a_root_stay_when_its_device_is_tracked_on_another(path: Path, other: Path, tmp_path: Path) -> None:
    in_child(lambda: dm.open("disk0").track().mark(3 * GRANULE, 1))
    dm.this_host().set_root("disk0", "other", content_unchanged=True)
    with dm.open("disk0") as image, image.track() as tracker:
        tracker.mark(4 * GRANULE, 1)
        assert both() == ([3, 4], [3])
        assert recover(NODE) == {"b0": EXACT}
    assert both() == ([3, 4], [3])
    no_traces(tmp_path)


def test_a_device_that_gets_another_root_while_tracking_begins_is_refused(
    path: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dm.open("disk0") as image, monkeypatch.context() as patch:
        enter = recorder.Recorder._enter

        def entering(tracker: recorder.Recorder, change: HomeChange) -> None:
            if change.record.kind == KIND_DEVICE:
                change.record = replace(change.record, root_uuid=bytes(16))
            enter(tracker, change)

        patch.setattr(recorder.Recorder, "_enter", entering)
        with pytest.raises(dm.BitmapError, match="try again"):
            image.track()
    assert sessions() == [False, False]
