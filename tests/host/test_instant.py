"""`Host.instant`: nothing is written to several tracked disks meanwhile, and what fails leaves nothing."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tracking import GRANULE, make_node

import dirtmap.engine as dm
from dirtmap.engine.control import server
from dirtmap.engine.tracking.tracker import Tracker

SIZE = 1 << 20


@pytest.fixture
def images(tmp_path: Path) -> Iterator[list[dm.Handle]]:
    """Two disks, of which a tracker each is in this process."""
    with contextlib.ExitStack() as stack:
        found = []
        for name in ("drive0", "drive1"):
            make_node(tmp_path, SIZE, name)
            found.append(stack.enter_context(dm.open(f"node:{name}")))
        yield found


def test_writes_wait_for_its_end(images: list[dm.Handle]) -> None:
    begun: list[dm.Tracker] = []

    def write(tracker: dm.Tracker) -> None:
        with tracker.write(0, 1):
            begun.append(tracker)

    with images[0].track() as one, images[1].track() as two, dm.Host() as host:
        with host.instant(images) as instant:
            for image in images:
                instant.checkpoint(image, "c")
            writers = [threading.Thread(target=write, args=(tracker,)) for tracker in (one, two)]
            for writer in writers:
                writer.start()
            time.sleep(0.1)
            assert not begun  # although what they will write may be marked already
        for writer in writers:
            writer.join(60)
        assert {id(tracker) for tracker in begun} == {id(one), id(two)}
        assert [tracker.changed_since("c").count for tracker in (one, two)] == [GRANULE, GRANULE]


def test_what_fails_leaves_no_checkpoint_and_holds_nobody_up(images: list[dm.Handle]) -> None:
    with images[0].track() as one, images[1].track() as two, dm.Host() as host:
        one.checkpoint("a")
        two.checkpoint("taken")

        def cut_both() -> None:
            with host.instant(images) as instant:
                instant.checkpoint(images[0], "taken")
                one.mark(0, 1)
                instant.checkpoint(images[1], "taken")

        with pytest.raises(dm.BitmapError, match="taken"):
            cut_both()
        assert one.checkpoints() == ["a"]
        assert one.changed_since("a").count == GRANULE  # which the one before has taken over
        with one.write(0, 1), two.write(0, 1):
            pass
        with pytest.raises(dm.ArgumentError, match="named twice"), host.instant([images[0], images[0]]):
            pass
    with pytest.raises(dm.BitmapError, match="is not tracked"), dm.Host() as host, host.instant(images):
        pass


def test_only_the_disk_that_is_tracked_is_read(images: list[dm.Handle], tmp_path: Path) -> None:
    with images[0].track(), images[1].track(), dm.Host() as host, host.instant(images) as instant:
        for image in images:
            instant.require_file(image, image.disk().path)
        with pytest.raises(dm.LockedError, match="not what its tracker tracks"):
            instant.require_file(images[0], images[1].disk().path)


def test_nobody_is_held_up_while_another_gate_is_waited_for(
    images: list[dm.Handle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And whoever is asked later does not lose patience meanwhile."""
    monkeypatch.setattr(server, "_PATIENCE", 0.2)
    failed: list[BaseException] = []
    asked: list[Tracker] = []
    gated = Tracker.gated
    monkeypatch.setattr(Tracker, "gated", lambda tracker: asked.append(tracker) or gated(tracker))  # type: ignore[func-returns-value]

    def checkpoint(name: str) -> None:
        try:
            with dm.Host() as host:
                host.checkpoint(["drive0", "drive1"], name)
        except BaseException as error:
            failed.append(error)

    with images[0].track(save_interval=0) as one, images[1].track(save_interval=0) as two:
        for number, (taken, free) in enumerate([(one, two), (two, one)]):
            asked.clear()
            with gated(taken):
                thread = threading.Thread(target=checkpoint, args=(f"c{number}",))
                thread.start()
                while taken not in asked:
                    time.sleep(0.001)
                with free.write(0, 1):
                    pass
                time.sleep(0.5)
            thread.join()
            assert not failed
        assert one.checkpoints() == two.checkpoints() == ["c0", "c1"]


def test_a_lost_session_is_not_waited_for(images: list[dm.Handle], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def lost(*arguments: object, **named: object) -> None:
        asked.append(arguments)
        raise dm.GoneError("a store", "has lost this tracker's session")

    with images[0].track(), images[1].track(), dm.Host() as host:
        monkeypatch.setattr(Tracker, "gated", lost)
        with pytest.raises(dm.GoneError, match="has lost this tracker's session"), host.instant(images):
            pass
        assert len(asked) == 1
        monkeypatch.setattr(Tracker, "beginning", lost)
        with pytest.raises(dm.GoneError, match="has lost this tracker's session"), images[0].transaction():
            pass
        assert len(asked) == 2
