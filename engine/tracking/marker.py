"""`Marker`: marks from another process than the tracker's."""

from __future__ import annotations

import os
import threading
import weakref
from types import TracebackType
from typing import Self

from dirtmap.engine.session import livefile, verdict
from dirtmap.engine.system.file import open_file
from dirtmap.engine.tracking.kernel import Marking
from dirtmap.fmt.errors import Error, GoneError, StorageError, SyncError
from dirtmap.fmt.parsers.live import LOG


class Marker(Marking):
    """Marks in the session of a tracker, from any process of this machine that may write to its live files.

    `mark`, `mark_many`, `begin`, `end` and `write` are those of the `Tracker`; a cut waits for the writes of all
    processes. Where this process dies, what it has in flight is dirty in the interval before the next cut and in that
    after it. Where the tracker dies, this goes on: `Handle.track` takes the session over meanwhile.

    Args:
        folder: of the live files: `Tracker.live`, or `Status.live` of the tracked image.

    Raises:
        GoneError: nobody marks in that session any more.
        StorageError: there are no live files, or they or the log cannot be used.
        UnsupportedError: the live files are of another version or machine.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        path = os.path.abspath(os.fspath(folder))
        log_path = livefile.log_path(path)
        super().__init__(path, path, None)
        try:
            self._log = open_file(log_path, writable=True)
            try:
                if self._log.read(LOG.field("uuid").offset, 16) != self.uuid:  # the next session's, at the same path
                    raise GoneError(path, "this session has ended")
                self.log_file = self._log
            except BaseException:
                self._log.close()
                raise
        except BaseException:
            self.leave(at_once=True)
            raise
        self._ended = threading.Event()
        threading.Thread(
            target=_give_signs, args=(weakref.ref(self), self._ended), name="dirtmap marker", daemon=True
        ).start()

    def close(self) -> None:
        """Ends it. What is in flight can still be ended, and counts until then."""
        self._ended.set()
        with self.guard:
            self.failure = self.failure or StorageError(self.where, "the marker is closed")
            self.leave(at_once=False)
            self._log.close()

    def _sign(self) -> None:
        """Gives a sign of life, where there is no tracker that does."""
        with self.guard:
            if self.failure is None:
                self.live_on()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def _give_signs(marker: weakref.ref[Marker], ended: threading.Event) -> None:
    """Sees to it that a tracker's death makes nothing dirty while a marker goes on."""
    while not ended.wait(verdict.HEARTBEAT_SECONDS):
        if (one := marker()) is None:
            return
        try:
            one._sign()
        except SyncError as error:
            one.poison(error)
            return
        except Error:
            pass  # the next one may succeed
        del one
