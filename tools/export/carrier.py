"""Carriers: qcow2 images that have bitmaps and nothing else, for QEMU to read.

QEMU takes a carrier that is smaller than the disk, and then tells the rest of the disk as clean (tried with 7.2). So a
carrier is as large as QEMU takes the disk to be, which rounds its size up to whole sectors. Whoever serves both
compares the sizes that QEMU sees once more: `require_sizes`.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import dirtmap.engine as dm
from dirtmap.fmt import geometry
from dirtmap.fmt.errors import BitmapError, StorageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dirtmap.engine import Bitmap, Host

SECTOR = 512
# QEMU's usual clusters, and its largest, which larger disks need: an L1 table has 32 MiB at most.
_USUAL_CLUSTER, _LARGEST_CLUSTER = 65536, 2 << 20
_MOST_USUAL = 1 << 50  # bytes of a disk


def carrier_size(size: int) -> int:
    """The size in bytes of a carrier for a disk of ``size`` bytes: whole sectors, and one at least.

    QEMU keeps no bitmaps in an image of 0 bytes (tried with 7.2).
    """
    return max(geometry.align_up(size, SECTOR), SECTOR)


def make_carrier(path: str, size: int) -> None:
    """Makes a carrier without bitmaps.

    Args:
        path: must not exist.
        size: of the disk, in bytes.

    Raises:
        StorageError: qemu-img failed; the error has what it said.
    """
    cluster = _USUAL_CLUSTER if size <= _MOST_USUAL else _LARGEST_CLUSTER
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}"]
    done = subprocess.run([*command, "--", path, str(carrier_size(size))], capture_output=True, text=True, check=False)
    if done.returncode:
        raise StorageError(path, " ".join(done.stderr.split()) or f"qemu-img ended with status {done.returncode}")


def put_into_carrier(host: Host, path: str, bitmaps: Mapping[str, Bitmap]) -> None:
    """Adds bitmaps to a carrier by one commit, exact to the bit where QEMU can have it so.

    QEMU has at most 512 MiB of bits for a bitmap. One that needs more becomes as coarse as it must, rounded outward.

    Args:
        host: opens the carrier.
        path: of the carrier.
        bitmaps: by their names there; of a disk that the carrier was made for.

    Raises:
        BitmapError: the carrier is for a disk of another size, QEMU knows no such name, or the name is taken.
        StorageError: there is no room for them.
    """
    with host.open(f"file:{path}") as carrier, carrier.transaction() as changed:
        for name, bitmap in bitmaps.items():
            if carrier.size != carrier_size(bitmap.size):
                what = f"has {carrier.size} bytes: all else of a disk of {bitmap.size} would be told clean"
                raise BitmapError(path, what)
            dm.changes.put(changed, name, _fitted(bitmap, carrier.size, changed.most_bytes))


def _fitted(bitmap: Bitmap, size: int, most_bytes: int) -> Bitmap:
    granularity = bitmap.granularity
    while geometry.packed_bytes(size, granularity) > most_bytes:
        granularity *= 2
    if not bitmap.size:
        return dm.Bitmap(size, granularity, recording=False)
    return bitmap.at(granularity).in_sectors().replace(recording=False)


def require_sizes(where: str, size: int, disk: int, carrier: int) -> None:
    """Refuses to serve a disk with bitmaps of another size: what they lack would be told clean.

    Args:
        where: names the disk in messages.
        size: of the disk that the bitmaps are about, in bytes.
        disk: the size of what is served, as QEMU has it.
        carrier: the size of the bitmaps, as QEMU has it.

    Raises:
        StorageError: they differ by a sector or more, or the disk is larger.
    """
    if abs(disk - size) >= SECTOR:
        raise StorageError(where, f"has {disk} bytes, and the bitmaps are of a disk of {size}")
    if carrier < max(disk, carrier_size(size)):
        raise StorageError(where, f"has {disk} bytes, and its bitmaps {carrier}: the rest would be told clean")
