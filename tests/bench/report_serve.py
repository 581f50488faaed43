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

AIM, SAVED_AIM = 0.01, 0.05  # of a filter: when regions are logged, and in a minute with a save
HEAD = """
Made by `make bench-serve`. CPU time of the server for a write, kernel time included, by fio over a Unix socket, with
four requests of each job under way; the disk, of 512 MiB, is on a tmpfs, store and log are not.

What dirtmap's filter takes of it is *sampled*: of the moments at which perf looked at an nbdkit with one filter, the
part that was inside it or in the clock that it asks. *In a minute with a save* adds what a save costs in the
{seconds:g} s right after it: the first write into each of the disk's 512 regions syncs a record, and most are written
by then.

Beside it stands what differences tell. Each turn measures all columns once, and medians over {turns} turns of
{seconds:g} s count. nbdkit differs from itself by more than what is looked for, as *again* shows, which is the same
once more. So ten filters are one over the other, each with a session of its own, and a tenth of what they add is told:
of ten filters that do nothing, which is nbdkit's price for any filter; of dirtmap's, which are in each other's way in
the processor's caches; and of dirtmap's in the {seconds:g} s right after a save of all ten, in which most writes are
the first into their region. QEMU's columns are qemu-nbd on a qcow2 image on the same tmpfs, without bitmaps, and what
one and ten recording bitmaps add.
"""
ADOPTION = """
How long writes wait while the tracker is killed and `dirtmap serve --adopt` takes over: {jobs} jobs write 4 KiB at
random for {seconds:g} s, in {turns} pairs of runs, once with it and once while another process of Python starts beside
them.

| | median of the runs | worst run |
|---|---|---|
| the longest wait, with | {0} | {1} |
| without | {2} | {3} |
| 99.99 % of the writes wait no longer than, with | {4} | {5} |
| without | {6} | {7} |
"""


def share(value: float, aim: float | None = None) -> str:
    """A part of the CPU time that was compared with, as a cell."""
    told = f"{value * 100:+.3g} %"
    return told if aim is None else f"{told}, aim {aim * 100:g} %" + (" ✗" if value > aim else "")


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The table of CPU times."""
    yield (
        "| writes | nbdkit | dirtmap's filter, sampled | in a minute with a save | again | by difference: a filter "
        "that does nothing | dirtmap's | right after a save | qemu-nbd | one | ten |"
    )
    yield "|---" * 11 + "|"
    for row in rows:
        found = row["serving"]
        cells = [share(found["own"], AIM), share(found["minute"], SAVED_AIM)]
        cells += [share(found[name]) for name in ("again", "nothing", "warm", "saved")]
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
            both = row["adoption"]
            columns = [[turn[n] for turn in both[name]] for n in (0, 1) for name in ("with", "without")]
            cells = [shown(how(waits)) for waits in columns for how in (statistics.median, max)]
            text = ADOPTION.format(*cells, jobs=row["jobs"], seconds=row["seconds"], turns=len(both["with"]))
            parts.append(text)
    found = sections(report.read_text())
    found[SERVING] = "\n".join(parts).replace("\n\n\n", "\n\n")
    report.write_text("\n\n".join(text.strip() for text in found.values()) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
