"""Hostile images: every field at its limits and beyond. An error or a right answer; no crash, no hang, no write."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import qemu
from support.craft import Craft, Place

import dirtmap.engine as dm
from dirtmap.engine.model import changes
from dirtmap.fmt import directory, qcow2
from dirtmap.fmt.directory import build_directory

MIB = 1 << 20
SECONDS = 2.0

NAMES = ("b0", "b1", "b2")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Craft:
    """An image with three bitmaps that hold data, guest data and a snapshot; small, so that thousands can be tried."""
    path = tmp_path_factory.mktemp("sound") / "disk.qcow2"
    qemu.create(path, 64 * MIB, "cluster_size=4096")
    for number, name in enumerate(NAMES):
        qemu.qemu_img("bitmap", "--add", "-g", str(4096 << number), path, name)
    qemu.qemu_io(path, "write -q 0 64k", "write -q 3M 128k", "write -q 60M 4k")
    qemu.qemu_img("snapshot", "-c", "s", path)
    return Craft(path)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Where each damaged image is put: memory, since thousands are."""
    memory = Path("/dev/shm")
    path = (memory if memory.is_dir() else tmp_path) / f"dirtmap-test-{os.getpid()}.qcow2"
    yield path
    path.unlink(missing_ok=True)


def _require_one_line(error: dm.Error, path: Path) -> None:
    text = str(error)
    assert text.isprintable(), text
    assert str(path) in text
    assert len(text) < 400


def _require_unchanged(path: Path, before: bytes) -> None:
    assert path.read_bytes() == before


def reads(path: Path) -> bool:
    """Tries every way to read; True where the image was accepted. Nothing but a one-line error is let through."""
    accepted = True
    started = time.process_time()  # of this process: the machine may be busy
    try:
        info = dm.describe(path)
        with dm.open(path) as image:
            assert [b.name for b in info.bitmaps] == list(image)
            for bitmap in info.bitmaps:
                if not bitmap.inconsistent:
                    assert image[bitmap.name].count == bitmap.count
    except dm.Error as error:
        _require_one_line(error, path)
        accepted = False
    for act in (dm.check, dm.dump):
        try:
            act(path)
        except dm.Error as error:
            _require_one_line(error, path)
    assert time.process_time() - started < SECONDS
    return accepted


def _add(path: Path) -> None:
    with dm.open(path) as image, image.transaction() as bitmaps:
        changes.add(bitmaps, "new")
        bitmaps["new"].mark(0, 1)


def _change(path: Path) -> None:
    with dm.open(path) as image, image.transaction() as bitmaps:
        name = next(iter(bitmaps))
        changes.remove(bitmaps, name)


MUTATIONS = {"add": _add, "remove": _change, "recover": dm.recover}


def changes_or_refuses(path: Path, *, accepted: bool) -> None:
    """Tries every way to change: a refusal leaves every byte, a success leaves an image no worse than it was."""
    before = path.read_bytes()
    verdict: int | None = None  # of QEMU on what was there, which is asked only where something has changed
    for act in MUTATIONS.values():
        path.write_bytes(before)
        try:
            act(path)
        except StopIteration:
            pass  # no bitmap to change
        except dm.Error as error:
            _require_one_line(error, path)
            _require_unchanged(path, before)
            continue
        if path.read_bytes() != before:
            assert accepted or act is dm.recover
            after = qemu_verdict(path)
            if verdict is None:
                path.write_bytes(before)
                verdict = qemu_verdict(path)
            assert after <= verdict
    path.write_bytes(before)


def qemu_verdict(path: Path) -> int:
    """0 clean, 1 leaks, 2 corrupt, 3 refused."""
    done = subprocess.run(["qemu-img", "check", "-f", "qcow2", path], capture_output=True, check=False, timeout=60)
    return {0: 0, 3: 1, 2: 2}.get(done.returncode, 3)


