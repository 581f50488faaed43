"""Kernels on packed bits: numpy arrays in, numpy arrays out. No I/O, no names, no checks of disk sizes.

Structure. Bit ``i`` is bit ``i % 64`` of ``words[i // 64]``, a 1-D array of little-endian uint64 (`WORD`). Seen as
bytes, that is least significant bit first, the order in which a qcow2 image stores it. ``nbits`` bits take
``ceil(nbits / 64)`` words. The bits behind the last one, the *tail*, are zero on entry and on return.

    bit     0        63 64      127 128  nbits-1
            |-words[0]-|-words[1]-|-words[2]..0000|
                                              tail

Ranges are half-open: ``start`` is the first bit inside, ``end`` the first bit behind.

Arithmetic. An *edge* is a bit that differs from the one before it; a clear bit is assumed before bit 0. A run of set
bits begins at an edge and ends at the next one. So ``edges = words ^ (words << 1 | top bit of the word before)``, and
its bits are begins and ends in turn. A word without an edge is 64 copies of the top bit of the word before. With words
of 4 bits:

    bits    0000 0110 0011 1111 1110 0000       (least significant bit first)
    edges   0000 0101 0010 0000 0001 0000

The loops are compiled: `_bits.pyx` checks what arrays they get, `bits.h` has the loops. A call on more than 1 MiB gives
up the interpreter's lock, and one that makes a `LARGE` result is shared by two threads.

Cost. Each function takes one or two passes over its input; only ranges that overlap a lot are sorted. For 2**28 bits
(a 16 TiB disk at 64 KiB) on a 2-core virtual machine: `count` 1 ms, `coarsen` by 16 2 ms, `extents` 3 ms with 0.1 % and
15 ms with 10 % of the bits set at random. What comes on top is the memory of large results, which the system hands out
page by page; for those 10 % it takes longer than all else. A million ranges take 10 to 30 ms.
No function is safe while another thread writes to the same words: its result may then be wrong, and no more than that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, TypeVar

from dirtmap.engine.model import _bits
from dirtmap.engine.model._bits import InPlace as InPlace
from dirtmap.engine.model._bits import Marker as Marker
from dirtmap.engine.model._bits import Notes as Notes
from dirtmap.engine.model._bits import mark as mark
from dirtmap.engine.model.later import later
from dirtmap.fmt import geometry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Words = NDArray[np.uint64]
    Positions = NDArray[np.int64]
else:  # `all_zero`, `all_one` and `mark` are used without it
    later(globals(), np="numpy")
Packed = bytes | bytearray | memoryview

_Found = TypeVar("_Found")

WORD: Final = "<u8"
ALL: Final = 2**64 - 1
# Bytes of results that are worth a second thread. It is their memory that takes time, more than the work: the system
# has to find and clear every page of it.
LARGE: Final = 1 << 25
# Words whose runs are found at a time where not all are wanted at once: with those, they stay in the cache.
STEP: Final = 1 << 15
# How `combine` combines.
OR: Final = _bits.OR
AND: Final = _bits.AND
AND_NOT: Final = _bits.AND_NOT
XOR: Final = _bits.XOR


def zeros(nbits: int) -> Words:
    """An array of ``nbits`` clear bits. The system allocates its memory only when it is first written to."""
    return np.zeros(-(-nbits // 64), WORD)


def filled(nbits: int, fill: bool) -> Words:
    """An array of ``nbits`` bits that are all set, or all clear."""
    if not fill:
        return zeros(nbits)
    words = np.full(-(-nbits // 64), ALL, WORD)
    mask_tail(words, nbits)
    return words


def from_packed(data: Packed, nbits: int) -> Words:
    """A copy of the first ``nbits`` bits of ``data``, which has at least ``ceil(nbits / 8)`` bytes."""
    words = zeros(nbits)
    size = -(-nbits // 8)
    words.view(np.uint8)[:size] = memoryview(data).cast("B")[:size]
    mask_tail(words, nbits)
    return words


def mask_tail(words: Words, nbits: int) -> None:
    """Clears the bits behind the last one, in place."""
    if nbits % 64:
        words[-1] &= ALL >> (64 - nbits % 64)


def count(words: NDArray[np.unsignedinteger[Any]] | Packed) -> int:
    """The number of set bits. The elements may be unsigned integers of any width."""
    return _bits.count(words)


def runs(words: Words, start: int, end: int) -> int:
    """The number of runs of set bits that begin in ``words[start:end]``; one may go on from the word before.

    Raises:
        IndexError: there are no such words.
    """
    return _bits.runs(words, start, end)


def all_zero(data: NDArray[np.unsignedinteger[Any]] | Packed) -> bool:
    """True if no bit is set. Stops at the first 512 bytes that have one."""
    return _bits.all_are(data, 0)


def all_one(data: NDArray[np.unsignedinteger[Any]] | Packed) -> bool:
    """True if every bit is set, up to the end of the last byte. Stops at the first 512 bytes that have a clear one."""
    return _bits.all_are(data, 0xFF)


def uniform(words: Words, pieces: int) -> Positions:
    """What all bits of each of so many pieces of the same length are: 0 or 1; -1 where they are not all the same.

    Raises:
        ValueError: the words cannot be divided like that.
    """
    kinds = np.empty(pieces, np.int64)
    _bits.uniform(words, kinds)
    return kinds


def set_range(words: Words, start: int, end: int) -> None:
    """Sets the bits of ``start..end``, in place; an empty range sets none.

    Raises:
        IndexError: the words do not have these bits.
    """
    _bits.set_range(words, start, end)


def clear_range(words: Words, start: int, end: int) -> None:
    """Clears the bits of ``start..end``, in place; an empty range clears none. Errors as `set_range`."""
    _bits.clear_range(words, start, end)


def first_outside(offsets: Positions, lengths: Positions, size: int) -> int | None:
    """The index of the first range that is not inside ``0..size``, or None. Any numbers will do, negative ones too."""
    return _bits.first_outside(_packed(offsets), _packed(lengths), size)


def mark_ranges(words: Words, offsets: Positions, lengths: Positions, granularity: int) -> None:
    """Sets the bit of every granule that has a byte in one of the ranges, in place.

    Args:
        words: one bit per granule.
        offsets: of the ranges, bytes; int64, 1-D, all inside the disk (see `first_outside`). In any order.
        lengths: of the ranges, bytes; may be 0.
        granularity: bytes, a power of two.
    """
    offsets, lengths = _packed(offsets), _packed(lengths)
    done = _bits.mark_ranges(words, offsets, lengths, granularity)
    if done < len(offsets):
        offsets, lengths = offsets[done:], lengths[done:]
        some = lengths > 0
        offsets, lengths = offsets[some], lengths[some]
        _scatter_overlapping(words, offsets // granularity, (offsets + (lengths - 1)) // granularity)


def scatter(words: Words, starts: Positions, lasts: Positions) -> None:
    """Sets the bits of every range, in place. Each range has at least one bit; ranges may overlap, in any order.

    Args:
        words: the bits to change.
        starts: first bit of each range; int64, 1-D.
        lasts: last bit of each range; int64, same shape and order.

    Raises:
        IndexError: the words do not have one of these bits. No bit is set.
    """
    starts, lasts = _packed(starts), _packed(lasts)
    if first_outside(starts, lasts - starts, len(words) * 64 - 1) is not None:
        raise IndexError("a range outside the bits")
    done = _bits.scatter(words, starts, lasts)
    if done < len(starts):
        _scatter_overlapping(words, starts[done:], lasts[done:])


def _scatter_overlapping(words: Words, starts: Positions, lasts: Positions) -> None:
    """`scatter` for ranges that cover the bits many times over: ranges that overlap or touch become one."""
    order = np.argsort(starts)
    starts, ends = starts[order], np.maximum.accumulate(lasts[order]) + 1
    apart = starts[1:] > ends[:-1]
    _bits.scatter(words, starts[np.append(True, apart)], ends[np.append(apart, True)] - 1)


def _packed(numbers: Positions) -> Positions:
    """The same numbers, without space between them."""
    return np.ascontiguousarray(numbers)


def extents(words: Words, size: int, unit: int = 1) -> tuple[Positions, Positions]:
    """The maximal runs of set bits, in order: where each starts, and how long it is.

    Args:
        words: the bits; bit ``i`` stands for ``i * unit .. min((i + 1) * unit, size)``.
        size: where the last bit ends, at most 2**63 - 1; the number of bits if ``unit`` is 1.
        unit: how much one bit stands for, in the unit of ``size`` (bytes or bits).

    Returns:
        Starts and lengths: two new int64 arrays of the same shape, in the unit of ``size``.
    """
    runs = _bits.runs(words, 0, len(words))
    starts = np.empty(runs, np.int64)
    lengths = np.empty_like(starts)
    middle = _between_runs(words) if runs * 16 >= LARGE else 0
    if middle:
        before = min(_bits.runs(words, 0, middle), runs)  # another thread may have set bits since they were counted
        _both(
            lambda: _bits.extents(words, 0, middle, unit, starts, lengths, 0, before),
            lambda: _bits.extents(words, middle, len(words), unit, starts, lengths, before, runs),
        )
    else:
        _bits.extents(words, 0, len(words), unit, starts, lengths, 0, runs)
    bits_before_last, in_last = divmod(-(-size // unit) - 1, 64)
    if runs and int(words[bits_before_last]) >> in_last & 1:
        # The last bit is set, so its end may be no edge: the words may end there. If it is one, it is a multiple of
        # `unit`, which may be past `size`, even past 2**63.
        lengths[-1] = size - int(starts[-1])
    return starts, lengths


def runs_of(words: memoryview, size: int, unit: int) -> Iterator[tuple[memoryview, memoryview]]:
    """The same as `extents` of words that are no array, some at a time and without numpy; int64."""
    begin = 0
    while begin < len(words):
        end = _without_run(words, begin + STEP)
        found = _bits.runs(words, begin, end)
        if found:
            starts, lengths = (memoryview(bytearray(found * 8)).cast("q") for _ in range(2))
            _bits.extents(words, begin, end, unit, starts, lengths, 0, found)
            last, in_last = divmod(-(-size // unit) - 1, 64)
            if end > last and words[last] >> in_last & 1:
                lengths[-1] = size - starts[-1]  # see `extents`
            yield starts, lengths
        begin = end


def _without_run(words: memoryview, begin: int) -> int:
    """A word, not before ``begin``, at whose begin no run is open; or the end."""
    for first in range(begin, len(words), STEP):
        for at in range(first, min(first + 1024, len(words))):
            if not words[at - 1] >> 63:
                return at
    return len(words)


def _between_runs(words: Words) -> int:
    """The first word in the second half at whose begin no run is open; 0 if there is none nearby."""
    half = len(words) // 2
    closed = np.flatnonzero(words[half : half + 1024].view("<i8") >= 0)
    return half + int(closed[0]) + 1 if closed.size else 0


def _both(one: Callable[[], _Found], other: Callable[[], _Found]) -> tuple[_Found, _Found]:
    """What both calls return; another thread, if there can be one, makes the second one meanwhile."""
    found: list[_Found] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            found.append(other())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    try:
        thread.start()
    except RuntimeError:  # at the end of the interpreter, or where the system has no more of them
        return one(), other()
    try:
        own = one()
    finally:
        thread.join()
    for error in failed:
        raise error
    return own, found[0]


def combine(one: Words, other: Words, how: int, into: Words | None = None) -> tuple[Words, int]:
    """Two arrays of the same length, word by word.

    Args:
        one: the bits on the left.
        other: the bits on the right.
        how: `OR`, `AND`, `AND_NOT` (what only the left one has) or `XOR`.
        into: gets the result, and may be one of the two; None for new words.

    Returns:
        The words of the result, and how many of their bits are set.
    """
    result = np.empty(len(one), WORD) if into is None else into
    if result.nbytes < LARGE:
        return result, _bits.combine(one, other, result, how)
    half = len(one) // 2
    counts = _both(
        lambda: _bits.combine(one[:half], other[:half], result[:half], how),
        lambda: _bits.combine(one[half:], other[half:], result[half:], how),
    )
    return result, sum(counts)


def union(parts: list[Words], into: Words) -> None:
    """Makes ``into``, which is clear, what any of the parts has. Blocks of it without a bit are not written to.

    Args:
        parts: arrays of the same length as ``into``.
        into: the result.
    """
    _bits.union(parts, into)


def rescaled(words: Words, size: int, granularity: int, wanted: int) -> Words:
    """The words at another granularity, rounded outward; the same array if the granularity is the same.

    Args:
        words: one bit per granule.
        size: of the disk, in bytes.
        granularity: of the words, in bytes.
        wanted: granularity of the result, in bytes.
    """
    if wanted > granularity:
        return coarsen(words, geometry.granules(size, granularity), wanted // granularity)
    if wanted < granularity:
        return refine(words, geometry.granules(size, wanted), granularity // wanted)
    return words


def coarsen(words: Words, nbits: int, factor: int) -> Words:
    """One bit for each group of ``factor`` bits, set if any of them is: ``ceil(nbits / factor)`` bits, in new words.

    Args:
        words: the fine bits.
        nbits: how many fine bits there are.
        factor: how many fine bits make one coarse bit; a power of two.
    """
    if factor > 64:
        return coarsen(coarsen(words, nbits, 64), -(-nbits // 64), factor // 64)
    if factor == 1:
        return words.copy()
    result = np.empty(-(-nbits // factor // 64), WORD)
    _bits.coarsen(words[: -(-nbits // 64)], result, factor)
    return result


def refine(words: Words, nbits: int, factor: int) -> Words:
    """Repeats each bit ``factor`` times, and cuts the result behind the first ``nbits`` bits: new words.

    Args:
        words: the coarse bits, ``ceil(nbits / factor)`` of them.
        nbits: how many fine bits to make.
        factor: how many fine bits each coarse bit becomes; a power of two.
    """
    if factor > 64:
        return refine(refine(words, -(-nbits // 64), factor // 64), nbits, 64)
    if factor == 1:
        return words.copy()
    result = np.empty(-(-nbits // 64), WORD)
    words = words[: -(-nbits // factor // 64)]
    if result.nbytes < LARGE:
        _bits.refine(words, result, factor)
    else:
        half = len(words) // 2
        _both(
            lambda: _bits.refine(words[:half], result[: half * factor], factor),
            lambda: _bits.refine(words[half:], result[half * factor :], factor),
        )
    mask_tail(result, nbits)
    return result
