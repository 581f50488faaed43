"""README's examples do what it shows: its console blocks, then its python blocks, run in order in one folder.

What differs from run to run is allowed for: the folder is ``/srv`` in the README; ``process 1234`` is any process; a
line ``...`` is any lines. A block behind a line ``prints ...`` is what the python block before it prints.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from support.cli import COMMAND

README = Path(__file__).parent.parent.parent / "README.md"
FOLDER = "/srv"

# What an embedding program has besides: its disk, what it writes, and how it copies.
PROGRAM = """
import os

fd, offset, length, data = os.open("logs.raw", os.O_RDWR | os.O_CREAT), 7 << 20, 4096, bytes(4096)
os.truncate(fd, 1 << 30)
offsets, lengths = [8 << 30, 9 << 30], [4096, 1 << 20]


def copy(extents):
    pass


"""


class Step(NamedTuple):
    """A command, where it is in the README, and what it prints."""

    line: int
    shell: str
    expected: str


def blocks() -> Iterator[tuple[int, str, list[str]]]:
    """The fenced blocks: the line where each begins; its language, or the word before it; its lines."""
    begin, kind, said, inside = 0, "", "", None
    for number, line in enumerate(README.read_text().splitlines(), 1):
        if not line.startswith("```"):
            if inside is not None:
                inside.append(line)
            said = line or said
        elif inside is None:
            begin, kind, inside = number, line[3:] or re.split(r"\W", said)[0], []
        else:
            yield begin, kind, inside
            inside = None


def commands() -> list[Step]:
    """What the console blocks run."""
    found: list[Step] = []
    for begin, kind, lines in blocks():
        for number, line in enumerate(lines if kind == "console" else [], begin + 1):
            if line.startswith("$ "):
                found.append(Step(number, line[2:], ""))
            elif line.startswith("> "):
                found[-1] = found[-1]._replace(shell=f"{found[-1].shell}\n{line[2:]}")
            else:
                found[-1] = found[-1]._replace(expected=f"{found[-1].expected}{line}\n")
    return found


def program(kind: str) -> str:
    """The python blocks, in order, or what they print."""
    return "".join(f"{line}\n" for _, found, lines in blocks() if found == kind for line in lines)


def pattern(expected: str) -> str:
    """A regular expression of what may be printed."""
    lines = [re.sub(r"process\\ \d+", r"process \\d+", re.escape(line)) + "\n" for line in expected.splitlines()]
    return "".join(r"(?:.*\n)*" if line == r"\.\.\." + "\n" else line for line in lines)


def end(pid: Path, mine: str) -> None:
    """Ends the process of that file if it is still there, and has that in its environment."""
    with contextlib.suppress(OSError, ValueError):
        number = int(pid.read_text())
        if mine.encode() in Path(f"/proc/{number}/environ").read_bytes():
            os.kill(number, signal.SIGKILL)


def test_examples(tmp_path: Path) -> None:
    assert len(commands()) > 50
    assert program("prints")
    folder, printed = tmp_path / "srv", tmp_path / "printed"
    folder.mkdir()
    printed.mkdir()
    (tmp_path / "program.py").write_text((PROGRAM + program("python")).replace(FOLDER, str(folder)))
    steps = [*commands(), Step(1, f"{sys.executable} {tmp_path / 'program.py'}", program("prints"))]
    script = [f"cd {folder}"]
    for number, step in enumerate(steps):
        script.append(f"{{ {step.shell.replace(FOLDER, str(folder))}\n}} >{printed / str(number)} 2>&1")
        if step.shell.startswith("kill "):  # it takes a moment until the image is free
            script.append("for _ in $(seq 500); do [ -e /proc/$(cat pid)/exe ] && sleep 0.01; done")
    path = f"{Path(COMMAND).parent}:{os.environ['PATH']}"
    try:
        subprocess.run(
            ["bash", "-c", "\n".join(script)],
            env=os.environ | {"PATH": path, "COLUMNS": "80"},
            stdin=subprocess.DEVNULL,
            timeout=120,
            check=False,
        )
    finally:
        end(folder / "pid", os.environ["DIRTMAP_LIVE"])
    wrong = []
    for number, step in enumerate(steps):
        said = (printed / str(number)).read_text().replace(str(folder), FOLDER)
        if not re.fullmatch(pattern(step.expected), said):
            wrong.append(f"README.md, line {step.line}: $ {step.shell}\n{said}instead of\n{step.expected}")
    assert not wrong, "\n".join(wrong)
