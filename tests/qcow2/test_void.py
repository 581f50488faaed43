"""Void bitmaps: software that does not know bitmaps has cleared their bit. They come back all dirty, or it is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support import qemu
from support.cli import dirtmap, error_of, json_of
from support.craft import Craft

import dirtmap.engine as dm
from dirtmap.engine.model import changes
from dirtmap.engine.qcow2 import commit

MIB = 1 << 20
SIZE = 64 * MIB
CLUSTER = 4096


@pytest.fixture(params=["", "large"])
def image(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two bitmaps with bits, guest data and a snapshot; also as one whose L2 tables are too many to be remembered."""
    if request.param:
        monkeypatch.setattr(commit, "_PROOF_BUDGET", 0)
    path = tmp_path / "disk.qcow2"
    qemu.create(path, SIZE, f"cluster_size={CLUSTER}")
    qemu.qemu_img("bitmap", "--add", "-g", "64k", path, "one")
    qemu.qemu_img("bitmap", "--add", "-g", "4k", "--disable", path, "two")
    qemu.qemu_io(path, "write -q 0 64k", "write -q 3M 128k")
    qemu.qemu_img("snapshot", "-c", "s", path)
    with dm.open(path) as opened, opened.transaction() as bitmaps:
        changes.mark(bitmaps, "two", [5 * MIB], [1])
    craft(path, void)
    return path


def craft(path: Path, *steps: Callable[[Craft], object]) -> Craft:
    made = Craft(path)
    for step in steps:
        step(made)
    made.save(path)
    return made


def void(made: Craft) -> None:
    place = made.header("autoclear_features")
    made.set(place, made.get(place) & ~1)


def freed(made: Craft) -> None:
    """As by a repair of software that does not know them."""
    for index in range(2):
        for offset in (made.get(made.entry(index, "table_offset")), *made.data_clusters(index)):
            made.set_refcount(offset, 0)
    made.set_refcount(made.get(made.bitmaps("directory_offset")), 0)


@pytest.mark.parametrize("steps", [[], [freed], [lambda made: made.set(made.entry(0, "flags"), 3)]])
def test_recover_brings_them_back_all_dirty(image: Path, steps: list[Callable[[Craft], object]]) -> None:
    craft(image, *steps)
    assert dm.describe(image).bitmaps == ()
    recovered = dm.recover(image)
    assert [(item.name, item.how.partition(":")[0]) for item in recovered] == [
        ("one", "all dirty"),
        ("two", "all dirty"),
    ]
    assert qemu.bitmaps(image) == {"one": (65536, {"auto"}), "two": (4096, set())}
    for name in ("one", "two"):
        assert qemu.dirty(image, name) == [(0, SIZE)]
    qemu.check(image)
    assert dm.recover(image) == []


def test_all_come_back_whichever_are_named(image: Path) -> None:
    before = image.read_bytes()
    with pytest.raises(dm.BitmapNotFoundError):
        dm.recover(image, ["three"])
    assert image.read_bytes() == before
    report = json_of("recover", image, "two")
    assert [item["name"] for item in report["recovered"]] == ["one", "two"]
    assert "void" in report["recovered"][0]["result"]
    qemu.check(image)


def over_guest_data(made: Craft) -> None:
    """A cluster of bits was freed, and the guest has it now."""
    made.set(made.l2(100), made.data_clusters(1)[0] | 1 << 63)


def over_the_directory(made: Craft) -> None:
    made.set(made.l2(100), made.get(made.bitmaps("directory_offset")) | 1 << 63)


def astray(made: Craft) -> None:
    made.set(made.l2(100), 1 << 40 | 1 << 63)


def larger(made: Craft) -> None:
    made.set(made.header("size"), 4 * SIZE).set(made.header("l1_size"), 128)


