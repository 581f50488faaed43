"""Live files that are not as a tracker leaves them are none; and no more of them is read than they should have."""

from __future__ import annotations

import os
import resource
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
from dirtmap.fmt.parsers.live import CONTROL, DESCRIPTOR, WRITESET

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
            while not tracker._arena.is_ready(SIZE, 16):
                time.sleep(0.01)
            tracker._arena.take(3, SIZE, 16)  # as in the middle of a cut
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    with dm.open("node:drive0") as image:
        assert image.tracking().how.startswith("exact")
        return Path(image.tracking().live)


def put(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def with_fields(folder: Path, **fields: Any) -> None:
    """Changes the control file."""
    put(folder / "control", 0, changed(CONTROL, (folder / "control").read_bytes(), **fields))


def with_current(folder: Path, number: int) -> None:
    with_fields(folder, state=number << 32 | 2)


def with_descriptor(folder: Path, number: int, **fields: Any) -> None:
    """Changes where the control file says that the bits of an interval are."""
    at = live.DESCRIPTORS + number % live.MAX_DESCRIPTORS * DESCRIPTOR.size
    put(folder / "control", at, changed(DESCRIPTOR, (folder / "control").read_bytes(), at, **fields))


def buffer_of(folder: Path, number: int) -> int:
    """Where in `bits` the header of an interval's buffer is."""
    data, at = (folder / "bits").read_bytes(), live.PAGE
    while (head := WRITESET.parse(data, at)).number != number:
        at += live.PAGE + head.room
    return at


def with_head(folder: Path, number: int, **fields: Any) -> None:
    """Changes the header of a writeset."""
    at = buffer_of(folder, number)
    put(folder / "bits", at, changed(WRITESET, (folder / "bits").read_bytes(), at, **fields))


def set_in_spare(folder: Path) -> None:
    put(folder / "bits", buffer_of(folder, 3) + live.PAGE + 5, b"\1")


def grown(name: str, size: int) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, size)


