"""Many bitmaps, and disks of any size: what clients see of `dirtmap export` is what `dirtmap map` prints."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
from support.cli import dirtmap, error_of
from support.exported import by_nbdinfo, by_qemu_img, clipped, mapped
from support.qemu import check, create
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


def test_more_bits_than_qemu_has(tmp_path: Path) -> None:
    """8 TiB at 512 bytes are 2 GiB of bits, four times as many as QEMU has."""
    size = 8 * TIB
    make_node(tmp_path, size)
    with dm.open("drive0") as image, image.transaction() as bitmaps:
        bitmaps["b0"] = dm.Bitmap.from_extents(size, [1000, size - 1], [1, 1], 512)
    with dm.Host() as host, export(host, ["drive0"], Listener(unix=str(tmp_path / "sock"))) as served:
        assert by_nbdinfo(served.uris[0], "b0") == [(0, 2048), (size - 2048, 2048)]


def test_a_qcow2_image_that_is_tracked_or_was(tmp_path: Path) -> None:
    """Its bitmaps are in a store meanwhile; QEMU takes the image all the same. A dead tracker's are recovered first."""
    image, found = tmp_path / "d.qcow2", tmp_path / "found"
    create(image, 1 << 20)
    dirtmap("node", "add", "system", image)
    dirtmap("add", "system", "b0")
    command = f'nbdinfo --map=qemu:dirty-bitmap:b0 "$uri" >{found}'
    with dm.open("system") as opened, opened.track() as tracker:
        tracker.mark(65536, 1)
        assert "tracked by" in error_of("export", image, "--run", command)
        assert dirtmap("export", image, "--live", "--run", command).error == ""
        assert "65536       65536    1  dirty" in found.read_text()
    pid = os.fork()
    if not pid:
        try:
            dm.open("system").track().mark(131072, 1)
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.waitpid(pid, 0)
    assert "recovered first: exact" in dirtmap("export", image, "--run", command).error
    assert "65536      131072    1  dirty" in found.read_text()
    check(image)
