"""`serve`: tracks a disk, and has nbdkit serve it and mark what its clients write."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, Self

import dirtmap.engine as dm
from dirtmap.fmt.errors import Error, LockedError, UnsupportedError
from dirtmap.tools.serve.building import built_filter, nbdkit_version
from dirtmap.tools.serve.nbdkit import Nbdkit, Session

if TYPE_CHECKING:
    from dirtmap.engine import Handle, Host, Tracker
    from dirtmap.tools.listening.listener import Listener

_MOMENT_SECONDS: Final = 0.2


class Serving:
    """A disk while it is served.

    Attributes:
        uri: for NBD clients.
        size: of the disk, in bytes.
        live: the folder of the session's live files; None where it is served read-only.
        notes: what a user should know although it is served, one line each.
        tracker: of the disk; None where it is served read-only.
    """

    def __init__(
        self, handle: Handle, nbdkit: Nbdkit, live: str | None, tracker: Tracker | None, notes: list[str]
    ) -> None:
        self.uri, self.size, self.live, self.tracker, self.notes = nbdkit.uri, handle.size, live, tracker, tuple(notes)
        self._nbdkit = nbdkit
        self._asked = os.eventfd(0, os.EFD_CLOEXEC)
        if tracker is not None:
            tracker.on_stop = self.stop

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._asked)

    def stop(self) -> None:
        """Lets `wait` return. Any thread may call it, and a signal's handler."""
        os.eventfd_write(self._asked, 1)

    def wait(self) -> None:
        """Waits until `stop` is called; also by somebody who asks for it with ``dirtmap track stop``.

        Raises:
            Error: nbdkit has ended by itself.
        """
        poll = select.poll()
        poll.register(self._nbdkit, select.POLLIN)
        poll.register(self._asked, select.POLLIN)
        poll.poll()
        self.require_running()

    def require_running(self) -> None:
        """Refuses to call it served where nbdkit has ended by itself. Errors as `wait`."""
        self._nbdkit.require_running()


@contextlib.contextmanager
def serve(
    host: Host, target: str, listener: Listener, *, read_only: bool = False, arguments: Sequence[str] = ()
) -> Iterator[Serving]:
    """Serves a raw disk over NBD until the end of the block, and tracks it: what clients write is marked.

    nbdkit does the serving. It outlives this process, if that dies: clients go on, and what they write is still marked,
    until somebody adopts it. At the end of the block it is ended, then the tracker is closed.

    Args:
        host: opens the target.
        target: a node or a device with a raw disk. Its size cannot change while it is served.
        listener: where to serve it.
        read_only: no client can write; nothing is tracked, and the disk is kept offline: see `Host.offline`.
        arguments: further ones of nbdkit.

    Raises:
        UnsupportedError: the target is a qcow2 image.
        LockedError: somebody tracks the disk, serves it or has it open.
        Error: the filter cannot be built, or nbdkit did not start.
        As `Handle.track`.
    """
    with contextlib.ExitStack() as stack:
        handle = stack.enter_context(host.open(target))
        disk = handle.disk()
        if disk.format != "raw":
            what = "a qcow2 image, whose bitmaps QEMU keeps by itself: qemu-nbd serves it"
            raise UnsupportedError(handle.where, what)
        notes, status = [], handle.tracking()
        if status is not None and status.alive:
            raise LockedError(handle.where, status.refusal)
        stack.enter_context(listener.reserved())
        tracker, session = None, None
        if read_only:
            nbdkit_version()
            stack.enter_context(host.offline(disk))
        else:
            built = built_filter()
            locks = stack.enter_context(host.lent(disk))
            tracker = stack.enter_context(handle.track())
            if status is not None:
                notes.append(f"recovered first: {status.how}")
            begun = handle.tracking()
            assert begun is not None
            session = Session(built, begun.live, locks)
        if doubt := handle.doubt():
            notes.append(f"its bitmaps count as all dirty: {doubt}")
        nbdkit = stack.enter_context(Nbdkit.start(listener, disk, session, arguments))
        live = None if session is None else session.live
        if tracker is not None:
            stack.callback(_end, nbdkit, tracker)
        yield stack.enter_context(Serving(handle, nbdkit, live, tracker, notes))


@contextlib.contextmanager
def adopt(host: Host, target: str) -> Iterator[Serving]:
    """Takes over a disk that nbdkit serves, and whose tracker has died; goes on as `serve` does.

    Args:
        host: opens the target.
        target: the node or the device.

    Raises:
        LockedError: its tracker lives.
        Error: nobody serves it, as far as can be seen.
        As `Handle.track`.
    """
    with contextlib.ExitStack() as stack:
        handle = stack.enter_context(host.open(target))
        status = handle.tracking()
        if status is not None and status.kept:
            raise LockedError(handle.where, f"tracked by {status.tracker}; there is nothing to adopt")
        found = Nbdkit.find(status.live) if status is not None and status.alive else None
        if status is None or found is None:
            marked = status is not None and status.alive
            what = "others mark, and Handle.track takes it over" if marked else "'dirtmap serve' begins anew"
            raise Error(handle.where, f"no nbdkit that can be seen here serves it; {what}")
        with contextlib.ExitStack() as undo:
            undo.callback(found.release)  # it goes on where it is not adopted
            tracker = stack.enter_context(handle.track())
            undo.pop_all()
        nbdkit = stack.enter_context(found)
        stack.callback(_end, nbdkit, tracker)
        yield stack.enter_context(Serving(handle, nbdkit, status.live, tracker, []))


def _end(nbdkit: Nbdkit, tracker: Tracker) -> None:
    """Ends nbdkit, which waits for its clients to hang up: so it is killed, while no write is in flight."""
    nbdkit.send_signal(signal.SIGTERM)
    if not nbdkit.has_ended(_MOMENT_SECONDS):
        with contextlib.suppress(Error), dm.gate(tracker):
            nbdkit.send_signal(signal.SIGKILL)
