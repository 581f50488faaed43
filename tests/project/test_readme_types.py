"""The Python examples of README and docs/python.md pass mypy as strictly as it can be, as an embedding program does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support.examples import ROOT, program

DOCUMENTS = [ROOT / "README.md", ROOT / "docs/python.md"]

# What an embedding program has besides: its disk, what it writes, and how it copies.
PROGRAM = """
import os

import numpy as np
from numpy.typing import NDArray

fd, offset, length, data = os.open("logs.raw", os.O_RDWR | os.O_CREAT), 7 << 20, 4096, bytes(4096)
offsets, lengths = [8 << 30, 9 << 30], [4096, 1 << 20]


def copy(extents: tuple[NDArray[np.int64], NDArray[np.int64]]) -> None:
    pass


"""


def checked(folder: Path, text: str) -> str:
    """What mypy prints of a program; empty where nothing is wrong with it."""
    package = folder / "dirtmap"  # as it is installed; mypy does not see one that is installed to be edited
    package.mkdir(exist_ok=True)
    for room in ("engine", "fmt"):
        if not (package / room).exists():
            (package / room).symlink_to(ROOT / room)
    (folder / "program.py").write_text(text)
    options = ["--strict", "--no-error-summary", "--config-file=", "--follow-imports=silent"]
    command = [sys.executable, "-m", "mypy", *options, "program.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    return done.stdout + done.stderr


def test_examples_are_typed(tmp_path: Path) -> None:
    examples = program("python", *DOCUMENTS)
    assert examples.count("import dirtmap.engine as dm") == len(DOCUMENTS)
    assert checked(tmp_path, PROGRAM + examples) == ""
    # It would have found something.
    assert "error:" in checked(tmp_path, PROGRAM + examples + "\ndm.open(1)\n")
