"""Checks a qcow2 image's bitmaps and refcounts, and mends what can be mended without guessing.

    layout      every fault that `read_layout` collects is a corruption
    references  a walk of all references; a bitmap that shares a cluster with anything is a corruption
    refcounts   count above references: a leak; below: a corruption

Mending: a commit that drops the bad bitmaps and keeps the others, then refcounts set right: first those too low,
synced, then those too high. Guest data is never touched; what is wrong with it is reported, and left to
``qemu-img check``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from dirtmap.engine import locks
from dirtmap.engine.fileio import File, open_file
from dirtmap.engine.qcow2.commit import Kept, commit, require_writable
from dirtmap.engine.qcow2.image import FORMAT
from dirtmap.engine.qcow2.layout import Layout, bitmap_label, read_layout
from dirtmap.engine.qcow2.refcounts import Refcounts
from dirtmap.engine.qcow2.references import References, walk
from dirtmap.fmt.errors import FormatError

LEAK, CORRUPTION, ERROR, NOTE = "leak", "corruption", "error", "note"
_MOST_FINDINGS = 1000  # of refcounts, as runs of clusters; the totals count all


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found: ``severity`` (``corruption``, ``leak``, ``error``, ``note``), ``where`` and ``what``."""

    severity: str
    where: str
    what: str


@dataclass(slots=True)
class CheckReport:
    """What a check found and mended; counts as ``qemu-img check`` has them, leaks in clusters.

    Attributes:
        path: the image.
        format: ``qcow2``.
        check_errors: parts that could not be checked.
        corruptions, leaks: what is left.
        corruptions_fixed, leaks_fixed: what was mended.
        findings: each with its place, mended or not.
        dropped: names of the bitmaps that mending removed.
    """

    path: str
    format: str = FORMAT
    check_errors: int = 0
    corruptions: int = 0
    leaks: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    findings: list[Finding] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def found(self, severity: str, where: str, what: str, count: int = 1) -> None:
        """Adds a finding and counts it."""
        self.findings.append(Finding(severity, where, what))
        self.count(severity, count)

    def count(self, severity: str, count: int) -> None:
        """Counts without a finding of its own."""
        self.corruptions += count if severity == CORRUPTION else 0
        self.leaks += count if severity == LEAK else 0
        self.check_errors += count if severity == ERROR else 0


