"""`CheckReport`: what a check of either kind of container found, and what it repaired."""

from __future__ import annotations

from dataclasses import dataclass, field

from dirtmap.fmt.errors import ArgumentError

LEAK, CORRUPTION, ERROR, NOTE = "leak", "corruption", "error", "note"
MOST_FINDINGS = 1000  # of runs of clusters, and of namespaces in doubt; the totals count the others, too


def require_repair(where: str, repair: str | None) -> None:
    """Refuses a value for ``repair`` that no check knows.

    Raises:
        ArgumentError: ``repair`` is not None, ``leaks`` or ``all``.
    """
    if repair not in (None, "leaks", "all"):
        raise ArgumentError(where, f"repair is {repair!r}, not 'leaks', 'all' or None")


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding: ``severity`` (``corruption``, ``leak``, ``error``, ``note``), ``where`` and ``what`` it is."""

    severity: str
    where: str
    what: str


@dataclass(slots=True)
class CheckReport:
    """What a check found and repaired. Counts are those of ``qemu-img check``: leaks are in clusters.

    Attributes:
        path: the container.
        format: ``qcow2`` or ``dirtmap``.
        check_errors: number of parts that could not be checked.
        corruptions, leaks: number of those that are left.
        corruptions_fixed, leaks_fixed: number of those that were repaired.
        findings: each with its place, repaired or not.
        dropped: what a repair had to give up: in a qcow2 image, names of bitmaps; in a store, one line per loss.
        dropped_unnamed: how many more bitmaps of a qcow2 image were given up, whose names could not be read; None if
            not even their number could be read.
        made_dirty: bitmaps of a store that a repair made dirty all over, one line each.
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
        """Counts without adding a finding."""
        self.corruptions += count if severity == CORRUPTION else 0
        self.leaks += count if severity == LEAK else 0
        self.check_errors += count if severity == ERROR else 0
