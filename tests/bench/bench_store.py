"""How a store's speed depends on how much is in it, and how fast bits come out of it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import crc32c
import numpy as np
import pytest
from support.hostless import stored
from support.measuring import Against, Peer

from dirtmap.engine.identity import identity_of
from dirtmap.engine.model import bits, changes
from dirtmap.engine.model.bitmap import Bitmap
from dirtmap.engine.model.content import Whole
from dirtmap.engine.namespaces.changing import transaction
from dirtmap.engine.storefile.directory import merge_bits, read_entries, replace_directory
from dirtmap.engine.storefile.file import Store, create
from dirtmap.fmt import geometry, store

SECTION = "Stores"
GRANULARITY = 65536
TIB = 1 << 40


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """A store of 10 namespaces, one of 10,000 and one of 1,000,000: each an image of 1 TiB.

    Those of the first two, and the first ten of the third, have two bitmaps each.
    """
    folder = tmp_path_factory.mktemp("stores")
    image = folder / "image"
    image.touch()
    os.truncate(image, TIB)
    paths = []
    for count in (10, 10_000, 1_000_000):
        path = str(folder / f"{count}")
        create(path)
        identity = identity_of(str(image))
        with Store(path) as target:
            # In one commit, or it would take as many syncs.
            with target.change() as change:
                for number in range(count):
                    record = store.Record(
                        name=f"node {number}".encode(),
                        kind=store.KIND_NODE,
                        uuid=number.to_bytes(16, "big"),
                        size=TIB,
                        generation=change.generation,
                        path=os.fsencode(image),
                        identity=identity,
                    )
                    change.table.put(record)
            with transaction(target) as namespaces:
                for number in range(count if count <= 10_000 else 10):
                    bitmaps = namespaces[f"node {number}"]
                    for name in ("b0", "b1"):
                        changes.add(bitmaps, name, 1 << 28)
                        changes.mark(bitmaps, name, [number << 20], [1 << 30])
        paths.append(path)
    return paths[0], paths[1], paths[2]


_granules = itertools.count(1)


def marking(path: str) -> Callable[[], None]:
    """A call that marks another granule each time, in a bitmap of another namespace.

    No granule twice, whichever test asks: where a mark changes nothing, nothing is committed.
    """

    def mark() -> None:
        done = next(_granules)
        with Store(path) as target, stored(target, f"node {done % 10}").transaction() as bitmaps:
            bitmaps["b0"].mark((4096 - done) << 28, 1)

    return mark


def reading(path: str) -> Callable[[], int]:
    """A call that opens the store, and reads a bitmap in it."""

    def read() -> int:
        with Store(path) as target:
            return stored(target, "node 7")["b1"].count

    return read


def test_commit_among_10_000_namespaces(against: Against, stores: tuple[str, str, str]) -> None:
    few, many, _ = stores
    against(
        "commit of one mark among 10,000 namespaces", marking(many), {"among 10": Peer(marking(few), 1.5)}, rounds=101
    )


def test_commit_among_a_million_namespaces(against: Against, stores: tuple[str, str, str]) -> None:
    _, many, most = stores
    peers = {"among 10,000": Peer(marking(many), 1.5)}
    against("commit of one mark among a million namespaces", marking(most), peers, rounds=101)


def test_read_one_bitmap_among_10_000_namespaces(against: Against, stores: tuple[str, str, str]) -> None:
    few, many, _ = stores
    peers = {"among 10": Peer(reading(few), 1.5)}
    against("opening a store and reading one bitmap, among 10,000 namespaces", reading(many), peers, rounds=201)


def test_read_one_bitmap_among_a_million_namespaces(against: Against, stores: tuple[str, str, str]) -> None:
    few, _, most = stores
    peers = {"among 10": Peer(reading(few), 1.5)}
    against("opening a store and reading one bitmap, among a million namespaces", reading(most), peers, rounds=201)


def add_large(folder: Path, size: int) -> str:
    """A store with a device ``a`` that claims to be larger than its root: few file systems have files of that size."""
    path, disk = str(folder / "store"), folder / "disk"
    create(path)
    disk.touch()
    with Store(path) as target, target.change() as change:
        where, identity = os.fsencode(disk), identity_of(str(disk))
        change.table.put(store.Record(b"a", store.KIND_DEVICE, bytes(16), size, path=where, identity=identity))
    return path


def some(size: int, percent: float, *, clustered: bool) -> bytes:
    """Packed bits at 64 KiB: so many of them, anywhere, or in one place."""
    length = geometry.packed_bytes(size, GRANULARITY)
    if clustered:
        dirty = int(length * percent / 100)
        return bytes(length // 3) + b"\xff\xfe" * (dirty // 2) + bytes(length - length // 3 - dirty // 2 * 2)
    random = np.random.default_rng(1)
    parts = [np.packbits(random.random(1 << 24, np.float32) < percent / 100) for _ in range(length // (1 << 21))]
    return np.concatenate(parts).tobytes()


@pytest.mark.parametrize(("percent", "clustered"), [(10, False), (0.01, True)])
def test_load_16_tib(against: Against, tmp_path: Path, percent: float, clustered: bool) -> None:
    """Few bits beside many, both of an image that is open: what opening a store takes has rows of its own."""
    size = 16 * TIB
    flat = tmp_path / "flat"
    flat.write_bytes(many := some(size, 10, clustered=False))
    with Store(add_large(tmp_path, size)) as target:
        with stored(target, "a").transaction() as bitmaps:
            for name, packed in {"b0": many, "b1": some(size, percent, clustered=clustered)}.items():
                bitmaps[name] = Bitmap.from_packed(size, GRANULARITY, packed)

        image = stored(target, "a")

        def load(name: str) -> None:
            _ = image[name].words

        def read() -> None:
            assert crc32c.crc32c(np.fromfile(flat, np.uint8))

        assert bytes(image["b1"].packed()) == packed
        what = f"loading a bitmap of 16 TiB at 64 KiB, {percent} % dirty" + (" in clusters" if clustered else "")
        peers = {
            "one that is 10 % dirty, anywhere": Peer(lambda: load("b0"), 0.05),
            "reading the bytes and their CRC32C": Peer(read, limit=True),
        }
        if not clustered:
            peers = {"reading the bytes and their CRC32C": Peer(read, 1.2, limit=True)}
        against(what, lambda: load("b1"), peers, rounds=21)


def test_save_16_tib(against: Against, tmp_path: Path) -> None:
    """All bits of a bitmap, each time others; beside as many bytes in a file that has as many already."""
    size, flat = 16 * TIB, tmp_path / "flat"
    many = some(size, 10, clustered=False)
    packed = many, many[::-1]
    bitmaps = [Bitmap.from_packed(size, GRANULARITY, data) for data in packed]
    done = 0

    with Store(add_large(tmp_path, size)) as target, flat.open("wb") as file:

        def save() -> None:
            nonlocal done
            done += 1
            with stored(target, "a").transaction() as there:
                there["b0"] = bitmaps[done % 2]

        def write() -> None:
            assert crc32c.crc32c(packed[done % 2])
            os.pwrite(file.fileno(), packed[done % 2], 0)
            os.fdatasync(file.fileno())

        peers = {"writing the bytes, their CRC32C and one sync": Peer(write, 1.2, limit=True)}
        against("saving a bitmap of 16 TiB at 64 KiB, 10 % dirty", save, peers, rounds=21, warm=3)
        assert stored(target, "a")["b0"] == bitmaps[done % 2]


@pytest.mark.parametrize("percent", [0, 10])
def test_commit_of_one_mark_on_15_tib(against: Against, tmp_path: Path, percent: float) -> None:
    """Beside the commit of a mark on a small disk."""
    sizes, paths = {"small": 1 << 30, "large": 15 * TIB}, {}
    for name, size in sizes.items():
        (tmp_path / name).mkdir()
        paths[name] = add_large(tmp_path / name, size)
        with Store(paths[name]) as target, stored(target, "a").transaction() as bitmaps:
            bitmaps["b0"] = Bitmap.from_packed(size, GRANULARITY, some(15 * TIB, percent, clustered=False))
    done = 0

    def mark(name: str) -> None:
        nonlocal done
        done += 1
        with Store(paths[name]) as target, stored(target, "a").transaction() as bitmaps:
            bitmaps["b0"].mark((done * 7919 * GRANULARITY) % sizes[name], 1)

    peers = {"on 1 GiB": Peer(lambda: mark("small"))}
    against(f"commit of one mark on 15 TiB, {percent} % dirty", lambda: mark("large"), peers, rounds=21)


def test_save_of_100_granules_on_15_tib(against: Against, tmp_path: Path) -> None:
    """A tracker's marks, anywhere, beside a commit of one mark of a small bitmap of the same disk."""
    size = 15 * TIB
    path = add_large(tmp_path, size)
    with Store(path) as target:
        with stored(target, "a").transaction() as bitmaps:
            bitmaps["b0"] = Bitmap.from_packed(size, GRANULARITY, some(size, 10, clustered=False))
            bitmaps["small"] = Bitmap(size, 1 << 31)
        random = np.random.default_rng(2)
        done = 0

        def save() -> None:
            nbits = geometry.granules(size, GRANULARITY)
            words, marks = bits.zeros(nbits), random.integers(0, nbits, 100)
            bits.scatter(words, marks, marks)
            added = Whole(nbits, words)
            with target.change() as change:
                record = change.table.get(b"a")
                assert record
                old = read_entries(change.snapshot, record)
                new = [merge_bits(change, record, entry, added) if entry.name == b"b0" else entry for entry in old]
                place = replace_directory(change, record, old, new)
                change.table.put(replace(record, directory=place, generation=change.generation))

        def mark() -> None:
            nonlocal done
            done += 1
            with stored(target, "a").transaction() as bitmaps:
                bitmaps["small"].mark((done % 7000) << 31, 1)

        peers = {"commit of one mark": Peer(mark)}
        against("a save of 100 granules marked on 15 TiB, 10 % dirty", save, peers, rounds=21)
