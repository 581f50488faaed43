"""A page that shows a chart: one file, which loads nothing, and forbids the browser to."""

from __future__ import annotations

import json
from html import escape
from typing import TYPE_CHECKING, Any

from dirtmap.tools.plot.reading import MOST_EXTENTS

if TYPE_CHECKING:
    from dirtmap.tools.plot.reading import Picture

# Vega compiles its expressions to functions, and embedding it sets styles.
_POLICY = "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:"
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}: where it is dirty</title>
<style>
body {{ margin: 1.5em; font: 14px/1.5 sans-serif; color: #1b2733; background: white; }}
p, ul {{ max-width: 70em; margin: 0.5em 16px; padding: 0; }}
li {{ margin-left: 1.5em; }}
</style>
</head>
<body>
<div id="chart"></div>
<p>Scroll to zoom, drag to move, double-click to see the whole disk. Point at a mark to read its offset and length.</p>
{notes}<script type="module">
{library}
const shown = {options};
window.drawn = vegaEmbed("#chart", {chart}, shown);
window.drawn.catch(error => {{ document.getElementById("chart").textContent = String(error); }});
</script>
</body>
</html>
"""
# Without the editor, which is a page on another host.
_OPTIONS = {"renderer": "canvas", "actions": {"export": True, "source": False, "compiled": False, "editor": False}}


def page(picture: Picture, chart: dict[str, Any], library: str) -> str:
    """The page as text.

    Args:
        picture: what is drawn.
        chart: as a Vega-Lite specification.
        library: JavaScript of a module that defines ``vegaEmbed`` for all.
    """
    return _PAGE.format(
        policy=_POLICY,
        title=escape(picture.title),
        notes=_notes(picture),
        library=_inside_script(library),
        options=_inside_script(json.dumps(_OPTIONS)),
        chart=_inside_script(json.dumps(chart, separators=(",", ":"))),
    )


def _inside_script(text: str) -> str:
    """Script that cannot end the element it is in, or hide its end, whatever its strings say."""
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--").replace("<script", "<\\script")


def _notes(picture: Picture) -> str:
    """What else there is to say about the bitmaps, as a list."""
    notes = []
    for row in picture.rows:
        if row.extents is None:
            notes.append(
                f"{row.label} has {int(row.cells.extents.sum())} extents. More than {MOST_EXTENTS} are merged cell by "
                "cell: each tells how much of it is dirty, and how many extents begin in it."
            )
        notes += [f"{row.label} {remark}." for remark in row.remarks]
    items = "".join(f"<li>{escape(note)}</li>\n" for note in notes)
    return f"<ul>\n{items}</ul>\n" if items else ""