def check(
    path: str,
    *,
    repair: str | None = None,
    force_share: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Checks an image, damaged ones included.

    Args:
        path: the image.
        repair: None, ``leaks``, or ``all``, which also drops bitmaps that make QEMU refuse the image.
        force_share: check although another process writes to it; never with ``repair``.
        progress: called with (L2 tables walked, L2 tables in all).

    Raises:
        FormatError: not a qcow2 image at all.
        UnsupportedError: ``repair`` of an image that must not be written to.
        LockedError, StorageError: as for reading, or writing with ``repair``.
    """
    if repair is None:
        with open_file(path) as file, locks.reading(file, force_share=force_share):
            return _Check(file, progress).run()
    with open_file(path, writable=True) as file, locks.writing(file):
        return _mend(file, repair, progress)


class _Check:
    """One pass over an image: what is wrong, and what of it is whose."""

    def __init__(self, file: File, progress: Callable[[int, int], None] | None) -> None:
        self.file, self.progress = file, progress
        self.report = CheckReport(file.path)
        self.layout = read_layout(file)
        self.bad = {fault.bitmap for fault in self.layout.faults if fault.bitmap is not None}
        self.references: References | None = None
        # Cluster numbers and the count each should have.
        self.too_high: list[tuple[int, int]] = []
        self.too_low: list[tuple[int, int]] = []

    def run(self) -> CheckReport:
        layout, report = self.layout, self.report
        if any(fault.field == "header.magic" for fault in layout.faults):
            layout.require_sound()
        for fault in layout.faults:
            report.found(CORRUPTION, fault.field, fault.what)
        if layout.chain is None or layout.chain.fault:
            report.found(ERROR, "references", "not checked: the header cannot be relied on")
            return report
        if layout.undecided:
            report.found(NOTE, "bitmap directory", "bitmaps behind the broken entry cannot be read")
        for slot in layout.slots:
            if slot.entry.in_use:
                report.found(NOTE, bitmap_label(slot.entry.name), "inconsistent: left in use; recover or remove it")
        if layout.extension and not layout.valid:
            report.found(NOTE, "bitmaps extension", "void: its autoclear bit is clear; QEMU will drop it")
        try:
            self.references = walk(self.file, layout, progress=self.progress)
            assert self.references is not None  # only a budget makes it None
            for fault in self.references.faults:
                report.found(CORRUPTION, fault.field, fault.what)
            self._shared(self.references)
            self._refcounts(self.references)
        except FormatError as error:
            report.found(ERROR, error.where.removeprefix(f"{layout.path}: "), error.what)
            self.references = None
        return report

    def _shared(self, references: References) -> None:
        """Bitmaps that share a cluster with anything; overlaps among themselves the layout has found already."""
        layout = self.layout
        for index, slot in enumerate(layout.slots):
            numbers = np.array(sorted(_clusters_of(layout, index)), np.int64)
            shared = numbers[references.of(numbers) > 1]
            if len(shared) and index not in self.bad:
                self.bad.add(index)
                what = f"cluster {int(shared[0]) * layout.cluster_size:#x} is also used by something else"
                self.report.found(CORRUPTION, bitmap_label(slot.entry.name), what)

    def _refcounts(self, references: References) -> None:
        refcounts = Refcounts(self.file, self.layout.header)
        for first, actual, expected in _compare(refcounts, references):
            for position in np.flatnonzero(actual != expected).tolist():
                pair = (first + position, int(expected[position]))
                (self.too_high if actual[position] > expected[position] else self.too_low).append(pair)
            for severity, wrong in ((LEAK, actual > expected), (CORRUPTION, actual < expected)):
                self._report_runs(severity, first, wrong, actual, expected)

    def _report_runs(self, severity: str, first: int, wrong, actual, expected) -> None:  # type: ignore[no-untyped-def]
        at = np.flatnonzero(wrong)
        if not len(at):
            return
        # Neighbours with the same counts are one finding.
        same = (np.diff(at) == 1) & (np.diff(actual[at]) == 0) & (np.diff(expected[at]) == 0)
        for run in np.split(at, np.flatnonzero(~same) + 1):
            cluster = self.layout.cluster_size
            start, end = (first + int(run[0])) * cluster, (first + int(run[-1]) + 1) * cluster
            what = f"refcount {int(actual[run[0]])}, referenced {int(expected[run[0]])} times"
            if len(self.report.findings) < _MOST_FINDINGS:
                self.report.found(severity, f"clusters {start:#x}..{end:#x}", what, len(run))
            else:
                self.report.count(severity, len(run))


def _clusters_of(layout: Layout, bitmap: int) -> Iterator[int]:
    for region in layout.regions():
        if region.bitmap == bitmap:
            last = (region.offset + region.length - 1) // layout.cluster_size
            yield from range(region.offset // layout.cluster_size, last + 1)


def _compare(refcounts: Refcounts, references: References):  # type: ignore[no-untyped-def]
    """Block by block: the first cluster's number, counts as stored, counts as they should be (both int64)."""
    blocks = set(np.flatnonzero(refcounts.table).tolist())
    blocks |= set(np.unique(references.numbers // refcounts.per_block).tolist())
    for index in sorted(blocks):
        first = index * refcounts.per_block
        stored = refcounts.block(index)
        actual = np.zeros(refcounts.per_block, np.int64) if stored is None else stored.astype(np.int64)
        expected = np.zeros(refcounts.per_block, np.int64)
        start, end = np.searchsorted(references.numbers, (first, first + refcounts.per_block))
        expected[references.numbers[start:end] - first] = references.counts[start:end]
        yield first, actual, expected


def _mend(file: File, repair: str, progress: Callable[[int, int], None] | None) -> CheckReport:
    before = _Check(file, progress)
    before.run()
    if not (before.report.corruptions or before.report.leaks):
        return before.report
    require_writable(before.layout)
    dropped = _drop_bad(file, before) if repair == "all" else []
    between = _Check(file, None)
    between.run()
    _set_right(file, between, low=repair == "all")
    after = _Check(file, None)
    after.run()
    report = before.report
    left = after.report
    report.corruptions_fixed = max(0, report.corruptions - left.corruptions)
    report.leaks_fixed = max(0, max(report.leaks, between.report.leaks) - left.leaks)
    report.corruptions, report.leaks, report.check_errors = left.corruptions, left.leaks, left.check_errors
    report.dropped = dropped
    return report


def _drop_bad(file: File, found: _Check) -> list[str]:
    """One commit that keeps the good bitmaps; what only the bad ones used becomes a leak, which `_set_right` frees."""
    layout = found.layout
    if layout.chain is None or layout.chain.fault or _ambiguous(layout) or not (layout.faults or found.bad):
        return []
    names = [layout.slots[index].entry.name for index in sorted(found.bad)]
    layout.slots = [slot for index, slot in enumerate(layout.slots) if index not in found.bad]
    # Nothing that the old directory says about its clusters is to be believed here, so the commit frees none of them.
    layout.faults, layout.pointer = [], None
    references = found.references or References.unknown("the walk failed")
    commit(file, layout, [Kept(slot.entry) for slot in layout.slots], references=references)
    return [name.decode("utf-8", "backslashreplace") for name in names]


def _ambiguous(layout: Layout) -> bool:
    """Two bitmaps extensions: which of them was meant cannot be known, so neither is dropped."""
    return any("appears twice" in fault.what for fault in layout.faults)


def _set_right(file: File, found: _Check, *, low: bool) -> None:
    """Writes the refcounts that a complete walk has proven: too low ones first, durable before any is lowered."""
    if found.references is None or found.references.faults or found.layout.faults:
        return
    for wrong in (found.too_low if low else [], found.too_high):
        refcounts = Refcounts(file, found.layout.header)
        for cluster, count in wrong:
            if refcounts.block(cluster // refcounts.per_block) is not None and count <= refcounts.maximum:
                refcounts.set(cluster, count)
        writes = refcounts.changes()
        for offset, data in writes:
            file.write(offset, data)
        if writes:
            file.sync()
