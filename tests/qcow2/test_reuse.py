"""Freed clusters are used again, however large the image, and only where all of its references prove them free."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import crash, qemu
from support.craft import Craft

import dirtmap.engine as dm
from dirtmap.engine.model import changes
from dirtmap.engine.qcow2 import commit, few, references
from dirtmap.engine.qcow2.layout import read_layout
from dirtmap.engine.qcow2.sidecar import make_sidecar
from dirtmap.engine.system.file import File, open_file, using
from dirtmap.fmt import qcow2

MIB = 1 << 20
CHANGES = 60


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image counts as one whose L2 tables are too many to be remembered."""
    monkeypatch.setattr(commit, "_PROOF_BUDGET", 0)


def change(path: Path, number: int) -> None:
    """One bit, set and cleared by turns."""
    with dm.open(path) as image, image.transaction() as bitmaps:
        if number % 2:
            changes.clear(bitmaps, "b")
        else:
            changes.mark(bitmaps, "b", [0], [1])


def grown(path: Path, act: Callable[[int], object]) -> int:
    """By how many bytes so many changes let the file grow; QEMU checks each."""
    before = path.stat().st_size
    for number in range(CHANGES):
        act(number)
        qemu.check(path)
    return path.stat().st_size - before


IMAGES = {
    "plain": ("cluster_size=4096", []),
    "64 KiB clusters": ("", []),
    "snapshot": ("cluster_size=4096", ["snapshot"]),
    "extended L2 entries": ("cluster_size=16k,extended_l2=on", []),
    "compressed": ("cluster_size=4096", ["compressed"]),
    "raw external data": ("cluster_size=4096", ["data_file"]),
    "narrow counts": ("cluster_size=4096,refcount_bits=1", []),
}


def build(folder: Path, kind: str) -> Path:
    options, more = IMAGES[kind]
    path = folder / "disk.qcow2"
    if "data_file" in more:
        options += f",data_file={folder / 'raw'},data_file_raw=on"
    qemu.create(path, 64 * MIB, options)
    qemu.qemu_io(path, "write -q -P 1 0 3M", "write -q -P 2 40M 1M", "write -q -P 3 63M 1M")
    if "compressed" in more:
        whole = path.rename(folder / "whole.qcow2")
        qemu.qemu_img("convert", "-c", "-O", "qcow2", "-o", options, whole, path)
    qemu.qemu_img("bitmap", "--add", "-g", "64k", path, "b")
    if "snapshot" in more:
        qemu.qemu_img("snapshot", "-c", "s", path)
        qemu.qemu_io(path, "write -q -P 4 1M 1M")
    return path


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.usefixtures("large")
def test_growth_is_bounded(tmp_path: Path, kind: str) -> None:
    path = build(tmp_path, kind)
    original = path.read_bytes()
    flags = ("--enable", "--disable")
    theirs = grown(path, lambda number: qemu.qemu_img("bitmap", flags[number % 2], path, "b"))
    path.write_bytes(original)
    ours = grown(path, lambda number: change(path, number))
    # A commit has the old and the new side by side: directory, table and one cluster of bits.
    assert ours <= theirs + 6 * Craft(path).cluster_size


def test_a_sidecar_of_a_tib_does_not_grow(tmp_path: Path) -> None:
    """It has 32 MiB of L2 tables, which need not be read: they lead into the raw file."""
    raw, path = tmp_path / "raw", tmp_path / "side.qcow2"
    raw.touch()
    os.truncate(raw, 1 << 40)
    make_sidecar(str(raw), str(path))
    with dm.open(path) as image, image.transaction() as bitmaps:
        changes.add(bitmaps, "b")
    before = path.stat().st_size
    for number in range(CHANGES):
        change(path, number)
    qemu.check(path)
    assert path.stat().st_size - before <= 6 << 18  # clusters of 256 KiB


