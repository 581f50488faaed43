"""Markers and trackers that are killed at random, and trackers that take over: a chain of backups misses nothing."""

from __future__ import annotations

import mmap
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.tracking import GRANULE, make_node, model_of

import dirtmap.engine as dm

GRANULES = 256
MARKERS = 3
_NEVER = 1 << 62


class World:
    """What the processes share: the disk, a number for each granule, and how far the backups are.

    Attributes:
        disk, backup: the contents of the granules, and what the chain of backups has of them.
        pending: of each marker, the granule that it is about to write, and 1.
        done: the checkpoint up to which the backups are complete.
        late: ``done``, when the marker died whose last write has not come to the disk yet.
        stop: the tracker ends behind its next backup.
    """

    def __init__(self, folder: Path) -> None:
        words = np.frombuffer(mmap.mmap(-1, 8 * (2 * GRANULES + MARKERS + 3)), np.int64)
        self.disk, self.backup, self.pending, self._rest = np.split(words, np.cumsum([GRANULES, GRANULES, MARKERS]))
        self.live, self.joined, self.wrong = folder / "live", folder / "joined", folder / "wrong"
        self.pids: set[int] = set()
        self.late = _NEVER

    @property
    def done(self) -> int:
        return int(self._rest[0])

    @done.setter
    def done(self, number: int) -> None:
        self._rest[0] = number

    @property
    def late(self) -> int:
        return int(self._rest[1])

    @late.setter
    def late(self, number: int) -> None:
        self._rest[1] = number

    @property
    def stop(self) -> bool:
        return bool(self._rest[2])

    @stop.setter
    def stop(self, value: bool) -> None:
        self._rest[2] = value

    def start(self, act: Callable[[], None]) -> int:
        """Does it in a child, which is killed or ends well."""
        if pid := os.fork():
            self.pids.add(pid)
            return pid
        status = 1
        try:
            signal.alarm(7200)
            act()
            status = 0
        except BaseException:
            self.wrong.write_text(traceback.format_exc())
        finally:
            os._exit(status)

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        self.ends(pid)

    def ends(self, pid: int) -> int:
        """Waits for its end; returns its status."""
        self.pids.discard(pid)
        return os.waitpid(pid, 0)[1]

    def until(self, sign: Path) -> None:
        while not sign.exists():
            assert not self.wrong.exists(), self.wrong.read_text()
            time.sleep(0.001)

    def mark(self, marker: int, seed: int) -> None:
        """Writes to the disk until it is killed."""
        lot = random.Random(seed)
        with dm.Marker(self.live.read_text()) as marks:
            for turn in range(1 << 31):
                granule, length = lot.randrange(GRANULES), lot.randrange(1, GRANULE)
                with marks.write(granule * GRANULE, length):
                    self.pending[marker] = granule + 1
                    time.sleep(lot.random() / 500)
                    self.disk[granule] = seed << 32 | turn
                    self.pending[marker] = 0
                time.sleep(lot.random() / 1000)

    def land(self, marker: int) -> None:
        """What a dead marker had sent on comes to the disk."""
        if granule := int(self.pending[marker]):
            self.disk[granule - 1] += 1 << 31
            self.pending[marker] = 0

    def wait(self) -> None:
        """A process that lives while trackers come and go, so that there is something to take over."""
        with dm.Marker(self.live.read_text()):
            self.joined.touch()
            while True:
                signal.pause()

    def track(self, seed: int) -> None:
        """Cuts, backs up and saves."""
        lot = random.Random(seed)
        with dm.open("node:drive0") as node, node.track(save_interval=0) as tracker:
            self.live.with_suffix(".new").write_bytes(tracker._session.live)
            self.live.with_suffix(".new").rename(self.live)
            while not self.stop:
                self._back_up(tracker)
                if lot.random() < 0.5:
                    tracker.save()
                    self._check(tracker)
            self._back_up(tracker)

    def _back_up(self, tracker: dm.Tracker) -> None:
        last, new = f"c{self.done}", f"c{self.done + 1}"
        names = tracker.checkpoints()
        if not names:
            tracker.checkpoint(last)
        if new not in names:
            while self.late + 2 <= self.done + 1:  # such a write is under way for one more interval, and no longer
                time.sleep(0.0005)
            tracker.checkpoint(new)
        dirty = model_of(tracker.changed_between(last, new)) == 1
        self.backup[dirty] = self.disk[dirty]
        self.done += 1
        for old in tracker.checkpoints():
            if int(old[1:]) < self.done:
                tracker.remove(old)
        self._check(tracker)

    def _check(self, tracker: dm.Tracker) -> None:
        disk = self.disk.copy()  # before the bits are read
        dirty = model_of(tracker.changed_since(f"c{self.done}")) == 1
        missed = np.flatnonzero((disk != self.backup) & ~dirty)
        assert not len(missed), f"granules {missed} since checkpoint c{self.done}"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    for pid in list(made.pids):
        made.kill(pid)


@pytest.mark.parametrize("kills", [60, pytest.param(5_000, marks=pytest.mark.long)])
def test_backups_miss_nothing_whoever_is_killed(tmp_path: Path, world: World, kills: int) -> None:
    make_node(tmp_path, GRANULES * GRANULE)
    lot, seeds = random.Random(1), iter(range(1, 1 << 30))

    def tracker_begins() -> int:
        seed = next(seeds)
        return world.start(lambda: world.track(seed))

    def marker_begins(number: int) -> int:
        seed = next(seeds)
        return world.start(lambda: world.mark(number, seed))

    def marker_dies(number: int) -> None:
        world.late = world.done
        world.kill(markers[number])
        time.sleep(lot.random() / 100)
        world.land(number)
        world.late = _NEVER

    tracker = tracker_begins()
    world.until(world.live)
    world.start(world.wait)
    world.until(world.joined)
    markers = [marker_begins(number) for number in range(MARKERS)]
    while kills and not world.wrong.exists():
        kills -= 1
        time.sleep(lot.random() / 10)
        number = lot.randrange(MARKERS + 1)
        if number < MARKERS:
            marker_dies(number)
            markers[number] = marker_begins(number)
        else:
            world.kill(tracker)
            tracker = tracker_begins()
    for number in range(MARKERS):
        marker_dies(number)
    world.stop = True
    status = world.ends(tracker)
    assert not world.wrong.exists(), world.wrong.read_text()
    assert status == 0
    with dm.open("node:drive0") as node:
        assert np.all(model_of(node["b0"])[world.disk != 0] == 1)
