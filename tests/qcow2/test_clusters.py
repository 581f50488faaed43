"""The bits of a large bitmap of an image are read and written a part at a time, with the results of any other."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from support import qemu

import dirtmap.engine as dm
from dirtmap.engine.model import bits, changes, content
from dirtmap.engine.qcow2 import clusters
from dirtmap.engine.qcow2.layout import read_layout
from dirtmap.engine.system import file as fileio

if TYPE_CHECKING:
    from dirtmap.engine.model.content import Part

GRANULE, CLUSTER = 512, 4096
# The last cluster of bits is cut short, and so is the last word.
SIZE = (1 << 31) + 77 * GRANULE
NBITS = SIZE // GRANULE
NAMES = "some", "none", "all", "coarse"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "disk.qcow2"
    qemu.create(path, SIZE, f"cluster_size={CLUSTER}")
    flags = np.zeros(NBITS, np.bool_)
    for at in np.random.default_rng(7).integers(0, NBITS, 300).tolist():
        flags[at : at + 40] = True
    flags[CLUSTER * 8 * 3 : CLUSTER * 8 * 70] = True  # clusters that are all ones
    with dm.open(path) as image, image.transaction() as bitmaps:
        bitmaps["some"] = dm.Bitmap.from_packed(SIZE, GRANULE, np.packbits(flags, bitorder="little").tobytes())
        bitmaps["none"] = dm.Bitmap(SIZE, GRANULE)
        bitmaps["all"] = dm.Bitmap.from_extents(SIZE, [0], [SIZE], GRANULE)
        bitmaps["coarse"] = dm.Bitmap.from_extents(SIZE, [1 << 20, SIZE - 1], [1 << 20, 1], 65536)
    return path


@pytest.fixture
def path(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(made, tmp_path / "disk.qcow2"))


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes bitmaps large that are not."""
    monkeypatch.setattr(content, "LARGE", 1 << 12)
    monkeypatch.setattr(content, "BLOCK", 1 << 18)
    monkeypatch.setattr(clusters, "_UNIT", 1 << 16)


def all_of(path: Path) -> dict[str, tuple[int, bool, qemu.Map]]:
    with dm.open(path) as image:
        return {name: (image[name].granularity, image[name].recording, qemu.extents(image[name])) for name in image}


def _replaced(bitmaps: dm.Transaction, name: str, make: Callable[[dm.Bitmap], dm.Bitmap]) -> None:
    bitmaps[name] = make(bitmaps[name])


