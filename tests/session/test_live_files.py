"""Live files that are not as a tracker leaves them are none; and no more of them is read than they should have."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.cli import dirtmap, json_of
from support.structures import changed
from support.tracking import GRANULE, make_node, model_of

import dirtmap.engine as dm
from dirtmap.engine.session import livefile
from dirtmap.engine.session import view as recovery
from dirtmap.engine.storefile.file import Store
from dirtmap.fmt import live
from dirtmap.fmt.live import build_session
from dirtmap.fmt.parsers.live import CONTROL, WRITESET

SIZE = 64 << 20
SECTOR = 512
MARKED = (1, 2, 9)  # granules: one in an interval that is saved, then one in each of two others


@pytest.fixture
def dead(tmp_path: Path) -> Path:
    """The live folder of a tracker that has died: interval 0 is saved, 1 is frozen, 2 is current."""
    make_node(tmp_path, SIZE)
    pid = os.fork()
    if pid == 0:
        try:
            tracker = dm.open("node:drive0").track(save_interval=0, region_size=1 << 20)
            with tracker.write(MARKED[0] * GRANULE, 1):
                pass
            tracker.checkpoint("c1")
            tracker.save()
            with tracker.write(MARKED[1] * GRANULE, 1):
                pass
            tracker.checkpoint("c2")
            with tracker.write(MARKED[2] * GRANULE, 1):
                pass
            while tracker._spare is None:
                time.sleep(0.01)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    with dm.open("node:drive0") as image:
        assert image.tracking().how.startswith("exact")
        return Path(image.tracking().live)


def with_fields(folder: Path, **fields: Any) -> None:
    """Changes the control file."""
    data = changed(CONTROL, (folder / "control").read_bytes(), **fields)
    (folder / "control").write_bytes(data.ljust(live.PAGE, b"\0"))


def with_head(folder: Path, number: int, **fields: Any) -> None:
    """Changes the header of a writeset."""
    path = folder / f"writeset-{number}"
    data = path.read_bytes()
    head = changed(WRITESET, data, **fields)
    path.write_bytes(head + data[len(head) :])


def set_in_spare(folder: Path) -> None:
    path = folder / "writeset-3"
    data = bytearray(path.read_bytes())
    data[live.PAGE + 5] = 1
    path.write_bytes(data)


def copied(old: str, new: str) -> Callable[[Path], object]:
    return lambda folder: shutil.copy(folder / old, folder / new)


def grown(name: str, size: int) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, size)


WRONG: dict[str, Callable[[Path], object]] = {
    "current below oldest": lambda folder: with_fields(folder, current=0),
    "current one too low": lambda folder: with_fields(folder, current=1),
    "current two too high": lambda folder: with_fields(folder, current=4),
    "current absurd": lambda folder: with_fields(folder, current=2**64 - 1),
    "another session": lambda folder: with_fields(folder, uuid=bytes(16)),
    "a control file that is short": grown("control", live.PAGE - 1),
    "a control file that is long": grown("control", live.PAGE + 1),
    "a control file that is huge": grown("control", 1 << 40),
    "a writeset that is short": grown("writeset-2", live.PAGE),
    "a writeset that is long": grown("writeset-2", live.PAGE + 1024),
    "a writeset that is huge": grown("writeset-1", 1 << 40),
    "a writeset that is missing": lambda folder: (folder / "writeset-1").unlink(),
    "a writeset in another's place": copied("writeset-2", "writeset-1"),
    "a writeset of another size": lambda folder: with_head(folder, 2, size=SIZE // 2),
    "a writeset of a granularity that cannot be": lambda folder: with_head(folder, 2, granularity_bits=2**64 - 1),
    "a writeset of another granularity": lambda folder: with_head(folder, 1, granularity_bits=20),
    "marks in an interval that has not begun": set_in_spare,
    "an interval that cannot be": copied("writeset-3", "writeset-4"),
    "a folder in a file's place": lambda folder: ((folder / "control").unlink(), (folder / "control").mkdir()),
    "a link": lambda folder: ((folder / "control").rename(folder / "x"), (folder / "control").symlink_to("x")),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_live_files_that_are_not_as_described_are_none(dead: Path, wrong: str) -> None:
    WRONG[wrong](dead)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    with dm.open("node:drive0") as image:
        assert image.tracking().how.startswith("logged regions"), image.tracking().how
        assert image.tracking().intervals == 0
        assert all(model_of(image[name])[granule] for name, granule in (("b0", 1), ("c1", 2), ("c2", 9)))
        assert time.monotonic() - began < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    assert "logged regions" in dirtmap("track", "status", "drive0").out
    assert json_of("track", "status", "drive0")["recovery"].startswith("logged regions")


def test_every_sector_of_the_live_files_zeroed_hides_no_mark(dead: Path) -> None:
    """Those of a header make the file none; bits have no checksum, and are in memory only: see SPEC.md."""
    for name in ("control", "writeset-1", "writeset-2", "writeset-3"):
        path = dead / name
        whole = path.read_bytes()
        for offset in range(0, live.PAGE, SECTOR):
            path.write_bytes(whole[:offset] + bytes(SECTOR) + whole[offset + SECTOR :])
            with dm.open("node:drive0") as image:
                expected = "exact" if offset or name == "writeset-3" else "logged regions"
                assert image.tracking().how.startswith(expected), (name, offset)
                assert all(model_of(image[name])[granule] for name, granule in (("b0", 1), ("c1", 2), ("c2", 9)))
        path.write_bytes(whole)


def test_every_sector_of_the_control_file_taken_from_another_is_none(dead: Path) -> None:
    other = (dead / "writeset-2").read_bytes()
    whole = (dead / "control").read_bytes()
    (dead / "control").write_bytes(other[:SECTOR] + whole[SECTOR:])
    with dm.open("node:drive0") as image:
        assert image.tracking().how.startswith("logged regions")


def test_live_files_of_another_boot_are_none(dead: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for boot in (b"x" * 16, bytes(16)):
        monkeypatch.setattr(recovery, "boot_id", lambda boot=boot: boot)
        with dm.open("node:drive0") as image:
            assert image.tracking().how.startswith("logged regions")
            assert image.tracking().intervals == 0


def test_a_boot_that_is_not_known_is_no_boot(dead: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither the tracker nor the reader could tell which boot it was."""
    with Store(str(tmp_path / "default.dmap")) as target, target.change() as changed:
        record = changed.table.get(b"drive0")
        assert record
        session = recovery.session_of(record)
        assert session
        unknown = build_session(type(session)(**{**vars_of(session), "boot_id": bytes(16)}))
        kinds = [(kind, unknown if data == build_session(session) else data) for kind, data in record.extensions]
        changed.table.put(type(record)(**{**vars_of(record), "extensions": tuple(kinds)}))
    monkeypatch.setattr(recovery, "boot_id", lambda: bytes(16))
    with dm.open("node:drive0") as image:
        assert image.tracking().how.startswith("logged regions")


