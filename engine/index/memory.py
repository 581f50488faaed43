"""`Memory`: what stands in for the database where there can be none: the same entries, in this process alone.

It is filled by the same readers, asked by the same questions and forgotten at the end of the process. It has seen no
commit of a store that was made before it was, so that a rollback to one of those is not noticed.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from typing import TypeVar

from dirtmap.engine.index.database import Database, Reader, Writer

T = TypeVar("T")

_SHELF = 3  # bytes of a key that say on which shelf it stands: inserting moves the keys of one shelf alone


class Memory(Database):
    """A database without a file.

    Args:
        path: of the index that it stands in for, for messages.
    """

    def __init__(self, path: str) -> None:
        self.path, self.usable = path, True
        self.lock = threading.RLock()
        self._table = _Table(path)

    def suspend(self) -> None:
        """Nothing: a forked child has a copy of its own."""

    def close(self) -> None:
        """Forgets everything."""
        with self.lock:
            self.usable = False
            self._table = _Table(self.path)

    def is_current(self) -> bool:
        """True: no other process can replace it."""
        return True

    def get(self, key: bytes) -> bytes | None:
        """See `Database.get`."""
        with self.lock:
            return self._table.get(key)

    def read(self, work: Callable[[Reader], T]) -> T:
        """See `Database.read`."""
        with self.lock:
            return work(self._table)

    def change(self, work: Callable[[Writer], T]) -> T:
        """See `Database.change`; in memory, until the process ends."""
        with self.lock:
            self._table.undo.clear()
            try:
                return work(self._table)
            except BaseException:
                self._table.roll_back()
                raise


class _Table(Writer):
    """Entries in the order of their keys."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._values: dict[bytes, bytes] = {}
        self._shelves: dict[bytes, list[bytes]] = {}
        self.undo: list[tuple[bytes, bytes | None]] = []

    def roll_back(self) -> None:
        """Takes back what was done since `undo` was cleared."""
        for key, value in reversed(list(self.undo)):
            if value is None:
                self.delete(key)
            else:
                self.put(key, value)

    def get(self, key: bytes) -> bytes | None:
        return self._values.get(key)

    def scan(self, prefix: bytes, *, sound_only: bool = False) -> Iterator[tuple[bytes, bytes]]:
        start = prefix[:_SHELF]
        whole = len(start) == _SHELF
        for shelf in [start] if whole else sorted(name for name in self._shelves if name.startswith(start)):
            keys = self._shelves.get(shelf, [])
            for at in range(bisect_left(keys, prefix), len(keys)):
                if not keys[at].startswith(prefix):
                    return
                yield keys[at], self._values[keys[at]]

    def put(self, key: bytes, contents: bytes) -> None:
        before = self._values.get(key)
        self.undo.append((key, before))
        if before is None:
            insort(self._shelves.setdefault(key[:_SHELF], []), key)
        self._values[key] = contents

    def delete(self, key: bytes) -> None:
        before = self._values.pop(key, None)
        if before is not None:
            self.undo.append((key, before))
            keys = self._shelves[key[:_SHELF]]
            del keys[bisect_left(keys, key)]
