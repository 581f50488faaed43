"""Checks a qcow2 image's bitmaps and refcounts, and mends what can be mended without guessing.

    layout      every fault that `read_layout` collects is a corruption
    references  a walk of all references; a bitmap that shares a cluster with anything is a corruption
    refcounts   count above references: a leak; below: a corruption

Mending: a commit that drops the bad bitmaps and keeps the others, then refcounts set right. Guest data is never
touched; what is wrong with it is reported, and left to ``qemu-img check``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from dirtmap.engine.model.bitmap import INCONSISTENT
from dirtmap.engine.model.report import CORRUPTION, ERROR, LEAK, MOST_FINDINGS, NOTE, CheckReport, require_repair
from dirtmap.engine.qcow2.commit import Kept, commit, marks, require_writable, set_refcounts
from dirtmap.engine.qcow2.layout import Layout, bitmap_label, read_layout
from dirtmap.engine.qcow2.reading import FORMAT
from dirtmap.engine.qcow2.refcounts import Refcounts
from dirtmap.engine.qcow2.references import References, Runs, walk
from dirtmap.engine.system import locks
from dirtmap.engine.system.file import File, open_file
from dirtmap.engine.system.locks import USUAL, Locking
from dirtmap.fmt.directory import MAX_BITMAPS
from dirtmap.fmt.errors import FormatError, counted
from dirtmap.fmt.geometry import ceil_div
from dirtmap.fmt.structures.qcow2 import BITMAPS_EXTENSION

if TYPE_CHECKING:
    from numpy.typing import NDArray


def check(
    path: str,
    *,
    repair: str | None = None,
    force_share: bool = False,
    progress: Callable[[int, int], None] | None = None,
    locking: Locking = USUAL,
) -> CheckReport:
    """Checks an image, damaged ones included.

    Args:
        path: the image.
        repair: None, ``leaks``, or ``all``, which also drops bitmaps that make QEMU refuse the image; not of one that
            is tracked.
        force_share: check although another process writes to it; never with ``repair``.
        progress: called with (L2 tables walked, L2 tables in all).
        locking: how to take the locks.

    Raises:
        ArgumentError: ``repair`` is something else.
        FormatError: not a qcow2 image at all.
        UnsupportedError: ``repair`` of an image that must not be written to.
        LockedError, StorageError: as for reading, or writing with ``repair``.
    """
    require_repair(path, repair)
    if repair is None:
        with open_file(path) as file, locks.reading(file, force_share=force_share, locking=locking):
            return _Check(file, progress).run().report
    with open_file(path, writable=True) as file, locks.writing(file, locking=locking):
        return _mend(file, repair, progress)


def free_leaks(file: File) -> None:
    """Gives up the clusters that nothing refers to, where all of an image can be walked and is sound.

    Args:
        file: open for writing, by nobody else.

    Raises:
        StorageError: it could not be read or written.
    """
    found = _Check(file, None).run()
    if found.report.leaks and not found.report.corruptions:
        _set_right(file, found, np.greater)


class _Check:
    """One pass over an image: what is wrong, and what of it is whose."""

    def __init__(self, file: File, progress: Callable[[int, int], None] | None) -> None:
        self.file, self.progress = file, progress
        self.report = CheckReport(file.path, FORMAT)
        self.layout = read_layout(file)
        self.bad = {fault.bitmap for fault in self.layout.faults if fault.bitmap is not None}
        self.references: References | None = None

    def run(self) -> _Check:
        layout, report = self.layout, self.report
        if any(fault.field == "header.magic" for fault in layout.faults):
            layout.require_sound()
        for fault in layout.faults:
            report.found(CORRUPTION, fault.field, fault.what)
        if any(fault.field.startswith("header") for fault in layout.faults):
            report.found(ERROR, "references", "not checked: the header cannot be relied on")
            return self
        for what in marks(layout):
            report.found(NOTE, "header.incompatible_features", f"{what}; until then every change is refused")
        if layout.undecided:
            report.found(NOTE, "bitmap directory", "bitmaps behind the broken entry cannot be read")
        for slot in layout.slots:
            if slot.entry.in_use:
                what = INCONSISTENT
                if layout.tracked:
                    what = "checked out by a tracker: 'track status' tells which; if it has died, 'recover' checks in"
                report.found(NOTE, bitmap_label(slot.entry.name), what)
        if layout.extension and not layout.valid:
            report.found(NOTE, "bitmaps extension", "void: its autoclear bit is clear; QEMU will drop it")
        try:
            references = walk(self.file, layout, progress=self.progress)
            for fault in references.faults:
                report.found(CORRUPTION, fault.field, fault.what)
            self._shared(references.runs)
            self._refcounts(references.runs)
            self.references = references
        except FormatError as error:
            report.found(ERROR, error.where.removeprefix(f"{layout.path}: "), error.what)
        return self

    def _shared(self, runs: Runs) -> None:
        """Bitmaps that share a cluster with anything; overlaps among themselves the layout has found already."""
        cluster = self.layout.cluster_size
        regions = [region for region in self.layout.regions() if region.bitmap is not None]
        starts = np.array([region.offset // cluster for region in regions], np.int64)
        ends = np.array([ceil_div(region.offset + region.length, cluster) for region in regions], np.int64)
        for at in np.flatnonzero(runs.most(starts, ends) > 1).tolist():
            bitmap = regions[at].bitmap
            if bitmap is not None and bitmap not in self.bad:
                self.bad.add(bitmap)
                label = bitmap_label(self.layout.slots[bitmap].entry.name)
                what = f"{regions[at].what} at {regions[at].offset:#x} shares clusters with something else"
                self.report.found(CORRUPTION, label, what)

    def _refcounts(self, runs: Runs) -> None:
        behind = 0
        for first, stored in Refcounts(self.file, self.layout.header).pieces():
            self._uncounted(runs, behind, first)
            behind = first + len(stored)
            actual, expected = stored.astype(np.uint64), runs.between(first, behind).astype(np.uint64)
            self._differences(LEAK, actual > expected, first, actual, expected)
            self._differences(CORRUPTION, actual < expected, first, actual, expected)
        self._uncounted(runs, behind, runs.end)

    def _differences(
        self,
        severity: str,
        wrong: NDArray[np.bool_],
        first: int,
        actual: NDArray[np.uint64],
        expected: NDArray[np.uint64],
    ) -> None:
        at = np.flatnonzero(wrong)
        # Neighbours with the same counts are one finding.
        same = (np.diff(at) == 1) & (np.diff(actual[at]) == 0) & (np.diff(expected[at]) == 0)
        starts = np.append(0, np.flatnonzero(~same) + 1)[: len(at)]
        ends = np.append(starts[1:], len(at))[: len(at)]
        shown = max(0, MOST_FINDINGS - len(self.report.findings))
        for start, end in zip(starts[:shown].tolist(), ends[:shown].tolist(), strict=True):
            where = self._where(first + int(at[start]), first + int(at[end - 1]) + 1)
            what = f"refcount {actual[at[start]]}, referenced {counted(expected[at[start]], 'time')}"
            self.report.found(severity, where, what, end - start)
        self.report.count(severity, len(at) - (int(ends[:shown][-1]) if shown and len(at) else 0))

    def _uncounted(self, runs: Runs, first: int, last: int) -> None:
        """Clusters ``first..last - 1`` have no counts: what is referenced there ought to have some."""
        missing = runs.within(first, last)
        shown = max(0, MOST_FINDINGS - len(self.report.findings))
        for start, end, count in zip(
            *(column[:shown].tolist() for column in (missing.starts, missing.ends, missing.counts)), strict=True
        ):
            what = f"refcount 0, referenced {counted(count, 'time')}"
            self.report.found(CORRUPTION, self._where(start, end), what, end - start)
        self.report.count(CORRUPTION, int((missing.ends[shown:] - missing.starts[shown:]).sum()))

    def _where(self, first: int, last: int) -> str:
        return f"clusters {first * self.layout.cluster_size:#x}..{last * self.layout.cluster_size:#x}"


def _mend(file: File, repair: str, progress: Callable[[int, int], None] | None) -> CheckReport:
    before = _Check(file, progress).run()
    report = before.report
    if not (report.corruptions or report.leaks):
        return report
    before.layout.require_untracked()
    require_writable(before.layout)
    now = before
    if repair == "all":
        unnamed = _unnamed(now.layout)
        dropped = _drop_bad(file, now)
        if dropped is not None:
            report.dropped, report.dropped_unnamed = dropped, unnamed
            now = _Check(file, None).run()
        if _set_right(file, now, np.less):
            now = _Check(file, None).run()
    leaks = max(report.leaks, now.report.leaks)
    # Where a reference is wrong, what seems to leak may be what it ought to lead to.
    if not now.report.corruptions and _set_right(file, now, np.greater):
        now = _Check(file, None).run()
    left = now.report
    report.corruptions_fixed = max(0, report.corruptions - left.corruptions)
    report.leaks_fixed = leaks - left.leaks
    report.corruptions, report.leaks, report.check_errors = left.corruptions, left.leaks, left.check_errors
    return report


def _unnamed(layout: Layout) -> int | None:
    """How many bitmaps the image has beside those that could be read; None where that cannot be told."""
    extension = layout.extension
    if extension is None or len(extension.data) != BITMAPS_EXTENSION.size:
        return None
    said = int(BITMAPS_EXTENSION.parse(extension.data).nb_bitmaps)
    if 1 <= said <= MAX_BITMAPS:
        return max(0, said - len(layout.slots))
    broken = not layout.slots or any(fault.field.startswith("bitmap directory entry") for fault in layout.faults)
    return None if broken else 0


def _drop_bad(file: File, found: _Check) -> list[str] | None:
    """One commit that keeps the good bitmaps; what only the bad ones used becomes a leak, which `_set_right` frees.

    Returns:
        The names of those given up; None where nothing had to be, or where more than bitmaps is at fault.
    """
    layout = found.layout
    if not (layout.faults or found.bad) or not all(fault.mendable for fault in layout.faults):
        return None
    names = [layout.slots[index].entry.name.decode("utf-8", "backslashreplace") for index in sorted(found.bad)]
    layout.slots = [slot for index, slot in enumerate(layout.slots) if index not in found.bad]
    # Nothing that the old directory says about its clusters is to be believed here, so the commit frees none of them.
    layout.faults, layout.pointer = [], None
    references = found.references or References.unknown("the walk failed")
    commit(file, layout, [Kept(slot.entry) for slot in layout.slots], references=references)
    return names


def _set_right(file: File, found: _Check, wrong: np.ufunc) -> bool:
    """Corrects the refcounts that a complete walk has proven wrong; False where there is nothing to write.

    An L2 entry says whether the refcount of its cluster is 1. A count that would contradict it is left as it is:
    QEMU would call that corrupt, and ``qemu-img check`` changes both.

    Args:
        file: open for writing.
        found: what was found in it, as it is now.
        wrong: which stored counts to correct, from what they are and what they should be: `np.less`, `np.greater`.
    """
    if found.references is None or found.references.faults or found.layout.faults:
        return False
    runs, uncopied = found.references.runs, found.references.uncopied
    refcounts = Refcounts(file, found.layout.header)
    places = (refcounts.table // np.uint64(refcounts.cluster_size)).astype(np.int64)
    if (runs.of(places) > 1).any():
        return False  # a refcount block that is something else as well

    def corrections() -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        for first, stored in refcounts.pieces():
            right = runs.between(first, first + len(stored))
            at = np.flatnonzero(wrong(stored.astype(np.uint64), right.astype(np.uint64)))
            old, new = stored[at], right[at]
            copied = uncopied.of(first + at) == 0
            at = at[(new == 0) | ((old == 1) == (new == 1)) | ((new == 1) == copied)]
            if len(at):
                yield first + at, right[at]

    return set_refcounts(file, found.layout, corrections())
