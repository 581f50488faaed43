"""The live path beside what Python has for it, bitarray and pyroaring, and beside plain C loops over the same bits."""

from __future__ import annotations

import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pyroaring
import pytest
from bitarray import bitarray
from support.measuring import Against, Peer
from support.tracking import make_node

import dirtmap.engine as dm
from dirtmap.engine.system import file as fileio
from dirtmap.engine.system.file import File
from dirtmap.engine.tracking.tracker import Tracker

SECTION = "Marks of a tracker"
TIB = 1 << 40
GRANULE = 65536
# So few that the numbers themselves stay in the cache; the marks hit as many different places.
MARKS = 1_000
RANGES = 1_000_000
TESTS = Path(__file__).parent.parent


class Unsynced(File):
    """What a cut costs apart from its sync."""

    def sync(self) -> None:
        self._refuse_if_poisoned()


@contextmanager
def tracking(folder: Path, size: int, bitmaps: int = 1) -> Iterator[Tracker]:
    """A tracked node with so many recording bitmaps; all of its regions are logged. A file has less than 16 TiB."""
    make_node(folder, size)
    with dm.open("node:drive0") as image, image.transaction() as changed:
        for number in range(1, bitmaps):
            changed[f"b{number}"] = dm.Bitmap(size)
    with dm.open("node:drive0") as image, image.track(save_interval=0) as tracker:
        log_regions(tracker)
        yield tracker


def log_regions(tracker: Tracker) -> None:
    tracker.mark_many(np.arange(0, tracker.size, 256 << 20), np.ones(tracker.size >> 28, np.int64))