WRONG: dict[str, Callable[[Path], object]] = {
    "current below oldest": lambda folder: with_current(folder, 0),
    "current one too low": lambda folder: with_current(folder, 1),
    "current two too high": lambda folder: with_current(folder, 4),
    "current absurd": lambda folder: with_fields(folder, state=2**64 - 1),
    "another session": lambda folder: with_fields(folder, uuid=bytes(16)),
    "another byte order": lambda folder: with_fields(folder, order=0x0807060504030201),
    "another version": lambda folder: with_fields(folder, version=2),
    "a control file that is short": grown("control", live.PAGE - 1),
    "a control file that is long": grown("control", live.CONTROL_BYTES + 1),
    "a control file that is huge": grown("control", 1 << 40),
    "bits of another session": lambda folder: put(folder / "bits", 8, bytes(16)),
    "bits that are short": lambda folder: os.truncate(folder / "bits", buffer_of(folder, 2) + live.PAGE + 64),
    "bits that are gone": lambda folder: (folder / "bits").unlink(),
    "a writeset that is missing": lambda folder: with_descriptor(folder, 1, interval=0),
    "a writeset behind the end": lambda folder: with_descriptor(folder, 1, offset=1 << 40),
    "a writeset at no place that can be": lambda folder: with_descriptor(folder, 1, offset=2**64 - 8),
    "a writeset in another's place": lambda folder: with_descriptor(folder, 1, offset=buffer_of(folder, 2) + live.PAGE),
    "a writeset of another size": lambda folder: with_head(folder, 2, size=SIZE // 2),
    "a writeset of a granularity that cannot be": lambda folder: with_head(folder, 2, granularity_bits=2**64 - 1),
    "a writeset of another granularity": lambda folder: with_head(folder, 1, granularity_bits=20),
    "a descriptor of another granularity": lambda folder: with_descriptor(folder, 1, granularity_bits=20),
    "a descriptor of more bits": lambda folder: with_descriptor(folder, 1, bytes=1 << 40),
    "marks in an interval that has not begun": set_in_spare,
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
    bad = {("control", 0), ("control", live.DESCRIPTORS), ("bits", 0)}
    bad |= {("bits", buffer_of(dead, number)) for number in (1, 2)}
    for name, pages in (("control", 5), ("bits", 1), *(("bits", buffer_of(dead, number)) for number in (1, 2, 3))):
        first, end = (0, pages * live.PAGE) if pages < 10 else (pages, pages + live.PAGE)
        for offset in range(first, end, SECTOR):
            whole = (dead / name).read_bytes()[offset : offset + SECTOR]
            put(dead / name, offset, bytes(SECTOR))
            with dm.open("node:drive0") as image:
                expected = "logged regions" if (name, offset) in bad else "exact"
                assert image.tracking().how.startswith(expected), (name, offset)
                assert all(model_of(image[name])[granule] for name, granule in (("b0", 1), ("c1", 2), ("c2", 9)))
            put(dead / name, offset, whole)


def test_every_sector_of_the_control_file_taken_from_another_is_none(dead: Path) -> None:
    put(dead / "control", 0, (dead / "bits").read_bytes()[:SECTOR])
    with dm.open("node:drive0") as image:
        assert image.tracking().how.startswith("logged regions")


def test_bits_may_be_longer_than_what_is_in_use(dead: Path) -> None:
    os.truncate(dead / "bits", 1 << 40)
    with dm.open("node:drive0") as image:
        assert image.tracking().how.startswith("exact")


def test_a_hole_is_not_read_to_see_that_nothing_is_marked_later(dead: Path) -> None:
    at, room, data = (dead / "bits").stat().st_size, 1 << 40, (dead / "bits").read_bytes()
    put(dead / "bits", at, changed(WRITESET, data[buffer_of(dead, 3) :][: live.PAGE], number=7, room=room))
    os.truncate(dead / "bits", at + live.PAGE + room)
    shown = "import dirtmap.engine as dm; print(dm.open('node:drive0').tracking().how)"
    command = [sys.executable, "-c", shown]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.startswith("exact")
    put(dead / "bits", at + live.PAGE + room - 1, b"\1")
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("logged regions")


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


def test_hundreds_of_writesets_are_read_in_little_time_and_memory(dead: Path, tmp_path: Path) -> None:
    last = live.MAX_INTERVALS
    bits = (dead / "bits").read_bytes()
    head = WRITESET.parse(bits, buffer_of(dead, 2))
    one = bits[buffer_of(dead, 2) :][: live.PAGE + head.room]
    control = CONTROL.parse((dead / "control").read_bytes())
    with Store(str(tmp_path / "default.dmap")) as target:
        record = target.record(b"drive0")
    assert record
    session = recovery.session_of(record)
    assert session
    with (dead / "bits").open("ab") as file:
        for number in range(3, session.oldest + last):
            with_descriptor(dead, number, interval=number + 1, offset=file.tell() + live.PAGE, granularity_bits=16)
            with_descriptor(dead, number, bytes=SIZE // GRANULE // 8)
            file.write(changed(WRITESET, one, number=number) + one[WRITESET.size :])
    with_current(dead, session.oldest + last - 1)
    asked = "import re, time, dirtmap.engine as dm; a = time.process_time(); how = dm.open('node:drive0').tracking()"
    peak = r"re.search(r'VmHWM:\s*(\d+)', open('/proc/self/status').read())[1]"  # that of getrusage can be our own
    told = f"print(how.intervals, how.how.split(':')[0], time.process_time() - a, {peak}, sep='|')"
    command = [sys.executable, "-c", f"{asked}; {told}"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    intervals, how, seconds, kibibytes = shown.strip().split("|")
    assert (int(intervals), how) == (last, "exact")
    assert float(seconds) < 2
    assert int(kibibytes) < 256 << 10
    with_current(dead, session.oldest + last)
    with dm.open("node:drive0") as image:
        assert image.tracking().how.startswith("logged regions")
    assert control.state >> 32 == 2


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
