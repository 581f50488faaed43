"""A node whose tracker fails or dies, and one that has."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import dirtmap.engine as dm
from dirtmap.engine.tracking.tracker import Tracker
from support.tracking import GRANULE, make_node

SIZE = 64 << 20
COUNT = SIZE // GRANULE


def node_with_live_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``drive0``, which has two recording bitmaps, and live files in a folder that can be taken away."""
    monkeypatch.setenv("DIRTMAP_LIVE", str(folder / "live"))
    (folder / "live").mkdir()
    make_node(folder, SIZE)
    with dm.open("node:drive0") as image, image.transaction() as bitmaps:
        bitmaps["taken"] = dm.Bitmap(SIZE)
    return folder


def killed(work: Callable[[Tracker], object]) -> None:
    """A tracker that did some work, and died."""
    pid = os.fork()
    if pid == 0:
        try:
            work(dm.open("node:drive0").track(save_interval=0, region_size=1 << 20))
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
