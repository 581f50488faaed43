"""SIGKILL of real tracking processes at random moments: every mark that had returned is there, exactly.

What a process has marked is in shared memory: a byte for each granule, set before the call, and another set after it
returned. Recovered must be what had returned, and nothing that had not been asked for.
"""

from __future__ import annotations

import functools
import os
import random
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from support.tracking import GRANULE, Model, Shared, files_in, kill, make_node, mark, model_of

import dirtmap.engine as dm
from dirtmap.engine.session import livefile

SIZE = 256 << 20
COUNT = SIZE // GRANULE
EXACT = "exact: the tracker's process ended without closing"


def tracking(seed: int, shared: Shared, image: Path) -> None:
    """What the child does until it is killed: marks by threads, beside cuts and saves."""
    rng = random.Random(seed)
    opened = dm.open("node:drive0")
    tracker = opened.track(save_interval=0, region_size=1 << 20)
    fd = os.open(image, os.O_RDWR)
    # With bare marks, or without: recovery judges the image's time of change in two ways.
    bare = seed % 2 == 0

    def work(number: int) -> None:
        own = random.Random(seed * 10 + number)
        while True:
            offset, length = own.randrange(SIZE - (1 << 18)), own.choice((512, 4096, 1 << 18))
            mark(shared.asked, offset, length)
            if bare and own.random() < 0.5:
                tracker.mark(offset, length)
                mark(shared.returned, offset, length)
            else:
                with tracker.write(offset, length):
                    mark(shared.returned, offset, length)
                    os.pwrite(fd, b"x", offset)

    for number in range(3):
        threading.Thread(target=work, args=(number,), daemon=True).start()
    shared.started[0] = 1
    cuts = 0
    while True:
        way = rng.random()
        if way < 0.3:
            tracker.save()
        elif way < 0.6:
            cuts += 1
            tracker.checkpoint(f"c{seed}-{cuts}")
        elif way < 0.7 and len(tracker.checkpoints()) > 3:
            tracker.remove(tracker.checkpoints()[1])
        time.sleep(rng.random() * 0.003)


def union(image: dm.Namespace) -> Model:
    """What any checkpoint has."""
    found = [model_of(image[name]) for name in image if name != "b0"]
    return np.bitwise_or.reduce(found) if found else np.zeros(COUNT, np.uint8)


def kill_often(folder: Path, kills: int, seed: int = 0) -> int:
    """Kills trackers; returns how many marks were in doubt when one died, at most."""
    path = make_node(folder, SIZE)
    shared = Shared(COUNT)
    rng = random.Random(seed)
    for number in range(kills):
        work = functools.partial(tracking, seed + number, shared, path)
        kill(work, shared, rng, 0.03, early=0.02)
        with dm.open("node:drive0") as image:
            before = model_of(image["b0"])  # shown at once, before anything is written
            how = image.recover()
            after = model_of(image["b0"])
            assert np.array_equal(before, after), f"kill {number}"
            assert not (shared.returned & ~after).any(), (
                f"kill {number}: lost {np.flatnonzero(shared.returned & ~after)}"
            )
            assert not (after & ~shared.asked).any(), f"kill {number}: more than was marked"
            assert {item.how.partition(",")[0] for item in how} <= {EXACT}, f"kill {number}: {how}"
            if number % 10 == 9:  # begin anew: all clean
                with image.transaction() as bitmaps:
                    for name in list(bitmaps):
                        del bitmaps[name]
                    bitmaps["b0"] = dm.Bitmap(SIZE)
                shared.asked[:] = shared.returned[:] = 0
    with dm.open("node:drive0") as image, image.track():
        pass  # takes away what a process left that was killed while it began
    name = uuid.UUID(image.uuid).hex
    assert not os.path.exists(os.path.join(livefile.user_folder(livefile.default_folder()), name))
    assert files_in(folder) == ["default.dmap", "drive0.raw"]
    return kills


def test_every_mark_that_returned_survives_sigkill(tmp_path: Path) -> None:
    print(kill_often(tmp_path, 25), "processes killed")


@pytest.mark.long
def test_every_mark_that_returned_survives_thousands_of_sigkills(tmp_path: Path) -> None:
    print(kill_often(tmp_path, int(os.environ.get("K", 2000)), seed=1000), "processes killed")