DOUBTFUL = {
    "a cluster of bits is guest data": ([over_guest_data], "used twice"),
    "the directory is guest data": ([over_the_directory], "used twice"),
    "the same, and it was freed": ([freed, over_the_directory], "used twice"),
    "a reference leads astray": ([astray], "nobody knows|nowhere sensible"),
    "another type": ([lambda made: made.set(made.entry(1, "type"), 2)], "type: 2"),
    "a table outside": ([lambda made: made.set(made.entry(1, "table_offset"), 1 << 40)], "past the end"),
    "a bad table": ([lambda made: made.set(made.table(1), 0x80)], "reserved bits"),
    "another size": (
        [larger],
        "the disk's size needs",
    ),
    "directory outside": ([lambda made: made.set(made.bitmaps("directory_offset"), 1 << 40)], "past the end"),
    "directory of zeros": (
        [lambda made: made.put(made.get(made.bitmaps("directory_offset")), bytes(CLUSTER))],
        "entry|name|type",
    ),
}


@pytest.mark.parametrize("what", DOUBTFUL)
def test_what_is_not_proven_is_not_brought_back(image: Path, what: str) -> None:
    steps, complaint = DOUBTFUL[what]
    craft(image, *steps)
    before = image.read_bytes()
    with pytest.raises(dm.FormatError, match=complaint):
        dm.recover(image)
    assert image.read_bytes() == before


def test_any_other_change_says_which_it_drops(image: Path) -> None:
    before = image.read_bytes()
    done = dirtmap("add", image, "new")
    assert done.error == f"dirtmap: {image}: bitmaps that were void are gone: bitmap 'one', bitmap 'two'\n"
    assert set(qemu.bitmaps(image)) == {"new"}
    assert dirtmap("add", image, "another").error == ""
    image.write_bytes(before)
    with dm.open(image) as opened, opened.transaction() as bitmaps:
        changes.add(bitmaps, "new")
        assert bitmaps.notes == []
    assert len(bitmaps.notes) == 1
    image.write_bytes(before)
    craft(image, lambda made: made.set(made.entry(1, "type"), 2))
    assert "2 bitmaps, whose names cannot be relied on" in dirtmap("add", image, "new").error
    image.write_bytes(before)
    craft(image, lambda made: made.set(made.bitmaps("nb_bitmaps"), 0))
    assert "all bitmaps, whose names cannot be relied on" in dirtmap("add", image, "new").error


def test_a_document_says_it_as_well(image: Path, tmp_path: Path) -> None:
    document = tmp_path / "document.json"
    document.write_text(
        f'{{"actions": [{{"type": "block-dirty-bitmap-add", "data": {{"node": "{image}", "name": "new"}}}}]}}'
    )
    assert "void are gone: bitmap 'one', bitmap 'two'" in dirtmap("transaction", document).error


def test_what_is_refused_drops_nothing(image: Path) -> None:
    before = image.read_bytes()
    error_of("remove", image, "one")
    assert image.read_bytes() == before


def test_list_and_check_name_them(image: Path) -> None:
    (note,) = dm.describe(image).notes
    assert "bitmap 'one', bitmap 'two'; 'recover' brings back" in note
    (found,) = (finding for finding in dm.check(image).findings if finding.where == "bitmaps extension")
    assert found.severity == "note"
    assert "bitmap 'one', bitmap 'two'" in found.what


@pytest.mark.parametrize("repair", ["leaks", "all"])
def test_a_repair_that_frees_them_says_so(image: Path, repair: str) -> None:
    before = image.read_bytes()
    report = dm.check(image, repair=repair)
    assert report.leaks_fixed > 0
    assert (report.dropped, report.dropped_unnamed) == (["one", "two"], 0)
    assert dm.check(image, repair=repair).dropped == []
    qemu.check(image)
    image.write_bytes(before)
    craft(image, lambda made: made.set(made.entry(1, "type"), 2))
    report = dm.check(image, repair=repair)
    assert (report.dropped, report.dropped_unnamed) == ([], 2)
