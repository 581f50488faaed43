"""A tracker of a disk whose bitmaps are too large to be loaded: here one of more than 256 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.child import in_child
from support.tracking import GRANULE, make_node, mark, model_of

import dirtmap.engine as dm
from dirtmap.engine.model import content
from dirtmap.engine.storefile import file as storefile

COUNT = 70_000  # granules: three chunks
SIZE = COUNT * GRANULE


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(content, "LARGE", 256)
    monkeypatch.setattr(content, "BLOCK", 1 << 12)
    monkeypatch.setattr(storefile, "_MOST_PLANNED", 0)
    monkeypatch.setenv("DIRTMAP_STORE", str(tmp_path / "default.dmap"))
    monkeypatch.setenv("DIRTMAP_INDEX", str(tmp_path / "index"))


def test_saved_bits_and_live_ones_are_read_together(tmp_path: Path) -> None:
    make_node(tmp_path, SIZE)
    model = np.zeros(COUNT, np.uint8)
    with dm.open("drive0") as image, image.track(save_interval=0) as tracker:
        tracker.checkpoint("noon")
        for turn in range(4):
            for offset in np.random.default_rng(turn).integers(0, SIZE - 1, 500).tolist():
                tracker.mark(offset, 1)
                mark(model, offset, 1)
            found = tracker.changed_since("noon")
            assert found._words is None or not turn, "what was saved is read by and by"
            assert np.array_equal(model_of(found), model)
            assert np.array_equal(model_of(tracker.bitmap("b0")), model)
            tracker.save()
        tracker.checkpoint("evening")
        tracker.remove("noon")
    with dm.open("drive0") as image:
        assert np.array_equal(model_of(image["b0"]), model)


def test_a_disk_that_grows(tmp_path: Path) -> None:
    path = make_node(tmp_path, SIZE)
    model = np.zeros(COUNT + 10, np.uint8)
    with dm.open("drive0") as image, image.track() as tracker:
        for number in (0, 40_000, COUNT - 1):
            tracker.mark(number * GRANULE, 1)
            model[number] = 1
        tracker.save()
        tracker.resize(SIZE + 10 * GRANULE)
        model[COUNT:] = 1
    assert path.stat().st_size == SIZE + 10 * GRANULE
    with dm.open("drive0") as image:
        assert np.array_equal(model_of(image["b0"]), model)


def test_what_a_killed_tracker_has_marked(tmp_path: Path) -> None:
    make_node(tmp_path, SIZE)

    def killed() -> None:
        tracker = dm.open("drive0").track(save_interval=0)
        tracker.mark(5 * GRANULE, GRANULE)
        tracker.save()
        tracker.mark(50_000 * GRANULE, GRANULE)
        # The child ends without a word.

    in_child(killed)
    with dm.open("drive0") as image:
        before = image["b0"]
        assert before._words is None
        assert np.flatnonzero(model_of(before)).tolist() == [5, 50_000]
        with image.transaction() as bitmaps:  # recovers
            bitmaps["b0"].mark(60_000 * GRANULE, 1)
        assert np.flatnonzero(model_of(image["b0"])).tolist() == [5, 50_000, 60_000]
        assert before.count == 2 * GRANULE
    assert not [finding for finding in dm.check(str(tmp_path / "default.dmap")).findings if finding.severity != "note"]