def vars_of(value: object) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__slots__}  # type: ignore[attr-defined]


def test_thousands_of_writesets_are_read_in_little_time_and_memory(dead: Path, tmp_path: Path) -> None:
    last = live.MAX_INTERVALS
    data = (dead / "writeset-2").read_bytes()
    control = CONTROL.parse((dead / "control").read_bytes())
    with Store(str(tmp_path / "default.dmap")) as target:
        record = target.record(b"drive0")
    assert record
    session = recovery.session_of(record)
    assert session
    for number in range(3, session.oldest + last):
        head = changed(WRITESET, data, number=number)
        (dead / f"writeset-{number}").write_bytes(head + data[len(head) :])
    with_fields(dead, current=session.oldest + last - 1)
    asked = "import re, time, dirtmap.engine as dm; a = time.process_time(); how = dm.open('node:drive0').tracking()"
    peak = r"re.search(r'VmHWM:\s*(\d+)', open('/proc/self/status').read())[1]"  # that of getrusage can be our own
    told = f"print(how.intervals, how.how.split(':')[0], time.process_time() - a, {peak}, sep='|')"
    command = [sys.executable, "-c", f"{asked}; {told}"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    intervals, how, seconds, kibibytes = shown.strip().split("|")
    assert (int(intervals), how) == (last, "exact")
    assert float(seconds) < 2
    assert int(kibibytes) < 256 << 10
    with_fields(dead, current=session.oldest + last)
    shutil.copy(dead / f"writeset-{session.oldest + last - 1}", dead / f"writeset-{session.oldest + last}")
    with dm.open("node:drive0") as image:
        assert image.tracking().how.startswith("logged regions")
    assert control.current == 2


def test_a_tracker_saves_before_it_makes_more_intervals_than_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MAX_INTERVALS", 4)
    make_node(tmp_path, SIZE)
    with dm.open("node:drive0") as image, image.track(save_interval=0) as tracker:
        for number in range(12):
            tracker.mark(number * GRANULE, 1)
            tracker.checkpoint(f"c{number}")
            assert image.tracking().alive
            assert image.tracking().intervals <= 4
        assert model_of(tracker.changed_since("c3")).nonzero()[0].tolist() == list(range(4, 12))


def test_a_living_tracker_is_read_while_it_cuts(tmp_path: Path) -> None:
    make_node(tmp_path, SIZE)
    with dm.open("node:drive0") as image, image.track(save_interval=0) as tracker:
        tracker.mark(0, 1)
        status = image.tracking()
        assert (status.alive, status.intervals) == (True, 1)
        found = livefile.find(status.live, tracker._session.uuid, 0, SIZE)
        assert found
        assert found.current == 0
