"""Checkpoints over several sessions, and whatever is done to them between: no answer lacks a write made since."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from support.hostless import ALONE
from support.tracking import GRANULE, make_node, model_of

import dirtmap.engine as dm
from dirtmap.engine.model import changes
from dirtmap.engine.model.transaction import Transaction
from dirtmap.engine.tracking.home import Home
from dirtmap.engine.tracking.tracker import Tracker
from dirtmap.fmt.directory import FLAG_AUTO

GRANULES = 64
SIZE = GRANULES * GRANULE
NAMES = "abcdef"
Since = dict[str, set[int]]  # what was written since each checkpoint was made


def hold_against(since: Since, tracker: Tracker) -> int:
    """Looks at every checkpoint; returns how many had an answer."""
    answers = 0
    for name in tracker.checkpoints():
        try:
            changed = tracker.changed_since(name)
        except dm.BitmapError:
            continue
        found = np.flatnonzero(model_of(changed.at(512).at(GRANULE))).tolist()
        assert since[name] <= set(found), f"{name} of {tracker.checkpoints()}"
        answers += 1
    return answers


def track(tracker: Tracker, since: Since, choose: random.Random) -> int:
    answers = hold_against(since, tracker)
    for _ in range(choose.randrange(8)):
        act = choose.choice(("mark", "mark", "mark", "checkpoint", "checkpoint", "save", "remove"))
        name, granule = choose.choice(NAMES), choose.randrange(GRANULES)
        try:
            if act == "mark":
                tracker.mark(granule * GRANULE, 1)
                for written in since.values():
                    written.add(granule)
            elif act == "checkpoint":
                tracker.checkpoint(name, choose.choice([None, 4096, 1 << 18]))
                since[name] = set()
            elif act == "save":
                tracker.save()
            else:
                tracker.remove(name)
        except dm.BitmapError:
            continue
        answers += hold_against(since, tracker)
    return answers


def change(bitmaps: Transaction, choose: random.Random) -> None:
    name, other = choose.choice([*bitmaps, "a"]), choose.choice(NAMES)
    act = choose.randrange(8)
    if act == 0:
        changes.remove(bitmaps, name)
    elif act == 1:
        changes.clear(bitmaps, name)
    elif act == 2:
        changes.set_recording(bitmaps, name, choose.random() < 0.5)
    elif act == 3:
        changes.rename(bitmaps, name, other)
    elif act == 4:
        changes.add(bitmaps, other)
    elif act == 5:
        changes.merge(bitmaps, name, [bitmaps[choose.choice(list(bitmaps))]])
    elif act == 6:
        bitmaps[name].clear(0, SIZE)
    else:
        bitmaps[other] = bitmaps[name]


def break_it(path: Path, choose: random.Random) -> None:
    """What software does that knows bitmaps, and no checkpoints."""
    with Home(ALONE, str(path), b"drive0").change(None) as home:
        for name, entry in list(home.entries.items()):
            fate = choose.random()
            if fate < 0.3:
                del home.entries[name]
            elif fate < 0.5:
                home.entries[name] = entry.with_flags(clear=FLAG_AUTO)


@pytest.mark.parametrize("seed", range(15))
def test_no_answer_lacks_a_write(tmp_path: Path, seed: int) -> None:
    make_node(tmp_path, SIZE)
    choose, since, answers = random.Random(seed), Since(), 0
    with dm.open("node:drive0") as image:
        for _ in range(4):
            with image.track(save_interval=0) as tracker:
                answers += track(tracker, since, choose)
            for _ in range(choose.randrange(4)):
                try:
                    with image.transaction() as bitmaps:
                        for _ in range(choose.randrange(1, 3)):
                            change(bitmaps, choose)
                except dm.BitmapError:
                    pass
            if choose.random() < 0.4:
                break_it(tmp_path / "default.dmap", choose)
    assert answers
