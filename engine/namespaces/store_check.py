"""Checks a whole store: header copies, checksums, names, sizes, overlaps and free space. Repairs it by compaction.

marked in the space map, in use or released     right
marked, and neither                             a leak
in use, and not marked                          a corruption: the next commit could overwrite it
used twice                                      a corruption
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from dirtmap.engine.model.naming import decode_name, label
from dirtmap.engine.model.report import CORRUPTION, ERROR, LEAK, MOST_FINDINGS, NOTE, CheckReport, require_repair
from dirtmap.engine.namespaces.compact import compact
from dirtmap.engine.namespaces.condition import Condition
from dirtmap.engine.storefile import chunks
from dirtmap.engine.storefile import header as headers
from dirtmap.engine.storefile.entries import tree_of
from dirtmap.engine.storefile.file import FORMAT, Snapshot, Store
from dirtmap.engine.storefile.place import is_elsewhere
from dirtmap.engine.storefile.session import require_known
from dirtmap.engine.storefile.space import SpaceMap
from dirtmap.engine.storefile.table import DamagedNodeError, Node
from dirtmap.engine.system.locks import USUAL, Locking
from dirtmap.fmt import geometry, store
from dirtmap.fmt.errors import Error, FormatError, UnsupportedError
from dirtmap.fmt.store import Area, Record

if TYPE_CHECKING:
    from numpy.typing import NDArray

Progress = Callable[[int, int], None]

_PIECE = 1 << 20  # clusters that are compared at a time


def check(
    path: str,
    *,
    repair: str | None = None,
    progress: Progress | None = None,
    expect: Callable[[Store], object] = lambda target: None,
    locking: Locking = USUAL,
) -> CheckReport:
    """Checks a store, and repairs it if asked to.

    Args:
        path: the store.
        repair: None, ``leaks`` or ``all``: rewrites the store from all that can be read. ``leaks`` does so only if
            nothing is lost.
        progress: called with (namespaces checked, namespaces in all).
        expect: compares the store with what was last seen of it; see `Store.expect`.
        locking: how to take the lock of the store for a repair.

    Raises:
        ArgumentError: ``repair`` is something else.
        FormatError: the file is not a store.
        LockedError, StorageError: as for reading; with ``repair``, as for writing.
    """
    require_repair(path, repair)
    try:
        target = Store(path)
    except FormatError as error:
        if error.where == f"{path}: header.magic":
            raise
        return _without_header(path, error)
    with target:
        expect(target)
        report = target.read(lambda snapshot: _Check(snapshot, progress).run())
    wrong = report.corruptions or report.leaks
    if not wrong or repair is None or (repair == "leaks" and report.corruptions):
        return report
    compaction = compact(path, repair=repair == "all", expect=expect, locking=locking)
    with Store(path) as target:
        after = target.read(lambda snapshot: _Check(snapshot, None).run())
    report.corruptions_fixed, report.leaks_fixed = report.corruptions - after.corruptions, report.leaks - after.leaks
    report.corruptions, report.leaks, report.check_errors = after.corruptions, after.leaks, after.check_errors
    report.dropped, report.made_dirty = compaction.dropped, compaction.made_dirty
    return report


def _without_header(path: str, error: FormatError) -> CheckReport:
    report = CheckReport(path, FORMAT)
    report.found(CORRUPTION, error.where.removeprefix(f"{path}: "), error.what)
    report.found(ERROR, "namespaces", "not checked: the header cannot be relied on")
    return report


class _Check:
    """One check of a store. Areas are numbered in the order in which they are met, and kept without their names.

    Args:
        snapshot: of the store.
        progress: as in `check`.
        asked: the numbers of areas whose names are asked for: see `names`.
    """

    def __init__(self, snapshot: Snapshot, progress: Progress | None, asked: frozenset[int] = frozenset()) -> None:
        self.snapshot, self.progress, self.asked = snapshot, progress, asked
        self.cluster = snapshot.header.cluster_size
        self.report = CheckReport(snapshot.file.path, FORMAT)
        self.used = array("q")  # of each area the number of its first cluster, and of that behind its last
        self.names: dict[int, str] = {}  # by number, of those asked for
        self.shown = 0  # number of runs of clusters reported
        self.doubted = 0  # number of namespaces in doubt

    def run(self) -> CheckReport:
        self.headers()
        header = self.snapshot.header
        self.clusters(range(geometry.ceil_div(store.RESERVED, self.cluster)), "the headers")
        self.area(header.space, "space map")
        self.area(header.released, "released clusters")
        complete = self.namespaces()
        self.space(complete=complete)
        return self.report

    def namespaces(self) -> bool:
        """Checks the table and all namespaces. False if what they use is not known."""
        table, faults = self.snapshot.table(), 0

        def fail(error: FormatError) -> None:
            nonlocal faults
            self.wrong(error)
            faults += not (isinstance(error, DamagedNodeError) and error.hides_nothing)

        def seen(node: Node) -> None:
            self.area(node.area, node.what)

        complete, sessions = True, 0
        for count, record in enumerate(table.readable(fail, seen), 1):
            complete &= self.namespace(record)
            self.snapshot.settle_claims()
            sessions += record.tracked
            if self.progress:
                self.progress(count, max(count, self.snapshot.header.namespaces))
        if (more := self.doubted - MOST_FINDINGS) > 0:
            self.report.found(NOTE, "namespaces", f"{more} more count as all dirty")
        complete = complete and not faults
        if complete and sessions != (said := self.snapshot.header.sessions):
            self.report.found(CORRUPTION, "header.sessions", f"{said}, but there are {sessions}")
        return complete

    def wrong(self, error: Error) -> None:
        self.report.found(CORRUPTION, error.where.removeprefix(f"{self.snapshot.file.path}: "), error.what)

    def headers(self) -> None:
        data = self.snapshot.file.read(0, store.RESERVED)
        for slot, copies in zip("AB", store.COPIES, strict=True):
            bad = [n for n in copies if not headers.is_whole(data[n * store.BLOCK : (n + 1) * store.BLOCK], n)]
            for number in bad:
                # A crash during a commit can damage one copy, never both.
                severity = NOTE if len(bad) == 1 else CORRUPTION
                what = "damaged; " + ("the next commit mends it" if len(bad) == 1 else "the other slot stands in")
                self.report.found(severity, f"header copy {number} (slot {slot})", what)
        if is_elsewhere(self.snapshot.header.place, self.snapshot.file):
            what = "not where its last commit was written: a copy, or put back from one"
            self.report.found(NOTE, "place extension", what)
        if self.snapshot.chosen.in_doubt:
            self.report.found(NOTE, "header", "perhaps not the newest: every bitmap counts as all dirty")

    def area(self, area: Area, what: str) -> None:
        if area.length:
            self.clusters(area.clusters(self.cluster), what)

    def clusters(self, numbers: range, what: str) -> None:
        """Notes the clusters of an area."""
        if (number := len(self.used) // 2) in self.asked:
            self.names[number] = what
        self.used.extend((numbers.start, numbers.stop))

    def namespace(self, record: Record) -> bool:
        """Checks one namespace. False if what it uses is not known."""
        where = record.label
        self.area(record.directory, f"directory of {where}")
        try:
            require_known(self.snapshot.file.path, record)
        except UnsupportedError as error:
            self.report.found(ERROR, where, error.what)
            return False
        now = Condition(self.snapshot, record)
        if doubt := now.doubt:
            self.doubted += 1
            if self.doubted <= MOST_FINDINGS:  # there can be millions
                self.report.found(NOTE, where, f"counts as all dirty: {doubt}")
        try:
            entries = now.entries
        except (FormatError, UnsupportedError) as error:
            self.wrong(error)
            return False
        complete = True
        for entry in entries:
            bitmap = f"{where}, {label(decode_name(entry.name))}"
            if entry.in_use:
                self.report.found(NOTE, bitmap, "inconsistent")
            if entry.table_offset > store.ALL_ONES:
                found = chunks.verify(self.snapshot, tree_of(record, entry))
                for area in chunks.clusters(found):
                    self.area(area, f"bits of {bitmap}")
                if damage := found.told():
                    self.report.found(CORRUPTION, bitmap, damage)
                complete &= not found.lost_nodes
        return complete

    def space(self, *, complete: bool) -> None:
        """Compares the space map with the clusters that are used."""
        header = self.snapshot.header
        try:
            root = self.snapshot.read(header.space, "space map")
            released = self.snapshot.released()
            read = self.snapshot.read
            space = SpaceMap(self.snapshot.file.path, self.cluster, header.clusters, root, released, read)
        except FormatError as error:
            self.wrong(error)
            return
        for index, place in enumerate(space.places):
            self.area(place, f"space map leaf {index}")
        used = self.in_use()
        for first, count in released:
            self.clusters(range(first, first + count), "released clusters")
        if self.asked:
            return
        kept = self.in_use()
        self.overlaps()
        for index in range(len(space.places)):
            try:
                raw = space.read_leaf(index).to_bytes(self.cluster, "little")
            except FormatError as error:
                self.wrong(error)
                continue
            for at in range(0, len(raw), _PIECE // 8):
                piece, left = np.frombuffer(raw[at : at + _PIECE // 8], np.uint8), max(0, space.per_leaf - at * 8)
                bits = np.unpackbits(piece, bitorder="little", count=min(8 * len(piece), left))
                marked, first = bits.view(np.bool_), index * space.per_leaf + at * 8
                self.runs(CORRUPTION, _part(used, first, len(marked)) & ~marked, first, "in use, but marked as free")
                if complete:
                    leaked = marked & ~_part(kept, first, len(marked))
                    self.runs(LEAK, leaked, first, "marked as used, but nothing uses them")

    def in_use(self) -> NDArray[np.int64]:
        """The clusters used, as runs: int64, shape (n, 2), first and end, ascending and disjoint."""
        areas = np.frombuffer(self.used, np.int64).reshape(-1, 2)
        areas = areas[np.argsort(areas[:, 0], kind="stable")]
        ends = np.maximum.accumulate(areas[:, 1])
        firsts = np.flatnonzero(np.concatenate(([True], areas[1:, 0] > ends[:-1])))
        lasts = np.append(firsts[1:], len(areas)) - 1
        return np.stack((areas[firsts, 0], ends[lasts]), axis=1)

    def overlaps(self) -> None:
        """Reports areas that begin inside another one, or end behind the last cluster."""
        areas = np.frombuffer(self.used, np.int64).reshape(-1, 2)
        order = np.argsort(areas[:, 0], kind="stable")
        areas = areas[order]
        ends = np.maximum.accumulate(areas[:, 1])
        inside = np.concatenate(([False], areas[1:, 0] < ends[:-1]))
        behind = areas[:, 1] > self.snapshot.header.clusters
        if not (wrong := np.flatnonzero(inside | behind)).size:
            return
        # Their names are found by a second look at all: sound stores are spared them.
        numbers = order[np.concatenate((wrong, wrong[wrong > 0] - 1))]
        again = _Check(Snapshot(self.snapshot.file, self.snapshot.chosen), None, frozenset(numbers.tolist()))
        again.run()
        for at in wrong.tolist():
            other, name = (again.names.get(int(order[number]), "an area") for number in (at - 1, at))
            what = f"overlaps {other}"
            what = "ends behind the last cluster" if behind[at] else what
            start = int(areas[at, 0]) * self.cluster
            self.report.found(CORRUPTION, name, f"at {start:#x}: {what}")

    def runs(self, severity: str, wrong: NDArray[np.bool_], start: int, what: str) -> None:
        edges = np.flatnonzero(np.diff(wrong, prepend=False, append=False)).reshape(-1, 2)
        shown = edges[: MOST_FINDINGS - self.shown]
        self.shown += len(shown)
        for first, end in ((shown + start) * self.cluster).tolist():
            self.report.found(severity, f"clusters {first:#x}..{end:#x}", what, (end - first) // self.cluster)
        self.report.count(severity, int(np.count_nonzero(wrong)) - int((shown[:, 1] - shown[:, 0]).sum()))


def _part(runs: NDArray[np.int64], first: int, count: int) -> NDArray[np.bool_]:
    """Which of ``count`` clusters from ``first`` on lie in the runs: bool, shape (count,)."""
    found = np.zeros(count, np.bool_)
    for start, stop in runs[np.searchsorted(runs[:, 1], first, "right") : np.searchsorted(runs[:, 0], first + count)]:
        found[max(start - first, 0) : stop - first] = True
    return found
