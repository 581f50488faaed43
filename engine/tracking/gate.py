"""`gate`: an instant at which nothing is written to several disks: to cut them all, or to clone them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dirtmap.engine.tracking.closing import closed
from dirtmap.engine.tracking.tracker import Tracker


@contextlib.contextmanager
def gate(*trackers: Tracker) -> Iterator[None]:
    """A ``with`` block in which no write to any of these disks is in flight, in any process.

    A write that begins meanwhile waits for the end of the block, but for ten seconds at most, so that no guest takes
    its disk for broken. So the block must be short: cut, clone. Marks that were made with `Tracker.mark` alone do not
    wait, as nobody knows when their writes end. No write may begin, or be in flight, in the thread of the block.

    Args:
        trackers: of the disks.

    Raises:
        LockedError: another process has closed one of the gates.
        StorageError: a write did not end, or one could not wait any longer. Then what was cut or cloned in the block is
            not of one instant.
    """
    ordered = sorted(set(trackers), key=lambda tracker: tracker._session.uuid)
    with closed([tracker._kernel for tracker in ordered]):
        yield
