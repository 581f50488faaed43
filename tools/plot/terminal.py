"""Draws bitmaps as lines of characters, as wide as the terminal.

monday  │██░···················▒▒▒▒··│ 5.6 GiB (5.6%)
tuesday │·····░················██····│ 2 GiB (2.0%)
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dirtmap.tools.output import columns_of
from dirtmap.tools.picture import PLAIN, RED, symbols
from dirtmap.tools.sizes import human_size

if TYPE_CHECKING:
    from dirtmap.tools.plot.reading import Picture, Row

_YELLOW = "\x1b[33m"
_IN_DOUBT = "?"
_LEAST_COLUMNS, _MOST_LABEL, _AMOUNT = 16, 24, 18


def columns_for(labels: Sequence[str]) -> int:
    """How many cells there is room for, beside labels and amounts."""
    return max(shutil.get_terminal_size().columns - _label_width(labels) - _AMOUNT - 4, _LEAST_COLUMNS)


def draw(picture: Picture, *, colour: bool) -> Iterator[str]:
    """The picture, line by line."""
    shades, frame = symbols()
    labels = [row.label for row in picture.rows]
    width, number = _label_width(labels), len(picture.edges) - 1
    yield f"{picture.title}: {human_size(picture.size)}, a character is {human_size(-(-picture.size // number))}"
    yield f"{'':{width}}  {_scale(picture.size, number)}"
    for row, label in zip(picture.rows, labels, strict=True):
        shown = _cut(label, width)
        text = _text(row, shades, colour=colour)
        yield f"{shown}{' ' * (width - columns_of(shown))} {frame}{text}{frame} {picture.amount(row)}"
        for remark in row.remarks:
            yield f"{'':{width}}  {remark}"
    doubt = f"  {_IN_DOUBT} counts as dirty, not known" if any(row.doubt for row in picture.rows) else ""
    yield f"{'':{width}}  {shades[0]} clean  {shades[1:]} dirty{doubt}"


def _label_width(labels: Sequence[str]) -> int:
    return min(max(map(columns_of, labels), default=0), _MOST_LABEL)


def _cut(label: str, width: int) -> str:
    """The label, with its end left out where it is too long."""
    if columns_of(label) <= width:
        return label
    while columns_of(label) >= width:
        label = label[:-1]
    return f"{label}~"


def _text(row: Row, shades: str, *, colour: bool) -> str:
    used = shades[0] + _IN_DOUBT * (len(shades) - 1) if row.doubt else shades
    text = "".join(np.array(list(used))[row.cells.levels])
    return f"{_YELLOW if row.doubt else RED}{text}{PLAIN}" if colour else text


def _scale(size: int, number: int) -> str:
    """Offsets above the columns where they are, at the begin, the end and the quarters, as far as there is room."""
    line = " " * (number + _AMOUNT)
    for quarter in (0, 4, 2, 1, 3) if size else (0,):
        text, at = f"'{human_size(size * quarter // 4)}", number * quarter // 4
        end = at + len(text)
        if end <= len(line) and not line[max(at - 1, 0) : end + 1].strip():
            line = line[:at] + text + line[end:]
    return line.rstrip()
