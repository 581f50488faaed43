"""A damaged bitmap is listed as damaged, with an error, and does not hide the others; all else refuses the image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support import qemu
from support.cli import dirtmap, error_of
from support.craft import Craft

import dirtmap.engine as dm
from dirtmap.engine.model import changes

MIB = 1 << 20

FAULTS: dict[str, tuple[Callable[[Craft], object], str]] = {
    "a table entry": (lambda c: c.set(c.table(1), 0x80), "bitmap 'bad'.table[0]: "),
    "a table entry past the end": (lambda c: c.set(c.table(1), 1 << 40), "bitmap 'bad'.table[0]: "),
    "a table past the end": (lambda c: c.set(c.entry(1, "table_offset"), 1 << 40), "bitmap 'bad'.table_offset: "),
    "a table of another size": (lambda c: c.set(c.entry(1, "table_size"), 3), "bitmap 'bad'.table_size: "),
    "type": (lambda c: c.set(c.entry(1, "type"), 7), "bitmap 'bad'.type: "),
    "flags": (lambda c: c.set(c.entry(1, "flags"), 0x82), "bitmap 'bad'.flags: "),
    "granularity": (lambda c: c.set(c.entry(1, "granularity_bits"), 255), "bitmap 'bad'.granularity_bits: "),
    "bits over the L1 table": (lambda c: c.set(c.table(1), c.get(c.header("l1_table_offset"))), "bitmap 'bad': "),
}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qemu.create(path, 16 * MIB)
    for name in ("first", "bad", "last"):
        qemu.qemu_img("bitmap", "--add", path, name)
    qemu.qemu_io(path, "write -q 1M 64k")
    return path


@pytest.fixture(params=FAULTS)
def damaged(image: Path, request: pytest.FixtureRequest) -> tuple[Path, str]:
    spoil, where = FAULTS[request.param]
    craft = Craft(image)
    spoil(craft)
    craft.save(image)
    return image, where


def test_the_others_are_listed(damaged: tuple[Path, str]) -> None:
    path, where = damaged
    info = dm.describe(path)
    assert [(bitmap.name, bitmap.count, bitmap.damaged) for bitmap in info.bitmaps] == [
        ("first", 65536, False),
        ("bad", None, True),
        ("last", 65536, False),
    ]
    (error,) = info.errors
    assert error.startswith(f"{path}: {where}")
    assert [bitmap.count for bitmap in dm.describe(path, force_share=True).bitmaps] == [65536, None, 65536]


def test_the_command_says_so_and_ends_with_1(damaged: tuple[Path, str]) -> None:
    path, where = damaged
    done = dirtmap("list", path, status=1)
    assert done.error.startswith(f"dirtmap: {path}: {where}")
    assert done.error.count("\n") == 1
    rows = {line.split()[0]: line.split()[-1] for line in done.out.splitlines()[2:]}
    assert rows == {"first": "recording", "bad": "damaged", "last": "recording"}


def test_everything_else_refuses_the_image(damaged: tuple[Path, str]) -> None:
    path, where = damaged
    before = path.read_bytes()
    with pytest.raises(dm.FormatError) as caught:
        dm.open(path)
    assert str(caught.value).startswith(f"{path}: {where}")
    for command in (("map", path, "first"), ("add", path, "new"), ("clear", path, "first")):
        assert error_of(*command).startswith(f"{path}: {where}")
    assert path.read_bytes() == before
    dm.check(path, repair="all")  # as the user is told
    assert set(qemu.bitmaps(path)) == {"first", "last"}


def test_also_of_an_image_with_a_name(image: Path, tmp_path: Path) -> None:
    dirtmap("store", "create", tmp_path / "default.dmap")
    dirtmap("node", "add", "drive", image)
    craft = Craft(image)
    craft.set(craft.table(1), 0x80).save(image)
    for target in (image, "drive"):
        info = dm.describe(target)
        assert [bitmap.damaged for bitmap in info.bitmaps] == [False, True, False]
        assert info.node == "drive"
    assert dirtmap("list", "drive", status=1).out.count("recording") == 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c.set(c.bitmaps("nb_bitmaps"), 2),
        lambda c: c.set(c.entry(1, "name_size"), 60000),
        lambda c: c.set(c.bitmaps("reserved"), 1),
        lambda c: c.set(c.header("l1_table_offset"), 1 << 40),
    ],
)
def test_where_more_is_at_fault_nothing_is_listed(image: Path, spoil: Callable[[Craft], object]) -> None:
    craft = Craft(image)
    spoil(craft)
    craft.save(image)
    with pytest.raises(dm.FormatError):
        dm.describe(image)
    assert dirtmap("list", image, status=1).out == ""


def test_one_in_use_stays_inconsistent(image: Path) -> None:
    craft = Craft(image)
    craft.set(craft.entry(0, "flags"), 3).set(craft.table(1), 0x80).save(image)
    info = dm.describe(image)
    assert [(bitmap.inconsistent, bitmap.damaged) for bitmap in info.bitmaps] == [
        (True, False),
        (False, True),
        (False, False),
    ]
    dm.recover(image, ["first"])
    with pytest.raises(dm.FormatError), dm.open(image) as opened, opened.transaction() as bitmaps:
        changes.clear(bitmaps, "last")
