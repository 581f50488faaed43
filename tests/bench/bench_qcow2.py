"""How fast dirtmap reads and changes qcow2 images, side by side with `qemu-img` and numpy: `make bench`.

What a benchmark is compared with, its *peers*, runs just before each of its rounds, so that both see the same machine.
The ratios of the medians go to the terminal and into the benchmark's ``extra_info``. Nothing here fails for being slow.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import qemu

import dirtmap.engine as dm
from dirtmap.tools.cli import main

Positions = NDArray[np.int64]

DIRTMAP = Path(sys.executable).with_name("dirtmap")
GRANULARITY = 65536
HOLE = 4096  # copies leave out runs of zeros of this size


@pytest.fixture
def side_by_side(
    benchmark: Any, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> Callable[..., None]:
    """Measures a call against its peers, and reports how many times as long each peer takes.

    Args (of what it returns):
        ours: the call.
        peers: calls by name.
        rounds: how often each is measured.
        each: how many images a call of ours handles, where a peer handles one.
        peer_rounds: how often a peer is called in each round.
    """

    def measure(
        ours: Callable[[], Any],
        peers: dict[str, Callable[[], Any]],
        *,
        rounds: int,
        each: int = 1,
        peer_rounds: int = 1,
    ) -> None:
        taken: dict[str, list[float]] = {name: [] for name in peers}

        def call_peers() -> None:
            for name, peer in peers.items():
                taken[name] += [_seconds(peer) for _ in range(peer_rounds)]

        benchmark.pedantic(ours, setup=call_peers, rounds=rounds, warmup_rounds=1)
        mine = benchmark.stats.stats.median / each
        lines = [f"{request.node.name}: {_shown(mine)}"]
        for name, seconds in taken.items():
            theirs = statistics.median(seconds[peer_rounds:])  # without the warm-up
            benchmark.extra_info[name] = round(theirs / mine, 2)
            lines.append(f"    {name}: {_shown(theirs)}, {theirs / mine:.2f} times as long")
        with capsys.disabled():
            print("\n" + "\n".join(lines))

    return measure


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _shown(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


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
def test_list_of_many_images(side_by_side: Callable[..., None], many: list[str]) -> None:
    """Aim: an image 20 times faster than a run of `qemu-img info`."""

    def list_all() -> str:
        with contextlib.redirect_stdout(io.StringIO()) as output, pytest.raises(SystemExit) as ended:
            main(["list", *many])
        assert ended.value.code == 0
        return output.getvalue()

    assert list_all().count("3 MiB") == len(many)
    side_by_side(
        list_all, {"qemu-img info": process("qemu-img", "info", many[0])}, rounds=5, each=len(many), peer_rounds=40
    )


def test_list_as_a_process(side_by_side: Callable[..., None], tmp_path: Path) -> None:
    """Aim: within 1.5 times of importing numpy, which is to say a ratio above 0.67."""
    path = make_image(tmp_path / "image.qcow2", 65536)
    peers = {
        "python -c 'import numpy'": process(sys.executable, "-c", "import numpy"),
        "python -c pass": process(sys.executable, "-c", "pass"),
        "qemu-img info": process("qemu-img", "info", path),
    }
    side_by_side(process(DIRTMAP, "list", path), peers, rounds=21)


@pytest.mark.parametrize("percent", [10, 0.1])
def test_extents_of_16_tib(side_by_side: Callable[..., None], tmp_path: Path, percent: float) -> None:
    """Aim: 3 times faster than unpackbits and diff where 10 % are dirty, 15 times where 0.1 % are."""
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

    peers = {
        "numpy, unpackbits and diff": lambda: unpacked(np.uint8),
        "the same, bits viewed as bool": lambda: unpacked(np.bool_),
    }
    for peer in peers.values():
        for found, expected in zip(extents(), peer(), strict=True):
            assert np.array_equal(found, expected)
    side_by_side(extents, peers, rounds=5)
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


def test_mark(side_by_side: Callable[..., None], marked: Path) -> None:
    """For information: a commit, with its syncs, against a process of QEMU's that merges or clears."""
    offset = 0

    def mark() -> None:
        nonlocal offset
        offset += GRANULARITY  # each time another one, or there would be nothing to commit
        with dm.open(marked) as image, image.transaction() as bitmaps:
            bitmaps["b0"].mark(offset, GRANULARITY)

    side_by_side(mark, _changes_by_qemu(marked), rounds=21)
    qemu.check(marked)


def test_merge_as_a_process(side_by_side: Callable[..., None], marked: Path) -> None:
    """For information: as above, start-up included. From the second round on the merge finds nothing to change."""
    side_by_side(process(DIRTMAP, "merge", marked, "b0", "b1"), _changes_by_qemu(marked), rounds=11)
    qemu.check(marked)


def _changes_by_qemu(path: Path) -> dict[str, Callable[[], Any]]:
    return {
        "qemu-img bitmap --merge": process("qemu-img", "bitmap", "--merge", "b0", path, "b1"),
        "qemu-img bitmap --clear": process("qemu-img", "bitmap", "--clear", path, "b1"),
    }
