"""Draws a bitmap: the disk as rows of characters. The shade of each shows how much of its part of the disk is dirty.

0 B │███··░▒▓··············│
64 MiB │·····················█│
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from dirtmap.fmt.errors import printable
from dirtmap.tools.sizes import human_share, human_size

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dirtmap.engine import Bitmap

    Positions = NDArray[np.int64]

_MOST_ROWS, _LEAST_WIDTH, _LABEL_WIDTH = 16, 16, 10
_SHADES, _FRAME = "·░▒▓█", "│"
_ASCII_SHADES, _ASCII_FRAME = ".-=+#", "|"
RED, PLAIN = "\x1b[31m", "\x1b[0m"


def draw(title: str, bitmap: Bitmap, *, colour: bool) -> Iterator[str]:
    """The picture, line by line, as wide as the terminal allows."""
    shades, frame = symbols()
    # Powers of two, so that rows begin at round offsets.
    room = max(shutil.get_terminal_size().columns - _LABEL_WIDTH - 3, _LEAST_WIDTH)
    width = 1 << (room.bit_length() - 1)
    each = bitmap.granularity
    while each * width * _MOST_ROWS < bitmap.size:
        each *= 2

    edges = np.append(np.arange(-(-bitmap.size // each), dtype=np.int64) * each, bitmap.size)
    before, _ = bitmap.before(edges)
    characters = np.array(list(shades))[levels(np.diff(before), np.diff(edges))]
    dirty = int(before[-1])
    share = human_share(dirty, bitmap.size) or "0%"
    yield f"{printable(title)}: {human_size(dirty)} of {human_size(bitmap.size)} dirty ({share})"
    for row in range(0, len(characters), width):
        text = "".join(characters[row : row + width]).ljust(min(width, len(characters)))
        if colour:
            text = f"{RED}{text}{PLAIN}"
        yield f"{human_size(int(edges[row])):>{_LABEL_WIDTH}} {frame}{text}{frame}"
    yield f"{'':{_LABEL_WIDTH}}  {shades[0]} clean  {shades[1:]} dirty; a character is {human_size(each)}"


def symbols() -> tuple[str, str]:
    """The characters for the levels, and that of the frame: those that the encoding of standard output has."""
    try:
        (_SHADES + _FRAME).encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return _ASCII_SHADES, _ASCII_FRAME
    return _SHADES, _FRAME


def levels(dirty: Positions, sizes: Positions) -> Positions:
    """How dirty each part of a disk is, from 0, clean, to 4, dirty all over; with any dirt at all it is at least 1.

    Args:
        dirty: bytes in each part.
        sizes: of the parts, in bytes.
    """
    thirds = (dirty / np.maximum(sizes, 1) * 3).astype(np.int64).clip(0, 2)
    return np.where(dirty == 0, 0, np.where(dirty == sizes, 4, 1 + thirds))
