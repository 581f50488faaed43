"""What a loss of power leaves of a repository and of the files that the engine has written beside it.

A sync makes a file's content durable, and that of a folder its names. What was written to a file since is there sector
by sector, each or not; of the changes of names since, which a journal keeps in order, there are the first so many.
"""

from __future__ import annotations

import os
import pickle
import random
import shutil
from pathlib import Path

_SECTOR = 512


class Medium:
    """What is on the medium, while a process works that will not come to its end.

    Args:
        folder: of the repository; it may not be there yet.
        kept: the file that takes what is on it.
    """

    def __init__(self, folder: Path, kept: Path) -> None:
        self._folder, self._kept = folder, kept
        self._open: dict[int, int] = {}  # descriptors by inode, so that no number is used again
        self._durable: dict[int, bytes] = {}
        self._others: dict[str, bytes] = {}  # files of the engine, by their paths
        self._listings = [self._list()]  # the names as they were synced, and after each act since
        for inode, number in self._open.items():
            self._durable[inode] = _content(number)

    def _list(self) -> dict[str, int]:
        names = {}
        for name in os.listdir(self._folder) if self._folder.exists() else []:
            number = os.open(self._folder / name, os.O_RDONLY)
            inode = names[name] = os.fstat(number).st_ino
            if self._open.setdefault(inode, number) != number:
                os.close(number)
        return names

    def done(self, what: str, path: str) -> None:
        """An act of the repository has come to its end."""
        self._listings.append(self._list())
        if what == "sync":
            inode = os.stat(path).st_ino
            self._durable[inode] = _content(self._open[inode])
        elif what == "sync folder" and Path(path) == self._folder:
            self._listings = self._listings[-1:]

    def changes(self, path: str) -> None:
        """The engine is about to write to a file, which was durable before it did so first."""
        if path not in self._others:
            self._others[path] = Path(path).read_bytes()

    def synced(self, path: str) -> None:
        """The engine has synced a file."""
        self._others[path] = Path(path).read_bytes()

    def keep(self) -> None:
        """Writes down what is on it, and what was written to it since."""
        self._listings.append(self._list())
        contents = {inode: (self._durable.get(inode, b""), _content(at)) for inode, at in self._open.items()}
        others = {
            path: (data, Path(path).read_bytes()) for path, data in list(self._others.items()) if os.path.exists(path)
        }
        self._kept.write_bytes(pickle.dumps((str(self._folder), self._listings, contents, others)))


def lose_power(kept: Path, rng: random.Random) -> None:
    """Makes the files what a loss of power may leave of them, after the process has died that has kept a `Medium`."""
    folder, listings, contents, others = pickle.loads(kept.read_bytes())
    share = rng.choice((0.0, 0.2, 0.8, 1.0))
    if os.path.exists(folder):
        shutil.rmtree(folder)
        os.mkdir(folder)
        for name, inode in rng.choice(listings).items():
            Path(folder, name).write_bytes(_mixed(*contents[inode], share, rng))
    for path, (durable, last) in others.items():
        with open(path, "r+b") as file:
            file.truncate(0)
            file.write(_mixed(durable, last, share, rng))


def _mixed(durable: bytes, last: bytes, share: float, rng: random.Random) -> bytes:
    """What was synced, and some sectors of what was written since; the length may be the later one without them."""
    if durable == last:
        return last
    length = rng.choice((len(durable), len(last)))
    data = bytearray(durable[:length].ljust(length, b"\0"))
    for at in range(0, min(length, len(last)), _SECTOR):
        if rng.random() < share:
            data[at : at + _SECTOR] = last[at : min(length, at + _SECTOR)]
    return bytes(data)


def _content(number: int) -> bytes:
    return os.pread(number, os.fstat(number).st_size, 0)
