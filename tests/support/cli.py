"""The `dirtmap` command in this very process, as a user would see it."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from dirtmap.tools.cli import main

# The installed command itself, for what only a process of its own can show.
COMMAND = str(Path(sys.executable).with_name("dirtmap"))

COMMANDS = [
    *("list", "dump", "map", "add", "remove", "clear", "enable", "disable", "rename", "merge", "copy", "move", "mark"),
    *("recover", "check", "find", "hold", "serve", "export", "rebuild", "plot", "transaction", "sidecar", "completion"),
]


@dataclass
class Done:
    """What a run left behind."""

    status: int
    out: str
    error: str


def dirtmap(*arguments: str | os.PathLike[str] | int, status: int = 0, given: bytes | str | None = None) -> Done:
    """Runs the command, which must end with that status; an error must be one line, and nothing else but output.

    Args:
        arguments: the command line.
        status: expected.
        given: standard input.
    """
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], input=given)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == status, result.output
    for line in result.stderr.splitlines():
        assert line.startswith("dirtmap: ")
    return Done(result.exit_code, result.stdout, result.stderr)


def error_of(*arguments: str | os.PathLike[str] | int, given: bytes | str | None = None) -> str:
    """What the command complains about, in one line, without ``dirtmap:``; it prints nothing else."""
    done = dirtmap(*arguments, status=1, given=given)
    assert done.out == ""
    assert done.error.count("\n") == 1
    return done.error.removeprefix("dirtmap: ").rstrip("\n")


def json_of(*arguments: str | os.PathLike[str] | int, status: int = 0) -> Any:
    """What the command prints with --output=json."""
    text = dirtmap(*arguments, "--output=json", status=status).out
    assert text.isascii()
    return json.loads(text)


def listed(path: Path) -> dict[str, dict[str, Any]]:
    """The bitmaps that `dirtmap list` shows, by name."""
    (image,) = json_of("list", path)
    return {bitmap["name"]: bitmap for bitmap in image["bitmaps"]}


def mapped(path: Path, name: str) -> list[tuple[int, int]]:
    """The dirty extents that `dirtmap map` shows."""
    return [(extent["offset"], extent["length"]) for extent in json_of("map", "--dirty", path, name)]
