"""Asks the tracker of an image from outside, for what only a tracker may do: see `dirtmap.engine.control`."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from dirtmap.engine.control.client import Conversation
from dirtmap.engine.model.bitmap import DEFAULT_GRANULARITY, Bitmap
from dirtmap.engine.model.naming import not_found
from dirtmap.engine.model.transaction import Transaction
from dirtmap.fmt.errors import BitmapError, Error, LockedError

if TYPE_CHECKING:
    from dirtmap.engine.model.infos import Status
    from dirtmap.engine.model.namespace import Namespace

_PAUSE_SECONDS: Final = 0.01
_RANGES: Final = 1 << 16  # in one message, which has some megabytes then


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
    tracker = _named(image, status)
    return Conversation(image.where, refused.what if refused else f"tracked by {tracker}", status.live)


def _named(image: Namespace, status: Status) -> str:
    if not status.kept:
        raise LockedError(image.where, "its tracker has died, and others mark; track it to take it over")
    return status.tracker


def rebuild(image: Namespace, name: str, begun: str, differing: Bitmap) -> None:
    """Has the tracker of an image give a checkpoint its content anew; see `Handle.rebuild`."""
    with asked(image) as talk:
        said = {"namespace": image.uuid, "granularity": differing.granularity}
        for offsets, lengths in differing.extents_by_parts():
            for at in range(0, len(offsets), _RANGES):
                part = slice(at, at + _RANGES)
                talk.ask("differing", **said, offsets=offsets[part].tolist(), lengths=lengths[part].tolist())
        talk.ask("rebuild", **said, name=name, begun=begun)


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
        talk.ask("hold", namespace=image.uuid, names=names, owner=owner)
        try:
            yield _Held(image, talk, names)
        finally:
            with contextlib.suppress(Error):  # a tracker that has ended holds nothing
                talk.ask("give", namespace=image.uuid)


class _Held(Mapping[str, Bitmap]):
    """The bitmaps that a tracker holds, as they were when it began to."""

    def __init__(self, image: Namespace, talk: Conversation, names: Sequence[str]) -> None:
        self._image, self._talk, self._names = image, talk, tuple(dict.fromkeys(names))

    def __getitem__(self, name: str) -> Bitmap:
        if name not in self._names:
            raise not_found(self._image.where, name)
        found, octets = self._talk.ask_for_data("held", namespace=self._image.uuid, name=name)
        size, granularity, recording = int(found["size"]), int(found["granularity"]), bool(found["recording"])
        if size != self._image.size:
            raise LockedError(self._image.where, f"has grown meanwhile, to {size} bytes")
        return Bitmap.from_packed(size, granularity, octets, recording=recording).freeze()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@contextlib.contextmanager
def transaction(image: Namespace, refused: LockedError) -> Iterator[Transaction]:
    """Changes the bitmaps of an image through its tracker, at one cut; see `Namespace.transaction`.

    Args:
        image: the image.
        refused: raised for changes that no tracker makes.
    """
    with asked(image, refused) as talk:
        before = {name: image[name] for name in image}
        chain = image.info().checkpoints
        copies = {name: bitmap.copy() for name, bitmap in before.items()}
        bitmaps = Transaction(image.where, image.size, DEFAULT_GRANULARITY, copies, checkpoints=chain)
        try:
            yield bitmaps
            bitmaps.validate()
            changes = _changes(before, bitmaps, chain, refused)
        finally:
            bitmaps.close()
        if changes:
            talk.ask("change", namespace=image.uuid, changes=changes)


def _changes(
    before: dict[str, Bitmap], bitmaps: Transaction, chain: Sequence[str], refused: LockedError
) -> list[tuple[Any, ...]]:
    """What a transaction has changed, as `Tracker.change` has it."""
    kept = set(bitmaps.origins.values())
    gone = [name for name in before if name not in kept]
    changes: list[tuple[Any, ...]] = [("remove", name) for name in gone]
    # A checkpoint that is removed leaves its bits to the one before it, which the tracker sees to.
    heirs = {older for older, newer in itertools.pairwise(chain) if newer in gone}
    for name, now in bitmaps.items():
        origin = bitmaps.origins.get(name)
        if origin is None:
            if now.count or name not in bitmaps.fresh:  # a copy would lack what is written meanwhile
                raise refused
            changes.append(("add", name, now.granularity, now.recording))
            continue
        was = before[origin]
        if origin != name or now.granularity != was.granularity or now.inconsistent != was.inconsistent:
            raise refused
        if now.inconsistent or name in heirs:
            continue
        if now.count != was.count or now.packed() != was.packed():
            if now.count:
                raise refused
            changes.append(("clear", name))
        if now.recording != was.recording:
            changes.append(("enable" if now.recording else "disable", name))
    return changes
