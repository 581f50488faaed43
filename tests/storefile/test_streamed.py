"""Bits that are read by and by: a value stays what it was, whatever others commit; a commit looks at what changes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.hostless import stored
from support.large import TIB, Disks

import dirtmap.engine as dm
from dirtmap.engine.model import content
from dirtmap.engine.namespaces.compact import compact
from dirtmap.engine.namespaces.stored import StoredImage
from dirtmap.engine.storefile import chunks
from dirtmap.engine.storefile import file as storefile
from dirtmap.engine.storefile.directory import read_entries
from dirtmap.engine.storefile.entries import tree_of
from dirtmap.engine.storefile.file import Store
from dirtmap.engine.system import file as fileio
from dirtmap.engine.system.file import File

CHUNK = 32768
SIZE = 20 * CHUNK * 4096 + 1536  # at 4 KiB: 20 chunks, and one that has a single bit
GRANULES = 20 * CHUNK + 1


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks are a part, and what has more than four is not loaded. All that is planned is written at once."""
    monkeypatch.setattr(content, "BLOCK", 2 * CHUNK)
    monkeypatch.setattr(content, "LARGE", 4 * CHUNK)
    monkeypatch.setattr(chunks, "_BLOCK", 2 * CHUNK // 8)
    monkeypatch.setattr(storefile, "_MOST_PLANNED", 0)


@pytest.fixture
def image(tmp_path: Path) -> Iterator[StoredImage]:
    disks = Disks(tmp_path)
    disks.add("a", SIZE)
    with Store(disks.path) as target:
        found = stored(target, "a")
        with found.transaction() as bitmaps:
            bitmaps["b"] = random(1)
        yield found


def random(seed: int, share: float = 0.1) -> dm.Bitmap:
    flags = np.random.default_rng(seed).random(GRANULES) < share
    return dm.Bitmap.from_packed(SIZE, 4096, np.packbits(flags, bitorder="little").tobytes())


def sound(image: StoredImage) -> None:
    assert not [finding for finding in dm.check(image.path).findings if finding.severity != "note"]


def test_a_value_stays_while_others_commit(image: StoredImage) -> None:
    first, before = image["b"], random(1)
    assert first._words is None
    for seed in range(2, 8):
        with image.transaction() as bitmaps:
            bitmaps["b"] = random(seed)
        assert image["b"] == random(seed)
    assert first == before
    assert (first & image["b"]) == (before & random(7))
    grown = os.path.getsize(image.path)
    del first
    for seed in range(8, 16):
        with image.transaction() as bitmaps:
            bitmaps["b"] = random(seed)
    assert os.path.getsize(image.path) == grown, "nobody reads any more: what was given up is taken again"
    sound(image)


@pytest.mark.parametrize(
    ("locked", "error"), [(False, "was written over while it was read"), (True, "was sound when it was read before")]
)
def test_where_writers_do_not_see_readers_a_value_that_was_written_over_is_an_error(
    image: StoredImage, monkeypatch: pytest.MonkeyPatch, locked: bool, error: str
) -> None:
    monkeypatch.setattr(File, "lock_beside", lambda self, offset: locked)
    first = image["b"]
    for seed in range(2, 8):
        with image.transaction() as bitmaps:
            bitmaps["b"] = random(seed)
    with pytest.raises(dm.FormatError, match=error):
        first.extents()


def test_a_value_that_is_made_of_others_needs_them_no_more(image: StoredImage) -> None:
    union = (image["b"] | random(2)).at(65536)
    finer = image["b"].at(512)
    with image.transaction() as bitmaps:
        del bitmaps["b"]
    for seed in range(3, 6):
        with image.transaction() as bitmaps:
            bitmaps["b"] = random(seed)
    assert union == (random(1) | random(2)).at(65536)
    assert finer == random(1)


def test_a_value_outlives_its_image_and_a_compaction(image: StoredImage) -> None:
    first = image["b"]
    with image.transaction() as bitmaps:
        bitmaps["b"] = random(2)
    compact(image.path)
    image.store.close()
    assert first == random(1)


def test_a_reader_in_a_transaction_of_the_same_store(image: StoredImage) -> None:
    with image.transaction() as bitmaps:
        bitmaps["c"] = image["b"] | random(2)
        bitmaps["b"] |= random(3)
        bitmaps["d"] = bitmaps["b"] - bitmaps["c"]
    assert image["c"] == random(1) | random(2)
    assert image["b"] == random(1) | random(3)
    assert image["d"] == random(3) - random(2) - random(1)
    sound(image)


def test_clusters_that_are_larger_than_a_part(tmp_path: Path) -> None:
    disks = Disks(tmp_path, 16)
    disks.add("a", SIZE)
    expected = random(1)
    with Store(disks.path) as target:
        found = stored(target, "a")
        with found.transaction() as bitmaps:
            bitmaps["b"] = expected
        with found.transaction() as bitmaps:
            bitmaps["b"].mark(3 * CHUNK * 4096, 5)
            bitmaps["b"].mark(SIZE - 1, 1)
            bitmaps["c"] = bitmaps["b"] ^ random(2)
        expected.mark(3 * CHUNK * 4096, 5)
        expected.mark(SIZE - 1, 1)
        assert found["b"] == expected
        assert found["c"] == expected ^ random(2)
        sound(found)


def test_a_value_of_a_transaction_ends_with_it(image: StoredImage) -> None:
    with image.transaction() as bitmaps:
        found = bitmaps["b"]
        found.mark(0, 1)
    with pytest.raises(dm.Error, match="the transaction has ended"):
        _ = found.count


def test_threads_share_a_value(image: StoredImage) -> None:
    expected = random(1)
    expected.mark(5 * CHUNK * 4096, 9 * CHUNK * 4096)
    with image.transaction() as bitmaps:
        bitmaps["b"].mark(5 * CHUNK * 4096, 9 * CHUNK * 4096)
    found = image["b"].copy()
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: found == expected, range(8)))
        assert {part.count for part in pool.map(lambda _: found | random(2), range(4))} == {
            (expected | random(2)).count
        }


