"""`Bitmap` against models that know nothing of words: a flag for each granule, or a bit for each byte of the disk."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dirtmap.engine.model import bits
from dirtmap.engine.model.bitmap import Bitmap
from dirtmap.fmt.errors import BitmapError, Error, RangeError

GRANULARITIES = [512 << power for power in range(23)]
LARGEST = 2**63 - 1
TIB = 2**40

sizes = st.one_of(st.integers(0, 3000), st.integers(0, 600_000), st.sampled_from([512 * 64, 512 * 64 + 1, 512 * 1024]))
granularities = st.sampled_from(GRANULARITIES[:6])


def granule_flags(bitmap: Bitmap) -> list[bool]:
    """A flag for each granule, from the packed bytes; nothing may be set behind the last."""
    packed = bytes(bitmap.packed())
    granules = -(-bitmap.size // bitmap.granularity)
    assert len(packed) == -(-granules // 8)
    flags = [bool(byte >> bit & 1) for byte in packed for bit in range(8)]
    assert not any(flags[granules:])
    return flags[:granules]


def dirty(bitmap: Bitmap) -> int:
    """The dirty bytes of the disk, each a bit of one number."""
    unit = (1 << bitmap.granularity) - 1
    whole = sum(unit << at * bitmap.granularity for at, flag in enumerate(granule_flags(bitmap)) if flag)
    return whole & ((1 << bitmap.size) - 1)


def extents(bitmap: Bitmap) -> list[tuple[int, int]]:
    offsets, lengths = bitmap.extents()
    assert offsets.dtype == lengths.dtype == np.int64
    return list(zip(offsets.tolist(), lengths.tolist(), strict=True))


def naive_extents(flags: list[bool], size: int, granularity: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for at, flag in enumerate(flags):
        if flag and found and sum(found[-1]) == at * granularity:
            found[-1] = (found[-1][0], found[-1][1] + granularity)
        elif flag:
            found.append((at * granularity, granularity))
    return [(offset, min(length, size - offset)) for offset, length in found]


@st.composite
def bitmaps(draw: st.DrawFn, size: int | None = None) -> Bitmap:
    """Runs, single granules, and what is between them, at any granularity; the size given or any small one."""
    if size is None:
        size = draw(st.integers(0, 40_000))
    bitmap = Bitmap(size, draw(granularities), draw(st.booleans()))
    for _ in range(draw(st.integers(0, 4))):
        offset = draw(st.integers(0, size))
        length = draw(st.integers(0, size - offset))
        (bitmap.clear if draw(st.integers(0, 3)) == 0 else bitmap.mark)(offset, length)
    return bitmap


pairs = st.integers(0, 40_000).flatmap(lambda size: st.tuples(bitmaps(size), bitmaps(size)))
triples = st.integers(0, 40_000).flatmap(lambda size: st.tuples(bitmaps(size), bitmaps(size), bitmaps(size)))


class Values(RuleBasedStateMachine):
    """Several bitmaps of one shape, some of them copies of others; a change shows in the one changed only."""

    @initialize(size=sizes, granularity=granularities)
    def begin(self, size: int, granularity: int) -> None:
        self.size, self.granularity = size, granularity
        granules = -(-size // granularity)
        self.bitmaps = [Bitmap(size, granularity)]
        self.models = [bytearray(granules)]
        # What each granule covers, for the rules of rounding in words of bytes.
        self.covers = [(at * granularity, min((at + 1) * granularity, size)) for at in range(granules)]

    def ranges(self, data: st.DataObject) -> tuple[int, int]:
        """Any range inside the disk, often on the border of a granule or at the disk's end."""
        borders = st.integers(0, len(self.covers)).map(lambda at: min(at * self.granularity, self.size))
        ends = st.one_of(st.integers(0, self.size), borders, st.just(self.size))
        first, second = sorted((data.draw(ends), data.draw(ends)))
        return first, second - first

    def chosen(self, data: st.DataObject) -> int:
        return data.draw(st.integers(0, len(self.bitmaps) - 1))

    def model_mark(self, which: int, offset: int, length: int) -> None:
        for at, (first, end) in enumerate(self.covers):
            if offset < end and first < offset + length and length:
                self.models[which][at] = 1

    @rule(data=st.data())
    def mark(self, data: st.DataObject) -> None:
        which, (offset, length) = self.chosen(data), self.ranges(data)
        self.bitmaps[which].mark(offset, length)
        self.model_mark(which, offset, length)

    @rule(data=st.data())
    def clear(self, data: st.DataObject) -> None:
        which, (offset, length) = self.chosen(data), self.ranges(data)
        self.bitmaps[which].clear(offset, length)
        for at, (first, end) in enumerate(self.covers):
            if offset <= first and end <= offset + length:
                self.models[which][at] = 0

    @rule(data=st.data(), number=st.integers(0, 8), as_arrays=st.booleans())
    def mark_many(self, data: st.DataObject, number: int, as_arrays: bool) -> None:
        which, ranges = self.chosen(data), [self.ranges(data) for _ in range(number)]
        offsets, lengths = [offset for offset, _ in ranges], [length for _, length in ranges]
        if as_arrays:
            self.bitmaps[which].mark_many(np.array(offsets, np.uint64), np.array(lengths, np.int32))
        else:
            self.bitmaps[which].mark_many(offsets, lengths)
        for offset, length in ranges:
            self.model_mark(which, offset, length)

    @rule(data=st.data(), number=st.integers(1, 4))
    def mark_many_refused(self, data: st.DataObject, number: int) -> None:
        which, ranges = self.chosen(data), [self.ranges(data) for _ in range(number)]
        ranges.insert(data.draw(st.integers(0, number)), (self.size, 1))
        with pytest.raises(RangeError):
            self.bitmaps[which].mark_many([offset for offset, _ in ranges], [length for _, length in ranges])

    @rule(data=st.data())
    def copy(self, data: st.DataObject) -> None:
        if len(self.bitmaps) < 4:
            which = self.chosen(data)
            self.bitmaps.append(self.bitmaps[which].copy())
            self.models.append(self.models[which][:])

    @invariant()
    def agree(self) -> None:
        for bitmap, model in zip(self.bitmaps, self.models, strict=True):
            flags = [flag == 1 for flag in model]
            assert granule_flags(bitmap) == flags
            assert bitmap.count == sum(model) * self.granularity
            assert extents(bitmap) == naive_extents(flags, self.size, self.granularity)


