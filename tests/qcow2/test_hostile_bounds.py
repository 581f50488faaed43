"""Images made to do harm by what they claim to hold: bounds of time and memory for every operation."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.hostile import MIB

import dirtmap.engine as dm
from dirtmap.engine.model import changes
from dirtmap.fmt import directory, qcow2
from dirtmap.fmt.directory import Entry, build_directory
from dirtmap.fmt.extensions import END_MARKER, build_extension
from dirtmap.fmt.parsers.qcow2 import BITMAPS_EXTENSION, CRYPTO_EXTENSION, HEADER_V2, HEADER_V3, SNAPSHOT


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """Where each image is put: memory, where a sparse file may be longer than on most disks."""
    memory = Path("/dev/shm")
    place = (memory if memory.is_dir() else tmp_path) / f"dirtmap-bounds-{os.getpid()}.qcow2"
    yield place
    place.unlink(missing_ok=True)


class Forged:
    """An image put together from nothing, sparse: clusters 0 to 3 are header, refcount table, refcount block, L1."""

    def __init__(self, path: Path, cluster_bits: int = 16, **fields: int) -> None:
        self.path, self.cluster = path, 1 << cluster_bits
        self.fields: dict[str, Any] = {
            "magic": qcow2.MAGIC,
            "version": 3,
            "backing_file_offset": 0,
            "backing_file_size": 0,
            "cluster_bits": cluster_bits,
            "size": MIB,
            "crypt_method": 0,
            "l1_size": 1,
            "l1_table_offset": 3 * self.cluster,
            "refcount_table_offset": self.cluster,
            "refcount_table_clusters": 1,
            "nb_snapshots": 0,
            "snapshots_offset": 0,
            "incompatible_features": 0,
            "compatible_features": 0,
            "autoclear_features": 0,
            "refcount_order": 4,
            "header_length": qcow2.MORE_OFFSET,
            **fields,
        }
        self.extensions = b""
        self.data: list[tuple[int, bytes]] = []
        self.put(self.cluster, struct.pack(">Q", 2 * self.cluster))
        self.put(2 * self.cluster, struct.pack(">4H", 1, 1, 1, 1))
        self.put(3 * self.cluster, bytes(8))

    def put(self, offset: int, data: bytes) -> Forged:
        self.data.append((offset, data))
        return self

    def numbers(self, offset: int, values: np.ndarray) -> Forged:
        return self.put(offset, values.astype(">u8").tobytes())

    def directory(self, offset: int, data: bytes, count: int, size: int = 0) -> Forged:
        payload = BITMAPS_EXTENSION.build(
            nb_bitmaps=count, reserved=0, directory_size=size or len(data), directory_offset=offset
        )
        self.extensions = build_extension(qcow2.EXTENSION_BITMAPS, payload)
        self.fields["autoclear_features"] = qcow2.AUTOCLEAR_BITMAPS
        return self.put(offset, data)

    def entries(self, offset: int, entries: list[Entry]) -> Forged:
        return self.directory(offset, build_directory(entries), len(entries))

    def save(self, size: int) -> Path:
        parts = [
            structure.build(**{field.name: self.fields[field.name] for field in structure.fields})
            for structure in (HEADER_V2, HEADER_V3)
        ]
        self.put(0, b"".join(parts) + self.extensions + END_MARKER)
        with self.path.open("wb") as file:
            for offset, data in self.data:
                file.seek(offset)
                file.write(data)
            file.truncate(size)
        return self.path


C = 65536
MANY = directory.MAX_BITMAPS
# With 512-byte clusters: the longest L1 table QEMU accepts, and a bitmap of 65,536 clusters over its disk.
WIDE_L1 = qcow2.MAX_L1_BYTES // 8
WIDE = {"cluster_bits": 9, "size": WIDE_L1 * 64 * 512, "l1_size": WIDE_L1, "l1_table_offset": 1 << 26}


def _l1(values: Callable[[np.ndarray], np.ndarray], size: int) -> Callable[[Path], Path]:
    def forge(path: Path) -> Path:
        forged = Forged(path, size=1 << 40, l1_size=WIDE_L1, l1_table_offset=16 * MIB)
        forged.numbers(16 * MIB, values(np.arange(WIDE_L1, dtype=np.uint64)))
        return forged.save(size)

    return forge


def _named(**fields: int) -> Callable[[Path], Path]:
    def forge(path: Path) -> Path:
        entries = [
            Entry(b"b%d" % number, fields.get("at", (1000 + number) * C), 1, fields.get("flags", 0), 16)
            for number in range(MANY)
        ]
        if "type" in fields:
            entries = [Entry(e.name, e.table_offset, 1, 0, 16, fields["type"]) for e in entries]
        if "same_name" in fields:
            entries = [Entry(b"same", e.table_offset, 1, 0, 16) for e in entries]
        return Forged(path).entries(8 * C, entries).save(67000 * C)

    return forge


def _tables(count: int, stride: int) -> Callable[[Path], Path]:
    """Bitmaps with tables of 65,536 entries each: in a hole, or each with its own clusters, no two of them adjacent."""

    def forge(path: Path) -> Path:
        forged = Forged(path, **WIDE)
        at = [(1 << 30) + number * 65536 * 8 for number in range(count)]
        forged.entries(1 << 20, [Entry(b"b%d" % number, place, 65536, 0, 9) for number, place in enumerate(at)])
        for number, place in enumerate(at if stride else ()):
            clusters = np.arange(65536, dtype=np.uint64) + np.uint64(number * 65536)
            forged.numbers(place, clusters * np.uint64(stride) + np.uint64(1 << 37))
        return forged.save(1 << 42)

    return forge


def _snapshots(l1_table: Callable[[int], int], l1_size: int) -> Callable[[Path], Path]:
    def forge(path: Path) -> Path:
        records = b"".join(
            SNAPSHOT.build(
                l1_table_offset=l1_table(number),
                l1_size=l1_size,
                id_size=0,
                name_size=0,
                date_seconds=0,
                date_nanoseconds=0,
                vm_clock=0,
                vm_state_size=0,
                extra_data_size=0,
            )
            for number in range(qcow2.MAX_SNAPSHOTS)
        )
        forged = Forged(path, nb_snapshots=qcow2.MAX_SNAPSHOTS, snapshots_offset=8 * C).put(8 * C, records)
        forged.put(1 << 30, struct.pack(">Q", 1 << 63 | 2 << 30) * 1024)
        return forged.save(1 << 42)

    return forge


def _refcount_table(values: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], Path]:
    def forge(path: Path) -> Path:
        forged = Forged(path, refcount_table_offset=16 * MIB, refcount_table_clusters=128)
        forged.numbers(16 * MIB, values(np.arange(1 << 20, dtype=np.uint64)))
        return forged.save(1 << 37)

    return forge


def _one_bit_counts(pattern: bytes) -> Callable[[Path], Path]:
    """16 million counts in one refcount block."""
    big = 2 * MIB
    return lambda path: Forged(path, 21, refcount_order=0).put(2 * big, pattern * big).save(4 * big)


def _crypto(offset: int, length: int) -> Callable[[Path], Path]:
    def forge(path: Path) -> Path:
        forged = Forged(path, crypt_method=2)
        payload = CRYPTO_EXTENSION.build(offset=offset, length=length)
        forged.extensions = build_extension(qcow2.EXTENSION_CRYPTO, payload)
        return forged.save(1 << 42)

    return forge


def _broken_directory(path: Path) -> Path:
    """A broken entry and 60,000 good ones: where does it end?"""
    good = build_directory([Entry(b"a", 4 * C, 1, 0, 16)])
    data = good[:20] + b"\xff" * 4 + bytes(8) + good * 60000 + b"\xff" * 40
    return Forged(path).directory(8 * C, data, 60001).save(100 * MIB)


def _scattered_guest(path: Path) -> Path:
    """Half a million guest clusters, none next to another, all over a file of 4 PiB."""
    forged = Forged(path, size=1 << 35, l1_size=64)
    steps = np.arange(64 * 8192, dtype=np.uint64) * np.uint64(1 << 32) + np.uint64(1 << 30) | np.uint64(1 << 63)
    forged.numbers(3 * C, np.arange(16, 80, dtype=np.uint64) * np.uint64(C) | np.uint64(1 << 63))
    forged.numbers(16 * C, steps)
    return forged.save(1 << 52)


def _widest_bitmap(path: Path) -> Path:
    """The longest bitmap that QEMU accepts, 512 MiB of bits, none of them there."""
    big = 2 * MIB
    forged = Forged(path, 21, size=1 << 41, l1_size=4)
    forged.entries(5 * big, [Entry(b"b", 6 * big, 256, 0, 9), Entry(b"used", 7 * big, 256, 1, 9)])
    return forged.save(8 * big)


def _half_a_gibibyte(entries: Callable[[np.ndarray], np.ndarray], size: int = 2 << 30) -> Callable[[Path], Path]:
    """Two bitmaps of as many bits as QEMU accepts; what the entries of their tables say is for clusters in a hole."""

    def forge(path: Path) -> Path:
        forged = Forged(path, size=1 << 41, l1_size=1 << 12)
        forged.entries(16 * C, [Entry(b"b", 32 * C, 8192, 0, 9), Entry(b"c", 33 * C, 8192, 0, 9)])
        for number in range(2):
            forged.numbers((32 + number) * C, entries(np.arange(8192, dtype=np.uint64) + np.uint64(8192 * number)))
        return forged.save(size)

    return forge


FORGED: dict[str, Callable[[Path], Path]] = {
    "L1 table of 32 MiB, all in a hole": lambda path: Forged(
        path, size=1 << 40, l1_size=WIDE_L1, l1_table_offset=16 * MIB
    ).save(64 * MIB),
    "L1 table of 32 MiB, one L2 table": _l1(lambda n: n * np.uint64(0) + np.uint64(1 << 63 | 1 << 27), (1 << 27) + C),
    "65,535 bitmaps of a bad type": _named(type=7),
    "65,535 bitmaps with bad flags": _named(flags=0xFFFFFFFC),
    "65,535 bitmaps in use": _named(flags=1),
    "65,535 bitmaps with one table": _named(at=4 * C),
    "65,535 bitmaps of one name": _named(same_name=1),
    "65,535 good bitmaps": _named(),
    "32 GiB of tables": _tables(MANY, 0),
    "4 million clusters of bits, scattered": _tables(64, 1024),
    "200,000 clusters of bits, scattered": _tables(3, 1024),
    "directory of 64 MiB of zeros": lambda path: (
        Forged(path).directory(8 * C, b"", MANY, directory.MAX_DIRECTORY_SIZE).save(100 * MIB)
    ),
    "directory broken at its beginning": _broken_directory,
    "65,536 snapshots of nothing": _snapshots(lambda number: 0, 0),
    "65,536 snapshots with 32 MiB of L1 each": _snapshots(lambda number: (1 << 30) + (number << 25), WIDE_L1),
    "65,536 snapshots with the same L1": _snapshots(lambda number: 1 << 30, WIDE_L1),
    "65,536 snapshots beyond everything": _snapshots(lambda number: (1 << 64) - C, (1 << 32) - 1),
    "a million times the same refcount block": _refcount_table(lambda n: n * np.uint64(0) + np.uint64(2 * C)),
    "a million refcount blocks in a hole": _refcount_table(lambda n: n * np.uint64(C) + np.uint64(1 << 30)),
    "a million refcount blocks beyond everything": _refcount_table(
        lambda n: n * np.uint64(0) + np.uint64((1 << 64) - C)
    ),
    "16 million leaks": _one_bit_counts(b"\xff"),
    "8 million leaks, every other cluster": _one_bit_counts(b"\x55"),
    "encryption header beyond everything": _crypto(16 * C, (1 << 64) - 1),
    "encryption header of a PiB": _crypto(16 * C, 1 << 40),
    "guest data all over 4 PiB": _scattered_guest,
    "the widest bitmap": _widest_bitmap,
    "512 MiB of bits in a hole": _half_a_gibibyte(lambda n: n * np.uint64(C) + np.uint64(256 * MIB)),
    "512 MiB of bits, every other cluster all ones": _half_a_gibibyte(
        lambda n: np.where(n % 2 == 1, np.uint64(1), n * np.uint64(C) + np.uint64(256 * MIB))
    ),
    "512 MiB of bits in one cluster": _half_a_gibibyte(lambda n: n * np.uint64(0) + np.uint64(256 * MIB)),
    "512 MiB of bits past the end": _half_a_gibibyte(lambda n: n * np.uint64(C) + np.uint64(256 * MIB), 257 * MIB),
    "nothing but its length": lambda path: Forged(path).save((1 << 43) - C),
}

# In a process of its own: every operation, what it took, and what the process ever had resident.
WATCHED = """
import resource, sys, time
from pathlib import Path
resource.setrlimit(resource.RLIMIT_CPU, (100, 100))  # where it hangs
sys.path.insert(0, sys.argv[3])
import numpy
import dirtmap.engine as dm
import dirtmap.engine.qcow2.check, dirtmap.engine.qcow2.dump, dirtmap.engine.qcow2.commit
from dirtmap.engine.system.file import File, using
from support import hostile

