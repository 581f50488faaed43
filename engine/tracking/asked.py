"""What a tracker can be asked from outside: see `dirtmap.engine.control`.

    change     several changes to bitmaps, all or none: see `Tracker.change`
    checkpoint a checkpoint, of a name and a granularity
    save       saves
    differing  gathers ranges, offsets and lengths in bytes, of a disk of that size, at a granularity, for `rebuild`
    rebuild    gives a checkpoint anew what was gathered: see `Tracker.rebuild`
    stop       ends the tracker
    take       holds a bitmap until `give`, or until the end of the conversation, and tells its bits
    give       holds no bitmap any more
    close      closes the gate until `open`, or until the end of the conversation
    open       opens it; an error if it did not hold

Each is asked for a namespace, by its UUID: that of the tracker's own bitmaps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol, Self, SupportsIndex

from dirtmap.fmt.errors import Error, UnsupportedError, printable

if TYPE_CHECKING:
    from dirtmap.engine.model.bitmap import Bitmap


class Askable(Protocol):
    """What is asked of a tracker; see `dirtmap.engine.tracking.tracker.Tracker`, which implements it."""

    on_stop: Callable[[], object] | None

    def require_namespace(self, namespace: str) -> None:
        """Refuses a question about another namespace than its own."""

    def change(self, changes: Iterable[tuple[Any, ...]]) -> None:
        """Makes several changes at one cut."""

    def checkpoint(self, name: str, granularity: SupportsIndex | None = None) -> None:
        """Marks a point in time."""

    def save(self) -> None:
        """Saves."""

    def rebuild(self, name: str, begun: str, differing: Bitmap) -> None:
        """Gives a checkpoint its content anew."""

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
        self._stack, self._gate = contextlib.ExitStack(), contextlib.ExitStack()
        self._differing: Bitmap | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for stack in (self._gate, self._stack):
            with contextlib.suppress(Error):  # nobody is there to hear of it
                stack.close()

    def __call__(self, asked: dict[str, Any]) -> tuple[Any, bytes]:
        """Does what is asked. Errors as those of the tracker's methods."""
        act, tracker = asked.get("act"), self._tracker
        tracker.require_namespace(str(asked.get("namespace")))
        if act == "change":
            tracker.change([tuple(one) for one in asked["changes"]])
        elif act == "checkpoint":
            tracker.checkpoint(asked["name"], asked["granularity"])
        elif act == "save":
            tracker.save()
        elif act == "differing":
            self._gather(asked["size"], asked["granularity"], asked["offsets"], asked["lengths"])
        elif act == "rebuild":
            self._gather(asked["size"], asked["granularity"], [], [])
            assert self._differing is not None
            tracker.rebuild(asked["name"], asked["begun"], self._differing)
            self._differing = None
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

    def _gather(self, size: int, granularity: int, offsets: list[int], lengths: list[int]) -> None:
        from dirtmap.engine.model.bitmap import Bitmap

        if self._differing is None:
            self._differing = Bitmap(size, granularity)
        self._differing.mark_many(offsets, lengths)

    def _take(self, name: str) -> tuple[Any, bytes]:
        bitmap = self._tracker.take(name)
        self._stack.callback(self._tracker.give_back, name)
        return {"granularity": bitmap.granularity, "recording": bitmap.recording}, bytes(bitmap.packed())
