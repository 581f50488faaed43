"""Asks the tracker of an image from outside, for what only a tracker may do: see `dirtmap.engine.control`."""

from __future__ import annotations

import contextlib
import functools
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

from dirtmap.engine.control.client import Conversation
from dirtmap.engine.model import bits
from dirtmap.engine.model.bitmap import DEFAULT_GRANULARITY, Bitmap
from dirtmap.engine.model.infos import STOP
from dirtmap.engine.model.naming import label, not_found
from dirtmap.engine.model.transaction import Transaction
from dirtmap.engine.session import livefile
from dirtmap.engine.system.process import this_process
from dirtmap.fmt import geometry
from dirtmap.fmt.errors import BitmapError, Error, GoneError, LockedError, printable

if TYPE_CHECKING:
    from dirtmap.engine.model.bits import Words
    from dirtmap.engine.model.content import Content, Part
    from dirtmap.engine.model.infos import BitmapInfo
    from dirtmap.engine.model.namespace import Namespace

T = TypeVar("T")

_PAUSE_SECONDS: Final = 0.01
_RANGES: Final = 1 << 16  # in one message, which has some megabytes then
_SILENCE_SECONDS: Final = 5.0  # there are four signs of life a second


def asked(image: Namespace, refused: LockedError | None = None) -> Conversation:
    """A conversation with the tracker of an image.

    Args:
        image: the image.
        refused: what was said where it was tried to do without, which knows how the tracker can be told to have ended.

    Raises:
        LockedError: it cannot be reached from here, or has died while others mark.
        BitmapError: the image is not tracked.
    """
    status = image.tracking()
    if status is None or not status.alive:
        raise BitmapError(image.where, "is not tracked")
    if not status.kept:
        raise LockedError(image.where, status.refusal)
    said = (refused.what if refused else status.refusal).removesuffix(f"; {STOP}")  # no help where it cannot be asked
    return Conversation(image.where, said, status.live, lambda: _lives(status.live))


def _lives(folder: str) -> bool:
    """Whether the tracker with that live folder has given a sign of life just now. One that was stopped gives none."""
    seen = livefile.heartbeat(folder)
    return seen is not None and time.time() - seen / 1e9 < _SILENCE_SECONDS


def rebuild(image: Namespace, name: str, begun: str, differing: Bitmap) -> None:
    """Has the tracker of an image give a checkpoint its content anew; see `Handle.rebuild`."""
    with asked(image) as talk:
        said = {"namespace": image.uuid, "size": differing.size, "granularity": differing.granularity}
        for offsets, lengths in differing.extents_by_parts():
            for at in range(0, len(offsets), _RANGES):
                part = slice(at, at + _RANGES)
                talk.ask("differing", **said, offsets=offsets[part].tolist(), lengths=lengths[part].tolist())
        talk.ask("rebuild", **said, name=name, begun=begun)


def change(image: Namespace, changes: Iterable[Sequence[Any]]) -> None:
    """Has the tracker of an image make changes that need no bits; see `Handle.change_tracked`."""
    chosen = [_checked(each) for each in changes]
    with asked(image) as talk:
        talk.ask("change", namespace=image.uuid, changes=chosen)


def _checked(one: Sequence[Any]) -> Sequence[Any]:
    """A change as it is sent. Others than of these acts are for the tracker to refuse; see `Tracker.change`."""
    match one:
        case ["clear" | "disable" | "enable" | "remove", str()]:
            return one
        case ["rename", {**names}] if all(isinstance(name, str) for name in (*names, *names.values())):
            return one
        case ["add", str() as name, granularity, bool() as recording]:
            return "add", name, operator.index(granularity), recording
        case [str() as act, *_] if act not in ("add", "clear", "disable", "enable", "remove", "rename"):
            return one
    raise TypeError(f"no change to a bitmap: {one!r}")


def stop(image: Namespace, wait: float) -> None:
    """Has the tracker of an image end; see `Handle.stop`."""
    with asked(image) as talk:
        talk.ask("stop", namespace=image.uuid)
    deadline = time.monotonic() + wait
    while (status := image.tracking()) is not None:
        if time.monotonic() > deadline:
            raise LockedError(image.where, f"tracked by {status.tracker}, which has been asked to end, and has not yet")
        time.sleep(_PAUSE_SECONDS)


