"""`decide`: what a session's bitmaps hold, as a table over facts. The table of SPEC.md, "Recovery"."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

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
    """What decides; ``changed`` says why the image, or the store, is not as the tracker left it, or is None."""

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
