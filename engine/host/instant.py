"""`instant`: an instant of several tracked disks, at which they are cut and cloned by whoever asks their trackers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from dirtmap.engine.control import wire
from dirtmap.engine.host.asking import asked, in_turn
from dirtmap.engine.identity import identity_of
from dirtmap.fmt.errors import ArgumentError, BitmapError, Error, GoneError, LockedError, StorageError, printable

if TYPE_CHECKING:
    from dirtmap.engine.control.client import Conversation
    from dirtmap.engine.model.namespace import Namespace
    from dirtmap.engine.system.clone import Clone


class Instant:
    """A time during which nothing is written to some tracked disks, in any process; see `Host.instant`."""

    def __init__(self, talks: dict[str | None, Conversation]) -> None:
        self._talks = talks
        self._places: dict[Conversation, object] = {}  # of those whose gate is closed, which file is tracked
        self._made: list[tuple[Namespace, str]] = []

    def checkpoint(self, image: Namespace, name: str, granularity: int | None = None) -> None:
        """Begins a checkpoint of one of the disks. If the instant comes to nothing, it is removed again.

        Args:
            image: of whom the bitmaps are.
            name: of the checkpoint.
            granularity: in bytes; None for the usual one.

        Raises:
            TypeError: the name is no text.
            BitmapError: the name is taken.
            StorageError: it could not be written.
        """
        _require_text(name)
        self._ask(image, "checkpoint", name=name, granularity=granularity)
        self._made.append((image, name))

    def clone(self, image: Namespace, into: Clone) -> None:
        """Clones the file of one of the disks.

        Args:
            image: a raw disk.
            into: a clone of its file, that is prepared.

        Raises:
            LockedError: as `require_file`; or it does not have the size of the disk.
            StorageError: it cannot be cloned.
        """
        self.require_file(image, f"/proc/self/fd/{into.source}")
        into.take()
        if into.size() != image.size:
            raise LockedError(image.where, f"has another size by now, {into.size()} bytes")

    def require_file(self, image: Namespace, path: str) -> None:
        """Refuses to read a file, or a block device, that is not the disk: its path may lead elsewhere by now.

        Raises:
            LockedError: it is not the one that is tracked.
        """
        if wire.spelled(identity_of(path).place) != self._places[self._talks[image.uuid]]:
            raise LockedError(image.where, "what is at the disk's path is not what its tracker tracks")

    def _ask(self, image: Namespace, act: str, **arguments: object) -> object:
        answer: object = self._talks[image.uuid].ask(act, namespace=image.uuid, **arguments)
        return answer

    def _close(self, images: Sequence[Namespace]) -> None:
        """Closes all gates, or none: guests go on writing to the other disks as long as somebody else has one."""
        for at, image in enumerate(images):
            talk = self._talks[image.uuid]
            if talk in self._places:
                continue
            try:
                self._places[talk] = talk.ask("close", namespace=image.uuid)
            except GoneError:
                raise
            except LockedError:
                for other in images[:at]:
                    with contextlib.suppress(StorageError):  # nothing was done while it was closed
                        self._open(other)
                self._places.clear()
                what = "somebody else is making a checkpoint or a clone of it; try again"
                raise LockedError(image.where, what) from None

    def _open(self, image: Namespace) -> None:
        self._ask(image, "open")

    def _undo(self) -> None:
        for image, name in self._made:  # the checkpoint before it takes over what it has
            with contextlib.suppress(Error):
                self._ask(image, "change", changes=[("remove", name)])


@contextlib.contextmanager
def instant(images: Iterable[Namespace], wait: float) -> Iterator[Instant]:
    """Has the trackers of several disks close their gates until the end of the block; see `Host.instant`.

    Args:
        images: each of another namespace.
        wait: seconds to wait for others who have closed one, in all.
    """
    chosen = list(images)
    with contextlib.ExitStack() as stack:
        talks: dict[str | None, Conversation] = {}
        trackers: dict[str, Conversation] = {}  # by folder: a device and its root have one, with one gate
        for image in chosen:
            if image.uuid in talks:
                raise ArgumentError(image.where, "is named twice")
            talk = asked(image)
            if talk.folder in trackers:
                talk.close()
            else:
                trackers[talk.folder] = stack.enter_context(talk)
                # Who has asked for nothing yet is sent away soon, say while it is waited for another one's gate.
                talk.ask("open", namespace=image.uuid)
            talks[image.uuid] = trackers[talk.folder]
        # In an order that is the same for all, so that no two wait for each other.
        chosen.sort(key=lambda image: talks[image.uuid].folder)
        here = Instant(talks)
        try:
            in_turn(lambda: here._close(chosen), wait)
            yield here
            for image in chosen:
                here._open(image)
        except BaseException:
            here._undo()
            raise


def checkpoint(images: Sequence[Namespace], name: str, granularity: int | None, wait: float) -> None:
    """Makes a checkpoint of several disks, at one instant; see `Host.checkpoint`, and `instant` for ``wait``."""
    _require_text(name)
    for image in images:
        if name in image:
            raise BitmapError(f"{image.where}: bitmap '{printable(name)}'", "the name is taken")
    if len(images) == 1:
        (image,) = images
        with asked(image) as talk:
            talk.ask("checkpoint", namespace=image.uuid, name=name, granularity=granularity)
        return
    with instant(images, wait) as here:
        for image in images:
            here.checkpoint(image, name, granularity)


def _require_text(name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"a checkpoint's name is text, and not {name!r}")
