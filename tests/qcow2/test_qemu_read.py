"""What QEMU wrote, dirtmap reads bit for bit; a naive model of the writes agrees with both."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import struct
from pathlib import Path

import pytest
from support.qemu import (
    StorageDaemon,
    Target,
    ToolError,
    bitmaps,
    check,
    create,
    dirty,
    extents,
    modelled,
    patch,
    qemu_img,
    qemu_io,
    read_header,
)

import dirtmap.engine as dm

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.qcow2"


def assert_same(target: Target, *names: str) -> None:
    """QEMU and dirtmap agree on the bitmaps' names, order, granularity, flags and bits."""
    listed = bitmaps(target)
    with dm.open(target) as image:
        found = {info.name: info for info in image.info().bitmaps}
        assert list(found) == list(listed) == list(image)
        for name, (granularity, flags) in listed.items():
            info, bitmap = found[name], image[name]
            assert info.granularity == bitmap.granularity == granularity
            assert info.recording == bitmap.recording == ("auto" in flags)
            assert info.inconsistent == bitmap.inconsistent == ("in-use" in flags)
            if not info.inconsistent:
                assert info.count == bitmap.count
        for name in names or listed:
            assert extents(image[name]) == dirty(target, name)


@pytest.mark.parametrize("cluster", [512, 4 * KIB, 64 * KIB, 2 * MIB])
@pytest.mark.parametrize("granularity", [512, 64 * KIB, 2 * GIB])
def test_granularities_and_cluster_sizes(path: Path, cluster: int, granularity: int) -> None:
    size = 3 * MIB + 512
    writes = [(0, 512), (70_000, 1), (MIB - 1, 2), (2 * MIB + 512, 300_000), (size - 512, 512)]
    create(path, size, f"cluster_size={cluster}")
    qemu_img("bitmap", "--add", "-g", str(granularity), path, "b0")
    qemu_io(path, *(f"write {offset} {length}" for offset, length in writes))
    with dm.open(path) as image:
        assert extents(image["b0"]) == modelled(size, granularity, writes)
    assert_same(path)


def test_a_bitmap_of_many_clusters_some_of_them_all_dirty(path: Path) -> None:
    # One cluster of 512 bytes of bits stands for 2 MiB of the disk.
    size = 64 * MIB + 512
    writes = [(4 * MIB, 7 * MIB), (16 * MIB - 512, 1024), (20 * MIB, 512), (63 * MIB, MIB + 512)]
    create(path, size, "cluster_size=512")
    qemu_img("bitmap", "--add", "-g", "512", path, "fine")
    qemu_io(path, *(f"write -z {offset} {length}" for offset, length in writes))
    with dm.open(path) as image:
        assert extents(image["fine"]) == modelled(size, 512, writes)
    assert_same(path)


def test_all_ways_of_writing_are_recorded(path: Path) -> None:
    size = 8 * MIB
    create(path, size)
    qemu_img("bitmap", "--add", path, "b0")
    qemu_io(path, "write 1M 100", "write -z 2M 64k", "write -z -u 3M 64k", "write -c 4M 64k")
    qemu_io(path, "discard 5M 128k", "read 6M 4k", "flush")
    offsets = [(MIB, 100), (2 * MIB, 65536), (3 * MIB, 65536), (4 * MIB, 65536), (5 * MIB, 2 * 65536)]
    with dm.open(path) as image:
        assert extents(image["b0"]) == modelled(size, 65536, offsets)
    assert_same(path)


