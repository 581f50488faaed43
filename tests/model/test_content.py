"""Contents that are not in memory, against the same done to a whole array of flags."""

from __future__ import annotations

import copy
import pickle
import threading
import time
import tracemalloc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.child import in_child

from dirtmap.engine.model import bits, content
from dirtmap.engine.model.bitmap import Bitmap
from dirtmap.engine.model.content import Changed, Content
from dirtmap.fmt.errors import BitmapError, RangeError

if TYPE_CHECKING:
    from dirtmap.engine.model.content import Part

Flags = NDArray[np.bool_]

PAGE, BLOCK = 128, 512


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "PAGE", PAGE)
    monkeypatch.setattr(content, "BLOCK", BLOCK)
    monkeypatch.setattr(content, "LARGE", 256)
    monkeypatch.setattr(content, "_NOTES", 3)


def words_of(flags: Flags) -> bits.Words:
    words = bits.zeros(len(flags))
    words.view(np.uint8)[: -(-len(flags) // 8)] = np.packbits(flags, bitorder="little")
    return words


def flags_of(words: bits.Words, nbits: int) -> Flags:
    return np.unpackbits(words.view(np.uint8), bitorder="little", count=nbits).astype(np.bool_)


class Asked:
    """Flags as a content, which says of stretches of 64 equal ones what they are, and holds callers to the rules."""

    damage = None
    uniform = None

    def __init__(self, flags: Flags) -> None:
        self.nbits, self.flags, self.most = len(flags), flags, 0

    def part(self, first: int, end: int) -> Part:
        assert first % 64 == 0
        assert first < end <= self.nbits
        assert end % 64 == 0 or end == self.nbits
        self.most = max(self.most, end - first)
        here = self.flags[first:end]
        if here.all() or not here.any():
            return bool(here[0])
        words = words_of(here)
        words.flags.writeable = False
        return words

    def load(self) -> bits.Words:
        raise AssertionError("not to be loaded")

    def open(self) -> Content:
        return self


@st.composite
def flags(draw: st.DrawFn, least: int = 257, most: int = 3000) -> Flags:
    """Random bits, with stretches of equal ones."""
    number = draw(st.integers(least, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    found = rng.random(number) < draw(st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]))
    for _ in range(draw(st.integers(0, 4))):
        first, end = sorted(rng.integers(0, number, 2).tolist())
        found[first:end] = rng.random() < 0.5
    return found


def lazy(found: Flags, granularity: int = 512, cut: int = 0) -> Bitmap:
    return Bitmap._lazy(len(found) * granularity - cut, granularity, True, False, Asked(found))


def of(bitmap: Bitmap) -> Flags:
    """The flags of a bitmap, by three ways."""
    nbits = -(-bitmap.size // bitmap.granularity)
    found = np.zeros(nbits, np.bool_)
    ends = [0]
    for offsets, lengths in bitmap.extents_by_parts():
        assert len(offsets) or not bitmap._is_large
        for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True):
            assert offset > ends[-1] or len(ends) == 1, "extents are maximal, and ascend"
            assert length > 0
            assert (offset + length) % bitmap.granularity == 0 or offset + length == bitmap.size
            ends.append(offset + length)
            found[offset // bitmap.granularity : -(-ends[-1] // bitmap.granularity)] = True
    ranges = [pair for part in bitmap.ranges() for pair in zip(*part, strict=True)]
    assert ranges == list(zip(*(each.tolist() for each in bitmap.extents()), strict=True))
    assert bitmap.count == found.sum() * bitmap.granularity
    assert np.array_equal(flags_of(bitmap.copy().words, nbits), found)
    assert bitmap == Bitmap.from_words(bitmap.size, bitmap.granularity, words_of(found), True)
    return found


@given(flags(), st.integers(0, 511), st.data())
def test_before(found: Flags, cut: int, data: st.DataObject) -> None:
    bitmap = lazy(found, cut=cut)
    positions = sorted(data.draw(st.lists(st.integers(0, bitmap.size), max_size=20)))
    dirty, begun = bitmap.before(positions)
    upto = np.append(0, np.repeat(found, 512)[: bitmap.size].cumsum())  # byte by byte
    assert dirty.tolist() == upto[positions].tolist()
    starts = bitmap.extents()[0]
    assert begun.tolist() == [(starts < position).sum() for position in positions]


def test_before_of_what_is_known_without_a_look() -> None:
    full = Bitmap(2**63 - 1, 2**31).recovered()
    assert [numbers.tolist() for numbers in full.before([0, 5, 2**63 - 1])] == [[0, 5, 2**63 - 1], [0, 1, 1]]
    assert [numbers.tolist() for numbers in Bitmap(0).before([0, 0])] == [[0, 0], [0, 0]]
    assert [numbers.tolist() for numbers in Bitmap(512).before([])] == [[], []]


@pytest.mark.parametrize("positions", [[-1], [513], [2, 1], [2**63]])
def test_before_refuses(positions: list[int]) -> None:
    with pytest.raises(RangeError):
        Bitmap(512).before(positions)


def coarse(found: Flags, factor: int) -> Flags:
    padded = np.append(found, np.zeros(-len(found) % factor, np.bool_))
    return padded.reshape(-1, factor).any(axis=1)


def packed(found: Flags, granularity: int = 512, cut: int = 0) -> Bitmap:
    """A frozen bitmap as it comes from an image: in memory, and no array yet."""
    bitmap = Bitmap(len(found) * granularity - cut, granularity)
    bitmap._take(memoryview(bytearray(words_of(found).tobytes())).cast("Q"))
    return bitmap.freeze()


@given(flags(1, 400), st.integers(0, 511), st.data())
def test_bits_that_are_no_array_yet_are_as_any_others(found: Flags, cut: int, data: st.DataObject) -> None:
    assert np.array_equal(of(packed(found, cut=cut)), found)
    first = data.draw(st.integers(0, len(found) - 1))
    bitmap = packed(found, cut=cut)
    one, other = bitmap.copy(), copy.deepcopy(bitmap.copy())
    assert pickle.loads(pickle.dumps(bitmap)) == bitmap
    one.mark(first * 512, 1)
    other.clear(0, other.size)
    assert not other.count
    marked = found.copy()
    marked[first] = True
    assert np.array_equal(of(one), marked)
    assert np.array_equal(of(bitmap), found), "what is made from it does not change it"
    with pytest.raises(BitmapError):
        bitmap.mark(0, 1)


OPERATIONS: list[Callable[[Any, Any], Any]] = [
    lambda a, b: a | b,
    lambda a, b: a & b,
    lambda a, b: a ^ b,
    lambda a, b: a - b if isinstance(a, Bitmap) else a & ~b,
]


@given(flags(), st.data(), st.sampled_from(OPERATIONS))
def test_two_contents_are_combined_part_by_part(one: Flags, data: st.DataObject, operation: Callable[..., Any]) -> None:
    other = data.draw(flags(len(one), len(one)))
    first, second = lazy(one), lazy(other)
    assert np.array_equal(of(operation(first, second)), operation(one, other))
    assert (first == second) == np.array_equal(one, other)
    for bitmap in (first, second):
        assert isinstance(bitmap._source, Asked)
        assert bitmap._source.most <= BLOCK


@given(flags(most=1500), st.sampled_from([2, 8, 64, 128, 1024]), st.integers(0, 511))
def test_other_granularities(found: Flags, factor: int, cut: int) -> None:
    bitmap = lazy(found, 512, cut)
    coarser = bitmap.at(512 * factor)
    assert np.array_equal(of(coarser), coarse(found, factor))
    finer = lazy(found, 512 * factor, cut).at(512)
    nbits = -(-finer.size // 512)
    assert np.array_equal(of(finer), np.repeat(found, factor)[:nbits])
    assert of(coarser | bitmap).sum() == np.repeat(coarse(found, factor), factor)[: len(found)].sum()


@given(flags(), st.integers(0, 3500), st.integers(0, 511), st.integers(0, 511))
def test_other_sizes(found: Flags, number: int, cut: int, other_cut: int) -> None:
    size = max(number * 512 - other_cut, 0)
    bitmap = lazy(found, 512, cut)
    new = bitmap.resized(size)
    wanted = np.append(found, np.ones(3500, np.bool_))[: -(-size // 512)]
    if size > bitmap.size and cut:
        wanted[len(found) - 1 : len(found)] = True
    assert np.array_equal(of(new), wanted)


@given(flags(most=1200), st.integers(0, 2**32), st.integers(1, 12))
@settings(deadline=None)
def test_changes_are_kept_by_themselves(found: Flags, seed: int, acts: int) -> None:
    rng = np.random.default_rng(seed)
    granularity, size = 512, len(found) * 512
    bitmap = lazy(found)
    source = bitmap._source
    assert isinstance(source, Asked)
    kept: list[tuple[Bitmap, Flags]] = []
    flags_now = found.copy()
    for _ in range(acts):
        first, end = sorted(rng.integers(0, len(found) + 1, 2).tolist())
        match rng.integers(0, 5):
            case 0:
                bitmap.mark(first * granularity, (end - first) * granularity)
                flags_now[first:end] = True
            case 1:
                bitmap.clear(first * granularity, (end - first) * granularity)
                flags_now[first:end] = False
            case 2:
                bitmap.mark(int(rng.integers(0, size)), 0)
            case 3:
                starts = rng.integers(0, len(found), 40)
                lengths = np.minimum(rng.integers(0, 2 if rng.random() < 0.5 else 400, 40), len(found) - starts)
                bitmap.mark_many(starts * granularity, lengths * granularity)
                for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
                    flags_now[start : start + length] = True
            case 4:
                kept.append((bitmap, flags_now.copy()))
                bitmap = bitmap.copy()
    assert source.most == 0, "no change needs to read"
    pages = set(bitmap._content.pages().tolist()) if isinstance(bitmap._content, Changed) else set()
    differing = set((np.flatnonzero(flags_now != found) // PAGE).tolist())
    assert differing <= pages
    for one, wanted in [(bitmap, flags_now), *kept]:
        assert np.array_equal(of(one), wanted)


def test_what_is_changed_is_not_more_than_asked_for() -> None:
    bitmap = lazy(np.random.default_rng(1).random(3000) < 0.5)
    bitmap.mark(5 * 512, 1)
    bitmap.clear(1000 * 512, 512 * 30)
    bitmap.mark_many([2000 * 512], [1])
    assert isinstance(bitmap._content, Changed)
    assert bitmap._content.pages().tolist() == [0, 7, 8, 15]
    assert bitmap._source is None


def test_fresh_bitmaps_are_not_in_memory() -> None:
    clean, dirty = Bitmap(3000 * 512, 512), Bitmap(3000 * 512, 512).recovered()
    for bitmap, count in ((clean, 1), (dirty, 3000)):
        bitmap.mark(512, 512)
        assert (bitmap._words, bitmap.count) == (None, count * 512)
    dirty.clear(0, 1024)
    assert (dirty | clean).count == 2999 * 512
    assert (dirty ^ clean)._words is None


LOOKS: dict[str, Callable[[Bitmap], Bitmap]] = {
    "in place": lambda bitmap: bitmap,
    "a copy": lambda bitmap: bitmap.copy(),
    "a deep copy": copy.deepcopy,
    "a pickle": lambda bitmap: pickle.loads(pickle.dumps(bitmap)),
    "frozen": lambda bitmap: bitmap.freeze(),
    "combined": lambda bitmap: bitmap | Bitmap(bitmap.size, bitmap.granularity),
    "finer": lambda bitmap: bitmap.at(512),
    "its words": lambda bitmap: Bitmap.from_words(bitmap.size, bitmap.granularity, bitmap.words.copy(), True),
    "its bytes": lambda bitmap: Bitmap.from_packed(bitmap.size, bitmap.granularity, bitmap.packed()),
    "by extents": lambda bitmap: Bitmap.from_extents(bitmap.size, *bitmap.extents(), bitmap.granularity),
    "counted": lambda bitmap: [bitmap.count, bitmap][1],  # type: ignore[list-item, return-value]
    "marked elsewhere": lambda bitmap: [bitmap.mark_many([7 * 1024], [1]), bitmap][1],  # type: ignore[return-value]
    "cleared elsewhere": lambda bitmap: [bitmap.clear(8 * 1024, 1024), bitmap][1],  # type: ignore[return-value]
}


@pytest.mark.parametrize("noted", range(9))
@pytest.mark.parametrize("look", LOOKS)
def test_marks_that_are_noted_are_there_for_whoever_looks(look: str, noted: int) -> None:
    bitmap, expected = Bitmap(1000 * 1024, 1024), {7} if look == "marked elsewhere" else set()
    for number in range(noted):
        bitmap.mark(number * 101 * 1024, 1)
        expected.add(number * 101)
    found = LOOKS[look](bitmap)
    later = set() if found.frozen else {555}
    for number in later:
        bitmap.mark(number * 1024, 1)
    assert {int(at) // 1024 for at in bitmap.extents()[0]} == expected | later
    now = {at // 1024 for at, length in zip(*found.extents(), strict=True) for at in range(at, at + length, 1024)}
    assert now == (expected | later if found is bitmap else expected)


def test_a_clear_takes_back_what_is_noted_before_it_and_nothing_later() -> None:
    bitmap = Bitmap(1000 * 512, 512)
    for number in (1, 2, 3):
        bitmap.mark(number * 512, 1)
    bitmap.clear(3 * 512, 512)
    assert bitmap.count == 2 * 512
    bitmap.clear(2 * 512, 512)
    bitmap.mark(2 * 512, 1)
    bitmap.mark(5 * 512, 1)
    assert [part.tolist() for part in bitmap.extents()] == [[512, 5 * 512], [1024, 512]]


def test_only_marks_of_a_bitmap_that_nobody_shares_are_noted_at_once() -> None:
    bitmap = Bitmap(1000 * 512, 512)
    bitmap.mark(0, 1)
    assert bits.mark(bitmap._marker, 512, 1)
    for change in (bitmap.copy, bitmap.freeze, lambda: bitmap.words, lambda: bitmap.count, lambda: bitmap | bitmap):
        bitmap.frozen = False
        bitmap.mark(0, 1)
        assert bits.mark(bitmap._marker, 512, 1)
        change()
        assert not bits.mark(bitmap._marker, 512, 1)


def test_threads_that_look_at_once_make_one_change_of_what_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    bitmap, found, scatter, inside = Bitmap(3000 * 512, 512), list[int](), Changed._scatter, list[int]()
    ready = threading.Barrier(4)

    def slowly(changed: Changed, starts: bits.Positions, lasts: bits.Positions) -> None:
        inside.append(len(starts))
        time.sleep(0.05)
        scatter(changed, starts, lasts)

    def look() -> None:
        ready.wait()
        found.append(sum(len(starts) for starts, _ in bitmap.extents_by_parts()))

    monkeypatch.setattr(Changed, "_scatter", slowly)
    for number in (2, 4, 6):
        bitmap.mark(number * 512, 1)
    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (found, [number for number in inside if number]) == ([3] * 4, [2])


def test_a_child_that_is_forked_while_a_thread_settles_marks_settles_them_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bitmap, scatter = Bitmap(3000 * 512, 512), Changed._scatter
    inside, goes_on = threading.Event(), threading.Event()

    def held(changed: Changed, starts: bits.Positions, lasts: bits.Positions) -> None:
        if threading.current_thread() is settler:
            inside.set()
            goes_on.wait()
        scatter(changed, starts, lasts)

    monkeypatch.setattr(Changed, "_scatter", held)
    for number in (2, 4, 6):
        bitmap.mark(number * 512, 1)
    settler = threading.Thread(target=lambda: bitmap.count)
    settler.start()
    inside.wait()
    try:
        assert in_child(lambda: bitmap.count) == 3 * 512
    finally:
        goes_on.set()
        settler.join()
    assert bitmap.count == 3 * 512


def test_a_bitmap_that_goes_on_changing_leaves_what_was_made_from_it() -> None:
    found = np.random.default_rng(2).random(2000) < 0.5
    bitmap = lazy(found)
    bitmap.mark(0, 512)
    union = bitmap | lazy(np.zeros(2000, np.bool_))
    parts = bitmap.extents_by_parts()
    first = next(parts)
    bitmap.clear(0, bitmap.size)
    assert bitmap.count == 0
    assert union.count == (found[1:].sum() + 1) * 512
    assert sum(len(offsets) for offsets, _ in (first, *parts)) == len(union.extents()[0])


@pytest.mark.parametrize("size", [200 * 512, 1000 * 512 + 1], ids=["small", "large"])
def test_what_is_made_of_a_damaged_bitmap_says_so(size: int) -> None:
    bitmap = Bitmap.from_extents(size, [0], [1], 512)
    bitmap.damage = "bits are damaged"
    made = (
        bitmap.at(1024),
        bitmap.at(512),
        bitmap.resized(size + 512),
        bitmap.in_sectors(),
        bitmap.copy(),
        bitmap | bitmap,
    )
    assert {other.damage for other in made} == {"bits are damaged"}


def test_what_is_kept_of_dense_bits_is_made_without_their_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the memory that it takes itself, and little more; and it can be changed by itself, as any other."""
    monkeypatch.setattr(content, "BLOCK", 1 << 21)
    monkeypatch.setattr(content, "PAGE", 1 << 15)
    nbits, page = (1 << 22) + 100, 512
    words = np.full(nbits // 64 + 1, 0x5555555555555555, bits.WORD)
    words[:page] = 2**64 - 1
    words[page : 2 * page] = 0
    words[2 * page : 3 * page] = 0x8000000000000000
    words[3 * page : 4 * page : 7] = 0xFF
    bits.mask_tail(words, nbits)
    before = words.copy()
    tracemalloc.start()
    try:
        kept = content.kept(content.Whole(nbits, words))
        assert tracemalloc.get_traced_memory()[1] < 3 * words.nbytes
    finally:
        tracemalloc.stop()
    assert np.array_equal(content.load(kept), words)
    kept.set(5 * content.PAGE, 5 * content.PAGE + 64, True)
    kept.set(0, 64, False)
    assert np.array_equal(words, before)
    words[5 * page], words[0] = 2**64 - 1, 0
    assert np.array_equal(content.load(kept), words)
