"""How fast the kernels for bits are, beside numpy, bitarray, pyroaring, plain C loops, and reading memory."""

from __future__ import annotations

import ctypes
import random
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyroaring
import pytest
from bitarray import bitarray
from numpy.typing import NDArray
from support.measuring import Against, Peer

from dirtmap.engine.model import _bits, bits
from dirtmap.engine.model.bitmap import Bitmap

TIB = 2**40
GRANULE = 65536
# Those of a disk of 16 TiB at 64 KiB, or of one of 1 TiB at 4 KiB: 32 MiB.
NBITS = 16 * TIB // GRANULE
# So few that the numbers themselves stay in the cache; the marks hit as many different places.
MARKS = 1_000
RANGES = 1_000_000
Extents = tuple[NDArray[np.int64], NDArray[np.int64]]
SECTION = "Bits in memory"

# What anybody would write, compiled for this very processor; `read_all` is as fast as memory allows.
LOOPS = r"""
#include <stddef.h>
#include <stdint.h>

size_t count_edges(const uint64_t *words, size_t n)
{
    size_t edges = 0;
    uint64_t carry = 0;
    for (size_t i = 0; i < n; i++) {
        edges += __builtin_popcountll(words[i] ^ (words[i] << 1 | carry));
        carry = words[i] >> 63;
    }
    return edges;
}

void extents(const uint64_t *words, size_t n, uint64_t unit, uint64_t *starts, uint64_t *lengths)
{
    size_t edges = 0;
    uint64_t carry = 0;
    for (size_t i = 0; i < n; i++) {
        uint64_t differs = words[i] ^ (words[i] << 1 | carry);
        carry = words[i] >> 63;
        for (; differs; differs &= differs - 1, edges++) {
            uint64_t at = (i * 64 + __builtin_ctzll(differs)) * unit;
            if (edges % 2)
                lengths[edges / 2] = at - starts[edges / 2];
            else
                starts[edges / 2] = at;
        }
    }
    if (edges % 2)
        lengths[edges / 2] = n * 64 * unit - starts[edges / 2];
}

void coarsen(const uint16_t *fine, size_t n, uint8_t *coarse)
{
    for (size_t i = 0; i < n / 8; i++) {
        uint8_t octet = 0;
        for (int bit = 0; bit < 8; bit++)
            octet |= (fine[i * 8 + bit] != 0) << bit;
        coarse[i] = octet;
    }
}

void refine(const uint8_t *coarse, size_t n, uint16_t *fine)
{
    for (size_t i = 0; i < n; i++)
        for (int bit = 0; bit < 8; bit++)
            fine[i * 8 + bit] = -(coarse[i] >> bit & 1);
}

void mark(uint64_t *words, const int64_t *offsets, const int64_t *lengths, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        uint64_t first = offsets[i] >> 16, last = (offsets[i] + lengths[i] - 1) >> 16;
        uint64_t head = ~UINT64_C(0) << (first & 63), tail = ~UINT64_C(0) >> (~last & 63);
        if (first >> 6 == last >> 6) {
            words[first >> 6] |= head & tail;
            continue;
        }
        words[first >> 6] |= head;
        for (uint64_t at = (first >> 6) + 1; at < last >> 6; at++)
            words[at] = ~UINT64_C(0);
        words[last >> 6] |= tail;
    }
}

__attribute__((optimize("O3"))) uint64_t read_all(const uint64_t *words, size_t n)
{
    uint64_t all = 0;
    for (size_t i = 0; i < n; i++)
        all ^= words[i];
    return all;
}
"""


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder: Path = tmp_path_factory.mktemp("loops")
    (folder / "loops.c").write_text(LOOPS)
    command = ["gcc", "-O2", "-march=native", "-shared", "-fPIC", "-o", folder / "loops.so", folder / "loops.c"]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(folder / "loops.so"))
    library.count_edges.restype = library.read_all.restype = ctypes.c_size_t
    return library