@contextlib.contextmanager
def hold_all(image: Namespace, names: Sequence[str], owner: str) -> Iterator[Mapping[str, Bitmap]]:
    """Has the tracker of an image hold bitmaps, as they are at one cut; see `Namespace.hold_all`."""
    if not names:
        yield {}
        return
    with asked(image) as talk:
        holder = f"'{printable(owner)}' ({this_process().address})"
        talk.ask("hold", namespace=image.uuid, names=names, owner=holder)
        held = _Held(image, talk, names)
        try:
            yield held
        finally:
            held.ended = True
            with contextlib.suppress(Error):  # a tracker that has ended holds nothing
                talk.ask("give", namespace=image.uuid)


class _Held(Mapping[str, Bitmap]):
    """The bitmaps that a tracker holds, as they were when it began to.

    Attributes:
        ended: it holds them no more.
    """

    def __init__(self, image: Namespace, talk: Conversation, names: Sequence[str]) -> None:
        self._image, self._talk, self._names = image, talk, tuple(dict.fromkeys(names))
        self._where, self._uuid = image.where, image.uuid  # a handle that is closed tells them no more
        self.ended = False

    def ask_for_data(self, act: str, **arguments: Any) -> tuple[Any, bytes]:
        """See `Conversation.ask_for_data`. An `Error` once the hold has ended."""
        if self.ended:
            raise Error(self._where, "the hold has ended")
        return self._talk.ask_for_data(act, namespace=self._uuid, **arguments)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # without a question

    def __getitem__(self, name: str) -> Bitmap:
        if name not in self._names:
            raise not_found(self._image.where, name)
        found, _ = self.ask_for_data("held", name=name)
        size, granularity, recording = int(found["size"]), int(found["granularity"]), bool(found["recording"])
        if size != self._image.size:
            raise LockedError(self._image.where, f"has grown meanwhile, to {size} bytes")
        there = _HeldBits(self._image, self, name, geometry.granules(size, granularity))
        bitmap = Bitmap._of(size, granularity, there, recording).freeze()
        bitmap.busy = True
        return bitmap

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _HeldBits:
    """The bits of a bitmap that a tracker holds, which is asked for each part: a `Content`."""

    def __init__(self, image: Namespace, held: _Held, name: str, nbits: int) -> None:
        self.nbits, self._image, self._held, self._name = nbits, image, held, name

    def part(self, first: int, end: int) -> Part:
        """See `Content.part`."""
        import numpy as np

        from dirtmap.engine.model.content import BLOCK, joined

        if end - first > BLOCK:  # more than a message has
            return joined(self, first, end)
        found, octets = self._held.ask_for_data("held part", name=self._name, first=first, end=end)
        if not octets:
            return bool(found)
        words = np.frombuffer(octets, bits.WORD)
        if len(words) != geometry.ceil_div(end - first, 64):
            raise LockedError(self._image.where, "its tracker told other bits than it was asked for")
        return words


@contextlib.contextmanager
def transaction(image: Namespace, refused: LockedError, wait: float) -> Iterator[Transaction]:
    """Changes the bitmaps of an image through its tracker; see `Namespace.transaction`.

    They are as of a cut at the beginning of the block. What is marked meanwhile stays, whatever is done to a bitmap.

    Args:
        image: the image.
        refused: what was said where it was tried to do without; see `asked`.
        wait: seconds to wait for somebody else who changes them.
    """
    with asked(image, refused) as talk:
        holders = _begin(image, talk, wait)
        info = image.info()
        sources = {each.name: _Unread(image, each) for each in info.bitmaps}
        before = {each.name: _lazy(image, each, sources[each.name]) for each in info.bitmaps}
        held = {each.name: holders.get(each.name, "its tracker") for each in info.bitmaps if each.busy}
        bitmaps = Transaction(
            image.where,
            image.size,
            DEFAULT_GRANULARITY,
            {name: bitmap.replace() for name, bitmap in before.items()},
            held,
            info.checkpoints,
        )
        try:
            yield bitmaps
            bitmaps.validate()
            changes, changed = _changes(before, bitmaps, info.checkpoints)
            for number, bitmap in enumerate(changed):
                _tell(image, talk, number, bitmap)
        finally:
            bitmaps.close()
            for source in sources.values():
                source.ended = True
        if changes:
            talk.ask("change", namespace=image.uuid, changes=changes)


def _tell(image: Namespace, talk: Conversation, number: int, bitmap: Bitmap) -> None:
    """Tells the tracker the bits of a bitmap, before the change that it is for: of a clean one, that the first are."""
    from dirtmap.engine.model.content import blocks

    def tell(first: int, end: int, data: bytes) -> None:
        said = {"number": number, "granularity": bitmap.granularity, "first": first, "end": end}
        talk.ask_for_data("bits", data, namespace=image.uuid, **said)

    content = bitmap._parts()
    if content.nbits:
        tell(0, min(64, content.nbits), bytes(8))
    for first, end, part in blocks(content):
        if part is not False:
            tell(first, end, b"" if isinstance(part, bool) else part.tobytes())


