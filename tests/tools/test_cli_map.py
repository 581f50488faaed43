"""`dirtmap map`: the same as nbdinfo, to the byte."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from support import qemu
from support.cli import dirtmap, error_of, json_of, mapped

import dirtmap.engine as dm
from dirtmap.engine.model import bitmap as bitmap_module
from dirtmap.tools.picture import draw

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def nbdinfo(path: Path, name: str, *options: str) -> str:
    """What nbdinfo prints of the bitmap as QEMU serves it."""
    server = ["[", "qemu-nbd", "--read-only", "-f", "qcow2", f"--bitmap={name}", str(path), "]"]
    return qemu.run("nbdinfo", f"--map=qemu:dirty-bitmap:{name}", *options, "--", *server)


def assert_as_nbdinfo(path: Path, name: str) -> None:
    for options, theirs in (
        ([], []),
        (["--output=json"], ["--json"]),
        (["--totals"], ["--totals"]),
        (["--totals", "--output=json"], ["--totals", "--json"]),
    ):
        assert dirtmap("map", path, name, *options).out == nbdinfo(path, name, *theirs)


def make(path: Path, size: int, granularity: int, extents: list[tuple[int, int]]) -> Path:
    """An image with those ranges dirty in bitmap ``b``, written by dirtmap."""
    qemu.create(path, size)
    offsets, lengths = zip(*extents, strict=True) if extents else ((), ())
    with dm.open(path) as image, image.transaction() as bitmaps:
        bitmaps["b"] = dm.Bitmap.from_extents(size, offsets, lengths, granularity)
    return path


@pytest.mark.parametrize(
    ("size", "granularity", "extents"),
    [
        (10 * MIB, 64 * KIB, []),
        (10 * MIB, 64 * KIB, [(0, 10 * MIB)]),
        (10 * MIB, 64 * KIB, [(0, 1)]),
        (10 * MIB, 64 * KIB, [(10 * MIB - 1, 1)]),
        (10 * MIB, 64 * KIB, [(MIB, MIB), (3 * MIB, 5)]),
        (10 * MIB + 512, 64 * KIB, [(10 * MIB, 512)]),
        (512, 64 * KIB, [(0, 1)]),
        (40 * GIB, MIB, [(5 * GIB, 20 * GIB), (39 * GIB, GIB)]),  # past what NBD takes in one extent
        (10**13 + 512, 2 * GIB, [(0, GIB), (10**13, 1)]),
    ],
)
def test_as_nbdinfo(size: int, granularity: int, extents: list[tuple[int, int]], tmp_path: Path) -> None:
    assert_as_nbdinfo(make(tmp_path / "disk.qcow2", size // 512 * 512, granularity, extents), "b")


def test_as_nbdinfo_with_many_extents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = random.Random(1).sample(range(8192), 3000)
    path = make(tmp_path / "disk.qcow2", 512 * MIB, 64 * KIB, [(n * 64 * KIB, 1) for n in chosen])
    assert_as_nbdinfo(path, "b")
    for block in (1, 2, 1000):
        monkeypatch.setattr(bitmap_module, "_SOME", block)
        assert json_of("map", path, "b") == json.loads(nbdinfo(path, "b", "--json"))


def test_what_qemu_recorded(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.create(path, GIB)
    qemu.qemu_img("bitmap", "--add", path, "b")
    qemu.qemu_io(path, "write -q 0 1", "write -q 100M 3M", "write -q 1073741312 512")
    assert_as_nbdinfo(path, "b")


def test_dirty_only(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", 10 * MIB, 64 * KIB, [(0, 1), (MIB, MIB)])
    assert dirtmap("map", "--dirty", path, "b").out == (
        "         0       65536    1  dirty\n   1048576     1048576    1  dirty\n"
    )
    assert json_of("map", "--dirty", path, "b") == [
        {"offset": 0, "length": 65536, "type": 1, "description": "dirty"},
        {"offset": MIB, "length": MIB, "type": 1, "description": "dirty"},
    ]
    assert dirtmap("map", "--dirty", "--totals", path, "b").out == "   1114112  10.6%   1 dirty\n"


def test_nothing_to_show(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", MIB, 64 * KIB, [])
    assert mapped(path, "b") == []
    assert dirtmap("map", "--dirty", path, "b").out == ""
    assert json_of("map", "--dirty", "--totals", path, "b") == []


def test_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    extents = [(0, 3 * MIB), (5 * MIB, 64 * KIB), (6 * MIB, 640 * KIB), (7 * MIB, 900 * KIB), (99 * MIB, MIB)]
    make(Path("disk.qcow2"), 1000 * MIB, 64 * KIB, extents)
    lines = dirtmap("map", "--picture", "disk.qcow2", "b").out.splitlines()
    assert lines[0] == "disk.qcow2: b: 5.6 MiB of 1000 MiB dirty (0.6%)"
    assert lines[1] == "       0 B │███··░▒▓" + "·" * 56 + "│"
    assert lines[2] == "    64 MiB │" + "·" * 35 + "█" + "·" * 28 + "│"
    assert lines[16] == "   960 MiB │" + "·" * 40 + " " * 24 + "│"
    assert lines[17:] == ["            · clean  ░▒▓█ dirty; a character is 1 MiB"]


@pytest.mark.parametrize("size", [512, 64 * KIB, 10**6 * 512, 2**62])
@pytest.mark.parametrize("columns", ["1", "80", "1000"])
def test_pictures_of_all_sizes(size: int, columns: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    bitmap = dm.Bitmap.from_extents(size, [size - 1], [1], 2 * GIB if size > GIB else 64 * KIB)
    if size == 2**62:
        bitmap = dm.Bitmap(2**50, 2 * GIB)
        bitmap.mark(2**50 - 1, 1)
    lines = list(draw("x", bitmap, colour=False))
    assert 3 <= len(lines) <= 18
    assert lines[-2].rstrip("│ ")[-1] in "░▒▓█"  # a trace of dirt always shows
    assert len({len(line) for line in lines[1:-1]}) == 1


def test_refusals(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", MIB, 64 * KIB, [])
    assert error_of("map", path, "nope") == f"{path}: bitmap 'nope': there is no such bitmap"
    assert error_of("map", path, "") == f"{path}: bitmap '': there is no such bitmap"
    with qemu.StorageDaemon(path):
        pass
    assert error_of("map", path, "b").startswith(f"{path}: bitmap 'b': inconsistent")