def at(array: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@cache
def some_words(kind: str) -> bits.Words:
    """The words of 2**28 bits; those of a smaller disk are the first of them."""
    if kind == "full":
        return np.full(NBITS // 64, bits.ALL, bits.WORD)
    rng = np.random.default_rng(16)
    if kind == "clustered":  # 10 %, 32 MiB of the disk at a time
        return np.repeat(np.where(rng.random(NBITS // 512) < 0.1, bits.ALL, 0).astype(bits.WORD), 8)
    density = {"sparse": 0.001, "10%": 0.1}[kind]
    # In pieces, because a number for each bit takes 2 GiB.
    pieces = [np.packbits(rng.random(2**22) < density, bitorder="little") for _ in range(NBITS // 2**22)]
    return np.concatenate(pieces).view(bits.WORD)


def naive_extents(words: bits.Words) -> Extents:
    """A byte for each bit, the difference of each to the one before, and where that is not zero."""
    flags = np.unpackbits(words.view(np.uint8), bitorder="little")
    edges = np.flatnonzero(np.diff(flags, prepend=np.uint8(0), append=np.uint8(0))) * GRANULE
    return edges[0::2], edges[1::2] - edges[0::2]


def looped_extents(loops: ctypes.CDLL, words: bits.Words) -> Extents:
    starts = np.empty((loops.count_edges(at(words), ctypes.c_size_t(len(words))) + 1) // 2, np.int64)
    lengths = np.empty_like(starts)
    loops.extents(at(words), ctypes.c_size_t(len(words)), ctypes.c_uint64(GRANULE), at(starts), at(lengths))
    return starts, lengths


@pytest.mark.parametrize("tebibytes", [1, 16])
@pytest.mark.parametrize("kind", ["sparse", "10%", "clustered", "full"])
def test_extents(against: Against, loops: ctypes.CDLL, kind: str, tebibytes: int) -> None:
    words = some_words(kind)[: tebibytes * TIB // GRANULE // 64]
    bitmap = Bitmap.from_words(tebibytes * TIB, GRANULE, words, True)
    starts, lengths = bitmap.extents()
    for found in (naive_extents(words), looped_extents(loops, words)):
        assert np.array_equal(found[0], starts)
        assert np.array_equal(found[1], lengths)
    peers = {
        "numpy's unpackbits and diff": Peer(lambda: naive_extents(words), 0.06),
        "a C loop": Peer(lambda: looped_extents(loops, words), 1.5, limit=True),
    }
    what = f"extents of {tebibytes} TiB at 64 KiB, {kind}"
    against(what, bitmap.extents, peers, rounds=5 if tebibytes == 16 else 15)


def test_count(against: Against, loops: ctypes.CDLL) -> None:
    words = some_words("10%")
    bitmap = Bitmap.from_words(16 * TIB, GRANULE, words, True)
    assert bitmap.count == int(np.bitwise_count(words).sum()) * GRANULE

    def read() -> None:
        loops.read_all(at(words), ctypes.c_size_t(len(words)))

    peers = {"reading the bytes": Peer(read, 1.3, limit=True)}
    against("a count of 32 MiB", lambda: bits.count(words), peers, rounds=31)


def test_or_with_count(against: Against, loops: ctypes.CDLL) -> None:
    one, other = some_words("10%").copy(), some_words("sparse")
    assert bits.combine(one, other, bits.OR, one)[1] == bits.count(some_words("10%") | other)

    def read() -> None:
        loops.read_all(at(one), ctypes.c_size_t(len(one)))
        loops.read_all(at(other), ctypes.c_size_t(len(other)))

    peers = {"reading the bytes": Peer(read, 1.3, limit=True)}
    what = "an OR of 32 MiB into another 32 MiB, counted"
    against(what, lambda: bits.combine(one, other, bits.OR, one), peers, rounds=31)


def test_or_of_two_bitmaps(against: Against) -> None:
    """Most of the time goes into the memory of the result, which is new."""
    one = Bitmap.from_words(16 * TIB, GRANULE, some_words("10%"), True)
    other = Bitmap.from_words(16 * TIB, GRANULE, some_words("sparse"), True)

    def plain() -> int:
        return int(np.bitwise_count(one.words | other.words).sum()) * GRANULE

    assert (one | other).count == plain()
    peers = {"numpy": Peer(plain, 1.0)}
    against("an OR of two bitmaps of 32 MiB into a third, counted", lambda: (one | other).count, peers, rounds=15)


@pytest.mark.parametrize("kind", ["sparse", "10%"])
def test_4_kib_to_64(against: Against, loops: ctypes.CDLL, kind: str) -> None:
    words = some_words(kind)

    def loop() -> bits.Words:
        result = np.empty(len(words) // 16, bits.WORD)
        loops.coarsen(at(words), ctypes.c_size_t(len(words) * 4), at(result))
        return result

    assert np.array_equal(bits.coarsen(words, NBITS, 16), loop())
    peers = {"a C loop": Peer(loop, 1.5, limit=True)}
    against(f"32 MiB of bits at 4 KiB, to 64 KiB, {kind}", lambda: bits.coarsen(words, NBITS, 16), peers, rounds=15)


@pytest.mark.parametrize("kind", ["sparse", "10%"])
def test_64_kib_to_4(against: Against, loops: ctypes.CDLL, kind: str) -> None:
    words = some_words(kind)[: NBITS // 16 // 64]

    def loop() -> bits.Words:
        result = np.empty(len(words) * 16, bits.WORD)
        loops.refine(at(words), ctypes.c_size_t(words.nbytes), at(result))
        return result

    assert np.array_equal(bits.refine(words, NBITS, 16), loop())
    peers = {"a C loop": Peer(loop, 1.5, limit=True)}
    against(f"2 MiB of bits at 64 KiB, to 4 KiB, {kind}", lambda: bits.refine(words, NBITS, 16), peers, rounds=15)


@pytest.mark.parametrize("tebibytes", [1, 16, 64])
@pytest.mark.parametrize("longest", [4096, 2**20])
def test_mark(against: Against, tebibytes: int, longest: int) -> None:
    rng = random.Random(1)
    size = tebibytes * TIB
    ranges = [(rng.randrange((size - 2**20) // 512) * 512, rng.randrange(512, longest + 1)) for _ in range(MARKS)]
    bitmap, array = Bitmap(size, GRANULE), bitarray(size // GRANULE, endian="little")

    def ours() -> None:
        mark = bitmap.mark
        for offset, length in ranges:
            mark(offset, length)

    def slices() -> None:
        for offset, length in ranges:
            array[offset >> 16 : ((offset + length - 1) >> 16) + 1] = 1

    ours()
    slices()
    assert bitmap.copy().packed() == array.tobytes()  # a large one itself is to stay out of memory
    what = f"Bitmap.mark, random, up to {longest >> 10} KiB, {tebibytes} TiB at 64 KiB"
    peers = {"a bitarray's slice assignment": Peer(slices, 0.6)}
    against(what, ours, peers, calls=MARKS, rounds=301)


@pytest.mark.parametrize("tebibytes", [1, 16])
def test_mark_many(against: Against, loops: ctypes.CDLL, tebibytes: int) -> None:
    """A million ranges of 4 KiB to 1 MiB."""
    rng = np.random.default_rng(1)
    size = tebibytes * TIB
    offsets = rng.integers(0, (size - 2**20) // 4096, RANGES) * 4096
    lengths = rng.integers(1, 257, RANGES) * 4096
    bitmap = Bitmap(size, GRANULE)
    words = bits.zeros(size // GRANULE)

    def ours() -> None:
        bitmap.mark_many(offsets, lengths)

    def loop() -> None:
        loops.mark(at(words), at(offsets), at(lengths), ctypes.c_size_t(RANGES))

    def roaring_by_range() -> pyroaring.BitMap:
        roaring = pyroaring.BitMap()
        starts, ends = (offsets >> 16).tolist(), (((offsets + lengths - 1) >> 16) + 1).tolist()
        for start, end in zip(starts, ends, strict=True):
            roaring.add_range(start, end)
        return roaring

    def roaring_by_granule() -> pyroaring.BitMap:
        starts, ends = offsets >> 16, ((offsets + lengths - 1) >> 16) + 1
        counts = ends - starts
        granules = np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        return pyroaring.BitMap(granules.astype(np.uint32))

    ours()
    loop()
    assert np.array_equal(bitmap.words, words)
    assert len(roaring_by_range()) == len(roaring_by_granule()) == bits.count(words)
    peers = {
        "a C loop": Peer(loop, 2, limit=True),
        "pyroaring by range": Peer(roaring_by_range, 0.05),
        "pyroaring by granule": Peer(roaring_by_granule, 0.05),
    }
    what = f"Bitmap.mark_many, a million random ranges of 4 KiB to 1 MiB, {tebibytes} TiB"
    against(what, ours, peers, calls=RANGES, rounds=7)


@pytest.mark.parametrize("level", range(_bits.BEST_LEVEL))
@pytest.mark.parametrize("what", ["count", "runs", "combine", "extents", "coarsen", "refine"])
def test_levels(against: Against, what: str, level: int) -> None:
    """What a loop gains from the processor's best level over a lower one; the memory of results is not counted in."""
    words, other = some_words("10%"), some_words("sparse").copy()
    runs = _bits.runs(words, 0, len(words))
    starts, lengths = np.empty(runs, np.int64), np.empty(runs, np.int64)
    coarse = words[: len(words) // 16].copy()
    calls: dict[str, Callable[[], object]] = {
        "count": lambda: _bits.count(words),
        "runs": lambda: _bits.runs(words, 0, len(words)),
        "combine": lambda: _bits.combine(words, other, other, bits.OR),
        "extents": lambda: _bits.extents(words, 0, len(words), GRANULE, starts, lengths, 0, runs),
        "coarsen": lambda: _bits.coarsen(words, coarse, 16),
        "refine": lambda: _bits.refine(coarse, other, 16),
    }

    def lower() -> None:
        _bits.use_level(level)
        calls[what]()
        _bits.use_level(_bits.BEST_LEVEL)

    peers = {f"processors of level {level}": Peer(lower, 1.0)}
    against(f"{what} of 32 MiB on this processor", calls[what], peers, rounds=15)
