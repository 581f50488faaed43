"""Many processes commit to one store while others read it, and some are killed: nothing is lost, nothing read is wrong.

Every writer has a node of its own, and all have a common one. A commit number `k` of writer `w` does all this at once:

    node w     "v": words made from k, every one of them; "a" and "b": a granule moves from one to the other
    common     "counters": word w becomes k

What was begun and what has returned is written down in memory that all processes share, so whoever reads `k` can say
whether it may be: no less than what had returned before, no more than what was begun after.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support import store_crash
from support.hostless import stored

import dirtmap.engine as dm
from dirtmap.engine.model import changes
from dirtmap.engine.namespaces.changing import transaction
from dirtmap.engine.namespaces.compact import compact
from dirtmap.engine.namespaces.condition import Condition
from dirtmap.engine.namespaces.nodes import add_node
from dirtmap.engine.storefile.directory import read_entries
from dirtmap.engine.storefile.file import Snapshot, Store, create
from dirtmap.engine.system import file as fileio
from dirtmap.engine.system.file import File

WRITERS = 16
READERS = 3
GRANULARITY = 4096
WORDS = 256
GRANULES = WORDS * 64
SIZE = GRANULES * GRANULARITY

Words = NDArray[np.uint64]


@dataclass
class Board:
    """What all processes see; arrays of int64, one for each writer.

    Attributes:
        begun: the number of the latest commit that was begun.
        returned: of the latest that is known to be done.
        stop: set to 1 when it is time to end.
        refused: how often a commit came too late for its turn.
        reads: by the readers, one for each of them.
    """

    path: str
    begun: NDArray[np.int64]
    returned: NDArray[np.int64]
    refused: NDArray[np.int64]
    reads: NDArray[np.int64]
    stop: NDArray[np.int64]


@pytest.fixture
def board(tmp_path: Path) -> Board:
    path = tmp_path / "store"
    create(str(path))
    with Store(str(path)) as target:
        for name in [*map(str, range(WRITERS)), "common"]:
            image = tmp_path / f"image {name}"
            image.touch()
            os.truncate(image, SIZE)
            add_node(target, name, str(image))
        with transaction(target) as namespaces:
            for number in range(WRITERS):
                bitmaps = namespaces[str(number)]
                changes.put(bitmaps, "v", bitmap(pattern(0)))
                changes.add(bitmaps, "a", GRANULARITY)
                changes.add(bitmaps, "b", GRANULARITY)
                changes.mark(bitmaps, "b", [0], [SIZE])
            changes.add(namespaces["common"], "counters", GRANULARITY)
    # Anonymous and shared: processes made by fork have the same.
    numbers = np.frombuffer(mmap.mmap(-1, 8 * (3 * WRITERS + READERS + 1)), np.int64)
    return Board(str(path), *np.split(numbers, np.cumsum([WRITERS, WRITERS, WRITERS, READERS])))


def bitmap(words: Words) -> dm.Bitmap:
    return dm.Bitmap.from_packed(SIZE, GRANULARITY, words)


def pattern(k: int) -> Words:
    """Words that tell `k`, and whether they belong together."""
    words = (np.arange(WORDS, dtype=np.uint64) + np.uint64(k)) * np.uint64(0x9E3779B97F4A7C15)
    words[0] = k
    return words


def number_in(words: Words) -> int:
    k = int(words[0])
    assert np.array_equal(words, pattern(k)), f"not of one commit: {k}"
    return k


def write(board: Board, number: int) -> None:
    """Commits until told to stop."""
    rng = random.Random(time.monotonic_ns() ^ number)
    me = str(number)
    with Store(board.path) as target, stored(target, me) as image:
        k = number_in(image["v"].words)
        assert board.returned[number] <= k <= board.begun[number]
        board.returned[number] = k
        while not board.stop[0]:
            k += 1
            board.begun[number] = k
            try:
                with transaction(target) as namespaces:
                    own, common = namespaces[me], namespaces["common"]
                    own["v"] = bitmap(pattern(k))
                    granule = k % GRANULES * GRANULARITY
                    there, here = ("a", "b") if granule in dirty(own["b"]) else ("b", "a")
                    own[there].mark(granule, GRANULARITY)
                    own[here].clear(granule, GRANULARITY)
                    if "now and then" in own:
                        changes.remove(own, "now and then")
                    elif rng.random() < 0.3:
                        changes.put(own, "now and then", own[rng.choice("abv")])
                    counters = common["counters"].words.copy()
                    assert counters[number] == k - 1
                    counters[number] = k
                    common["counters"] = bitmap(counters)
            except dm.LockedError:
                board.refused[number] += 1
                k -= 1
                continue
            board.returned[number] = k
            if rng.random() < 0.01:
                with contextlib.suppress(dm.LockedError):
                    compact(board.path)


class dirty:
    """The granules of a bitmap, by their offset in bytes."""

    def __init__(self, bitmap: dm.Bitmap) -> None:
        self.words = bitmap.words

    def __contains__(self, offset: int) -> bool:
        granule = offset // GRANULARITY
        return bool(int(self.words[granule // 64]) >> granule % 64 & 1)


def read(board: Board, number: int) -> None:
    """Reads until told to stop, in every way there is."""
    rng = random.Random(number)
    with Store(board.path) as target, stored(target, "common") as common:
        while not board.stop[0]:
            writer = rng.randrange(WRITERS)
            image = stored(target, str(writer))
            least = board.returned.copy()
            way = rng.randrange(5)
            if way == 0:
                k = number_in(image["v"].words)
            elif way == 1:
                counters = common["counters"].words[:WRITERS].astype(np.int64)
                assert (least <= counters).all()
                assert (counters <= board.begun).all()
                k = int(counters[writer])
            elif way == 2:
                counts = {info.name: info.count for info in image.info().bitmaps}
                assert counts["a"] + counts["b"] == SIZE  # type: ignore[operator]
                continue
            elif way == 3:
                # Two namespaces as of one commit.
                k, counted = target.read(lambda snapshot, writer=writer: both(snapshot, writer))
                assert k == counted
            else:
                with dm.open(f"node:{writer}", store=board.path) as opened:
                    k = number_in(opened["v"].words)
            assert least[writer] <= k <= board.begun[writer], f"{least[writer]} <= {k} <= {board.begun[writer]}"
            board.reads[number] += 1


def both(snapshot: Snapshot, writer: int) -> tuple[int, int]:
    table = snapshot.table()

    def words(node: bytes, name: bytes) -> Words:
        record = table.get(node)
        assert record
        (entry,) = [entry for entry in read_entries(snapshot, record) if entry.name == name]
        return Condition(snapshot, record).bitmap(entry, doubted=False).words

    own = words(str(writer).encode(), b"v")
    return int(own[0]), int(words(b"common", b"counters")[writer])


def started(act: Callable[[Board, int], None], board: Board, number: int) -> BaseProcess:
    def run() -> None:
        try:
            act(board, number)
        except BaseException:
            with open(f"{board.path}.failure", "a") as file:
                file.write(f"{act.__name__} {number}:\n{traceback.format_exc()}\n")
            os._exit(1)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def hammer(board: Board, seconds: float) -> None:
    rng = random.Random(1)
    writers = [started(write, board, number) for number in range(WRITERS)]
    readers = [started(read, board, number) for number in range(READERS)]
    killed = 0
    try:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not os.path.exists(f"{board.path}.failure"):
            time.sleep(rng.uniform(0.02, 0.1))
            number = rng.randrange(WRITERS)
            process = writers[number]
            assert process.pid
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed += 1
            writers[number] = started(write, board, number)
        board.stop[0] = 1
        for process in [*writers, *readers]:
            process.join(30)
    finally:
        for process in [*writers, *readers]:
            process.kill()
            process.join()
    failure = Path(f"{board.path}.failure")
    assert not failure.exists(), failure.read_text()
    assert all(process.exitcode == 0 for process in [*writers, *readers])
    commits, reads = int(board.returned.sum()), int(board.reads.sum())
    print(f"{commits} commits, {int(board.refused.sum())} refused, {reads} reads, {killed} writers killed")
    assert commits > WRITERS
    assert (board.reads > 0).all()

    report = dm.check(board.path)
    assert (report.corruptions, report.leaks, report.check_errors) == (0, 0, 0)
    store_crash.contents(Path(board.path).read_bytes())
    with Store(board.path) as target:
        counters = stored(target, "common")["counters"].words
        for number in range(WRITERS):
            image = stored(target, str(number))
            k = number_in(image["v"].words)
            assert k == counters[number]
            assert k == board.returned[number]  # all have ended by themselves
            assert (image["a"] ^ image["b"]).count == SIZE
    # A killed compaction leaves its unfinished file behind; nothing else does.
    for leftover in Path(board.path).parent.glob("store.*.tmp"):
        leftover.unlink()


def test_writers_and_readers_of_one_store(board: Board, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        hammer(board, 6)


@pytest.mark.long
def test_writers_and_readers_of_one_store_for_long(board: Board, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        hammer(board, 30)


# One reader, overtaken at every point.


def commit(path: str) -> None:
    """Makes the next number of what both bitmaps of node 0 hold; the clusters that they had are soon used again."""
    with Store(path) as target, stored(target, "0").transaction() as bitmaps:
        following = bitmap(pattern(number_in(bitmaps["v"].words) + 1))
        bitmaps["v"] = bitmaps["w"] = following


def read_one(path: str) -> int:
    with Store(path) as target, stored(target, "0") as image:
        return number_in(image["v"].words)


def read_both(path: str) -> int:
    def both(snapshot: Snapshot) -> int:
        record = snapshot.table().get(b"0")
        assert record
        now = Condition(snapshot, record)
        found = {number_in(now.bitmap(entry, doubted=False).words) for entry in now.entries}
        (number,) = found
        return number

    with Store(path) as target:
        return target.read(both)


def count_all(path: str) -> None:
    v, w = dm.describe(path).bitmaps
    assert v.count == w.count


def check_all(path: str) -> None:
    assert dm.check(path).findings == []


@pytest.mark.parametrize(
    ("commits", "compacting"), [(1, False), (2, False), (3, False), (4, False), (0, True), (2, True)]
)
@pytest.mark.parametrize("act", [read_one, read_both, count_all, check_all])
def test_reader_overtaken_at_every_point(
    act: Callable[[str], int | None], commits: int, compacting: bool, tmp_path: Path
) -> None:
    """Between any two of its reads, others commit: the answer is right as of some moment since it began."""
    path = str(tmp_path / "store")
    create(path)
    with Store(path) as target:
        image = tmp_path / "image"
        image.touch()
        os.truncate(image, SIZE)
        add_node(target, "0", str(image))
        with stored(target, "0").transaction() as bitmaps:
            bitmaps["v"] = bitmaps["w"] = bitmap(pattern(0))
    reads = at = 0

    class Overtaken(File):
        def _before(self) -> None:
            nonlocal reads
            reads += 1
            if reads == at:
                with fileio.using(File):
                    if compacting:
                        compact(path)
                    for _ in range(commits):
                        commit(path)

        def read(self, offset: int, length: int) -> bytes:
            self._before()
            return super().read(offset, length)

        def read_into(self, offset: int, buffer: memoryview) -> None:
            self._before()
            super().read_into(offset, buffer)

    while reads >= at:
        at, reads = at + 1, 0
        least = read_one(path)
        with fileio.using(Overtaken):
            found = act(path)
        if found is not None:
            assert least <= found <= read_one(path)
    assert at > 5