Values.TestCase.settings = settings(max_examples=100, stateful_step_count=20)
TestValues = Values.TestCase


# Set algebra, in bytes of the disk.


@given(pairs)
def test_operators_are_those_of_sets_of_bytes(pair: tuple[Bitmap, Bitmap]) -> None:
    a, b = pair
    before = dirty(a), dirty(b)
    operators: list[tuple[Callable[[Any, Any], Any], int]] = [
        (lambda x, y: x | y, dirty(a) | dirty(b)),
        (lambda x, y: x & y, dirty(a) & dirty(b)),
        (lambda x, y: x - y, dirty(a) & ~dirty(b)),
        (lambda x, y: x ^ y, dirty(a) ^ dirty(b)),
    ]
    for operator, expected in operators:
        result = operator(a.copy().freeze(), b)
        assert dirty(result) == expected
        assert result.granularity == min(a.granularity, b.granularity)
        assert (result.size, result.recording, result.frozen) == (a.size, a.recording, False)
        result.mark(0, a.size)
    assert (dirty(a), dirty(b)) == before, "a result shares nothing with its operands"
    assert (a == b) == (before[0] == before[1])
    assert (a != b) == (before[0] != before[1])


@given(triples)
def test_laws_of_sets(triple: tuple[Bitmap, Bitmap, Bitmap]) -> None:
    a, b, c = triple
    assert a | b == b | a
    assert a & b == b & a
    assert a ^ b == b ^ a
    assert (a | b) | c == a | (b | c)
    assert (a & b) & c == a & (b & c)
    assert (a ^ b) ^ c == a ^ (b ^ c)
    assert a & (b | c) == (a & b) | (a & c)
    assert a | (b & c) == (a | b) & (a | c)
    assert a - (b | c) == (a - b) - c
    assert a - (b & c) == (a - b) | (a - c)
    assert a ^ b == (a | b) - (a & b)
    assert (a - b) | (a & b) == a
    assert a | a == a & a == a
    assert a - a == a ^ a == Bitmap(a.size)


