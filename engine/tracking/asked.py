"""What a tracker can be asked from outside: see `dirtmap.engine.control`.

    begin      begins changes of an owner: what they say is as of a cut that is made now, whenever they are made
    change     several changes to bitmaps, all or none: see `Tracker.change`; bits of theirs are in the message's bytes
    checkpoint a checkpoint, of a name and a granularity
    save       saves
    stop       ends the tracker
    take       holds a bitmap until `give`, or until the end of the conversation, and tells its bits
    give       holds no bitmap any more
    close      closes the gate until `open`, or until the end of the conversation
    open       opens it; an error if it did not hold

Each is asked for a namespace, by its UUID: that of the tracker's own bitmaps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, Self, SupportsIndex

from dirtmap.engine.model.bitmap import checked_granularity
from dirtmap.fmt import geometry
from dirtmap.fmt.errors import Error, UnsupportedError, printable

if TYPE_CHECKING:
    from dirtmap.engine.model.bitmap import Bitmap


# Makes several changes; see `Tracker.change`.
Changing = Callable[[Iterable[tuple[Any, ...]]], object]


class Askable(Protocol):
    """What is asked of a tracker; see `dirtmap.engine.tracking.tracker.Tracker`, which implements it."""

    on_stop: Callable[[], object] | None
    size: int

    def require_namespace(self, namespace: str) -> None:
        """Refuses a question about another namespace than its own."""

    def change(self, changes: Iterable[tuple[Any, ...]]) -> None:
        """Makes several changes at one cut."""

    def beginning(self, owner: str) -> contextlib.AbstractContextManager[Changing]:
        """Begins changes that are as of a cut at its beginning."""

    def checkpoint(self, name: str, granularity: SupportsIndex | None = None) -> None:
        """Marks a point in time."""

    def save(self) -> None:
        """Saves."""

    def close(self) -> None:
        """Ends it."""

    def take(self, name: str) -> Bitmap:
        """Takes a bitmap for a backup."""

    def give_back(self, name: str) -> None:
        """Ends what `take` began."""

    def gated(self) -> contextlib.AbstractContextManager[None]:
        """Nothing is written until the end of the block."""


class Asked:
    """One conversation with a tracker: a ``with`` block, which ends what it holds."""

    def __init__(self, tracker: Askable) -> None:
        self._tracker = tracker
        self._stack, self._gate, self._begun = contextlib.ExitStack(), contextlib.ExitStack(), contextlib.ExitStack()
        self._change: Changing = tracker.change

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for stack in (self._gate, self._begun, self._stack):
            with contextlib.suppress(Error):  # nobody is there to hear of it
                stack.close()

    def __call__(self, asked: dict[str, Any], data: bytes) -> tuple[Any, bytes]:
        """Does what is asked. Errors as those of the tracker's methods."""
        act, tracker = asked.get("act"), self._tracker
        tracker.require_namespace(str(asked.get("namespace")))
        if act == "begin":
            self._change = self._begun.enter_context(tracker.beginning(str(asked.get("owner"))))
        elif act == "change":
            self._change([*self._with_bits(asked["changes"], data)])
        elif act == "checkpoint":
            tracker.checkpoint(asked["name"], asked["granularity"])
        elif act == "save":
            tracker.save()
        elif act == "stop":
            (tracker.on_stop or tracker.close)()
        elif act == "take":
            return self._take(asked["name"])
        elif act == "give":
            self._stack.close()
        elif act == "close":
            self._gate.enter_context(tracker.gated())
        elif act == "open":
            self._gate.close()
        else:
            raise UnsupportedError("act", f"a tracker knows no '{printable(str(act))}'")
        return None, b""

    def _with_bits(self, changes: Iterable[list[Any]], data: bytes) -> Iterator[tuple[Any, ...]]:
        """The changes, each with those of the message's bytes that are its own; too few are refused by `change`."""
        at = 0
        for act, *rest in changes:
            if act not in ("merge", "put"):
                yield act, *rest
                continue
            length = geometry.packed_bytes(self._tracker.size, checked_granularity(rest[1]))
            yield act, *rest, memoryview(data)[at : at + length]
            at += length

    def _take(self, name: str) -> tuple[Any, bytes]:
        bitmap = self._tracker.take(name)
        self._stack.callback(self._tracker.give_back, name)
        return {"granularity": bitmap.granularity, "recording": bitmap.recording}, bytes(bitmap.packed())
