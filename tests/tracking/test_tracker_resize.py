"""A disk that grows while it is tracked: its new space is dirty, everywhere, and no bit of the old one is lost."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from support import qemu
from support.devices import DEVICE, NODE, dirty, make, no_traces, qcow2, raw_elsewhere, raw_here, sessions
from support.hostless import ALONE
from support.power import SIZE
from support.tracking import GRANULE, Model, make_node, mark, model_of

import dirtmap.engine as dm
from dirtmap.engine.session import intent
from dirtmap.engine.system import file as fileio
from dirtmap.engine.tracking.home import Home, HomeChange
from dirtmap.engine.tracking.kernel import Kernel
from dirtmap.engine.tracking.tracker import Tracker
from dirtmap.fmt import live
from dirtmap.fmt.directory import FLAG_IN_USE
from dirtmap.fmt.geometry import align_up
from dirtmap.fmt.store import Record

COUNT = SIZE // GRANULE
RAW = (raw_here, raw_elsewhere)


@pytest.fixture(params=RAW, ids=lambda root: root.__name__)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make(tmp_path, request.param)


def grown(size: int, old: int = SIZE) -> set[int]:
    """The granules that are dirty because they are new."""
    return set(range(old // GRANULE, -(-size // GRANULE)))


@pytest.mark.parametrize("size", [SIZE + 1, SIZE + GRANULE, 2 * SIZE - 512, 5 * SIZE, 3 << 30])
def test_the_new_space_is_dirty_and_can_be_marked(path: Path, tmp_path: Path, size: int) -> None:
    with dm.open("disk0") as image, image.track() as tracker:
        tracker.mark(3 * GRANULE, 1)
        with pytest.raises(dm.RangeError):
            tracker.mark(SIZE, 1)
        with pytest.raises(dm.RangeError):
            tracker.mark_many([0] * 200, [SIZE + 1] * 200)
        tracker.resize(size)
        assert tracker.size == size == path.stat().st_size
        assert set(np.flatnonzero(model_of(tracker.bitmap("d0"))).tolist()) == {3} | grown(size)
        assert set(dirty(DEVICE, "d0")) == set(dirty(NODE, "b0")) == {3} | grown(size)
        tracker.clear("d0")
        tracker.mark(size - 1, 1)
        tracker.mark_many([size - 1] * 200, [1] * 200)
        with tracker.write(SIZE, 1):
            pass
        with pytest.raises(dm.RangeError):
            tracker.mark(size, 1)
        assert set(dirty(DEVICE, "d0")) == {SIZE // GRANULE, (size - 1) // GRANULE}
        assert set(dirty(NODE, "b0")) == {3} | grown(size)
    assert set(dirty(DEVICE, "d0")) == {SIZE // GRANULE, (size - 1) // GRANULE}
    assert set(dirty(NODE, "b0")) == {3} | grown(size)
    no_traces(tmp_path)
    with dm.open("disk0") as image:
        assert image.size == size
        assert image.doubt() is None
        with image.track() as tracker:
            tracker.mark(size - 1, 1)
    assert dm.check(str(tmp_path / "default.dmap")).findings == []


class Bits:
    """A bitmap as plain as can be."""

    def __init__(self, size: int, granularity: int, *, recording: bool = True) -> None:
        self.granularity, self.recording = granularity, recording
        self.model = np.zeros(-(-size // granularity), np.uint8)
        self.since: Model | None = None  # since it was taken

    def resize(self, old: int, new: int) -> None:
        for name in ("model", "since"):
            if (model := getattr(self, name)) is not None:
                larger = np.ones(-(-new // self.granularity), np.uint8)
                larger[: old // self.granularity] = model[: old // self.granularity]
                setattr(self, name, larger)

    def mark(self, offset: int, length: int) -> None:
        for model in (self.model, self.since):
            if self.recording and model is not None:
                mark(model, offset, length, self.granularity)


@pytest.mark.parametrize("seed", range(12))
def test_against_a_model(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    size = rng.choice((1 << 20, (3 << 20) + 512, 12345 * 512))
    path = make_node(tmp_path, size)
    bitmaps = {"b0": Bits(size, GRANULE)}
    cuts = resizes = 0
    opened = dm.open("node:drive0")
    tracker = opened.track(save_interval=0)
    for _ in range(120):
        act, name = rng.random(), rng.choice(list(bitmaps))
        bits = bitmaps[name]
        if act < 0.45:
            offset = rng.randrange(size)
            length = min(rng.choice((1, 512, 300000)), size - offset)
            if rng.random() < 0.5:
                tracker.mark(offset, length)
            else:
                tracker.end(tracker.begin(offset, length))
            for each in bitmaps.values():
                each.mark(offset, length)
        elif act < 0.55 and size < 1 << 30:
            old, size = size, size + rng.choice((1, 512, 65536, 1000000, size))
            if rng.random() < 0.3:
                os.truncate(path, size)  # it is longer already
            tracker.resize(size)
            for each in bitmaps.values():
                each.resize(old, size)
            resizes += 1
        elif act < 0.65 and len(bitmaps) < 8:
            cuts += 1
            granularity, recording = rng.choice((512, 4096, GRANULE, 1 << 20)), rng.random() < 0.8
            tracker.add(f"b{cuts}", granularity, recording=recording)
            bitmaps[f"b{cuts}"] = Bits(size, granularity, recording=recording)
        elif act < 0.7:
            tracker.save()
        elif act < 0.75 and bits.since is None:
            tracker.clear(name)
            bits.model[:] = 0
        elif act < 0.8 and bits.since is None:
            (tracker.disable if bits.recording else tracker.enable)(name)
            bits.recording = not bits.recording
        elif act < 0.87 and bits.recording and bits.since is None:
            assert np.array_equal(model_of(tracker.take(name)), bits.model)
            bits.since = np.zeros_like(bits.model)
        elif bits.since is not None:
            if rng.random() < 0.7:
                tracker.drop(name)
                bits.model = bits.since
            else:
                tracker.give_back(name)
            bits.since = None
        elif rng.random() < 0.2:
            tracker.close()
            opened.close()
            for each in bitmaps.values():
                each.since = None
            opened = dm.open("node:drive0")
            tracker = opened.track(save_interval=0)
        for each, expected in bitmaps.items():
            assert np.array_equal(model_of(tracker.bitmap(each)), expected.model), each
            assert np.array_equal(model_of(opened[each]), expected.model), each
    assert resizes
    tracker.close()
    opened.close()
    with dm.open("node:drive0") as image:
        for each, expected in bitmaps.items():
            assert np.array_equal(model_of(image[each]), expected.model), each
            assert image[each].recording == expected.recording


def test_what_was_taken_before_lacks_the_new_space_and_what_is_kept_does_not(tmp_path: Path) -> None:
    make_node(tmp_path, SIZE)
    with dm.open("node:drive0") as image, image.track() as tracker:
        tracker.mark(0, 1)
        taken = tracker.take("b0")
        tracker.resize(2 * SIZE)
        tracker.mark(5 * GRANULE, 1)
        tracker.drop("b0")
        assert taken.size == SIZE
        assert set(np.flatnonzero(model_of(tracker.bitmap("b0"))).tolist()) == {5} | grown(2 * SIZE)
    assert set(dirty(NODE, "b0")) == {5} | grown(2 * SIZE)


def test_checkpoints_have_it(tmp_path: Path) -> None:
    make_node(tmp_path, SIZE)
    with dm.open("node:drive0") as image, image.track() as tracker:
        tracker.checkpoint("a")
        tracker.mark(0, 1)
        tracker.checkpoint("b")
        tracker.resize(SIZE + 1)
        tracker.mark(GRANULE, 1)
        tracker.checkpoint("c")
        changed = {name: np.flatnonzero(model_of(tracker.changed_since(name))).tolist() for name in "abc"}
    assert changed["a"] == [0, 1, COUNT]
    assert changed["b"] == [1, COUNT]
    assert COUNT in changed["c"] or changed["c"] == []


def test_a_write_that_began_before_is_waited_for_by_a_cut_after(tmp_path: Path) -> None:
    make_node(tmp_path, SIZE)
    with dm.open("node:drive0") as image, image.track() as tracker:
        ticket = tracker.begin(0, 1)
        done = threading.Event()

        def work() -> None:
            tracker.resize(2 * SIZE)
            done.set()
            tracker.checkpoint("a")

        thread = threading.Thread(target=work)
        thread.start()
        assert done.wait(60)
        thread.join(0.2)
        assert thread.is_alive()
        tracker.end(ticket)
        thread.join()
        assert not model_of(tracker.bitmap("a")).any()


def test_the_new_log_has_a_sign_of_life_at_once(tmp_path: Path) -> None:
    """Else the image's change of size would be later than what a power loss leaves of the tracker."""
    make_node(tmp_path, SIZE)
    with dm.open("node:drive0") as image, image.track() as tracker:
        before = time.time_ns()
        tracker._beat = lambda _: 0  # type: ignore[method-assign]
        tracker.resize(2 * SIZE)
        logged = intent.read_log(tracker._session, 2 * SIZE)
        assert logged is not None
        assert logged.beat >= before