def test_a_session_of_a_storage_daemon(path: Path) -> None:
    size = 10 * MIB + 512
    create(path, size)
    with StorageDaemon(path) as daemon:
        daemon.add("default")
        daemon.add("fine", 512)
        daemon.add("coarse", 4 * MIB)
        daemon.io("write 64k 1", "write 3M 600k")
        daemon.qmp("block-dirty-bitmap-disable", node="disk", name="fine")
        daemon.add("late", 4096)
        daemon.io("write 9M 4k", "write 10M 512")
        daemon.add("disabled", 32768, recording=False)
        daemon.add("merged", 8192, recording=False)
        daemon.qmp("block-dirty-bitmap-merge", node="disk", target="merged", bitmaps=["fine", "late"])
        daemon.add("cleared", 65536)
        daemon.io("write 5M 4k")
        daemon.qmp("block-dirty-bitmap-clear", node="disk", name="cleared")
        daemon.io("write 6M 4k")
        told = daemon.bitmaps()
        digests = {name: daemon.digest(name) for name in told}
        daemon.quit()
    early, middle = [(65536, 1), (3 * MIB, 600 * KIB)], [(9 * MIB, 4096), (10 * MIB, 512)]
    late, last = [(5 * MIB, 4096)], [(6 * MIB, 4096)]
    expected = {
        "default": modelled(size, 65536, early + middle + late + last),
        "fine": modelled(size, 512, early),
        "coarse": modelled(size, 4 * MIB, early + middle + late + last),
        "late": modelled(size, 4096, middle + late + last),
        "disabled": [],
        "merged": modelled(size, 8192, modelled(size, 512, early) + modelled(size, 4096, middle)),
        "cleared": modelled(size, 65536, last),
    }
    with dm.open(path) as image:
        assert {name: extents(bitmap) for name, bitmap in image.items()} == expected
        for info in image.info().bitmaps:
            assert told[info.name]["count"] == info.count
            assert told[info.name]["recording"] == info.recording
            assert told[info.name]["granularity"] == info.granularity
            assert digests[info.name] == hashlib.sha256(image[info.name].words.tobytes()).hexdigest()
    assert_same(path)


def test_count_goes_beyond_the_disk_as_with_qemu(path: Path) -> None:
    create(path, 197_120)
    qemu_img("bitmap", "--add", path, "b0")
    qemu_io(path, "write 0 197120")
    with StorageDaemon(path, "read-only=on") as daemon:
        assert daemon.bitmaps()["b0"]["count"] == 262_144
    with dm.open(path) as image:
        assert image.info().bitmaps[0].count == image["b0"].count == 262_144
        assert extents(image["b0"]) == [(0, 197_120)]


@pytest.mark.parametrize(
    "name",
    ["x" * 1023, "Ünïcödé ☃ 🐄", "a b\tc'\"\\{}%", "ж" * 511, " ", "-r", "\x01\x7f", "a" * 7, "a" * 8, "a" * 9],
)
def test_names(path: Path, name: str) -> None:
    create(path, MIB)
    with StorageDaemon(path) as daemon:  # a name with a dash in front is no name to qemu-img
        daemon.add("first")
        daemon.add(name, 512)
        daemon.add("last")
        daemon.io("write 5k 5k")
        daemon.quit()
    with dm.open(path) as image:
        assert sorted(image) == sorted(["first", name, "last"])
        assert extents(image[name]) == modelled(MIB, 512, [(5 * KIB, 5 * KIB)])
        assert list(image) == list(bitmaps(path))


@pytest.mark.parametrize("size", [512, 1024, 65536, 65536 + 512, 32 * MIB - 512])
def test_small_sizes(path: Path, size: int) -> None:
    create(path, size)
    for granularity in (512, 65536, 2 * GIB):
        qemu_img("bitmap", "--add", "-g", str(granularity), path, f"b{granularity}")
    qemu_io(path, f"write {size - 512} 512")
    with dm.open(path) as image:
        assert image.size == size
    assert_same(path)


