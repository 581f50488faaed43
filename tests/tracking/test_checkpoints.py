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
    for _ in range(choose.randrange(4, 10)):
        act = choose.choice(
            ("mark", "mark", "mark", "checkpoint", "checkpoint", "save", "remove", "rebuild", "rebuild")
        )
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
            elif act == "remove":
                tracker.remove(name)
            elif name in since:
                rebuild(tracker, since, name, granule)
        except dm.BitmapError:
            continue
        answers += hold_against(since, tracker)
    return answers


def rebuild(tracker: Tracker, since: Since, name: str, granule: int) -> None:
    """As whoever knows what the disk was when the checkpoint began; something is written meanwhile."""
    tracker.checkpoint("begun")
    differing = dm.Bitmap.from_extents(SIZE, [at * GRANULE for at in since[name]], [1] * len(since[name]), GRANULE)
    tracker.mark(granule * GRANULE, 1)
    for written in since.values():
        written.add(granule)
    try:
        tracker.rebuild(name, "begun", differing)
    except dm.BitmapError:
        tracker.remove("begun")
        raise
    assert "begun" not in tracker.checkpoints()
    if tracker.checkpoints()[-1] == name:
        found = np.flatnonzero(model_of(tracker.changed_since(name))).tolist()
        assert found == sorted(since[name])


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
        changes.merge(bitmaps, name, [bitmaps[choose.choice([*bitmaps, "a"])]])
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


def test_what_cannot_be_rebuilt_is_said_and_stays(tmp_path: Path) -> None:
    make_node(tmp_path, SIZE)
    differing = dm.Bitmap(SIZE, GRANULE)
    with dm.open("node:drive0") as image:
        with image.track(save_interval=0) as tracker:
            for name in ("a", "b", "c"):
                tracker.checkpoint(name)
                tracker.mark(0, 1)
            for name, begun, what in (
                ("a", "b", "'b': not the newest"),
                ("c", "c", "'c': not the newest"),
                ("b0", "c", "'b0': not a checkpoint"),
                ("a", "none", "'none': not the newest"),
            ):
                with pytest.raises(dm.BitmapError, match=what):
                    tracker.rebuild(name, begun, differing)
                assert tracker.checkpoints() == ["a", "b", "c"]
            with pytest.raises(dm.BitmapError, match="when compared"):  # it has grown since
                tracker.rebuild("b", "c", dm.Bitmap(SIZE - GRANULE, GRANULE))
        with Home(ALONE, str(tmp_path / "default.dmap"), b"drive0").change(None) as home:
            del home.entries["b"]
        with image.track(save_interval=0) as tracker:
            # Nobody knows what was written after "a" and before "c": whoever has compared it does.
            with pytest.raises(dm.BitmapError, match="not all that was written"):
                tracker.changed_since("a")
            tracker.checkpoint("begun")
            tracker.mark(GRANULE, 1)
            tracker.rebuild("a", "begun", differing)
            assert tracker.checkpoints() == ["a", "c"]
            assert tracker.changed_since("a").count == 2 * GRANULE  # and what "c" has
        with Home(ALONE, str(tmp_path / "default.dmap"), b"drive0").change(None) as home:
            home.entries["c"] = home.entries["c"].with_flags(clear=FLAG_AUTO)
        with image.track(save_interval=0) as tracker:
            tracker.checkpoint("begun")
            with pytest.raises(dm.BitmapError, match="a later checkpoint"):
                tracker.rebuild("a", "begun", differing)
