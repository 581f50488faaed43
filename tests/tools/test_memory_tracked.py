"""Who asks a tracker, and the tracker, have not all bits of a large bitmap in memory: 16 TiB at 4 KiB have 512 MiB."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.large import SIZE, environment, make_large, run_measured

MEBIBYTES = 256
MARKS = 200_000

# A tracker that cannot get more memory of its own. Its live files are not counted, nor what of them is mapped: a tmpfs
# has these.
TRACKER = f"""
import resource, sys
import numpy as np
import dirtmap.engine as dm

with dm.open("disk") as image, image.track(save_interval=0) as tracker:
    places = np.random.default_rng(3).integers(0, {SIZE >> 12}, {MARKS}) << 12
    tracker.mark_many(places, np.full(len(places), 4096))
    with open("/proc/self/status") as status:
        taken = next(int(line.split()[1]) for line in status if line.startswith("VmData")) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (taken + ({MEBIBYTES} << 20),) * 2)
    print("ready", flush=True)
    for line in sys.stdin:
        tracker.save()
        print("saved", flush=True)
print("closed", flush=True)
"""
COMMANDS = [
    "map --totals disk dense",
    "checkpoint add disk night --granularity 4096",
    "mark disk dense --from LINES",
    "merge disk few dense",
    "copy disk dense disk --as copy",
    "map --totals disk copy",
    "map --since night --totals disk",
    "hold disk dense -- true",
    "clear disk copy",
    "track status disk",
]


@pytest.fixture(params=[1 / 256, 1], ids=["little of it in the file", "all bits in the file"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for key, value in environment(tmp_path).items():
        monkeypatch.setenv(key, value)
    yield make_large(tmp_path, request.param)
    (tmp_path / "default.dmap").unlink()  # it is large


@pytest.mark.long
def test_of_a_tracked_disk(folder: Path) -> None:
    (folder / "lines").write_text("".join(f"{number * 16777216} 4096\n" for number in range(SIZE >> 24)))
    command = [sys.executable, "-c", TRACKER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/") as tracker:
        assert tracker.stdin
        assert tracker.stdout
        try:
            assert tracker.stdout.readline() == "ready\n"
            for line in COMMANDS:
                said, _, resident = run_measured(*line.replace("LINES", os.fspath(folder / "lines")).split())
                assert "dirtmap:" not in said, line
                assert resident < MEBIBYTES, f"{line}: {resident} MiB"
                if " map " not in f" {line}":  # it has cut, and so there is one more writeset
                    tracker.stdin.write("\n")
                    tracker.stdin.flush()
                    assert tracker.stdout.readline() == "saved\n", line
        finally:
            said, _ = tracker.communicate()
        assert (said, tracker.returncode) == ("closed\n", 0)