def test_in_place_operators_make_a_new_value() -> None:
    a = before = Bitmap(8192, 4096)
    a |= Bitmap.from_extents(8192, [512], [512], 512)
    assert (before.count, a.count, a.granularity) == (0, 512, 512)


@given(bitmaps(), granularities)
def test_at_rounds_outward_and_back_again(bitmap: Bitmap, granularity: int) -> None:
    other = bitmap.at(granularity)
    assert (other.size, other.granularity, other.recording) == (bitmap.size, granularity, bitmap.recording)
    if granularity <= bitmap.granularity:
        assert dirty(other) == dirty(bitmap)
        assert other == bitmap
        assert granule_flags(other.at(bitmap.granularity)) == granule_flags(bitmap)
    else:
        group = granularity // bitmap.granularity
        flags = granule_flags(bitmap)
        assert granule_flags(other) == [any(flags[at : at + group]) for at in range(0, len(flags), group)]
    before = dirty(bitmap)
    other.mark(0, bitmap.size)
    assert dirty(bitmap) == before


@given(bitmaps(), st.integers(0, 60_000))
def test_resized_keeps_what_stays_and_dirties_what_is_new(bitmap: Bitmap, size: int) -> None:
    flags, granularity = granule_flags(bitmap), bitmap.granularity
    other = bitmap.resized(size)
    assert (other.size, other.granularity, other.recording) == (size, granularity, bitmap.recording)
    assert granule_flags(other) == [
        end > bitmap.size or flags[at]
        for at, end in enumerate(min(end, size) for end in range(granularity, size + granularity, granularity))
    ]


def test_at_over_the_whole_span_of_granularities() -> None:
    bitmap = Bitmap.from_extents(2**32 + 1, [2**31 - 1, 2**32], [1, 1], 512)
    coarse = bitmap.at(2**31)
    assert extents(coarse) == [(0, 2**31), (2**32, 1)]
    assert extents(coarse.at(512)) == [(0, 2**31), (2**32, 1)]
    assert extents(bitmap & coarse) == [(2**31 - 512, 512), (2**32, 1)]


def test_equality() -> None:
    a = Bitmap.from_extents(10_000, [0], [10_000], 4096)
    assert a == Bitmap.from_extents(10_000, [0], [10_000], 512, recording=False).freeze()
    assert a != Bitmap.from_extents(10_001, [0], [10_001], 4096), "another size"
    assert a != Bitmap.from_extents(10_000, [0], [9728], 512), "the last 272 bytes are clean"
    assert a != "a"
    with pytest.raises(TypeError, match="unhashable"):
        hash(a)


def test_operands_must_be_bitmaps_for_the_same_disk() -> None:
    operators: list[Callable[[Bitmap, Any], object]]
    operators = [Bitmap.__or__, Bitmap.__and__, Bitmap.__sub__, Bitmap.__xor__]
    for operate in operators:
        with pytest.raises(BitmapError, match="for a disk of 1000 bytes; the other is for one of 1001"):
            operate(Bitmap(1000), Bitmap(1001))
        assert operate(Bitmap(1000), {0}) is NotImplemented


