"""The lock order: which locks a thread may take while it holds another one.

A thread takes locks in ascending rank, so that no two threads or processes wait for each other in a circle.

    rank      guards                                          taken by                        waits
    CUT       a tracker's intervals: one cut at a time        tracking.recorder, `_cut`       as long as it takes
    TRACKER   a tracker's windows, its saves, its end         tracking.recorder, `_using`     as long as it takes
    IMAGE     a qcow2 image's metadata: QEMU's lock bytes     qcow2.reading, `write_session`  as `locks.Locking` says
    STORE     a store file: its byte 100                      storefile.file, `Store.change`  as `locks.Locking` says
    INDEX     the index: LMDB's writer lock                   index.database, `change`        as long as it takes

Threads of one process queue for an image or a store before they ask for the lock of its file: see `locks.turn`. That
queue has the rank of the lock. A thread may hold two images, or two stores. Both waits are bounded, so opposite orders
end in a `LockedError`. Taking the same image or store twice ends in one at once.

A tracker's mark takes none of these locks. The tracker's `_spare_guard`, the guard of its kernel and the guard of
the open files in `system.file` are leaves: whoever holds one takes no lock of this table, and calls nothing that does.

An act that has to follow a commit of a store, and needs another lock, is given to `after_stores`. It is done once the
thread holds no store any more.

With ``DIRTMAP_CHECK_LOCKS`` in the environment a violation is an error. The tests set it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from enum import IntEnum


class Rank(IntEnum):
    """The locks of the table, in their order."""

    CUT = 1
    TRACKER = 2
    IMAGE = 3
    STORE = 4
    INDEX = 5


class LockOrderError(AssertionError):
    """A thread takes locks in an order in which two of them could wait for each other."""


class _Thread(threading.local):
    """The locks that one thread holds, and the acts that it has put off until it holds no store."""

    def __init__(self) -> None:
        self.held: list[tuple[Rank, str]] = []
        self.waiting: list[Callable[[], object]] = []


_this = _Thread()


def is_held_here(rank: Rank, what: str) -> bool:
    """True if this thread has that lock, so that it would wait for it in vain."""
    return (rank, what) in _this.held


@contextlib.contextmanager
def holding(rank: Rank, what: str) -> Iterator[None]:
    """Notes that this thread takes and holds a lock. The block takes the lock, holds it, and gives it up.

    Blocks need not be nested: of two locks either may be given up first.

    Args:
        rank: of the lock.
        what: which lock of that rank it is: a path or a name.

    Raises:
        LockOrderError: the thread holds a lock of a higher rank. Only if the order is checked.
    """
    held, waiting, mine = _this.held, _this.waiting, (rank, what)
    if "DIRTMAP_CHECK_LOCKS" in os.environ:
        _check(held, mine)
    held.append(mine)
    try:
        yield
    finally:
        held.remove(mine)
        if rank is Rank.STORE:
            _run_waiting(held, waiting)


def _check(held: list[tuple[Rank, str]], mine: tuple[Rank, str]) -> None:
    for rank, what in held:
        if rank > mine[0]:
            raise LockOrderError(f"{mine[0].name} {mine[1]} is taken while {rank.name} {what} is held")


def _run_waiting(held: list[tuple[Rank, str]], waiting: list[Callable[[], object]]) -> None:
    while waiting and not any(rank is Rank.STORE for rank, _ in held):
        waiting.pop(0)()


def _forget() -> None:
    """In a forked child: what is held is the parent's. A block that the child leaves has the old list."""
    _this.held, _this.waiting = [], []


os.register_at_fork(after_in_child=_forget)


def after_stores(act: Callable[[], object]) -> None:
    """Does an act as soon as this thread holds no store: now, or at the end of the change.

    Acts are done in the order in which they were given, even if the change has failed.
    """
    _this.waiting.append(act)
    _run_waiting(_this.held, _this.waiting)
