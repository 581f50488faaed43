"""The live path side by side with what Python has for it: bitarray, pyroaring, an array of a byte a granule.

Run with ``make bench``. Each benchmark's ``extra_info`` has the ratio of the tracker's time to each peer's, best of
several runs of both in turn, since what else the machine does weighs on all of them alike.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyroaring
import pytest
from bitarray import bitarray
from support.tracking import make_node

import dirtmap.engine as dm
from dirtmap.engine.system import file as fileio
from dirtmap.engine.system.file import File
from dirtmap.engine.tracking.tracker import Tracker

TIB = 1 << 40
GRANULE = 65536
MARKS = 100_000
RANGES = 1_000_000


class Unsynced(File):
    """What a cut costs apart from its sync."""

    def sync(self) -> None:
        self._refuse_if_poisoned()


@contextmanager
def tracking(folder: Path, size: int, bitmaps: int = 1) -> Iterator[Tracker]:
    """A tracked node with so many recording bitmaps. Its image is as long as a file can be."""
    make_node(folder, size)
    with dm.open("node:drive0") as image, image.transaction() as changed:
        for number in range(1, bitmaps):
            changed[f"b{number}"] = dm.Bitmap(size)
    with dm.open("node:drive0") as image, image.track(save_interval=0) as tracker:
        yield tracker


def best(functions: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """The shortest time of each, in seconds, taken in turns."""
    times = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            begun = time.perf_counter()
            function()
            times[name] = min(times[name], time.perf_counter() - begun)
    return times


def compare(benchmark: Any, ours: Callable[[], object], peers: dict[str, Callable[[], object]], each: int = 1) -> None:
    """Benchmarks ours; ``extra_info`` says how it compares."""
    times = best({"ours": ours, **peers})
    benchmark.extra_info["ns each"] = {name: round(taken / each * 1e9, 1) for name, taken in times.items()}
    benchmark.extra_info["times"] = {name: round(times["ours"] / times[name], 2) for name in peers}
    print(benchmark.extra_info)
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)


class Bare:
    """A bare slice assignment to a bitarray in memory that is as large."""

    def __init__(self, size: int) -> None:
        self.bits = bitarray(size >> 16, endian="little")

    def mark(self, offset: int, length: int) -> None:
        self.bits[offset >> 16 : ((offset + length - 1) >> 16) + 1] = 1


class Roaring:
    def __init__(self) -> None:
        self.bits = pyroaring.BitMap()

    def mark(self, offset: int, length: int) -> None:
        self.bits.add_range(offset >> 16, ((offset + length - 1) >> 16) + 1)


class Bytes:
    def __init__(self, size: int) -> None:
        self.bits = np.zeros(size >> 16, np.bool_)

    def mark(self, offset: int, length: int) -> None:
        self.bits[offset >> 16 : ((offset + length - 1) >> 16) + 1] = True


@pytest.mark.parametrize("bitmaps", [1, 100])
def test_mark_one_random_write_of_4_kib(benchmark: Any, tmp_path: Path, bitmaps: int) -> None:
    rng = random.Random(1)
    offsets = [rng.randrange(TIB // 4096) * 4096 for _ in range(MARKS)]
    with tracking(tmp_path, TIB, bitmaps) as tracker:
        for offset in range(0, TIB, 256 << 20):  # every region logged
            tracker.mark(offset, 1)
        marks = {
            "ours": tracker.mark,
            "bitarray": Bare(TIB).mark,
            "pyroaring": Roaring().mark,
            "numpy bool": Bytes(TIB).mark,
        }

        def of(mark: Callable[[int, int], None]) -> Callable[[], None]:
            def run() -> None:
                for offset in offsets:
                    mark(offset, 4096)

            return run

        functions = {name: of(mark) for name, mark in marks.items()}
        compare(benchmark, functions.pop("ours"), functions, MARKS)


def test_begin_and_end_of_a_random_write_of_4_kib(benchmark: Any, tmp_path: Path) -> None:
    rng = random.Random(1)
    offsets = [rng.randrange(TIB // 4096) * 4096 for _ in range(10_000)]
    with tracking(tmp_path, TIB) as tracker:
        for offset in range(0, TIB, 256 << 20):
            tracker.mark(offset, 1)

        def run() -> None:
            for offset in offsets:
                with tracker.write(offset, 4096):
                    pass

        compare(benchmark, run, {}, len(offsets))


@pytest.mark.parametrize("tib", [1, 15])
def test_mark_a_million_random_ranges_of_4_kib_to_1_mib(benchmark: Any, tmp_path: Path, tib: int) -> None:
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

    with tracking(tmp_path, size) as tracker:
        tracker.mark_many(np.arange(0, size, 256 << 20), np.ones(size >> 28, np.int64))
        peers = {"pyroaring by range": roaring_by_range, "pyroaring by granule": roaring_by_granule}
        compare(benchmark, lambda: tracker.mark_many(offsets, lengths), peers, RANGES)


def test_a_cut_of_a_large_disk_whatever_is_dirty(benchmark: Any, tmp_path: Path) -> None:
    size = 15 * TIB
    rng = np.random.default_rng(1)
    number = 0
    with fileio.using(Unsynced), tracking(tmp_path, size) as tracker:

        def ready() -> None:
            tracker.mark_many(rng.integers(0, size, 100_000), np.ones(100_000, np.int64))
            while not tracker._arena.is_ready(size, 16):  # made in the background
                time.sleep(0.01)
            if number % 10 == 9:
                tracker.save()

        def cut() -> None:
            nonlocal number
            number += 1
            tracker.clear("b0")

        benchmark.pedantic(cut, setup=ready, rounds=50, warmup_rounds=5)
        print({"best, ms": benchmark.stats.stats.min * 1e3, "median": benchmark.stats.stats.median * 1e3})


def test_changed_since_over_ten_intervals_of_a_large_disk(benchmark: Any, tmp_path: Path) -> None:
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

        compare(benchmark, lambda: tracker.changed_since("c0"), {"ten ORs": ors})
