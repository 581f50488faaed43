"""What recording bitmaps cost whoever writes to a disk: in QEMU, and with dirtmap's marks from C around the same write.

All files are on a tmpfs, so that no disk hides the cost. The same without bitmaps runs twice, which shows the noise.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import qemu
from support.measuring import Against, Peer

SECTION = "Writes to a disk with recording bitmaps"
WRITES = 20_000
TESTS = Path(__file__).parent.parent


@pytest.fixture
def shm() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def image_with(folder: Path, bitmaps: int, copy: int = 0) -> Path:
    """A disk of 1 GiB, all of it allocated."""
    path = folder / f"{bitmaps}-{copy}.qcow2"
    qemu.create(path, "1G", "preallocation=metadata")
    for number in range(bitmaps):
        qemu.qemu_img("bitmap", "--add", path, f"b{number}")
    return path


def written(path: Path) -> Callable[[], object]:
    """Writes of 4 KiB, each far from the one before, one after the other."""
    command = ["qemu-img", "bench", "-w", "-f", "qcow2", "-c", str(WRITES), "-d", "1", "-s", "4096", "-S", "10489856"]
    return lambda: subprocess.run([*command, path], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("bitmaps", [1, 10, 100])
def test_in_qemu(against: Against, shm: Path, bitmaps: int) -> None:
    """Opening the image, with its bitmaps, and writing them back at the end is in it, as for any guest."""
    peers = {
        "without bitmaps": Peer(written(image_with(shm, 0))),
        "without bitmaps, again": Peer(written(image_with(shm, 0, 1))),
    }
    what = f"a write of 4 KiB by qemu-img bench, {bitmaps} recording bitmaps"
    against(what, written(image_with(shm, bitmaps)), peers, calls=WRITES, rounds=15)


def test_with_marks(against: Against, shm: Path, tmp_path: Path) -> None:
    """However many bitmaps there are: a mark is made once for all of them."""
    program, disk = tmp_path / "marking", shm / "disk"
    headers, source = TESTS.parent / "engine" / "tracking", TESTS / "support" / "marking.c"
    subprocess.run(["gcc", "-O2", "-std=c11", f"-I{headers}", "-o", program, source, "-pthread"], check=True)
    disk.write_bytes(bytes(1 << 30))

    def run() -> dict[str, float]:
        done = subprocess.run([program, "writes", shm, disk], check=True, capture_output=True, text=True)
        return {name: float(ns) * 1e-9 for name, ns in (line.rsplit(" ", 1) for line in done.stdout.splitlines())}

    def nothing() -> None:
        pass

    peers = {"without marks": Peer(nothing), "without marks, again": Peer(nothing)}
    against.told("a write of 4 KiB by a C loop, with dirtmap's marks, any number of bitmaps", "with marks", run, peers)
