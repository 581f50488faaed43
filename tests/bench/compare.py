"""Holds two commits side by side: their benchmarks run in turn, and each row is shown with its ratio.

Usage: python tests/bench/compare.py COMMIT OTHER [pytest's -k expression]

Each commit runs the benchmarks of its own, since these use what is inside; rows are matched by their names. The best of
three turns counts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.measuring import shown

TURNS = 3


def prepared(commit: str) -> Path:
    """A checkout of the commit, set up."""
    number = subprocess.run(["git", "rev-parse", commit], capture_output=True, text=True, check=True).stdout.strip()
    folder = Path("build/compare").absolute() / number
    if not folder.exists():
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", folder, number], check=True)
    subprocess.run(["make", "--quiet", "setup"], cwd=folder, check=True)
    return folder


def measured(folder: Path, which: str) -> dict[str, float]:
    """The medians of one run, in seconds, by the names of the rows."""
    results = folder / "results.json"
    command = [".venv/bin/pytest", "-q", "-o", "python_files=bench_*.py", f"--benchmark-json={results}", "tests/bench"]
    done = subprocess.run([*command, "-k", which] if which else command, cwd=folder, capture_output=True, check=False)
    if not results.exists():
        raise SystemExit(done.stdout.decode() + done.stderr.decode())
    found = json.loads(results.read_text())["benchmarks"]
    results.unlink()
    return {one["fullname"]: one["extra_info"].get("seconds", one["stats"]["median"]) for one in found}


def main(one: str, other: str, which: str = "") -> None:
    """Prints the comparison as a Markdown table, worst first."""
    folders = prepared(one), prepared(other)
    times: tuple[dict[str, float], dict[str, float]] = {}, {}
    for _ in range(TURNS):
        for folder, best in zip(folders, times, strict=True):
            for name, seconds in measured(folder, which).items():
                best[name] = min(seconds, best.get(name, seconds))
    print(f"| what | {one} | {other} | ratio |\n|---|---|---|---|")
    both = times[0].keys() & times[1].keys()
    for name in sorted(both, key=lambda name: times[1][name] / times[0][name], reverse=True):
        before, after = times[0][name], times[1][name]
        print(f"| {name} | {shown(before)} | {shown(after)} | {after / before:.2f} |")
    for name in sorted(times[0].keys() ^ times[1].keys()):
        print(f"| {name} | only in {one if name in times[0] else other} | | |")


if __name__ == "__main__":
    main(*sys.argv[1:])
