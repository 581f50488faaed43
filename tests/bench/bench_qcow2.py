"""How fast dirtmap reads and changes qcow2 images, beside `qemu-img` and numpy; and how fast its commands are."""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import qemu
from support.measuring import Against, Peer

import dirtmap.engine as dm
from dirtmap.tools.cli import main

Positions = NDArray[np.int64]

SECTION = "Images, and whole commands"
DIRTMAP = Path(sys.executable).with_name("dirtmap")
GRANULARITY = 65536
HOLE = 4096  # copies leave out runs of zeros of this size


def process(*command: str | Path) -> Callable[[], Any]:
    """A call that runs the command, to its end and in silence."""
    return lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def make_image(path: Path, cluster_size: int) -> Path:
    """A disk of 1 GiB with one bitmap, into which QEMU has recorded a write."""
    qemu.create(path, "1G", f"cluster_size={cluster_size}")
    qemu.qemu_img("bitmap", "--add", path, "b0")
    qemu.qemu_io(path, "write -z 1M 3M")
    return path


@pytest.fixture
def many(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[str]]:
    """Copies of one image: ``param`` is its cluster size and how many."""
    cluster_size, count = request.param
    data = make_image(tmp_path / "original.qcow2", cluster_size).read_bytes()
    blocks = [(at, data[at : at + HOLE]) for at in range(0, len(data), HOLE)]
    folder = tmp_path / "many"
    folder.mkdir()
    paths = [folder / f"{number}.qcow2" for number in range(count)]
    for path in paths:
        with path.open("wb") as file:
            file.truncate(len(data))
            for at, block in blocks:
                if block.strip(b"\0"):
                    file.seek(at)
                    file.write(block)
    yield [str(path) for path in paths]
    shutil.rmtree(folder)


@pytest.mark.parametrize("many", [(65536, 10_000), (4096, 1000)], ids=["64K-10000", "4K-1000"], indirect=True)
def test_list_of_many_images(against: Against, many: list[str]) -> None:
    def list_all() -> str:
        with contextlib.redirect_stdout(io.StringIO()) as output, pytest.raises(SystemExit) as ended:
            main(["list", *many])
        assert ended.value.code == 0
        return output.getvalue()

    assert list_all().count("3 MiB") == len(many)
    info = process("qemu-img", "info", many[0])

    def infos() -> None:
        for _ in range(40):
            info()

    what = f"'list' of {len(many):,} images in one call, an image"
    against(what, list_all, {"a run of qemu-img info": Peer(infos, 0.05, 40)}, calls=len(many), rounds=5)


def test_list_as_a_process(against: Against, tmp_path: Path) -> None:
    path = make_image(tmp_path / "image.qcow2", 65536)
    peers = {
        "python -c pass": Peer(process(sys.executable, "-c", "pass"), 5, limit=True),
        "qemu-img info": Peer(process("qemu-img", "info", path)),
    }
    against("'dirtmap list', the whole process", process(DIRTMAP, "list", path), peers, rounds=31)


def test_disable_as_a_process(against: Against, tmp_path: Path) -> None:
    path = make_image(tmp_path / "image.qcow2", 65536)
    peers = {
        "python -c pass": Peer(process(sys.executable, "-c", "pass"), 6, limit=True),
        "qemu-img bitmap --disable": Peer(process("qemu-img", "bitmap", "--disable", path, "b0")),
    }
    against("'dirtmap disable', the whole process", process(DIRTMAP, "disable", path, "b0"), peers, rounds=31)


def test_map_as_a_process(against: Against, tmp_path: Path) -> None:
    path = make_image(tmp_path / "image.qcow2", 65536)
    peers = {"python -c 'import numpy'": Peer(process(sys.executable, "-c", "import numpy"), 1.15, limit=True)}
    against("'dirtmap map', the whole process", process(DIRTMAP, "map", path, "b0"), peers, rounds=31)