def _begin(image: Namespace, talk: Conversation, wait: float) -> Mapping[str, str]:
    """Begins changes, as soon as nobody else is about to make some; returns who holds which bitmaps."""
    me = str(this_process())
    try:
        answer = in_turn(lambda: talk.ask("begin", namespace=image.uuid, owner=me), wait)
    except GoneError:
        raise
    except LockedError as error:
        raise LockedError(image.where, error.what.replace(me, "this very process")) from None
    return dict(answer["held"]) if answer else {}  # an older tracker answers nothing


def in_turn(act: Callable[[], T], wait: float) -> T:
    """Does what one can do at a time, as soon as nobody else does it.

    Args:
        act: what is done; raises a `LockedError` where somebody else does it.
        wait: seconds.

    Raises:
        LockedError: somebody else does it still.
        GoneError: a session is lost, for which no waiting helps.
    """
    deadline = time.monotonic() + wait
    while True:
        try:
            return act()
        except GoneError:
            raise
        except LockedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE_SECONDS)


class _Unread:
    """Where a bitmap of a transaction has its bits: they are read once, when somebody looks at them; see `Source`."""

    uniform = None

    def __init__(self, image: Namespace, told: BitmapInfo) -> None:
        self._image, self._told, self._where = image, told, image.where
        self._bitmap: Bitmap | None = None
        self.damage: str | None = None
        self.ended = False

    def _read(self) -> Bitmap:
        if self.ended:
            raise Error(self._where, "the transaction has ended")
        if self._bitmap is None:
            found = self._image[self._told.name]
            if found.granularity != self._told.granularity:
                raise LockedError(self._where, "its bitmaps were changed meanwhile; try again")
            self._bitmap, self.damage = found, found.damage
        return self._bitmap

    def load(self) -> Words:
        """Reads the bits."""
        return self._read().words.copy()

    def open(self) -> Content:
        """The bits, in parts."""
        return self._read()._parts(lasting=True)


def _lazy(image: Namespace, told: BitmapInfo, source: _Unread) -> Bitmap:
    return Bitmap._lazy(image.size, told.granularity, told.recording, told.inconsistent, source)


def _changes(
    before: Mapping[str, Bitmap], bitmaps: Transaction, chain: Sequence[str]
) -> tuple[list[tuple[Any, ...]], list[Bitmap]]:
    """What a transaction has changed, as `Tracker.change` has it, but for the bitmaps; and these, in their order."""
    kept = set(bitmaps.origins.values())
    changes: list[tuple[Any, ...]] = [("remove", name) for name in before if name not in kept]
    changed: list[Bitmap] = []
    # A checkpoint that is removed leaves its bits to the one before it, which the tracker sees to.
    left: dict[str, list[Bitmap]] = {}
    heir = ""
    for name in chain:
        if name in kept:
            heir = name
        elif name in before and not before[name].inconsistent:
            left.setdefault(heir, []).append(before[name])
    if renamed := {origin: name for name, origin in bitmaps.origins.items() if name != origin}:
        changes.append(("rename", renamed))

    def put(name: str, bitmap: Bitmap) -> None:
        changes.append(("put", name, bitmap.granularity, bitmap.recording))
        changed.append(bitmap.required(f"{bitmaps.where}: {label(name)}"))

    for name, now in bitmaps.items():
        was = before.get(bitmaps.origins.get(name, ""))
        if was is None:
            if name in bitmaps.fresh and not now.count:
                changes.append(("add", name, now.granularity, now.recording))
            else:
                put(name, now)
            continue
        if now.inconsistent:
            if not was.inconsistent:
                now.required(f"{bitmaps.where}: {label(name)}")  # raises
            continue
        if was.inconsistent or now.granularity != was.granularity:
            put(name, now)
            continue
        if now._source is not was._source:
            if (was - now).count:
                if now.count:
                    put(name, now)
                    continue
                changes.append(("clear", name))
            elif (now - functools.reduce(operator.or_, left.get(name, []), was)).count:
                changes.append(("merge", name, now.granularity))
                changed.append(now - was)
        if now.recording != was.recording and name not in chain:
            changes.append(("enable" if now.recording else "disable", name))
    return changes, changed
