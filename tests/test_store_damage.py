"""A damaged store: errors that say where, never a traceback, a hang, or a clean bit that was dirty.

A store of a few clusters is damaged in every way: each bit flipped, cut at every sector, filled with garbage, and with
numbers that lie although every checksum is right. Each time all that reads a store reads it, and one change is made.
"""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import crc32c
import numpy as np
import pytest
from support import quick

import dirtmap.engine as dm
from dirtmap.engine.host.opening import Place
from dirtmap.engine.namespaces.compact import compact
from dirtmap.engine.namespaces.nodes import add_node
from dirtmap.engine.storefile import header as headers
from dirtmap.engine.storefile.file import Store, create
from dirtmap.fmt import directory, store
from dirtmap.fmt.errors import Error
from dirtmap.fmt.store import Area, Record
from dirtmap.fmt.structure import Structure

SIZE = 300_001  # of each disk
Bits = dict[tuple[str, str], np.ndarray[Any, Any]]


class Region(NamedTuple):
    """A part of the store that something leads to."""

    name: str
    start: int
    stop: int


@dataclass
class Sound:
    """The undamaged store.

    Attributes:
        path: where it is damaged.
        data: its bytes.
        bits: the words of each bitmap, by node and name.
        regions: where its parts are.
    """

    path: str
    data: bytes
    bits: Bits
    regions: list[Region]

    def region(self, name: str) -> Region:
        return next(region for region in self.regions if region.name == name)

    def write(self, data: bytes | bytearray) -> None:
        with open(self.path, "r+b") as file:
            file.write(data)
            file.truncate(len(data))

    def read(self) -> bytes:
        return Path(self.path).read_bytes()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """In memory where that can be: thousands of stores are written and synced."""
    where = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    yield where
    shutil.rmtree(where)


@pytest.fixture(scope="module")
def sound(folder: Path) -> Sound:
    return _sound(folder)


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    quick.hurry(monkeypatch)


