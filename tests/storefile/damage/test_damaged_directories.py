"""A store with damaged directories or bits: mending and `recover` name what is lost, and make the rest all dirty."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.damage import SIZE, Sound, flipped, mended

import dirtmap.engine as dm
from dirtmap.engine.host.kind import Address
from dirtmap.engine.storefile.directory import place_directory
from dirtmap.engine.storefile.file import Store
from dirtmap.fmt import directory, store
from dirtmap.fmt.parsers.directory import DIRECTORY_ENTRY
from dirtmap.fmt.store import Record


@pytest.mark.parametrize("step", [29, pytest.param(1, marks=pytest.mark.long)])
def test_every_damage_but_to_all_headers_is_mended(sound: Sound, step: int) -> None:
    for region in sound.regions:
        stop = region.start + 180 if region.name.startswith("header") else region.stop
        wide = 41 * step if region.name.startswith(("space map leaf", "bits")) else step  # of one cluster, nearly empty
        for _ in flipped(sound, range(region.start * 8, stop * 8, wide)):
            report = mended(sound)
            assert report.corruptions_fixed > 0 or region.name.startswith("header"), region.name


def test_mending_damaged_bits_makes_that_bitmap_all_dirty_and_no_other(sound: Sound) -> None:
    region = sound.region("bits: node 'a', bitmap 'monday'")
    for _ in flipped(sound, [region.start * 8]):
        report = dm.check(sound.path, repair="all")
        assert report.dropped == []
        what = f"its bits are damaged at {region.start:#x}, so 74 granules of 74 must count as dirty"
        assert report.made_dirty == [f"node 'a', bitmap 'monday': {what}"]
        for (node, name), expected in sound.bits.items():
            with dm.open(Address(sound.path, node)) as image:
                if name == "monday":
                    assert image[name].extents()[1].tolist() == [SIZE]
                else:
                    assert np.array_equal(image[name].words, expected)


def everything_of(path: str, node: str) -> dict[str, tuple[int, bool, int]]:
    """The bitmaps of a node: granularity, whether they record, dirty bytes."""
    with dm.open(Address(path, node)) as image:
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
        with dm.open(Address(sound.path, "b")) as image:
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
        with dm.open(Address(sound.path, "a")) as image:
            assert np.array_equal(image["monday"].words, sound.bits["a", "monday"])


def test_mending_a_directory_that_shows_another_granularity_makes_all_dirty_at_that(sound: Sound) -> None:
    region = next(region for region in sound.regions if region.name.startswith("directory entry: node 'b'"))
    for bit in flipped(sound, range((region.start + 17) * 8, (region.start + 18) * 8)):  # of granularity_bits
        report = mended(sound)
        if report.dropped:  # there is no such granularity
            continue
        ((granularity, _, dirty),) = everything_of(sound.path, "b").values()
        assert granularity == 1 << ((sound.data[region.start + 17]) ^ (1 << bit % 8))
        assert dirty == -(-SIZE // granularity) * granularity


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
        file.seek(record.directory.offset + store.OWNER_SIZE + DIRECTORY_ENTRY.field("extra_data_size").offset)
        file.write(b"?")


def test_mending_a_damaged_directory_names_what_the_commit_before_did_not_have(sound: Sound) -> None:
    sound.write(sound.data)
    with dm.open(Address(sound.path, "a")) as image, image.transaction() as bitmaps:
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
        place = place_directory(change, b"b", [directory.Entry(b"other", store.ALL_ONES, 0, 0, 16)])
        change.table.put(replace(record, uuid=b"another one here", directory=place, generation=change.generation))
    _spoil_directory(sound.path, b"b")
    report = dm.check(sound.path, repair="all")
    assert len(report.dropped) == 1
    assert everything_of(sound.path, "b") == {}


def test_mending_after_a_disk_has_grown_drops_what_is_too_fine_for_it(sound: Sound) -> None:
    sound.write(sound.data)
    with Store(sound.path) as target:
        with target.change() as change:  # a device, or there would have to be a file of that size
            place = place_directory(change, b"d", [directory.Entry(b"fine", store.ALL_ONES, 0, 0, 9)])
            node = Record(b"d", store.KIND_DEVICE, bytes(16), SIZE, change.generation, place, 1)
            change.table.put(node)
        with target.change() as change:
            place = place_directory(change, b"d", [directory.Entry(b"coarse", store.ALL_ONES, 0, 0, 30)])
            change.table.put(replace(node, size=1 << 62, directory=place, generation=change.generation))
    _spoil_directory(sound.path, b"d")
    report = dm.check(sound.path, repair="all")
    assert [line.partition(":")[0] for line in report.dropped] == ["device 'd', 1 of 1 bitmap"]
    assert everything_of(sound.path, "d") == {}
    assert not dm.check(sound.path).findings


def test_damaged_bits_are_dirty_which_is_said_and_recover_makes_it_last(sound: Sound, caplog: Any) -> None:
    region = sound.region("bits: node 'a', bitmap 'monday'")
    for _ in flipped(sound, [region.start * 8 + 9]):
        with dm.open(Address(sound.path, "a")) as image:
            what = f"bits are damaged at {region.start:#x}, so 74 granules of 74 must count as dirty"
            assert image["monday"].extents()[1].tolist() == [SIZE]
            assert image["monday"].damage == what
            assert what in caplog.text
            info = image.info()
            assert f"node 'a': bitmap 'monday': {what}; recover makes that last" in info.notes
            assert [bitmap.count for bitmap in info.bitmaps if bitmap.name == "monday"] == [74 * 4096]
            assert image["clean"].count == 0, "others are not concerned"
            recovered = [(item.name, item.how) for item in image.recover()]
            assert recovered == [("monday", f"partly dirty: its {what}")]
            assert image["monday"].extents()[1].tolist() == [SIZE]
            assert image["monday"].damage is None
        assert not dm.check(sound.path).findings


def test_recover_brings_back_what_can_be_named_of_a_damaged_directory_all_dirty(sound: Sound) -> None:
    sound.write(sound.data)
    with dm.open(Address(sound.path, "a")) as image:
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
    with dm.open(Address(sound.path, "b")) as image, pytest.raises(dm.FormatError, match="none of its bitmaps can be"):
        image.recover()
    assert Path(sound.path).read_bytes() == before


def test_repair_of_leaks_alone_leaves_a_damaged_store_as_it_is(sound: Sound) -> None:
    for _ in flipped(sound, [sound.region("namespace table").start * 8]):
        before = sound.read()
        assert dm.check(sound.path, repair="leaks").corruptions
        assert sound.read() == before