class Counting(hostile.Unsynced):
    writes = 0
    def write(self, offset, data):
        Counting.writes += 1

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

path, before = Path(sys.argv[1]), peak()
with using(Counting):
    for name in sys.argv[2].split(","):
        Counting.writes, start, said = 0, time.process_time(), "done"
        try:
            (hostile.READING | hostile.CHANGING | hostile.LOOKING)[name](path)
        except dm.Error as error:
            hostile.require_good_message(error, path)
            said = "refused" if not Counting.writes else "REFUSED AND WRITTEN"
        print(name, said, round(time.process_time() - start, 2), peak() - before, sep="|", flush=True)
"""
ACTS = ("describe", "count", "check", "dump", "add", "remove", "union", "recover", "check -r leaks")
# Of CPU time, so that a busy machine does not matter; a slow one may take twice as long.
SECONDS = 2 * 2.0
MEBIBYTES = 256
# What is not a claim but there, or asked for, takes what it takes: 65,535 bitmaps written anew.
HONEST_SECONDS = {("65,535 bitmaps in use", "recover"): 5 * SECONDS}
# The others are like one of these, or take longer.
QUICK = {
    "L1 table of 32 MiB, all in a hole",
    "65,535 bitmaps with one table",
    "directory of 64 MiB of zeros",
    "65,536 snapshots with 32 MiB of L1 each",
    "a million refcount blocks in a hole",
    "16 million leaks",
    "encryption header of a PiB",
    "guest data all over 4 PiB",
    "the widest bitmap",
    "512 MiB of bits, every other cluster all ones",
    "512 MiB of bits in one cluster",
    "nothing but its length",
}


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.long) for kind in FORGED]
)
def test_bounds_of_time_and_memory(path: Path, kind: str) -> None:
    """2 seconds of CPU and 256 MiB for each operation: by its own words or because there is not more to do."""
    try:
        FORGED[kind](path)
    except OSError as error:
        pytest.skip(f"no such file can be made here: {error}")
    size, blocks = path.stat().st_size, path.stat().st_blocks
    command = [sys.executable, "-c", WATCHED, path, ",".join(ACTS), Path(__file__).parent.parent]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    told = [line.split("|") for line in done.stdout.splitlines()]
    assert [line[0] for line in told] == list(ACTS)
    assert not [line for line in told if "WRITTEN" in line[1]]
    assert not [line for line in told if float(line[2]) > HONEST_SECONDS.get((kind, line[0]), SECONDS)]
    assert not [line for line in told if int(line[3]) > MEBIBYTES]
    assert (path.stat().st_size, path.stat().st_blocks) == (size, blocks)


def test_a_disk_too_large_for_bitmaps(tmp_path: Path) -> None:
    """16 TiB of bits are refused before anyone asks for them."""
    path = Forged(tmp_path / "forged.qcow2", 21, size=1 << 60, l1_size=1 << 21, l1_table_offset=1 << 27).save(1 << 30)
    for granularity in (None, 512, 65536):
        with (
            dm.open(path) as image,
            pytest.raises(dm.BitmapError, match="bytes of bits"),
            image.transaction() as bitmaps,
        ):
            changes.add(bitmaps, "b", granularity)
    with dm.open(path) as image, image.transaction() as bitmaps:
        changes.add(bitmaps, "b", 1 << 31)
    assert dm.describe(path).bitmaps[0].count == 0
