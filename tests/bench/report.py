"""Makes BENCHMARKS.md, and the picture in it, of what ``make bench`` has measured.

Usage: python tests/bench/report.py RESULTS.json BENCHMARKS.md PICTURE.svg
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.measuring import shown

Row = dict[str, Any]

HEAD = """# Benchmarks

Made by `make bench`; whoever changes what is measured makes it anew. Each row was measured in turn with what it is
compared with, in one run, so that ratios hold where times do not. A *limit* is what nobody who does the same could
undercut: a C loop over the same bits, reading the same bytes, a bare Python. All else is a *peer*. Times are medians. A
ratio says how many times as long dirtmap takes; in each section the worst, measured by what was aimed at, come first.
"""
SIZES = """## Time against size

A line that stays level is a cost that does not depend on the size of the disk, and the dashed line grows as the disk
does. 64 KiB granules, 1 % of them dirty at random. Above 2^28 granules, 16 TiB here, a bitmap is not in memory any
more: marks are noted, and an OR is, and both are made when somebody looks at it.

![Time against size, of disks from 1 to 64 TiB]({picture})
"""


# Of its own run, `make bench-serve`; see report_serve.py.
SERVING = "Serving a disk"


def sections(text: str) -> dict[str, str]:
    """The parts of BENCHMARKS.md by their headings; what is before the first has none."""
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    return {part.partition("\n")[0].removeprefix("## ") if part.startswith("## ") else "": part for part in parts}


def machine(results: Row) -> Iterator[str]:
    """What was measured on, a line each."""
    info, cpu = results["machine_info"], results["machine_info"].get("cpu", {})
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    cores = cpu.get("count", os.cpu_count())
    yield f"- Processor: {cpu.get('brand_raw', info['machine'])}, {cores} cores; {memory} GiB of memory"
    linux = platform.release().partition("-")[0]
    yield f"- Linux {linux}, Python {info['python_version']}, numpy {_numpy()}, {_qemu()}"
    changed = " and changes" if results["commit_info"].get("dirty") else ""
    yield f"- dirtmap at {results['commit_info']['id'][:7]}{changed}, {results['datetime'][:10]}"


def _numpy() -> str:
    import numpy

    return numpy.__version__


def _qemu() -> str:
    said = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version (\S+)", said)
    return f"QEMU {found[1] if found else '?'}"


def best(row: Row, *, limit: bool) -> tuple[str, Row] | None:
    """The fastest peer, or limit, and its name; None where there is none."""
    found = [(name, peer) for name, peer in row["peers"].items() if peer["limit"] == limit]
    return min(found, key=lambda named: named[1]["seconds"], default=None)


def badness(row: Row) -> float:
    """The worst ratio of those that were aimed at, in aims; rows without an aim come last."""
    return max((peer["ratio"] / peer["aim"] for peer in row["peers"].values() if peer["aim"]), default=0.0)


def cell(found: tuple[str, Row] | None) -> str:
    """One peer, as a cell of the table."""
    if found is None:
        return ""
    name, peer = found
    aim = "" if peer["aim"] is None else f", aim {peer['aim']:g}"
    missed = " ✗" if peer["aim"] is not None and peer["ratio"] > peer["aim"] else ""
    return f"{peer['ratio']:.2g}{aim}{missed}: {name}, {shown(peer['seconds'])}"


def tables(rows: list[Row]) -> Iterator[str]:
    """A table for each section, in the order in which they were measured."""
    for section in dict.fromkeys(row["section"] for row in rows):
        yield f"\n## {section}\n"
        yield "| what | takes | ratio to the best peer | ratio to the limit |\n|---|---|---|---|"
        for row in sorted((row for row in rows if row["section"] == section), key=badness, reverse=True):
            peer, limit = best(row, limit=False), best(row, limit=True)
            yield f"| {row['what']} | {shown(row['seconds'])} | {cell(peer)} | {cell(limit)} |"


def draw(sizes: list[Row], picture: Path) -> None:
    """Time against size, both on logarithmic axes, as an SVG file."""
    import altair

    rows = [{"TiB": row["size"], "seconds": row["seconds"], "what": row["what"]} for row in sizes]
    least = min(row["seconds"] for row in rows)
    rows += [{"TiB": size, "seconds": least * size, "what": "as the disk grows"} for size in {r["TiB"] for r in rows}]
    ticks = sorted({row["TiB"] for row in rows})
    chart = (
        altair.Chart(altair.Data(values=rows))
        .mark_line(point=True)
        .encode(
            x=altair.X("TiB:Q", scale=altair.Scale(type="log", base=2), axis=altair.Axis(values=ticks), title="TiB"),
            y=altair.Y("seconds:Q", scale=altair.Scale(type="log"), title="seconds"),
            color=altair.Color("what:N", title=None, legend=altair.Legend(labelLimit=400)),
            strokeDash=altair.condition(
                "datum.what == 'as the disk grows'", altair.value([4, 4]), altair.value([1, 0])
            ),
        )
        .properties(width=520, height=420)
    )
    chart.save(str(picture))


def main(results_path: str, report_path: str, picture_path: str) -> None:
    """Reads the results and writes both files."""
    results = json.loads(Path(results_path).read_text())
    found = [one["extra_info"] for one in results["benchmarks"] if "what" in one["extra_info"]]
    rows, sizes = [row for row in found if "size" not in row], [row for row in found if "size" in row]
    parts = [HEAD, *machine(results), *tables(rows)]
    if sizes:
        draw(sizes, Path(picture_path))
        parts.append("\n" + SIZES.format(picture=os.path.relpath(picture_path, Path(report_path).parent)))
    report = Path(report_path)
    kept = sections(report.read_text()).get(SERVING, "") if report.exists() else ""
    report.write_text("\n".join([*parts, "\n" + kept]).rstrip() + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