def test_many_more_regions(tmp_path: Path) -> None:
    """A disk that grows so much that its log gets more pages, while threads mark."""
    make_node(tmp_path, SIZE)
    opened = dm.open("node:drive0")
    tracker = opened.track(save_interval=0)
    before = opened.tracking()
    assert before is not None
    stop, model = threading.Event(), np.zeros(COUNT, np.uint8)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            offset = rng.randrange(SIZE)
            tracker.mark(offset, 1)
            model[offset // GRANULE] = 1

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for size in (SIZE + 512, 4 << 30, 20 << 30, 20 << 30, 64 << 30):
        tracker.resize(size)
        tracker.mark(size - 1, 1)
        if size == 4 << 30:
            tracker.save()
    stop.set()
    for thread in threads:
        thread.join()
    after = opened.tracking()
    assert after is not None
    assert after.region_size == before.region_size
    assert after.regions_in_all == 65536
    found = model_of(tracker.bitmap("b0"))
    assert not (model & ~found[:COUNT]).any()
    assert found[COUNT:].all()
    tracker.close()
    opened.close()


def test_threads_mark_and_cut_meanwhile(path: Path) -> None:
    models = [np.zeros(COUNT, np.uint8) for _ in range(4)]
    with dm.open("disk0") as image, image.track(save_interval=0, region_size=1 << 20) as tracker:
        stop, failed = threading.Event(), list[BaseException]()

        def work(number: int) -> None:
            rng = random.Random(number)
            try:
                while not stop.is_set():
                    offset = rng.randrange(SIZE - (1 << 18))
                    if number == 0:
                        tracker.mark_many(np.array([offset] * 200), np.array([1 << 18] * 200))
                    elif number == 1:
                        with tracker.write(offset, 1 << 18):
                            pass
                    else:
                        tracker.mark(offset, 1 << 18)
                    mark(models[number], offset, 1 << 18)
            except BaseException as error:
                failed.append(error)

        def cut() -> None:
            number = 0
            try:
                while not stop.is_set():
                    number += 1
                    tracker.checkpoint(f"c{number}")
                    tracker.save()
                    if number > 3:
                        tracker.remove(f"c{number - 3}")
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        threads.append(threading.Thread(target=cut))
        for thread in threads:
            thread.start()
        for step in range(1, 12):
            tracker.resize(SIZE + step * 1234567)
        stop.set()
        for thread in threads:
            thread.join()
        assert not failed
    least = np.bitwise_or.reduce(models)
    for target, name in ((DEVICE, "d0"), (NODE, "b0")):
        with dm.open(target) as image:
            found = model_of(image[name])
        assert not (least & ~found[:COUNT]).any()
        assert found[COUNT:].all()


# Refusals.


def test_what_cannot_grow_is_refused(tmp_path: Path) -> None:
    path = make_node(tmp_path, SIZE)
    with dm.open("node:drive0") as image, image.track(region_size=1 << 20) as tracker:
        tracker.add("fine", 512)
        with pytest.raises(dm.BitmapError, match="to shrink it, end the tracker"):
            tracker.resize(SIZE - 1)
        with pytest.raises(dm.BitmapError, match="no disk"):
            tracker.resize(1 << 63)
        with pytest.raises(dm.BitmapError, match="too small for a disk"):
            tracker.resize(live.MAX_REGIONS << 20)
        with pytest.raises(TypeError):
            tracker.resize(1.5)  # type: ignore[arg-type]
        with tracker.write(0, 1), pytest.raises(dm.BitmapError, match="same thread"):
            tracker.resize(2 * SIZE)
        os.truncate(path, 3 * SIZE)
        with pytest.raises(dm.BitmapError, match=f"has {3 * SIZE} bytes, and is to have {2 * SIZE}"):
            tracker.resize(2 * SIZE)
        os.truncate(path, SIZE)
        tracker.resize(SIZE)
        assert tracker.size == SIZE
        tracker.mark(0, 1)
    with pytest.raises(dm.StorageError, match="closed"):
        tracker.resize(2 * SIZE)
    assert dirty(NODE, "b0") == [0]


def test_a_bitmap_that_is_too_fine(tmp_path: Path) -> None:
    make_node(tmp_path, SIZE)
    with dm.open("node:drive0") as image, image.track() as tracker:
        tracker.add("fine", 512)
        with pytest.raises(dm.BitmapError, match=r"fine.*too fine for a disk"):
            tracker.resize(1 << 60)
        tracker.mark(0, 1)


@pytest.mark.parametrize("target", [NODE, DEVICE])
def test_a_qcow2_image_is_refused(tmp_path: Path, target: str) -> None:
    path = make(tmp_path, qcow2)
    with dm.open(target) as image, image.track() as tracker:
        with pytest.raises(dm.UnsupportedError, match="qemu-img resize"):
            tracker.resize(2 * SIZE)
        tracker.mark(0, 1)
    assert dirty(NODE, "b0") == [0]
    qemu.check(path)


def test_an_inconsistent_bitmap_is_dirty_all_over_afterwards(tmp_path: Path) -> None:
    make_node(tmp_path, SIZE)
    with dm.open("node:drive0") as image:
        with image.transaction() as bitmaps:
            bitmaps["left"] = dm.Bitmap(SIZE)
        with Home(ALONE, str(tmp_path / "default.dmap"), b"drive0").change(None) as home:
            home.entries["left"] = home.entries["left"].with_flags(set=FLAG_IN_USE)
        with image.track() as tracker:
            tracker.resize(SIZE + 1)
            assert model_of(tracker.bitmap("left")).all()
            tracker.clear("left")
            tracker.mark(0, 1)
    assert dirty(NODE, "left") == [0]


# Failures.


def fail_on(monkeypatch: pytest.MonkeyPatch, number: int, error: dm.Error) -> None:
    """The n-th home that is to take the new size fails."""
    count = [0]
    finish = HomeChange.finish

    def failing(home: HomeChange) -> Record:
        if home.placed.size != home.record.size:
            count[0] += 1
            if count[0] == number:
                raise error
        return finish(home)

    monkeypatch.setattr(HomeChange, "finish", failing)


def test_a_store_that_is_full_changes_nothing_and_it_can_be_repeated(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dm.open("disk0") as image, image.track() as tracker:
        tracker.mark(0, 1)
        with monkeypatch.context() as patch:
            fail_on(patch, 1, dm.StorageError("store", "no space left on device"))
            with pytest.raises(dm.StorageError, match="no space"):
                tracker.resize(2 * SIZE)
        assert tracker.size == SIZE
        tracker.mark(GRANULE, 1)
        with pytest.raises(dm.RangeError):
            tracker.mark(SIZE, 1)
        assert dirty(DEVICE, "d0") == [0, 1]
        tracker.checkpoint("a")
        tracker.mark(2 * GRANULE, 1)
        tracker.save()
        assert dirty(NODE, "b0") == [0, 1, 2]
        tracker.resize(2 * SIZE)
        tracker.mark(SIZE, 1)
        assert set(dirty(DEVICE, "d0")) == {0, 1, 2} | grown(2 * SIZE)
    assert set(dirty(NODE, "b0")) == {0, 1, 2} | grown(2 * SIZE)
    no_traces(tmp_path)


def test_a_failure_between_two_stores_ends_the_tracker_and_loses_nothing(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dm.open("disk0") as image:
        tracker = image.track()
        tracker.mark(0, 1)
        with monkeypatch.context() as patch:
            fail_on(patch, 2, dm.StorageError("store", "no space left on device"))
            with pytest.raises(dm.StorageError, match="no space"):
                tracker.resize(2 * SIZE)
        with pytest.raises(dm.StorageError, match="ended while the disk grew"):
            tracker.mark(GRANULE, 1)
        with pytest.raises(dm.StorageError, match="ended while the disk grew"):
            tracker.close()
    dm.recover(NODE)
    assert set(dirty(DEVICE, "d0")) == set(dirty(NODE, "b0")) == {0} | grown(2 * SIZE)
    assert sessions() == [False, False]
    no_traces(tmp_path)


def test_no_room_for_the_writeset(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Kernel.reserve

    def reserve(kernel: Kernel, offset: int, length: int) -> None:
        if length > live.PAGE + align_up(2 * SIZE // GRANULE // 8, live.PAGE):
            raise dm.StorageError(kernel.folder, "no space left on device")
        original(kernel, offset, length)

    with dm.open("disk0") as image, image.track() as tracker:
        monkeypatch.setattr(Kernel, "reserve", reserve)
        with pytest.raises(dm.StorageError, match="no space"):
            tracker.resize(100 * SIZE)
        tracker.mark(0, 1)
        tracker.checkpoint("a")
    assert dirty(DEVICE, "d0") == dirty(NODE, "b0") == [0]
    no_traces(tmp_path)


def test_readers_see_the_old_disk_or_the_new_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[tuple[int, int]]()
    truncate = fileio.File.truncate

    def look() -> None:
        for target, name in ((DEVICE, "d0"), (NODE, "b0")):
            with dm.Host() as host, host.open(target) as image:
                bitmap = image[name]
                assert image.info().errors == ()
                seen.append((bitmap.size, bitmap.count))

    def truncated(file: fileio.File, size: int) -> None:
        truncate(file, size)
        if file.path == str(path):
            look()

    monkeypatch.setattr(fileio.File, "truncate", truncated)
    grow_home = Tracker._grow_home

    def grown_home(tracker: Tracker, *arguments: object) -> None:
        look()
        grow_home(tracker, *arguments)  # type: ignore[arg-type]
        look()

    monkeypatch.setattr(Tracker, "_grow_home", grown_home)
    with dm.open("disk0") as image, image.track() as tracker:
        tracker.mark(0, 1)
        tracker.resize(2 * SIZE)
    old, new = (SIZE, GRANULE), (2 * SIZE, GRANULE + SIZE)
    assert seen == [old, old, old, old, new, old, new, old, new, new]