# Shapes at their limits.


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 64 * 512, 64 * 512 + 1, 8 * 65536 + 3, 12_345_677])
@pytest.mark.parametrize("granularity", [512, 4096, 65536, 2**31])
def test_a_whole_disk(size: int, granularity: int) -> None:
    bitmap = Bitmap(size, granularity)
    assert (bitmap.count, extents(bitmap)) == (0, [])
    bitmap.mark(0, size)
    assert bitmap.count == -(-size // granularity) * granularity
    assert extents(bitmap) == ([(0, size)] if size else [])
    assert bitmap == Bitmap.from_packed(size, granularity, b"\xff" * len(bitmap.packed()))
    assert bitmap == Bitmap.from_extents(size, [0], [size])
    if size > 1:
        bitmap.clear(0, size - 1)
        start = (size - 1) // granularity * granularity
        assert extents(bitmap) == [(start, size - start)], "only its last byte keeps the last granule dirty"
    bitmap.clear(0, size)
    assert extents(bitmap) == []


def test_count_is_in_whole_granules() -> None:
    """QEMU, query-block: 262144 on a disk of 197120 bytes at 64 KiB."""
    assert Bitmap.from_extents(197120, [0], [197120], 65536).count == 262144


@pytest.mark.parametrize("size", [LARGEST, LARGEST - 2**31 + 2])
def test_the_largest_disk(size: int) -> None:
    """Rounded up to granules of 2 GiB it has 2**63 bytes, which is one more than an int64 holds."""
    bitmap = Bitmap(size, 2**31)
    bitmap.mark_many([size - 1, 5, size, size], [1, 0, 0, 0])
    assert extents(bitmap) == [(2**63 - 2**31, size - 2**63 + 2**31)]
    for offset, length in [(size, 1), (1, size), (size - 1, 2), (LARGEST, LARGEST), (0, 2**63), (2**64, 1)]:
        with pytest.raises(RangeError):
            bitmap.mark(offset, length)
        with pytest.raises(RangeError):
            bitmap.mark_many([offset], [length])
    assert bitmap.count == 2**31
    bitmap.mark(0, size)
    assert (extents(bitmap), bitmap.count) == ([(0, size)], 2**63)
    bitmap.clear(1, size - 1)
    assert extents(bitmap) == [(0, 2**31)]


def test_operators_on_a_huge_disk() -> None:
    size = 2**55 + 3
    a = Bitmap.from_extents(size, [size - 1, 2**54 + 1], [1, 2**31], 2**31)
    b = Bitmap.from_extents(size, [2**54 + 2**31, 0], [2**30, 1], 2**29)
    assert extents(a & b) == [(2**54 + 2**31, 2**30)]
    assert extents(b - a) == [(0, 2**29)]
    assert extents(a ^ b) == [(0, 2**29), (2**54, 2**31), (2**54 + 3 * 2**30, 2**30), (2**55, 3)]


@pytest.mark.parametrize("size", [-1, 2**63, 2**64])
def test_sizes_that_no_disk_has(size: int) -> None:
    with pytest.raises(BitmapError, match=r"a disk has 0 to 2\*\*63 - 1 bytes"):
        Bitmap(size)


@pytest.mark.parametrize("granularity", [0, -512, 1, 256, 513, 65535, 3 * 512, 2**32, 2**64])
def test_granularities_that_no_bitmap_has(granularity: int) -> None:
    with pytest.raises(BitmapError, match="is not a power of two from 512 bytes to 2 GiB"):
        Bitmap(4096, granularity)
    with pytest.raises(BitmapError):
        Bitmap(4096).at(granularity)


def test_shapes_must_be_whole_numbers() -> None:
    arguments: list[Any]
    for arguments in ([1.0], ["1"], [None], [512, 512.0]):
        with pytest.raises(TypeError):
            Bitmap(*arguments)
    assert Bitmap(np.int64(512), np.uint32(512)) == Bitmap(512, 512)


# Ranges that are refused.


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 10_001), (10_001, 0), (10_000, 1), (-1, 1), (-1, 5000), (1, -1), (5000, -5000), (2**63, 0),
     (0, 2**63), (LARGEST, LARGEST), (2**63 - 1, 1), (2**64, 2**64), (-(2**63), 1), (1, -(2**63)),
     (-(2**64), 2**64)],
)  # fmt: skip
def test_ranges_outside_the_disk_change_nothing(offset: int, length: int) -> None:
    bitmap = Bitmap.from_extents(10_000, [4096], [4096], 4096)
    for change in (bitmap.mark, bitmap.clear):
        with pytest.raises(RangeError) as caught:
            change(offset, length)
        assert isinstance(caught.value, ValueError)
        assert isinstance(caught.value, Error)
        what = f"1 byte at {offset} is" if length == 1 else f"{length} bytes at {offset} are"
        assert str(caught.value) == f"bitmap: {what} not inside a disk of 10000 bytes"
    for where in range(3):
        offsets, lengths = [0, 8192], [1, 1]
        offsets.insert(where, offset)
        lengths.insert(where, length)
        with pytest.raises(RangeError):
            bitmap.mark_many(offsets, lengths)
        if max(map(abs, (offset, length))) < 2**63:
            with pytest.raises(RangeError, match=f"{length} bytes? at {offset} (is|are) not"):
                bitmap.mark_many(np.array(offsets), np.array(lengths))
    assert extents(bitmap) == [(4096, 4096)]


