"""The kernels against lists of booleans, at each level that they are compiled for and this processor has."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import groupby
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.compiled import levels

from dirtmap.engine.model import _bits, bits

level = levels(_bits.BEST_LEVEL, _bits.use_level)
at_each_level = pytest.mark.usefixtures("level")


def pack(flags: list[bool]) -> bits.Words:
    number = int("0" + "".join("01"[flag] for flag in reversed(flags)), 2)
    return np.frombuffer(number.to_bytes(-(-len(flags) // 64) * 8, "little"), "<u8").copy()


def unaligned(words: bits.Words, by: int) -> bits.Words:
    """The same words, in memory that begins ``by`` bytes behind a multiple of 8, and may be written to."""
    memory = np.zeros(words.nbytes + 8, np.uint8)
    moved = memory[by : by + words.nbytes].view("<u8")
    moved[:] = words
    return moved


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


@at_each_level
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


@at_each_level
@given(bitmaps, st.integers(0, 7))
def test_count(flags: list[bool], by: int) -> None:
    assert bits.count(unaligned(pack(flags), by)) == sum(flags)


@at_each_level
@given(st.binary(max_size=1200), st.sampled_from(["u1", "<u2", "<u4", "<u8"]))
def test_count_of_octets_and_wider_numbers(data: bytes, kind: str) -> None:
    expected = sum(octet.bit_count() for octet in data)
    assert bits.count(data) == bits.count(memoryview(data)) == bits.count(bytearray(data)) == expected
    numbers = np.frombuffer(data[: len(data) // 8 * 8], kind)
    assert bits.count(numbers) == sum(octet.bit_count() for octet in numbers.tobytes())


@given(st.integers(0, 1300), st.integers(0, 7), st.data())
def test_all_zero_and_all_one(size: int, by: int, data: st.DataObject) -> None:
    for octet, is_all, is_other in ((0, bits.all_zero, bits.all_one), (0xFF, bits.all_one, bits.all_zero)):
        memory = np.full(size + by, octet, np.uint8)
        octets = memory[by:]
        assert is_all(octets) is is_all(octets.tobytes()) is is_all(octets.data) is True
        assert is_other(octets) is (size == 0)
        if size:
            octets[data.draw(st.integers(0, size - 1))] ^= 1 << data.draw(st.integers(0, 7))
            assert is_all(octets) is False


@at_each_level
@given(bitmaps, st.data(), st.integers(0, 7))
def test_combine(one: list[bool], data: st.DataObject, by: int) -> None:
    other = (data.draw(bitmaps) + [False] * len(one))[: len(one)]
    ways: list[tuple[int, Callable[[bool, bool], bool]]] = [
        (bits.OR, lambda a, b: a or b),
        (bits.AND, lambda a, b: a and b),
        (bits.AND_NOT, lambda a, b: a and not b),
        (bits.XOR, lambda a, b: a != b),
    ]
    for how, expect in ways:
        a, b = unaligned(pack(one), by), pack(other)
        words, count = bits.combine(a, b, how)
        expected = [expect(x, y) for x, y in zip(one, other, strict=True)]
        assert (unpack(words, len(one)), count) == (expected, sum(expected))
        assert (unpack(a, len(one)), unpack(b, len(one))) == (one, other)
        for same in (a, b):  # in place, on either side
            copies = [a.copy(), b.copy()]
            into = copies[0 if same is a else 1]
            found, again = bits.combine(copies[0], copies[1], how, into)
            assert found is into
            assert again == count
            assert np.array_equal(into, words)


@given(st.lists(bitmaps, max_size=11), st.integers(1, 1100), st.integers(0, 7))
def test_union(parts: list[list[bool]], length: int, by: int) -> None:
    parts = [(part * 20 + [False] * (length * 64))[: length * 64] for part in parts]
    into = unaligned(bits.zeros(length * 64), by)
    bits.union([unaligned(pack(part), by) for part in parts], into)
    assert unpack(into, length * 64) == [any(flags) for flags in zip(*parts, [False] * (length * 64), strict=True)]


def test_a_union_writes_only_where_there_are_bits() -> None:
    parts = [bits.zeros(64 * 2000) for _ in range(3)]
    parts[1][600] = parts[2][601] = 1
    into = np.full(2000, 7, "<u8")
    bits.union(parts, into)
    assert np.flatnonzero(into != 7).tolist() == list(range(512, 1024))
    assert into[512:1024].nonzero()[0].tolist() == [600 - 512, 601 - 512]


@given(
    st.lists(st.tuples(st.booleans(), st.floats(0, 1), st.booleans()), min_size=1, max_size=6),
    st.sampled_from([1, 2, 63, 64, 65, 130, 512]),
    st.integers(0, 7),
)
def test_uniform(drawn: list[tuple[bool, float, bool]], length: int, by: int) -> None:
    nbits, pieces = length * 64, []
    for begin, share, rest in drawn:
        at = round(share * nbits)
        pieces.append([begin] * at + [rest] * (nbits - at))
    words = unaligned(pack([flag for piece in pieces for flag in piece]), by)
    expected = [1 if all(piece) else -1 if any(piece) else 0 for piece in pieces]
    assert bits.uniform(words, len(pieces)).tolist() == expected


@at_each_level
@given(bitmaps, st.data(), st.booleans())
def test_set_range_and_clear_range(flags: list[bool], data: st.DataObject, value: bool) -> None:
    start = data.draw(st.integers(0, len(flags)))
    end = data.draw(st.integers(0, len(flags)))
    words = pack(flags)
    (bits.set_range if value else bits.clear_range)(words, start, end)
    assert unpack(words, len(flags)) == [value if start <= at < end else flag for at, flag in enumerate(flags)]


def test_a_range_outside_the_words_is_refused() -> None:
    for change in (bits.set_range, bits.clear_range):
        words = bits.zeros(128)
        words[:] = 5
        for start, end in ((0, 129), (128, 129), (-1, 3), (2**40, 2**41)):
            with pytest.raises(IndexError):
                change(words, start, end)
        change(words, 129, 129)
        change(words, 500, -500)
        assert words.tolist() == [5, 5]


@st.composite
def some_ranges(draw: st.DrawFn, nbits: int) -> list[tuple[int, int]]:
    """First and last bits: short and long ones, overlapping, in any order, and often the same again."""
    lengths = st.sampled_from([1, 2, 63, 64, 65, 127, 129, 1000, nbits])
    drawn = draw(st.lists(st.tuples(st.integers(0, nbits - 1), lengths), max_size=12))
    return [(first, min(first + length, nbits) - 1) for first, length in drawn] * draw(st.sampled_from([1, 1, 9]))


@given(bitmaps.filter(len), st.data(), st.integers(0, 7))
def test_scatter_and_mark_ranges_are_set_range_for_each(flags: list[bool], data: st.DataObject, by: int) -> None:
    ranges = data.draw(some_ranges(len(flags)))
    starts = np.array([start for start, _ in ranges], np.int64)
    lasts = np.array([last for _, last in ranges], np.int64)
    expected = list(flags)
    for start, last in ranges:
        expected[start : last + 1] = [True] * (last + 1 - start)

    words = unaligned(pack(flags), by)
    bits.scatter(words, starts, lasts)
    assert unpack(words, len(flags)) == expected

    words, granularity = unaligned(pack(flags), by), 1 << data.draw(st.integers(0, 40))
    inside = data.draw(st.integers(0, granularity - 1))
    offsets = starts * granularity + inside
    lengths = (lasts - starts) * granularity + data.draw(st.integers(1, granularity - inside))
    empty = data.draw(st.integers(0, len(flags) * granularity))  # marks nothing, not even where it is
    offsets, lengths = np.insert(offsets, 0, empty), np.insert(lengths, 0, 0)
    spread = np.zeros((len(offsets), 2), np.int64)  # numbers with space between them
    spread[:, 1] = offsets
    bits.mark_ranges(words, spread[:, 1], lengths, granularity)
    assert unpack(words, len(flags)) == expected


def test_every_run_that_shares_a_word_is_kept() -> None:
    words = bits.zeros(640)
    starts = np.arange(0, 640, 2)[::-1].copy()
    bits.scatter(words, starts, starts)
    assert (words == 0x5555555555555555).all()


def test_ranges_that_cover_all_many_times_over_are_joined_first() -> None:
    """One by one, a million of them would write 2 TiB here. Short ones before and between them stay in."""
    nbits = 2**24
    starts = np.arange(10**6, dtype=np.int64)
    lasts = np.full(10**6, nbits - 70)
    starts[:5], lasts[:5] = nbits - 3, nbits - 3
    starts[-5:], lasts[-5:] = nbits - 1, nbits - 1
    expected = bits.zeros(nbits)
    bits.set_range(expected, 5, nbits - 69)
    bits.set_range(expected, nbits - 3, nbits - 2)
    bits.set_range(expected, nbits - 1, nbits)
    words = bits.zeros(nbits)
    bits.scatter(words, starts, lasts)
    assert np.array_equal(words, expected)
    words = bits.zeros(nbits)
    lengths = (lasts + 1 - starts) * 512
    lengths[9::10] = 0
    bits.mark_ranges(words, starts * 512, lengths, 512)
    assert np.array_equal(words, expected)


@pytest.mark.parametrize(
    ("start", "last"), [(-1, 0), (0, 128), (128, 128), (5, 2**62), (2**63 - 1, -(2**63)), (3, -(2**63)), (-(2**63), 3)]
)
def test_scatter_refuses_ranges_outside_the_words(start: int, last: int) -> None:
    words = bits.zeros(128)
    with pytest.raises(IndexError):
        bits.scatter(words, np.array([1, start]), np.array([2, last]))
    assert not words.any()
    bits.scatter(bits.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64))


numbers = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-3, 70), st.integers(2**63 - 3, 2**63 - 1))


@given(st.lists(st.tuples(numbers, numbers), max_size=40), numbers.filter(lambda size: size >= 0))
def test_first_outside(ranges: list[tuple[int, int]], size: int) -> None:
    bad = [at for at, (offset, length) in enumerate(ranges) if offset < 0 or length < 0 or offset + length > size]
    offsets = np.array([offset for offset, _ in ranges], np.int64)
    lengths = np.array([length for _, length in ranges], np.int64)
    assert bits.first_outside(offsets, lengths, size) == (bad[0] if bad else None)


numbers_and_others = st.one_of(
    numbers, st.integers(-(2**66), 2**66), st.sampled_from([None, "1", 1.0, True, np.int64(3)])
)


@given(st.integers(0, 3000), numbers_and_others, numbers_and_others)
def test_a_marker_marks_what_is_inside_and_leaves_the_rest_to_others(size: int, offset: Any, length: Any) -> None:
    words = bits.zeros(-(-size // 8))
    marked = bits.mark(bits.InPlace(words, size, 8), offset, length)
    assert bits.mark(None, offset, length) is False
    if type(offset) is type(length) is int and offset >= 0 and length >= 0 and offset + length <= size:
        assert marked is True
        expected = [offset < (at + 1) * 8 and at * 8 < offset + length and length > 0 for at in range(-(-size // 8))]
        assert unpack(words, len(expected)) == expected
    else:
        assert marked is False
        assert not words.any()


def test_a_marker_of_the_largest_disk() -> None:
    size, granularity = 2**63 - 1, 2**31 << 20
    words = bits.zeros(2**12)
    marker = bits.InPlace(words, size, granularity)
    assert bits.mark(marker, size - 1, 1)
    assert not bits.mark(marker, size, 1)
    assert bits.mark(marker, size, 0)
    assert [at for at in range(2**12) if int(words[at // 64]) >> at % 64 & 1] == [2**12 - 1]
    assert bits.mark(marker, 0, size)
    assert (words[: 2**12 // 64] == bits.ALL).all()


def test_notes_are_as_many_as_there_is_room_for_and_are_forgotten_once() -> None:
    firsts, lasts = np.zeros(3, np.int64), np.zeros(3, np.int64)
    notes = bits.Notes(firsts, lasts, 1000, 8)
    assert [bits.mark(notes, at * 16, 9) for at in range(4)] == [True, True, True, False]
    assert (firsts.tolist(), lasts.tolist()) == ([0, 2, 4], [1, 3, 5])
    assert bits.mark(notes, 1000, 0)
    assert not bits.mark(notes, 1000, 1)
    notes.forget(2, 0)
    notes.forget(1, 0)  # by whoever has begun before the others had forgotten two
    assert (notes.count, notes.forgotten, firsts[0], lasts[0]) == (1, 2, 4, 5)
    with pytest.raises(IndexError):
        notes.forget(2, 2)
    assert bits.mark(notes, 0, 1)
    notes.forget(2, 2)
    assert (notes.count, notes.forgotten) == (0, 4)


def test_what_is_not_packed_words_is_refused() -> None:
    good, places = bits.zeros(128), np.zeros(2, np.int64)
    bad: list[Any] = [
        places,
        np.zeros(2),
        np.zeros(2, np.uint32),
        np.zeros(2, ">u8"),
        np.zeros((1, 2), "<u8"),
        b"",
        None,
    ]
    for words in bad:
        with pytest.raises((TypeError, ValueError, BufferError)):
            bits.set_range(words, 0, 1)
        with pytest.raises((TypeError, ValueError, BufferError)):
            bits.extents(words, 64)
    with pytest.raises(ValueError, match="not C-contiguous"):
        bits.set_range(bits.zeros(256)[::2], 0, 1)
    good.flags.writeable = False
    for change in (bits.set_range, bits.clear_range):
        with pytest.raises(ValueError, match="read-only"):
            change(good, 0, 1)
    with pytest.raises(ValueError, match="read-only"):
        bits.InPlace(good, 1, 512)
    with pytest.raises(TypeError):
        bits.scatter(bits.zeros(64), np.zeros(2), np.zeros(2))  # type: ignore[arg-type]


def test_lengths_that_do_not_fit_are_refused() -> None:
    """Nothing is written behind an array's end, whatever is called."""
    one, two = bits.zeros(64), bits.zeros(128)
    places, more = np.zeros(1, np.int64), np.zeros(2, np.int64)
    for call in (
        lambda: bits.combine(one, two, bits.OR),
        lambda: bits.combine(two, two, bits.OR, one),
        lambda: bits.union([two, one], two),
        lambda: bits.uniform(two, 3),
        lambda: bits.uniform(two, 0),
        lambda: bits.uniform(bits.zeros(0), 1),
        lambda: bits.refine(one, 64 * 16 + 1, 16),
        lambda: bits.coarsen(one, 129, 2),
        lambda: _bits.coarsen(two, one, 3),
        lambda: _bits.coarsen(two, one, 1),
        lambda: bits.mark_ranges(one, places, more, 512),
        lambda: bits.mark_ranges(one, places, places, 500),
        lambda: bits.first_outside(places, more, 512),
        lambda: _bits.runs(one, 0, 2),
        lambda: _bits.runs(one, 1, 0),
        lambda: _bits.extents(one, 0, 2, 1, places, places, 0, 1),
        lambda: _bits.extents(one, 0, 1, 1, places, places, 0, 2),
        lambda: _bits.extents(one, 0, 1, 1, places, more, 0, 1),
        lambda: bits.InPlace(one, 65 * 512, 512),
        lambda: bits.InPlace(one, -1, 512),
        lambda: bits.InPlace(one, 1, 0),
        lambda: bits.Notes(places, more, 1, 512),
        lambda: bits.Notes(places, places, -1, 512),
        lambda: bits.Notes(places, places, 1, 500),
        lambda: _bits.use_level(_bits.BEST_LEVEL + 1),
    ):
        with pytest.raises((ValueError, IndexError)):
            call()


