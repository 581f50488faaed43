"""What a tracker can be asked from outside: see `dirtmap.engine.control`.

    begin      begins changes of an owner: what they say is as of a cut that is made now, whenever they are made;
               tells who holds which bitmaps
    change     several changes to bitmaps, all or none: see `Tracker.change`; bits of theirs are in the message's bytes
    checkpoint a checkpoint, of a name and a granularity
    save       saves
    differing  gathers ranges, offsets and lengths in bytes, of a disk of that size, at a granularity, for `rebuild`
    rebuild    gives a checkpoint anew what was gathered: see `Tracker.rebuild`
    stop       ends the tracker
    hold       holds bitmaps of one namespace as they are at one cut, until `give`, or the end of the conversation
    held       tells the bits of one of those
    give       holds none any more
    close      closes the gate until `open`, or until the end of the conversation, and tells which file is tracked
    open       opens it; an error if it did not hold

Each is asked for a namespace, by its UUID: that of the tracked node; or of the tracked device, or of its root. The
bitmaps that it names are those of that namespace.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, Self, SupportsIndex

from dirtmap.engine.model.bitmap import checked_granularity
from dirtmap.fmt import geometry
from dirtmap.fmt.errors import BitmapError, Error, UnsupportedError, printable

if TYPE_CHECKING:
    from dirtmap.engine.model.bitmap import Bitmap


# Makes several changes; see `Tracker.change`.
Changing = Callable[[Iterable[tuple[Any, ...]]], object]


class Askable(Protocol):
    """What is asked of a tracker; see `dirtmap.engine.tracking.tracker.Tracker`, which implements it."""

    size: int
    on_stop: Callable[[], object] | None

    def require_namespace(self, namespace: str) -> None:
        """Refuses a question that is about another disk."""

    def change(self, changes: Iterable[tuple[Any, ...]], *, namespace: str | None = None) -> None:
        """Makes several changes at one cut."""

    def beginning(self, owner: str, *, namespace: str | None = None) -> contextlib.AbstractContextManager[Changing]:
        """Begins changes that are as of a cut at its beginning."""

    def checkpoint(self, name: str, granularity: SupportsIndex | None = None, *, namespace: str | None = None) -> None:
        """Marks a point in time."""

    def save(self) -> None:
        """Saves."""

    def rebuild(self, name: str, begun: str, differing: Bitmap, *, namespace: str | None = None) -> None:
        """Gives a checkpoint its content anew."""

    def close(self) -> None:
        """Ends it."""

    def hold(self, names: Iterable[str], owner: str = "dirtmap", *, namespace: str | None = None) -> int:
        """Holds bitmaps as they are at one cut."""

    def held(self, hold: int, name: str) -> Bitmap:
        """One of them."""

    def release(self, hold: int) -> None:
        """Ends what `hold` began."""

    def holders(self, namespace: str | None = None) -> dict[str, str]:
        """Who holds which bitmaps."""

    def place(self) -> dict[str, Any]:
        """Which file the image is."""

    def gated(self) -> contextlib.AbstractContextManager[None]:
        """Nothing is written until the end of the block."""


class Asked:
    """One conversation with a tracker: a ``with`` block, which ends what it holds."""

    def __init__(self, tracker: Askable) -> None:
        self._tracker = tracker
        self._stack, self._gate, self._begun = contextlib.ExitStack(), contextlib.ExitStack(), contextlib.ExitStack()
        self._changing: dict[str, Changing] = {}  # as of an earlier cut, for the namespace that it was begun for
        self._differing: Bitmap | None = None
        self._hold, self._holding = -1, ""  # and of which namespace

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for stack in (self._gate, self._begun, self._stack):
            with contextlib.suppress(Error):  # nobody is there to hear of it
                stack.close()

    def __call__(self, asked: dict[str, Any], data: bytes) -> tuple[Any, bytes]:
        """Does what is asked. Errors as those of the tracker's methods."""
        act, tracker, namespace = asked.get("act"), self._tracker, str(asked.get("namespace"))
        tracker.require_namespace(namespace)
        if act in ("hold", "held", "give") and self._holding not in ("", namespace):
            raise BitmapError("hold", "this conversation holds bitmaps of another namespace")
        if act == "begin":
            begun = tracker.beginning(str(asked.get("owner")), namespace=namespace)
            self._changing[namespace] = self._begun.enter_context(begun)
            return {"held": tracker.holders(namespace)}, b""
        if act == "change":
            change = self._changing.get(namespace) or functools.partial(tracker.change, namespace=namespace)
            change([*self._with_bits(asked["changes"], data)])
        elif act == "checkpoint":
            tracker.checkpoint(asked["name"], asked["granularity"], namespace=namespace)
        elif act == "save":
            tracker.save()
        elif act == "differing":
            self._gather(asked["size"], asked["granularity"], asked["offsets"], asked["lengths"])
        elif act == "rebuild":
            self._gather(asked["size"], asked["granularity"], [], [])
            assert self._differing is not None
            tracker.rebuild(asked["name"], asked["begun"], self._differing, namespace=namespace)
            self._differing = None
        elif act == "stop":
            (tracker.on_stop or tracker.close)()
        elif act == "hold":
            self._stack.close()
            self._hold = tracker.hold(asked["names"], str(asked["owner"]), namespace=namespace)
            self._holding = namespace
            self._stack.callback(tracker.release, self._hold)
        elif act == "held":
            bitmap = tracker.held(self._hold, asked["name"])
            told = {"size": bitmap.size, "granularity": bitmap.granularity, "recording": bitmap.recording}
            return told, bytes(bitmap.packed())
        elif act == "give":
            self._holding = ""
            self._stack.close()
        elif act == "close":
            self._gate.enter_context(tracker.gated())
            return tracker.place(), b""
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
