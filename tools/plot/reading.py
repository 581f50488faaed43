"""Reads the bitmaps that a picture shows, and what about them is not certain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dirtmap.fmt.errors import printable
from dirtmap.tools.plot.cells import Cells, cells, even_edges, round_edges
from dirtmap.tools.sizes import human_share, human_size
from dirtmap.tools.times import local_time

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dirtmap.engine import Handle, ImageInfo

    Positions = NDArray[np.int64]

# Cells of a picture whose width is nobody's, and of a bitmap the extents that are shown one by one.
MOST_CELLS = 2048
MOST_EXTENTS = 2048
_INCONSISTENT = "inconsistent: in use by a writer, or left so by one that died"


@dataclass(frozen=True, eq=False)
class Row:
    """A bitmap as it is shown.

    Attributes:
        name: of the bitmap, as the engine has it.
        granularity: bytes for each bit.
        checkpoint: whether it is a checkpoint: it has what was written until the next one.
        began: of a checkpoint, when it began, in seconds since 1970; None where that is not known.
        count: dirty bytes in whole granules, as QEMU counts; None where nothing is known.
        doubt: why some or all of what is shown as dirty may be clean in truth; None where it is as it was recorded.
        damage: what of its bits was damaged, and so is dirty, if any was: that is its doubt, if it has no other.
        incomplete: of a checkpoint: not all that was written since is known any more.
        cells: what each cell has; dirty all over where nothing is known.
        extents: offsets and lengths of all extents; None if there are more than `MOST_EXTENTS`.
    """

    name: str
    granularity: int
    checkpoint: bool
    began: float | None
    count: int | None
    doubt: str | None
    damage: str | None
    incomplete: bool
    cells: Cells
    extents: tuple[Positions, Positions] | None

    @property
    def label(self) -> str:
        """Its name, as it can be shown, and of a checkpoint the minute in which it began."""
        return _label(self.name, self.began)

    @property
    def remarks(self) -> list[str]:
        """What to know about it beside the picture, a line each."""
        lines = [f"counts as dirty where it may be clean: {self.doubt}"] if self.doubt else []
        return lines + ["is incomplete: not all that was written since is known any more"] * self.incomplete


@dataclass(frozen=True, eq=False)
class Picture:
    """What is drawn.

    Attributes:
        title: the image, as it can be shown.
        size: of the disk, in bytes.
        edges: where the cells begin, and the disk's end, in bytes.
        rows: the bitmaps, from above.
        doubt: why all bitmaps count as dirty all over; None if they do not.
    """

    title: str
    size: int
    edges: Positions
    rows: list[Row]
    doubt: str | None

    def amount(self, row: Row) -> str:
        """How much a row calls dirty, for people."""
        if row.count is None:
            return "not known"
        share = f" ({human_share(row.count, self.size)})" if row.count and self.size else ""
        return human_size(row.count) + share


def read(image: Handle, names: Sequence[str], columns: Callable[[Sequence[str]], int] | None = None) -> Picture:
    """What there is to draw.

    Bits are read a part at a time, and one bitmap after the other.

    Args:
        image: that has the bitmaps.
        names: of bitmaps, from above. If empty, all: those that are no checkpoints, then these, oldest first.
        columns: says how many cells there are, given the labels; if None, cells are a power of two long, and there are
            at most `MOST_CELLS`.

    Raises:
        BitmapNotFoundError: there is no bitmap of such a name.
        dirtmap.engine.Error: the image cannot be read.
    """
    info = image.info()
    if not names:
        place = {name: number for number, name in enumerate(info.checkpoints)}
        names = sorted((bitmap.name for bitmap in info.bitmaps), key=lambda name: place.get(name, -1))
    began = {bitmap.name: bitmap.began for bitmap in info.bitmaps}
    granularities = {bitmap.name: bitmap.granularity for bitmap in info.bitmaps if bitmap.name in names}.values()
    if columns is None:
        edges = round_edges(image.size, granularities, MOST_CELLS)
    else:
        edges = even_edges(image.size, granularities, columns([_label(name, began.get(name)) for name in names]))
    # A store's path says little about a disk that has a name.
    title = printable(image.name if image.name is not None and image.format == "dirtmap" else image.path)
    doubt = image.doubt()
    rows = [_row(image, name, edges, doubt, info, began.get(name)) for name in names]
    return Picture(title, image.size, edges, rows, doubt)


def _label(name: str, began: float | None) -> str:
    return printable(name) + (f", {local_time(began)[:-3]}" if began is not None else "")


def _row(
    image: Handle,
    name: str,
    edges: Positions,
    doubt: str | None,
    info: ImageInfo,
    began: float | None,
) -> Row:
    found = image[name]
    if found.inconsistent:
        shown, count, doubt = found.recovered(), None, _INCONSISTENT
    else:
        shown, count = found, found.count
    here = cells(shown, edges)
    return Row(
        name=name,
        granularity=found.granularity,
        checkpoint=name in info.checkpoints,
        began=began,
        count=count,
        doubt=doubt or (f"its {shown.damage}" if shown.damage else None),
        damage=shown.damage,  # known now that all of it was read
        incomplete=name in info.incomplete,
        cells=here,
        extents=shown.extents() if here.extents.sum() <= MOST_EXTENTS else None,
    )
