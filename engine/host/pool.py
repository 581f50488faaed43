"""`Pool`: stores that stay open, each believed while its header copies are byte for byte the same."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dirtmap.engine.storefile.file import Store
from dirtmap.engine.system.locks import Locking

_MOST = 32  # stores that stay open while nobody uses them


@dataclass(eq=False, slots=True)
class _Kept:
    """A store that stays open.

    Attributes:
        store: the store.
        believed: its header copies when it was last checked; None: not checked yet.
        users: blocks that use it now.
    """

    store: Store
    believed: bytes | None = None
    users: int = 0


class Pool:
    """Open stores, by absolute path and the name that messages give them.

    Threads may share it; a forked child begins with an empty one. A store whose path leads to another file by now, as
    after a compaction, is opened anew.

    Args:
        after_commit: the hook of each store that it opens; see `Store`.
        locking: how to take their locks.
    """

    def __init__(self, after_commit: Callable[[Store], object], locking: Locking) -> None:
        self._after_commit, self._locking = after_commit, locking
        self._kept: dict[tuple[str, str], _Kept] = {}  # the one used last is the last
        self._process, self._closed = os.getpid(), False
        self._guard = threading.Lock()

    @contextlib.contextmanager
    def using(self, path: str, name: str, check: Callable[[Store], object]) -> Iterator[Store]:
        """A store, open for the time of the block at least.

        Args:
            path: of the store, absolute.
            name: what messages call it.
            check: called with a store that was opened just now, or whose headers have changed since it was called last;
                what it raises keeps the store from being used.

        Raises:
            As `Store`, and as ``check``.
        """
        key = path, name
        kept = self._take(key)
        try:
            headers = kept.store.headers()
            if headers is None:
                self._forget(key, kept)
                self._give_back(kept)
                kept = self._take(key)
                headers = kept.store.headers()
            if headers is None or headers != kept.believed:
                check(kept.store)
                kept.believed = headers  # as they were before: what was committed since is checked next time
            yield kept.store
        finally:
            self._give_back(kept)

    def _take(self, key: tuple[str, str]) -> _Kept:
        with self._guard:
            if self._process != os.getpid():
                self._process, self._kept = os.getpid(), {}
            kept = self._kept.pop(key, None)
            if kept is None:
                path, name = key
                kept = _Kept(Store(name, path, after_commit=self._after_commit, locking=self._locking))
            self._kept[key] = kept
            kept.users += 1
            return kept

    def _forget(self, key: tuple[str, str], kept: _Kept) -> None:
        with self._guard:
            if self._kept.get(key) is kept:
                del self._kept[key]

    def _give_back(self, kept: _Kept) -> None:
        with self._guard:
            kept.users -= 1
            if not kept.users and kept not in self._kept.values():
                kept.store.close()
            idle = [key for key, other in self._kept.items() if not other.users]
            for key in idle if self._closed else idle[: max(0, len(idle) - _MOST)]:
                self._kept.pop(key).store.close()

    def believe(self, store: Store) -> None:
        """Takes note that a store, which is in the pool or not, was checked after a commit of this process."""
        headers = store.headers()
        with self._guard:
            for kept in self._kept.values():
                if kept.store is store:
                    kept.believed = headers

    def close(self) -> None:
        """Closes all that nobody uses; from here on a store is closed as soon as it is given back."""
        with self._guard:
            self._closed = True
            for key in [key for key, kept in self._kept.items() if not kept.users]:
                self._kept.pop(key).store.close()
