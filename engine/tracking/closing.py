"""`closed`: gates that are closed: nothing is written to their disks meanwhile."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

from dirtmap.engine.tracking.kernel import Kernel, Pause
from dirtmap.fmt import live
from dirtmap.fmt.errors import StorageError


@contextlib.contextmanager
def closed(kernels: Sequence[Kernel]) -> Iterator[None]:
    """Closes the gates of these sessions until the end of the block. See `dirtmap.engine.tracking.gate.gate`.

    Args:
        kernels: in an order that is the same for all, so that no two wait for each other.
    """
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