@pytest.mark.parametrize("percent", [10, 0.1])
def test_extents_of_16_tib(against: Against, tmp_path: Path, percent: float) -> None:
    path = tmp_path / "large.qcow2"
    qemu.create(path, "16T")
    dirty = np.concatenate([part < percent / 100 for part in _random_parts(2**28)])
    with dm.open(path) as image, image.transaction() as bitmaps:
        packed = np.packbits(dirty, bitorder="little").tobytes()
        bitmaps["b0"] = dm.Bitmap.from_packed(image.size, GRANULARITY, packed)
    del dirty, packed
    qemu.check(path)
    (table,) = (found for found in dm.dump(path)["structures"] if found["name"] == "table: bitmap 'b0'")
    (run,) = table["runs"]  # a new bitmap's clusters are neighbours, so numpy may read them in one go

    def extents() -> tuple[Positions, Positions]:
        with dm.open(path) as image:
            return image["b0"].extents()

    def unpacked(dtype: Any) -> tuple[Positions, Positions]:
        packed = np.fromfile(path, np.uint8, count=2**25, offset=run["offset"])
        bits = np.unpackbits(packed, bitorder="little").view(dtype)
        edges = np.flatnonzero(np.diff(bits)) + 1
        if bits[0]:
            edges = np.append(0, edges)
        if bits[-1]:
            edges = np.append(edges, len(bits))
        return edges[::2] * GRANULARITY, (edges[1::2] - edges[::2]) * GRANULARITY

    runs = len(extents()[0])

    def moved() -> None:
        np.fromfile(path, np.uint8, count=2**25, offset=run["offset"])
        for _ in range(2):
            np.empty(runs, np.int64).fill(0)

    peers = {
        "reading the bytes, and writing as many numbers": Peer(moved, limit=True),
        "numpy's unpackbits and diff": Peer(lambda: unpacked(np.uint8), 0.06),
        "the same, bits viewed as bool": Peer(lambda: unpacked(np.bool_), 0.06),
    }
    for dtype in (np.uint8, np.bool_):
        for found, expected in zip(extents(), unpacked(dtype), strict=True):
            assert np.array_equal(found, expected)
    against(f"extents of an image of 16 TiB, {percent} % dirty at random, opened and read", extents, peers, rounds=5)
    path.unlink()


def _random_parts(count: int) -> Iterator[NDArray[np.float32]]:
    """As many numbers from 0 to 1, in parts: all at once they would take a gigabyte."""
    random = np.random.default_rng(1)
    for _ in range(16):
        yield random.random(count // 16, np.float32)


@pytest.fixture
def marked(tmp_path: Path) -> Path:
    """An image with two bitmaps, to be changed."""
    path = make_image(tmp_path / "image.qcow2", 65536)
    qemu.qemu_img("bitmap", "--add", path, "b1")
    return path


def test_mark(against: Against, marked: Path) -> None:
    offset = 0

    def mark() -> None:
        nonlocal offset
        offset += GRANULARITY  # each time another one, or there would be nothing to commit
        with dm.open(marked) as image, image.transaction() as bitmaps:
            bitmaps["b0"].mark(offset, GRANULARITY)

    against("one commit to an image from Python, syncs included", mark, _changes_by_qemu(marked), rounds=21)
    qemu.check(marked)


def test_merge_as_a_process(against: Against, marked: Path) -> None:
    """From the second round on the merge finds nothing to change."""
    merge = process(DIRTMAP, "merge", marked, "b0", "b1")
    against("'dirtmap merge', the whole process", merge, _changes_by_qemu(marked), rounds=11)
    qemu.check(marked)


def _changes_by_qemu(path: Path) -> dict[str, Peer]:
    return {
        "qemu-img bitmap --merge": Peer(process("qemu-img", "bitmap", "--merge", "b0", path, "b1")),
        "qemu-img bitmap --clear": Peer(process("qemu-img", "bitmap", "--clear", path, "b1")),
    }
