"""Shares a disk out among the columns of a picture, its cells, and says how much of each is dirty.

    bitmap      |..##....|........|########|#.......|
    dirty bytes |  2     |  0     |  8     |  1     |       in each cell
    level       |  1     |  0     |  4     |  1     |       how it is drawn; 0 only where nothing is dirty

Offsets, lengths and sizes are in bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dirtmap.tools.picture import levels

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dirtmap.engine import Bitmap

    Positions = NDArray[np.int64]

_LEAST = 512  # bytes: the smallest granule that there can be


def round_edges(size: int, granularities: Iterable[int], most: int) -> Positions:
    """Where cells begin that are a power of two long, the same for all of them; and at last the disk's end.

    Args:
        size: of the disk.
        granularities: of the bitmaps to be shown; no cell is smaller than all of their granules.
        most: how many cells there may be.
    """
    each = min(granularities, default=_LEAST)
    while each * most < size:
        each *= 2
    # A disk of 2**63 - 1 bytes has no multiple of a cell behind its end.
    return np.append(np.arange(-(-size // each), dtype=np.int64) * each, size)


def even_edges(size: int, granularities: Iterable[int], number: int) -> Positions:
    """Where that many cells begin that are as equal as can be; and at last the disk's end.

    They begin where granules do, if there are enough of these.
    """
    finest = min(granularities, default=_LEAST)
    unit = finest if finest * number <= size else 1
    return np.array([*(index * size // number // unit * unit for index in range(number)), size], np.int64)


@dataclass(frozen=True, eq=False)
class Cells:
    """What a bitmap has in each cell.

    Attributes:
        dirty: dirty bytes in each.
        extents: how many extents begin in each.
        levels: how dirty each is, from 0, clean, to 4, dirty all over; a cell with any dirt has at least 1.
    """

    dirty: Positions
    extents: Positions
    levels: Positions


def cells(bitmap: Bitmap, edges: Positions) -> Cells:
    """Counts what is dirty between the edges, which ascend.

    Raises:
        BitmapError: the bitmap is inconsistent.
        FormatError, StorageError: its container is damaged, or cannot be read.
    """
    dirty, extents = (np.diff(numbers) for numbers in bitmap.before(edges))
    return Cells(dirty, extents, levels(dirty, np.diff(edges)))


def runs(cells_levels: Positions) -> tuple[Positions, Positions]:
    """Where runs of cells of one level begin, and where they end; runs of clean cells are left out."""
    changes = np.flatnonzero(np.diff(cells_levels)) + 1
    starts = np.concatenate((np.zeros(min(len(cells_levels), 1), np.int64), changes))
    ends = np.append(changes, len(cells_levels))[: len(starts)]
    some = cells_levels[starts] > 0
    return starts[some], ends[some]
