"""Asks the tracker of an image from outside, for what only a tracker may do: see `dirtmap.engine.control`."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from dirtmap.engine.control.client import Conversation
from dirtmap.engine.model.bitmap import DEFAULT_GRANULARITY, Bitmap
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


def checkpoint(images: Sequence[Namespace], name: str, granularity: int | None) -> None:
    """Makes a checkpoint of several disks, at one instant; see `Host.checkpoint`."""
    chosen = sorted(images, key=lambda image: image.uuid or "")
    with contextlib.ExitStack() as stack:
        talks = [(stack.enter_context(asked(image)), image.uuid) for image in chosen]
        for image in chosen:
            if name in image:
                raise BitmapError(f"{image.where}: bitmap '{name}'", "the name is taken")
        if len(talks) == 1:
            talks[0][0].ask("checkpoint", namespace=talks[0][1], name=name, granularity=granularity)
            return
        done = []
        try:
            for talk, uuid in talks:
                talk.ask("close", namespace=uuid)
            for talk, uuid in talks:
                talk.ask("checkpoint", namespace=uuid, name=name, granularity=granularity)
                done.append((talk, uuid))
            for talk, uuid in talks:
                talk.ask("open", namespace=uuid)
        except BaseException:
            for talk, uuid in done:  # the one before takes over what they have
                with contextlib.suppress(Error):
                    talk.ask("change", namespace=uuid, changes=[("remove", name)])
            raise


def rebuild(image: Namespace, name: str, begun: str, differing: Bitmap) -> None:
    """Has the tracker of an image give a checkpoint its content anew; see `Handle.rebuild`."""
    with asked(image) as talk:
        said = {"namespace": image.uuid, "size": differing.size, "granularity": differing.granularity}
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
def hold(image: Namespace, name: str) -> Iterator[Bitmap]:
    """Has the tracker of an image hold a bitmap; see `Namespace.hold`."""
    with asked(image) as talk:
        found, octets = talk.ask_for_data("take", namespace=image.uuid, name=name)
        granularity, recording = int(found["granularity"]), bool(found["recording"])
        try:
            yield Bitmap.from_packed(image.size, granularity, octets, recording=recording).freeze()
        finally:
            with contextlib.suppress(Error):  # a tracker that has ended holds nothing
                talk.ask("give", namespace=image.uuid)


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