def some_ranges(size: int, longest: int) -> list[tuple[int, int]]:
    rng = random.Random(1)
    return [(rng.randrange((size - 2**20) // 512) * 512, rng.randrange(512, longest + 1)) for _ in range(MARKS)]


@pytest.mark.parametrize(
    ("tib", "longest", "bitmaps"),
    [(1, 512, 1), (1, 4096, 1), (1, 4096, 100), (1, 65536, 1), (1, 2**20, 1), (15, 4096, 1), (15, 2**20, 1)],
)
def test_mark(against: Against, tmp_path: Path, tib: int, longest: int, bitmaps: int) -> None:
    size = tib * TIB
    ranges, array, roaring = some_ranges(size, longest), bitarray(size // GRANULE, endian="little"), pyroaring.BitMap()
    with tracking(tmp_path, size, bitmaps) as tracker:

        def ours() -> None:
            mark = tracker.mark
            for offset, length in ranges:
                mark(offset, length)

        def slices() -> None:
            for offset, length in ranges:
                array[offset >> 16 : ((offset + length - 1) >> 16) + 1] = 1

        def adds() -> None:
            add = roaring.add_range
            for offset, length in ranges:
                add(offset >> 16, ((offset + length - 1) >> 16) + 1)

        many = f", {bitmaps} bitmaps" if bitmaps > 1 else ""
        what = f"tracker.mark, random, up to {longest / 1024:g} KiB, {tib} TiB at 64 KiB{many}"
        peers = {"a bitarray's slice assignment": Peer(slices, 0.5), "pyroaring's add_range": Peer(adds)}
        against(what, ours, peers, calls=MARKS, rounds=301)


def test_begin_and_end(against: Against, tmp_path: Path) -> None:
    ranges = some_ranges(TIB, 4096)
    with tracking(tmp_path, TIB) as tracker:

        def ours() -> None:
            begin, end = tracker.begin, tracker.end
            for offset, length in ranges:
                end(begin(offset, length))

        peers = {"a bare mark": Peer(bare(tracker, ranges), 2)}
        against("tracker.begin and end, random, up to 4 KiB, 1 TiB", ours, peers, calls=MARKS, rounds=301)


def test_write(against: Against, tmp_path: Path) -> None:
    ranges = some_ranges(TIB, 4096)
    with tracking(tmp_path, TIB) as tracker:

        def ours() -> None:
            write = tracker.write
            for offset, length in ranges:
                with write(offset, length):
                    pass

        peers = {"a bare mark": Peer(bare(tracker, ranges), 3)}
        against("with tracker.write, random, up to 4 KiB, 1 TiB", ours, peers, calls=MARKS, rounds=301)


def bare(tracker: Tracker, ranges: list[tuple[int, int]]) -> Callable[[], None]:
    def marks() -> None:
        mark = tracker.mark
        for offset, length in ranges:
            mark(offset, length)

    return marks


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The marking protocol in a program of its own, beside a loop that sets the same bits; and without atomicity."""
    folder, headers = tmp_path_factory.mktemp("marking"), TESTS.parent / "engine" / "tracking"
    found = {"atomic": folder / "marking", "plain": folder / "plain"}
    for name, path in found.items():
        options = ["-O2", "-std=c11", *(["-DPLAIN"] if name == "plain" else []), f"-I{headers}"]
        subprocess.run(["gcc", *options, "-o", path, TESTS / "support" / "marking.c", "-pthread"], check=True)
    return found


@pytest.fixture(scope="module")
def from_c(programs: dict[str, Path]) -> Callable[[int], list[dict[str, float]]]:
    """Times of each thing that the programs do on a disk of so many TiB, by name, in seconds; of five runs of both."""

    @cache
    def runs(tib: int) -> list[dict[str, float]]:
        found: list[dict[str, float]] = [{} for _ in range(5)]
        for times in found:
            for kind, program in programs.items():
                with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
                    command = [program, "bench", folder, str(tib)]
                    done = subprocess.run(command, check=True, capture_output=True, text=True)
                for name, ns in (line.rsplit(" ", 1) for line in done.stdout.splitlines()):
                    times[name if kind == "atomic" else f"{name}, {kind}"] = float(ns) * 1e-9
        return found

    return runs


@pytest.mark.parametrize("tib", [1, 15])
@pytest.mark.parametrize("again", [False, True], ids=["first", "again"])
@pytest.mark.parametrize("which", ["mark", "begin and end", "mark many"])
def test_from_c(
    against: Against, from_c: Callable[[int], list[dict[str, float]]], which: str, again: bool, tib: int
) -> None:
    """Random writes of 4 KiB, to a clean disk or to what is marked already. What ends a write also notes the time.

    At 15 TiB each write waits some 200 ns for memory, to translate an address and to fetch a word. A processor that
    waits goes on until it has as many loads or stores under way as it can keep: 88 and 64 on a Zen 4. A begin and an
    end have some 40 loads and 20 stores, of which 14 and 7 are the clock's, so that some three writes wait at once, and
    of a flat loop a dozen. A flat loop with 40 loads more, all of one line, takes as long as they do. So atomicity
    costs nothing there. Huge pages save 50 of the 200 ns, for a flat loop as well.
    """
    plain = "the same steps without any atomicity"
    name = f"{which}{', again' if again else ''}"
    flat = f"flat loop{', again' if again else ''}"
    runs = iter([{which: one[name], "flat loop": one[flat], plain: one[f"{name}, plain"]} for one in from_c(tib)])
    peers = {
        "flat loop": Peer(lambda: None, 2.5 if tib == 15 else None, limit=True),
        plain: Peer(lambda: None),
    }
    what = f"{which} from C, random, 4 KiB, {tib} TiB at 64 KiB{', marked before' if again else ''}"
    against.told(what, which, lambda: next(runs), peers)


@pytest.mark.parametrize("tib", [1, 15])
def test_mark_many(against: Against, tmp_path: Path, tib: int) -> None:
    size = tib * TIB
    rng = np.random.default_rng(1)
    offsets = rng.integers(0, (size - (1 << 20)) // 4096, RANGES) * 4096
    lengths = rng.integers(1, 257, RANGES) * 4096

    def roaring_by_range() -> None:
        bits = pyroaring.BitMap()
        starts, ends = (offsets >> 16).tolist(), (((offsets + lengths - 1) >> 16) + 1).tolist()
        add = bits.add_range
        for start, end in zip(starts, ends, strict=True):
            add(start, end)

    def roaring_by_granule() -> None:
        starts, ends = offsets >> 16, ((offsets + lengths - 1) >> 16) + 1
        counts = ends - starts
        granules = np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        bits = pyroaring.BitMap()
        bits |= pyroaring.BitMap(granules.astype(np.uint32))

    bitmap = dm.Bitmap(size, GRANULE)
    with tracking(tmp_path, size) as tracker:
        peers = {
            "pyroaring by range": Peer(roaring_by_range, 0.05),
            "pyroaring by granule": Peer(roaring_by_granule, 0.05),
            "Bitmap.mark_many": Peer(lambda: bitmap.mark_many(offsets, lengths), 2, limit=True),
        }
        what = f"tracker.mark_many, a million random ranges of 4 KiB to 1 MiB, {tib} TiB"
        against(what, lambda: tracker.mark_many(offsets, lengths), peers, calls=RANGES, rounds=7)


@pytest.mark.parametrize("soon", [False, True], ids=["alone", "soon after another"])
def test_cut(against: Against, tmp_path: Path, soon: bool) -> None:
    """Whatever is dirty; apart from its sync. Aim: at most 0.5 ms, and 1 ms within 10 ms of another."""
    size = 15 * TIB
    rng = np.random.default_rng(1)
    number = 0
    with fileio.using(Unsynced), tracking(tmp_path, size) as tracker:

        def ready() -> None:
            tracker.mark_many(rng.integers(0, size, 10_000), np.ones(10_000, np.int64))
            time.sleep(0.2)  # for a spare to be made
            if number % 10 == 9:
                tracker.save()
            if soon:
                tracker.clear("b0")

        def cut() -> None:
            nonlocal number
            number += 1
            tracker.clear("b0")

        against("a cut on 15 TiB" + (", right after another" if soon else ""), cut, {}, rounds=50, before=ready)


def test_changed_since(against: Against, tmp_path: Path) -> None:
    size = 15 * TIB
    rng = np.random.default_rng(1)
    with tracking(tmp_path, size) as tracker:
        for number in range(10):
            tracker.checkpoint(f"c{number}")
            tracker.mark_many(rng.integers(0, size, 100_000), np.ones(100_000, np.int64))
        arrays = [rng.integers(0, 2**63, size // GRANULE // 64, dtype=np.uint64) for _ in range(10)]

        def ors() -> None:
            result = np.zeros_like(arrays[0])
            for array in arrays:
                np.bitwise_or(result, array, out=result)

        peers = {"ten ORs": Peer(ors, 1.3, limit=True)}
        against("changed_since, ten intervals of 15 TiB", lambda: tracker.changed_since("c0"), peers, rounds=15)
