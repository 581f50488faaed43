"""Mending what nothing else mends: images that QEMU refuses because of one bitmap, leaked clusters, wrong refcounts."""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
from support import qemu
from support.cli import dirtmap, json_of
from support.craft import Craft

import dirtmap.engine as dm
from dirtmap.fmt import directory, qcow2

MIB = 1 << 20
SIZE = 16 * MIB
NAMES = ("good", "victim", "also good")


class Built(NamedTuple):
    """An image: its bytes, what its guest reads, and what QEMU calls dirty."""

    data: bytes
    guest: str
    dirty: dict[str, qemu.Map]


@functools.cache
def built(options: str) -> Built:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "disk.qcow2")
        qemu.create(path, SIZE, options)
        for number, name in enumerate(NAMES):
            qemu.qemu_img("bitmap", "--add", "-g", str(65536 << number), path, name)
        qemu.qemu_io(path, "write -q 0 64k", "write -q 3M 3M")
        qemu.qemu_img("snapshot", "-c", "s", path)
        qemu.qemu_io(path, "write -q 12M 1M")
        return Built(path.read_bytes(), guest(path), {name: qemu.dirty(path, name) for name in NAMES})


def build(path: Path, options: str = "") -> Craft:
    path.write_bytes(built(options).data)
    return Craft(path)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return tmp_path / "disk.qcow2"


def guest(path: Path) -> str:
    raw = path.with_suffix(".raw")
    qemu.qemu_img("convert", "-O", "raw", path, raw)
    return hashlib.sha256(raw.read_bytes()).hexdigest()


def refused(path: Path) -> bool:
    return subprocess.run(["qemu-img", "info", path], capture_output=True, check=False, timeout=60).returncode != 0


def _rename(craft: Craft, index: int, name: bytes) -> None:
    at, old = craft.name(index)
    assert len(old) >= len(name)
    craft.put(at, name)
    craft.set(craft.entry(index, "name_size"), len(name))


BAD_ENTRIES = {
    "type": lambda c: c.set(c.entry(1, "type"), 9),
    "granularity too fine": lambda c: c.set(c.entry(1, "granularity_bits"), 8),
    "granularity too coarse": lambda c: c.set(c.entry(1, "granularity_bits"), 40),
    "an unknown flag": lambda c: c.set(c.entry(1, "flags"), 1 << 7),
    "table offset odd": lambda c: c.set(c.entry(1, "table_offset"), 12345),
    "table offset zero": lambda c: c.set(c.entry(1, "table_offset"), 0),
    "table size zero": lambda c: c.set(c.entry(1, "table_size"), 0),
    "table size huge": lambda c: c.set(c.entry(1, "table_size"), 1 << 30),
    "table entry reserved bits": lambda c: c.set(c.table(1), 1 << 60),
    "table entry odd": lambda c: c.set(c.table(1), 0x1200),
    "ones with an offset": lambda c: c.set(c.table(1), c.get(c.table(1)) | 1),
    "name that another has": lambda c: _rename(c, 1, b"good"),
}
# The lengths of the broken entry lead nowhere, yet what is behind it is found again.
BROKEN_LENGTHS = {
    "extra data size": lambda c: c.set(c.entry(1, "extra_data_size"), 1 << 20),
    "name size": lambda c: c.set(c.entry(1, "name_size"), 60000),
}


@pytest.mark.parametrize("options", ["", "cluster_size=4096,refcount_bits=1", "refcount_bits=64,extended_l2=on"])
@pytest.mark.parametrize("what", [*BAD_ENTRIES, *BROKEN_LENGTHS])
def test_one_bad_entry_is_dropped_and_the_others_are_kept(image: Path, what: str, options: str) -> None:
    if "refcount_bits=1" in options and "name that" in what:
        options = "cluster_size=4096"
    options = options.replace("refcount_bits=1", "refcount_bits=2")  # a snapshot needs counts of 2
    craft = build(image, options)
    _, before, kept = built(options)
    {**BAD_ENTRIES, **BROKEN_LENGTHS}[what](craft)
    craft.save(image)
    with pytest.raises(dm.FormatError):
        dm.open(image)
    shown = dm.dump(image)
    assert shown["faults"]
    assert json.dumps(shown)
    found = dm.check(image)
    assert found.corruptions > 0
    assert image.read_bytes() == bytes(craft.data)
    report = dm.check(image, repair="all")
    assert (report.corruptions, report.leaks) == (0, 0)
    # Of two with one name, the later one is the bad one. What a broken entry is called cannot be told.
    assert (len(report.dropped), report.dropped_unnamed) == ((0, 1) if what in BROKEN_LENGTHS else (1, 0))
    assert set(qemu.bitmaps(image)) == {"good", "also good"}
    for name in ("good", "also good"):
        assert qemu.dirty(image, name) == kept[name]
    qemu.check(image)
    assert guest(image) == before
    assert dm.check(image).findings == []
    qemu.qemu_io(image, "write -q 14M 64k")  # QEMU goes on recording into what is left
    assert (14 * MIB, 65536) in qemu.dirty(image, "good")


BAD_DIRECTORIES = {
    "past the end of the file": lambda c: c.set(c.bitmaps("directory_offset"), 1 << 40),
    "misplaced": lambda c: c.set(c.bitmaps("directory_offset"), 0x1234),
    "no bitmaps": lambda c: c.set(c.bitmaps("nb_bitmaps"), 0),
    "too large": lambda c: c.set(c.bitmaps("directory_size"), 1 << 50),
    "reserved": lambda c: c.set(c.bitmaps("reserved"), 1),
}


