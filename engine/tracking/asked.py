"""What a tracker can be asked from outside: see `dirtmap.engine.control`.

    begin      begins changes of an owner: what they say is as of a cut that is made now, whenever they are made;
               tells who holds which bitmaps
    bits       bits of a bitmap of the next ``change``, a part of them: in the message's bytes, or all dirty without
    change     several changes to bitmaps, all or none: see `Tracker.change`; their bitmaps are those that were told
    checkpoint a checkpoint, of a name and a granularity
    save       saves
    differing  gathers ranges, offsets and lengths in bytes, of a disk of that size, at a granularity, for `rebuild`
    rebuild    gives a checkpoint anew what was gathered: see `Tracker.rebuild`
    stop       ends the tracker
    hold       holds bitmaps of one namespace as they are at one cut, until `give`, or the end of the conversation
    held       tells what one of those is
    held part  tells some of its bits: as bytes, or what all of them are
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
from typing import Any, Protocol, Self, SupportsIndex

from dirtmap.engine.model.bitmap import WHERE, Bitmap, checked_granularity
from dirtmap.engine.tracking.gathered import Gathered, require_part
from dirtmap.fmt.errors import BitmapError, Error, UnsupportedError, printable

# Makes several changes; see `Tracker.change`.
Changing = Callable[[Iterable[tuple[Any, ...]]], object]


class Askable(Protocol):
    """What is asked of a tracker; see `dirtmap.engine.tracking.tracker.Tracker`, which implements it."""

    size: int
    on_stop: Callable[[], object] | None

    @property
    def spool_folder(self) -> str:
        """Where bits wait for their commit that are too many for memory."""

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
        self._gathered: dict[int, Gathered] = {}  # by the place of each bitmap among those of the change
        self._hold, self._holding = -1, ""  # and of which namespace
        self._held: dict[str, Bitmap] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for stack in (self._gate, self._begun, self._stack):
            with contextlib.suppress(Error):  # nobody is there to hear of it
                stack.close()
        self._drop_gathered()

    def __call__(self, asked: dict[str, Any], data: bytes) -> tuple[Any, bytes]:
        """Does what is asked. Errors as those of the tracker's methods."""
        act, tracker, namespace = asked.get("act"), self._tracker, str(asked.get("namespace"))
        tracker.require_namespace(namespace)
        if act in ("hold", "held", "held part", "give") and self._holding not in ("", namespace):
            raise BitmapError("hold", "this conversation holds bitmaps of another namespace")
        if data and act != "bits":  # bits that are not taken would count as clean
            self._drop_gathered()
            raise UnsupportedError("act", f"'{printable(str(act))}' takes no bytes")
        if act == "begin":
            begun = tracker.beginning(str(asked.get("owner")), namespace=namespace)
            self._changing[namespace] = self._begun.enter_context(begun)
            return {"held": tracker.holders(namespace)}, b""
        if act == "bits":
            try:
                self._gather_bits(asked["number"], asked["granularity"], asked["first"], asked["end"], data)
            except BaseException:  # what was told before them is not all, either
                self._drop_gathered()
                raise
        elif act == "change":
            change = self._changing.get(namespace) or functools.partial(tracker.change, namespace=namespace)
            try:
                change([*self._with_bitmaps(asked["changes"])])
            finally:
                self._drop_gathered()
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
            self._give()
            self._hold = tracker.hold(asked["names"], str(asked["owner"]), namespace=namespace)
            self._holding = namespace
            self._stack.callback(tracker.release, self._hold)
        elif act == "held":
            bitmap = self._held.get(asked["name"])
            if bitmap is None:  # else its parts may be asked for already
                bitmap = self._held[asked["name"]] = tracker.held(self._hold, asked["name"])
            return {"size": bitmap.size, "granularity": bitmap.granularity, "recording": bitmap.recording}, b""
        elif act == "held part":
            return self._held_part(asked["name"], asked["first"], asked["end"])
        elif act == "give":
            self._give()
        elif act == "close":
            self._gate.enter_context(tracker.gated())
            return tracker.place(), b""
        elif act == "open":
            self._gate.close()
        else:
            raise UnsupportedError("act", f"a tracker knows no '{printable(str(act))}'")
        return None, b""

    def _gather(self, size: int, granularity: int, offsets: list[int], lengths: list[int]) -> None:
        if self._differing is None:
            self._differing = Bitmap(size, granularity)
        self._differing.mark_many(offsets, lengths)

    def _give(self) -> None:
        self._holding = ""
        self._held.clear()
        self._stack.close()

    def _held_part(self, name: str, first: int, end: int) -> tuple[bool | None, bytes]:
        bitmap = self._held.get(name)
        if bitmap is None:
            raise BitmapError(WHERE, f"'{printable(name)}' was not asked for")
        found = bitmap._parts()
        require_part(first, end, found.nbits)
        part = found.part(first, end)
        return (part, b"") if isinstance(part, bool) else (None, part.tobytes())

    def _gather_bits(self, number: int, granularity: int, first: int, end: int, data: bytes) -> None:
        gathered = self._gathered.get(number)
        if gathered is None:
            gathered = Gathered(self._tracker.spool_folder, self._tracker.size, granularity)
            self._gathered[number] = gathered
        if gathered.granularity != granularity:
            raise BitmapError(WHERE, f"bits at {granularity} cannot be those of one at {gathered.granularity}")
        gathered.take(first, end, data)

    def _with_bitmaps(self, changes: Iterable[list[Any]]) -> Iterator[tuple[Any, ...]]:
        """The changes, each with the bitmap that is its own.

        Raises:
            BitmapError: no bits of it were told, not even clean ones; or those of another disk or granularity were.
        """
        number = 0
        for act, *rest in changes:
            if act not in ("merge", "put"):
                yield act, *rest
                continue
            granularity = checked_granularity(rest[1])
            gathered = self._gathered.get(number)
            if gathered is None and self._tracker.size:
                raise BitmapError(WHERE, f"the bits of '{printable(str(rest[0]))}' were not told")
            bitmap = Bitmap(self._tracker.size, granularity) if gathered is None else gathered.bitmap()
            if (bitmap.size, bitmap.granularity) != (self._tracker.size, granularity):
                raise BitmapError(WHERE, f"bits of a disk of {bitmap.size} bytes, at {bitmap.granularity}, were told")
            yield act, *(rest[:1] if act == "merge" else rest), bitmap
            number += 1

    def _drop_gathered(self) -> None:
        for gathered in self._gathered.values():
            gathered.close()
        self._gathered.clear()