@given(bitmaps.filter(len), st.data())
def test_two_threads_find_what_one_does(flags: list[bool], data: st.DataObject) -> None:
    """Halves meet wherever they do: in runs of many words, and beside them."""
    flags = (flags * 3000)[: data.draw(st.integers(1, 6000))] + flags
    nbits, factor = len(flags), data.draw(factors)
    words, other = pack(flags), pack(flags[::-1])

    def results() -> list[Any]:
        fine = bits.refine(words, nbits * factor, factor)
        return [*bits.extents(words, nbits * 8 - 3, 8), *bits.combine(words, other, bits.XOR), fine]

    alone = results()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bits, "LARGE", 0)
        shared = results()
    assert all(np.array_equal(one, other) for one, other in zip(alone, shared, strict=True))
    assert [alone[0].tolist(), alone[1].tolist()] == [
        [start * 8 for start, _ in runs(flags)],
        [min((start + length) * 8, nbits * 8 - 3) - start * 8 for start, length in runs(flags)],
    ]


def test_without_another_thread_one_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the end of the interpreter, and where the system has no more threads."""

    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    one, other = np.arange(100, dtype="<u8"), np.arange(100, dtype="<u8")[::-1].copy()
    alone, count = bits.combine(one, other, bits.XOR)
    monkeypatch.setattr(bits, "LARGE", 0)
    monkeypatch.setattr(threading.Thread, "start", refused)
    shared, again = bits.combine(one, other, bits.XOR)
    assert np.array_equal(shared, alone)
    assert again == count


def test_a_failure_of_either_thread_is_raised() -> None:
    words = np.zeros(4, "<u8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bits, "LARGE", 0)
        for short in (words[:1], words[:3]):
            with pytest.raises(ValueError, match="elements beside"):
                bits.combine(words, short, bits.OR)


def test_extents_write_no_more_than_there_is_room_for() -> None:
    """As when another thread sets bits after the runs have been counted."""
    words = np.full(200, 0x5555555555555555, "<u8")
    for room in (0, 1, 3, 4, 5, 100):
        starts, lengths = np.full(120, -7, np.int64), np.full(120, -7, np.int64)
        _bits.extents(words, 0, 200, 1, starts, lengths, 5, 5 + room)
        assert (starts[:5] == -7).all()
        assert (lengths[5 + room :] == -7).all()
        assert (starts[5 + room :] == -7).all()
        assert starts[5 : 5 + room].tolist() == list(range(0, 2 * room, 2))
        assert (lengths[5 : 5 + room] == 1).all()


@at_each_level
@given(bitmaps, st.integers(0, 7))
def test_extents_in_bits(flags: list[bool], by: int) -> None:
    starts, lengths = bits.extents(unaligned(pack(flags), by), len(flags))
    assert starts.dtype == lengths.dtype == np.int64
    assert list(zip(starts.tolist(), lengths.tolist(), strict=True)) == runs(flags)


@at_each_level
@given(bitmaps.filter(len), st.data())
def test_extents_in_units_end_where_the_disk_does(flags: list[bool], data: st.DataObject) -> None:
    unit = 1 << data.draw(st.integers(0, 62 - len(flags).bit_length()))
    size = len(flags) * unit - data.draw(st.integers(0, unit - 1))
    starts, lengths = bits.extents(pack(flags), size, unit)
    expected = [(start * unit, min((start + length) * unit, size) - start * unit) for start, length in runs(flags)]
    assert list(zip(starts.tolist(), lengths.tolist(), strict=True)) == expected


@at_each_level
@given(bitmaps.filter(len), st.integers(1, 6), st.data())
def test_runs_without_an_array_are_the_same_extents(flags: list[bool], step: int, data: st.DataObject) -> None:
    unit = 1 << data.draw(st.integers(0, 62 - len(flags).bit_length()))
    size = len(flags) * unit - data.draw(st.integers(0, unit - 1))
    words = pack(flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bits, "STEP", step)
        parts = list(bits.runs_of(memoryview(words.tobytes()).cast("Q"), size, unit))
    assert all(len(starts) == len(lengths) > 0 for starts, lengths in parts)
    found = [(start, length) for part in parts for start, length in zip(*part, strict=True)]
    starts, lengths = bits.extents(words, size, unit)
    assert found == list(zip(starts.tolist(), lengths.tolist(), strict=True))


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


@at_each_level
@given(bitmaps, factors, st.integers(0, 7))
def test_coarsen_is_any_of_each_group(flags: list[bool], factor: int, by: int) -> None:
    expected = [any(flags[at : at + factor]) for at in range(0, len(flags), factor)]
    assert unpack(bits.coarsen(unaligned(pack(flags), by), len(flags), factor), len(expected)) == expected


@at_each_level
@given(bitmaps, factors, st.data())
def test_refine_repeats_each_bit(flags: list[bool], factor: int, data: st.DataObject) -> None:
    flags = flags[: 20_000 // factor]
    nbits = max(0, len(flags) * factor - data.draw(st.integers(0, factor - 1)))
    expected = [flags[at // factor] for at in range(nbits)]
    fine = bits.refine(unaligned(pack(flags), data.draw(st.integers(0, 7))), nbits, factor)
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


@at_each_level
@pytest.mark.parametrize("nbits", [5 * 2**20, 5 * 2**20 + 77])
@pytest.mark.parametrize("density", [0.0003, 0.01, 0.2, 0.9, "thirds", "words"])
def test_many_words_against_numpy(nbits: int, density: float | str) -> None:
    """Stretches of words of every kind that `extents` tells apart."""
    rng = np.random.default_rng(nbits)
    if density == "thirds":
        # Clear, dense and sparse, with the borders inside words.
        flags = rng.random(nbits) < np.repeat([0, 0.3, 0.0001], -(-nbits // 3))[:nbits]
    elif density == "words":
        # Stretches without a single edge.
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
    bits.scatter(refilled, starts[order], (starts + lengths - 1)[order])
    assert np.array_equal(refilled, words)
