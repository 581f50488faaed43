"""Checks the bitmaps and refcounts of a qcow2 image, and repairs what can be repaired without guessing.

    layout      every fault that `read_layout` collects is a corruption
    references  a walk of all references; a bitmap that shares a cluster with anything is a corruption
    refcounts   count above references: a leak; below: a corruption

A repair is a commit that drops the bad bitmaps and keeps the others; then refcounts are corrected. Guest data is never
changed: what is wrong with it is reported, and left to ``qemu-img check``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from dirtmap.engine.model.bitmap import INCONSISTENT
from dirtmap.engine.model.later import later
from dirtmap.engine.model.report import CORRUPTION, ERROR, LEAK, MOST_FINDINGS, NOTE, CheckReport, require_repair
from dirtmap.engine.qcow2.commit import Kept, commit, growth, marks, require_writable, set_refcounts
from dirtmap.engine.qcow2.datafile import misfit
from dirtmap.engine.qcow2.few import MOST_BYTES, count_few
from dirtmap.engine.qcow2.layout import Layout, Slot, bitmap_label, read_layout, void_bitmaps
from dirtmap.engine.qcow2.reading import FORMAT
from dirtmap.engine.qcow2.refcounts import Refcounts
from dirtmap.engine.system import locks
from dirtmap.engine.system.file import File, open_file
from dirtmap.engine.system.locks import USUAL, Locking
from dirtmap.fmt.errors import FormatError, counted
from dirtmap.fmt.geometry import ceil_div

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dirtmap.engine.qcow2 import references as many
    from dirtmap.engine.qcow2.references import References, Runs
else:  # a small image that is sound is found so without them
    later(globals(), np="numpy", many="dirtmap.engine.qcow2.references")


def check(
    path: str,
    *,
    repair: str | None = None,
    force_share: bool = False,
    progress: Callable[[int, int], None] | None = None,
    locking: Locking = USUAL,
) -> CheckReport:
    """Checks an image, even a damaged one, and repairs it if asked to.

    Args:
        path: the image.
        repair: None, ``leaks``, or ``all``, which also drops bitmaps that make QEMU refuse the image. A tracked image
            is not repaired.
        force_share: checks even while another process writes to the image; not allowed with ``repair``.
        progress: called with (L2 tables walked, L2 tables in all).
        locking: how to take the locks.

    Raises:
        ArgumentError: ``repair`` is something else.
        FormatError: the file is not a qcow2 image.
        UnsupportedError: ``repair`` of an image that must not be written to.
        LockedError, StorageError: as for reading; with ``repair``, as for writing.
    """
    require_repair(path, repair)
    if repair is None:
        with open_file(path) as file, locks.reading(file, force_share=force_share, locking=locking):
            return _Check(file, progress).run().report
    with open_file(path, writable=True) as file, locks.writing(file, locking=locking):
        return _repair_file(file, repair, progress)


def free_leaks(file: File) -> None:
    """Frees the clusters that nothing refers to, if the image is sound and all of it can be walked.

    Args:
        file: the image, open for writing, and locked against other writers.

    Raises:
        StorageError: the image could not be read or written.
    """
    found = _Check(file, None).run()
    if found.report.leaks and not found.report.corruptions:
        _set_right(file, found, np.greater)


class _Check:
    """One pass over an image: what is wrong, and which bitmaps are at fault."""

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
        if layout.is_void:
            what = f"void: {void_bitmaps(self.file)}; 'recover' brings back what it can, and QEMU will drop them"
            report.found(NOTE, "bitmaps extension", what)
        if resized := misfit(layout):
            report.found(NOTE, "external data file", resized)
        if self._is_plainly_right():
            return self
        try:
            references = many.walk(self.file, layout, progress=self.progress)
            for fault in references.faults:
                report.found(CORRUPTION, fault.field, fault.what)
            if grows := growth(self.file, layout, references):
                report.found(NOTE, "L2 tables", grows)
            self._shared(references.runs)
            self._refcounts(references.runs)
            self.references = references
        except FormatError as error:
            report.found(ERROR, error.where.removeprefix(f"{layout.path}: "), error.what)
        return self

    def _is_plainly_right(self) -> bool:
        """True where every reference and count can be looked at one by one, and each cluster in use has one of each."""
        few = count_few(self.file, self.layout, MOST_BYTES)
        if few is None or not all(times == 1 for times in few.times.values()):
            return False
        return Refcounts(self.file, self.layout.header).counted_once() == few.times.keys()

    def _shared(self, runs: Runs) -> None:
        """Finds bitmaps that share a cluster with anything else. The layout has already found overlaps among them."""
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
        # Neighbouring clusters with the same counts become one finding.
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
        """Reports referenced clusters among ``first..last - 1``, which have no counts."""
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


def _repair_file(file: File, repair: str, progress: Callable[[int, int], None] | None) -> CheckReport:
    before = _Check(file, progress).run()
    report = before.report
    if not (report.corruptions or report.leaks):
        return report
    before.layout.require_untracked()
    require_writable(before.layout)
    void = read_layout(file, void=True) if before.layout.is_void else None
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
    # If a reference is broken, a cluster that seems to leak may be the one that it should lead to.
    if not now.report.corruptions and _set_right(file, now, np.greater):
        now = _Check(file, None).run()
    left = now.report
    report.corruptions_fixed = max(0, report.corruptions - left.corruptions)
    report.leaks_fixed = leaks - left.leaks
    if void and report.leaks_fixed:  # their clusters were among these
        if void.faults:
            report.dropped_unnamed = void.bitmaps_said
        else:
            report.dropped = [_name(slot) for slot in void.slots]
    report.corruptions, report.leaks, report.check_errors = left.corruptions, left.leaks, left.check_errors
    return report


def _name(slot: Slot) -> str:
    return slot.entry.name.decode("utf-8", "backslashreplace")


def _unnamed(layout: Layout) -> int | None:
    """The number of bitmaps that could not be read; None if that cannot be told."""
    if layout.bitmaps_said is not None:
        return max(0, layout.bitmaps_said - len(layout.slots))
    broken = not layout.slots or any(fault.field.startswith("bitmap directory entry") for fault in layout.faults)
    return None if broken else 0


def _drop_bad(file: File, found: _Check) -> list[str] | None:
    """Drops the bad bitmaps in one commit. Clusters that only they used become leaks, which `_set_right` frees.

    Returns:
        The names of the dropped bitmaps. None, without a commit, if nothing had to be dropped or more is at fault.
    """
    layout = found.layout
    if not (layout.faults or found.bad) or not all(fault.repairable for fault in layout.faults):
        return None
    names = [_name(layout.slots[index]) for index in sorted(found.bad)]
    layout.slots = [slot for index, slot in enumerate(layout.slots) if index not in found.bad]
    # The old directory cannot be trusted about its clusters, so the commit frees none of them.
    layout.faults, layout.pointer = [], None
    references = found.references or References.unknown("the walk failed")
    commit(file, layout, [Kept(slot.entry) for slot in layout.slots], references=references)
    return names


def _set_right(file: File, found: _Check, wrong: np.ufunc) -> bool:
    """Corrects the refcounts that a complete walk has proven wrong. False if there is nothing to write.

    An L2 entry says whether the refcount of its cluster is 1. A correct count that would contradict it is not written:
    QEMU would call that corrupt, and ``qemu-img check`` changes both.

    Args:
        file: the image, open for writing.
        found: the result of a check of the image as it is now.
        wrong: tells which counts to correct, from stored and right ones: `np.less` or `np.greater`.
    """
    if found.references is None or found.references.faults or found.layout.faults:
        return False
    runs, uncopied = found.references.runs, found.references.uncopied
    refcounts = Refcounts(file, found.layout.header)
    places = (np.asarray(refcounts.table) // np.uint64(refcounts.cluster_size)).astype(np.int64)
    if (runs.of(places) > 1).any():
        return False  # a refcount block is also used as something else

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
