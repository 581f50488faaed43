"""Markers and their keeper, killed at random, lose no mark: in C, from the headers alone."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent
HEADERS = [HERE.parent / "engine" / "tracking" / name for name in ("marking.h", "keeping.h")]
_SECONDS = 3600

# What of the headers is replaced by what. Those that are not long are soon noticed.
FAULTS = {
    "a write without an entry": ("atomic_store(&f->interval, (s.state >> 32) + 1);", ";"),
    "no last look at the state": ("== s.state && !(*gate & 1))) {", "| 1 && !(*gate & 1))) {"),
    "no look at the gate": ("== s.state && !(*gate & 1))) {", "== s.state)) {"),
    "no look at the logged regions": (
        "atomic_load(&dm_logged(c, state)[region >> 6]) >> (region & 63) & 1);",
        "1);",
    ),
    "a gate that is closed by adding 1": ("next = gate + 1 + (gate & 1);", "next = gate + 1;"),
    "entries of the dead that are cleared": (
        "atomic_fetch_or(&slot->flights[k].interval, DM_ORPHAN);",
        "atomic_store(&slot->flights[k].interval, 0);",
    ),
    "the dead's flights not marked": ("r = dm_touch(h, own, start, end - start);", "r = 0;"),
    "logging that is not announced": ("atomic_store(&announcing->slot->logging, log + 1);", ";"),
}
_LONG = ["the dead's flights not marked", "logging that is not announced"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def compile_with(*options: str, fault: str | None = None) -> Path:
        folder = tmp_path_factory.mktemp("stress")
        found = 0
        for header in HEADERS:
            text = header.read_text()
            if fault is not None:
                what, instead = FAULTS[fault]
                found += text.count(what)
                text = text.replace(what, instead)
            (folder / header.name).write_text(text)
        assert found == (fault is not None)
        source, program = HERE / "support" / "marking_stress.c", folder / "stress"
        warnings = ["-Wall", "-Wextra", "-Werror", "-pedantic"] if fault is None else ["-w"]
        flags = ["-O2", "-g", "-std=c11", "-pthread", *warnings, *options]
        subprocess.run(["gcc", *flags, f"-I{folder}", "-o", program, source], check=True)
        return program

    return compile_with


@pytest.fixture
def live() -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield path


def run(program: Path, folder: str, how: str, enough: int, seed: int = 1) -> subprocess.CompletedProcess[str]:
    command = [str(program), folder, str(seed), how, str(enough)]
    return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)


@pytest.mark.parametrize("kills", [600, pytest.param(50_000, marks=pytest.mark.long)])
def test_no_mark_is_lost_whoever_is_killed(compiled: Callable[..., Path], live: str, kills: int) -> None:
    found = run(compiled(), live, "processes", kills)
    assert (found.returncode, found.stderr) == (0, "")
    done = {name: int(number) for name, number in (line.split() for line in found.stdout.splitlines())}
    assert done["kills"] == kills
    assert all(done.values()), done


@pytest.mark.parametrize("cuts", [300, pytest.param(20_000, marks=pytest.mark.long)])
def test_threads_race_for_nothing_but_atomic_words(compiled: Callable[..., Path], live: str, cuts: int) -> None:
    """ThreadSanitizer makes the program fail where it has anything to report."""
    found = run(compiled("-fsanitize=thread", "-Wno-tsan"), live, "threads", cuts)
    assert (found.returncode, found.stderr) == (0, "")
    assert f"cuts {cuts}" <= found.stdout


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=[pytest.mark.long] if name in _LONG else []) for name in FAULTS]
)
def test_a_fault_is_noticed(compiled: Callable[..., Path], live: str, fault: str) -> None:
    found = run(compiled(fault=fault), live, "processes", 100_000)
    assert found.returncode == 1
    assert "granule" in found.stderr
