"""A tracker interrupted at any line of any act, by Ctrl-C or a signal's exception, and then used as if nothing were.

A child tracks. In the middle of an act an exception comes from nowhere; the child catches it, and goes on to mark, to
cut and to save, as far as it is let. Then it dies, or closes; or the power fails, and the live files are gone. Every
mark that had returned has to be in every bitmap that was recording.
"""

from __future__ import annotations

import contextlib
import linecache
import mmap
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Final, Self

import numpy as np
import pytest
from support.failing import COUNT, killed, node_with_live_files
from support.tracking import GRANULE, forget_index, lost, mark

import dirtmap.engine as dm
from dirtmap.engine.session import livefile
from dirtmap.engine.tracking import kernel as marking
from dirtmap.engine.tracking.tracker import Tracker
from dirtmap.fmt.errors import Error

_NEVER: Final = 1 << 30
HERE = {os.path.dirname(module.__file__) for module in (marking, livefile)}  # tracking and session


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return node_with_live_files(tmp_path, monkeypatch)


class Interruption(BaseException):
    """What comes from nowhere."""


class Interrupted:
    """While active: after so many lines of the tracker's code an exception comes."""

    def __init__(self, line: int) -> None:
        self.left = line

    def __enter__(self) -> Self:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    @staticmethod
    def _is_with(frame: FrameType) -> bool:
        return linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with ")

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        if os.path.dirname(frame.f_code.co_filename) not in HERE:
            return None
        # At the end of a block a line event of its ``with`` comes before the lock is given back; Ctrl-C never does.
        if event == "line" and not self._is_with(frame):
            self.left -= 1
            if self.left == 0:
                raise Interruption
        return self._trace


ACTS: dict[str, Callable[[Tracker], object]] = {
    "mark": lambda tracker: tracker.mark(50 << 20, 1),
    "begin": lambda tracker: tracker.end(tracker.begin(50 << 20, 1)),
    "mark many": lambda tracker: tracker.mark_many([i * GRANULE for i in range(300, 600)], [1] * 300),
    "checkpoint": lambda tracker: tracker.checkpoint("monday"),
    "finer": lambda tracker: tracker.add("fine", 4096),
    "save": lambda tracker: tracker.save(),
    "take": lambda tracker: tracker.take("taken"),
    "enable": lambda tracker: tracker.enable("off"),
}