@pytest.mark.parametrize(
    ("offsets", "lengths", "error"),
    [
        ([0, 1], [1], RangeError),
        ([], [1], RangeError),
        (np.zeros(2, np.int64), np.ones(1, np.int64), RangeError),
        (np.zeros((2, 1), np.int64), np.ones((2, 1), np.int64), RangeError),
        (np.array([2**63, 0], np.uint64), np.ones(2, np.uint64), RangeError),
        (np.array([0, 2**64 - 1], np.uint64), [1, 1], RangeError),
        ([0.0], [1], TypeError),
        ([0], ["1"], TypeError),
        (np.zeros(1), np.ones(1), TypeError),
        (np.zeros(1, np.bool_), np.ones(1, np.bool_), TypeError),
        (0, 1, TypeError),
        (None, None, TypeError),
    ],
)
def test_sequences_that_are_no_ranges_change_nothing(offsets: Any, lengths: Any, error: type[Exception]) -> None:
    bitmap = Bitmap(10_000, 4096)
    with pytest.raises(error):
        bitmap.mark_many(offsets, lengths)
    with pytest.raises(error):
        Bitmap.from_extents(10_000, offsets, lengths)
    assert bitmap.count == 0


def test_numbers_past_int64_are_not_taken_for_negative_ones() -> None:
    for offsets in (np.array([2**64 - 1], np.uint64), [2**64 - 1]):
        with pytest.raises(RangeError, match=r"go from 0 to 2\*\*63 - 1$"):
            Bitmap(LARGEST, 2**31).mark_many(offsets, [1])


def test_ranges_must_be_whole_numbers() -> None:
    bitmap = Bitmap(10_000)
    ranges: list[tuple[Any, Any]] = [(0.0, 1), (0, 1.0), ("0", 1), (None, 1), (0, np.float64(1))]
    for offset, length in ranges:
        for change in (bitmap.mark, bitmap.clear):
            with pytest.raises(TypeError):
                change(offset, length)
    assert bitmap.count == 0


def test_ranges_may_come_as_any_integers() -> None:
    expected = Bitmap.from_extents(2 * TIB, [TIB, 0], [1, 65536])
    assert expected.count == 2 * 65536
    ranges: list[tuple[Any, Any]] = [
        ((TIB, 0), range(1, 65537, 65535)),
        (iter([TIB, 0]), iter([1, 65536])),
        (np.array([TIB, 0], np.uint64), np.array([1, 65536], np.uint32)),
        (np.array([TIB, 0], object), np.array([1, 65536], ">i8")),
        (np.array([TIB, 7, 0])[::2], [np.int8(1), np.uint64(65536)]),
    ]
    for offsets, lengths in ranges:
        assert Bitmap.from_extents(2 * TIB, offsets, lengths) == expected


def test_a_length_of_zero_marks_nothing() -> None:
    bitmap = Bitmap(10_000, 4096)
    for offset in (0, 1, 4096, 8192, 9000, 10_000):
        bitmap.mark(offset, 0)
        bitmap.mark_many([offset], [0])
    bitmap.mark_many([], [])
    assert bitmap.count == 0
    bitmap.mark(0, 10_000)
    for offset in (0, 1, 4096, 8192, 9000, 10_000):
        bitmap.clear(offset, 0)
    assert extents(bitmap) == [(0, 10_000)]


# Packed bits, and who may write to them.


@given(bitmaps(), st.binary(max_size=9))
def test_packed_there_and_back(bitmap: Bitmap, more: bytes) -> None:
    packed = bytes(bitmap.packed())
    again = Bitmap.from_packed(bitmap.size, bitmap.granularity, packed + more, bitmap.recording)
    assert again == bitmap
    assert (again.packed().tobytes(), again.recording) == (packed, bitmap.recording)


