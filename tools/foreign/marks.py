"""Takes the ranges of a document as they are read: holds each against the disk, and the document against limits."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dirtmap.fmt.errors import FormatError, RangeError, counted
from dirtmap.fmt.geometry import MAX_DISK_SIZE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SECTOR = 512
_BATCH = 1 << 18
# The most entries of a document: one for each sector of the disk is the most that any of the formats needs. The least
# leaves room on small disks for lists that name a range several times; the most bounds the time that reading takes.
_LEAST_ENTRIES, _MOST_ENTRIES = 1 << 16, 1 << 24
_ENTRY_BYTES = 512


class Marks:
    """The ranges to mark, in the order of the document, handed on in batches.

    Args:
        where: what is read, for messages.
        size: of the disk, bytes.
        put: takes offsets and lengths (bytes, int64 arrays of one shape), all of them inside the disk.

    Attributes:
        unit: what `count` counts, for messages: ``entry`` or ``line``.
        count: the entry that is being read, from 1 on; 0 before the first.
        most_bytes: the longest document that is read.
    """

    def __init__(self, where: str, size: int, put: Callable[[NDArray[np.int64], NDArray[np.int64]], Any]) -> None:
        self.where, self.size = where, size
        self.unit, self.count = "entry", 0
        self.most = min(max(size // SECTOR, _LEAST_ENTRIES), _MOST_ENTRIES)
        self.most_bytes = self.most * _ENTRY_BYTES
        self._put = put
        self._offsets, self._lengths = array("q"), array("q")

    def next(self) -> None:
        """Begins the next entry.

        Raises:
            FormatError: there are more of them than are read of a disk of this size.
        """
        self.count += 1
        if self.count > self.most:
            self.advance(0)

    def place(self, behind: int = 0) -> str:
        """Names the current entry, or one behind it, for messages."""
        return f"{self.where}: {self.unit} {self.count + behind}"

    def advance(self, entries: int) -> None:
        """Begins the last one of that many; errors as `next`."""
        self.count += entries
        self.require_few(self.unit, self.count)

    def require_few(self, unit: str, count: int) -> None:
        """Holds how many of something there are against the most that is read.

        Raises:
            FormatError: there are more.
        """
        if count > self.most:
            what = f"more than {self.most} of them, the most that is read for a disk of {self.size} bytes"
            raise FormatError(f"{self.where}: {unit} {self.most + 1}", what)

    def number(self, entry: dict[str, Any], key: str, most: int = MAX_DISK_SIZE) -> int:
        """A number of bytes of an entry.

        Raises:
            FormatError: it is not there, or none.
        """
        value = entry.get(key)
        if type(value) is not int or not 0 <= value <= most:
            raise self.error(f"'{key}' is not a number of bytes")
        return value

    def add(self, offset: int, length: int) -> None:
        """Marks a range of the current entry.

        Raises:
            RangeError: it leaves the disk.
        """
        if offset + length > self.size:
            raise self.outside(offset, length)
        self._offsets.append(offset)
        self._lengths.append(length)
        if len(self._offsets) >= _BATCH:
            self.flush()

    def add_many(self, offsets: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        """Marks a range for each of as many entries, the last of which becomes the current one; errors as `add`."""
        outside = offsets > self.size - lengths
        if outside.any():
            first = int(outside.argmax())
            self.advance(first + 1)
            raise self.outside(int(offsets[first]), int(lengths[first]))
        self.advance(len(offsets))
        self._put(offsets, lengths)

    def flush(self) -> None:
        """Hands on what was added."""
        import numpy as np

        self._put(np.array(self._offsets, np.int64), np.array(self._lengths, np.int64))
        self._offsets, self._lengths = array("q"), array("q")

    def outside(self, offset: int, length: int) -> RangeError:
        """The error for a range that leaves the disk."""
        are = "is" if length == 1 else "are"
        what = f"{counted(length, 'byte')} at {offset} {are} not inside the disk of {counted(self.size, 'byte')}"
        return RangeError(self.place(), what)

    def error(self, what: str) -> FormatError:
        """An error of the current entry."""
        return FormatError(self.place(), what)


class Order:
    """Holds ranges against the order that a format keeps: none begins before the one before it has ended.

    Attributes:
        end: of the range before, bytes.
    """

    def __init__(self, marks: Marks) -> None:
        self.end = 0
        self._marks = marks

    def take(self, offset: int, length: int) -> None:
        """Takes the next range.

        Raises:
            FormatError: it is empty, or out of order.
        """
        if not length:
            raise self._marks.error("a length of 0")
        if offset < self.end:
            raise self._marks.error(f"begins at {offset}, before the end of the one before it at {self.end}")
        self.end = offset + length


class Cover:
    """Holds the extents of a map against a disk: from its first byte to its last one, with neither gap nor overlap.

    So a map of another disk, of a part of one, or one that was filtered, is not taken for a map that calls all of
    the rest clean.
    """

    def __init__(self, marks: Marks) -> None:
        self.end = 0
        self._marks = marks

    def take(self, offset: int, length: int, dirty: bool) -> None:
        """Takes the next extent, and marks it where it is dirty.

        Raises:
            FormatError: it does not begin where the one before it has ended.
            RangeError: it leaves the disk.
        """
        marks = self._marks
        if not length:
            raise marks.error("a length of 0")
        if offset != self.end:
            raise marks.error(f"begins at {offset}, not at {self.end}: not a map of the whole disk in order")
        self.end = offset + length
        # QEMU counts in sectors, so what it says of a disk that ends within one goes on to the sector's end.
        if self.end > -(-marks.size // SECTOR) * SECTOR:
            raise marks.outside(offset, length)
        if dirty:
            marks.add(offset, min(length, marks.size - offset))

    def finish(self) -> None:
        """Ends the map.

        Raises:
            FormatError: it ends before the disk does.
        """
        if self.end < self._marks.size:
            covered = counted(self.end, "byte")
            what = f"a map of {covered}, but the disk has {self._marks.size}; the rest may be anything"
            raise FormatError(self._marks.where, what)
