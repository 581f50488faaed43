"""How fast bitmaps are, side by side with numpy's plain way, on a 16 TiB disk at 64 KiB: 2**28 bits, 32 MiB.

Not part of the test run: ``make bench``, or ``pytest -s tests/bench/bench_bitmap.py`` to see the ratios as well. They
are also under ``extra_info`` in ``--benchmark-json``. No time is asserted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from dirtmap.engine.model.bitmap import Bitmap

TIB = 2**40
NBITS = 16 * TIB // 65536
Extents = tuple[NDArray[np.int64], NDArray[np.int64]]

# The medians of the naive way so far in this run, by what was measured.
naive_median: dict[str, float] = {}


@cache
def random_bits(density: float) -> bytes:
    """2**28 packed bits, each set with this probability; in pieces, because a number for each would take 2 GiB."""
    rng = np.random.default_rng(16)
    pieces = [np.packbits(rng.random(2**22) < density, bitorder="little") for _ in range(NBITS // 2**22)]
    return np.concatenate(pieces).tobytes()


def naive_extents(data: bytes) -> Extents:
    """A byte for each bit, the difference of each to the one before, and where that is not zero."""
    flags = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    edges = np.flatnonzero(np.diff(flags, prepend=np.uint8(0), append=np.uint8(0))) * 65536
    return edges[0::2], edges[1::2] - edges[0::2]


def our_extents(data: bytes) -> Extents:
    return Bitmap.from_packed(16 * TIB, 65536, data).extents()


def naive_count(data: bytes) -> int:
    return int(np.unpackbits(np.frombuffer(data, np.uint8)).sum()) * 65536


def our_count(data: bytes) -> int:
    return Bitmap.from_packed(16 * TIB, 65536, data).count


def naive_coarsen(data: bytes) -> bytes:
    flags = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    return np.packbits(flags.reshape(-1, 16).any(axis=1), bitorder="little").tobytes()


def our_coarsen(data: bytes) -> bytes:
    """The same bits at 4 KiB, on a disk of 1 TiB, to 64 KiB."""
    return Bitmap.from_packed(TIB, 4096, data).at(65536).packed().tobytes()


# The naive way of a pair comes first, for the other to be compared with.
@pytest.mark.parametrize("density", [0.001, 0.1], ids=["0.1%", "10%"])
@pytest.mark.parametrize(
    ("what", "way"),
    [
        ("extents", naive_extents),
        ("extents", our_extents),
        ("count", naive_count),
        ("count", our_count),
        ("coarsen", naive_coarsen),
        ("coarsen", our_coarsen),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__.split("_")[0],
)
def test_16_tib(benchmark: BenchmarkFixture, what: str, way: Callable[[bytes], object], density: float) -> None:
    data = random_bits(density)
    group = benchmark.group = f"{what}, {density:.1%} dirty at random"
    benchmark.pedantic(way, args=(data,), rounds=7, warmup_rounds=1)  # type: ignore[no-untyped-call]
    if benchmark.stats is None:  # --benchmark-disable
        return
    median = benchmark.stats.stats.median
    if way.__name__.startswith("naive"):
        naive_median[group] = median
    elif group in naive_median:
        ratio = benchmark.extra_info["times_faster_than_naive"] = round(naive_median[group] / median, 1)
        print(f"\n{group}: {median * 1e3:.1f} ms, {ratio} times faster than the naive way")


def test_the_ways_agree() -> None:
    """What is compared does the same work."""
    data = random_bits(0.1)
    assert all(
        np.array_equal(ours, theirs) for ours, theirs in zip(our_extents(data), naive_extents(data), strict=True)
    )
    assert our_count(data) == naive_count(data)
    assert our_coarsen(data) == naive_coarsen(data)
