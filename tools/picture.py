"""Draws a bitmap: the disk as rows of characters. The shade of each shows how much of its part of the disk is dirty.

0 B │███··░▒▓··············│
64 MiB │·····················█│
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

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
_RED, _PLAIN = "\x1b[31m", "\x1b[0m"


def draw(title: str, bitmap: Bitmap, *, colour: bool) -> Iterator[str]:
    """The picture, line by line, as wide as the terminal allows. `_SHADES` needs an output encoding that has them."""
    shades, frame = _SHADES, _FRAME
    try:
        (shades + frame).encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        shades, frame = _ASCII_SHADES, _ASCII_FRAME
    # Powers of two, so that rows begin at round offsets.
    room = max(shutil.get_terminal_size().columns - _LABEL_WIDTH - 3, _LEAST_WIDTH)
    width = 1 << (room.bit_length() - 1)
    each = bitmap.granularity
    while each * width * _MOST_ROWS < bitmap.size:
        each *= 2

    edges = np.append(np.arange(-(-bitmap.size // each), dtype=np.int64) * each, bitmap.size)
    before, _ = bitmap.before(edges)
    characters = np.array(list(shades))[_levels(edges, before)]
    dirty = int(before[-1])
    share = human_share(dirty, bitmap.size) or "0%"
    yield f"{printable(title)}: {human_size(dirty)} of {human_size(bitmap.size)} dirty ({share})"
    for row in range(0, len(characters), width):
        text = "".join(characters[row : row + width]).ljust(min(width, len(characters)))
        if colour:
            text = f"{_RED}{text}{_PLAIN}"
        yield f"{human_size(int(edges[row])):>{_LABEL_WIDTH}} {frame}{text}{frame}"
    yield f"{'':{_LABEL_WIDTH}}  {shades[0]} clean  {shades[1:]} dirty; a character is {human_size(each)}"


def _levels(edges: Positions, before: Positions) -> NDArray[Any]:
    """The shade of each part of the disk, from 0 (clean) to 4 (dirty all over); any dirt at all makes it at least 1."""
    dirty, size = np.diff(before), np.diff(edges)
    return np.where(dirty == 0, 0, np.where(dirty == size, 4, 1 + (dirty / size * 3).astype(np.int64).clip(0, 2)))