def test_a_change_that_fails_late_leaves_what_was_there(image: StoredImage) -> None:
    length = os.path.getsize(image.path)
    left_in_use = random(4)
    left_in_use.inconsistent = True
    new = {"b": random(2), "c": random(3), "d": left_in_use}
    with pytest.raises(dm.BitmapError, match="inconsistent"), image.transaction() as bitmaps:
        bitmaps.update(new)
    assert os.path.getsize(image.path) > length, "it has written what nothing leads to"
    assert list(image) == ["b"]
    assert image["b"] == random(1)
    with image.transaction() as bitmaps:
        bitmaps["c"] = random(3)
    assert image["c"] == random(3)
    sound(image)


def damage(image: StoredImage, number: int) -> None:
    """Spoils the chunk of that number of the bitmap."""

    def place(snapshot: storefile.Snapshot) -> int:
        record = snapshot.record(b"a")
        assert record
        (entry,) = read_entries(snapshot, record)
        found = chunks.walk(snapshot, tree_of(record, entry))
        return int(found.places[np.searchsorted(found.chunks, number)])

    with open(image.path, "r+b") as file:
        file.seek(image.store.read(place) + 100)
        file.write(b"\x55\xaa")


def test_damage_is_told_at_once_and_dirty(image: StoredImage) -> None:
    damage(image, 7)
    expected = random(1)
    expected.mark(7 * CHUNK * 4096, CHUNK * 4096)
    found = image["b"]
    assert found.damage is not None
    assert "32768 granules of 655361 must count as dirty" in found.damage
    assert found == expected
    assert found.count == expected.count
    with image.transaction() as bitmaps:
        bitmaps["b"].mark(8 * CHUNK * 4096, 1)
        bitmaps["c"] = bitmaps["b"]
        assert bitmaps["b"].damage is None, "it was not read"
    expected.mark(8 * CHUNK * 4096, 1)
    assert image["b"] == image["c"] == expected
    assert (image["b"].damage is None, image["c"].damage is None) == (False, True)
    assert [item.how.partition(":")[0] for item in image.recover()] == ["partly dirty"]
    assert (image["b"].damage, image["b"] == expected) == (None, True)
    sound(image)


def test_damage_since_a_value_was_verified_is_an_error(image: StoredImage) -> None:
    found = image["b"]
    damage(image, 7)
    with pytest.raises(dm.FormatError, match=r"bits at 0x[0-9a-f]+: was sound when it was read before"):
        list(found.extents_by_parts())


class Counting(fileio.File):
    """Counts what is read and written of bits."""

    read_bytes = written = 0

    def read(self, offset: int, length: int) -> bytes:
        Counting.read_bytes += length
        return super().read(offset, length)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        Counting.read_bytes += len(buffer)
        super().read_into(offset, buffer)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        Counting.written += memoryview(data).nbytes
        super().write(offset, data)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("granularity", [65536, 4096])
def test_a_commit_of_one_mark_reads_and_writes_one_chunk(tmp_path: Path, granularity: int, share: float) -> None:
    """With the nodes above it, the directory, the table and the space map: however many bits there are."""
    disks = Disks(tmp_path)
    disks.add("a", TIB)
    granules = TIB // granularity
    flags = np.random.default_rng(5).random(granules, np.float32) < share
    dense = dm.Bitmap.from_packed(TIB, granularity, np.packbits(flags, bitorder="little").tobytes())
    with fileio.using(Counting), Store(disks.path) as target:
        found = stored(target, "a")
        with found.transaction() as bitmaps:
            bitmaps["b"] = dense
        Counting.read_bytes = Counting.written = 0
        with found.transaction() as bitmaps:
            bitmaps["b"].mark(TIB // 2, 1)
            bitmaps["b"].clear(TIB // 4 * 3, granularity)
            assert bitmaps["b"]._words is None
        assert Counting.written < 100 << 10
        assert Counting.read_bytes < 150 << 10
        dense.mark(TIB // 2, 1)
        dense.clear(TIB // 4 * 3, granularity)
        assert found["b"] == dense
