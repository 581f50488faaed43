"""Checkpoints are shown as what they are, and in their order: by `info`, by `list`, in whichever container."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

import pytest
from support import qemu
from support.cli import dirtmap, json_of
from support.devices import DEVICE, NODE, in_child, make, qcow2, raw_here
from support.hostless import ALONE
from support.tracking import GRANULE

import dirtmap.engine as dm
from dirtmap.engine.qcow2.layout import read_layout
from dirtmap.engine.storefile.chain import with_chain
from dirtmap.engine.storefile.file import Store
from dirtmap.engine.system.file import open_file
from dirtmap.engine.tracking.home import Home
from dirtmap.fmt import store
from dirtmap.fmt.directory import FLAG_AUTO

# What is tracked: a raw node, a qcow2 image, and a device on each.
TARGETS = ((raw_here, NODE), (qcow2, NODE), (raw_here, DEVICE), (qcow2, DEVICE))


@pytest.fixture(params=TARGETS, ids=lambda found: f"{found[1]}-{found[0].__name__}")
def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    root: Callable[[Path], Path]
    root, name = request.param
    make(tmp_path, root)
    return name


def shown(target: str) -> tuple[list[str], dict[str, bool], dict[str, str]]:
    """The checkpoints; which bitmaps are some; and what `list` prints of each bitmap's state."""
    with dm.open(target) as image:
        info = image.info()
    (document,) = json_of("list", target)
    assert document["checkpoints"] == list(info.checkpoints)
    assert document["notes"] == list(info.notes)
    flags = {bitmap.name: bitmap.checkpoint for bitmap in info.bitmaps}
    assert {bitmap["name"]: bitmap["checkpoint"] for bitmap in document["bitmaps"]} == flags
    lines = dirtmap("list", target).out.splitlines()[2:]
    states = {
        name: line.partition("%")[2].partition(" since ")[0].strip() for name, line in zip(flags, lines, strict=True)
    }
    return list(info.checkpoints), flags, states


def own(target: str) -> str:
    return "d0" if target == DEVICE else "b0"


def test_while_it_is_tracked_afterwards_and_after_a_death(target: str) -> None:
    assert shown(target) == ([], {own(target): False}, {own(target): "recording"})
    flags = {own(target): False, "old": True, "new": True}
    states = {own(target): "recording", "old": "checkpoint", "new": "recording, checkpoint"}

    with dm.open(target) as image, image.track() as tracker:
        tracker.checkpoint("old")
        tracker.checkpoint("new")
        tracker.add("off", recording=False)
        expected = (["old", "new"], {**flags, "off": False}, {**states, "off": "disabled"})
        assert shown(target) == expected
    assert shown(target) == expected
    dirtmap("remove", target, "off")

    def work() -> None:
        with dm.open(target) as image:
            image.track().checkpoint("newest")

    in_child(work)
    newest = (
        ["old", "new", "newest"],
        {**flags, "newest": True},
        {**states, "new": "checkpoint", "newest": "recording, checkpoint"},
    )
    assert shown(target) == newest
    dm.recover(target)
    assert shown(target) == newest
    dirtmap("remove", target, "new")
    assert shown(target)[0] == ["old", "newest"]


def damage_raw(folder: Path, name: bytes, *, remove: str = "", disable: str = "") -> None:
    """What software does that knows bitmaps, and no checkpoints."""
    with Home(ALONE, str(folder / "default.dmap"), name).change(None) as home:
        home.entries.pop(remove, None)
        if disable:
            home.entries[disable] = home.entries[disable].with_flags(clear=FLAG_AUTO)


def test_a_broken_chain_shows_what_is_known(target: str, tmp_path: Path) -> None:
    with dm.open(target) as image, image.track() as tracker:
        for name in ("a", "b", "c", "d"):
            tracker.checkpoint(name)
    if target == NODE and (tmp_path / "drive0.qcow2").exists():
        qemu.qemu_img("bitmap", "--remove", tmp_path / "drive0.qcow2", "c")
    else:
        damage_raw(tmp_path, b"disk0" if target == DEVICE else b"drive0", remove="c")
    names, flags, _ = shown(target)
    assert names == ["a", "b", "d"]
    assert flags == {own(target): False, "a": True, "b": True, "d": True}
    with dm.open(target) as image:
        (note,) = image.info().notes
        assert image.info().incomplete == ("a", "b")
    lost = "not all that was written since bitmap 'b' or an older checkpoint is known: a checkpoint was removed or"
    assert lost in note
    assert lost in dirtmap("list", target).error
    dirtmap("remove", target, "a")
    dirtmap("remove", target, "b")
    with dm.open(target) as image:
        assert image.info().notes == ()
    assert shown(target)[0] == ["d"]


def test_the_newest_was_disabled(tmp_path: Path) -> None:
    make(tmp_path, raw_here)
    with dm.open(NODE) as image, image.track() as tracker:
        tracker.checkpoint("a")
    damage_raw(tmp_path, b"drive0", disable="a")
    assert shown(NODE) == (["a"], {"b0": False, "a": True}, {"b0": "recording", "a": "checkpoint"})
    with dm.open(NODE) as image:
        (note,) = image.info().notes
    assert "since bitmap 'a' is known" in note


