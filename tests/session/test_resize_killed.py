"""A tracker dies while its disk grows, at every step, or with the power: nothing that was marked is lost.

And it is exact where the process alone died, whether the image has its new size by then or not.
"""

from __future__ import annotations

import functools
import mmap
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.devices import (
    BOTH,
    DEVICE,
    NODE,
    dirty,
    in_child,
    lose_tmpfs,
    made_in,
    make,
    no_traces,
    raw_elsewhere,
    raw_here,
    recover,
)
from support.power import SIZE, Recording, Written, lose
from support.tracking import GRANULE, Shared, count_down, forget_index, kill, make_node, mark, model_of

import dirtmap.engine as dm
from dirtmap.engine.identity import identity_of
from dirtmap.engine.namespaces.nodes import resize_node
from dirtmap.engine.session import view
from dirtmap.engine.storefile.file import Store
from dirtmap.engine.system import file as fileio
from dirtmap.engine.system import livefs
from dirtmap.engine.tracking.tracker import Tracker

COUNT = SIZE // GRANULE
LARGER = 2 * SIZE + 512
NEW = set(range(COUNT, -(-LARGER // GRANULE)))
OLD = {3, 20, 900}


def dies_at(point: int) -> bool:
    """A tracker that dies before the n-th act on a disk or tmpfs of its `resize`; False where it had ended before."""
    over = mmap.mmap(-1, 4096)

    def act() -> None:
        left = [0]
        count_down(
            left,
            (fileio.File, "write"),
            (fileio.File, "sync"),
            (fileio.File, "truncate"),
            (fileio.File, "close"),
            (livefs, "create_live"),
        )
        with dm.open("disk0") as image:
            tracker = image.track(save_interval=0, region_size=1 << 20)
            with tracker.write(3 * GRANULE, 1):
                pass
            tracker.checkpoint("monday")
            with tracker.write(20 * GRANULE, 1):
                pass
            time.sleep(0.02)  # the background makes its writeset
            with tracker.write(900 * GRANULE, 1):
                pass
            left[0] = point
            tracker.resize(LARGER)
            over[0] = left[0] > 0
            left[0] = 0
            if over[0]:
                with tracker.write(LARGER - 1, 1):
                    pass
        os.kill(os.getpid(), signal.SIGKILL)

    in_child(act)
    return not over[0]


def dies_everywhere(tmp_path: Path, root: Callable[[Path], Path], points: range, *, power: bool) -> None:
    rng, sizes = random.Random(0), set[tuple[int, int, int]]()
    for point in points:
        work = tmp_path / f"{point}"
        with made_in(work, root) as path:
            died = dies_at(point)
            if power:
                lose_tmpfs()
            size, found = path.stat().st_size, {}
            before = {}
            for target in BOTH:
                with dm.open(target) as image:
                    before[target] = image.size
            sizes.add((size, *before.values()))
            for target in rng.sample(BOTH, 2):
                how = rng.choice(("recover", "track", "shown"))
                if how == "shown" and before[target] == size:
                    with dm.open(target) as image:
                        found[target] = set(dirty(target, "d0" if target == DEVICE else "b0"))
                if how == "track":
                    with dm.open(target) as image:
                        image.track().close()
                else:
                    done = recover(target)
                    assert set(done.values()) <= {"logged regions" if power else "exact"}, (point, target, done)
            for target, name in ((DEVICE, "d0"), (NODE, "b0")):
                now = set(dirty(target, name))
                assert found.get(target, now) == now, (point, target)
                expected = OLD | (NEW if size == LARGER else set())
                if power:
                    assert expected <= now, (point, target, expected - now)
                    assert len(now & set(range(COUNT))) <= 3 * (1 << 20) // GRANULE, (point, target)
                else:
                    assert now == expected, (point, target)
            with dm.open(DEVICE) as image:
                assert image.size == size
                assert image.info().checkpoints == ("monday",)
            with dm.open(NODE) as image, image.track():
                pass  # takes away the log that was being made
            no_traces(work)
            assert dm.check(str(work / "default.dmap")).corruptions == 0
        shutil.rmtree(work)
        if not died:
            break
    assert len(sizes) > (3 if points.step == 1 else 2), sizes  # old; the image is longer; the device, too; all
    assert point > 20


@pytest.mark.parametrize("power", [False, True], ids=["killed", "power loss"])
@pytest.mark.parametrize("root", [raw_here, raw_elsewhere], ids=lambda root: root.__name__)
def test_killed_before_many_an_act(tmp_path: Path, root: Callable[[Path], Path], power: bool) -> None:
    dies_everywhere(tmp_path, root, range(1, 1000, 7), power=power)


@pytest.mark.long
@pytest.mark.parametrize("power", [False, True], ids=["killed", "power loss"])
@pytest.mark.parametrize("root", [raw_here, raw_elsewhere], ids=lambda root: root.__name__)
def test_killed_before_every_act(tmp_path: Path, root: Callable[[Path], Path], power: bool) -> None:
    dies_everywhere(tmp_path, root, range(1, 1000), power=power)


def taken_over(work: Path, root: Callable[[Path], Path], point: int) -> bool:
    """As `dies_at`, while a marker goes on: the session is taken over, and grows to its end; False as there."""
    path = make(work, root)
    over, told = mmap.mmap(-1, 4096), mmap.mmap(-1, 4096)

    def track() -> None:
        left = [0]
        acts = "write", "sync", "truncate", "close"
        count_down(left, *((fileio.File, act) for act in acts))
        with dm.open("disk0") as image:
            tracker = image.track(save_interval=0, region_size=1 << 20)
            tracker.checkpoint("monday")
            with tracker.write(3 * GRANULE, 1):
                told[0] = 1
                while told[0] != 2:
                    time.sleep(0.001)
            left[0] = point
            tracker.resize(LARGER)
            over[0] = left[0] > 0
            left[0] = 0
        os.kill(os.getpid(), signal.SIGKILL)

    first = os.fork()
    if first == 0:
        track()
    while told[0] != 1:
        time.sleep(0.001)
    with dm.open(NODE) as image:
        status = image.tracking()
    assert status is not None
    with dm.Marker(status.live) as marker:
        told[0] = 2
        with marker.write(20 * GRANULE, 1):
            os.waitpid(first, 0)
        with marker.write(900 * GRANULE, 1):
            pass
        with dm.open("disk0") as image, image.track(save_interval=0) as tracker:
            assert tracker.size in (SIZE, LARGER)
            assert set(dirty_now(tracker.bitmap("d0"))) >= OLD
            if tracker.size == SIZE:
                with pytest.raises(dm.RangeError), marker.write(LARGER - 1, 1):
                    pass
            tracker.resize(LARGER)
            with marker.write(LARGER - 1, 1), tracker.write(0, 1):
                pass
            assert set(dirty_now(tracker.changed_since("monday"))) == OLD | NEW | {0}
            assert set(dirty_now(tracker.bitmap("d0"))) == OLD | NEW | {0}
    for target, name in ((DEVICE, "d0"), (NODE, "b0")):
        assert set(dirty(target, name)) == OLD | NEW | {0}, (point, target)
    assert path.stat().st_size == LARGER
    no_traces(work)
    return not over[0]


def dirty_now(bitmap: dm.Bitmap) -> list[int]:
    return np.flatnonzero(model_of(bitmap)).tolist()  # type: ignore[no-any-return]


def taken_over_everywhere(tmp_path: Path, root: Callable[[Path], Path], points: range) -> None:
    for point in points:
        work = tmp_path / f"{point}"
        work.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DIRTMAP_STORE", str(work / "default.dmap"))
            patch.setenv("DIRTMAP_INDEX", str(work / "index"))
            if not taken_over(work, root, point):
                break
        shutil.rmtree(work)
    assert point > 20


@pytest.mark.parametrize("root", [raw_here, raw_elsewhere], ids=lambda root: root.__name__)
def test_taken_over_after_many_an_act(tmp_path: Path, root: Callable[[Path], Path]) -> None:
    taken_over_everywhere(tmp_path, root, range(1, 1000, 7))


@pytest.mark.long
@pytest.mark.parametrize("root", [raw_here, raw_elsewhere], ids=lambda root: root.__name__)
def test_taken_over_after_every_act(tmp_path: Path, root: Callable[[Path], Path]) -> None:
    taken_over_everywhere(tmp_path, root, range(1, 1000))


def dies_growing(tmp_path: Path) -> Path:
    """A node whose image has grown, and whose store does not know it."""
    path = make_node(tmp_path, SIZE)

    def act() -> None:
        with dm.open(NODE) as image:
            tracker = image.track(save_interval=0)
            with tracker.write(3 * GRANULE, 1):
                pass
            tracker._grow_home = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
            tracker.resize(LARGER)

    in_child(act)
    assert path.stat().st_size == LARGER
    return path


def test_until_it_is_recovered_the_reader_is_told(tmp_path: Path) -> None:
    dies_growing(tmp_path)
    with dm.open(NODE) as image:
        with pytest.raises(dm.BitmapError, match="'dirtmap recover' adopts the new size"):
            _ = image["b0"]
        (how,) = [item.how for item in image.recover()]
        assert how.startswith("exact: ")
        assert how.endswith(f"from byte {SIZE} on it is new, and dirty")
    assert set(dirty(NODE, "b0")) == {3} | NEW
    no_traces(tmp_path)


def test_node_resize_adopts_it_as_well(tmp_path: Path) -> None:
    dies_growing(tmp_path)
    with Store(str(tmp_path / "default.dmap")) as store:
        assert resize_node(store, "drive0") == LARGER
    assert set(dirty(NODE, "b0")) == {3} | NEW


@pytest.mark.parametrize("act", ["written", "longer", "shorter"])
def test_what_others_do_afterwards_is_noticed(tmp_path: Path, act: str) -> None:
    path = dies_growing(tmp_path)
    time.sleep(0.7)  # half a second is the tracker's, since it was about to write
    if act == "written":
        with path.open("r+b") as file:
            file.write(b"x")
    else:
        os.truncate(path, LARGER + 512 if act == "longer" else SIZE)
    assert set(recover(NODE).values()) == {"all dirty"}
    with dm.open(NODE) as image:
        assert image.size == path.stat().st_size
        assert model_of(image["b0"]).all()


# At random moments.

STEP = 1 << 20
MOST = SIZE + 400 * STEP


def growing(seed: int, shared: Shared, sizes: mmap.mmap, path: Path) -> None:
    """Marks by threads, beside cuts and saves, while the disk grows again and again, until the process is killed."""
    rng = random.Random(seed)
    opened = dm.open(NODE)
    tracker = opened.track(save_interval=0, region_size=1 << 20)
    bare = seed % 2 == 0

    def work(number: int) -> None:
        own = random.Random(seed * 10 + number)
        while True:
            offset, length = own.randrange(tracker.size - (1 << 18)), own.choice((512, 4096, 1 << 18))
            mark(shared.asked, offset, length)
            if bare and own.random() < 0.5:
                tracker.mark(offset, length)
                mark(shared.returned, offset, length)
            else:
                with tracker.write(offset, length):
                    mark(shared.returned, offset, length)

    for number in range(3):
        threading.Thread(target=work, args=(number,), daemon=True).start()
    shared.started[0] = 1
    cuts = 0
    while True:
        way = rng.random()
        if way < 0.2:
            tracker.save()
        elif way < 0.4:
            cuts += 1
            tracker.checkpoint(f"c{cuts}")
        elif tracker.size < MOST:
            size = tracker.size + rng.choice((512, STEP, 3 * STEP - 512))
            mark(shared.asked, tracker.size, size - tracker.size)
            tracker.resize(size)
            sizes[:8] = size.to_bytes(8, "little")  # it has returned
        time.sleep(rng.random() * 0.002)


def kill_often(folder: Path, kills: int, seed: int = 0) -> None:
    rng, grown = random.Random(seed), 0
    for number in range(kills):
        work = folder / str(number)
        work.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DIRTMAP_STORE", str(work / "default.dmap"))
            patch.setenv("DIRTMAP_INDEX", str(work / "index"))
            path = make_node(work, SIZE)
            shared, sizes = Shared(2 * MOST // GRANULE), mmap.mmap(-1, 4096)
            kill(functools.partial(growing, seed + number, shared, sizes, path), shared, rng, 0.25)
            returned, size = int.from_bytes(sizes[:8], "little") or SIZE, path.stat().st_size
            grown += size > SIZE
            assert set(recover(NODE).values()) == {"exact"}
            with dm.open(NODE) as image:
                assert image.size == size >= returned
                found = model_of(image["b0"])
            lost = np.flatnonzero(shared.returned[: len(found)] & ~found)
            assert not len(lost), (number, lost)
            assert found[COUNT:].all(), number
            more = np.flatnonzero(found[:COUNT] & ~shared.asked[:COUNT])
            assert not len(more), (number, more)
            with dm.open(NODE) as image, image.track():
                pass  # takes away the log that was being made
            no_traces(work)
        shutil.rmtree(work)
    assert grown > kills // 3


def test_killed_at_random_moments(tmp_path: Path) -> None:
    kill_often(tmp_path, 15)


@pytest.mark.long
def test_killed_at_many_random_moments(tmp_path: Path) -> None:
    kill_often(tmp_path, 500, seed=1000)


# Power loss at any moment, with any sectors of what was written since the last sync.


class Grown(tuple[str, int]):
    """The image was made longer, or its length is durable."""


@pytest.mark.parametrize(("root", "seed"), [(raw_here, 1), (raw_elsewhere, 2)], ids=lambda v: getattr(v, "__name__", v))
def test_power_loss_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Callable[[Path], Path], seed: int
) -> None:
    path = make(tmp_path, root)
    recording, rng = Recording(), random.Random(seed)
    recorder = recording.files()

    class Files(recorder):  # type: ignore[valid-type, misc]
        def truncate(self, size: int) -> None:
            super().truncate(size)
            recording.events.append(Grown(("longer", size)))

        def sync(self) -> None:
            if self.abspath == str(path):
                os.fdatasync(self.fd)
                recording.events.append(Grown(("durable", 0)))
            else:
                super().sync()

    def mark_one() -> None:
        offset = rng.randrange(tracker.size)
        tracker.mark(offset, 1)
        recording.events.append(("marked", offset // GRANULE))

    grow_home = Tracker._grow_home

    def grown_home(growing: Tracker, *arguments: Any) -> None:
        mark_one()  # between the commits, when records of both sizes are there
        grow_home(growing, *arguments)
        mark_one()

    monkeypatch.setattr(Tracker, "_grow_home", grown_home)
    sizes = [SIZE, SIZE + 3 * GRANULE, 4 * SIZE, 4 * SIZE + 512, 5 * SIZE]
    opened = dm.open("disk0")
    with fileio.using(Files):
        tracker = opened.track(save_interval=0, region_size=1 << 20)
        recording.events.append("begun")
        for size in sizes:
            if size > tracker.size:
                tracker.resize(size)
                recording.events.append(("resized", size))
            for _ in range(10):
                mark_one()
                if rng.random() < 0.1:
                    tracker.save()
                if rng.random() < 0.1:
                    tracker.checkpoint(f"c{len(recording.events)}")
    live_path = os.fsdecode(tracker._session.live)
    lose(tracker)
    shutil.rmtree(live_path)
    opened.close()
    # This test makes the image shorter and longer itself, and can put back the time of the last write alone.
    monkeypatch.setattr(view, "identity_of", lambda path: replace(identity_of(path), ctime_ns=0))
    begun, modified = recording.events.index("begun"), path.stat()
    logs = {event.path for event in recording.events if isinstance(event, Written) and event.path.endswith(".intent")}
    assert len(logs) == 1
    known = 0
    for at, disks in recording.states(rng, 120):
        if at <= begun:
            continue
        forget_index(tmp_path)
        marked, resized, least, most = set[int](), SIZE, SIZE, SIZE
        for event in recording.events[:at]:
            if isinstance(event, Grown):
                most, least = (event[1], least) if event[0] == "longer" else (most, most)
            elif isinstance(event, tuple) and event[0] == "marked":
                marked.add(event[1])
            elif isinstance(event, tuple) and event[0] == "resized":
                resized = event[1]
        size = rng.choice((least, most))
        assert size >= resized
        os.truncate(path, size)
        os.utime(path, ns=(modified.st_atime_ns, modified.st_mtime_ns))
        for name, disk in disks.items():
            if name != str(path):
                Path(name).write_bytes(disk)
        for target in rng.sample(BOTH, 2):
            done = recover(target)
            assert set(done.values()) <= {"logged regions"}, (at, target, done)
        for target, bitmap in ((DEVICE, "d0"), (NODE, "b0")):
            with dm.open(target) as image:
                assert image.size == size
            found = set(dirty(target, bitmap))
            assert marked <= found, (at, target, marked - found)
            assert set(range(COUNT, size // GRANULE)) <= found, (at, target)
        known += 1
    assert known > 80
