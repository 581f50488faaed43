"""The chart of a picture, in Vega-Lite: for people as PNG and SVG, and for a page in which they zoom.

Marks are at least two pixels wide, so that nothing dirty is too small to be seen; of marks that cover each other, the
dirtiest is on top. The offset axis has ticks at powers of two, and so has whatever part of it is zoomed to.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import altair as alt
import numpy as np

from dirtmap.fmt.errors import counted
from dirtmap.tools.plot.cells import runs
from dirtmap.tools.sizes import human_size

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dirtmap.tools.plot.reading import Picture

# Blues from light to dark, and an orange beside them: told apart by people who see red and green alike, and in grey.
_CLEAN, _DOUBT = "#e9edf2", "#e69f00"
_BLUES = ["#8fc1e3", "#4a90c9", "#1f5a9e", "#08264d"]
_LEGEND = ["clean", "up to ⅓ dirty", "up to ⅔", "more", "all of it", "counts as dirty, not known"]
_IN_DOUBT = len(_LEGEND) - 1
_INK, _PALE_INK = "#1b2733", "#5b6975"
_WIDTH, _LEAST_PIXELS, _MOST_LABEL_PIXELS = 1024, 2, 260
_STEP, _LEAST_STEP, _HEIGHT = 30, 13, 900  # pixels: a row's height, that of one among many, and what they may take
_MOST_TICKS = 8
_NEAR = 64  # cells: where no more of them are shown, extents are seen one by one
_FONT = "DejaVu Sans, Verdana, Helvetica, Arial, sans-serif"

# Expressions of Vega. The axis shows so many bytes; ticks are a power of two apart.
_SPAN = "(domain('x')[1] - domain('x')[0])"
_TICK = f"pow(2, ceil(log({_SPAN} / {_MOST_TICKS}) / LN2 - 1e-9))"
_TICKS = f"sequence(ceil(max(domain('x')[0], 0) / {_TICK}) * {_TICK}, domain('x')[1] * (1 + 1e-12), {_TICK})"
_UNITS = json.dumps(["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"])


def _unit(value: str) -> str:
    """An expression of Vega: the number of the largest unit of which some bytes are one, or more."""
    return f"clamp(floor(log(max({value}, 1)) / LN2 / 10 + 1e-9), 0, 6)"


def _in_unit(value: str, unit_of: str, form: str) -> str:
    """An expression of Vega: bytes in the unit of another number of them."""
    unit = _unit(unit_of)
    return f"(format({value} / pow(1024, {unit}), '{form}') + ' ' + {_UNITS}[{unit}])"


# In its own unit, if that takes no more than quarters; else in that of the ticks.
_LABEL = (
    f"datum.value == 0 ? '0' : 4 * datum.value % pow(1024, {_unit('datum.value')}) == 0"
    f" ? {_in_unit('datum.value', 'datum.value', '.2~f')} : {_in_unit('datum.value', _TICK, ',~r')}"
)


def chart(picture: Picture, *, zoom: bool) -> dict[str, Any]:
    """The chart as a Vega-Lite specification, with its data.

    Args:
        picture: what is drawn.
        zoom: whether it can be zoomed: it then has the extents, too, and tells what is under the pointer.
    """
    rows = len(picture.rows)
    step = max(_LEAST_STEP, min(_STEP, _HEIGHT // max(rows, 1)))
    layers = [_ground(picture), _marks(picture, zoom=zoom)]
    if zoom:
        layers.append(_extents())
    layers += [_texts("reason", 6, _INK, step), _texts("amount", _WIDTH + 8, _PALE_INK, step)]
    layered = alt.layer(*layers).properties(
        description=f"{picture.title}: {_subtitle(picture)}",
        width=_WIDTH,
        height=max(rows, 1) * step,
        title=alt.TitleParams(
            picture.title,
            subtitle=_subtitle(picture),
            anchor="start",
            frame="group",
            fontSize=15,
            subtitleColor=_PALE_INK,
            offset=14,
        ),
        padding=16,
        background="white",
    )
    layered = layered.configure(font=_FONT).configure_view(stroke=None).configure_bar(minBandSize=_LEAST_PIXELS)
    if zoom:
        shown = alt.selection_interval(name="shown", bind="scales", encodings=["x"])
        layered.layer[0] = layered.layer[0].add_params(shown)
    spec: dict[str, Any] = layered.to_dict()
    # Put in now: altair would hold each of them against its schema.
    spec["datasets"] = _data(picture, zoom=zoom)
    return spec


def _subtitle(picture: Picture) -> str:
    number = len(picture.edges) - 1
    cell = int(picture.edges[1]) if number else 0
    return f"Where a disk of {human_size(picture.size)} is dirty, in {counted(number, 'cell')} of {human_size(cell)}"


def _y(picture: Picture) -> alt.Y:
    labels = json.dumps([row.label for row in picture.rows])
    return alt.Y(
        "row:O",
        scale=alt.Scale(domain=list(range(len(picture.rows))), paddingInner=0.25, paddingOuter=0.1),
        axis=alt.Axis(
            title=None,
            labelExpr=f"{labels}[datum.value]",
            labelLimit=_MOST_LABEL_PIXELS,
            labelFontSize=12,
            labelColor=_INK,
            labelOverlap=False,
            ticks=False,
            domain=False,
        ),
    )


def _x(picture: Picture) -> alt.X:
    return alt.X(
        "start:Q",
        bin="binned",
        scale=alt.Scale(domain=[0, max(picture.size, 1)], nice=False, zero=False),
        axis=alt.Axis(
            title="offset in the disk",
            # Of many rows a screen shows only the upper ones.
            orient="top" if len(picture.rows) * _LEAST_STEP > _HEIGHT // 3 else "bottom",
            values=alt.ExprRef(_TICKS),
            labelExpr=_LABEL,
            labelFlush=False,
            labelOverlap=True,
            labelColor=_INK,
            titleColor=_PALE_INK,
            titleFontWeight="normal",
            grid=True,
            gridColor="#00000014",
            tickColor="#00000040",
            domain=False,
        ),
    )


def _ground(picture: Picture) -> Any:
    """The whole disk, as a strip for each bitmap."""
    strips = alt.Chart(alt.NamedData("rows")).mark_bar(color=_CLEAN, binSpacing=0, clip=True, aria=False)
    return strips.encode(x=_x(picture), x2="start_end", y=_y(picture))


def _marks(picture: Picture, *, zoom: bool) -> Any:
    """The cells that have anything dirty, coloured by how much."""
    legend = alt.Legend(
        title=None,
        orient="top",
        direction="horizontal",
        values=list(range(len(_LEGEND) if any(row.doubt for row in picture.rows) else _IN_DOUBT)),
        labelExpr=f"{json.dumps(_LEGEND)}[datum.value]",
        labelLimit=300,
        labelColor=_INK,
        symbolType="square",
        symbolStrokeWidth=0,
        symbolSize=150,
        columnPadding=16,
    )
    scale = alt.Scale(domain=list(range(len(_LEGEND))), range=[_CLEAN, *_BLUES, _DOUBT])
    marks = _bars("cells", zoom, "0.3 : 1").encode(
        color=alt.Color("level:N", scale=scale, legend=legend), order=alt.Order("level:Q")
    )
    if zoom:
        begin = "datum.extents + (datum.extents == 1 ? ' begins' : ' begin') + ' here'"
        marks = marks.transform_calculate(amount=_size("datum.dirty"), begin=begin)
        told = alt.Tooltip("amount:N", title="dirty"), alt.Tooltip("begin:N", title="extents")
        marks = marks.encode(tooltip=[*_TOLD, *told])
    return marks


def _extents() -> Any:
    """The extents one by one. From afar it is the cells that are seen; yet what is under the pointer is told."""
    marks = _bars("extents", True, "1 : 0").transform_calculate(kind="'an extent, dirty all over'")
    return marks.encode(color="level:N", tooltip=[*_TOLD, alt.Tooltip("kind:N", title="this is")])


def _bars(data: str, zoom: bool, opacity: str) -> Any:
    """Bars from ``start`` to ``start_end``. ``opacity`` is that of a near look, and that of one from afar.

    Near is where a cell is wide enough for its extents to be told apart.
    """
    bars = alt.Chart(alt.NamedData(data)).encode(x=alt.X("start:Q", bin="binned"), x2="start_end", y="row:O")
    if not zoom:
        return bars.mark_bar(binSpacing=0, clip=True, aria=False)
    bars = bars.mark_bar(binSpacing=0, clip=True, aria=False, opacity=alt.ExprRef(f"{_SPAN} < datum.near ? {opacity}"))
    # What a tooltip says is computed here, rather than to be in the data.
    return bars.transform_lookup(
        lookup="row", from_=alt.LookupData(data=alt.NamedData("rows"), key="row", fields=["bitmap"])
    ).transform_calculate(offset=_size("datum.start"), length=_size("datum.start_end - datum.start"))


_TOLD = [
    alt.Tooltip("bitmap:N", title="bitmap"),
    alt.Tooltip("offset:N", title="offset"),
    alt.Tooltip("length:N", title="length"),
]


def _size(value: str) -> str:
    """An expression of Vega: a number of bytes, exactly, and for people."""
    return f"({value}) + ' (' + {_in_unit(f'({value})', f'({value})', ',.1~f')} + ')'"


def _texts(field: str, at: int, colour: str, step: int) -> Any:
    texts = alt.Chart(alt.NamedData("rows")).mark_text(
        clip=False, align="left", baseline="middle", color=colour, fontSize=min(12, step - 2), limit=_WIDTH - 12
    )
    return texts.encode(x=alt.value(at), y="row:O", text=f"{field}:N")


def _data(picture: Picture, *, zoom: bool) -> dict[str, list[dict[str, Any]]]:
    """The data sets of the chart: its rows, cells and extents."""
    rows: list[dict[str, Any]] = []
    cells: list[dict[str, Any]] = []
    extents: list[dict[str, Any]] = []
    for number, row in enumerate(picture.rows):
        rows.append(
            {
                "row": number,
                "start": 0,
                "start_end": picture.size,
                "bitmap": row.label,
                "amount": picture.amount(row) + (", incomplete" if row.incomplete else ""),
                "reason": row.doubt or "",
            }
        )
        levels = np.where(row.cells.levels > 0, _IN_DOUBT, 0) if row.doubt else row.cells.levels
        if not zoom:  # neighbours that look the same are one
            firsts, ends = runs(levels)
            columns = {"start": picture.edges[firsts], "start_end": picture.edges[ends], "level": levels[firsts]}
            cells += _records(columns, row=number)
            continue
        near = 0 if row.extents is None else _NEAR * int(picture.edges[1])
        some = np.flatnonzero(levels)
        columns = {"start": picture.edges[some], "start_end": picture.edges[some + 1], "level": levels[some]}
        columns |= {"dirty": row.cells.dirty[some], "extents": row.cells.extents[some]}
        cells += _records(columns, row=number, near=near)
        if row.extents is not None:
            offsets, lengths = row.extents
            level = _IN_DOUBT if row.doubt else len(_BLUES)
            extents += _records({"start": offsets, "start_end": offsets + lengths}, row=number, near=near, level=level)
    return {"rows": rows, "cells": cells} | ({"extents": extents} if zoom else {})


def _records(columns: dict[str, NDArray[np.int64]], **same: int) -> list[dict[str, Any]]:
    """Columns of a table as records; ``same`` is what all of them have in common."""
    lists = (column.tolist() for column in columns.values())
    return [dict(zip(columns, values, strict=True)) | same for values in zip(*lists, strict=True)]