def test_a_store_has_those_of_all_its_images(tmp_path: Path) -> None:
    make(tmp_path, raw_here)
    with dm.open(DEVICE) as image, image.track() as tracker:
        tracker.checkpoint("a")
    with dm.open(NODE) as image, image.track() as tracker:
        tracker.checkpoint("b")
    (document,) = json_of("list", tmp_path / "default.dmap")
    assert sorted(document["checkpoints"]) == ["a", "b"]
    assert {b["name"]: b["checkpoint"] for b in document["bitmaps"]} == {"a": True, "b": True, "d0": False, "b0": False}


def test_a_chain_that_makes_no_sense_hides_no_bitmap(tmp_path: Path) -> None:
    make(tmp_path, raw_here)
    with Store(str(tmp_path / "default.dmap")) as opened, opened.change() as change:
        record = with_chain(change.table.get(b"drive0"), ["b0"])  # type: ignore[arg-type]
        broken = [(store.EXTENSION_CHECKPOINTS, b"\xff\xff\xff\xff")]
        change.table.put(record.with_extensions([store.EXTENSION_CHECKPOINTS], broken))
    with dm.open(NODE) as image:
        info = image.info()
    assert [bitmap.name for bitmap in info.bitmaps] == ["b0"]
    assert info.checkpoints == ()
    assert "checkpoints" in info.errors[0]


def test_a_damaged_image_shows_those_that_are_known(tmp_path: Path) -> None:
    path = make(tmp_path, qcow2)
    with dm.open(NODE) as image, image.track() as tracker:
        tracker.mark(0, 1)
        tracker.checkpoint("a")
        tracker.checkpoint("b")
    with open_file(str(path)) as file:
        slot = read_layout(file).slots[0]
    qemu.patch(path, slot.offset, (1).to_bytes(8, "big"))  # its table does not begin where a cluster does
    info = dm.describe(str(path))
    assert info.errors
    assert info.checkpoints == ("a", "b")
    assert {bitmap.name for bitmap in info.bitmaps if bitmap.checkpoint} == {"a", "b"}


def began_and_since(target: str) -> dict[str, tuple[float | None, int | None]]:
    """Of each checkpoint; `info`, `describe`, and both commands say the same."""
    with dm.open(target) as image:
        info = image.info()
    assert dm.describe(target) == info
    found = {bitmap.name: (bitmap.began, bitmap.since) for bitmap in info.bitmaps if bitmap.checkpoint}
    assert all((each.began, each.since) == (None, None) for each in info.bitmaps if not each.checkpoint)
    listed = {each["name"]: each for each in json_of("list", target)[0]["bitmaps"]}
    for each in json_of("checkpoint", "list", target)["checkpoints"]:
        began, since = found[each["name"]]
        text = None if began is None else f"{datetime.datetime.fromtimestamp(began, datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"
        for shown in (each, listed[each["name"]]):
            assert (shown["began"], shown["since"]) == (text, since)
    return found


def test_since_when_they_are_and_how_much_was_written_since(target: str) -> None:
    with dm.open(target) as image, image.track() as tracker:
        for name in ("a", "b", "c"):
            tracker.checkpoint(name)
        middle = began_and_since(target)["b"][0]
        tracker.mark(0, 1)
        tracker.checkpoint("d")
        tracker.mark(0, GRANULE + 1)
        told = began_and_since(target)
        assert [since for _, since in told.values()] == [2 * GRANULE] * 4
        assert all(began for began, _ in told.values())
        assert told["b"][0] == middle
        text = dirtmap("checkpoint", "list", target).out
        assert text.startswith("a: 128 KiB written since 2")
    assert began_and_since(target) == told
    dirtmap("remove", target, "c")
    in_child(lambda: dm.open(target).track().checkpoint("e"))
    dm.recover(target)
    found = began_and_since(target)
    assert {name: found[name] for name in "abd"} == {name: told[name] for name in "abd"}
    assert found["e"][1] == 0
    assert list(found) == ["a", "b", "d", "e"]


def test_no_time_is_known_where_software_has_changed_the_chain_that_does_not_know_times(tmp_path: Path) -> None:
    make(tmp_path, raw_here)
    with dm.open(NODE) as image, image.track() as tracker:
        tracker.checkpoint("a")
        tracker.checkpoint("b")
    with Store(str(tmp_path / "default.dmap")) as target, target.change() as change:
        record = change.table.get(b"drive0")
        assert record
        chain = with_chain(record, ["b"]).extension(store.EXTENSION_CHECKPOINTS)
        assert chain
        change.table.put(record.with_extensions([store.EXTENSION_CHECKPOINTS], [(store.EXTENSION_CHECKPOINTS, chain)]))
    assert began_and_since(NODE) == {"b": (None, 0)}
    with dm.open(NODE) as image, image.track() as tracker:
        tracker.checkpoint("c")
    found = began_and_since(NODE)
    assert found["b"][0] is None
    assert found["c"][0] is not None
    for data in (b"", b"\0" * 7, b"\0" * 100):
        with Store(str(tmp_path / "default.dmap")) as target, target.change() as change:
            record = change.table.get(b"drive0")
            assert record
            kind = store.EXTENSION_CHECKPOINT_TIMES
            change.table.put(record.with_extensions([kind], [(kind, data)]))
        assert [began for began, _ in began_and_since(NODE).values()] == [None, None]
        assert dm.check(tmp_path / "default.dmap").corruptions == 0