def test_packed_is_least_significant_bit_first_and_bits_behind_the_last_are_dropped() -> None:
    bitmap = Bitmap.from_packed(9 * 512 + 1, 512, bytes([0b0000_0101, 0b1111_1110, 0xFF]))
    assert extents(bitmap) == [(0, 512), (1024, 512), (9 * 512, 1)]
    assert bitmap.packed().tobytes() == bytes([0b0000_0101, 0b0000_0010])
    assert bitmap.words.tolist() == [0b10_0000_0101]


def test_packed_data_that_are_too_short() -> None:
    with pytest.raises(BitmapError, match="1 byte of packed bits where 2 are needed"):
        Bitmap.from_packed(9 * 512, 512, b"\xff")
    with pytest.raises(BitmapError, match="0 bytes"):
        Bitmap.from_packed(1, 512, b"")
    assert Bitmap.from_packed(0, 512, b"").count == 0


def test_nobody_writes_to_the_words_but_the_bitmap() -> None:
    data = bytearray(b"\x01" * 8)
    bitmap = Bitmap.from_packed(64 * 512, 512, data)
    data[:] = bytes(8)
    assert bitmap.count == 8 * 512, "a copy of the data"
    with pytest.raises(ValueError, match="read-only"):
        bitmap.words[0] = 0
    with pytest.raises(TypeError, match="read-only"):
        bitmap.packed()[0] = 0
    assert (bitmap.words.dtype, bitmap.words.ndim) == (np.dtype("<u8"), 1)
    bitmap.mark(0, 1024)
    assert bitmap.count == 9 * 512, "reading the words does not freeze them"


@pytest.mark.parametrize("duplicate", [Bitmap.copy, copy.copy, copy.deepcopy, Bitmap.replace])
def test_copies_part_at_the_first_change(duplicate: Callable[[Bitmap], Bitmap]) -> None:
    first = Bitmap.from_extents(10_000, [0], [1], 4096)
    second = duplicate(first)
    third = duplicate(second)
    second.mark(4096, 1)
    first.clear(0, 10_000)
    assert [extents(each) for each in (first, second, third)] == [[], [(0, 8192)], [(0, 4096)]]


@pytest.mark.parametrize("duplicate", [Bitmap.copy, copy.copy, copy.deepcopy, Bitmap.replace])
def test_a_mark_after_a_mark_goes_where_it_should(duplicate: Callable[[Bitmap], Bitmap]) -> None:
    """The first mark prepares the next ones, which must notice all that happens in between."""
    first = Bitmap(10_000, 4096)
    first.mark(0, 1)
    second = duplicate(first)
    first.mark(4096, 1)
    second.mark(9000, 1)
    second.mark(9001, 1)
    assert (extents(first), extents(second)) == ([(0, 8192)], [(0, 4096), (8192, 1808)])
    assert (first.count, second.count) == (8192, 8192)
    first.mark(8192, 1)
    first.mark(9999, 1)
    assert first.count == 3 * 4096, "what was counted before does not count any more"
    first.clear(0, 4096)
    assert first.count == 2 * 4096
    first.mark(0, 0)
    with pytest.raises(RangeError):
        first.mark(9_999, 2)
    with pytest.raises(TypeError):
        first.mark(0, 1.0)  # type: ignore[arg-type]
    first.mark(np.int8(0), np.uint64(1))
    assert extents(first) == [(0, 10_000)]
    assert first.freeze().count == 3 * 4096
    with pytest.raises(BitmapError, match="frozen"):
        first.mark(0, 1)


def test_a_mark_after_a_freeze_is_refused() -> None:
    bitmap = Bitmap(10_000, 4096)
    bitmap.mark(0, 1)
    bitmap.freeze()
    with pytest.raises(BitmapError, match="frozen"):
        bitmap.mark(4096, 1)
    assert extents(bitmap) == [(0, 4096)]


