"""What `check` has to say although QEMU does not: bitmaps given up without a name, and marks that forbid changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support import qemu
from support.cli import dirtmap, json_of
from support.craft import Craft

import dirtmap.engine as dm
from dirtmap.engine.model import changes

Change = Callable[[Craft], object]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qemu.create(path, "16M", "cluster_size=4096")
    for name in ("one", "two", "three"):
        qemu.qemu_img("bitmap", "--add", path, name)
    return path


def craft(path: Path, *steps: Change) -> None:
    made = Craft(path)
    for step in steps:
        step(made)
    made.save(path)


def outside(made: Craft) -> None:
    """The directory lies past the end of the file."""
    made.set(made.bitmaps("directory_offset"), 1 << 40)


def uncounted(made: Craft) -> None:
    made.set(made.bitmaps("nb_bitmaps"), 0)


def broken(made: Craft) -> None:
    """Nobody can tell where the second entry ends, and what comes behind it makes no sense either."""
    made.set(made.entry(2, "type"), 9)
    made.set(made.entry(1, "name_size"), 60000)


def overwritten(made: Craft) -> None:
    """The bit says that there are bitmaps, and nothing says where."""
    made.set(made.head("type"), 0x12345678)


@pytest.mark.parametrize(
    ("what", "unnamed", "said"),
    [
        ([outside], 3, "dropped: 3 bitmaps whose name is not known\n"),
        ([outside, uncounted], None, "dropped: bitmaps whose number and names are not known\n"),
        ([overwritten], None, "dropped: bitmaps whose number and names are not known\n"),
        ([uncounted], 0, None),
        ([broken], 2, "dropped: 2 bitmaps whose name is not known\n"),
    ],
)
def test_bitmaps_without_a_name_are_counted(
    image: Path, what: list[Change], unnamed: int | None, said: str | None
) -> None:
    craft(image, *what)
    damaged = image.read_bytes()
    report = dm.check(image, repair="all")
    assert (report.corruptions, report.leaks) == (0, 0)
    kept = set(qemu.bitmaps(image))
    if unnamed is not None:
        assert len(kept) + len(report.dropped) + unnamed == 3
    assert report.dropped_unnamed == unnamed
    qemu.check(image)
    image.write_bytes(damaged)
    out = dirtmap("check", "-r", "all", image).out
    assert [line for line in out.splitlines(True) if "known" in line] == ([said] if said else [])
    image.write_bytes(damaged)
    assert json_of("check", "-r", "all", image)["dropped-unnamed"] == unnamed


@pytest.mark.parametrize(("bit", "name"), [(0, "dirty"), (1, "corrupt")])
def test_a_mark_that_forbids_changes_is_a_note(image: Path, bit: int, name: str) -> None:
    craft(image, lambda made: made.set(made.header("incompatible_features"), 1 << bit))
    qemu.qemu_img("check", image)  # ends with status 0, and so does ours
    report = json_of("check", image)
    (finding,) = report["findings"]
    assert (finding["severity"], finding["where"]) == ("note", "header.incompatible_features")
    assert f"marked {name}" in finding["what"]
    assert "every change is refused" in finding["what"]
    assert "snapshots" not in finding["what"]
    before = image.read_bytes()
    with dm.open(image) as opened, pytest.raises(dm.UnsupportedError, match=f"marked {name}"):
        _add(opened)
    assert image.read_bytes() == before
    qemu.qemu_img("check", "-r", "all", image)  # as the note says
    assert json_of("check", image)["findings"] == []
    with dm.open(image) as opened:
        _add(opened)


def _add(image: dm.Namespace) -> None:
    with image.transaction() as bitmaps:
        changes.add(bitmaps, "new")


def test_the_note_warns_where_qemu_would_lose_snapshots(image: Path) -> None:
    qemu.qemu_img("snapshot", "-c", "first", image)
    craft(image, lambda made: made.set(made.header("incompatible_features"), 1))
    (finding,) = dm.check(image).findings
    assert "loses the snapshots" in finding.what
    qemu.run("qemu-img", "check", "-q", "-r", "all", str(image))
    assert qemu.info(image).get("snapshots", []) == []  # else the warning can go


@pytest.mark.parametrize("repair", ["", "none", "LEAKS", b"all", 1, True])
def test_an_unknown_repair_is_refused_before_anything_is_read(tmp_path: Path, repair: object) -> None:
    from dirtmap.engine.namespaces.store_check import check as check_store
    from dirtmap.engine.qcow2.check import check as check_image

    nowhere = tmp_path / "nothing here"
    for check in (dm.check, check_image, check_store):
        with pytest.raises(dm.ArgumentError, match="repair is") as caught:
            check(str(nowhere), repair=repair)  # type: ignore[operator]
        assert isinstance(caught.value, ValueError)
        assert isinstance(caught.value, dm.Error)
