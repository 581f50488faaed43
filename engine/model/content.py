"""Bits that need not be in memory: whoever needs them asks for a part at a time. No I/O: what reads comes from outside.

A disk of 16 TiB at 4 KiB has 512 MiB of bits. So the content of such a bitmap is an expression, which is evaluated part
by part, and of which no more than a few parts are in memory at any time:

    week | monday.at(4096)      Combined(what reads "week", Finer(what reads "monday"), OR)

    extents, count, a commit    ask for one part after the other       | part | part | part | ...

A part is an array in the form of `bits`, or, where all bits are known to be the same without a look, that bit.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

from dirtmap.engine.model import bits
from dirtmap.engine.model.later import later
from dirtmap.fmt import geometry

if TYPE_CHECKING:
    import numpy as np

    Part = bits.Words | bool
else:
    later(globals(), np="numpy")

OR: Final = bits.OR

# Bits. A bitmap with more than `LARGE` is not loaded as a whole, unless somebody asks for its words. `BLOCK` of them
# are a part, as a rule: with what an operation needs beside it, that stays in the cache.
LARGE: Final = 1 << 28
BLOCK: Final = 1 << 23
# Bits of a page, the unit in which a change in place is kept: those of a chunk in a store with the usual clusters.
PAGE: Final = 1 << 15
_RUN = struct.Struct("=HH")  # in a page
# Marks that are noted before they are made changes of: the more they are, the fewer pages there are for each.
_NOTES: Final = 1 << 18
_settling = threading.RLock()


def after_fork_in_child() -> None:
    """Renews the lock that a thread of the parent may have held, which is not there in a forked child.

    What that thread was about to make changes of is still noted, and made changes of again: that only sets bits.
    """
    global _settling
    _settling = threading.RLock()


class Content(Protocol):
    """Bits, a part at a time.

    Attributes:
        nbits: how many there are.
    """

    nbits: int

    def part(self, first: int, end: int) -> Part:
        """The bits from ``first`` up to ``end``.

        Args:
            first: a multiple of 64.
            end: a multiple of 64, or ``nbits``; greater than ``first``.

        Returns:
            uint64, shape (ceil((end - first) / 64),), tail bits zero, not to be written to; or what all bits are.
        """


@runtime_checkable
class Counted(Protocol):
    """A content that can count its bits with less effort than to read them all."""

    def count(self) -> int:
        """How many bits are set."""


def blocks(content: Content, first: int = 0, end: int | None = None) -> Iterator[tuple[int, int, Part]]:
    """The parts of these bits, or of all, in order: first bit, the bit behind the last, and the part."""
    end = content.nbits if end is None else end
    for at in range(first, end, BLOCK):
        upto = min(at + BLOCK, end)
        yield at, upto, content.part(at, upto)


def load(content: Content) -> bits.Words:
    """All bits at once: new words, or those of a `Whole`."""
    if isinstance(content, (Whole, Packed)):
        return content.words
    return joined(content, 0, content.nbits)


def joined(content: Content, first: int, end: int) -> bits.Words:
    """New words with the bits from ``first``, a multiple of 64, up to ``end``."""
    words = bits.zeros(end - first)
    for at, upto, part in blocks(content, first, end):
        if part is True:
            bits.set_range(words, at - first, upto - first)
        elif part is not False:
            words[(at - first) // 64 :][: len(part)] = part
    return words


def kept(content: Content) -> Sparse:
    """The bits as they are now, in as little memory as `Sparse` needs: whatever becomes of where they are."""
    found = Sparse(content.nbits)
    step = geometry.ceil_div(BLOCK, PAGE) * PAGE
    for first in range(0, content.nbits, step):
        end = min(first + step, content.nbits)
        part = content.part(first, end)
        if part is True:
            found.set(first, end, True)
        elif part is not False and bits.runs(part, 0, len(part)) > len(part) // 16:
            found.fill(first // PAGE, part)  # a page after the other is quicker, and needs no memory for all runs
        elif part is not False:
            starts, lengths = bits.extents(part, end - first)
            found.scatter(starts + first, starts + lengths + (first - 1), True)
    return found


def count(content: Content) -> int:
    """How many bits are set."""
    if isinstance(content, Counted):
        return content.count()
    total = 0
    for first, end, part in blocks(content):
        total += (end - first) * part if isinstance(part, bool) else bits.count(part)
    return total


def before(content: Content, positions: bits.Positions) -> tuple[bits.Positions, bits.Positions]:
    """How many bits are set before each of these positions, and how many runs of set bits begin before it.

    Args:
        content: the bits.
        positions: of bits, ascending, 0 to ``content.nbits``; int64, 1-D.

    Returns:
        Two new int64 arrays of the same shape.
    """
    bits_before, runs_before = np.zeros_like(positions), np.zeros_like(positions)
    total = runs = 0  # in the parts so far
    is_open = False  # the last bit of the parts so far is set
    low = int(np.searchsorted(positions, 0, "right"))
    for first, end, part in blocks(content):
        high = int(np.searchsorted(positions, end, "right"))
        inside = positions[low:high] - first
        if isinstance(part, bool):
            runs += part and not is_open
            bits_before[low:high], runs_before[low:high] = total + inside * part, runs
            total, is_open = total + (end - first) * part, part
        else:
            runs -= is_open and int(part[0]) & 1  # the loop takes it for one that begins here
            at = 0  # the word up to which `total` and `runs` go
            for index, position in enumerate(inside.tolist(), low):
                word, last = divmod(position - 1, 64)
                total, runs, at = total + bits.count(part[at:word]), runs + bits.runs(part, at, word), word
                here = int(part[word]) & ((2 << last) - 1)
                before_here = int(part[word - 1]) >> 63 if word else 0
                bits_before[index] = total + here.bit_count()
                runs_before[index] = runs + (here & ~(here << 1 | before_here)).bit_count()
            total, runs = total + bits.count(part[at:]), runs + bits.runs(part, at, len(part))
            is_open = bool(int(part[-1]) >> (end - first - 1) % 64 & 1)
        low = high
    return bits_before, runs_before


def is_equal(one: Content, other: Content) -> bool:
    """True if both have the same bits; they have the same number of them. Stops at the first part that differs."""
    if isinstance(one, Whole) and isinstance(other, Whole):
        return np.array_equal(one.words, other.words)
    for (first, end, part), (_, _, found) in zip(blocks(one), blocks(other), strict=True):
        if isinstance(part, bool) and isinstance(found, bool):
            same = part is found
        else:
            same = np.array_equal(_words(part, end - first), _words(found, end - first))
        if not same:
            return False
    return True


def extents(content: Content, size: int, unit: int = 1) -> Iterator[tuple[bits.Positions, bits.Positions]]:
    """The maximal runs of set bits, in order, some at a time; see `bits.extents` for arguments and arrays."""
    start = length = 0  # of a run that goes on to the end of the parts so far
    for first, end, part in blocks(content):
        base, behind = first * unit, min(end * unit, size)  # the end of the disk can cut the last one short
        if isinstance(part, bool):
            starts = np.full(int(part), base, np.int64)
            lengths = np.full(int(part), behind - base, np.int64)
        else:
            starts, lengths = bits.extents(part, behind - base, unit)
            starts += base
        if length and len(starts) and starts[0] == base:
            starts[0], lengths[0] = start, lengths[0] + length
        elif length:
            starts, lengths = np.append(start, starts), np.append(length, lengths)
        length = 0
        if end < content.nbits and len(starts) and starts[-1] + lengths[-1] == behind:
            start, length = int(starts[-1]), int(lengths[-1])
            starts, lengths = starts[:-1], lengths[:-1]
        if len(starts):
            yield starts, lengths


class Uniform:
    """Bits that are all the same."""

    def __init__(self, nbits: int, fill: bool) -> None:
        self.nbits, self.fill = nbits, fill

    def part(self, first: int, end: int) -> Part:
        """See `Content.part`."""
        return self.fill

    def count(self) -> int:
        """See `Counted`."""
        return self.nbits * self.fill


class Whole:
    """Bits that are in memory."""

    def __init__(self, nbits: int, words: bits.Words) -> None:
        self.nbits, self.words = nbits, words

    def part(self, first: int, end: int) -> Part:
        """See `Content.part`."""
        return self.words[first // 64 : -(-end // 64)]

    def count(self) -> int:
        """See `Counted`."""
        return bits.count(self.words)


class Packed:
    """Bits that are in memory, where nobody has asked for them as an array yet: without numpy.

    Args:
        nbits: how many there are.
        memory: uint64, ceil(nbits / 64) of them, tail bits zero; nobody changes them any more.
    """

    def __init__(self, nbits: int, memory: memoryview) -> None:
        self.nbits, self.memory = nbits, memory

    def __reduce__(self) -> tuple[Any, ...]:
        return Whole, (self.nbits, self.words.copy())  # there is no copy of memory itself

    @property
    def words(self) -> bits.Words:
        """The same memory as an array; if it was to be written to, it still is."""
        return np.frombuffer(self.memory, bits.WORD) if self.nbits else bits.zeros(0)

    def part(self, first: int, end: int) -> Part:
        """See `Content.part`."""
        return self.words[first // 64 : -(-end // 64)]

    def count(self) -> int:
        """See `Counted`."""
        return bits.count(self.memory)


class Combined:
    """Two contents with the same number of bits, bit by bit; see `bits.combine`."""

    def __init__(self, one: Content, other: Content, how: int) -> None:
        self.nbits, self._one, self._other, self._how = one.nbits, one, other, how

    def part(self, first: int, end: int) -> Part:
        """See `Content.part`."""
        how = self._how
        if how == bits.AND_NOT:
            other = self._other.part(first, end)
            if other is True:
                return False
            one = self._one.part(first, end)
        else:
            one = self._one.part(first, end)
            if (one is True and how == bits.OR) or (one is False and how == bits.AND):
                return one
            other = self._other.part(first, end)
        if isinstance(one, bool) and isinstance(other, bool):
            return (one or other) if how == bits.OR else (one and other) if how == bits.AND else one != other
        if other is False:
            return one if how != bits.AND else False
        if one is False:
            return other if how != bits.AND_NOT else False
        if how == bits.OR and other is True:
            return True
        if how == bits.AND and isinstance(one, bool):
            return other
        if how == bits.AND and isinstance(other, bool):
            return one
        number = end - first
        return bits.combine(_words(one, number), _words(other, number), how)[0]


class Coarser:
    """One bit for each group of bits; see `bits.coarsen`."""

    def __init__(self, base: Content, factor: int) -> None:
        self.nbits, self._base, self._factor = geometry.ceil_div(base.nbits, factor), base, factor

    def part(self, first: int, end: int) -> Part:
        """See `Content.part`."""
        found = None
        stop = min(end * self._factor, self._base.nbits)
        for at in range(first * self._factor, stop, BLOCK):
            upto = min(at + BLOCK, stop)
            part = self._base.part(at, upto)
            if part is False:
                continue
            if found is None:
                found = bits.zeros(end - first)
            low, high = at // self._factor - first, geometry.ceil_div(upto, self._factor) - first
            if part is True:
                bits.set_range(found, low, high)
                continue
            coarse = bits.coarsen(part, upto - at, self._factor)
            if low % 64:
                starts, lengths = bits.extents(coarse, high - low)
                bits.scatter(found, starts + low, starts + lengths + (low - 1))
            else:
                found[low // 64 : low // 64 + len(coarse)] |= coarse
        return False if found is None else found


class Finer:
    """Each bit a number of times, as many as make ``nbits``; see `bits.refine`."""

    def __init__(self, base: Content, nbits: int, factor: int) -> None:
        self.nbits, self._base, self._factor = nbits, base, factor

    def part(self, first: int, end: int) -> Part:
        """See `Content.part`."""
        base, factor = self._base, self._factor
        start = first // factor // 64 * 64
        stop = min(geometry.ceil_div(geometry.ceil_div(end, factor), 64) * 64, base.nbits)
        part = base.part(start, stop)
        if isinstance(part, bool):
            return part
        if factor <= 64:
            return bits.refine(part, end - start * factor, factor)[(first - start * factor) // 64 :]
        starts, lengths = bits.extents(part, stop - start)
        starts += start
        lows, highs = np.maximum(starts * factor, first), np.minimum((starts + lengths) * factor, end)
        inside = lows < highs
        found = bits.zeros(end - first)
        bits.scatter(found, lows[inside] - first, highs[inside] - (first + 1))
        return found


class Resized:
    """The first ``nbits`` of another content; those from ``dirty`` on, where there are any, are set."""

    def __init__(self, base: Content, nbits: int, dirty: int) -> None:
        self.nbits, self._base, self._dirty = nbits, base, dirty

    def part(self, first: int, end: int) -> Part:
        """See `Content.part`."""
        if first >= self._dirty:
            return True
        stop = min(geometry.ceil_div(end, 64) * 64, self._base.nbits)
        part = self._base.part(first, stop) if first < stop else False
        if isinstance(part, bool) and (end <= self._dirty or part):
            return part
        words = bits.zeros(end - first)
        if part is not False:
            there = _words(part, stop - first)
            words[:] = np.append(there, bits.zeros(64 * (len(words) - len(there))))
        bits.mask_tail(words, end - first)
        bits.set_range(words, max(self._dirty, first) - first, end - first)
        return words


class Sparse:
    """Bits of which few are set, in pages, where there are any.

    A page is kept as runs, each where it begins and its last bit, two uint16, in any order; as words, where these take
    less; or True where all of its bits are set. So sixteen million ranges take no more than 130 MiB, wherever they are.
    """

    def __init__(self, nbits: int, pages: Mapping[int, bytes | bits.Words | bool] | None = None) -> None:
        self.nbits = nbits
        self._pages = dict(pages or {})
        self._own: set[int] = set()  # pages that are words, which nobody else has

    def copy(self) -> Sparse:
        """The same, to be changed by itself; this one is not to be changed any more."""
        return Sparse(self.nbits, self._pages)

    def pages(self) -> Iterable[int]:
        """The pages that may have any bits."""
        return self._pages.keys()

    def part(self, first: int, end: int) -> Part:
        """See `Content.part`."""
        low, high = first // PAGE, geometry.ceil_div(end, PAGE)
        there = [page for page in range(low, high) if page in self._pages] if self._pages else []
        if not there:
            return False
        if len(there) == high - low and all(self._pages[page] is True for page in there):
            return True
        start = low * PAGE
        words = bits.zeros(min(high * PAGE, self.nbits) - start)
        for page in there:
            here = self._words(page)
            at = (page * PAGE - start) // 64
            words[at : at + len(here)] = here
        return words[(first - start) // 64 : geometry.ceil_div(end - start, 64)]

    def fill(self, page: int, words: bits.Words) -> None:
        """Sets what is set in ``words``, from that page on, in which there is nothing yet; tail bits are zero."""
        for at in range(0, len(words), PAGE // 64):
            here = words[at : at + PAGE // 64]
            number = bits.runs(here, 0, len(here))
            if number * _RUN.size > PAGE // 16:  # see `_change`
                self._pages[page] = here.copy()
                self._own.add(page)
            elif number:
                starts, lengths = bits.extents(here, 64 * len(here))
                runs = np.stack((starts, starts + lengths - 1), axis=1)
                self._pages[page] = runs.astype(np.uint16).tobytes() if lengths[0] < PAGE else True
            page += 1

    def set(self, first: int, end: int, value: bool) -> None:
        """Sets, or clears, the bits from ``first`` up to ``end``."""
        for page in range(first // PAGE, geometry.ceil_div(end, PAGE) if first < end else 0):
            start, stop = page * PAGE, min((page + 1) * PAGE, self.nbits)
            low, high = max(first, start), min(end, stop)
            if (low, high) != (start, stop):
                self._change(page, _RUN.pack(low - start, high - start - 1), value)
            elif value:
                self._pages[page] = True
            else:
                self._pages.pop(page, None)

    def scatter(self, starts: bits.Positions, lasts: bits.Positions, value: bool) -> None:
        """Sets, or clears, the bits of ranges, each from its start to its last one; they ascend, and are disjoint."""
        if not value and not self._pages:
            return
        long = lasts - starts >= 2 * PAGE
        for first, last in zip(starts[long].tolist(), lasts[long].tolist(), strict=True):
            self.set(first, last + 1, value)
        starts, lasts = starts[~long], lasts[~long]
        pieces = []
        for more in range(3):  # a range is in as many pages at most
            pages = starts // PAGE + more
            here = np.flatnonzero(pages <= lasts // PAGE)
            pages, low = pages[here], pages[here] * PAGE
            ends = np.maximum(starts[here], low) - low, np.minimum(lasts[here], low + (PAGE - 1)) - low
            pieces.append((pages, np.stack(ends, axis=1).astype(np.uint16)))
        pages, runs = (np.concatenate(part) for part in zip(*pieces, strict=True))
        order = np.argsort(pages, kind="stable")
        pages, packed = pages[order], runs[order].tobytes()
        edges = np.flatnonzero(np.diff(pages, prepend=-1, append=-1))
        for page, at, to in zip(pages[edges[:-1]].tolist(), edges.tolist(), edges[1:].tolist(), strict=False):
            self._change(page, packed[at * _RUN.size : to * _RUN.size], value)

    def _change(self, page: int, runs: bytes, value: bool) -> None:
        """Sets, or clears, runs of a page."""
        there = self._pages.get(page)
        if there is (True if value else None):
            return
        if value and (there is None or isinstance(there, bytes)):
            self._pages[page] = runs = there + runs if there else runs
            if len(runs) > PAGE // 16:  # bytes: half of what the words take
                self._pages[page] = self._words(page)
                self._own.add(page)
            return
        words = self._words(page)
        if page not in self._own or words is not there:
            self._pages[page] = words = words.copy()
            self._own.add(page)
        if value:
            _scatter(words, runs)
        else:
            cleared = np.zeros_like(words)
            _scatter(cleared, runs)
            words &= ~cleared

    def _words(self, page: int) -> bits.Words:
        """The words of a page; not to be written to."""
        value = self._pages[page]
        number = min(PAGE, self.nbits - page * PAGE)
        if isinstance(value, bytes):
            words = bits.zeros(number)
            _scatter(words, value)
            return words
        return bits.filled(number, value) if isinstance(value, bool) else value


def _scatter(words: bits.Words, runs: bytes) -> None:
    pairs = np.frombuffer(runs, np.uint16).astype(np.int64).reshape(-1, 2)
    bits.scatter(words, pairs[:, 0], pairs[:, 1])


class Changed:
    """A content with changes, which are kept by themselves: nothing of it is read for them.

    Attributes:
        base: what it was before.
        shared: somebody else has it, too: who wants to change it takes a `copy`.
        acts: how often it was changed.

    Marks can be noted first, see `notes`. Whoever looks at the content or changes it makes changes of them before.
    """

    def __init__(self, base: Content, dirty: Sparse | None = None, clean: Sparse | None = None) -> None:
        self.nbits, self.base = base.nbits, base
        self._dirty, self._clean = dirty or Sparse(base.nbits), clean or Sparse(base.nbits)
        self._now = Combined(self._dirty, Combined(base, self._clean, bits.AND_NOT), bits.OR)
        self.shared, self.acts = False, 0
        self._notes: bits.Notes | None = None
        self._noted: tuple[bits.Positions, bits.Positions] | None = None

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return {**self.__dict__, "_notes": None, "_noted": None}

    def notes(self, size: int, granularity: int) -> bits.Notes:
        """What marks of a disk of that size can be noted in; it may be used for as long as nobody shares this one."""
        if self._notes is None:
            self._noted = np.empty(_NOTES, np.int64), np.empty(_NOTES, np.int64)
            self._notes = bits.Notes(*self._noted, size, granularity)
        return self._notes

    def _settle(self) -> None:
        """Makes changes of all that is noted. Several threads may look at once, and a signal's handler inside of it."""
        notes = self._notes
        if notes is None or not notes.count:
            return
        assert self._noted is not None
        with _settling:
            before, number = notes.forgotten, notes.count
            firsts, lasts = self._noted
            self._scatter(firsts[:number], lasts[:number])
            notes.forget(number, before)

    def copy(self) -> Changed:
        """The same, to be changed by itself; this one is not to be changed any more."""
        self._settle()
        return Changed(self.base, self._dirty.copy(), self._clean.copy())

    def pages(self) -> bits.Positions:
        """The numbers of the pages that can differ from what was there before; ascending."""
        self._settle()
        return np.array(sorted({*self._dirty.pages(), *self._clean.pages()}), np.int64)

    def part(self, first: int, end: int) -> Part:
        """See `Content.part`."""
        self._settle()
        return self._now.part(first, end)

    def set(self, first: int, end: int, value: bool) -> None:
        """Sets, or clears, the bits from ``first`` up to ``end``."""
        self._settle()
        self.acts += 1
        self._dirty.set(first, end, value)
        self._clean.set(first, end, not value)

    def scatter(self, starts: bits.Positions, lasts: bits.Positions) -> None:
        """Sets the bits of every range, from its start to its last one; in any order, and they may overlap."""
        self._settle()
        self.acts += 1
        self._scatter(starts, lasts)

    def _scatter(self, starts: bits.Positions, lasts: bits.Positions) -> None:
        if len(starts):
            order = np.argsort(starts)
            starts, ends = starts[order], np.maximum.accumulate(lasts[order]) + 1
            apart = starts[1:] > ends[:-1]
            starts, lasts = starts[np.append(True, apart)], ends[np.append(apart, True)] - 1
            self._dirty.scatter(starts, lasts, True)
            self._clean.scatter(starts, lasts, False)


def rescaled(content: Content, size: int, granularity: int, wanted: int) -> Content:
    """The content at another granularity, rounded outward; see `bits.rescaled`."""
    if wanted > granularity:
        return Coarser(content, wanted // granularity)
    if wanted < granularity:
        return Finer(content, geometry.granules(size, wanted), granularity // wanted)
    return content


def _words(part: Part, nbits: int) -> bits.Words:
    return bits.filled(nbits, part) if isinstance(part, bool) else part
