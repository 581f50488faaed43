"""The bits of a bitmap in a qcow2 image, read when they are asked for: all at once, or the clusters of a part.

    table      |  0  |  A  | A+1 | A+2 |  1  |  B  |
    buffer     | 00  |   one read      | ff  | read|      neighbouring clusters are read together

`Clusters` are what is in the file when it is asked for, which is right for as long as the image is locked. `Lasting` is
for a bitmap that is looked at after that: it notices if somebody has written over the bits.
"""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING, Any

from dirtmap.engine.model.later import later
from dirtmap.engine.qcow2.layout import Layout, Slot, bitmap_label
from dirtmap.engine.system import memory
from dirtmap.engine.system.file import File, open_file
from dirtmap.fmt import directory, geometry
from dirtmap.fmt.digest import crc32c, crc32c_each
from dirtmap.fmt.errors import Error, LockedError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dirtmap.engine.model import bits, content
    from dirtmap.engine.model.content import Part
else:  # to `load` a bitmap needs none of them
    later(globals(), np="numpy", bits="dirtmap.engine.model.bits", content="dirtmap.engine.model.content")

# Bits that have one checksum: few enough that a look at some of them costs little, and enough that all checksums of a
# bitmap take little memory.
_UNIT = 1 << 19
# The files that are open for values, by label, path and inode: one for all that were read from the same file.
_open: weakref.WeakValueDictionary[tuple[str, str, int, int], _Own] = weakref.WeakValueDictionary()
_SAME = -1  # in place of a checksum: the table tells what these bits are


class Clusters:
    """The bits of a bitmap, as they are in the file: a `Content`, for as long as the image is locked.

    Args:
        file: the image.
        layout: as read from it; what it says of the bitmap is sound.
        slot: of the bitmap.

    Attributes:
        slot: as above.
    """

    def __init__(self, file: File, layout: Layout, slot: Slot) -> None:
        self.nbits = geometry.granules(layout.header.size, slot.entry.granularity)
        self.slot, self.file = slot, file
        self._cluster, self._table = layout.cluster_size, memoryview(slot.table or b"")

    def part(self, first: int, end: int) -> Part:
        """See `Content.part`.

        Raises:
            StorageError: the bits cannot be read.
            Error: the file was closed: the transaction has ended.
        """
        low, high = first // 8, geometry.ceil_div(end, 8)
        kinds = set(self._entries(low, high))
        if not kinds or kinds == {directory.TABLE_ALL_ZEROS}:
            return False
        if kinds == {directory.TABLE_ALL_ONES}:
            return True
        words = bits.zeros(end - first)
        self.read(low, words.view("u1").data[: high - low])
        bits.mask_tail(words, end - first)
        return words

    def read(self, first: int, buffer: memoryview) -> None:
        """Reads the octets of the bits from octet ``first`` on, as many as ``buffer`` has, which is all zeros.

        Errors as `part`.
        """
        if self.file.fd < 0:
            raise Error(self.file.path, "the transaction has ended")
        cluster, size = self._cluster, len(buffer)
        run: tuple[int, int, int] | None = None  # from byte, to byte of the buffer; offset in the file

        def read_run() -> None:
            if run:
                self.file.read_into(run[2], buffer[run[0] : run[1]])

        at, skipped = 0, first % cluster  # of the first cluster
        for raw in self._entries(first, first + size):
            upto = min(at + cluster - skipped, size)
            if raw == directory.TABLE_ALL_ONES:
                buffer[at:upto] = bytes((0xFF,)) * (upto - at)
            elif raw:
                place = raw + skipped
                if run and run[1] == at and run[2] + at - run[0] == place:
                    run = (run[0], upto, run[2])
                else:
                    read_run()
                    run = (at, upto, place)
            at, skipped = upto, 0
        read_run()

    def _entries(self, first: int, end: int) -> tuple[int, ...]:
        """The entries of the table for the octets from ``first`` up to ``end``."""
        low, high = first // self._cluster, geometry.ceil_div(end, self._cluster)
        return directory.parse_table(self._table[low * directory.TABLE_ENTRY_SIZE : high * directory.TABLE_ENTRY_SIZE])


