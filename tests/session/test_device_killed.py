"""A tracker of a device dies before any act on a disk, in the middle of everything, or with the power."""

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
from pathlib import Path

import numpy as np
import pytest
from support import qemu
from support.devices import (
    BOTH,
    COUNT,
    DEVICE,
    EXACT,
    LOGGED,
    NODE,
    both,
    dirty,
    in_child,
    lose_tmpfs,
    made_in,
    make,
    no_traces,
    on_every_root,
    qcow2,
    recover,
)
from support.power import REGION, SIZE, Recording, expected, use
from support.tracking import GRANULE, Shared, count_down, forget_index, kill, mark, model_of

import dirtmap.engine as dm
from dirtmap.engine.system import file as fileio
from dirtmap.engine.system import livefs

STEP = 11  # of the points at which a short run dies


def die_at(point: int, folder: Path) -> set[int]:
    """A tracker that dies before the n-th write, sync or live file of anything; returns the granules it has marked."""
    granules, begun = (3, 20, 900), mmap.mmap(-1, 4096)
    with dm.open(NODE) as root:
        node = root.uuid

    def act() -> None:
        left = [point]
        count_down(
            left,
            (fileio.File, "write"),
            (fileio.File, "sync"),
            (livefs, "create_live"),
            (livefs, "remove_live_files"),
        )
        with dm.open("disk0") as image:
            tracker = image.track(save_interval=0, region_size=1 << 20)
            for number, granule in enumerate(granules):
                with tracker.write(granule * GRANULE, 1):
                    begun[number] = 1
                if number == 0:
                    tracker.save()
                if number == 1:
                    tracker.checkpoint("monday")
                    tracker.checkpoint("monday", namespace=node)
            tracker.close()
        if left[0] > 0:
            begun[8] = 1
        os.kill(os.getpid(), signal.SIGKILL)

    in_child(act)
    if begun[8]:
        raise EOFError
    return {granule for number, granule in enumerate(granules) if begun[number]}


def dies_everywhere(folder: Path, root: Callable[[Path], Path], points: range, *, power: bool) -> int:
    """Killed before every n-th act on a disk, between the commits of two stores, too; with ``power``: tmpfs is lost."""
    made = folder / "made"
    made.mkdir()
    rng, wide = random.Random(0), 0
    for point in points:
        work = folder / f"{point}"
        with made_in(work, root):
            try:
                marked = die_at(point, work)
            except EOFError:
                return wide
            if power:
                lose_tmpfs()
            for target in rng.sample(BOTH, 2):
                name = "d0" if target == DEVICE else "b0"
                found = set(dirty(target, name))
                assert marked <= found, (point, target, marked, len(found))
                if not power and not found <= {3, 20, 900}:
                    # All dirty only where a qcow2 root's image was being changed for check-out or check-in.
                    assert (root, target, len(found)) == (qcow2, DEVICE, COUNT), (point, target, found)
                    wide += 1
                recover(target)
                assert set(dirty(target, name)) == found, (point, target)
            with dm.open("disk0") as image, image.track() as tracker:
                tracker.mark(5 * GRANULE, 1)
            device, node = both()
            assert {5, *marked} <= set(device), point
            assert {5, *marked} <= set(node), point
            if root is qcow2:
                qemu.qemu_img("check", "-r", "leaks", work / "drive0.qcow2")  # leaks, and nothing worse
            no_traces(work)
        shutil.rmtree(work)
    raise AssertionError("it never came to its end")


@pytest.mark.parametrize("power", [False, True], ids=["killed", "power loss"])
@on_every_root
def test_dead_before_any_act_on_a_disk(tmp_path: Path, root: Callable[[Path], Path], power: bool) -> None:
    print(dies_everywhere(tmp_path, root, range(1 + power, 1000, STEP), power=power), "times all dirty")


@pytest.mark.long
@pytest.mark.parametrize("power", [False, True], ids=["killed", "power loss"])
@on_every_root
def test_dead_before_every_act_on_a_disk(tmp_path: Path, root: Callable[[Path], Path], power: bool) -> None:
    print(dies_everywhere(tmp_path, root, range(1, 1000), power=power), "times all dirty")


