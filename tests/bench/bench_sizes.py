"""Time against size: the same acts on disks of 1, 4, 16 and 64 TiB, of which 1 % is dirty; see `report.draw`."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.hostless import stored
from support.measuring import Against

from dirtmap.engine.identity import identity_of
from dirtmap.engine.model import bits
from dirtmap.engine.model.bitmap import Bitmap
from dirtmap.engine.storefile.file import Store, create
from dirtmap.fmt import store

SECTION = "Time against size"
TIB = 1 << 40
GRANULE = 65536
SIZES = [1, 4, 16, 64]


@cache
def dirty(tebibytes: int) -> Bitmap:
    """A bitmap of which 1 % is dirty, at random."""
    granules = tebibytes * TIB // GRANULE
    words = bits.zeros(granules)
    places = np.random.default_rng(1).integers(0, granules, granules // 100)
    bits.scatter(words, places, places)
    return Bitmap.from_words(tebibytes * TIB, GRANULE, words, True)


@pytest.fixture
def sized(against: Against, benchmark: Any, tebibytes: int) -> Callable[..., None]:
    """Measures an act, as a point of the picture."""

    def measure(what: str, act: Callable[[], object], *, calls: int = 1, rounds: int = 7) -> None:
        against(what, act, {}, calls=calls, rounds=rounds)
        benchmark.extra_info["size"] = tebibytes

    return measure


@pytest.fixture
def kept(tmp_path: Path, tebibytes: int) -> str:
    """A store with such a bitmap, ``b``. It is a device's, which may claim to be larger than any file can be."""
    path, disk = str(tmp_path / "store"), tmp_path / "disk"
    create(path)
    disk.touch()
    with Store(path) as target:
        with target.change() as change:
            where, identity = os.fsencode(disk), identity_of(str(disk))
            size = tebibytes * TIB
            change.table.put(store.Record(b"a", store.KIND_DEVICE, bytes(16), size, path=where, identity=identity))
        with stored(target, "a").transaction() as bitmaps:
            bitmaps["b"] = dirty(tebibytes)
    return path


pytestmark = pytest.mark.parametrize("tebibytes", SIZES)


def test_extents(sized: Callable[..., None], tebibytes: int) -> None:
    sized("extents", dirty(tebibytes).extents)


def test_count(sized: Callable[..., None], tebibytes: int) -> None:
    words = dirty(tebibytes).words
    sized("count", lambda: bits.count(words))


def test_or(sized: Callable[..., None], tebibytes: int) -> None:
    one, other = dirty(tebibytes), Bitmap(tebibytes * TIB, GRANULE)
    sized("OR of two bitmaps", lambda: one | other)


def test_mark(sized: Callable[..., None], tebibytes: int) -> None:
    bitmap = Bitmap(tebibytes * TIB, GRANULE)
    offsets = np.random.default_rng(1).integers(0, tebibytes * TIB - 4096, 10_000).tolist()

    def marks() -> None:
        mark = bitmap.mark
        for offset in offsets:
            mark(offset, 4096)

    sized("one mark", marks, calls=len(offsets), rounds=51)


def test_load(sized: Callable[..., None], kept: str) -> None:
    def load() -> None:
        with Store(kept) as target:
            _ = stored(target, "a")["b"].words

    sized("load from a store", load)


def test_commit(sized: Callable[..., None], kept: str, tebibytes: int) -> None:
    done = 0

    def mark() -> None:
        nonlocal done
        done += 1
        with Store(kept) as target, stored(target, "a").transaction() as bitmaps:
            bitmaps["b"].mark((done * 7919 * GRANULE) % (tebibytes * TIB), 1)

    sized("commit of one mark", mark)
