"""Verifies an index, makes it anew, and tells what is in it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from dirtmap.engine.host import Host
from dirtmap.engine.index.database import Database, fault, replace
from dirtmap.engine.index.index import Index
from dirtmap.fmt import index as layout
from dirtmap.fmt.errors import StorageError

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Verification:
    """What `verify` found.

    Attributes:
        entries: keys in the database.
        faults: what was wrong, a line each.
        rebuilt: the index was made anew, so that nothing is wrong with it any more.
    """

    entries: int = 0
    faults: list[str] = field(default_factory=list)
    rebuilt: bool = False


def verify(host: Host, progress: Progress | None = None) -> Verification:
    """Reads a whole index in a process of its own, holds it against the containers, and rebuilds it where it is wrong.

    Args:
        host: whose index.
        progress: of reading the containers; called with (done, in all).

    Raises:
        StorageError: there is no index, or it cannot be made anew.
    """
    path = host.index.path
    if not os.path.lexists(path):
        raise StorageError(path, "there is no index; 'index scan' or the first use of a name makes one")
    result = Verification()
    if what := fault(path):
        result.faults.append(what)
    else:
        result.entries, result.faults = _walked(path)
    if not result.faults:
        host.refresh()
        result.faults = _differences(host, progress)
    if result.faults:
        rebuild(host, progress)
        result.rebuilt = True
    return result


def _walked(path: str) -> tuple[int, list[str]]:
    command = [sys.executable, "-m", "dirtmap.engine.index.walk", path]
    done = subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL)
    try:
        answer = json.loads(done.stdout)
        return answer["entries"], answer["faults"]
    except ValueError:
        if done.returncode < 0:
            return 0, [f"reading it ended with {signal.Signals(-done.returncode).name}"]
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        return 0, [f"reading it failed: {lines[-1] if lines else done.returncode}"]


def _differences(host: Host, progress: Progress | None) -> list[str]:
    """How the index differs from one that is made from the containers now."""
    with contextlib.ExitStack() as stack:
        folder = tempfile.mkdtemp(prefix="dirtmap-index-")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        database = Database(folder)
        stack.callback(database.close)
        fresh = Index(folder, database)
        _fill(host, fresh, progress)
        before, after = _contents(host.index, host), _contents(fresh, host)
    missing, surplus = after - before, before - after
    told = [f"says nothing of {what}" for what in missing] + [f"says what is not so: {what}" for what in surplus]
    return sorted(told)[:20]


def _contents(index: Index, host: Host) -> Counter[str]:
    paths = set(host.containers())
    found: Counter[str] = Counter()
    for path in paths:
        container = index.container(path)
        if container is None:
            continue
        for member in index.members(container.number):
            found[f"namespace {member.name!r} of {path}"] += 1
    for holder, name, claim in index.all_bitmaps():
        if index.path_of(claim.container) in paths:
            found[f"bitmap {name!r} of {holder!r} in {index.path_of(claim.container)}, {claim[1:]}"] += 1
    return found


def rebuild(host: Host, progress: Progress | None = None) -> int:
    """Makes the index anew from the containers that the default store knows, beside the old one, and replaces that.

    The last commits seen of stores are taken over, where the old one can be read.

    Returns:
        How many containers there are.

    Raises:
        StorageError: it cannot be written.
    """
    seen = []
    with contextlib.suppress(StorageError, ValueError):
        if os.path.isdir(host.index.path) and fault(host.index.path) is None and not _walked(host.index.path)[1]:
            seen = host.index.all_seen()
    count = 0

    def fill(database: Database) -> None:
        nonlocal count
        fresh = Index(host.index.path, database)
        count = _fill(host, fresh, progress)
        for store_uuid, generation, commit_id, path in seen:
            known = fresh.seen(store_uuid)
            if path is not None and (known is None or known[0] < generation):
                fresh.remember_seen(store_uuid, generation, commit_id, path)

    if fault(host.index.path) is not None:
        replace(host.index.path)
    host.stores()  # so that a rollback is found while the old index still knows
    replace(host.index.path, fill, even_if_good=True)
    return count


def _fill(host: Host, fresh: Index, progress: Progress | None) -> int:
    paths = host.containers()
    for done, _ in enumerate(fresh.refresh(paths)):
        if progress:
            progress(done, len(paths))
    if progress:
        progress(len(paths), len(paths))
    return len(paths)


def stats(host: Host) -> dict[str, int]:
    """How much is in the index: entries by kind, and LMDB's own numbers; sizes in bytes.

    Raises:
        StorageError: there is no index.
    """
    if not os.path.isdir(host.index.path):
        raise StorageError(host.index.path, "there is no index; 'index scan' or the first use of a name makes one")
    database = host.index.database

    def count(tag: bytes) -> int:
        return database.read(lambda reader: sum(1 for _ in reader.scan(tag)))

    conditions = Counter(
        layout.CONTAINER_VALUE.parse(value).condition
        for _, value in database.read(lambda reader: list(reader.scan(layout.CONTAINER)))
    )
    return {
        "containers": sum(conditions.values()),
        **{name: conditions[condition] for condition, name in layout.CONDITION_NAMES.items()},
        "names": count(layout.NAME),
        "uuids": count(layout.UUID),
        "bitmaps": count(layout.BITMAP),
        **database.info(),
    }