def lose_power(folder: Path, root: Callable[[Path], Path], seed: int, acts: int, crashes: int) -> int:
    """Runs a device's tracker to its end, then tries what crashes may leave, sector by sector; returns how many.

    Every second checkpoint is one of the root.
    """
    make(folder, root)
    with dm.open(NODE) as node:
        namespaces = None, node.uuid
    with dm.open(DEVICE) as image, image.transaction() as bitmaps:
        bitmaps["b1"] = dm.Bitmap(SIZE)
    recording, rng = Recording(), random.Random(seed)
    with fileio.using(recording.files()), dm.open("disk0") as image:
        with image.track(save_interval=0, region_size=REGION) as tracker:
            recording.events.append("begun")
            use(recording, tracker, rng, acts, namespaces)
            recording.events.append("closing")
        recording.events.append("closed")
    # As the tracker left them, whatever the recovery from an earlier crash has written since.
    ended = {path: os.stat(path) for path in recording.originals if os.path.exists(path)}
    times = {path: (found.st_atime_ns, found.st_mtime_ns) for path, found in ended.items()}
    begun, closing, closed = map(recording.events.index, ("begun", "closing", "closed"))
    for at, disks in recording.states(rng, crashes):
        forget_index(folder)
        for path, disk in disks.items():
            Path(path).write_bytes(disk)
            if path in times:
                os.utime(path, ns=times[path])
        least, most, since = expected(recording.events[:at])
        how: dict[str, str] = {}
        for target in rng.sample(BOTH, 2):
            how |= recover(target)
        for target, name in ((DEVICE, "d0"), (NODE, "b0")):
            with dm.open(target) as image:
                assert image.tracking() is None
                found = {name: model_of(image[name]) for name in image}
            assert not (least & ~found[name]).any(), f"event {at}: {name} lost {np.flatnonzero(least & ~found[name])}"
            if begun < at <= closing:
                assert how.get(name, LOGGED) == LOGGED, f"event {at}: {how}"
            if begun < at <= closing or at > closed or root is not qcow2:
                assert not (found[name] & ~most).any(), f"event {at}: {name} not bounded: {how}"
            names = [name for name in found if name.startswith("c")]
            for name, model in since.items():  # durable once the cut has returned
                if int(name.removeprefix("c")) % 2 == (target == NODE):
                    union = np.bitwise_or.reduce([found[later] for later in names[names.index(name) :]])
                    assert not (model & ~union).any(), f"event {at}: {name} lost {np.flatnonzero(model & ~union)}"
    return crashes


@on_every_root
def test_power_loss_at_any_moment_loses_no_mark_of_either(tmp_path: Path, root: Callable[[Path], Path]) -> None:
    print(lose_power(tmp_path, root, 1, 60, 60), "crashes")


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
@on_every_root
def test_power_loss_at_any_of_many_moments_loses_no_mark_of_either(
    tmp_path: Path, root: Callable[[Path], Path], seed: int
) -> None:
    print(lose_power(tmp_path, root, 100 + seed, 200, 500), "crashes")


def tracking(seed: int, shared: Shared, path: Path) -> None:
    """What the child does until it is killed: marks by threads, with writes to a raw root, beside cuts and saves.

    The cuts are the device's, or its root's.
    """
    rng = random.Random(seed)
    fd = os.open(path, os.O_RDWR)
    tracker = dm.open("disk0").track(save_interval=0, region_size=1 << 20)
    with dm.open(NODE) as node:
        namespaces = None, node.uuid

    def work(number: int) -> None:
        own = random.Random(seed * 10 + number)
        while True:
            offset, length = own.randrange(SIZE - (1 << 18)), own.choice((512, 4096, 1 << 18))
            mark(shared.asked, offset, length)
            with tracker.write(offset, length):
                mark(shared.returned, offset, length)
                if path.suffix == ".raw":
                    os.pwrite(fd, b"x", offset)
            time.sleep(0.001)

    for number in range(3):
        threading.Thread(target=work, args=(number,), daemon=True).start()
    shared.started[0] = 1
    cuts = 0
    while True:
        if rng.random() < 0.5:
            tracker.save()
        else:
            cuts += 1
            tracker.checkpoint(f"c{seed}-{cuts}", namespace=rng.choice(namespaces))


def kill_often(folder: Path, kills: int, root: Callable[[Path], Path]) -> int:
    """Kills trackers of a device; both namespaces have what had returned, and no more than was asked for."""
    path = make(folder, root)
    shared, rng = Shared(COUNT), random.Random(kills)
    for number in range(kills):
        kill(functools.partial(tracking, number, shared, path), shared, rng, 0.05)
        for target in rng.sample(BOTH, 2):
            with dm.open(target) as image:
                name = "d0" if target == DEVICE else "b0"
                before = model_of(image[name])
                how = {item.how.partition(":")[0] for item in image.recover()}
            with dm.open(target) as image:
                after = model_of(image[name])
            assert np.array_equal(before, after), (number, target)
            assert not (shared.returned & ~after).any(), (number, target, "lost")
            assert not (after & ~shared.asked).any(), (number, target, "more than was marked")
            assert how <= {EXACT}, (number, target, how)
        for target in BOTH:
            with dm.open(target) as image, image.transaction() as bitmaps:
                for name in [name for name in bitmaps if name not in ("d0", "b0")]:
                    del bitmaps[name]
    return kills


@on_every_root
def test_every_mark_that_returned_survives_sigkill_in_both(tmp_path: Path, root: Callable[[Path], Path]) -> None:
    print(kill_often(tmp_path, 6, root), "processes killed")
    no_traces(tmp_path)


@pytest.mark.long
@on_every_root
def test_every_mark_that_returned_survives_hundreds_of_sigkills_in_both(
    tmp_path: Path, root: Callable[[Path], Path]
) -> None:
    print(kill_often(tmp_path, int(os.environ.get("K", 300)), root), "processes killed")
