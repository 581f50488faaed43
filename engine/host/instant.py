"""`instant`: an instant of several tracked disks, at which they are cut and cloned by whoever asks their trackers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from dirtmap.engine.control import wire
from dirtmap.engine.host.asking import ask_in_turn, asked
from dirtmap.engine.identity import identity_of
from dirtmap.fmt.errors import ArgumentError, BitmapError, Error, LockedError, printable

if TYPE_CHECKING:
    from dirtmap.engine.control.client import Conversation
    from dirtmap.engine.model.namespace import Namespace
    from dirtmap.engine.system.clone import Clone


class Instant:
    """A time during which nothing is written to some tracked disks, in any process; see `Host.instant`."""

    def __init__(self, talks: dict[str | None, Conversation], wait: float) -> None:
        self._talks, self._wait = talks, wait
        self._places: dict[Conversation, object] = {}  # of those whose gate is closed, which file is tracked
        self._made: list[tuple[Namespace, str]] = []

    def checkpoint(self, image: Namespace, name: str, granularity: int | None = None) -> None:
        """Begins a checkpoint of one of the disks. If the instant comes to nothing, it is removed again.

        Args:
            image: of whom the bitmaps are.
            name: of the checkpoint.
            granularity: in bytes; None for the usual one.

        Raises:
            BitmapError: the name is taken.
            StorageError: it could not be written.
        """
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

    def _close(self, image: Namespace) -> None:
        talk = self._talks[image.uuid]
        if talk in self._places:
            return
        try:
            self._places[talk] = ask_in_turn(image, talk, self._wait, "close")
        except LockedError:
            raise LockedError(image.where, "somebody else makes a checkpoint or a clone of it; try again") from None

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
        wait: seconds to wait for somebody else who has closed one.
    """
    chosen = list(images)
    with contextlib.ExitStack() as stack:
        talks: dict[str | None, Conversation] = {}
        trackers: dict[str, Conversation] = {}  # by folder: a device and its root have one, with one gate
        for image in chosen:
            if image.uuid in talks:
                raise ArgumentError(image.where, "is named twice")
            talk = stack.enter_context(asked(image))
            talks[image.uuid] = trackers.setdefault(talk.folder, talk)
        # In an order that is the same for all, so that no two wait for each other.
        chosen.sort(key=lambda image: talks[image.uuid].folder)
        here = Instant(talks, wait)
        try:
            for image in chosen:
                here._close(image)
            yield here
            for image in chosen:
                here._open(image)
        except BaseException:
            here._undo()
            raise


def checkpoint(images: Sequence[Namespace], name: str, granularity: int | None, wait: float) -> None:
    """Makes a checkpoint of several disks, at one instant; see `Host.checkpoint`, and `instant` for ``wait``."""
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
