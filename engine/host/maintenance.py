"""Maintenance of a host's index: verifies it, rebuilds it, and counts what is in it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from dirtmap.engine.host.host import Host
from dirtmap.engine.host.stores import Stores
from dirtmap.engine.index.database import Database, replace
from dirtmap.engine.index.index import Index
from dirtmap.engine.index.renewal import examine, renew
from dirtmap.engine.model.naming import decode_name
from dirtmap.fmt import index as layout
from dirtmap.fmt.directory import FLAG_AUTO, FLAG_IN_USE
from dirtmap.fmt.errors import StorageError
from dirtmap.fmt.index import Claim, Member
from dirtmap.fmt.parsers.index import CONTAINER_VALUE
from dirtmap.fmt.store import KIND_CONTAINER, KIND_DEVICE

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Verification:
    """What `verify` found.

    Attributes:
        entries: number of keys in the database.
        faults: what was wrong, one line each.
        rebuilt: whether the index was rebuilt, so that nothing is wrong with it any more.
    """

    entries: int = 0
    faults: list[str] = field(default_factory=list)
    rebuilt: bool = False


def verify(host: Host, progress: Progress | None = None) -> Verification:
    """Reads a whole index in a child process, compares it with the containers, and rebuilds it if it is wrong.

    Args:
        host: the host of the index.
        progress: of reading the containers; called with (done, in all).

    Raises:
        StorageError: there is no index or no default store, or the index cannot be rebuilt.
    """
    stores = host._parts.stores
    path = stores.index.path
    _require_default_store(stores)
    if not os.path.lexists(path):
        raise StorageError(path, "there is no index; 'index scan' or the first use of a name makes one")
    stores.require_trusted_index()
    result = Verification()
    examined = examine(path)
    result.entries, result.faults = examined.entries, examined.faults
    if not result.faults:
        stores.index.require()
        stores.refresh()
        result.faults = _differences(stores, progress)
    if result.faults:
        rebuild(host, progress)
        result.rebuilt = True
    return result


def _require_default_store(stores: Stores) -> None:
    """Refuses to work without a default store: a rebuild would then lose all that the index knows."""
    if not os.path.exists(stores.store):
        raise StorageError(stores.store, "there is no default store to compare with; 'index scan' makes one")


def _differences(stores: Stores, progress: Progress | None) -> list[str]:
    """The differences between the index and a new one that is made from the containers now."""
    with contextlib.ExitStack() as stack:
        folder = tempfile.mkdtemp(prefix="dirtmap-index-")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        database = Database(folder)
        stack.callback(database.close)
        fresh = Index(folder, stores.index.readers, database)
        _fill(stores, fresh, progress)
        before, after = _contents(stores.index, stores), _contents(fresh, stores)
    missing, surplus = after - before, before - after
    told = [f"says nothing of {what}" for what in missing] + [f"says what is not so: {what}" for what in surplus]
    return sorted(told)[:20]


def _contents(index: Index, stores: Stores) -> Counter[str]:
    paths = set(stores.containers())
    found: Counter[str] = Counter()
    for path in paths:
        container = index.container(path)
        if container is None:
            continue
        for member in index.members(container.number):
            found[f"{_what(member)} of {path}"] += 1
    for holder, name, claim in index.all_bitmaps():
        if index.path_of(claim.container) in paths:
            found[f"bitmap '{decode_name(name)}' of {_holder(holder)} in {_claimed(index, claim)}"] += 1
    return found


def _what(member: Member) -> str:
    """Describes a namespace, for a line about it."""
    if not member.name:
        return "an image without a name"
    if member.kind == KIND_CONTAINER:
        return f"the place of {os.fsdecode(member.path)}"
    return f"{'device' if member.kind == KIND_DEVICE else 'node'} '{decode_name(member.name)}'"


def _holder(holder: bytes) -> str:
    """Describes the holder of a bitmap, for a line about it."""
    return f"'{decode_name(holder[1:])}'" if holder[:1] == layout.NAMED else "an image without a name"


def _claimed(index: Index, claim: Claim) -> str:
    """Describes a claim to a bitmap: the container that makes it, and the bitmap's properties."""
    says = [
        f"granularity {1 << claim.granularity_bits}",
        *["recording"] * bool(claim.flags & FLAG_AUTO),
        *["in use"] * bool(claim.flags & FLAG_IN_USE),
        *[f"namespace {uuid.UUID(bytes=claim.uuid)}"] * any(claim.uuid),
    ]
    return f"{index.path_of(claim.container)}: {', '.join(says)}"


def rebuild(host: Host, progress: Progress | None = None) -> int:
    """Rebuilds the index from the containers that the default store knows, beside the old one, and replaces that.

    Keeps the last commits seen of stores, if the old index can be read.

    Returns:
        The number of containers.

    Raises:
        StorageError: the index cannot be written, or there is no default store.
    """
    stores = host._parts.stores
    _require_default_store(stores)
    stores.require_trusted_index()
    if os.path.lexists(stores.index.path) and (examined := examine(stores.index.path)).faults:
        renew(stores.index.path, examined.seen)  # before this process maps a database that could kill it
    if os.path.lexists(stores.index.path):
        stores.index.require()
    stores.stores()  # detects rollbacks, while the old index still has the commits seen
    seen = stores.index.all_seen()
    count = 0

    def fill(database: Database) -> None:
        nonlocal count
        fresh = Index(stores.index.path, stores.index.readers, database)
        count = _fill(stores, fresh, progress)
        for commit in seen:
            fresh.remember_seen(commit)

    replace(stores.index.path, fill, even_if_good=True)
    return count


def _fill(stores: Stores, fresh: Index, progress: Progress | None) -> int:
    paths = stores.containers()
    for done, _ in enumerate(fresh.refresh(paths)):
        if progress:
            progress(done, len(paths))
    if progress:
        progress(len(paths), len(paths))
    return len(paths)


def stats(host: Host) -> dict[str, int]:
    """Statistics of the index: numbers of entries by kind, and LMDB's own numbers. Sizes are in bytes.

    Raises:
        StorageError: there is no index.
    """
    stores = host._parts.stores
    if not os.path.isdir(stores.index.path):
        raise StorageError(stores.index.path, "there is no index; 'index scan' or the first use of a name makes one")
    stores.require_trusted_index()
    stores.index.require()
    database = stores.index.database

    def count(tag: bytes) -> int:
        return database.read(lambda reader: sum(1 for _ in reader.scan(tag)))

    conditions = Counter(
        CONTAINER_VALUE.parse(value).condition
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