CHANGES: dict[str, Callable[[dm.Transaction], object]] = {
    "nothing": lambda bitmaps: bitmaps["some"].count,
    "one mark": lambda bitmaps: bitmaps["some"].mark(1 << 30, 1),
    "a mark at the end": lambda bitmaps: bitmaps["none"].mark(SIZE - 1, 1),
    "a mark of all": lambda bitmaps: bitmaps["none"].mark(0, SIZE),
    "marks": lambda bitmaps: bitmaps["some"].mark_many(np.arange(2000) << 20, np.full(2000, 4096)),
    "a clear": lambda bitmaps: bitmaps["all"].clear(5 << 20, 1 << 29),
    "a clear of all": lambda bitmaps: bitmaps["some"].clear(0, SIZE),
    "a clear and a mark": lambda bitmaps: (bitmaps["all"].clear(0, SIZE), bitmaps["all"].mark(0, SIZE)),
    "a finer one merged": lambda bitmaps: changes.merge(bitmaps, "coarse", [bitmaps["some"]]),
    "a coarser one merged": lambda bitmaps: changes.merge(bitmaps, "some", [bitmaps["coarse"]]),
    "all merged": lambda bitmaps: changes.merge(bitmaps, "some", [bitmaps["all"]]),
    "a difference": lambda bitmaps: _replaced(bitmaps, "all", lambda found: found - bitmaps["some"]),
    "coarser": lambda bitmaps: _replaced(bitmaps, "some", lambda found: found.at(2048)),
    "a copy": lambda bitmaps: bitmaps.__setitem__("copy", bitmaps["some"]),
    "a copy, and a mark of it": lambda bitmaps: (
        bitmaps.__setitem__("none", bitmaps["some"]),
        bitmaps["none"].mark(0, 1 << 20),
    ),
    "two that have each other's bits": lambda bitmaps: (
        bitmaps.__setitem__("copy", bitmaps["all"]),
        bitmaps.__setitem__("all", bitmaps["some"]),
        bitmaps.__setitem__("some", bitmaps["copy"]),
    ),
    "renamed, and a mark": lambda bitmaps: (bitmaps.rename("some", "other"), bitmaps["other"].mark(3 << 28, 1)),
    "another in its place": lambda bitmaps: (bitmaps.__delitem__("some"), bitmaps.rename("all", "some")),
    "removed": lambda bitmaps: bitmaps.__delitem__("some"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_the_same_part_by_part(path: Path, what: str, request: pytest.FixtureRequest) -> None:
    plainly = Path(shutil.copy(path, path.with_name("plainly.qcow2")))
    with dm.open(plainly) as image, image.transaction() as bitmaps:
        CHANGES[what](bitmaps)
    expected = all_of(plainly)
    request.getfixturevalue("large")
    with dm.open(path) as image, image.transaction() as bitmaps:
        CHANGES[what](bitmaps)
    assert all_of(path) == expected
    assert all_of(plainly) == expected
    qemu.check(path)
    name = next(iter(expected))
    assert qemu.dirty(path, name) == expected[name][2]


def first_cluster(path: Path, name: str) -> int:
    with fileio.open_file(str(path)) as file:
        slots = {slot.entry.name: slot for slot in read_layout(file).slots}
    return next(slots[name.encode()].clusters())


@pytest.mark.usefixtures("large")
def test_a_bitmap_that_was_read_stays_as_it_was(path: Path, made: Path) -> None:
    before = all_of(made)
    with dm.open(path) as image:
        values = {name: image[name] for name in image}
        with image.transaction() as bitmaps:  # writes what is new elsewhere
            bitmaps["all"].clear(0, SIZE // 2)
            del bitmaps["some"]
    assert {name: qemu.extents(value) for name, value in values.items()} == {
        name: found for name, (_, _, found) in before.items()
    }
    assert values["all"] - values["some"] == values["all"] ^ values["some"]


@pytest.mark.usefixtures("large")
def test_a_bitmap_that_was_read_can_be_copied_with_its_bits(path: Path) -> None:
    with dm.open(path) as image:
        value = image["some"]
    made = copy.deepcopy(value), pickle.loads(pickle.dumps(value))
    path.unlink()
    assert [qemu.extents(other) for other in made] == [qemu.extents(value)] * 2


@pytest.mark.usefixtures("large")
def test_values_of_an_image_share_an_open_file_until_the_last_is_gone(path: Path) -> None:
    def opened() -> int:
        return sum(os.path.realpath(f"/proc/self/fd/{fd}") == str(path) for fd in os.listdir("/proc/self/fd"))

    with dm.open(path) as image:
        values = [image["some"] for _ in range(5)]
    assert opened() == 1
    del values[1:]
    assert values[0].extents()[0].size
    values.clear()
    assert opened() == 0


@pytest.mark.usefixtures("large")
def test_what_others_have_written_over_is_refused(path: Path) -> None:
    """And never taken for the bits that were read before: neither what became dirty since, nor what became clean."""
    with dm.open(path) as image:
        value = image["some"]
    count, at = value.count, first_cluster(path, "some")
    message = "bitmap 'some': its clusters were used again since it was read; read it anew"
    for data in (b"\xff" * CLUSTER, bytes(CLUSTER)):
        qemu.patch(path, at, data)
        assert value.count == count
        for look in (
            value.extents,
            lambda: value.packed(),
            lambda: (value | value).count,
            lambda: value.at(4096).count,
        ):
            with pytest.raises(dm.Error, match=message) as error:
                look()
            assert str(error.value).startswith(f"{path}: ")
    with dm.open(path) as image:
        assert image["some"].count < count


def test_a_file_that_took_the_place_of_the_image_is_refused(path: Path, made: Path) -> None:
    with fileio.open_file(str(path)) as file:
        layout = read_layout(file)
        path.unlink()
        shutil.copy(made, path)
        with pytest.raises(dm.LockedError, match="was replaced since it was opened"):
            clusters.Lasting(file, layout, layout.slots[0])


@pytest.mark.usefixtures("large")
def test_a_transaction_that_has_ended_has_no_bits(path: Path) -> None:
    with dm.open(path) as image, image.transaction() as bitmaps:
        found = bitmaps["some"]
    with pytest.raises(dm.Error, match="the transaction has ended"):
        found.extents()


def test_a_copy_of_a_changed_bitmap_lasts_longer_than_its_transaction(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "BLOCK", 1 << 18)
    with dm.open(path) as image:
        with image.transaction() as bitmaps:
            bitmaps["some"].mark(1 << 30, 1)
            found = bitmaps["some"].copy()
        assert found == image["some"]


class Fading:
    """Random bits that can be looked at once, and are gone then."""

    nbits = NBITS

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def part(self, first: int, end: int) -> Part:
        """See `content.Content.part`."""
        if first in self.seen:
            raise dm.Error("elsewhere", "is gone")
        self.seen.add(first)
        found = np.random.default_rng(first).integers(1, 1 << 62, -(-(end - first) // 64), np.uint64)
        bits.mask_tail(found, end - first)
        return found


@pytest.mark.usefixtures("large")
def test_bits_that_fail_while_they_are_written_change_nothing(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(dm.Error, match="is gone"), dm.open(path) as image, image.transaction() as bitmaps:
        bitmaps["new"] = dm.Bitmap._of(SIZE, GRANULE, Fading(), True)
    assert path.read_bytes() == before


class Counting(fileio.File):
    """Counts what is read and written, in bytes."""

    moved = 0

    def read(self, offset: int, length: int) -> bytes:
        data = super().read(offset, length)
        Counting.moved += len(data)
        return data

    def read_into(self, offset: int, buffer: memoryview) -> None:
        super().read_into(offset, buffer)
        Counting.moved += len(buffer)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        super().write(offset, data)
        Counting.moved += len(data)


def test_a_mark_moves_no_more_than_what_it_changes(path: Path) -> None:
    """Also where the bitmap is not large, but long enough."""
    size = 1 << 42
    wide = path.with_name("wide.qcow2")
    qemu.create(wide, size)
    with dm.open(wide) as image, image.transaction() as bitmaps:
        bitmaps["b"] = dm.Bitmap.from_extents(size, np.arange(1 << 16) << 26, np.full(1 << 16, 1 << 20), 65536)
    Counting.moved = 0
    with fileio.using(Counting), dm.open(wide) as image, image.transaction() as bitmaps:
        bitmaps["b"].mark(size // 2, size // 64)
    bits = size // 65536 // 8
    assert Counting.moved < bits // 4, "two of 128 clusters, and metadata"
    with dm.open(wide) as image:
        assert image["b"].count == (1 << 16) * (1 << 20) // 64 * 63 + size // 64
    qemu.check(wide)
