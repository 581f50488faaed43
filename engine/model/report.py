"""`CheckReport`: what a check of either container found, and what of it was mended."""

from __future__ import annotations

from dataclasses import dataclass, field

from dirtmap.fmt.errors import ArgumentError

LEAK, CORRUPTION, ERROR, NOTE = "leak", "corruption", "error", "note"
MOST_FINDINGS = 1000  # of runs of clusters; the totals count all


def require_repair(where: str, repair: str | None) -> None:
    """Refuses what no check knows how to mend.

    Raises:
        ArgumentError: ``repair`` is none of None, ``leaks`` and ``all``.
    """
    if repair not in (None, "leaks", "all"):
        raise ArgumentError(where, f"repair is {repair!r}, not 'leaks', 'all' or None")


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
        path: the container.
        format: ``qcow2`` or ``dirtmap``.
        check_errors: parts that could not be checked.
        corruptions, leaks: what is left.
        corruptions_fixed, leaks_fixed: what was mended.
        findings: each with its place, mended or not.
        dropped: what mending had to give up: bitmaps by name in a qcow2 image; in a store a line for each loss.
        dropped_unnamed: how many more bitmaps of a qcow2 image it gave up, whose names could not be read; None where
            not even their number could.
        made_dirty: bitmaps of a store that mending made all dirty, a line each.
    """

    path: str
    format: str
    check_errors: int = 0
    corruptions: int = 0
    leaks: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    findings: list[Finding] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    dropped_unnamed: int | None = 0
    made_dirty: list[str] = field(default_factory=list)

    def found(self, severity: str, where: str, what: str, count: int = 1) -> None:
        """Adds a finding and counts it."""
        self.findings.append(Finding(severity, where, what))
        self.count(severity, count)

    def count(self, severity: str, count: int) -> None:
        """Counts without a finding of its own."""
        self.corruptions += count if severity == CORRUPTION else 0
        self.leaks += count if severity == LEAK else 0
        self.check_errors += count if severity == ERROR else 0
