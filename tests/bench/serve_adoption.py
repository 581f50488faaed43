"""How long a write waits at most while a tracker is killed and another one takes its disk over: `make bench-serve`."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import fio, server
from support.cli import COMMAND
from support.server import SIZE, Started
from support.tracking import make_node

nothing_goes_on = server.nothing_goes_on

JOBS, SECONDS = 8, 2.0
TURNS = int(os.environ.get("TURNS") or 20)
RARE = "99.990000"  # percent of the writes, in fio's words: it tells a stop from one slow write


def test_adoption(benchmark: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """In each turn once with, and once without: then another process of Python starts at the same moment."""
    make_node(tmp_path, SIZE)
    trackers = [Started(tmp_path)]

    def adopt() -> None:
        trackers[-1].kill(tracker=True, nbdkit=False)
        trackers[-1].wait()
        trackers.append(Started(tmp_path, "--adopt"))

    def look() -> None:
        subprocess.run([COMMAND, "track", "status", "drive0"], check=True, capture_output=True)

    def waits(act: Callable[[], None]) -> tuple[float, float]:
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(fio.write, trackers[0].sock, "randwrite", 4096, JOBS, SIZE, SECONDS)
            time.sleep(SECONDS / 3)
            act()
            took = writing.result()["clat_ns"]
            return float(took["max"]) * 1e-9, float(took["percentile"][RARE]) * 1e-9

    found: dict[str, list[tuple[float, float]]] = {"without": [], "with": []}

    def turn() -> None:
        acts = [("without", look), ("with", adopt)]
        for name, act in acts[:: 1 if len(found["with"]) % 2 else -1]:
            found[name].append(waits(act))

    benchmark.pedantic(turn, rounds=TURNS)
    assert trackers[-1].end() == 0
    benchmark.extra_info.update(adoption=found, jobs=JOBS, seconds=SECONDS)
    with capsys.disabled():
        told = {name: [tuple(round(s * 1e3, 1) for s in each) for each in some] for name, some in found.items()}
        print(f"\nthe longest wait of a write, and that of {RARE} %, in ms: {told}")