@pytest.mark.parametrize("what", BAD_DIRECTORIES)
def test_a_bad_directory_goes_whole_or_is_mended(image: Path, what: str) -> None:
    craft = build(image)
    before = built("").guest
    BAD_DIRECTORIES[what](craft)
    craft.save(image)
    assert refused(image)
    report = dm.check(image, repair="all")
    assert (report.corruptions, report.leaks) == (0, 0)
    # Where only a count or a length is wrong, the entries themselves tell what was meant.
    assert set(qemu.bitmaps(image)) == (set() if what in ("past the end of the file", "misplaced") else set(NAMES))
    qemu.check(image)
    assert guest(image) == before


def test_the_command_says_what_it_did(image: Path) -> None:
    craft = build(image)
    craft.set(craft.entry(1, "granularity_bits"), 8).save(image)
    assert refused(image)
    found = json_of("check", image, status=2)
    assert found["corruptions"] == 1
    assert found["findings"][0] == {
        "severity": "corruption",
        "where": "bitmap 'victim'.granularity_bits",
        "what": "8 is outside 9..31",
    }
    assert "victim" in dirtmap("dump", image).out
    mended = json_of("check", "-r", "all", image)
    assert (mended["corruptions"], mended["corruptions-fixed"]) == (0, 1)
    assert not refused(image)
    assert dirtmap("check", image).status == 0


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_leaked_clusters_are_reclaimed_whatever_the_width(image: Path, bits: int) -> None:
    qemu.create(image, 64 * MIB, f"refcount_bits={bits}")
    qemu.qemu_img("bitmap", "--add", image, "b")
    qemu.qemu_io(image, "write -q 3M 1M")
    craft = Craft(image)
    leaked = craft.leak(5)
    craft.save(image)
    assert dm.check(image).leaks == 5
    assert qemu_counts(image) == (5, 0)
    dirtmap("check", image, status=3)
    report = dm.check(image, repair="leaks")
    assert (report.leaks, report.leaks_fixed) == (0, 5)
    qemu.check(image)
    assert [Craft(image).refcount(offset) for offset in leaked] == [0] * 5
    assert qemu.dirty(image, "b") == [(3 * MIB, MIB)]


def qemu_counts(path: Path) -> tuple[int, int]:
    """Leaks and corruptions as QEMU counts them."""
    done = subprocess.run(
        ["qemu-img", "check", "--output=json", path], capture_output=True, check=False, timeout=60, text=True
    )
    found = json.loads(done.stdout)
    return found.get("leaks", 0), found.get("corruptions", 0)


@pytest.mark.parametrize(
    "options",
    [
        "",
        "cluster_size=512,refcount_bits=64",
        "extended_l2=on",
        "compression_type=zstd",
        "lazy_refcounts=on",
        "data_file=data.raw",
        "compat=0.10",
    ],
)
def test_counts_are_those_of_qemu(image: Path, monkeypatch: pytest.MonkeyPatch, options: str) -> None:
    monkeypatch.chdir(image.parent)
    qemu.create(image, 16 * MIB, options)
    if "0.10" not in options:
        qemu.qemu_img("bitmap", "--add", image, "b")
    compress = "data_file" not in options
    qemu.qemu_io(image, "write -q 0 1M", *(["write -q -c 4M 64k"] if compress else []), "write -q -z 8M 1M")
    if "data_file" not in options:
        qemu.qemu_img("snapshot", "-c", "s", image)
    qemu.qemu_io(image, "write -q 512k 64k", "discard -q 0 64k")
    craft = Craft(image)
    assert (dm.check(image).leaks, dm.check(image).corruptions) == qemu_counts(image) == (0, 0)
    last = len(craft.data) // craft.cluster_size - 1
    for offset in (craft.cluster_size * number for number in range(last)):
        try:
            count = craft.refcount(offset)
        except KeyError:
            continue
        if count == 0:
            craft.set_refcount(offset, 1)
            break
    table = craft.get(craft.header("l1_table_offset"))
    craft.set_refcount(table, 0)
    craft.save(image)
    report = dm.check(image)
    assert (report.leaks, report.corruptions) == qemu_counts(image)
    assert report.corruptions == 1


def test_in_use_and_void_are_notes(image: Path) -> None:
    craft = build(image)
    flags = craft.entry(1, "flags")
    craft.set(flags, craft.get(flags) | directory.FLAG_IN_USE).save(image)
    report = dm.check(image)
    assert [(f.severity, f.where) for f in report.findings] == [("note", "bitmap 'victim'")]
    assert (report.corruptions, report.leaks) == (0, 0)
    autoclear = craft.header("autoclear_features")
    craft.set(autoclear, craft.get(autoclear) & ~qcow2.AUTOCLEAR_BITMAPS).save(image)
    assert any(f.severity == "note" and "void" in f.what for f in dm.check(image).findings)
    assert dm.describe(image).bitmaps == ()
    assert "void" in dm.describe(image).notes[0]


def test_recover_leaves_damaged_bitmaps_as_they_are(image: Path) -> None:
    craft = build(image)
    for index in (0, 2):
        flags = craft.entry(index, "flags")
        craft.set(flags, craft.get(flags) | directory.FLAG_IN_USE)
    craft.set(craft.entry(1, "flags"), 1 << 7).save(image)
    assert [r.name for r in dm.recover(image)] == ["good", "also good"]
    after = Craft(image)
    assert after.get(after.entry(1, "flags")) == 1 << 7  # found so, kept so
    with pytest.raises(dm.FormatError, match="victim"):
        dm.recover(image, ["victim"])
    dm.check(image, repair="all")
    size = [(0, SIZE)]
    assert {name: qemu.dirty(image, name) for name in qemu.bitmaps(image)} == {"good": size, "also good": size}
    qemu.check(image)
