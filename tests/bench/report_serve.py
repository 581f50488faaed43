"""Writes what ``make bench-serve`` has measured into BENCHMARKS.md, whose other sections stay.

Usage: python tests/bench/report_serve.py RESULTS.json BENCHMARKS.md
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from report import SERVING, machine, sections
from support.measuring import shown

AIM = 0.01  # of a filter, when regions are logged
HEAD = """
Made by `make bench-serve`. CPU time of the server for a write, kernel time included, by fio over a Unix socket, with
four requests of each job under way; the disk is on a tmpfs, store and log are not. Each turn measures all columns
once, and medians over {turns} turns count. nbdkit differs from itself by more than what is looked for, as *again*
shows, which is the same once more. So ten filters are one over the other, each with a session of its own, and a tenth
of what they cost is told: of ten filters that do nothing, which is a limit; of dirtmap's; and of dirtmap's right
after a save of all ten, for {seconds:g} s in which most writes are the first into their region, whose record is
synced: that is paid once a region and save, not with each write. QEMU's columns are qemu-nbd on a qcow2 image on the
same tmpfs, without bitmaps, and what one and ten recording bitmaps add.
"""
ADOPTION = """
The longest time that a write took, of {jobs} jobs that write 4 KiB at random for {seconds:g} s, in {turns} runs:
{without} (worst {worst_without}) while another process starts beside them, {adopted} (worst {worst_adopted}) while the
tracker is killed and `dirtmap serve --adopt` takes over.
"""


def share(value: float, aim: float | None = None) -> str:
    """A part of the CPU time that was compared with, as a cell."""
    told = f"{value * 100:+.3g} %"
    return told if aim is None else f"{told}, aim {aim * 100:g} %" + (" ✗" if value > aim else "")


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The table of CPU times."""
    yield "| writes | nbdkit | again | a filter that does nothing | dirtmap's | after a save | qemu-nbd | one | ten |"
    yield "|---" * 9 + "|"
    for row in rows:
        found = row["serving"]
        cells = [share(found["again"]), share(found["nothing"]), share(found["warm"], AIM), share(found["saved"])]
        others = [shown(found["qemu"]), share(found["one"]), share(found["ten"])]
        yield "| " + " | ".join([row["what"], shown(found["seconds"]), *cells, *others]) + " |"


def main(results_path: str, report_path: str) -> None:
    """Reads the results and writes the section."""
    results, report = json.loads(Path(results_path).read_text()), Path(report_path)
    rows = [one["extra_info"] for one in results["benchmarks"]]
    parts = [f"## {SERVING}"]
    if costs := [row for row in rows if "serving" in row]:
        parts.append(HEAD.format(turns=costs[0]["turns"], seconds=costs[0]["turn_seconds"]))
        parts += [*machine(results), "", *table(costs)]
    for row in rows:
        if "adoption" in row:
            without, adopted = row["adoption"]["without"], row["adoption"]["with"]
            text = ADOPTION.format(
                jobs=row["jobs"],
                seconds=row["seconds"],
                turns=len(adopted),
                without=shown(statistics.median(without)),
                worst_without=shown(max(without)),
                adopted=shown(statistics.median(adopted)),
                worst_adopted=shown(max(adopted)),
            )
            parts.append(text)
    found = sections(report.read_text())
    found[SERVING] = "\n".join(parts).replace("\n\n\n", "\n\n")
    report.write_text("\n\n".join(text.strip() for text in found.values()) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