@pytest.mark.parametrize("kind", IMAGES)
def test_following_finds_what_a_complete_walk_finds(tmp_path: Path, kind: str) -> None:
    path = build(tmp_path, kind)
    with open_file(str(path)) as file:
        layout = read_layout(file)
        complete = references.walk(file, layout)
        partial = references.walk(file, layout, budget=0)
        assert (len(partial.unfollowed) > 0) == (kind != "raw external data")
        numbers = np.arange(file.size() // layout.cluster_size + 3)
        np.random.default_rng(1).shuffle(numbers)
        for asked in (numbers, numbers[: len(numbers) // 3], numbers[:0]):
            found = references.follow(file, layout, partial, asked)
            assert found is not None
            assert not len(found.unfollowed)
            assert ((found.runs.of(asked) > 0) == (complete.runs.of(asked) > 0)).all()
            assert found.runs.end == complete.runs.end


@pytest.mark.parametrize("buckets", [0, 1, 3, 24])
def test_few_buckets_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buckets: int) -> None:
    monkeypatch.setattr(references, "_BUCKETS", buckets)
    test_following_finds_what_a_complete_walk_finds(tmp_path, "snapshot")


LIES = {
    "guest data": lambda craft: craft.get(craft.l2()) & 0x00FFFFFFFFFFFE00,
    "an L2 table": lambda craft: craft.get(craft.l1()) & 0x00FFFFFFFFFFFE00,
    "a snapshot's L1 table": lambda craft: craft.get(craft.snapshot(0, "l1_table_offset")),
}


@pytest.mark.parametrize("what", LIES)
@pytest.mark.usefixtures("large")
def test_a_refcount_of_0_proves_nothing(tmp_path: Path, what: str) -> None:
    path = build(tmp_path, "snapshot")
    craft = Craft(path)
    offset = LIES[what](craft)
    craft.set_refcount(offset, 0).save(path)
    before = craft.data[offset : offset + craft.cluster_size]
    for number in range(8):
        change(path, number)
    assert Craft(path).data[offset : offset + craft.cluster_size] == before


@pytest.mark.usefixtures("large")
def test_a_compressed_cluster_with_a_refcount_of_0_is_not_reused(tmp_path: Path) -> None:
    path = build(tmp_path, "compressed")
    craft = Craft(path)
    entry = craft.get(craft.l2())
    assert entry >> 62 & 1
    offset = (entry & ((1 << 58) - 1)) // craft.cluster_size * craft.cluster_size
    before = craft.data[offset : offset + craft.cluster_size]
    craft.set_refcount(offset, 0).save(path)
    for number in range(8):
        change(path, number)
    assert Craft(path).data[offset : offset + craft.cluster_size] == before


@pytest.mark.usefixtures("large")
def test_what_guest_data_shares_with_a_bitmap_is_not_freed(tmp_path: Path) -> None:
    path = build(tmp_path, "plain")
    change(path, 0)
    craft = Craft(path)
    (cluster,) = craft.data_clusters(0)
    craft.leak(1)  # so that there is something to prove free, and the tables are read
    craft.set_refcount(craft.leak(1)[0], 0)
    craft.set(craft.l2(5), cluster | 1 << 63).save(path)
    with pytest.raises(dm.FormatError, match="used twice; run check"):
        change(path, 1)
    assert path.read_bytes() == bytes(craft.data)


@pytest.mark.usefixtures("large")
def test_a_reference_that_leads_astray_lets_the_file_grow(tmp_path: Path) -> None:
    path = build(tmp_path, "plain")
    craft = Craft(path)
    free = craft.leak(3)
    for offset in free:
        craft.set_refcount(offset, 0)
    craft.set(craft.l2(7), 1 << 40 | 1 << 63).save(path)
    change(path, 0)
    after = path.read_bytes()
    assert len(after) > len(craft.data)
    assert all(after[offset : offset + 4096] == craft.data[offset : offset + 4096] for offset in free)


class Device(File):
    """A file that does not grow."""

    @property
    def growable(self) -> bool:
        return False


@pytest.mark.usefixtures("large")
def test_a_device_is_filled_and_used_again(tmp_path: Path) -> None:
    path = build(tmp_path, "plain")
    size = (path.stat().st_size // 4096 + 6) * 4096
    os.truncate(path, size)
    with using(Device):
        for number in range(CHANGES):
            change(path, number)
    assert path.stat().st_size == size
    qemu.check(path)


@pytest.mark.usefixtures("large")
def test_a_device_with_a_reference_that_leads_astray_is_left_alone(tmp_path: Path) -> None:
    path = build(tmp_path, "plain")
    craft = Craft(path)
    craft.append(bytes(20 * 4096))
    craft.set(craft.l2(7), 1 << 40 | 1 << 63).save(path)
    with using(Device), pytest.raises(dm.FormatError, match="leads nowhere sensible"):
        change(path, 0)
    assert path.read_bytes() == bytes(craft.data)


def test_too_many_tables_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a change is bounded: such an image grows."""
    monkeypatch.setattr(commit, "_PROOF_BUDGET", 0)
    monkeypatch.setattr(commit, "_MOST_FOLLOWED", 4096)
    monkeypatch.setattr(few, "MOST_BYTES", 0)
    monkeypatch.setattr(references, "follow", lambda *_: pytest.fail("read"))
    path = build(tmp_path, "plain")
    before = path.stat().st_size
    for number in range(4):
        change(path, number)
    qemu.check(path)
    # Directory, table, a cluster of bits.
    assert before + 4 * 2 * 4096 <= path.stat().st_size <= before + 4 * 3 * 4096
    assert growing(path)
    # What was freed is left to QEMU.
    size = path.stat().st_size
    qemu.qemu_io(path, "write -q -P 5 8M 8k")
    assert path.stat().st_size == size


def growing(path: Path) -> list[str]:
    """What a check that finds nothing wrong says of growth."""
    report = dm.check(path)
    assert not report.corruptions + report.leaks + report.check_errors
    return [finding.what for finding in report.findings if finding.where == "L2 tables"]


@pytest.mark.parametrize("kind", IMAGES)
def test_a_check_says_which_images_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    path = build(tmp_path, kind)
    assert growing(path) == []
    monkeypatch.setattr(commit, "_MOST_FOLLOWED", 4096)
    monkeypatch.setattr(few, "MOST_BYTES", 0)
    assert len(growing(path)) == (kind != "raw external data")
    if kind == "plain":
        with using(Device):
            assert growing(path) == []
    if kind == "snapshot":
        monkeypatch.setattr(commit, "_MOST_FOLLOWED", 1 << 40)
        assert growing(path) == []
        monkeypatch.setattr(qcow2, "MAX_L1_BYTES", 256)  # of one L1 table; there are two
        assert len(growing(path)) == 1


def test_time_and_memory_of_an_image_with_many_tables(tmp_path: Path) -> None:
    """128 MiB of L2 tables, those of a TiB of guest data; a change takes a fraction of what remembering them would."""
    path = tmp_path / "disk.qcow2"
    qemu.create(path, "1T", "preallocation=metadata")
    with dm.open(path) as image, image.transaction() as bitmaps:
        changes.add(bitmaps, "b")
    code = """
import json, resource, sys, time
import dirtmap.engine as dm
from dirtmap.engine.model import changes
def change(number):
    with dm.open(sys.argv[1]) as image, image.transaction() as bitmaps:
        changes.mark(bitmaps, "b", [number << 30], [1])
def used():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
import numpy, dirtmap.engine.qcow2.commit
before = used()
started = time.process_time()
for number in range(6):
    change(number)
print(json.dumps({"seconds": (time.process_time() - started) / 6, "MiB": used() - before}))
"""
    before = path.stat().st_size
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, check=True, timeout=120)
    found = json.loads(done.stdout)
    assert found["seconds"] < 2
    assert found["MiB"] < 64
    assert path.stat().st_size - before <= 6 << 16
    qemu.check(path)


def test_the_judge_sees_reuse_of_what_was_not_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a proof that finds everything free, some state is harmful: so the tests of crashes would notice one."""
    path = build(tmp_path, "plain")
    craft = Craft(path)
    craft.set_refcount(craft.get(craft.l2()) & 0x00FFFFFFFFFFFE00, 0).save(path)
    monkeypatch.setattr(commit, "_PROOF_BUDGET", 0)
    monkeypatch.setattr(references._Window, "add", lambda *_: None)
    recording = crash.record(path, lambda path: change(path, 0))
    with pytest.raises(crash.Harm):
        crash.explore(recording, crash.Judge(recording), crash.Effort(random=8))
