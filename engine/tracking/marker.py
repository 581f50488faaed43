"""`Marker`: marks from another process than the tracker's."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Self

from dirtmap.engine.session import livefile
from dirtmap.engine.system.file import open_file
from dirtmap.engine.tracking.kernel import Marking


class Marker(Marking):
    """Marks in the session of a tracker, from any process of this machine that may write to its live files.

    `mark`, `mark_many`, `begin`, `end` and `write` are those of the `Tracker`; a cut waits for the writes of all
    processes. Where this process dies, what it has in flight is dirty in the interval before the next cut and in that
    after it. Where the tracker dies, this goes on: `Handle.track` takes the session over meanwhile.

    Args:
        folder: of the live files, as `Status.live` of the tracked image tells it.

    Raises:
        GoneError: nobody marks in that session any more.
        StorageError: there are no live files, or they or the log cannot be used.
        UnsupportedError: the live files are of another version or machine.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        path = os.path.abspath(os.fspath(folder))
        self._log = open_file(livefile.log_path(path), writable=True)
        try:
            super().__init__(path, path, self._log)
        except BaseException:
            self._log.close()
            raise

    def close(self) -> None:
        """Ends it. What is in flight then counts as that of a process that has died."""
        self.leave()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()
