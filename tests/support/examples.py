"""The examples of the documents: console blocks that a shell runs, python blocks, and what they print.

What differs from run to run is allowed for: the folder is ``/srv`` in the documents; ``process 1234`` is any process, a
time any time. A line ``...`` is any lines. A block behind a line ``prints ...`` is what the python blocks print.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from support.cli import COMMAND

FOLDER = "/srv"
ROOT = Path(__file__).parent.parent.parent

# What differs, as it is when it is escaped, and a pattern of all that it can be.
_ANY = {
    r"process\\ \d+": r"process \\d+",
    r"in\\ \d+\\\.\d\\ s": r"in \\d+\\.\\d s",
    r"\d{4}\\-\d\d\\-\d\d\\ \d\d:\d\d:\d\d": r"\\d{4}-\\d\\d-\\d\\d \\d\\d:\\d\\d:\\d\\d",
}


class Step(NamedTuple):
    """A command, where it is in a document, and what it prints."""

    where: str
    shell: str
    expected: str


def blocks(document: Path) -> Iterator[tuple[int, str, list[str]]]:
    """The fenced blocks: the line where each begins; its language, or the word before it; its lines."""
    begin, kind, said, inside = 0, "", "", None
    for number, line in enumerate(document.read_text().splitlines(), 1):
        if not line.startswith("```"):
            if inside is not None:
                inside.append(line)
            said = line or said
        elif inside is None:
            begin, kind, inside = number, line[3:] or re.split(r"\W", said)[0], []
        else:
            yield begin, kind, inside
            inside = None


def commands(document: Path) -> list[Step]:
    """What the console blocks run."""
    found: list[Step] = []
    for begin, kind, lines in blocks(document):
        for number, line in enumerate(lines if kind == "console" else [], begin + 1):
            if line.startswith("$ "):
                found.append(Step(f"{document.name}, line {number}", line[2:], ""))
            elif line.startswith("> "):
                found[-1] = found[-1]._replace(shell=f"{found[-1].shell}\n{line[2:]}")
            else:
                found[-1] = found[-1]._replace(expected=f"{found[-1].expected}{line}\n")
    return found


def program(kind: str, *documents: Path) -> str:
    """The python blocks, in order, or what they print."""
    return "".join(
        f"{line}\n" for document in documents for _, found, lines in blocks(document) if found == kind for line in lines
    )


def pattern(expected: str) -> str:
    """A regular expression of what may be printed."""
    lines = []
    for line in expected.splitlines():
        escaped = re.escape(line)
        for differs, any_of_it in _ANY.items():
            escaped = re.sub(differs, any_of_it, escaped)
        lines.append(r"(?:.*\n)*" if line == "..." else escaped + "\n")
    return "".join(lines)


def _end(pid: Path, mine: str) -> None:
    """Ends the process of that file if it is still there, and has that in its environment."""
    with contextlib.suppress(OSError, ValueError):
        number = int(pid.read_text())
        if mine.encode() in Path(f"/proc/{number}/environ").read_bytes():
            os.kill(number, signal.SIGKILL)


def _waiting(shell: str) -> str:
    """What a person does without thinking of it: waits until a server listens, and until a killed one is gone."""
    if shell.endswith("&"):
        return "for _ in $(seq 1000); do [ -s ready ] && break; sleep 0.01; done"
    if shell.startswith("kill "):
        return "wait; for _ in $(seq 1000); do [ -e /proc/$(cat pid 2>/dev/null)/exe ] && sleep 0.01; done"
    return ""


def run(documents: Sequence[Path], folder: Path, preamble: str) -> list[str]:
    """Runs the commands of documents, and then their python blocks as one program.

    Args:
        documents: read in this order.
        folder: where they run, an empty folder; others are made beside it.
        preamble: what the program has besides.

    Returns:
        for each step that printed something else: where it is, what it printed, and what it should have.
    """
    printed = folder.with_name("printed")
    printed.mkdir()
    text = folder.with_name("program.py")
    text.write_text((preamble + program("python", *documents)).replace(FOLDER, str(folder)))
    steps = [step for document in documents for step in commands(document)]
    steps.append(Step("the python blocks", f"{sys.executable} {text}", program("prints", *documents)))
    script = [f"cd {folder}"]
    for number, step in enumerate(steps):
        script.append(f"{{ {step.shell.replace(FOLDER, str(folder))}\n}} >{printed / str(number)} 2>&1")
        script.append(_waiting(step.shell))
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
        _end(folder / "pid", os.environ["DIRTMAP_LIVE"])
    wrong = []
    for number, step in enumerate(steps):
        said = (printed / str(number)).read_text().replace(str(folder), FOLDER)
        if not re.fullmatch(pattern(step.expected), said):
            wrong.append(f"{step.where}: $ {step.shell}\n{said}instead of\n{step.expected}")
    return wrong
