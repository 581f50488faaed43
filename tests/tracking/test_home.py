"""A home believes what its own last commit has left, as long as that is the store's newest commit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.tracking import GRANULE, damage_directory, make_node

import dirtmap.engine as dm
from dirtmap.engine.storefile.file import Change, Snapshot, Store
from dirtmap.engine.tracking.home import Home, HomeView
from dirtmap.engine.tracking.tracker import Tracker

SIZE = 64 << 20
TIME = 0x7E57  # type of a record's extension that nobody knows, and anybody may ignore
ACTS: list[Callable[[Tracker], object]] = [
    lambda tracker: tracker.add("fine", 4096),
    lambda tracker: tracker.mark(0, 5 * GRANULE),
    lambda tracker: tracker.checkpoint("monday"),
    lambda tracker: tracker.save(),
    lambda tracker: tracker.clear("b0"),
    lambda tracker: tracker.checkpoint("tuesday"),
    lambda tracker: tracker.disable("fine"),
    lambda tracker: tracker.enable("fine"),
    lambda tracker: tracker.change([("rename", {"fine": "finest"})]),
    lambda tracker: tracker.release(tracker.hold(["b0"])),
    lambda tracker: tracker.remove("monday"),
    lambda tracker: tracker.resize(2 * SIZE),
    lambda tracker: tracker.take("b0"),
    lambda tracker: tracker.drop("b0"),
    lambda tracker: tracker.save(),
]


def home_of(tracker: Tracker) -> Home:
    return tracker._home


def same(home: Home) -> None:
    """What is believed is what is read."""

    def compare(snapshot: Snapshot) -> None:
        left, view = home._left_at(snapshot), home.view(snapshot)
        assert left
        believed = HomeView(snapshot, left.record, left)
        for what in ("record", "session", "entries", "found", "checkpoints"):
            assert getattr(believed, what) == getattr(view, what), what

    home.store.read(compare)


def test_what_a_commit_has_left_is_what_is_read(tmp_path: Path) -> None:
    make_node(tmp_path, SIZE)
    with dm.open("node:drive0") as image, image.track(save_interval=0) as tracker:
        for act in ACTS:
            act(tracker)
            same(home_of(tracker))


def test_what_a_commit_has_left_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_node(tmp_path, SIZE)
    with dm.open("node:drive0") as image, image.track(save_interval=0) as tracker:
        tracker.clear("b0")
        monkeypatch.setattr("dirtmap.engine.tracking.home.read_entries", None)
        tracker.checkpoint("monday")
        assert tracker.checkpoints() == ["monday"]
        monkeypatch.undo()


def test_a_commit_by_somebody_else_is_seen(tmp_path: Path) -> None:
    make_node(tmp_path, SIZE)
    with dm.open("node:drive0") as image, image.track(save_interval=0) as tracker:
        tracker.clear("b0")
        with Store(str(tmp_path / "default.dmap")) as other, other.change() as change:
            record = change.table.get(b"drive0")
            assert record
            change.table.put(replace(record, extensions=(*record.extensions, (TIME, b"noon"))))
        assert home_of(tracker).store.read(home_of(tracker)._left_at) is None
        tracker.checkpoint("monday")
        with Store(str(tmp_path / "default.dmap")) as other:
            record = other.record(b"drive0")
        assert record
        assert record.extension(TIME) == b"noon"
        same(home_of(tracker))


def test_a_change_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what it would have committed is believed, nor has it changed what is."""

    def fail(self: Change) -> None:
        raise dm.StorageError("store", "injected")

    make_node(tmp_path, SIZE)
    with dm.open("node:drive0") as image, image.track(save_interval=0) as tracker:
        tracker.checkpoint("monday")
        with monkeypatch.context() as patch:
            patch.setattr(Change, "commit", fail)
            with contextlib.suppress(dm.StorageError):
                tracker.checkpoint("tuesday")
        assert tracker.checkpoints() == ["monday"]
        same(home_of(tracker))


def test_a_directory_that_is_damaged_is_written_anew_by_the_next_commit(tmp_path: Path) -> None:
    """The tracker knows what was in it, as long as nobody else has changed the store."""
    make_node(tmp_path, SIZE)
    path = tmp_path / "default.dmap"
    with dm.open("node:drive0") as image, image.track(save_interval=0) as tracker:
        tracker.checkpoint("monday")
        damage_directory(path)
        with pytest.raises(dm.FormatError, match="directory of node 'drive0'"):
            list(image)
        tracker.mark(0, 1)
        tracker.save()
        assert list(image) == ["b0", "monday"]
        assert image["monday"].count == GRANULE
        assert dm.check(path).corruptions == 0