def test_the_count_of_a_combination_is_that_of_its_bits() -> None:
    a, b = Bitmap.from_extents(10_000, [0, 9_000], [1, 1], 512), Bitmap.from_extents(10_000, [0], [4096], 4096)
    for result in (a | b, a & b, a - b, a ^ b):
        again = Bitmap.from_packed(10_000, 512, bytes(result.packed()))
        assert result.count == result.copy().count == again.count
        result.mark(0, 10_000)
        assert result.count == 20 * 512
        result.clear(0, 512)
        assert result.count == 19 * 512


def test_a_frozen_bitmap_refuses_changes_and_its_copies_do_not() -> None:
    frozen = Bitmap.from_extents(10_000, [0], [1], 4096)
    assert not frozen.frozen
    assert frozen.freeze() is frozen
    assert frozen.frozen
    for change in (
        lambda: frozen.mark(0, 1),
        lambda: frozen.mark(0, 0),
        lambda: frozen.mark_many([0], [1]),
        lambda: frozen.clear(0, 4096),
    ):
        with pytest.raises(BitmapError, match="frozen"):
            change()
    assert extents(frozen) == [(0, 4096)]
    for other in (frozen.copy(), frozen.replace(recording=False), frozen.at(4096), frozen | frozen):
        assert not other.frozen
        other.mark(0, 10_000)
        assert extents(other) == [(0, 10_000)]
    assert extents(frozen) == [(0, 4096)]


def test_flags() -> None:
    plain = Bitmap(10_000)
    assert (plain.recording, plain.inconsistent, plain.busy, plain.frozen) == (True, False, False, False)
    assert repr(plain) == "<Bitmap of 10000 bytes at 65536 recording>"
    other = plain.replace(recording=False, busy=True).freeze()
    assert repr(other) == "<Bitmap of 10000 bytes at 65536 busy frozen>"
    assert (other.copy().recording, other.copy().busy) == (False, True)
    assert (plain.recording, plain.busy) == (True, False)
    assert not Bitmap.from_extents(1, [], [], recording=False).recording


# Content that a container supplies.


class Counting:
    """A source that counts how often it is read."""

    damage: str | None = None
    uniform: bool | None = None

    def __init__(self, *words: int) -> None:
        self.content, self.reads = words, 0

    def load(self) -> bits.Words:
        self.reads += 1
        return np.array(self.content, "<u8")


def test_a_lazy_bitmap_reads_its_source_once_and_only_when_asked() -> None:
    source = Counting(0b101)
    bitmap = Bitmap._lazy(3 * 512, 512, False, False, source)
    other = bitmap.replace(recording=True)
    assert repr(bitmap) == "<Bitmap of 1536 bytes at 512>"
    assert (bitmap.size, bitmap.granularity, bitmap.recording, source.reads) == (1536, 512, False, 0)
    assert extents(bitmap) == [(0, 512), (1024, 512)]
    assert (bitmap.count, bitmap | bitmap == bitmap, source.reads) == (1024, True, 1)
    assert bitmap.copy().count == 1024
    assert source.reads == 1, "a copy of what has been read does not read again"
    assert bitmap._source is bitmap.copy()._source is bitmap.at(512)._source is source, "content unchanged"
    assert (other._source, other.recording, other.count) == (source, True, 1024)
    assert bitmap.at(1024)._source is (bitmap | bitmap)._source is None, "other content"


@pytest.mark.parametrize("read_first", [False, True])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda bitmap: bitmap.mark(512, 1), [(0, 1536)]),
        (lambda bitmap: bitmap.mark_many([512], [1]), [(0, 1536)]),
        (lambda bitmap: bitmap.clear(0, 512), [(1024, 512)]),
    ],
)
def test_a_change_drops_the_source_of_the_bitmap_changed(
    change: Callable[[Bitmap], None], expected: list[tuple[int, int]], read_first: bool
) -> None:
    source = Counting(0b101)
    bitmap = Bitmap._lazy(3 * 512, 512, True, False, source)
    if read_first:
        assert bitmap.count == 1024
    twin = bitmap.copy()
    change(bitmap)
    assert (extents(bitmap), bitmap._source) == (expected, None)
    assert (extents(twin), twin._source) == ([(0, 512), (1024, 512)], source)
    assert bitmap.copy()._source is None


