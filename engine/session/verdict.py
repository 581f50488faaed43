"""`decide`: what the bitmaps of a session hold, as a table over facts. It is the table of SPEC.md, "Recovery"."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

# A tracker writes a heartbeat so often, into its live file and, durable, into its log. For so long after the last one a
# write to the image can be the tracker's own.
HEARTBEAT_SECONDS = 0.25
TOLERANCE_SECONDS = 0.5
DURABLE_HEARTBEAT_SECONDS = 1.0
DURABLE_TOLERANCE_SECONDS = 5.0


class Row(Enum):
    """The rows of the table."""

    LIVE = "tracked"
    EXACT = "exact"
    LOGGED = "logged regions"
    ALL_DIRTY = "all dirty"


@dataclass(frozen=True, slots=True)
class Facts:
    """What decides about a session.

    Attributes:
        alive: its tracker, or somebody who marks in its session, is alive, or not known to have ended.
        changed: why the image, or the store, is not as the tracker left it; None if it is.
        same_boot: the machine was not booted since.
        live: there are live files that fit the session.
        poisoned: they say that a sync of the tracker had failed.
        log: there is a log of regions that can be relied on.
    """

    alive: bool
    changed: str | None
    same_boot: bool
    live: bool
    poisoned: bool
    log: bool


def decide(facts: Facts) -> tuple[Row, str]:
    """The row of the table that applies, and why, in words."""
    if facts.alive:
        return Row.LIVE, "its tracker is alive"
    if facts.changed:
        return Row.ALL_DIRTY, facts.changed
    if facts.live and facts.same_boot and not facts.poisoned:
        return Row.EXACT, "the tracker's process ended without closing, and its live file is whole"
    lost = "a sync of the tracker had failed" if facts.poisoned else "the live file is gone, as after a power loss"
    if facts.log:
        return Row.LOGGED, f"{lost}; dirty is what was saved, and every region that was logged since"
    return Row.ALL_DIRTY, f"{lost}, and no log of regions can be relied on"