class Shared:
    """What the child has done, where its death takes nothing."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, COUNT + 8)
        self.returned = np.frombuffer(self._map, np.uint8, COUNT)
        self.lines = np.frombuffer(self._map, np.int64, 1, COUNT)  # of the act


def child(shared: Shared, act: Callable[[Tracker], object], line: int, *, closing: bool) -> None:
    tracker = dm.open("node:drive0").track(save_interval=0, region_size=1 << 20)
    tracker.add("off", recording=False)

    def marked(granule: int) -> None:
        tracker.mark(granule * GRANULE, 1)
        mark(shared.returned, granule * GRANULE, 1)

    marked(1)
    marked(2)
    tracker.save()
    marked(3)
    with contextlib.suppress(Interruption), Interrupted(line) as interrupted:
        act(tracker)
    shared.lines[0] = line - interrupted.left
    later: list[Callable[[], object]] = [
        lambda: marked(3),
        lambda: marked(5),
        tracker.save,
        lambda: marked(5),
        lambda: marked(6),
        lambda: tracker.checkpoint("tuesday"),
        lambda: marked(7),
        tracker.save,
        lambda: marked(7),
        lambda: tracker.checkpoint("wednesday"),
        tracker.save,
        lambda: marked(8),
    ]
    for step in later:
        with contextlib.suppress(Error):
            step()
    if closing:
        with contextlib.suppress(Error):
            tracker.close()


def in_child(shared: Shared, act: str, line: int, *, closing: bool) -> None:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(30)
            child(shared, ACTS[act], line, closing=closing)
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, line


ENDS = ["dies", "power fails", "closes"]


def interrupt(folder: Path, act: str, end: str, most: int) -> None:
    """Does so at no more than so many lines of the act, evenly: at others for each end."""
    kept = folder / "kept"
    shutil.copy(folder / "default.dmap", kept)
    waiting = [_NEVER]  # first, to count them
    while waiting:
        line = waiting.pop()
        shared = Shared()
        in_child(shared, act, line, closing=end == "closes")
        if end == "power fails":
            shutil.rmtree(folder / "live")
            (folder / "live").mkdir()
        with dm.open("node:drive0") as image:
            found = [image["b0"], image["taken"]]
            image.recover()
            found += [image["b0"], image["taken"]]
            for bitmap in found:
                assert not lost(shared.returned, bitmap), line
            if end == "dies":
                assert found[0].count <= (300 + 16) * GRANULE  # not merely all dirty
        if line == _NEVER:
            count = int(shared.lines[0])
            assert count > 5
            step = -(-count // most)
            waiting = list(range(1 + ENDS.index(end) * step // len(ENDS), count + 1, step))
        shutil.copy(kept, folder / "default.dmap")
        forget_index(folder)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("act", ACTS)
def test_an_exception_at_some_lines(folder: Path, act: str, end: str) -> None:
    interrupt(folder, act, end, 6)


@pytest.mark.long
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("act", ACTS)
def test_an_exception_at_any_line(folder: Path, act: str, end: str) -> None:
    interrupt(folder, act, end, 1 << 30)


# Handlers of signals, which do not raise but act.


class Handled:
    """While active: behind so many operations of the tracker's code something else is done, as by a signal's handler.

    A signal is handled between any two of them, lines or not.
    """

    def __init__(self, operation: int, handle: Callable[[], object]) -> None:
        self.left, self._handle = operation, handle

    def __enter__(self) -> Self:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        if os.path.dirname(frame.f_code.co_filename) not in HERE:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                with contextlib.suppress(Error):
                    self._handle()
        return self._trace


HANDLERS: dict[str, Callable[[Tracker], object]] = {
    "save": lambda tracker: tracker.save(),
    "cut": lambda tracker: tracker.checkpoint("nested"),
    "close": lambda tracker: tracker.close(),
    "all": lambda tracker: [tracker.save(), tracker.checkpoint("nested"), tracker.save()],
}


def handle(folder: Path, act: str, handler: str, most: int) -> None:
    """Handles a signal behind no more than so many operations of the act, evenly."""
    kept = folder / "kept"
    shutil.copy(folder / "default.dmap", kept)
    shared = Shared()

    def work(tracker: Tracker) -> None:
        def marked(granule: int) -> None:
            tracker.mark(granule * GRANULE, 1)
            mark(shared.returned, granule * GRANULE, 1)

        def handled() -> None:
            marked(700)  # of a region that is not logged yet
            if handler != "mark":
                HANDLERS[handler](tracker)

        signal.alarm(30)
        tracker.add("off", recording=False)
        marked(1)
        with contextlib.suppress(Error), Handled(operation, handled) as tracing:
            ACTS[act](tracker)
        shared.lines[0] = operation - tracing.left
        for step in (lambda: marked(5), tracker.save, lambda: marked(6)):
            with contextlib.suppress(Error):
                step()

    waiting = [_NEVER]  # first, to count them
    while waiting:
        operation = waiting.pop()
        shared.returned[:] = 0
        killed(work)
        lost_power = operation % 2
        if lost_power:
            shutil.rmtree(folder / "live")
            (folder / "live").mkdir()
        with dm.open("node:drive0") as image:
            for bitmap in (image["b0"], image["taken"]):
                assert not lost(shared.returned, bitmap), operation
                if not lost_power:
                    assert bitmap.count <= (300 + 16) * GRANULE, "not merely all dirty"
            image.recover()
        if operation == _NEVER:
            count = int(shared.lines[0])
            waiting = list(range(1 + count % 7, count + 1, -(-count // most)))
        shutil.copy(kept, folder / "default.dmap")
        forget_index(folder)


@pytest.mark.parametrize("handler", ["mark", *HANDLERS])
@pytest.mark.parametrize("act", ["mark", "checkpoint", "save"])
def test_a_handler_behind_some_operations(folder: Path, act: str, handler: str) -> None:
    handle(folder, act, handler, 12 if handler == "mark" else 6)


@pytest.mark.long
@pytest.mark.parametrize("handler", ["mark", *HANDLERS])
@pytest.mark.parametrize("act", ["mark", "begin", "mark many", "checkpoint", "finer", "save", "take"])
def test_a_handler_behind_any_operation(folder: Path, act: str, handler: str) -> None:
    handle(folder, act, handler, 1 << 30)