def values(craft: Craft, where: Place) -> list[int]:
    """A field's own value, its neighbours, and the limits of every width."""
    now = craft.get(where)
    limits = [0, 1, 2, 3, 7, 8, 9, 21, 22, 31, 32, 63, 512, 4095, 4096, 4097, 65535, 1 << 31, (1 << 32) - 1]
    limits += [now - 1, now + 1, now << 1, len(craft.data), len(craft.data) - 1, len(craft.data) // 4096 * 4096]
    limits += [1 << 62, 1 << 63, (1 << 63) - 4096, where.most, where.most - 1, 1 << 48, 0x00FFFFFFFFFFFE00]
    return sorted({value for value in limits if 0 <= value <= where.most and value != now})


def fields(craft: Craft) -> list[tuple[str, Place]]:
    return list(craft.fields())


def test_every_field_at_every_limit(sound: Craft, place: Path) -> None:
    tried = refused = 0
    disagreed = []
    for name, where in fields(sound):
        for number, value in enumerate(values(sound, where)):
            sound.copy().set(where, value).save(place)
            accepted = reads(place)
            tried += 1
            refused += not accepted
            # QEMU is the oracle for what must be refused; it takes 6 ms a look, so it is asked about some.
            if accepted and number % 3 == 0 and qemu_refuses(place):
                disagreed.append((name, value))
            if number % 5 == 0:
                changes_or_refuses(place, accepted=accepted)
    assert disagreed == []
    assert tried > 1000
    assert refused > 300


def qemu_refuses(path: Path) -> bool:
    return subprocess.run(["qemu-img", "info", path], capture_output=True, check=False, timeout=60).returncode != 0


def test_truncated_at_every_sector(sound: Craft, place: Path) -> None:
    end = len(sound.data)
    for size in sorted({*range(0, end, 512), 1, 3, 4, 71, 72, 103, 104, 111, 112, 119, 120, end - 1}):
        Craft(sound.data[:size]).save(place)
        accepted = reads(place)
        if size % 4096 == 0:
            changes_or_refuses(place, accepted=accepted)


@settings(max_examples=300)
@given(flips=st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 7)), min_size=1, max_size=4))
def test_flipped_bits_of_the_header(sound: Craft, flips: list[tuple[int, int]]) -> None:
    path = Path("/dev/shm") / f"dirtmap-test-flip-{os.getpid()}.qcow2"
    craft = sound.copy()
    for offset, bit in flips:
        craft.data[offset] ^= 1 << bit
    try:
        craft.save(path)
        accepted = reads(path)
        if not accepted:
            changes_or_refuses(path, accepted=False)
    finally:
        path.unlink(missing_ok=True)


