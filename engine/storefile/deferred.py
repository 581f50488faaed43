"""Acts that wait until no store is being changed by this thread: a store is changed by one at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

_waiting: ContextVar[list[Callable[[], None]] | None] = ContextVar("waiting", default=None)


@contextlib.contextmanager
def changing_a_store() -> Iterator[None]:
    """Around a change of a store in which others' code runs; what was put off is done when the outermost ends."""
    if _waiting.get() is not None:
        yield
        return
    acts: list[Callable[[], None]] = []
    token = _waiting.set(acts)
    try:
        yield
    finally:
        _waiting.reset(token)
        for act in acts:
            act()


def afterwards(act: Callable[[], None]) -> None:
    """Does it now, or, while this thread changes a store, behind that."""
    acts = _waiting.get()
    if acts is None:
        act()
    else:
        acts.append(act)
