"""Ranges that are counted in blocks, as device-mapper does."""

from __future__ import annotations

import re

from dirtmap.tools.foreign.marks import Marks, Order

_NUMBER = re.compile("[0-9]{1,19}")


class Blocks:
    """Takes ranges of blocks in order, and marks them.

    Args:
        marks: takes them in bytes.
        size: of a block, bytes.
    """

    def __init__(self, marks: Marks, size: int) -> None:
        self._marks, self._size = marks, size
        self._order = Order(marks)

    def take(self, begin: int, count: int, dirty: bool) -> None:
        """Takes a range; the last block of a disk may go on behind its end.

        Raises:
            FormatError: empty, or out of order.
            RangeError: a block has no byte of the disk.
        """
        self._order.take(begin, count)
        if begin + count > -(-self._marks.size // self._size):
            raise self._marks.outside(begin * self._size, count * self._size)
        if dirty:
            offset = begin * self._size
            self._marks.add(offset, min(count * self._size, self._marks.size - offset))


def number(marks: Marks, attributes: dict[str, str], name: str) -> int:
    """A number of blocks or sectors.

    Raises:
        FormatError: it is not there, or none.
    """
    text = attributes.get(name, "")
    if not _NUMBER.fullmatch(text):
        raise marks.error(f"'{name}' is not a number")
    return int(text)
