"""The lock order: which lock a thread may take while it holds which; and what waits until it holds no store.

A thread takes locks in ascending rank, so that no two threads or processes wait for each other in a circle.

    rank      guards                                          taken by                        waits
    CUT       a tracker's intervals: one cut at a time        tracking.recorder, `_cut`       as long as it takes
    TRACKER   a tracker's windows, its saves, its end         tracking.recorder, `_using`     as long as it takes
    IMAGE     a qcow2 image's metadata: QEMU's lock bytes     qcow2.reading, `write_session`  as `locks.Locking` says
    STORE     a store file: its byte 100                      storefile.file, `Store.change`  as `locks.Locking` says
    INDEX     the index: LMDB's writer lock                   index.database, `change`        as long as it takes

Threads of one process queue for an image or a store before they ask for the lock of its file, see `locks.turn`: that
queue has the rank of the lock. Two images, or two stores, may be held at once: both waits are bounded, so opposite
orders end in a `LockedError`; taking one and the same of these locks twice does so at once. A tracker's mark takes none
of these locks. Its `_spare_guard` and its kernel's guard are leaves: whoever holds one takes no lock of this table, and
calls nobody who does. So is the guard of the files that are open, in `system.file`.

What has to happen after a commit of a store, and needs another lock, is given to `after_stores`: it is done once the
thread holds no store any more.

With ``DIRTMAP_CHECK_LOCKS`` in the environment a violation is an error; the tests run so.
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
    """What one thread holds, and what it has put off until it holds no store."""

    def __init__(self) -> None:
        self.held: list[tuple[Rank, str]] = []
        self.waiting: list[Callable[[], object]] = []


_this = _Thread()


def is_held_here(rank: Rank, what: str) -> bool:
    """True where this thread has that lock: to wait for it would be in vain."""
    return (rank, what) in _this.held


@contextlib.contextmanager
def holding(rank: Rank, what: str) -> Iterator[None]:
    """Around the taking and the holding of a lock.

    Blocks need not be nested: of two locks that were taken one after the other either may be given back first.

    Args:
        rank: of the lock.
        what: which of that rank, as a path or a name.

    Raises:
        LockOrderError: the thread holds one that has to be taken later; only where that is checked.
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
    """Does it now, or, while this thread holds a store, as soon as it holds none.

    Acts are done in the order in which they were given, also where the change in between has failed.
    """
    _this.waiting.append(act)
    _run_waiting(_this.held, _this.waiting)
