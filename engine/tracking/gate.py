"""`gate`: an instant at which nothing is written to several disks: to cut them all, or to clone them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from dirtmap.engine.tracking.kernel import Kernel, Pause
from dirtmap.engine.tracking.tracker import Tracker
from dirtmap.fmt import live
from dirtmap.fmt.errors import StorageError


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
    kernels = [tracker._kernel for tracker in sorted(set(trackers), key=lambda tracker: tracker._session.uuid)]
    with contextlib.ExitStack() as stack:
        held: list[bool] = []

        def open_one(kernel: Kernel) -> None:
            held.append(kernel.open_gate())

        for kernel in kernels:  # in an order that is the same for all, so that no two wait for each other
            kernel.require_usable()
            kernel.refuse_own()
            kernel.close_gate()
            stack.callback(open_one, kernel)
        deadline = time.monotonic() + live.PATIENCE_NS / 1e9
        for kernel in kernels:
            pause = Pause()
            while kernel.in_flight:
                pause()
                if time.monotonic() > deadline or not kernel.gate_holds:
                    raise StorageError(kernel.where, "a write did not end while the gate was closed")
        yield
        stack.close()
    for kernel, whole in zip(reversed(kernels), held, strict=True):
        if not whole:
            what = "a write could not wait any longer: what was cut or cloned meanwhile is not of one instant"
            raise StorageError(kernel.where, what)
