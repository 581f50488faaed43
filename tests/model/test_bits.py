"""The kernels against lists of booleans, with blocks of two sizes, so that small inputs cross many of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirtmap.engine.model import bits


@pytest.fixture(scope="module", params=[64, bits.BLOCK], ids="block={}".format)
def block(request: pytest.FixtureRequest) -> Iterator[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bits, "BLOCK", request.param)
        yield request.param


in_blocks = pytest.mark.usefixtures("block")


def pack(flags: list[bool]) -> bits.Words:
    number = int("0" + "".join("01"[flag] for flag in reversed(flags)), 2)
    return np.frombuffer(number.to_bytes(-(-len(flags) // 64) * 8, "little"), "<u8").copy()


def unpack(words: bits.Words, nbits: int) -> list[bool]:
    """The flags, after checking that the tail is clear and no word is missing or too many."""
    number = int.from_bytes(words.tobytes(), "little")
    assert words.dtype == np.dtype("<u8")
    assert len(words) == -(-nbits // 64)
    assert number < 1 << nbits
    return [digit == "1" for digit in reversed(f"{number:0{nbits}b}")][:nbits]


def runs(flags: list[bool]) -> list[tuple[int, int]]:
    found, at = [], 0
    for flag, group in groupby(flags):
        length = len(list(group))
        if flag:
            found.append((at, length))
        at += length
    return found


# Stretches of one value, long or next to the width of a word, and stretches of noise.
stretch = st.one_of(
    st.tuples(st.booleans(), st.sampled_from([1, 2, 7, 8, 62, 63, 64, 65, 128, 200, 1500, 4100])).map(
        lambda drawn: [drawn[0]] * drawn[1]
    ),
    st.tuples(st.binary(max_size=8), st.sampled_from([1, 1, 3, 8])).map(
        lambda drawn: [bool(byte >> bit & 1) for byte in drawn[0] * drawn[1] for bit in range(drawn[1])]
    ),
)
bitmaps = st.lists(stretch, max_size=8).map(lambda stretches: [flag for part in stretches for flag in part])
factors = st.integers(0, 9).map(lambda power: 1 << power)


@in_blocks
@given(bitmaps, st.binary(max_size=20))
def test_from_packed_takes_the_bits_and_nothing_behind_them(flags: list[bool], more: bytes) -> None:
    data = bytearray(pack(flags).tobytes())
    for index in range(len(flags), len(data) * 8):
        data[index // 8] |= 1 << index % 8
    data[-(-len(flags) // 8) :] = more
    for given_as in (bytes(data), data, memoryview(data)):
        assert unpack(bits.from_packed(given_as, len(flags)), len(flags)) == flags
    words = bits.from_packed(data, len(flags))
    data[:] = bytes(len(data))
    assert unpack(words, len(flags)) == flags, "a copy, not a view"


@in_blocks
@given(bitmaps)
def test_count(flags: list[bool]) -> None:
    assert bits.count(pack(flags)) == sum(flags)


@in_blocks
@given(bitmaps, st.data(), st.booleans())
def test_set_range_and_clear_range(flags: list[bool], data: st.DataObject, value: bool) -> None:
    start = data.draw(st.integers(0, len(flags)))
    end = data.draw(st.integers(0, len(flags)))
    words = pack(flags)
    (bits.set_range if value else bits.clear_range)(words, start, end)
    assert unpack(words, len(flags)) == [value if start <= at < end else flag for at, flag in enumerate(flags)]


@in_blocks
@given(bitmaps.filter(len), st.data())
def test_set_many_is_set_range_for_each(flags: list[bool], data: st.DataObject) -> None:
    last = len(flags) - 1
    lengths = st.sampled_from([1, 2, 63, 64, 65, 127, 129, 1000, last + 1])
    ranges = data.draw(st.lists(st.tuples(st.integers(0, last), lengths), max_size=12))
    starts = np.array([start for start, _ in ranges], np.int64)
    ends = np.array([min(start + length, last + 1) for start, length in ranges], np.int64)
    words, expected = pack(flags), list(flags)
    bits.set_many(words, starts, ends)
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        expected[start:end] = [True] * (end - start)
    assert unpack(words, len(flags)) == expected


def test_set_many_keeps_every_run_that_shares_a_word() -> None:
    words = bits.zeros(640)
    starts = np.arange(0, 640, 2)[::-1].copy()
    bits.set_many(words, starts, starts + 1)
    assert (words == 0x5555555555555555).all()


@in_blocks
@given(bitmaps)
def test_extents_in_bits(flags: list[bool]) -> None:
    starts, lengths = bits.extents(pack(flags), len(flags))
    assert starts.dtype == lengths.dtype == np.int64
    assert list(zip(starts.tolist(), lengths.tolist(), strict=True)) == runs(flags)


@in_blocks
@given(bitmaps.filter(len), st.data())
def test_extents_in_units_end_where_the_disk_does(flags: list[bool], data: st.DataObject) -> None:
    unit = 1 << data.draw(st.integers(0, 62 - len(flags).bit_length()))
    size = len(flags) * unit - data.draw(st.integers(0, unit - 1))
    starts, lengths = bits.extents(pack(flags), size, unit)
    expected = [(start * unit, min((start + length) * unit, size) - start * unit) for start, length in runs(flags)]
    assert list(zip(starts.tolist(), lengths.tolist(), strict=True)) == expected


@pytest.mark.parametrize("nbits", [2, 63, 64, 128, 4096])
@pytest.mark.parametrize("first", [0, -1])
@pytest.mark.parametrize("short", [1, 2, 511])
def test_extents_do_not_overflow_at_the_largest_disk(nbits: int, first: int, short: int) -> None:
    """The last bit's end, rounded up, would be 2**63: one more than an int64 holds."""
    first %= nbits
    unit = -(-(2**63) // nbits)
    size = 2**63 - short
    flags = [at >= first for at in range(nbits)]
    starts, lengths = bits.extents(pack(flags), size, unit)
    assert starts.tolist() == [first * unit]
    assert lengths.tolist() == [size - first * unit]


@in_blocks
@given(bitmaps, factors)
def test_coarsen_is_any_of_each_group(flags: list[bool], factor: int) -> None:
    expected = [any(flags[at : at + factor]) for at in range(0, len(flags), factor)]
    assert unpack(bits.coarsen(pack(flags), len(flags), factor), len(expected)) == expected


@in_blocks
@given(bitmaps, factors, st.data())
def test_refine_repeats_each_bit(flags: list[bool], factor: int, data: st.DataObject) -> None:
    flags = flags[: 20_000 // factor]
    nbits = max(0, len(flags) * factor - data.draw(st.integers(0, factor - 1)))
    expected = [flags[at // factor] for at in range(nbits)]
    fine = bits.refine(pack(flags), nbits, factor)
    assert unpack(fine, nbits) == expected
    assert unpack(bits.coarsen(fine, nbits, factor), len(flags)) == flags


def test_factors_up_to_the_widest_there_can_be() -> None:
    """2 GiB granules against 512-byte ones: 22 powers of two."""
    nbits, factor = 2**23 + 5, 2**22
    fine = bits.zeros(nbits)
    bits.set_range(fine, factor - 1, factor)
    bits.set_range(fine, nbits - 1, nbits)
    coarse = bits.coarsen(fine, nbits, factor)
    assert unpack(coarse, 3) == [True, False, True]
    starts, lengths = bits.extents(bits.refine(coarse, nbits, factor), nbits)
    assert (starts.tolist(), lengths.tolist()) == ([0, 2 * factor], [factor, 5])


@pytest.mark.parametrize("nbits", [5 * 2**20, 5 * 2**20 + 77])
@pytest.mark.parametrize("density", [0.0003, 0.01, 0.2, 0.9, "thirds", "words"])
def test_many_blocks_against_numpy(nbits: int, density: float | str) -> None:
    """Large enough for several blocks of the real size, of every kind that `extents` tells apart."""
    rng = np.random.default_rng(nbits)
    if density == "thirds":
        # Clear, dense and sparse, with the borders inside blocks.
        flags = rng.random(nbits) < np.repeat([0, 0.3, 0.0001], -(-nbits // 3))[:nbits]
    elif density == "words":
        # Blocks without a single edge, and runs that go on over their borders.
        flags = np.repeat(rng.random(-(-nbits // 2**20)) < 0.5, 2**20)[:nbits]
    else:
        flags = rng.random(nbits) < float(density)
    data = np.packbits(flags, bitorder="little").tobytes()
    words = bits.from_packed(data, nbits)
    edges = np.flatnonzero(np.diff(flags.view(np.int8), prepend=0, append=0))
    starts, lengths = bits.extents(words, nbits)
    assert np.array_equal(starts, edges[0::2])
    assert np.array_equal(lengths, edges[1::2] - edges[0::2])
    assert bits.count(words) == np.count_nonzero(flags)
    for factor in (4, 16, 128):
        padded = np.append(flags, np.zeros(-nbits % factor, np.bool_)).reshape(-1, factor)
        coarse = bits.from_packed(np.packbits(padded.any(axis=1), bitorder="little").tobytes(), len(padded))
        assert np.array_equal(bits.coarsen(words, nbits, factor), coarse)
    refilled = bits.zeros(nbits)
    order = rng.permutation(len(starts))
    bits.set_many(refilled, starts[order], (starts + lengths)[order])
    assert np.array_equal(refilled, words)