class _Own:
    """A file that is open for as long as a value needs it."""

    def __init__(self, file: File) -> None:
        self.file = file
        weakref.finalize(self, file.close)


def _own(file: File) -> _Own:
    """The same file, open for values. Errors as `Lasting`."""
    key = file.path, file.abspath, file.status.st_dev, file.status.st_ino
    if (own := _open.get(key)) is None:
        own = _Own(open_file(file.path, abspath=file.abspath))
        if not os.path.samestat(own.file.status, file.status):
            raise LockedError(file.path, "was replaced since it was opened")
        _open[key] = own
    return own


class Lasting:
    """The bits of a bitmap as they are now, in a file that is open for such values alone: a `Content`.

    All of them are read once, and counted; what is kept are their checksums. Nobody locks the image any more when they
    are read again: what is different then is refused.

    Args:
        file: the image, locked by the caller for this call.
        layout: as read from it under that lock; what it says of the bitmap is sound.
        slot: of the bitmap.

    Raises:
        LockedError: another file has taken the image's place.
        StorageError: the bits cannot be read.
    """

    def __init__(self, file: File, layout: Layout, slot: Slot) -> None:
        self._where = f"{file.path}: {bitmap_label(slot.entry.name)}"
        self._own = _own(file)
        self._bits = Clusters(self._own.file, layout, slot)
        self.nbits = self._bits.nbits
        self._sums = np.full(geometry.ceil_div(self.nbits, _UNIT), _SAME, np.int64)
        self._count = 0
        for first, end, part in content.blocks(self._bits):
            if isinstance(part, bool):
                self._count += (end - first) * part
            else:
                self._count += bits.count(part)
                self._sums[first // _UNIT : geometry.ceil_div(end, _UNIT)] = _checksums(part)

    def __reduce__(self) -> tuple[Any, ...]:
        return content.Whole, (self.nbits, content.load(self))  # there is no copy of an open file

    def count(self) -> int:
        """See `Counted`."""
        return self._count

    def part(self, first: int, end: int) -> Part:
        """See `Content.part`.

        Raises:
            LockedError: somebody, this program perhaps, has changed them since.
            StorageError: they cannot be read.
        """
        low, high = first // _UNIT, geometry.ceil_div(end, _UNIT)
        start = low * _UNIT
        part = self._bits.part(start, min(high * _UNIT, self.nbits))
        if isinstance(part, bool):
            return part
        known = self._sums[low:high]
        if ((known != _checksums(part)) & (known != _SAME)).any():
            raise LockedError(self._where, "its clusters were used again since it was read; read it anew")
        return part[(first - start) // 64 : geometry.ceil_div(end - start, 64)]


def _checksums(words: bits.Words) -> NDArray[np.int64]:
    """The CRC32C of each `_UNIT` of bits; the last one may be shorter."""
    octets, size = words.view("u1").data, _UNIT // 8
    whole = len(octets) // size
    sums = np.empty(geometry.ceil_div(len(octets), size), np.int64)
    crc32c_each(octets[: whole * size], size, sums[:whole])
    if len(sums) > whole:
        sums[whole] = crc32c(octets[whole * size :])
    return sums


def load(file: File, layout: Layout, slot: Slot) -> memoryview:
    """All bits of a bitmap as words: ceil(granules / 64), each a uint64, in memory of their own; tail bits zero.

    They are no numpy array, so that a command that needs no more than a few of its loops starts without it.
    Arguments and errors as `Clusters`.
    """
    there = Clusters(file, layout, slot)
    octets = memory.zeros(geometry.ceil_div(there.nbits, 64) * 8)
    there.read(0, octets[: geometry.ceil_div(there.nbits, 8)])
    return memory.words(octets, there.nbits)
