"""Looks through an index in a process of its own, and begins it anew with the commits of stores that it has seen.

These are the one thing in an index that no container tells: a store that was rolled back is found by them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field

from dirtmap.engine.index.database import Database, fault, replace
from dirtmap.engine.index.index import Index, SeenCommit
from dirtmap.engine.index.trial import ending
from dirtmap.engine.storefile.header import Seen


@dataclass(slots=True)
class Examined:
    """What is in an index.

    Attributes:
        entries: keys in the database.
        faults: what is wrong with them, a line each.
        seen: the last commits seen of stores, as far as they can be read.
    """

    entries: int = 0
    faults: list[str] = field(default_factory=list)
    seen: list[SeenCommit] = field(default_factory=list)


def examine(path: str) -> Examined:
    """Reads the whole index at a path, by `dirtmap.engine.index.walk`.

    Raises:
        StorageError: it is no index, or cannot be looked at.
    """
    if what := fault(path):
        return Examined(faults=[what])
    command = [sys.executable, "-m", "dirtmap.engine.index.walk", path]
    done = subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL)
    lines = done.stdout.splitlines()  # what it has seen first, before it goes on to where it may die
    result = Examined()
    if lines:
        result.seen = [
            SeenCommit(bytes.fromhex(uuid), Seen(generation, bytes.fromhex(commit)), path)
            for uuid, generation, commit, path in json.loads(lines[0])
        ]
    if len(lines) > 1:
        result.entries, result.faults = json.loads(lines[1])
    else:
        result.faults = [ending(done)]
    return result


def renew(path: str, seen: list[SeenCommit]) -> None:
    """Puts an index in the place of the one at a path that knows these commits and nothing else.

    Raises:
        StorageError: it cannot be made, or what is in its place is no index.
    """

    def fill(database: Database) -> None:
        fresh = Index(path, [], database)
        for commit in seen:
            fresh.remember_seen(commit)

    replace(path, fill, even_if_good=True)
