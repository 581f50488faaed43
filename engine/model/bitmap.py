"""`Bitmap`: a value that says which granules of a disk are dirty, with set algebra across granularities.

Offsets, lengths, sizes and granularities are in bytes. A granule is dirty or clean as a whole. The end of the disk may
cut the last granule short. Rounding never loses a dirty byte: `mark` rounds outward, `clear` rounds inward.

    granule     |   0   |   1   |   2   | 3 :       (3 is cut short)
    mark             ######                         makes 0 and 1 dirty
    clear            ######                         cleans none
    clear            ########################       cleans 1, 2 and 3: it reaches the end of the disk
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, Protocol, SupportsIndex, final

from dirtmap.engine.model.later import later
from dirtmap.fmt import geometry
from dirtmap.fmt.errors import BitmapError, RangeError, counted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dirtmap.engine.model import bits, content
    from dirtmap.engine.model.content import Content
else:  # a bitmap whose content nobody looks at needs none of them
    later(globals(), np="numpy", bits="dirtmap.engine.model.bits", content="dirtmap.engine.model.content")

DEFAULT_GRANULARITY: Final = geometry.MAX_DEFAULT_GRANULARITY
# What errors name: a bitmap knows neither its name nor its file.
WHERE: Final = "bitmap"
# Bits. What is changed of more of them, in a container, is kept by itself, so that a commit need not look at all.
_SEVERAL: Final = 1 << 20
# Changes in place, and one part in so many of the pages, after which it takes less time to load all bits.
_MANY: Final = 1 << 12
_SHARE: Final = 8
_SOME: Final = 1 << 14  # runs that become numbers at a time
# "May be in use": only the container's lock tells whether the writer is alive, and it is not looked at here.
INCONSISTENT: Final = "inconsistent: in use by a writer, or left so by one that died; then recover or remove it"


class Source(Protocol):
    """A bitmap's content that is still in its container, and is read at first use.

    Attributes:
        damage: what of it was damaged when it was read, and so is dirty: one line, or None.
    """

    damage: str | None

    @property
    def uniform(self) -> bool | None:
        """What all bits are, if that is known without reading them; else None."""

    def load(self) -> bits.Words:
        """Reads the content.

        Returns:
            A new, writable uint64 array of shape (ceil(granules / 64),). Bits behind the last granule are ignored.

        Raises:
            FormatError, StorageError: the container is damaged, or cannot be read.
        """

    def open(self) -> Content:
        """The content, of which parts are read when they are asked for. Errors as `load`, also from each part."""


@final
class Bitmap:
    """One bit for each ``granularity`` bytes of a disk of ``size`` bytes; all clean at first.

    `mark`, `mark_many` and `clear` change the content in place, unless the bitmap is frozen. Nothing else changes:
    `replace` makes another bitmap. Threads may share a bitmap as long as none of them changes it.

    Args:
        size: of the disk, 0 to 2**63 - 1 bytes.
        granularity: a power of two, 512 bytes to 2 GiB.
        recording: whether writes to the disk are to be marked in it from now on (QEMU's flag ``auto``).

    Attributes:
        size, granularity, recording: as above.
        inconsistent: the content cannot be trusted, say after a crash; what needs the content raises `BitmapError`.
        busy: an operation, such as a backup, is using the bitmap.
        frozen: the content cannot be changed in place.
        damage: what of the content was damaged in its container when it was read, and so is dirty: of the
            bitmap's own, or of those that it was combined from; one line, or None.

    Raises:
        BitmapError: size or granularity is out of range.

    A bitmap of more than `content.LARGE` bits, 32 MiB of them, is not in memory. It is an expression, of which every
    operation looks at a part after the other. What takes memory is what was changed in place; what `extents`, `words`
    and `packed` return; and nothing else.
    """

    __slots__ = (
        "_content",
        "_count",
        "_fill",
        "_marker",
        "_source",
        "_words",
        "busy",
        "damage",
        "frozen",
        "granularity",
        "inconsistent",
        "recording",
        "size",
    )

    def __init__(
        self, size: SupportsIndex, granularity: SupportsIndex = DEFAULT_GRANULARITY, recording: bool = True
    ) -> None:
        self.size = operator.index(size)
        self.granularity = checked_granularity(granularity)
        if not 0 <= self.size <= geometry.MAX_DISK_SIZE:
            raise BitmapError(WHERE, f"a disk has 0 to 2**63 - 1 bytes, not {self.size}")
        self.recording = recording
        self.inconsistent = self.busy = self.frozen = False
        # Where the content was loaded from, as long as it is unchanged: a container need not write it again.
        self._source: Source | None = None
        # None: it is `_content`, or is still in the source; without one, all bits are `_fill`. A read-only array is
        # shared: `_writable`.
        self._words: bits.Words | None = None
        # What the parts of a content that is not in memory come from.
        self._content: Content | None = None
        self._fill = False
        self.damage: str | None = None
        # How many bits are set, where that is known.
        self._count: int | None = None
        # What `mark` can do at once: there only while a change has nothing to look after but these very words, or notes
        # of this very content.
        self._marker: bits.Marker | None = None

    @classmethod
    def from_extents(
        cls,
        size: SupportsIndex,
        offsets: Iterable[SupportsIndex],
        lengths: Iterable[SupportsIndex],
        granularity: SupportsIndex = DEFAULT_GRANULARITY,
        recording: bool = True,
    ) -> Bitmap:
        """A bitmap with these ranges marked. Arguments and errors are those of `Bitmap` and `mark_many`."""
        bitmap = cls(size, granularity, recording)
        bitmap.mark_many(offsets, lengths)
        return bitmap

    @classmethod
    def from_packed(
        cls, size: SupportsIndex, granularity: SupportsIndex, data: bits.Packed, recording: bool = True
    ) -> Bitmap:
        """A bitmap with a copy of ``data`` as its content: one bit per granule, least significant bit first.

        Bits and bytes behind the last granule are ignored.

        Raises:
            BitmapError: the data are too short, or as `Bitmap`.
        """
        bitmap = cls(size, granularity, recording)
        needed, given = geometry.packed_bytes(bitmap.size, bitmap.granularity), memoryview(data).nbytes
        if given < needed:
            raise BitmapError(WHERE, f"{counted(given, 'byte')} of packed bits where {needed} are needed")
        bitmap._words = bits.from_packed(data, bitmap._nbits)
        return bitmap

    @classmethod
    def from_words(cls, size: SupportsIndex, granularity: SupportsIndex, words: bits.Words, recording: bool) -> Bitmap:
        """A bitmap that takes over ``words``, in the form of the property `words`, without a copy.

        Args:
            size: as of `Bitmap`.
            granularity: as of `Bitmap`.
            words: uint64, shape (ceil(granules / 64),); bits behind the last granule are zero.
            recording: as of `Bitmap`.
        """
        bitmap = cls(size, granularity, recording)
        bitmap._words = words
        return bitmap

    @classmethod
    def _of(cls, size: int, granularity: int, found: Content, recording: bool) -> Bitmap:
        """A bitmap with that content; in memory, if it is not large."""
        bitmap = cls(size, granularity, recording)
        bitmap._content = found
        if not bitmap._is_large:
            bitmap._load()
        return bitmap

    @classmethod
    def _lazy(cls, size: int, granularity: int, recording: bool, inconsistent: bool, source: Source | None) -> Bitmap:
        """A bitmap whose content is still unread in its container."""
        bitmap = cls(size, granularity, recording)
        bitmap.inconsistent, bitmap._source = inconsistent, source
        return bitmap

    def _take(self, words: memoryview) -> None:
        """Makes these words the content; see `content.Packed`."""
        self._content, self._source = content.Packed(self._nbits, words.toreadonly()), None

    # Content as a whole.

    @property
    def words(self) -> bits.Words:
        """The packed bits (see `bits`): uint64, shape (ceil(granules / 64),), read-only, valid until a change."""
        view = self._load().view()
        view.flags.writeable = False
        return view

    def packed(self) -> memoryview:
        """The packed bits as bytes, least significant bit first, zero behind the last granule; valid as `words` is."""
        if self._uniform() is False:
            return memoryview(bytes(geometry.packed_bytes(self.size, self.granularity)))
        return self.words.view(np.uint8).data[: geometry.packed_bytes(self.size, self.granularity)]

    @property
    def count(self) -> int:
        """Dirty bytes, counted as QEMU does: in whole granules, even where the last granule is cut short."""
        if (fill := self._uniform()) is not None:
            return self._nbits * self.granularity if fill else 0
        if self._count is None:
            found = self._parts()
            self._count, self._marker = content.count(found), None
        return self._count * self.granularity

    def extents(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The maximal dirty runs in order, as two int64 arrays (offsets, lengths in bytes), cut at the disk's end."""
        if (fill := self._uniform()) is not None:
            runs = 1 if fill and self.size else 0
            return np.zeros(runs, np.int64), np.full(runs, self.size, np.int64)
        if not self._is_large:
            return bits.extents(self._load(), self.size, self.granularity)
        parts = list(self.extents_by_parts()) or [(np.empty(0, np.int64), np.empty(0, np.int64))]
        offsets, lengths = (np.concatenate(part) for part in zip(*parts, strict=True))
        return offsets, lengths

    def extents_by_parts(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """The same as `extents`, some millions at a time: all of them can take 64 times the memory of the bits.

        The bitmap may be changed meanwhile: they are those of when the first are asked for.
        """
        if self._uniform() is not None or not (self._is_large or self._nbits > content.BLOCK):
            yield self.extents()
        else:
            yield from content.extents(self._parts(lasting=True), self.size, self.granularity)

    def ranges(self) -> Iterator[tuple[list[int], list[int]]]:
        """The same as `extents`, as plain numbers, some thousands at a time; of a small bitmap without numpy."""
        if (fill := self._uniform()) is not None:
            if fill and self.size:
                yield [0], [self.size]
            return
        parts: Iterable[tuple[Any, Any]]
        if isinstance(self._content, content.Packed) and not self.inconsistent:
            parts = bits.runs_of(self._content.memory, self.size, self.granularity)
        else:
            parts = self.extents_by_parts()
        for offsets, lengths in parts:
            for at in range(0, len(offsets), _SOME):
                yield offsets[at : at + _SOME].tolist(), lengths[at : at + _SOME].tolist()

    def before(self, positions: Iterable[SupportsIndex]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """How much is dirty before each of these positions, and how many extents begin before it.

        What lies between two positions is what is there before the second, less what is there before the first. It
        takes little more than to count, and no memory to speak of, whatever the number of extents.

        Args:
            positions: on the disk, in bytes, ascending; the disk's size is the last that there can be.

        Returns:
            Two int64 arrays of the shape of ``positions``: dirty bytes, cut at the disk's end, and numbers of extents.

        Raises:
            RangeError: a position is not on the disk, or less than the one before.
            BitmapError: the bitmap is inconsistent.
        """
        at = as_int64(positions)
        if len(at) and (at[0] < 0 or at[-1] > self.size or (np.diff(at) < 0).any()):
            raise RangeError(WHERE, f"positions ascend from 0 to {self.size}")
        if (fill := self._uniform()) is not None:
            return at * fill, ((at > 0) * fill).astype(np.int64)
        granule, inside = at // self.granularity, at % self.granularity
        behind = granule + (inside > 0)
        places, found = np.unique(np.concatenate((granule, behind)), return_inverse=True)
        dirty, begun = content.before(self._parts(), places)
        low, high = found[: len(at)], found[len(at) :]
        return dirty[low] * self.granularity + (dirty[high] - dirty[low]) * inside, begun[high]

    # Changes in place.

    def mark(self, offset: SupportsIndex, length: SupportsIndex) -> None:
        """Marks every granule that has at least one byte in the range dirty. A length of 0 marks nothing.

        Raises:
            RangeError: the range is not inside the disk. Nothing is marked.
            BitmapError: the bitmap is frozen or inconsistent.
        """
        if bits.mark(self._marker, offset, length):
            return
        offset, end = self._range(offset, length)
        first, last = offset // self.granularity, geometry.ceil_div(end, self.granularity) if length else 0
        if isinstance(there := self._writable(), content.Changed):
            there.set(first, last, True)
            if self._is_large:  # of others it is counted how often they are changed
                self._marker = there.notes(self.size, self.granularity)
            return
        self._marker = bits.InPlace(there, self.size, self.granularity)
        bits.set_range(there, first, last)

    def mark_many(self, offsets: Iterable[SupportsIndex], lengths: Iterable[SupportsIndex]) -> None:
        """Like `mark` for each offset and its length, all or none. Fast for numpy arrays, exact for any integers.

        Raises:
            RangeError: the numbers of offsets and lengths differ, or a range is not inside the disk. Nothing is marked.
            BitmapError: the bitmap is frozen or inconsistent.
        """
        offset, length = as_int64(offsets), as_int64(lengths)
        if offset.shape != length.shape:
            raise RangeError(WHERE, f"{counted(len(offset), 'offset')} and {counted(len(length), 'length')}")
        bad = bits.first_outside(offset, length, self.size)
        if bad is not None:
            self._range(offset[bad], length[bad])  # raises
        if isinstance(there := self._writable(len(offset)), content.Changed):
            offset, length = offset[length > 0], length[length > 0]
            there.scatter(offset // self.granularity, (offset + (length - 1)) // self.granularity)
        else:
            bits.mark_ranges(there, offset, length, self.granularity)

    def clear(self, offset: SupportsIndex, length: SupportsIndex) -> None:
        """Makes every granule clean whose bytes on the disk are all in the range.

        Raises:
            RangeError: the range is not inside the disk. Nothing is cleared.
            BitmapError: the bitmap is frozen or inconsistent.
        """
        offset, end = self._range(offset, length)
        whole = self._nbits if end == self.size else end // self.granularity
        first = geometry.ceil_div(offset, self.granularity)
        if isinstance(there := self._writable(), content.Changed):
            there.set(first, whole, False)
        else:
            bits.clear_range(there, first, whole)

    def freeze(self) -> Bitmap:
        """Refuses every change in place from now on; returns the bitmap itself."""
        self.frozen, self._marker = True, None
        return self

    # Bitmaps made from this one. None of them is frozen.

    def copy(self) -> Bitmap:
        """The same bitmap, not frozen. The content is shared until one of the two is changed.

        A copy of one that is still in its container, and is not large, is read now: it lasts longer than the
        transaction that it is from.

        Raises:
            FormatError, StorageError: it is in a container, and cannot be read.
        """
        other = self.replace()
        if self._uniform() is None and not self._is_large and not self.inconsistent:
            other._load()
        return other

    __copy__ = copy

    def required(self, where: str) -> Bitmap:
        """This bitmap, if its content can be used.

        Raises:
            BitmapError: the bitmap is inconsistent; the error names ``where``.
        """
        if self.inconsistent:
            raise BitmapError(where, INCONSISTENT)
        return self

    def replace(self, *, recording: bool | None = None, busy: bool | None = None) -> Bitmap:
        """The same bitmap with other flags, where given, not frozen; of one in a transaction, until that ends."""
        other = Bitmap(self.size, self.granularity, self.recording if recording is None else recording)
        other.busy = self.busy if busy is None else busy
        if self._words is not None:
            self._words.flags.writeable, self._marker = False, None
        if isinstance(self._content, content.Changed):
            self._content.shared, self._marker = True, None
        other.inconsistent, other._source, other._words = self.inconsistent, self._source, self._words
        other._content = self._content
        other._fill, other.damage = self._fill, self.damage
        other._count = self._count
        return other

    def recovered(self) -> Bitmap:
        """The replacement for an inconsistent bitmap: same size and granularity, consistent, and dirty all over."""
        other = Bitmap(self.size, self.granularity, self.recording)
        other._fill = True
        return other

    def resized(self, size: int) -> Bitmap:
        """The bitmap for the same disk, grown or shrunk to ``size`` bytes. Old bits stay; added space is dirty.

        Raises:
            BitmapError: no disk can have that size, or the bitmap is inconsistent.
        """
        nbits = Bitmap(size, self.granularity)._nbits
        dirty = self.size // self.granularity if size > self.size else nbits  # also what was cut short
        return self._derived(size, self.granularity, content.Resized(self._parts(lasting=True), nbits, dirty))

    def in_sectors(self) -> Bitmap:
        """The same granules of the disk as QEMU has it, whose size is rounded up to whole sectors of 512 bytes.

        A granule has whole sectors, so that the disk has no more of them than before.

        Raises:
            BitmapError: no disk can have that size, or the bitmap is inconsistent.
        """
        size = geometry.align_up(self.size, 1 << geometry.MIN_GRANULARITY_BITS)
        return self._derived(size, self.granularity, self._parts(lasting=True))

    def at(self, granularity: SupportsIndex) -> Bitmap:
        """The same dirty bytes at another granularity in bytes, rounded outward where that is coarser.

        Raises:
            BitmapError: no bitmap can have that granularity, or the bitmap is inconsistent.
        """
        granularity = checked_granularity(granularity)
        if granularity == self.granularity:
            self._parts()  # raises
            return self.copy()
        if self._is_large or geometry.granules(self.size, granularity) > content.LARGE:
            return self._derived(self.size, granularity, self._parts_at(granularity, lasting=True))
        return self._like(granularity, self._words_at(granularity))

    def _anew(self) -> Bitmap:
        """The same content as one that is not in a container, so that a commit writes what is different there."""
        return self._derived(self.size, self.granularity, self._parts(lasting=True))

    def __or__(self, other: Bitmap) -> Bitmap:
        return self._combined(other, bits.OR)

    def __and__(self, other: Bitmap) -> Bitmap:
        return self._combined(other, bits.AND)

    def __sub__(self, other: Bitmap) -> Bitmap:
        return self._combined(other, bits.AND_NOT)

    def __xor__(self, other: Bitmap) -> Bitmap:
        return self._combined(other, bits.XOR)

    # No __hash__: a change in place would change it.
    def __eq__(self, other: object) -> bool:
        """True for the same size and the same dirty bytes, whatever the flags and granularities.

        Raises:
            BitmapError: one of the two is inconsistent.
        """
        if not isinstance(other, Bitmap):
            return NotImplemented
        finer = min(self.granularity, other.granularity)
        return self.size == other.size and content.is_equal(self._parts_at(finer), other._parts_at(finer))

    def __repr__(self) -> str:
        flags = [flag for flag in ("recording", "inconsistent", "busy", "frozen") if getattr(self, flag)]
        return f"<{' '.join([f'Bitmap of {self.size} bytes at {self.granularity}', *flags])}>"

    # How the content is held.

    @property
    def _nbits(self) -> int:
        return geometry.granules(self.size, self.granularity)

    def _load(self) -> bits.Words:
        """The content, for reading."""
        if self.inconsistent:
            raise BitmapError(WHERE, "inconsistent; recover it first")
        if self._words is None:
            if self._content is not None:
                words = content.load(self._content)
            elif self._source is None:
                words = bits.filled(self._nbits, self._fill)
            else:
                words = self._source.load()
                bits.mask_tail(words, self._nbits)
                self.damage = self._source.damage
            self._words, self._content, self._marker = words, None, None
        return self._words

    @property
    def _is_large(self) -> bool:
        return self._nbits > content.LARGE

    def _parts(self, *, lasting: bool = False) -> Content:
        """The content, for reading part by part; where it is ``lasting``, it stays whatever becomes of this bitmap."""
        if self.inconsistent:
            raise BitmapError(WHERE, "inconsistent; recover it first")
        if (fill := self._uniform()) is not None:
            return content.Uniform(self._nbits, fill)
        if self._content is None and not self._is_large:
            self._load()
        if self._words is not None:
            if lasting:
                self._words.flags.writeable, self._marker = False, None
            return content.Whole(self._nbits, self._words)
        if self._content is None:
            assert self._source is not None  # or it was uniform
            self._content = self._opened(self._source)
        if isinstance(self._content, content.Changed):
            self._content.shared |= lasting
            self._marker = None if lasting else self._marker
        return self._content

    def _opened(self, source: Source) -> Content:
        found = source.open()
        if isinstance(found, content.Whole):
            bits.mask_tail(found.words, self._nbits)
        self.damage = source.damage
        return found

    def _parts_at(self, granularity: int, *, lasting: bool = False) -> Content:
        """The content at any granularity; see `_parts`."""
        return content.rescaled(self._parts(lasting=lasting), self.size, self.granularity, granularity)

    def _uniform(self) -> bool | None:
        """What all bits are, if that is known without looking at them; else None."""
        if self.inconsistent or self._words is not None or (self._content is not None and self._source is None):
            return None
        return self._fill if self._source is None else self._source.uniform

    def _writable(self, ranges: int = 1) -> bits.Words | content.Changed:
        """The content for a change in place. From now on it is shared with no bitmap and differs from the source's.

        Args:
            ranges: how many parts of it will be changed at once.
        """
        if self.frozen:
            raise BitmapError(WHERE, "frozen; change a copy, or change it in a transaction")
        self._marker = None
        if (changed := self._changed(ranges)) is not None:
            self._content, self._words = changed, None
            self._source = self._count = None
            return changed
        words = self._load()
        if not words.flags.writeable:
            self._words = words = words.copy()
        self._source = self._count = None
        return words

    def _changed(self, ranges: int) -> content.Changed | None:
        """The content, with changes that are kept by themselves; None where all bits shall be in memory."""
        if self.inconsistent or self._words is not None:
            return None
        there = self._content
        if isinstance(there, content.Packed):
            return None
        if not self._is_large:
            acts = there.acts if isinstance(there, content.Changed) else 0
            pages = geometry.ceil_div(self._nbits, content.PAGE)
            fresh = self._source is None and there is None
            if fresh or self._nbits < _SEVERAL or acts > _MANY or ranges > pages // _SHARE:
                return None
        if isinstance(there, content.Changed):
            return there.copy() if there.shared else there
        if there is None and self._source is not None:
            there = self._opened(self._source)
            if isinstance(there, content.Whole):
                self._words = there.words
                return None
        return content.Changed(there or self._parts())

    def _words_at(self, granularity: int) -> bits.Words:
        """The content at any granularity, for reading."""
        return bits.rescaled(self._load(), self.size, self.granularity, granularity)

    def _like(self, granularity: int, words: bits.Words) -> Bitmap:
        """Another bitmap for the same disk, recording as this one does, and with the same damage."""
        other = Bitmap.from_words(self.size, granularity, words, self.recording)
        other.damage = self.damage
        return other

    def _derived(self, size: int, granularity: int, found: Content) -> Bitmap:
        """Another bitmap whose content was made of this one's: recording as this one does, with the same damage."""
        other = self._of(size, granularity, found, self.recording)
        other.damage = self.damage
        return other

    def _combined(self, other: Bitmap, how: int) -> Bitmap:
        """Both contents combined, at the finer of the two granularities; see `bits.combine`."""
        if not isinstance(other, Bitmap):
            return NotImplemented
        if self.size != other.size:
            raise BitmapError(WHERE, f"for a disk of {self.size} bytes; the other is for one of {other.size}")
        finer = min(self.granularity, other.granularity)
        if geometry.granules(self.size, finer) > content.LARGE:
            found = content.Combined(self._parts_at(finer, lasting=True), other._parts_at(finer, lasting=True), how)
            result = self._of(self.size, finer, found, self.recording)
        else:
            words, count = bits.combine(self._words_at(finer), other._words_at(finer), how)
            result = self._like(finer, words)
            result._count = count
        result.damage = damage_of([self, other])
        return result

    def _range(self, offset: SupportsIndex, length: SupportsIndex) -> tuple[int, int]:
        """The first byte of the range, and the first byte behind it. Checks that the range is inside the disk."""
        offset, length = operator.index(offset), operator.index(length)
        if offset < 0 or length < 0 or offset + length > self.size:
            are = "is" if length == 1 else "are"
            what = f"{counted(length, 'byte')} at {offset} {are} not inside a disk of {counted(self.size, 'byte')}"
            raise RangeError(WHERE, what)
        return offset, offset + length


def damage_of(bitmaps: Iterable[Bitmap]) -> str | None:
    """What of several bitmaps was damaged when they were read, and so is dirty, in one line; None if nothing was."""
    return "; ".join(dict.fromkeys(bitmap.damage for bitmap in bitmaps if bitmap.damage)) or None


def checked_granularity(granularity: SupportsIndex) -> int:
    """Checks a granularity in bytes, and returns it as an int.

    Raises:
        BitmapError: it is not a power of two from 512 bytes to 2 GiB.
    """
    granularity = operator.index(granularity)
    if not geometry.is_granularity(granularity):
        raise BitmapError(WHERE, f"granularity {granularity} is not a power of two from 512 bytes to 2 GiB")
    return granularity


def as_int64(values: Iterable[SupportsIndex]) -> NDArray[np.int64]:
    """A 1-D int64 array of exactly these numbers.

    Raises:
        RangeError: a number does not fit in int64, and so is outside any disk; or an array is not 1-D.
        TypeError: a value is not an integer.
    """
    try:
        if isinstance(values, np.ndarray) and values.dtype.kind in "iu":
            # No signed number is past the limit, which is that of int64.
            if values.ndim != 1 or (values.dtype.kind == "u" and values.max(initial=0) > geometry.MAX_DISK_SIZE):
                raise OverflowError
            return values.astype(np.int64, copy=False)
        return np.fromiter(map(operator.index, values), np.int64)
    except OverflowError:
        raise RangeError(WHERE, "offsets and lengths are 1-D, and go from 0 to 2**63 - 1") from None