UNSAFE = {
    "two bitmaps share a table": lambda c: c.set(c.entry(1, "table_offset"), c.get(c.entry(0, "table_offset"))).set(
        c.entry(1, "table_size"), c.get(c.entry(0, "table_size"))
    ),
    "two bitmaps share a cluster": lambda c: c.set(c.table(1), c.get(c.table(0))),
    "a table past the end of the file": lambda c: c.set(
        c.entry(0, "table_offset"), (len(c.data) + 8191) // 4096 * 4096
    ),
    "a cluster past the end of the file": lambda c: c.set(c.table(0), (len(c.data) + 8191) // 4096 * 4096),
    "a directory past the end of the file": lambda c: c.set(c.bitmaps("directory_offset"), 1 << 40),
    "a directory over the refcount table": lambda c: c.put(
        c.get(c.header("refcount_table_offset")),
        bytes(c.data[c.get(c.bitmaps("directory_offset")) :][: c.get(c.bitmaps("directory_size"))]),
    ).set(c.bitmaps("directory_offset"), c.get(c.header("refcount_table_offset"))),
    "a table over the L1 table": lambda c: c.set(c.entry(0, "table_offset"), c.get(c.header("l1_table_offset"))),
    "bits over the L1 table": lambda c: c.set(c.table(0), c.get(c.header("l1_table_offset"))),
    "bits over the directory": lambda c: c.set(c.table(0), c.get(c.bitmaps("directory_offset"))),
    "bits over the refcount table": lambda c: c.set(c.table(0), c.get(c.header("refcount_table_offset"))),
    "bits over another bitmap's table": lambda c: c.set(c.table(0), c.get(c.entry(1, "table_offset"))),
    "bits over the snapshot table": lambda c: c.set(c.table(0), c.get(c.header("snapshots_offset"))),
}


@pytest.mark.parametrize("what", UNSAFE)
def test_what_qemu_accepts_and_is_unsafe_is_refused(sound: Craft, place: Path, what: str) -> None:
    craft = sound.copy()
    UNSAFE[what](craft)
    craft.save(place)
    assert not reads(place)
    changes_or_refuses(place, accepted=False)
    report = dm.check(place)
    assert report.corruptions > 0


def test_a_bitmap_over_guest_data_is_found_by_check_and_not_freed(sound: Craft, place: Path) -> None:
    craft = sound.copy()
    l2 = craft.get(Place(craft.get(craft.header("l1_table_offset")), 8)) & qcow2.OFFSET_MASK
    guest = craft.get(Place(l2, 8)) & qcow2.OFFSET_MASK
    craft.set(craft.table(0), guest).save(place)
    assert any("shares clusters with something else" in f.what for f in dm.check(place).findings)
    before = place.read_bytes()
    with dm.open(place) as image, pytest.raises(dm.FormatError, match="used twice; run check"):
        _remove_first(image)
    assert place.read_bytes() == before


def _remove_first(image: dm.Namespace) -> None:
    with image.transaction() as bitmaps:
        changes.remove(bitmaps, "b0")


@pytest.mark.parametrize(
    "kind", ["empty", "folder", "fifo", "device", "text", "nothing", "magic alone", "socket-like name"]
)
def test_what_is_no_image(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "thing"
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/null")
    elif kind == "text":
        path.write_text("not an image\n" * 1000)
    elif kind == "magic alone":
        path.write_bytes(qcow2.MAGIC)
    elif kind == "socket-like name":
        path = tmp_path / "no\nsuch\x1bfile"
    for act in (dm.open, dm.describe, dm.check, dm.dump, dm.recover):
        if act in (dm.dump, dm.check) and kind in ("empty", "text", "magic alone"):
            continue  # they show what is there
        with pytest.raises(dm.Error) as caught:
            act(path)
        assert "\n" not in str(caught.value)


def _bounded(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own that may use 256 MiB beyond what importing took, and SECONDS."""
    program = (
        "import sys, resource, time\n"
        "import numpy, dirtmap.engine as dm, dirtmap.engine.qcow2.check, dirtmap.engine.qcow2.dump\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "started = time.process_time()\n"
        "path = sys.argv[1]\n"
        "try:\n"
        f"    {code}\n"
        "except dm.Error as error:\n"
        "    print('refused', str(error)[:300])\n"
        "print('MiB', (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)\n"
        "print('seconds', time.process_time() - started)\n"
    )
    return subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True, timeout=60)


def _huge(sound: Craft, kind: str, path: Path) -> None:
    craft = sound.copy()
    if kind == "65,535 bad entries":
        entry = build_directory([directory.Entry(b"x", 7, 0, 0xFF, 99, 7)])
        at = craft.append(entry * directory.MAX_BITMAPS)
        craft.set(craft.bitmaps("directory_offset"), at)
        craft.set(craft.bitmaps("directory_size"), len(entry) * directory.MAX_BITMAPS)
        craft.set(craft.bitmaps("nb_bitmaps"), directory.MAX_BITMAPS)
    elif kind == "a directory of 64 MiB of nothing":
        at = craft.append(b"")
        craft.set(craft.bitmaps("directory_offset"), at)
        craft.set(craft.bitmaps("directory_size"), directory.MAX_DIRECTORY_SIZE)
        craft.save(path)
        os.truncate(path, at + directory.MAX_DIRECTORY_SIZE)
        return
    elif kind == "a table of a million entries":
        craft.set(craft.header("size"), 1 << 50)
        craft.set(craft.entry(0, "table_size"), 131072)
        at = craft.append(b"\xff" * 8 * 131072)
        craft.set(craft.entry(0, "table_offset"), at)
    elif kind == "an L1 table of 32 MiB of holes":
        craft.set(craft.header("l1_size"), qcow2.MAX_L1_BYTES // 8)
        craft.set(craft.header("l1_table_offset"), craft.append(b""))
        craft.save(path)
        os.truncate(path, 1 << 40)
        return
    elif kind == "65,536 snapshots":
        craft.set(craft.header("nb_snapshots"), qcow2.MAX_SNAPSHOTS)
        craft.set(craft.header("snapshots_offset"), craft.append(b""))
        craft.save(path)
        os.truncate(path, 1 << 40)
        return
    craft.save(path)


@pytest.mark.parametrize(
    "kind",
    [
        "65,535 bad entries",
        "a directory of 64 MiB of nothing",
        "a table of a million entries",
        "an L1 table of 32 MiB of holes",
        "65,536 snapshots",
    ],
)
@pytest.mark.parametrize("act", ["describe", "check", "dump"])
def test_hostile_counts_are_bounded_in_time_and_memory(sound: Craft, tmp_path: Path, kind: str, act: str) -> None:
    path = tmp_path / "huge.qcow2"
    _huge(sound, kind, path)
    before = path.stat()
    said = _bounded(f"dm.{act}(path)", path).stdout.split()
    assert int(said[said.index("MiB") + 1]) < 256, said
    assert float(said[said.index("seconds") + 1]) < 2 * SECONDS, said  # CPU time; this machine may be slow
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
