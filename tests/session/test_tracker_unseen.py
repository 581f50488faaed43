"""A tracker that cannot be seen is not taken for one that has ended, and is not named as some other process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from support.cli import COMMAND, dirtmap, error_of, json_of
from support.unseen import PLACES, inside, needs_root, runs, started, told

from dirtmap.engine.system import process
from dirtmap.engine.system.process import Process, this_process

SIZE = 8 << 20
UNSEEN = "tracked by a process that cannot be seen from here; "
TRACK = """
import dirtmap.engine as dm
with dm.open("one") as image, image.track() as tracker:
    tracker.mark(0, 1)
    print("tracks", flush=True)
    input()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A raw image `one`, a node with a bitmap `b`."""
    monkeypatch.chdir(tmp_path)
    Path("one.raw").touch()
    os.truncate("one.raw", SIZE)
    dirtmap("node", "add", "one", "one.raw")
    dirtmap("add", "one", "b")
    assert json_of("map", "--dirty", "one", "b") == []


def the_log() -> Path:
    (log,) = Path().glob("*.intent")
    return log


def dirty() -> int:
    return sum(extent["length"] for extent in json_of("map", "--dirty", "one", "b"))


@needs_root
@pytest.mark.parametrize("tracker_is_inside", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_a_tracker_is_named_where_it_can_be_seen_alone(place: str, tracker_is_inside: bool) -> None:
    theirs, ours = (place, "") if tracker_is_inside else ("", place)
    with started(*inside(theirs, sys.executable, "-c", TRACK)):
        runs(*inside(ours, COMMAND, "clear", "one", "b"))  # the tracker does it, which can be asked from there, too
        said = told(*inside(ours, COMMAND, "node", "resize", "one"))
    assert f"{UNSEEN}'dirtmap track stop TARGET' ends it" in said


@needs_root
@pytest.mark.parametrize("tracker_is_inside", [True, False])
def test_a_tracker_without_its_log_counts_as_alive_where_it_cannot_be_seen(tracker_is_inside: bool) -> None:
    theirs, ours = ("both", "") if tracker_is_inside else ("", "both")
    with started(*inside(theirs, sys.executable, "-c", TRACK)):
        log = the_log()
        log.unlink()
        assert f"{UNSEEN}it may have ended, but its log" in told(*inside(ours, COMMAND, "node", "resize", "one"))
        assert log.name in told(*inside(ours, COMMAND, "recover", "one"))
    # It could end its session in peace: what it marked is there.
    assert dirty() == 65536


@needs_root
def test_whoever_knows_that_it_has_ended_can_say_so() -> None:
    with started(sys.executable, "-c", TRACK) as tracker:
        log = the_log()
        log.unlink()
        tracker.kill()
        tracker.wait(60)
    recover = inside("both", COMMAND, "recover", "one")
    assert f"its log {log.absolute()} is gone, which would tell; an empty file there says that it has" in told(*recover)
    log.touch()
    runs(*recover)
    assert dirty() == SIZE


def test_a_tracker_without_its_log_that_has_ended_for_certain_is_recovered(monkeypatch: pytest.MonkeyPatch) -> None:
    with started(sys.executable, "-c", TRACK) as tracker:
        the_log().unlink()
        assert f"(process {tracker.pid}); 'dirtmap track stop TARGET' ends it" in error_of("node", "resize", "one")
        tracker.kill()
        tracker.wait(60)
    with monkeypatch.context() as patched:
        patched.setattr(process, "_sees_all", lambda: False)
        assert f"{UNSEEN}it may have ended" in error_of("node", "resize", "one")
    if process._sees_all():
        dirtmap("recover", "one")
        assert dirty() == 65536  # its live files are there


def test_the_one_that_asks_has_not_ended() -> None:
    me = this_process()
    assert me.is_seen()
    assert not me.has_ended()
    assert str(me).endswith(f"(process {os.getpid()})")
    elsewhere = Process(me.number, me.start, bytes(16))  # as a container's boot id has it
    assert not elsewhere.is_seen()
    assert not elsewhere.has_ended()
    assert str(elsewhere) == elsewhere.address == process.UNSEEN
    assert not Process(me.number, 0, me.boot_id).has_ended()


def test_where_all_can_be_seen_another_start_is_another_process() -> None:
    if not process._sees_all():
        pytest.skip("not all processes of this machine can be seen from here")
    me = this_process()
    assert Process(me.number, me.start + 1, me.boot_id).has_ended()
