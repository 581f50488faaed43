"""Stores of large disks, and commands of which the memory is measured."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import dirtmap.engine as dm
from dirtmap.engine.identity import identity_of
from dirtmap.engine.model import bits
from dirtmap.engine.storefile.file import Store, create
from dirtmap.fmt import store
from support import qemu

if TYPE_CHECKING:
    from dirtmap.engine.model.content import Part

TIB = 1 << 40
# A file on ext4 has less than 16 TiB.
SIZE = 16 * TIB - (1 << 20)

# Its own memory only: the kernel counts what a process had before it became another program as that one's, too.
_MEASURED = """
import sys
try:
    {}
finally:
    sys.stdout.flush()
    with open("/proc/self/status") as status:
        print("resident", next(line.split()[1] for line in status if line.startswith("VmHWM")), file=sys.stderr)
"""
_COMMAND = "from dirtmap.tools.cli import main; main()"


class Disks:
    """A store with devices of any size, which claim to be larger than their root."""

    def __init__(self, folder: Path, cluster_bits: int = 12) -> None:
        self.path, self.disk = str(folder / "store"), folder / "disk"
        create(self.path, cluster_bits=cluster_bits)
        self.disk.touch()

    def add(self, name: str, size: int) -> None:
        where, identity = os.fsencode(self.disk), identity_of(str(self.disk))
        with Store(self.path) as target, target.change() as change:
            own = uuid.uuid4().bytes
            record = store.Record(name.encode(), store.KIND_DEVICE, own, size, path=where, identity=identity)
            change.table.put(record)


def run_measured(*args: object, program: str = _COMMAND, folder: Path | None = None) -> tuple[str, float, int]:
    """What a `dirtmap` of its own says, its seconds of CPU and how many MiB it ever had resident.

    Args:
        args: the command line.
        program: one line of Python in place of the command.
        folder: with the default store and the index of a `make_large`.
    """
    given = {} if folder is None else environment(folder)
    command = [sys.executable, "-c", _MEASURED.format(program), *map(str, args)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **given}
    ) as started:
        assert started.stdout
        tail: deque[str] = deque(maxlen=128)  # of MiB: a map can be longer than memory
        while said := started.stdout.read(1 << 20):
            tail.append(said)
        _, status, used = os.wait4(started.pid, 0)
        started.returncode = os.waitstatus_to_exitcode(status)
    said, _, resident = "".join(tail).rpartition("resident ")
    return said, used.ru_utime + used.ru_stime, int(resident) >> 10


def environment(folder: Path) -> dict[str, str]:
    """What makes commands use the store and the index in that folder."""
    return {"DIRTMAP_STORE": str(folder / "default.dmap"), "DIRTMAP_INDEX": str(folder / "index")}


class Random:
    """Random bits that are made when they are asked for; of an eighth of them, or of less than the first ``nbits``."""

    def __init__(self, nbits: int, dense: int) -> None:
        self.nbits, self._dense = nbits, dense

    def part(self, first: int, end: int) -> Part:
        number = -(-end // 64) - first // 64
        if first >= self._dense:
            return False
        found = np.full(number, bits.ALL, bits.WORD)
        for salt in range(3):
            found &= np.random.default_rng([first, salt]).integers(0, 2**64, number, np.uint64)
        bits.mask_tail(found, end - first)
        return found


def make_large(folder: Path, dense: float, *, qcow2: bool = False) -> Path:
    """A node ``disk`` of 16 TiB, with bitmaps ``dense``, ``few`` and ``week``; and ``other``, raw and without any.

    A qcow2 image has them itself, the store those of a raw disk.

    The first two have granules of 4 KiB. Of ``dense`` a random eighth is dirty in that share of the disk, and most of
    the rest all over; so it takes little space if the share is small, but 512 MiB of memory for whoever loads it.
    """
    given = environment(folder)
    with dm.Host(given["DIRTMAP_STORE"], given["DIRTMAP_INDEX"]) as host:
        for name in ("disk", "other"):
            image = folder / name
            if qcow2 and name == "disk":
                qemu.create(image, SIZE)
                host.add_qcow2(name, str(image))
                continue
            image.touch()
            os.truncate(image, SIZE)
            host.add_node(name, str(image), raw=True)
        with host.open("disk") as opened, opened.transaction() as bitmaps:
            granules = -(-SIZE // 4096)
            found = dm.Bitmap._of(SIZE, 4096, Random(granules, int(granules * dense)), True)
            if dense < 1:
                found.mark(SIZE // 8, SIZE // 8 * 7)
            bitmaps["dense"] = found
            bitmaps["few"] = dm.Bitmap.from_extents(SIZE, [0, SIZE // 2], [1, 4096], 4096)
            bitmaps["week"] = dm.Bitmap(SIZE, 65536)
    return folder