@pytest.mark.parametrize(
    ("size", "cluster", "granularity"),
    [(16 * TIB, 64 * KIB, 64 * KIB), (1024 * TIB, 2 * MIB, MIB), (2048 * 1024 * TIB, 2 * MIB, 2 * GIB)],
)
def test_huge_sizes(path: Path, size: int, cluster: int, granularity: int) -> None:
    """The last is as large as QEMU's limit on L1 tables lets an image be: 2 EiB."""
    create(path, size, f"cluster_size={cluster}")
    qemu_img("bitmap", "--add", "-g", str(granularity), path, "b0")
    writes = [(0, 4096), (size // 3 * 2 // 512 * 512, MIB), (size - 512, 512)]
    with StorageDaemon(path) as daemon:
        daemon.io(*(f"write {offset} {length}" for offset, length in writes))
        digest = daemon.digest("b0")
        count = daemon.bitmaps()["b0"]["count"]
        daemon.quit()
    with dm.open(path) as image:
        assert image.info().bitmaps[0].count == count
        bitmap = image["b0"]
        assert extents(bitmap) == modelled(size, granularity, writes)
        assert hashlib.sha256(bitmap.words).hexdigest() == digest


@pytest.mark.parametrize("size", [1000, 2 * MIB + 100, 511])
def test_a_part_of_a_sector_at_the_end_is_not_part_of_the_disk(path: Path, size: int) -> None:
    """2 MiB + 100 bytes at 512 bytes a bit: one more bit would need one more cluster."""
    create(path, 3 * MIB, "cluster_size=512")
    patch(path, 24, struct.pack(">Q", size))
    if size >= 512:
        qemu_img("bitmap", "--add", "-g", "512", path, "b0")
        qemu_io(path, "write 0 512")
        assert_same(path)
    with dm.open(path) as image:
        assert image.size == size // 512 * 512
    with dm.open(path) as image, image.transaction() as bitmaps:
        if size >= 512:
            bitmaps["ours"] = dm.Bitmap.from_extents(image.size, [0], [image.size], 512)
    check(path)


def test_images_of_version_2_have_none(path: Path) -> None:
    create(path, MIB, "compat=0.10")
    qemu_io(path, "write 0 64k")
    before = path.read_bytes()
    with dm.open(path) as image:
        assert list(image) == []
        assert (image.size, image.cluster_size) == (MIB, 65536)
        with pytest.raises(dm.UnsupportedError, match="version"), image.transaction() as changed:
            changed["b0"] = dm.Bitmap(MIB)
    assert not dm.check(path).corruptions
    dm.dump(path)
    assert path.read_bytes() == before
    qemu_img("amend", "-f", "qcow2", "-o", "compat=1.1", path)
    with dm.open(path) as image, image.transaction() as changed:
        changed["b0"] = dm.Bitmap(MIB)
    assert_same(path)


def test_encryption_leaves_bitmaps_in_clear(path: Path) -> None:
    disk = create(path, 4 * MIB, encrypted=True)
    with StorageDaemon(disk) as daemon:
        daemon.add("b0", 4096)
        daemon.io("write 5k 2M")
        daemon.quit()
    with dm.open(path) as image:
        assert extents(image["b0"]) == modelled(4 * MIB, 4096, [(5 * KIB, 2 * MIB)])
    assert_same(disk)


def test_resized_and_with_snapshots(path: Path) -> None:
    create(path, 4 * MIB)
    qemu_img("bitmap", "--add", path, "b0")
    qemu_io(path, "write 1M 1M")
    qemu_img("snapshot", "-c", "first", path)
    qemu_io(path, "write 3M 4k")
    qemu_img("resize", "-q", "-f", "qcow2", path, "9M")
    qemu_io(path, "write 8M 4k")
    assert_same(path)
    qemu_img("snapshot", "-c", "second", path)
    qemu_img("snapshot", "-d", "first", path)
    qemu_img("resize", "-q", "--shrink", "-f", "qcow2", path, str(3 * MIB + 512))
    assert_same(path)
    qemu_img("snapshot", "-d", "second", path)
    qemu_img("resize", "-q", "--shrink", "-f", "qcow2", path, str(2 * MIB + 512))
    assert_same(path)
    with dm.open(path) as image:
        assert extents(image["b0"]) == [(MIB, MIB)]


def test_raw_disk_with_a_sidecar(path: Path, tmp_path: Path) -> None:
    create(path, 4 * MIB, f"data_file={tmp_path / 'disk.raw'},data_file_raw=on")
    qemu_img("bitmap", "--add", path, "b0")
    qemu_io(path, "write 100k 100k")
    assert_same(path)


@pytest.mark.parametrize("absent", ["missing", "fifo", "folder"])
@pytest.mark.parametrize("kind", ["backing", "data"])
def test_no_other_file_is_opened(path: Path, tmp_path: Path, kind: str, absent: str) -> None:
    """A FIFO would block whoever opens it, a missing file would fail, and the engine's seam sees each name."""
    from dirtmap.engine.system import file as fileio

    other = tmp_path / "other"
    if kind == "backing":
        create(other, MIB)
        create(path, MIB, "", "-b", other, "-F", "qcow2")
    else:
        create(path, MIB, f"data_file={other}")
    qemu_img("bitmap", "--add", path, "b0")
    qemu_io(path, "write 64k 1")
    other.unlink()
    if absent == "fifo":
        os.mkfifo(other)
    elif absent == "folder":
        other.mkdir()
    names: list[str] = []

    class Named(fileio.File):
        def __init__(self, path: str, **options: bool) -> None:
            names.append(path)
            super().__init__(path, **options)

    before = read_header(path.read_bytes())
    with fileio.using(Named), dm.open(path) as image:
        assert extents(image["b0"]) == [(65536, 65536)]
        with image.transaction() as changed:
            changed["b0"].mark(0, 1)
            changed["b1"] = dm.Bitmap(MIB, 4096)
        dm.describe(path)
        dm.dump(path)
        assert dm.check(path, repair="all").corruptions == 0
        dm.recover(path)
    assert set(names) == {str(path)}
    assert read_header(path.read_bytes()) == before
    if absent != "missing":
        other.rmdir() if absent == "folder" else other.unlink()
    create(other, MIB) if kind == "backing" else other.write_bytes(bytes(MIB))
    assert_same(path)


def test_bitmaps_that_other_software_made_void(path: Path) -> None:
    """Software that does not know bitmaps clears the autoclear bit; QEMU then drops them, and so does dirtmap."""
    create(path, MIB)
    qemu_img("bitmap", "--add", path, "b0")
    qemu_io(path, "write 0 64k")
    patch(path, 88, bytes(8))
    assert bitmaps(path) == {}
    with dm.open(path) as image:
        assert list(image) == []
        assert "void" in image.info().notes[0]
        with image.transaction() as changed:
            changed["b1"] = dm.Bitmap.from_extents(MIB, [65536], [1])
    assert_same(path)
    assert list(bitmaps(path)) == ["b1"]
    qemu_img("check", "-f", "qcow2", path, status=3)  # what the void bitmap had is leaked
    assert dm.check(path, repair="leaks").leaks_fixed
    check(path)
    assert_same(path)


def test_check_agrees_with_qemu_on_sound_images(path: Path, tmp_path: Path) -> None:
    kinds = [
        "cluster_size=512,refcount_bits=1",
        "cluster_size=4k,refcount_bits=2",
        "extended_l2=on,refcount_bits=64",
        "compression_type=zstd,refcount_bits=8",
        "lazy_refcounts=on",
        "preallocation=metadata",
        "preallocation=full",
        f"data_file={tmp_path / 'raw'}",
        "compat=0.10",
    ]
    for number, options in enumerate(kinds):
        disk = tmp_path / f"{number}.qcow2"
        create(disk, 4 * MIB, options)
        if not {"data_file", "preallocation", "compat"} & set(re.split("[=,]", options)):
            qemu_io(disk, "write -c 1M 1M", "write -c -P 7 3M 64k")
        qemu_io(disk, "write 0 300k", "write 3M 4k", "discard 64k 64k")
        if "refcount_bits" not in options and "data_file" not in options:
            qemu_img("snapshot", "-c", "one", disk)
            qemu_io(disk, "write 128k 64k")
        if "0.10" not in options:
            qemu_img("bitmap", "--add", disk, "b0")
        check(disk)
        report = dm.check(disk)
        assert (report.corruptions, report.leaks, report.check_errors) == (0, 0, 0), (options, report.findings)


def test_check_agrees_with_qemu_on_wrong_refcounts(path: Path) -> None:
    """Every refcount of a small image, one less and one more: both call it a corruption, or a leak."""
    create(path, 128 * KIB, "cluster_size=4k,refcount_bits=16")
    qemu_img("bitmap", "--add", path, "b0")
    qemu_io(path, "write 0 8k")
    image = path.read_bytes()
    (table,) = struct.unpack_from(">Q", image, 48)
    (block,) = struct.unpack_from(">Q", image, table)
    for cluster, step in itertools.product(range(len(image) // 4096), (-1, 1)):
        (count,) = struct.unpack_from(">H", image, block + 2 * cluster)
        if count + step < 0:
            continue
        path.write_bytes(image)
        patch(path, block + 2 * cluster, struct.pack(">H", count + step))
        report = dm.check(path)
        assert (report.corruptions, report.leaks) == ((1, 0) if step < 0 else (0, 1)), report.findings
        with pytest.raises(ToolError, match=r"ERROR cluster|Leaked cluster") as complaint:
            check(path)
        assert ("Leaked cluster" in str(complaint.value)) == (step > 0)
        mended = dm.check(path, repair="all")
        assert mended.corruptions_fixed + mended.leaks_fixed == 1
        check(path)
        assert_same(path)
