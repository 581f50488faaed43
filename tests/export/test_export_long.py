"""Many bitmaps, and disks of any size: what clients see of `dirtmap export` is what `dirtmap map` prints."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from support.exported import by_nbdinfo, by_qemu_img, clipped, mapped
from support.tracking import make_node

import dirtmap.engine as dm
from dirtmap.tools.export import Listener, export

pytestmark = pytest.mark.long

TIB = 1 << 40


def fill(chance: random.Random, target: str, count: int, granularities: tuple[int, ...]) -> None:
    """Bitmaps with ranges anywhere."""
    with dm.open(target) as image, image.transaction() as bitmaps:
        del bitmaps["b0"]
        for number in range(count):
            bitmap = dm.Bitmap(image.size, chance.choice(granularities))
            for _ in range(chance.randrange(20)):
                offset = chance.randrange(image.size)
                bitmap.mark(offset, min(image.size - offset, 1 << chance.randrange(43)))
            bitmaps[f"b{number}"] = bitmap


def compare(target: str, size: int, uri: str, name: str) -> None:
    expected = mapped(target, name)
    assert clipped(by_nbdinfo(uri, name), size) == expected
    assert clipped(by_qemu_img(uri, name), size) == expected


def test_a_hundred_bitmaps(tmp_path: Path) -> None:
    size = 8 * TIB + 1
    make_node(tmp_path, size)
    fill(random.Random(14), "drive0", 100, (65536, 1 << 20, 1 << 31))
    with dm.Host() as host, export(host, ["drive0"], Listener(unix=str(tmp_path / "sock"))) as served:
        (each,) = served.exports
        assert len(each.bitmaps) == 100
        for name in each.bitmaps:
            compare("drive0", size, each.uri, name)


def test_disks_of_any_size(tmp_path: Path) -> None:
    chance = random.Random(41)
    sizes = {f"d{number}": chance.randrange(1, 1 << chance.randrange(1, 40)) for number in range(30)}
    for name, size in sizes.items():
        make_node(tmp_path, size, name)
        fill(chance, name, 3, (512, 4096, 65536) if size < 1 << 32 else (65536, 1 << 21))
    with dm.Host() as host, export(host, list(sizes), Listener(unix=str(tmp_path / "sock"))) as served:
        for each in served.exports:
            for name in each.bitmaps:
                compare(each.name, sizes[each.name], each.uri, name)