def _sound(folder: Path) -> Sound:
    path = str(folder / "s.dmap")
    create(path)
    rng = np.random.default_rng(3)
    with Store(path) as target:
        for node in ("a", "b", "empty"):
            (folder / f"{node}.raw").write_bytes(bytes(SIZE))
            add_node(target, node, str(folder / f"{node}.raw"))

    def some(granularity: int, share: float) -> dm.Bitmap:
        granules = np.flatnonzero(rng.random(SIZE // granularity) < share)
        return dm.Bitmap.from_extents(SIZE, granules * granularity, np.full(len(granules), granularity), granularity)

    with dm.open(Place(path, "a")) as image:
        with image.transaction() as bitmaps:
            bitmaps["monday"] = some(4096, 0.3)
            bitmaps["clean"] = dm.Bitmap(SIZE)
            bitmaps["full"] = dm.Bitmap.from_extents(SIZE, [0], [SIZE], 65536, recording=False)
        with image.transaction() as bitmaps:
            bitmaps["monday"] |= some(4096, 0.3)
    with dm.open(Place(path, "b")) as image, image.transaction() as bitmaps:
        bitmaps["\udcff"] = some(1024, 0.2)
    with dm.open(Place(path, "a")) as image, image.transaction() as bitmaps:
        bitmaps["monday"].mark(SIZE - 1, 1)
    found: Bits = {}
    for node in ("a", "b"):
        with dm.open(Place(path, node)) as image:
            found |= {(node, name): image[name].words.copy() for name in image}
    assert len(found) == 4
    assert not dm.check(path).findings
    return Sound(path, Path(path).read_bytes(), found, _regions(path))


def _regions(path: str) -> list[Region]:
    """Every area of the newest commit, and the headers, from a dump."""
    names = {"header": "header copy", "record": "namespace record", "entry": "directory entry"}
    document = dm.dump(path)
    assert not document["faults"]
    found = []
    for structure in document["structures"]:
        name, start = structure["name"], structure["offset"]
        if name.startswith(names["header"]) and "," not in name:
            found.append(Region(name, start, start + store.BLOCK))
        elif not name.startswith(names["header"]):
            found.append(Region(name, start, start + structure["length"]))
    return found


# What is done with each damaged store, and what must hold.


@contextmanager
def bounded(seconds: float = 2.0) -> Iterator[None]:
    """Ends what takes more of the processor's time than that."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def attempt(act: Callable[[], Any]) -> Any:
    """What it returns, or the Error it raises; any other exception is a failure."""
    try:
        return act()
    except Error as error:
        failure = error.with_traceback(None)  # which would keep what was read
        failure.__context__ = None
    assert "\n" not in str(failure), "an error is one line"
    return failure


def no_bit_lost(sound: Sound, node: str, image: dm.Namespace) -> set[tuple[str, str]]:
    """Every bitmap that can be read has all dirty bits that it had; which there still are, readable or not."""
    names = attempt(lambda: list(iter(image)))
    if isinstance(names, Error):
        return set()
    for name in names:
        bitmap = attempt(lambda name=name: image[name])
        if isinstance(bitmap, Error):
            continue
        expected = sound.bits.get((node, name))
        if expected is not None:
            assert not (expected & ~bitmap.words).any(), f"{node}:{name} lost a dirty bit"
    return {(node, name) for name in names} & sound.bits.keys()


def read_everything(sound: Sound) -> set[tuple[str, str]]:
    """Which of the sound store's bitmaps there still are; none of those that can be read has lost a bit."""
    names = set()
    for node in ("a", "b"):
        image = attempt(lambda node=node: dm.open(Place(sound.path, node)))
        if not isinstance(image, Error):
            with image:
                names |= no_bit_lost(sound, node, image)
    return names


def use(sound: Sound) -> dict[str, Any]:
    """Reads the damaged store in every way, then changes it; the answers, or the errors, by what was done."""
    answers: dict[str, Any] = {}
    with bounded(20):
        answers["names"] = read_everything(sound)
        answers["describe"] = info = attempt(lambda: dm.describe(sound.path))
        if not isinstance(info, Error):
            for bitmap in info.bitmaps:
                expected = sound.bits.get((bitmap.node, bitmap.name))
                if expected is not None:
                    dirty = int(np.bitwise_count(expected).sum()) * bitmap.granularity
                    assert bitmap.count is None or bitmap.count >= dirty
        answers["check"] = attempt(lambda: dm.check(sound.path))
        answers["dump"] = dump = attempt(lambda: dm.dump(sound.path))
        if not isinstance(dump, Error):
            assert dump.keys() == {"filename", "format", "file-size", "structures", "faults", "stopped"}
        before = sound.read()
        answers["change"] = changed = attempt(lambda: _change(sound.path))
        if isinstance(changed, Error):
            assert sound.read() == before
        else:
            read_everything(sound)
    return answers


def glance(sound: Sound) -> dict[str, Any]:
    """The cheapest part of `use`: reads all bitmaps and checks the store."""
    with bounded(20):
        return {"names": read_everything(sound), "check": attempt(lambda: dm.check(sound.path))}


def _change(path: str) -> None:
    with dm.open(Place(path, "a")) as image, image.transaction() as bitmaps:
        bitmaps["new"] = dm.Bitmap.from_extents(SIZE, [5000], [10_000], 512)
        bitmaps["full"].mark(0, 1)


def flipped(sound: Sound, bits: range | list[int]) -> Iterator[int]:
    """For each of these bits of the file: flips it, hands it over, and puts the sound store back."""
    sound.write(sound.data)
    for bit in bits:
        damaged = bytearray(sound.data)
        damaged[bit // 8] ^= 1 << bit % 8
        with open(sound.path, "r+b", buffering=0) as file:
            file.seek(bit // 8)
            file.write(damaged[bit // 8 : bit // 8 + 1])
        yield bit
        sound.write(sound.data)


def found_damage(answers: dict[str, Any]) -> bool:
    """True where the check says that something is wrong; that one header copy is damaged is a note."""
    report = answers["check"]
    return isinstance(report, Error) or report.corruptions > 0 or any("header" in f.where for f in report.findings)


# Every bit


def test_flipped_bit_of_one_header_copy_changes_nothing(sound: Sound) -> None:
    """Every bit of the four blocks: the header that counts is the same, and the damaged copy is to be mended.

    Whatever a reader does depends on that choice and the areas alone.
    """
    before = headers.choose(sound.path, sound.data)
    for number in range(4):
        block = sound.data[number * store.BLOCK : (number + 1) * store.BLOCK]
        for bit in range(store.BLOCK * 8):
            damaged = bytearray(block)
            damaged[bit // 8] ^= 1 << bit % 8
            data = (
                sound.data[: number * store.BLOCK] + damaged + sound.data[(number + 1) * store.BLOCK : store.RESERVED]
            )
            chosen = headers.choose(sound.path, data)
            assert (chosen.header, chosen.slot, chosen.in_doubt) == (before.header, before.slot, False)
            assert chosen.mends == ((number, block),)


def _sampled(region: Region, count: int, seed: int) -> list[int]:
    return sorted(random.Random(seed).sample(range(region.start * 8, region.stop * 8), count))


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize(("step", "count"), [(23, 20), pytest.param(1, 500, marks=pytest.mark.long)])
def test_flipped_bit_of_one_header_copy_is_invisible(sound: Sound, number: int, step: int, count: int) -> None:
    region = sound.regions[number]
    assert region.name.startswith(f"header copy {number}")
    used = range(region.start * 8, (region.start + 180) * 8, step)  # the fields
    for _ in flipped(sound, sorted({*used, *_sampled(region, count, number)})):
        answers = use(sound)
        assert answers["names"] == set(sound.bits)
        assert not answers["describe"].notes
        assert found_damage(answers)
        assert answers["change"] is None


METADATA = ["namespace table", "namespace record", "directory entry", "bits", "space map", "released clusters"]


def _numbers(sound: Sound) -> set[int]:
    """The bits of all fields that say where something is, how long it is, or how many there are."""
    sound.write(sound.data)
    fields = [field for structure in dm.dump(sound.path)["structures"] for field in structure.get("fields", [])]
    telling = [field for field in fields if re.search("offset|length|size|first|count|nb_", field["name"])]
    return {bit for f in telling for bit in range(f["offset"] * 8, (f["offset"] + f["length"]) * 8)}


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", METADATA)
def test_flipped_bit_of_anything_else_is_an_error_at_most(sound: Sound, kind: str, step: int) -> None:
    """Every bit of the table, the records, the directories, the bits, the space map's root and the released runs.

    Each time all bitmaps are read and the store is checked; whoever else reads or writes has a go at those bits that
    lead somewhere, and at one in ``step`` of the others.
    """
    regions = [region for region in sound.regions if region.name.split(":")[0] == kind]
    assert regions
    numbers = _numbers(sound)
    for region in regions:
        for bit in flipped(sound, range(region.start * 8, region.stop * 8)):
            whole = bit in numbers or bit % step == 0
            answers = use(sound) if whole else glance(sound)
            assert found_damage(answers), f"bit {bit} of {region.name}"
            assert not whole or answers["dump"]["faults"], f"bit {bit} of {region.name}"


@pytest.mark.parametrize("step", [127, pytest.param(1, marks=pytest.mark.long)])
def test_flipped_bit_of_a_space_map_leaf_is_an_error_at_most(sound: Sound, step: int) -> None:
    region = sound.region("space map leaf 0")
    used = range(region.start * 8, region.start * 8 + 64)
    for bit in flipped(sound, sorted({*used, *range(region.start * 8, region.stop * 8, step)})):
        answers = use(sound)
        assert answers["names"] == set(sound.bits), "readers do not need it"
        assert found_damage(answers), f"bit {bit}"
        assert isinstance(answers["change"], Error), "a writer does not trust it"


def test_every_flipped_bit_of_a_space_map_leaf_is_noticed(sound: Sound) -> None:
    region = sound.region("space map leaf 0")
    snapshot_area = Area(
        region.start, region.stop - region.start, crc32c.crc32c(sound.data[region.start : region.stop])
    )
    leaf = bytearray(sound.data[region.start : region.stop])
    for bit in range(len(leaf) * 8):
        leaf[bit // 8] ^= 1 << bit % 8
        assert crc32c.crc32c(leaf) != snapshot_area.checksum
        leaf[bit // 8] ^= 1 << bit % 8


# Both copies of a header


def _break_blocks(sound: Sound, *numbers: int) -> bytearray:
    damaged = bytearray(sound.data)
    for number in numbers:
        damaged[number * store.BLOCK + 1000] ^= 1
    return damaged


def test_without_the_newest_header_the_older_state_is_all_dirty(sound: Sound) -> None:
    newest = headers.choose(sound.path, sound.data).slot
    damaged = _break_blocks(sound, *store.COPIES[newest])
    sound.write(damaged)
    info = dm.describe(sound.path)
    assert {(bitmap.node, bitmap.name) for bitmap in info.bitmaps} == set(sound.bits), "as one commit earlier"
    assert len(info.notes) == 2
    assert all("both copies of a header are damaged" in note for note in info.notes)
    assert all(bitmap.count >= SIZE for bitmap in info.bitmaps)
    for node, name in sound.bits:
        with dm.open(Place(sound.path, node)) as image:
            assert image[name].extents()[1].tolist() == [SIZE]
    report = dm.check(sound.path)
    assert report.corruptions >= 2
    assert any(finding.severity == "note" and "all dirty" in finding.what for finding in report.findings)
    assert any("all dirty" in fault["what"] for fault in dm.dump(sound.path)["faults"])


def test_doubt_outlives_the_next_commits_and_ends_with_recover(sound: Sound) -> None:
    newest = headers.choose(sound.path, sound.data).slot
    sound.write(_break_blocks(sound, *store.COPIES[newest]))
    generation = headers.choose(sound.path, sound.data).header.generation
    with dm.open(Place(sound.path, "a")) as image, image.transaction() as bitmaps:
        bitmaps["monday"].clear(0, SIZE)
        bitmaps["new"] = dm.Bitmap(SIZE)
    chosen = headers.choose(sound.path, sound.read())
    assert not chosen.in_doubt
    assert chosen.header.generation == generation + 1, "past the number of the commit that was lost"
    for _ in range(3):
        with dm.open(Place(sound.path, "a")) as image:
            assert image["monday"].count == 0, "cleared since"
            assert image["full"].count >= SIZE
            assert image["clean"].count >= SIZE, "written down as all dirty with the first change"
            with image.transaction() as bitmaps:
                bitmaps["more"] = dm.Bitmap.from_extents(SIZE, [0], [1], 512)
            with image.transaction() as bitmaps:
                del bitmaps["more"]
        with dm.open(Place(sound.path, "b")) as image:
            assert image["\udcff"].extents()[1].tolist() == [SIZE]
            assert "lost a commit" in image.info().notes[0]
    assert not dm.check(sound.path).corruptions
    with dm.open(Place(sound.path, "b")) as image:
        assert [recovery.how for recovery in image.recover()] == ["all dirty: the store lost a commit"]
        assert not image.info().notes
        assert image.recover() == []


@pytest.mark.parametrize("damaged", [(0, 1, 2, 3), (0, 2), (1, 3), (0, 1), (2, 3), (0, 1, 2), (1, 2, 3)])
def test_damaged_header_copies_never_lose_a_bit(sound: Sound, damaged: tuple[int, ...]) -> None:
    sound.write(_break_blocks(sound, *damaged))
    answers = use(sound)
    if len(damaged) == 4:
        assert all(isinstance(answers[key], Error) for key in ("describe", "change"))
        report = dm.check(sound.path, repair="all")
        assert (report.corruptions, report.check_errors, report.corruptions_fixed) == (1, 1, 0)
        assert not answers["names"]
        assert answers["dump"]["stopped"]
    else:
        assert answers["names"] == set(sound.bits)
        assert found_damage(answers)
        assert answers["change"] is None


# Mending


def mended(sound: Sound) -> dm.CheckReport:
    """Repairs the damaged store; the result must be without fault, and have lost no bit of what it still has."""
    with bounded(20):
        report = dm.check(sound.path, repair="all")
        after = dm.check(sound.path)
        assert (after.corruptions, after.leaks, after.check_errors) == (0, 0, 0), after.findings
        assert (report.corruptions, report.leaks) == (0, 0)
        doubtful = [line for line in report.made_dirty if line.endswith("its name may have been another")]
        lost = sound.bits.keys() - read_everything(sound)
        assert len(lost) <= len(doubtful) or report.dropped, "what is gone is named"
        for bitmap in dm.describe(sound.path).bitmaps:
            assert bitmap.count is not None
            if (expected := sound.bits.get((str(bitmap.node), bitmap.name))) is None:
                assert doubtful
                assert bitmap.count >= SIZE
            else:
                assert bitmap.count >= int(np.bitwise_count(expected).sum()) * bitmap.granularity
        attempt(lambda: _change(sound.path))  # the node may be one of what was lost
        read_everything(sound)
        assert not dm.check(sound.path).corruptions
    return report


@pytest.mark.parametrize("step", [29, pytest.param(1, marks=pytest.mark.long)])
def test_every_damage_but_to_all_headers_is_mended(sound: Sound, step: int) -> None:
    for region in sound.regions:
        stop = region.start + 180 if region.name.startswith("header") else region.stop
        wide = 41 * step if region.name.startswith("space map leaf") else step
        for _ in flipped(sound, range(region.start * 8, stop * 8, wide)):
            report = mended(sound)
            assert report.corruptions_fixed > 0 or region.name.startswith("header"), region.name


def test_mending_a_lost_header_keeps_the_doubt(sound: Sound) -> None:
    newest = headers.choose(sound.path, sound.data).slot
    sound.write(_break_blocks(sound, *store.COPIES[newest]))
    mended(sound)
    sound.write(_break_blocks(sound, *store.COPIES[newest]))
    dm.check(sound.path, repair="all")
    for node, name in sound.bits:
        with dm.open(Place(sound.path, node)) as image:
            assert image[name].extents()[1].tolist() == [SIZE]


def test_mending_damaged_bits_makes_that_bitmap_all_dirty_and_no_other(sound: Sound) -> None:
    region = sound.region("bits: node 'a', bitmap 'monday'")
    for _ in flipped(sound, [region.start * 8]):
        report = dm.check(sound.path, repair="all")
        assert report.dropped == []
        assert report.made_dirty == ["node 'a', bitmap 'monday': its bits are damaged"]
        for (node, name), expected in sound.bits.items():
            with dm.open(Place(sound.path, node)) as image:
                if name == "monday":
                    assert image[name].extents()[1].tolist() == [SIZE]
                else:
                    assert np.array_equal(image[name].words, expected)


def everything_of(path: str, node: str) -> dict[str, tuple[int, bool, int]]:
    """The bitmaps of a node: granularity, whether they record, dirty bytes."""
    with dm.open(Place(path, node)) as image:
        return {b.name: (b.granularity, b.recording, b.count or 0) for b in image.info().bitmaps}


@pytest.mark.parametrize("step", [97, pytest.param(1, marks=pytest.mark.long)])
def test_mending_a_damaged_directory_takes_the_names_from_the_commit_before(sound: Sound, step: int) -> None:
    """The last commit changed node 'a', so the older slot leads to another directory of it."""
    sound.write(sound.data)
    before = everything_of(sound.path, "a")
    regions = [r for r in sound.regions if r.name.startswith("directory entry: node 'a'")]
    start, stop = min(r.start for r in regions), max(r.stop for r in regions)
    for _ in flipped(sound, range(start * 8, stop * 8, step)):
        report = mended(sound)
        assert report.dropped == []
        lines = {f"node 'a', bitmap '{name}': its directory was damaged" for name in before}
        assert lines <= set(report.made_dirty)
        assert all(line.endswith("its name may have been another") for line in set(report.made_dirty) - lines)
    for _ in flipped(sound, [start * 8]):
        dm.check(sound.path, repair="all")
        assert everything_of(sound.path, "a") == {
            name: (granularity, True, -(-SIZE // granularity) * granularity)
            for name, (granularity, _, _) in before.items()
        }
        with dm.open(Place(sound.path, "b")) as image:
            assert np.array_equal(image["\udcff"].words, sound.bits["b", "\udcff"]), "others are not concerned"
            assert not image.info().notes


def test_mending_a_directory_that_both_slots_lead_to_reads_what_names_it_still_shows(sound: Sound) -> None:
    region = next(region for region in sound.regions if region.name.startswith("directory entry: node 'b'"))
    for _ in flipped(sound, [region.start * 8]):  # of the place of the bits
        report = mended(sound)
        assert report.dropped == []
        (line,) = report.made_dirty
        assert line == "node 'b', bitmap '\\xff': its directory was damaged, and its name may have been another"
        assert list(everything_of(sound.path, "b")) == ["\udcff"]
        with dm.open(Place(sound.path, "a")) as image:
            assert np.array_equal(image["monday"].words, sound.bits["a", "monday"])


def test_mending_a_directory_of_which_nothing_can_be_read_drops_its_bitmaps(sound: Sound) -> None:
    sound.write(sound.data)
    _spoil_directory(sound.path, b"b")
    report = mended(sound)
    (line,) = report.dropped
    assert line.startswith("node 'b', 1 of 1 bitmap: directory of node 'b' at 0x")
    assert report.made_dirty == []
    assert everything_of(sound.path, "b") == {}


def _spoil_directory(path: str, node: bytes) -> None:
    """So that not even the first entry can be told from the next."""
    with Store(path) as target:
        record = target.read(lambda snapshot: snapshot.table().get(node))
    assert record is not None
    with open(path, "r+b") as file:
        file.seek(record.directory.offset + directory.DIRECTORY_ENTRY.field("extra_data_size").offset)
        file.write(b"?")


def test_mending_a_damaged_directory_names_what_the_commit_before_did_not_have(sound: Sound) -> None:
    sound.write(sound.data)
    with dm.open(Place(sound.path, "a")) as image, image.transaction() as bitmaps:
        bitmaps["new"] = dm.Bitmap.from_extents(SIZE, [0], [1], 512)
        del bitmaps["full"]
        bitmaps["newer"] = dm.Bitmap(SIZE)
    _spoil_directory(sound.path, b"a")
    report = dm.check(sound.path, repair="all")
    (line,) = report.dropped
    assert line.startswith("node 'a', 1 of 4 bitmaps: directory of node 'a'")
    assert {name: count >= SIZE for name, (_, _, count) in everything_of(sound.path, "a").items()} == {
        "monday": True,
        "clean": True,
        "full": True,
    }
    assert not dm.check(sound.path).findings


def test_mending_never_takes_the_bitmaps_of_another_node_of_that_name(sound: Sound, folder: Path) -> None:
    sound.write(sound.data)
    with Store(sound.path) as target, target.change() as change:
        record = change.table.get(b"b")
        assert record is not None
        place = change.place(directory.build_directory([directory.Entry(b"other", store.ALL_ONES, 0, 0, 16)]))
        change.table.put(replace(record, uuid=b"another one here", directory=place, generation=change.generation))
    _spoil_directory(sound.path, b"b")
    report = dm.check(sound.path, repair="all")
    assert len(report.dropped) == 1
    assert everything_of(sound.path, "b") == {}


def test_mending_after_a_disk_has_grown_drops_what_is_too_fine_for_it(sound: Sound) -> None:
    sound.write(sound.data)
    with Store(sound.path) as target:
        with target.change() as change:  # a device, or there would have to be a file of that size
            place = change.place(directory.build_directory([directory.Entry(b"fine", store.ALL_ONES, 0, 0, 9)]))
            node = Record(b"d", store.KIND_DEVICE, bytes(16), SIZE, change.generation, place, 1)
            change.table.put(node)
        with target.change() as change:
            place = change.place(directory.build_directory([directory.Entry(b"coarse", store.ALL_ONES, 0, 0, 30)]))
            change.table.put(replace(node, size=1 << 62, directory=place, generation=change.generation))
    _spoil_directory(sound.path, b"d")
    report = dm.check(sound.path, repair="all")
    assert [line.partition(":")[0] for line in report.dropped] == ["device 'd', 1 of 1 bitmap"]
    assert everything_of(sound.path, "d") == {}
    assert not dm.check(sound.path).findings


def test_recover_makes_damaged_bits_all_dirty(sound: Sound) -> None:
    region = sound.region("bits: node 'a', bitmap 'monday'")
    for _ in flipped(sound, [region.start * 8 + 9]):
        with dm.open(Place(sound.path, "a")) as image:
            with pytest.raises(dm.FormatError, match=r"monday.*checksum is wrong; recover"):
                image["monday"]
            assert image["full"].count >= SIZE, "others are not concerned"
            recovered = [(item.name, item.how) for item in image.recover()]
            assert recovered == [("monday", "all dirty: the checksum of its bits is wrong")]
            assert image["monday"].extents()[1].tolist() == [SIZE]
        assert not dm.check(sound.path).findings


def test_recover_brings_back_what_can_be_named_of_a_damaged_directory_all_dirty(sound: Sound) -> None:
    sound.write(sound.data)
    with dm.open(Place(sound.path, "a")) as image:
        before = everything_of(sound.path, "a")
        with image.transaction() as bitmaps:
            bitmaps["new"] = dm.Bitmap.from_extents(SIZE, [0], [1], 512)
            bitmaps["monday"] = bitmaps["monday"].replace(recording=False)
        _spoil_directory(sound.path, b"a")
        with pytest.raises(dm.FormatError, match=r"directory of node 'a' at .*: its checksum is wrong; recover makes"):
            image["monday"]
        with pytest.raises(dm.BitmapNotFoundError, match="'new': its directory is damaged, and shows no"):
            image.recover(["new"])
        recovered = {item.name: item.how for item in image.recover(["monday"])}
        what = f"all dirty: its directory was damaged; 1 of {len(before) + 1} bitmaps cannot be named"
        assert recovered == dict.fromkeys(before, what)
        for _, recording, count in everything_of(sound.path, "a").values():
            assert recording
            assert count >= SIZE
        with image.transaction() as bitmaps:
            bitmaps["monday"].clear(0, SIZE)
            bitmaps["later"] = dm.Bitmap(SIZE)
        assert image["monday"].count == 0
    report = dm.check(sound.path)
    assert (report.corruptions, report.leaks > 0) == (0, True), "nobody knows what the lost directory led to"
    assert dm.check(sound.path, repair="leaks").leaks == 0


def test_recover_of_a_directory_of_which_nothing_is_known_says_so_and_changes_nothing(sound: Sound) -> None:
    sound.write(sound.data)
    _spoil_directory(sound.path, b"b")
    before = Path(sound.path).read_bytes()
    with dm.open(Place(sound.path, "b")) as image, pytest.raises(dm.FormatError, match="none of its bitmaps can be"):
        image.recover()
    assert Path(sound.path).read_bytes() == before


def test_repair_of_leaks_alone_leaves_a_damaged_store_as_it_is(sound: Sound) -> None:
    for _ in flipped(sound, [sound.region("namespace table").start * 8]):
        before = sound.read()
        assert dm.check(sound.path, repair="leaks").corruptions
        assert sound.read() == before


# Cut short, and garbage


def test_store_cut_at_every_sector(sound: Sound) -> None:
    for length in range(0, len(sound.data), 512):
        sound.write(sound.data[:length])
        answers = use(sound)
        assert found_damage(answers) or answers["names"] == set(sound.bits)


def test_store_cut_and_filled_up_with_zeros(sound: Sound) -> None:
    for length in range(0, len(sound.data), 512):
        sound.write(sound.data[:length].ljust(len(sound.data), b"\0"))
        use(sound)


@pytest.mark.parametrize("seed", range(6))
def test_garbage_in_places(sound: Sound, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        damaged = bytearray(sound.data)
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(len(damaged))
            length = rng.choice([1, 4, 8, 100, 512, 4096, 20000])
            garbage = rng.choice([rng.randbytes(length), bytes(length), b"\xff" * length])
            damaged[at : at + length] = garbage[: len(damaged) - at]
        sound.write(damaged)
        use(sound)


def test_nothing_but_garbage(sound: Sound) -> None:
    rng = random.Random(7)
    for _ in range(100):
        data = store.MAGIC + rng.randbytes(rng.choice([0, 1, 91, 92, 4092, 16380, 60000]))
        sound.write(data)
        answers = use(sound)
        assert not answers["names"]
        assert isinstance(answers["change"], Error)


def test_areas_swapped_with_each_other(sound: Sound) -> None:
    """A cluster that was written to the wrong place, or never: old content, sound in itself."""
    clusters = range(store.RESERVED, len(sound.data) - 4096, 4096)
    for one, other in pairwise(clusters):
        damaged = bytearray(sound.data)
        damaged[one : one + 4096], damaged[other : other + 4096] = (
            sound.data[other : other + 4096],
            sound.data[one : one + 4096],
        )
        sound.write(damaged)
        use(sound)


# Numbers that lie under checksums that are right


class Forged:
    """A copy of the sound store whose structures can be set to anything; `data` puts all checksums right."""

    def __init__(self, sound: Sound) -> None:
        self.raw = bytearray(sound.data)
        chosen = headers.choose(sound.path, sound.data)
        self.header = chosen.header
        self.table = self._at(self.header.table)
        self.root = self._at(self.header.space)
        self.released = self._at(self.header.released)
        leaf = store.LEAF.parse(self.root)
        self.leaf_offset = int(leaf.offset)
        self.leaf = self._at(Area(self.leaf_offset, self.header.cluster_size, 0))
        number, self.bucket_area = next(
            (number, area) for number, area in enumerate(store.parse_areas(self.table)) if area.length
        )
        self.position = number * store.AREA.size
        self.bucket = self._at(self.bucket_area)
        self.records: list[Record] = list(store.parse_records(bytes(self.bucket)))
        self.directories = {bytes(record.name): self._at(record.directory) for record in self.records}
        self.fields: dict[str, dict[str, int]] = {}  # of the header and its extensions, to be set at the end
        self.record_fields: dict[str, int] = {}  # of the first record
        self.pointer_fields: dict[str, int] = {}  # of the pointer to the bucket
        self.leaf_fields: dict[str, int] = {}  # of the root's first entry

    def _at(self, area: Area) -> bytearray:
        return bytearray(self.raw[area.offset : area.offset + area.length])

    def _put(self, offset: int, data: bytes | bytearray) -> int:
        self.raw[offset : offset + len(data)] = data
        return crc32c.crc32c(data)

    def data(self) -> bytes:
        """The whole file, checksums right from the leaves to the headers."""
        bucket = b""
        for record in self.records:
            area = record.directory
            if area.length:
                area = area._replace(checksum=self._put(area.offset, self.directories[record.name]))
            raw = bytearray(store.build_record(replace(record, directory=area)))
            if record.name == b"a":
                _set_fields(store.RECORD, raw, 0, self.record_fields)
            bucket += raw
        checksum = self._put(self.bucket_area.offset, bucket)
        pointer = bytearray(store.AREA.build(offset=self.bucket_area.offset, length=len(bucket), checksum=checksum))
        _set_fields(store.AREA, pointer, 0, self.pointer_fields)
        if any(self.table):  # else the table itself is forged
            self.table[self.position : self.position + store.AREA.size] = pointer
        table = self.header.table._replace(checksum=self._put(self.header.table.offset, self.table))
        leaf = bytearray(self.root[: store.LEAF.size])
        _set_fields(store.LEAF, leaf, 0, {"checksum": self._put(self.leaf_offset, self.leaf)} | self.leaf_fields)
        self.root[: store.LEAF.size] = leaf
        space = self.header.space._replace(checksum=self._put(self.header.space.offset, self.root))
        released = self.header.released._replace(checksum=self._put(self.header.released.offset, self.released))
        block = bytearray(headers.build_block(replace(self.header, table=table, space=space, released=released)))
        at = store.HEADER.size + 8
        for name, structure in (
            ("header", store.HEADER),
            ("namespaces", store.NAMESPACES_EXTENSION),
            ("space", store.AREA),
            ("released", store.AREA),
        ):
            place = 0 if name == "header" else at
            _set_fields(structure, block, place, self.fields.get(name, {}))
            at += 0 if name == "header" else structure.size + 8
        block[-4:] = crc32c.crc32c(block[:-4]).to_bytes(4, "big")
        for number in range(4):
            self._put(number * store.BLOCK, block)
        return bytes(self.raw)


def _set_fields(structure: Structure, raw: bytearray, start: int, values: dict[str, int]) -> None:
    for name, value in values.items():
        field = structure.field(name)
        at = start + field.offset
        raw[at : at + field.size] = (value % 256**field.size).to_bytes(field.size, "big")


def _extremes(size: int) -> list[int]:
    most = 256**size - 1
    near = [0, 1, 2, 7, 8, 255, 4096, 1 << 16, 1 << 20, 1 << 31, 1 << 40, 1 << 62, 1 << 63, most // 2, most - 7, most]
    return sorted({value for value in near if value <= most})


def _forgeries() -> Iterator[tuple[str, Callable[[Forged], None]]]:
    """Each numeric field of each structure at its limits and beyond."""
    for part, structure in (
        ("header", store.HEADER),
        ("namespaces", store.NAMESPACES_EXTENSION),
        ("space", store.AREA),
        ("released", store.AREA),
    ):
        for field in structure.fields:
            if field.size < 16 and field.name not in ("magic", "checksum"):
                for value in _extremes(field.size):
                    yield (
                        f"{part}.{field.name}={value:#x}",
                        lambda f, part=part, name=field.name, value=value: f.fields.update({part: {name: value}}),
                    )
    for target, structure in (
        ("record_fields", store.RECORD),
        ("pointer_fields", store.AREA),
        ("leaf_fields", store.LEAF),
    ):
        for field in structure.fields:
            if field.size < 16 and field.name != "checksum":
                for value in _extremes(field.size):
                    yield (
                        f"{target}.{field.name}={value:#x}",
                        lambda f, target=target, name=field.name, value=value: getattr(f, target).update({name: value}),
                    )
    for field in directory.DIRECTORY_ENTRY.fields:
        for value in _extremes(field.size):
            yield (
                f"entry.{field.name}={value:#x}",
                lambda f, name=field.name, value=value: _set_fields(
                    directory.DIRECTORY_ENTRY, f.directories[b"a"], 0, {name: value}
                ),
            )
    for field in store.RUN.fields:
        for value in _extremes(field.size):
            yield (
                f"run.{field.name}={value:#x}",
                lambda f, name=field.name, value=value: _set_fields(store.RUN, f.released, 0, {name: value}),
            )
    for name in ("table", "root", "released", "leaf", "bucket"):
        for filler in (0, 0xFF, 0x55):
            yield (f"{name} of {filler:#x}", lambda f, name=name, filler=filler: _fill(f, name, filler))
    yield "all free", lambda f: _fill(f, "leaf", 0, then={"free": 32768})
    yield "all used", lambda f: _fill(f, "leaf", 0xFF, then={"free": 0})
    yield "headers free", lambda f: _free_headers(f)
    yield "twice the bucket", lambda f: f.records.extend(f.records)
    yield (
        "shared directory",
        lambda f: f.records.__setitem__(
            1, replace(f.records[1], directory=f.records[0].directory, nb_bitmaps=f.records[0].nb_bitmaps)
        ),
    )


def _fill(forged: Forged, name: str, filler: int, then: dict[str, int] | None = None) -> None:
    raw = getattr(forged, name)
    raw[:] = bytes([filler]) * len(raw)
    if name == "bucket":
        forged.records = []
    forged.leaf_fields.update(then or {})


def _free_headers(forged: Forged) -> None:
    forged.leaf[0] &= 0xF0
    forged.leaf_fields["free"] = 32768 - sum(map(int.bit_count, forged.leaf))


@contextmanager
def little_memory(extra: int = 256 << 20) -> Iterator[None]:
    """While active, this process may take that many bytes more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def use_forged(sound: Sound) -> None:
    """All that must not take long, or much memory, however large the numbers are.

    Bits are not read: a bitmap of 512 MiB is one that the format allows.
    """
    with bounded(2):
        attempt(lambda: dm.describe(sound.path))
    with bounded(2):
        attempt(lambda: dm.check(sound.path))
    with bounded(2):
        attempt(lambda: dm.dump(sound.path))
    for node in ("a", "b", "empty"):
        with bounded(2):
            image = attempt(lambda node=node: dm.open(Place(sound.path, node)))
            if isinstance(image, Error):
                continue
            with image:
                attempt(lambda image=image: list(image))
                attempt(lambda image=image: _add(image))
    with bounded(4):
        attempt(lambda: dm.check(sound.path, repair="all"))
    with bounded(2):
        attempt(lambda: dm.check(sound.path))


def _add(image: dm.Namespace) -> None:
    with image.transaction() as bitmaps:
        bitmaps["new"] = dm.Bitmap(image.size, 1 << 31)


def test_forging_nothing_changes_nothing(sound: Sound) -> None:
    sound.write(Forged(sound).data())
    assert not dm.check(sound.path).findings
    assert use(sound)["names"] == set(sound.bits)


@pytest.mark.parametrize("part", ["header", "namespaces", "space", "released", "record_fields", "pointer_fields",
                                  "leaf_fields", "entry", "run", "other"])  # fmt: skip
def test_numbers_that_lie(sound: Sound, part: str) -> None:
    parts = (
        "header",
        "namespaces",
        "space",
        "released",
        "record_fields",
        "pointer_fields",
        "leaf_fields",
        "entry",
        "run",
    )
    count = 0
    for name, forge in _forgeries():
        if (name.split(".")[0] if name.split(".")[0] in parts else "other") != part:
            continue
        forged = Forged(sound)
        forge(forged)
        sound.write(forged.data())
        try:
            with little_memory():
                use_forged(sound)
        except BaseException as error:
            error.add_note(f"forged: {name}")
            raise
        count += 1
    assert count


def test_forged_header_that_frees_itself_is_not_written_over(sound: Sound) -> None:
    forged = Forged(sound)
    _free_headers(forged)
    data = forged.data()
    sound.write(data)
    with pytest.raises(dm.FormatError, match="headers' clusters are marked as free"):
        _change(sound.path)
    assert sound.read() == data


@pytest.mark.parametrize("length", [1 << 32, pytest.param(1 << 40, marks=pytest.mark.long), 1 << 45])
def test_long_areas_of_a_sparse_file(sound: Sound, length: int) -> None:
    """The file's length, which costs nothing, backs no claim."""
    cases = [
        lambda f: f.fields.update(space={"length": 4 << 20}),
        lambda f: f.fields.update(released={"length": 16 << 20}),
        lambda f: f.fields.update(namespaces={"length": 1 << 20, "bucket_bits": 16}),
        lambda f: f.pointer_fields.update(length=2**32 - 1),
        lambda f: f.pointer_fields.update(length=128 << 20),
        lambda f: f.record_fields.update(directory_length=2**32 - 1),
        lambda f: f.record_fields.update(directory_length=128 << 20),
        lambda f: f.record_fields.update(size=2**63 - 1),
    ]
    for forge in cases:
        forged = Forged(sound)
        forge(forged)
        sound.write(forged.data())
        with suppress(OSError):
            os.truncate(sound.path, length)
        with little_memory():
            use_forged(sound)
        sound.write(sound.data)


def test_sparse_areas_with_right_checksums(sound: Sound) -> None:
    """Zeros that nobody stored, with the checksum of so many zeros."""
    zeros = bytes(128 << 20)
    for part, length in (("pointer", 128 << 20), ("directory", 128 << 20), ("released", 16 << 20), ("space", 4 << 20)):
        forged = Forged(sound)
        start, checksum = 1 << 30, crc32c.crc32c(memoryview(zeros)[:length])
        where = {"offset": start, "length": length, "checksum": checksum}
        if part == "pointer":
            forged.pointer_fields.update(where)
        elif part == "directory":
            forged.record_fields.update({f"directory_{name}": value for name, value in where.items()}, nb_bitmaps=65535)
        else:
            forged.fields[part] = where
        sound.write(forged.data())
        os.truncate(sound.path, 1 << 34)
        with little_memory():
            use_forged(sound)
        sound.write(sound.data)


def test_check_names_each_kind_of_damage_by_its_place(sound: Sound) -> None:
    for kind, where in (
        ("header copy 2 (slot A)", "header copy 2"),
        ("namespace table", "namespace table"),
        ("namespace record: node 'a'", "bucket"),
        ("directory entry: node 'a', bitmap 'monday'", "directory of node 'a'"),
        ("bits: node 'a', bitmap 'monday'", "bitmap 'monday'"),
        ("space map", "space map"),
        ("space map leaf 0", "space map leaf 0"),
        ("released clusters", "released clusters"),
    ):
        region = sound.region(kind)
        for _ in flipped(sound, [region.start * 8 + 3]):
            findings = dm.check(sound.path).findings
            assert any(where in finding.where for finding in findings), (kind, findings)
            severity = "note" if kind.startswith("header") else "corruption"
            assert severity in {finding.severity for finding in findings}


def test_leak_is_found_and_reclaimed(sound: Sound) -> None:
    forged = Forged(sound)
    used = forged.header.clusters - 1
    forged.leaf[used // 8] |= 0xF << used % 8 & 0xFF
    forged.leaf_fields["free"] = 32768 - sum(map(int.bit_count, forged.leaf))
    sound.write(forged.data())
    report = dm.check(sound.path)
    assert report.leaks > 0
    assert report.corruptions == 0
    report = dm.check(sound.path, repair="leaks")
    assert report.leaks == 0
    assert report.leaks_fixed > 0
    assert read_everything(sound) == sound.bits.keys()
    assert not dm.check(sound.path).findings


def _used_but_free(forged: Forged) -> None:
    cluster = forged.header.table.offset // 4096
    forged.leaf[cluster // 8] &= ~(1 << cluster % 8) & 0xFF
    forged.leaf_fields["free"] = 32768 - sum(map(int.bit_count, forged.leaf))


def _shared_bits(forged: Forged) -> None:
    (_, entry), *others = directory.parse_entries(bytes(forged.directories[b"a"]))
    assert entry.name == b"monday"
    twin = replace(entry, name=b"clean")
    entries = [entry, *(twin if other.name == b"clean" else other for _, other in others)]
    forged.directories[b"a"] = bytearray(directory.build_directory(entries))
    number = next(n for n, record in enumerate(forged.records) if record.name == b"a")
    area = forged.records[number].directory
    forged.records[number] = replace(
        forged.records[number], directory=area._replace(length=len(forged.directories[b"a"]))
    )


def _released_but_used(forged: Forged) -> None:
    _set_fields(store.RUN, forged.released, 0, {"first": forged.header.table.offset // 4096, "count": 1})


def _too_short(forged: Forged) -> None:
    forged.fields.update(
        header={"clusters": forged.header.space.offset // 4096}, released={"offset": 0, "length": 0, "checksum": 0}
    )


@pytest.mark.parametrize(
    ("forge", "where", "what"),
    [
        (_used_but_free, "clusters", "in use, but marked as free"),
        (_shared_bits, "bits of node 'a', bitmap 'clean'", "overlaps bits of node 'a', bitmap 'monday'"),
        (_released_but_used, "released clusters", "overlaps namespace table|out of range"),
        (_too_short, "space map", "behind the last cluster"),
        (lambda f: f.fields.update(namespaces={"namespaces": 4}), "namespaces extension.namespaces", "there are 3"),
        (lambda f: f.fields.update(namespaces={"namespaces": 1}), "bucket 0", "more namespaces than all there are, 1"),
        (lambda f: f.fields.update(namespaces={"namespaces": 0}), "bucket 0", "more namespaces than all there are, 0"),
        (lambda f: f.leaf_fields.update(free=3), "space map[0].free", "are free"),
    ],
)
def test_contradictions_are_found_and_mended(
    sound: Sound, forge: Callable[[Forged], None], where: str, what: str
) -> None:
    forged = Forged(sound)
    forge(forged)
    sound.write(forged.data())
    findings = dm.check(sound.path).findings
    assert any(where in f.where and re.search(what, f.what) and f.severity == "corruption" for f in findings), findings
    expected = dict(sound.bits)
    if forge is _shared_bits:
        expected["a", "clean"] = expected["a", "monday"]
    report = dm.check(sound.path, repair="all")
    assert (report.corruptions, report.leaks, report.dropped) == (0, 0, [])
    assert not dm.check(sound.path).findings
    for (node, name), words in expected.items():
        with dm.open(Place(sound.path, node)) as image:
            assert name == "clean" or np.array_equal(image[name].words, words)
    read_everything(sound)


def test_compaction_through_a_link_leaves_the_link(sound: Sound, folder: Path) -> None:
    sound.write(sound.data)
    link = folder / "link"
    link.symlink_to(sound.path)
    compact(str(link))
    assert link.is_symlink()
    assert read_everything(sound) == sound.bits.keys()
    assert sound.read() != sound.data
    link.unlink()


def test_compaction_of_a_store_with_two_names_is_refused(sound: Sound, folder: Path) -> None:
    sound.write(sound.data)
    os.link(sound.path, folder / "second")
    with pytest.raises(dm.StorageError, match="hard link"):
        compact(sound.path)
    assert sound.read() == sound.data
    (folder / "second").unlink()


# Bounds: what a small store can claim to hold.


# Its own memory only: the kernel counts what a process had before it became another program as that one's, too.
MEASURED = """
import sys
from dirtmap.tools.cli import main
try:
    main()
finally:
    sys.stdout.flush()
    with open("/proc/self/status") as status:
        print("resident", next(line.split()[1] for line in status if line.startswith("VmHWM")), file=sys.stderr)
"""


def run_measured(*args: object) -> tuple[str, float, int]:
    """What a `dirtmap` of its own says, its seconds of CPU and how many MiB it ever had resident."""
    command = [sys.executable, "-c", MEASURED, *map(str, args)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as started:
        assert started.stdout
        said = started.stdout.read()
        _, status, used = os.wait4(started.pid, 0)
        started.returncode = os.waitstatus_to_exitcode(status)
    said, _, resident = said.rpartition("resident ")
    return said, used.ru_utime + used.ru_stime, int(resident) >> 10


SECONDS, MEBIBYTES = 2 * 2.0, 256  # as in test_hostile


@pytest.mark.parametrize(("pattern", "leaks"), [(0xFF, (1 << 24) - 4), (0x55, (1 << 23) - 4)])
def test_millions_of_leaks_are_counted_and_a_thousand_runs_shown(tmp_path: Path, pattern: int, leaks: int) -> None:
    """In clusters of 2 MiB a leaf has 16 million marks."""
    path = str(tmp_path / "s.dmap")
    create(path, cluster_bits=21)
    size = 1 << 21
    leaf = bytes([pattern | 0xF]) + bytes([pattern]) * (size - 1)
    with open(path, "r+b") as file:
        chosen = headers.choose(path, file.read(store.RESERVED))
        place = store.LEAF.parse(os.pread(file.fileno(), store.LEAF.size, chosen.header.space.offset)).offset
        os.pwrite(file.fileno(), leaf, place)
        free = store.leaf_clusters(size) - int.from_bytes(leaf, "little").bit_count()
        root = store.LEAF.build(offset=place, free=free, checksum=crc32c.crc32c(leaf))
        os.pwrite(file.fileno(), root, chosen.header.space.offset)
        space = chosen.header.space._replace(checksum=crc32c.crc32c(root))
        block = headers.build_block(replace(chosen.header, clusters=8 * size, space=space))
        for offset in headers.blocks_of(chosen.slot):
            os.pwrite(file.fileno(), block, offset)
    said, seconds, mebibytes = run_measured("check", path)
    *shown, total = said.splitlines()
    found = int(total.split(": ")[1].split()[0])
    assert abs(found - leaks) < 4, total
    assert len(shown) == (16 if pattern == 0xFF else 1000)
    assert seconds < SECONDS
    assert mebibytes < MEBIBYTES


@pytest.mark.parametrize("nested", [False, True])
def test_a_directory_that_two_namespaces_have_is_read_once(tmp_path: Path, nested: bool) -> None:
    """Else a store of 2 MiB could claim 65,536 times as many bitmaps as it has."""
    path, count = str(tmp_path / "s.dmap"), 64
    create(path)
    with Store(path) as target, target.change() as change:
        entry = directory.Entry(b"n" * 1000, store.ALL_ONES, 0, 2, 16)
        size = entry.packed_size  # four of them take a cluster
        assert size == 1024
        packed = directory.build_directory(
            [replace(entry, name=f"{number:04}".encode() + entry.name[4:]) for number in range(4 * count)]
        )
        place = change.place(packed)
        for number in range(count):
            start = 4096 * number if nested else 0
            area = Area(place.offset + start, len(packed) - start, crc32c.crc32c(packed[start:]))
            node = Record(b"%d" % number, store.KIND_DEVICE, os.urandom(16), SIZE, 1, area, area.length // size)
            change.table.put(node)
    info = dm.describe(path)
    assert len(info.errors) == count - 1
    assert all(re.search(r"directory of device '\d+' at 0x\w+: overlaps that of namespace", it) for it in info.errors)
    assert len(info.bitmaps) <= 4 * count
    assert len([f for f in dm.check(path).findings if "overlaps that of" in f.what]) == count - 1
    for number in range(count):  # each by itself
        with dm.open(Place(path, str(number))) as image:
            assert len(image) == 4 * (count - number if nested else count)
    assert dm.check(path, repair="all").corruptions == 0
    assert dm.describe(path).errors == ()


def test_recovery_of_the_largest_directory_keeps_little_of_it(tmp_path: Path) -> None:
    """66 MiB of names. They are in memory as found, as written and as told; not the damaged directory, too."""
    path = str(tmp_path / "s.dmap")
    (tmp_path / "a.raw").write_bytes(bytes(512))
    create(path)
    with Store(path) as target:
        add_node(target, "a", str(tmp_path / "a.raw"))
        entry = directory.Entry(b"n" * directory.MAX_NAME_SIZE, store.ALL_ONES, 0, 2, 16)
        names = (b"%05d" % number + entry.name[5:] for number in range(directory.MAX_BITMAPS))
        with target.change() as change:
            record = change.table.get(b"a")
            assert record
            place = change.place(directory.build_directory([replace(entry, name=name) for name in names]))
            change.table.put(replace(record, directory=place, nb_bitmaps=directory.MAX_BITMAPS))
    with open(path, "r+b") as file:
        file.seek(place.offset + place.length - 100)
        file.write(b"?")
    said, _, mebibytes = run_measured("recover", "--index", tmp_path / "index", "--store", path, "a")
    assert len(said.splitlines()) == directory.MAX_BITMAPS, said[:1000]
    assert mebibytes < 300
