"""`Gathered`: the bits of a bitmap that somebody tells part by part: of a large one, most of them are in a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dirtmap.engine.model import bits, content
from dirtmap.engine.model.bitmap import WHERE, Bitmap, checked_granularity
from dirtmap.engine.model.content import OR, Combined, Sparse
from dirtmap.engine.system.spool import Spool
from dirtmap.fmt import geometry
from dirtmap.fmt.errors import RangeError

if TYPE_CHECKING:
    from dirtmap.engine.model.content import Part


def require_part(first: int, end: int, nbits: int) -> None:
    """Refuses what is no part of so many bits; see `Content.part`.

    Raises:
        RangeError: it is not inside, not made of whole words, or larger than `content.BLOCK`.
    """
    if not 0 <= first < end <= min(nbits, first + content.BLOCK) or first % 64 or (end % 64 and end != nbits):
        raise RangeError(WHERE, f"bits {first} to {end} are no part of {nbits}")


class Gathered:
    """The bits that were told so far; all others are clean.

    Args:
        folder: on a disk, for the bits of a large bitmap.
        size: of the disk, in bytes.
        granularity: in bytes.

    Attributes:
        size, granularity: the same.

    Raises:
        BitmapError: no bitmap can have that granularity.
        StorageError: there can be no file in the folder.
    """

    def __init__(self, folder: str, size: int, granularity: int) -> None:
        self.size, self.granularity = size, checked_granularity(granularity)
        self._nbits = geometry.granules(size, granularity)
        self._words = bits.zeros(0 if self._nbits > content.LARGE else self._nbits)
        # Of a large one: what is dirty all over, and what is in the file.
        self._dirty, self._spool = Sparse(self._nbits), Spool(folder) if self._nbits > content.LARGE else None

    def close(self) -> None:
        """Gives up the file: the bitmap is not to be used any more."""
        if self._spool is not None:
            self._spool.close()

    def take(self, first: int, end: int, data: bytes) -> None:
        """Takes the bits from ``first`` up to ``end``: as whole words, tail bits zero, or none where all are dirty.

        Raises:
            RangeError: see `require_part`; or that is another number of bits.
            StorageError: there is no room for them.
        """
        require_part(first, end, self._nbits)
        if data and len(data) != geometry.ceil_div(end - first, 64) * 8:
            raise RangeError(WHERE, f"{len(data)} bytes are not {end - first} bits")
        if self._spool is None:
            words = np.frombuffer(data, bits.WORD) if data else bits.filled(end - first, True)
            self._words[first // 64 : first // 64 + len(words)] = words
        elif data:
            self._spool.write(first // 8, data)
        else:
            self._dirty.set(first, end, True)

    def bitmap(self) -> Bitmap:
        """The bitmap, which is there until `close`."""
        if self._spool is None:
            bits.mask_tail(self._words, self._nbits)
            return Bitmap.from_words(self.size, self.granularity, self._words, True)
        return Bitmap._of(
            self.size, self.granularity, Combined(self._dirty, _Spooled(self._nbits, self._spool), OR), True
        )


class _Spooled:
    """Bits in a file, read when they are asked for; behind its end they are clean."""

    def __init__(self, nbits: int, spool: Spool) -> None:
        self.nbits, self._spool = nbits, spool

    def part(self, first: int, end: int) -> Part:
        """See `Content.part`."""
        words = np.frombuffer(self._spool.read(first // 8, geometry.ceil_div(end - first, 64) * 8), bits.WORD)
        bits.mask_tail(words, end - first)
        return words if words.any() else False
