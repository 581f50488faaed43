"""`Handle`: what `open` returns: the bitmaps of an image or device, wherever they are now.

A qcow2 image's bitmaps move into a store while the image is tracked, and back. So what a handle has open, its backend,
is opened anew when its bitmaps have moved; whoever uses the handle does not see that.
"""

from __future__ import annotations

import contextlib
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self, SupportsIndex, TypeVar

from dirtmap.engine.host.kind import Address, Kind, KindPort, Tracking
from dirtmap.engine.model.namespace import Namespace
from dirtmap.fmt.errors import Error, LockedError, MovedError

if TYPE_CHECKING:
    from dirtmap.engine.model.bitmap import Bitmap
    from dirtmap.engine.model.infos import Disk, ImageInfo, Recovery, Status
    from dirtmap.engine.model.transaction import Transaction
    from dirtmap.engine.tracking.tracker import Tracker

T = TypeVar("T")


class Handle(Namespace):
    """The bitmaps of an image or device; see `Namespace`. Made by `Host.open`.

    Once it is closed, whatever would read or change raises an `Error` that says so, as does an iteration begun before,
    and it cannot be entered again. What it was is still told: its path, name, UUID and size. Blocks of a transaction or
    a hold that were begun before go on to their end, and so does a tracker.

    Args:
        host: that it belongs to.
        kind: of the container.
        address: of the image or device.
        force_share: read a qcow2 image although another process writes to it.
        closing: called when the handle is closed.
    """

    def __init__(
        self,
        host: KindPort,
        kind: Kind,
        address: Address,
        *,
        force_share: bool = False,
        closing: Callable[[], object] = lambda: None,
    ) -> None:
        self._host, self._kind, self._address, self._force_share = host, kind, address, force_share
        self._stack, self._closed = contextlib.ExitStack(), False
        self._closing = contextlib.ExitStack()
        self._open()
        self._closing.callback(closing)

    def _open(self) -> None:
        backend = self._kind.open(self._host, self._address, force_share=self._force_share)
        self._backend: Namespace | None = self._stack.enter_context(backend)
        self.path, self.format = self._backend.path, self._backend.format
        self.name, self.uuid = self._backend.name, self._backend.uuid
        self.size, self.cluster_size = self._backend.size, self._backend.cluster_size

    def _open_anew(self) -> None:
        self._backend = None  # where it cannot be opened now, the next question tries again
        self._stack.close()
        self._open()

    @property
    def _now(self) -> Namespace:
        if self._closed:
            raise Error(str(self._address), "is closed")
        if self._backend is None:
            self._open()
        assert self._backend is not None
        return self._backend

    def __enter__(self) -> Self:
        _ = self._now
        return self

    def __contains__(self, name: object) -> bool:
        _ = self._now  # also where the answer is known without it
        return super().__contains__(name)

    def __iter__(self) -> Iterator[str]:
        return self._checked(super().__iter__())

    def _checked(self, names: Iterator[str]) -> Iterator[str]:
        for name in names:
            _ = self._now
            yield name
        _ = self._now

    def _ask(self, question: Callable[[Namespace], T]) -> T:
        try:
            return question(self._now)
        except MovedError:
            self._open_anew()
            return question(self._now)

    @property
    def where(self) -> str:
        """How messages name it; see `Namespace.where`."""
        return self._now.where

    def info(self) -> ImageInfo:
        """The namespace and all its bitmaps, as of one moment; see `Namespace.info`."""
        return self._ask(lambda backend: backend.info())

    def doubt(self) -> str | None:
        """Why all bitmaps count as all dirty; see `Namespace.doubt`."""
        return self._ask(lambda backend: backend.doubt())

    def tracking(self) -> Status | None:
        """Who tracks the image; see `Namespace.tracking`."""
        return self._ask(lambda backend: backend.tracking())

    def disk(self) -> Disk:
        """Where the disk is that the bitmaps are about; of a device, its root's.

        Raises:
            BitmapNotFoundError: of a device: no store of the host has its root.
        """
        return self._ask(lambda backend: self._kind.disk(self._host, backend))

    def _names(self) -> list[bytes]:
        return self._ask(lambda backend: backend._names())

    def _load(self, name: bytes) -> Bitmap | None:
        return self._ask(lambda backend: backend._load(name))

    def recover_session(self) -> None:
        """Recovers what a tracker has left that died; see `Namespace.recover_session`."""
        self._ask(lambda backend: backend.recover_session())

    def recover(self, names: Iterable[str] = ()) -> list[Recovery]:
        """Makes bitmaps usable whose bits cannot be relied on; see `Namespace.recover`."""
        chosen = list(names)
        return self._ask(lambda backend: backend.recover(chosen))

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Changes the bitmaps; see `Namespace.transaction`.

        While the image is tracked, its tracker makes the changes. They are as of a cut at the beginning of the block:
        what is marked meanwhile stays, whatever is done to a bitmap. Where the tracker's own program changes bitmaps
        meanwhile, nothing is done, and a `LockedError` says so.
        """
        with contextlib.ExitStack() as stack:
            try:
                bitmaps = self._ask(lambda backend: stack.enter_context(backend.transaction()))
            except LockedError as error:
                if not self.is_tracked():
                    raise
                from dirtmap.engine.host import asking

                bitmaps = stack.enter_context(asking.transaction(self, error, self._host.locking.wait))
            yield bitmaps

    def is_tracked(self) -> bool:
        """Whether a tracker lives, through which bitmaps are changed."""
        status = self.tracking()
        return status is not None and status.kept

    def checkpoint(self, name: str, granularity: SupportsIndex | None = None) -> None:
        """Has the image's tracker begin a checkpoint; see `Tracker.checkpoint`.

        Raises:
            TypeError: the name is no text, or the granularity no integer. Errors as `save_tracked`, too.
        """
        from dirtmap.engine.host.instant import checkpoint

        chosen = None if granularity is None else operator.index(granularity)
        checkpoint([self], name, chosen, self._host.locking.wait)

    def rebuild(self, name: str, begun: str, differing: Bitmap) -> None:
        """Gives a checkpoint of a raw disk's node its content anew, after that was lost, in one commit.

        Somebody has compared the disk with what it was when the checkpoint began. Another checkpoint, the newest, was
        begun before that, and has what was written meanwhile; so the two together have all that has changed. The newer
        one is removed, and hands its content over as in `Tracker.remove`. The image's tracker is asked, if it has one.

        Args:
            name: of the checkpoint. If there is none any more, it takes the place of the newer one.
            begun: of the newer one.
            differing: where the disk was different, at the granularity that the checkpoint is to have.

        Raises:
            BitmapError: ``begun`` is not the newest checkpoint; or there is a bitmap ``name`` that is none.
            LockedError: its tracker has died, and others mark; who takes that over is not to end it here.
            As `track`, and as `save_tracked`.
        """
        status = self.tracking()
        if status is not None and status.alive:
            from dirtmap.engine.host import asking

            asking.rebuild(self, name, begun, differing)
            return
        with self.track(save_interval=0) as tracker:
            tracker.rebuild(name, begun, differing, namespace=self.uuid)

    def change_tracked(self, changes: Iterable[tuple[Any, ...]]) -> None:
        """Has the image's tracker make changes that need no bits; see `Tracker.change`.

        Raises:
            TypeError: one is none. Errors as `save_tracked`, too.
        """
        from dirtmap.engine.host import asking

        asking.change(self, changes)

    def save_tracked(self) -> None:
        """Has the image's tracker save; see `Tracker.save`.

        Raises:
            BitmapError: the image is not tracked.
            LockedError: its tracker cannot be asked from here.
            As `Tracker.save`.
        """
        from dirtmap.engine.host import asking

        with asking.asked(self) as talk:
            talk.ask("save", namespace=self.uuid)

    def stop_tracked(self) -> None:
        """Has the image's tracker end: see `Tracker.on_stop`.

        Raises:
            LockedError: it has not ended in the time for which the host waits. Errors as `save_tracked`, too.
        """
        from dirtmap.engine.host import asking

        asking.stop(self, self._host.locking.wait)

    @contextlib.contextmanager
    def hold(self, name: str, owner: str = "dirtmap") -> Iterator[Bitmap]:
        """Holds a bitmap for a backup; see `Namespace.hold`."""
        if self.is_tracked():
            with self.hold_all([name], owner) as held:
                yield held[name]
            return
        with self._opened(lambda backend: backend.hold(name, owner)) as bitmap:
            yield bitmap

    @contextlib.contextmanager
    def hold_all(self, names: Iterable[str], owner: str = "dirtmap") -> Iterator[Mapping[str, Bitmap]]:
        """Holds several bitmaps; see `Namespace.hold_all`. Those of a tracked image are of one cut."""
        chosen = list(names)
        with contextlib.ExitStack() as stack:
            if self.is_tracked():
                from dirtmap.engine.host import asking

                held = stack.enter_context(asking.hold_all(self, chosen, owner))
            else:
                held = stack.enter_context(self._opened(lambda backend: backend.hold_all(chosen, owner)))
            yield held

    @contextlib.contextmanager
    def _opened(self, begin: Callable[[Namespace], contextlib.AbstractContextManager[T]]) -> Iterator[T]:
        with contextlib.ExitStack() as stack:
            yield self._ask(lambda backend: stack.enter_context(begin(backend)))

    def track(
        self,
        *,
        live: str | os.PathLike[str] | None = None,
        intent: str = "region",
        region_size: SupportsIndex | None = None,
        save_interval: float = 60.0,
        store: str | os.PathLike[str] | None = None,
    ) -> Tracker:
        """Begins to track writes to the image: no other process changes its bitmaps until the tracker is closed.

        What an earlier tracker has left when it died is recovered first. But where other processes go on to mark in its
        session, with a `Marker`, the new tracker takes that over, with the options that it has; only ``save_interval``
        is a new one. Of a device: its root node is tracked with it, and the tracker's acts are about the device's
        bitmaps; but where the root takes over what a device's tracker has left, they are about the root's.

        Args:
            live: the folder for live files; on a tmpfs, or they do not survive what they are for at the speed they
                have. None, as a rule: ``$DIRTMAP_LIVE``, else ``/dev/shm``.
            intent: ``"region"``, as a rule: after a power loss dirty is what was saved and the regions of the disk
                written to since; ``"off"``: all, and no write waits for a log.
            region_size: bytes of each such region, a power of two from 1 MiB. None, as a rule: the smallest that
                divides the disk into 2048 regions at most.
            save_interval: seconds between saves; 0 for none but those asked for.
            store: of a qcow2 image only: the store that remembers the image's place, and keeps its bitmaps meanwhile.
                None, as a rule: the one that knows the image, else the default store.

        Raises:
            TypeError: an option is of another type.
            LockedError: the image is tracked, or in use, already; names by whom.
            BitmapError: the image has no name or identity, or its size has changed; or an option has no such value.
            StorageError: there is no room for the live files or the log.
        """
        from dirtmap.engine.tracking.options import Options
        from dirtmap.engine.tracking.tracker import Tracker

        options = Options(live=live, intent=intent, region_size=region_size, save_interval=save_interval)
        return self.track_with(Tracking(options, None if store is None else os.fspath(store), Tracker))

    def track_with(self, tracking: Tracking) -> Tracker:
        """Begins to track; see `Kind.track`."""
        if (session := self._now.tracking()) is not None:  # it has died, or settling refuses
            if session.alive and not session.kept:
                from dirtmap.engine.host.tracked import adopt

                return adopt(self._host, self._now, tracking)
            self._now.recover_session()
            self._open_anew()
        return self._kind.track(self._host, self._now, tracking)

    def recover_dead(self) -> None:
        """Recovers what a tracker that died has left, if any; see `TrackedRoot`."""
        if (session := self._now.tracking()) is None:
            return
        if session.alive:
            raise LockedError(self.where, session.refusal)
        self._now.recover_session()
        self._open_anew()

    def close(self) -> None:
        """Closes it; a tracker that it began goes on."""
        self._closed, self._backend = True, None
        self._stack.close()
        self._closing.close()

    def __repr__(self) -> str:
        return f"<Handle of {self._address}{', closed' if self._closed else ''}>"
