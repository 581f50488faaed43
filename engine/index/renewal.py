"""Examines an index in a child process, and replaces a damaged index by a new one with the commits seen of stores.

These commits are the only thing in an index that no container tells. A rollback of a store is detected by them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dirtmap.engine.index.database import Database, fault, replace
from dirtmap.engine.index.index import Index, SeenCommit
from dirtmap.engine.index.trial import ending
from dirtmap.engine.model.later import later
from dirtmap.engine.storefile.header import Seen

if TYPE_CHECKING:
    import json
    import subprocess
else:  # hardly ever needed
    later(globals(), json="json", subprocess="subprocess")


@dataclass(slots=True)
class Examined:
    """What is in an index.

    Attributes:
        entries: number of keys in the database.
        faults: what is wrong with them, one line each.
        seen: the last commits seen of stores, as far as they can be read.
    """

    entries: int = 0
    faults: list[str] = field(default_factory=list)
    seen: list[SeenCommit] = field(default_factory=list)


def examine(path: str) -> Examined:
    """Reads the whole index at a path, with `dirtmap.engine.index.walk`.

    Raises:
        StorageError: the path holds anything but an index, or cannot be read.
    """
    if what := fault(path):
        return Examined(faults=[what])
    command = [sys.executable, "-m", "dirtmap.engine.index.walk", path]
    done = subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL)
    lines = done.stdout.splitlines()  # first the commits seen, before it reads what may kill it
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
    """Replaces the index at a path by a new one that has these commits and nothing else.

    Raises:
        StorageError: the index cannot be made, or the path holds anything but an index.
    """

    def fill(database: Database) -> None:
        fresh = Index(path, [], database)
        for commit in seen:
            fresh.remember_seen(commit)

    replace(path, fill, even_if_good=True)
