"""The marking protocol's C header alone, in programs without Python."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent
HEADERS = HERE.parent / "engine" / "tracking"


def build(path: Path, compiler: str = "gcc", *more: str) -> Path:
    warnings = ["-Wall", "-Wextra", "-Werror", "-pedantic"]
    source = str(HERE / "support" / "marking.c")
    options = ["-O2", "-std=c11", *warnings, *more, f"-I{HEADERS}", "-pthread"]
    subprocess.run([compiler, *options, "-o", str(path), source], check=True)
    return path


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("marking") / "marking")


@pytest.fixture
def live() -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield path


def test_marks_flights_the_dead_and_the_gate(program: Path, live: str) -> None:
    subprocess.run([program, "check", live], check=True, timeout=60)


CROSS, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"


@pytest.mark.skipif(not (shutil.which(CROSS) and shutil.which(EMULATOR)), reason=f"needs {CROSS} and {EMULATOR}")
def test_the_same_on_aarch64(tmp_path: Path, live: str) -> None:
    path = build(tmp_path / "marking", CROSS, "-static")
    subprocess.run([EMULATOR, path, "check", live], check=True, timeout=60)


@pytest.mark.parametrize("tib", [1, 15])
def test_what_a_mark_takes(program: Path, live: str, tib: int) -> None:
    """Shows it with ``pytest -s``, beside a plain loop over the same bits."""
    found = subprocess.run([program, "bench", live, str(tib)], check=True, timeout=60, capture_output=True, text=True)
    times = dict(line.rsplit(" ", 1) for line in found.stdout.splitlines())
    what = ["flat loop", "mark", "begin and end", "mark many"]
    assert list(times) == [f"{name}{again}" for name in what for again in ("", ", again")]
    sys.stderr.write("".join(f"\n{name}, {tib} TiB: {ns} ns" for name, ns in times.items()))