def test_a_refused_change_keeps_the_source() -> None:
    source = Counting(0b101)
    bitmap = Bitmap._lazy(3 * 512, 512, True, False, source)
    with pytest.raises(RangeError):
        bitmap.mark(0, 1537)
    with pytest.raises(RangeError):
        bitmap.mark_many([0, 0], [1, 1537])
    frozen = bitmap.replace().freeze()
    with pytest.raises(BitmapError):
        frozen.mark(0, 1)
    assert bitmap._source is frozen._source is source
    assert source.reads == 0


def test_a_source_that_fails_is_asked_again() -> None:
    class Failing(Counting):
        def load(self) -> bits.Words:
            words = super().load()
            if self.reads == 1:
                raise BitmapError("disk.qcow2", "cannot be read just now")
            return words

    bitmap = Bitmap._lazy(3 * 512, 512, True, False, Failing(0b101))
    with pytest.raises(BitmapError, match="just now"):
        bitmap.mark(512, 1)
    assert bitmap._source is not None
    bitmap.mark(512, 1)
    assert extents(bitmap) == [(0, 1536)]


def test_bits_behind_the_last_in_a_source_do_not_count() -> None:
    bitmap = Bitmap._lazy(3 * 512, 512, True, False, Counting(2**64 - 3))
    assert (bitmap.count, extents(bitmap)) == (1024, [(0, 512), (1024, 512)])
    assert granule_flags(bitmap ^ Bitmap(1536, 512)) == [True, False, True]


def test_an_inconsistent_bitmap_gives_no_bit_away() -> None:
    source = Counting(0)
    bitmap = Bitmap._lazy(10_000, 4096, False, True, source)
    sound = Bitmap(10_000)
    uses: list[Callable[[], object]] = [
        lambda: bitmap.words,
        lambda: bitmap.packed(),
        lambda: bitmap.count,
        lambda: bitmap.extents(),
        lambda: bitmap.at(512),
        lambda: bitmap.at(4096),
        lambda: bitmap.mark(0, 1),
        lambda: bitmap.mark_many([], []),
        lambda: bitmap.clear(0, 10_000),
        lambda: bitmap | sound,
        lambda: sound & bitmap,
        lambda: sound - bitmap,
        lambda: bitmap ^ bitmap,
        lambda: bitmap == bitmap,
        lambda: sound == bitmap,
        lambda: bitmap.copy().count,
        lambda: bitmap.replace(recording=True).count,
    ]
    for use in uses:
        with pytest.raises(BitmapError, match="inconsistent; recover it first"):
            use()
    assert repr(bitmap) == "<Bitmap of 10000 bytes at 4096 inconsistent>"
    assert (bitmap.copy().inconsistent, bitmap.copy()._source, source.reads) == (True, source, 0)

    recovered = bitmap.recovered()
    assert extents(recovered) == [(0, 10_000)]
    assert (recovered.granularity, recovered.recording, recovered.inconsistent) == (4096, False, False)
    assert recovered._source is None
    assert bitmap.inconsistent, "the bitmap itself is as it was"


@pytest.mark.parametrize("fill", [False, True])
def test_a_bitmap_that_is_all_one_thing_is_counted_and_mapped_without_its_bits(fill: bool) -> None:
    source = Counting()
    source.uniform = fill
    for bitmap in (
        Bitmap._lazy(1300, 512, False, False, source),
        Bitmap(1300, 512).recovered() if fill else Bitmap(1300, 512),
    ):
        assert bitmap.count == 3 * 512 * fill
        assert extents(bitmap) == [(0, 1300)] * fill
        assert bitmap._words is None
    assert source.reads == 0
    assert bitmap.words.tolist() == [7 * fill]


def test_what_was_damaged_is_told_of_copies_and_of_unions_too() -> None:
    source = Counting(0b101)
    source.damage = "bits are damaged"
    bitmap = Bitmap._lazy(3 * 512, 512, True, False, source)
    assert bitmap.damage is None
    assert bitmap.count == 1024
    assert bitmap.damage == bitmap.copy().damage == "bits are damaged"
    assert (bitmap | bitmap).damage == (Bitmap(3 * 512) | bitmap).damage == "bits are damaged"
    assert (Bitmap(3 * 512) | Bitmap(3 * 512)).damage is None
