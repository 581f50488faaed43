"""Nodes to track, a byte-per-granule model to hold their bitmaps against, and trackers that are killed."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import dirtmap.engine as dm
from dirtmap.engine.model import bits
from dirtmap.engine.namespaces.nodes import add_node
from dirtmap.engine.session.intent import read_log
from dirtmap.engine.storefile.file import Store, create
from dirtmap.engine.storefile.session import session_of
from dirtmap.fmt import store
from dirtmap.fmt.directory import parse_entries

Model = NDArray[np.uint8]
GRANULE = 65536


def damage_directory(path: Path, *, name: bool = False) -> None:
    """Damages the directory of node ``drive0`` in the store at that path: in the name of its first entry, or before."""
    with Store(str(path)) as target:
        record = target.record(b"drive0")
    assert record
    first = record.directory.offset + store.OWNER_SIZE
    with path.open("r+b") as file:
        _, entry = next(parse_entries(path.read_bytes()[first:]))
        file.seek(first + (24 + len(entry.extra_data) if name else 20))
        file.write(b"?")


def wait_for_beat(path: Path, size: int, moment: int) -> None:
    """Waits until the intent log of node ``drive0`` has a beat later than a moment, in ns since 1970."""
    with Store(str(path)) as target:
        record = target.record(b"drive0")
    session = session_of(record) if record else None
    assert session
    deadline = time.monotonic() + 60
    while (logged := read_log(session, size)) and logged.beat <= moment:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert logged


def make_node(folder: Path, size: int, name: str = "drive0", *, granularity: int = GRANULE) -> Path:
    """A raw image as a node of the default store of ``folder``, with a recording bitmap ``b0``; returns its path."""
    image, path = folder / f"{name}.raw", folder / "default.dmap"
    image.touch()
    with image.open("r+b") as file:
        file.truncate(size)
    if not path.exists():
        create(str(path))
    with Store(str(path)) as target:
        add_node(target, name, str(image))
    with dm.open(f"node:{name}", store=str(path)) as opened, opened.transaction() as bitmaps:
        bitmaps["b0"] = dm.Bitmap(size, granularity)
    return image


def model_of(bitmap: dm.Bitmap) -> Model:
    """A byte for each granule: 1 where it is dirty."""
    count = -(-bitmap.size // bitmap.granularity)
    return np.unpackbits(np.frombuffer(bitmap.packed(), np.uint8), count=count, bitorder="little")


def mark(model: Model, offset: int, length: int, granularity: int = GRANULE) -> None:
    """What a mark does, as plain as can be."""
    if length:
        model[offset // granularity : (offset + length - 1) // granularity + 1] = 1


def lost(model: Model, bitmap: dm.Bitmap) -> list[int]:
    """Granules that the model has and the bitmap has not."""
    return np.flatnonzero((model == 1) & (model_of(bitmap) == 0)).tolist()  # type: ignore[no-any-return]


def bytes_of(words: bits.Words, count: int) -> Model:
    """As `model_of`, of plain words."""
    return np.unpackbits(words.view(np.uint8), count=count, bitorder="little")


def files_in(folder: Path) -> list[str]:
    """What is in a folder, but for the index of the default store that it has."""
    return sorted(file.name for file in folder.iterdir() if not file.name.startswith("index"))


def forget_index(folder: Path) -> None:
    """Takes the index away: it knows later commits than a store has that a test puts back."""
    for path in folder.glob("index*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


class Shared:
    """Two models in memory that a child's death leaves alone: what was asked for, and what had returned."""

    def __init__(self, count: int) -> None:
        self._map = mmap.mmap(-1, 2 * count + 8)
        both = np.frombuffer(self._map, np.uint8)
        self.asked, self.returned = both[:count], both[count : 2 * count]
        self.started = both[2 * count :]


def count_down(left: list[int], *places: tuple[object, str]) -> None:
    """Counts calls from here on, and kills this process before the one that brings ``left[0]`` to 0.

    Args:
        left: how many calls are left, in its only item.
        places: what is counted: a class or a module, and the name of a function of it. Replaced for good.
    """

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: object, **kwargs: object) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for holder, name in places:
        setattr(holder, name, counting(getattr(holder, name)))


def kill(work: Callable[[], object], shared: Shared, chance: random.Random, seconds: float, early: float = 0) -> None:
    """Kills a fork of this process, which works until then.

    Args:
        work: sets ``shared.started``.
        shared: with the fork.
        chance: when.
        seconds: after which it is killed once it has started, at most.
        early: how probable it is, each millisecond before, that it is killed while it begins.
    """
    shared.started[0] = 0
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            os._exit(1)
    while not shared.started[0]:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the child failed"
        if chance.random() < early:
            break
        time.sleep(0.001)
    time.sleep(chance.random() * seconds)
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
