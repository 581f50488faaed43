"""What dirtmap wrote, QEMU reads bit for bit and goes on recording into; everything else stays as it was."""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.qemu import (
    Header,
    Map,
    StorageDaemon,
    Target,
    bitmaps,
    check,
    create,
    digest,
    dirty,
    extents,
    merged,
    modelled,
    nothing_else_changes,
    opened,
    patch,
    qemu_img,
    qemu_io,
    read_header,
    write_header,
)

import dirtmap.engine as dm
from dirtmap.engine.model import changes

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.qcow2"


@contextlib.contextmanager
def changing(target: Target) -> Iterator[dm.Transaction]:
    """A transaction that may change nothing but bitmaps."""
    with nothing_else_changes(target), dm.open(target) as image, image.transaction() as changed:
        yield changed


def assert_qemu_reads(target: Target) -> dict[str, Map]:
    """QEMU lists and serves what dirtmap reads, which is returned."""
    with dm.open(target) as image:
        ours = {name: extents(bitmap) for name, bitmap in image.items()}
        flags = {i.name: (i.granularity, {"auto"} if i.recording else set()) for i in image.info().bitmaps}
    assert bitmaps(target) == flags
    assert {name: dirty(target, name) for name in flags} == ours
    return ours


def assert_qemu_records(target: Target, size: int) -> None:
    """QEMU's next writes land in the recording bitmaps, on top of what was there, and in no other."""
    expected = assert_qemu_reads(target)
    writes = [(0, 1), (size // 2 // 512 * 512, 512)]
    qemu_io(target, *(f"write {offset} {length}" for offset, length in writes))
    check(target)
    for name, (granularity, flags) in bitmaps(target).items():
        if flags:
            expected[name] = merged(expected[name] + modelled(size, granularity, writes))
    assert assert_qemu_reads(target) == expected


SIZE = 5 * MIB + 512
FIRST = [(MIB, 70_000), (4 * MIB, 512)]


def _rename_all(changed: dm.Transaction) -> None:
    changed["a"], changed["b"] = changed["b"], changed["a"]
    changes.rename(changed, "off", "ж" * 511)


def _many(changed: dm.Transaction) -> None:
    changes.add(changed, "week", 2 * GIB)
    changes.merge(changed, "week", [changed["a"], changed["b"]])
    changes.add(changed, "diff", 512)
    changed["diff"] |= changed["a"] ^ changed["b"]
    changes.remove(changed, "a")
    changes.rename(changed, "b", "a")
    changes.clear(changed, "off")


OPERATIONS: dict[str, Callable[[dm.Transaction], object]] = {
    "nothing": lambda changed: None,
    "add": lambda changed: changes.add(changed, "new"),
    "add disabled": lambda changed: changes.add(changed, "new", 512, recording=False),
    "remove": lambda changed: changes.remove(changed, "a"),
    "remove all": lambda changed: [changes.remove(changed, name) for name in list(changed)],
    "clear": lambda changed: changes.clear(changed, "a"),
    "disable": lambda changed: changes.set_recording(changed, "a", False),
    "enable": lambda changed: changes.set_recording(changed, "off", True),
    "merge to coarser": lambda changed: changes.merge(changed, "b", [changed["a"]]),
    "merge to finer": lambda changed: changes.merge(changed, "a", [changed["b"]]),
    "rename": lambda changed: changes.rename(changed, "a", "Ünïcödé"),
    "swap": _rename_all,
    "mark": lambda changed: changes.mark(changed, "a", [0, SIZE - 1], [100, 1]),
    "mark all": lambda changed: changes.mark(changed, "a", [0], [SIZE]),
    "clear a range": lambda changed: changed["a"].clear(MIB, MIB),
    "put": lambda changed: changes.put(changed, "copy", changed["a"]),
    "set": lambda changed: changed.update(a=changed["b"] - changed["a"]),
    "many": _many,
}


@pytest.mark.parametrize("cluster", [512, 64 * KIB])
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_operations(path: Path, operation: Callable[[dm.Transaction], object], cluster: int) -> None:
    create(path, SIZE, f"cluster_size={cluster}")
    qemu_img("bitmap", "--add", "-g", "512", path, "a")
    qemu_img("bitmap", "--add", "-g", "1M", path, "b")
    qemu_img("bitmap", "--add", "--disable", path, "off")
    qemu_io(path, *(f"write {offset} {length}" for offset, length in FIRST))
    with changing(path) as changed:
        operation(changed)
        expected = {name: (bitmap.granularity, bitmap.recording, extents(bitmap)) for name, bitmap in changed.items()}
    with dm.open(path) as image:
        assert {n: (b.granularity, b.recording, extents(b)) for n, b in image.items()} == expected
        assert list(image) == list(expected)
    assert_qemu_records(path, SIZE)
    with changing(path) as changed:  # once more, over what QEMU has made of it
        for name in changed:
            changes.mark(changed, name, [SIZE // 3], [1])
    assert_qemu_reads(path)


def test_all_of_it_or_nothing(path: Path) -> None:
    create(path, MIB)
    qemu_img("bitmap", "--add", path, "a")
    before = path.read_bytes()
    with pytest.raises(dm.BitmapError, match="taken"), dm.open(path) as image, image.transaction() as changed:  # noqa: PT012
        changed["a"].mark(0, MIB)
        changes.add(changed, "b")
        changes.add(changed, "a")
    assert path.read_bytes() == before
    with contextlib.suppress(KeyboardInterrupt), dm.open(path) as image, image.transaction() as changed:
        del changed["a"]
        raise KeyboardInterrupt
    assert path.read_bytes() == before


def test_copies_and_merges_across_images(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.qcow2"
    create(path, MIB + 512, "cluster_size=512")
    create(other, MIB + 512, "extended_l2=on,refcount_bits=1,cluster_size=16k")
    qemu_img("bitmap", "--add", "-g", "1024", path, "a")
    qemu_img("bitmap", "--add", "-g", "65536", other, "a")
    qemu_io(path, "write 3k 1", "write 1M 512")
    qemu_io(other, "write 512k 1")
    with dm.open(path) as image, changing(other) as changed:
        changes.merge(changed, "a", [image["a"]])
        changes.put(changed, "b", image["a"])
    maps = assert_qemu_reads(other)
    assert maps["a"] == [(0, 65536), (512 * KIB, 65536), (MIB, 512)]
    assert maps["b"] == [(3 * KIB, KIB), (MIB, 512)]
    assert_qemu_records(other, MIB + 512)


@pytest.mark.parametrize("granularity", [512, 4 * KIB, MIB, 2 * GIB])
@pytest.mark.parametrize("size", [512, 65536, 64 * MIB - 512, 3 * GIB + 512])
def test_sizes_and_granularities(path: Path, size: int, granularity: int) -> None:
    create(path, size, "cluster_size=4k")
    ranges = [(0, 1), (size - 1, 1), (size // 3, size // 4)]
    with changing(path) as changed:
        changed["some"] = dm.Bitmap.from_extents(size, *zip(*ranges, strict=True), granularity)
        changed["none"] = dm.Bitmap(size, granularity, recording=False)
        changed["all"] = dm.Bitmap.from_extents(size, [0], [size], granularity)
    assert assert_qemu_reads(path)["some"] == modelled(size, granularity, ranges)
    assert dirty(path, "all") == [(0, size)]
    assert_qemu_records(path, size)


@pytest.mark.parametrize(
    ("size", "cluster", "granularity"),
    [
        (1 << 44, 64 * KIB, 64 * KIB),  # 32 MiB of bits
        (1 << 61, 2 * MIB, 2 * GIB),  # the largest disk that QEMU makes
        pytest.param(1 << 41, 64 * KIB, 512, marks=pytest.mark.long),  # the most bits that QEMU accepts: 512 MiB
    ],
)
def test_huge_sizes(path: Path, size: int, cluster: int, granularity: int) -> None:
    create(path, size, f"cluster_size={cluster}")
    ranges = [(0, 1), (size // 3, size // 4), (size - 1, 1)]
    with changing(path) as changed:
        changed["b0"] = bitmap = dm.Bitmap.from_extents(size, *zip(*ranges, strict=True), granularity)
    with StorageDaemon(path) as daemon:
        assert daemon.bitmaps()["b0"]["count"] == bitmap.count
        daemon.io("write 1T 64k")
        bitmap.mark(1 << 40, 65536)
        assert daemon.digest("b0") == hashlib.sha256(bitmap.words).hexdigest()
        daemon.quit()
    with dm.open(path) as image:
        assert image["b0"] == bitmap
    check(path)


@pytest.mark.parametrize("size", ["4T", "2E"])
def test_more_bits_than_qemu_accepts(path: Path, size: str) -> None:
    """512 MiB of them are the limit; nobody tries to allocate what is above."""
    create(path, size, "cluster_size=2M")
    before = path.read_bytes()
    with pytest.raises(dm.BitmapError, match="granularity"), dm.open(path) as image, image.transaction() as changed:
        changes.add(changed, "too fine", 512)
    assert path.read_bytes() == before


@pytest.mark.parametrize("granules", [1, 8, 64, 65, 72, 128])
def test_bits_behind_the_disk_are_clean_for_qemu_as_well(path: Path, granules: int) -> None:
    """An all-ones table entry would make QEMU set them, and a disk that grows be dirty where nobody wrote."""
    size = granules * 512
    create(path, size)
    with changing(path) as changed:
        changed["b0"] = dm.Bitmap.from_extents(size, [0], [size], 512)
    with StorageDaemon(path, "read-only=on") as daemon:
        assert daemon.digest("b0") == digest(size, 512, [(0, size)])
        daemon.quit()
    qemu_img("resize", "-q", "-f", "qcow2", path, "1M")
    assert assert_qemu_reads(path) == {"b0": [(0, size)]}


@pytest.mark.parametrize("cluster_bits", [9, 12, 14, 16, 21])
def test_the_default_granularity_is_that_of_qemu(path: Path, cluster_bits: int) -> None:
    create(path, MIB, f"cluster_size={1 << cluster_bits}")
    qemu_img("bitmap", "--add", path, "theirs")
    with changing(path) as changed:
        changes.add(changed, "ours")
    listed = bitmaps(path)
    assert listed["ours"] == listed["theirs"]


def test_an_empty_disk_has_no_room_for_a_bit(path: Path) -> None:
    create(path, 0)
    before = path.read_bytes()
    with pytest.raises(dm.BitmapError, match="empty"), dm.open(path) as image, image.transaction() as changed:
        changes.add(changed, "b0")
    assert path.read_bytes() == before
    qemu_img("resize", "-q", "-f", "qcow2", path, "64k")
    with changing(path) as changed:
        changes.add(changed, "b0")
    assert_qemu_records(path, 65536)


def guest(target: Target, folder: Path) -> list[str]:
    """What a guest reads, now and in each snapshot: SHA-256."""
    found = []
    for number in range(len(qemu_img("snapshot", "-l", *opened(target)).splitlines()[2:]) + 1):
        chosen = ("-l", f"snapshot.id={number}") if number else ()
        qemu_img("convert", *chosen, *opened(target), "-O", "raw", folder / "content.raw")
        found.append(hashlib.sha256((folder / "content.raw").read_bytes()).hexdigest())
    return found


@pytest.mark.parametrize(
    "options",
    [
        *("", "encrypted", "extended_l2=on", "compression_type=zstd", "lazy_refcounts=on", "preallocation=metadata"),
        *("data_file", "data_file_raw", "backing raw", "backing qcow2", "cluster_size=1M", "cluster_size=512"),
    ],
)
def test_kinds_of_images(path: Path, tmp_path: Path, options: str) -> None:
    """Guest data, snapshots and what else an image holds are the same before and after."""
    arguments: list[str] = []
    if options.startswith("data_file"):
        raw = "on" if options == "data_file_raw" else "off"
        options = f"data_file={tmp_path / 'data'},data_file_raw={raw}"
    elif options.startswith("backing"):
        base, kind = tmp_path / "base", options.split()[1]
        qemu_img("create", "-q", "-f", kind, base, "3M")
        qemu_io(base, "write -P 7 2M 100k") if kind == "qcow2" else base.write_bytes(bytes([7]) * MIB)
        options, arguments = "", ["-b", str(base), "-F", kind]
    encrypted = options == "encrypted"
    target = create(path, SIZE, "" if encrypted else options, *arguments, encrypted=encrypted)
    qemu_io(target, "write -P 1 0 300k", "write -P 2 2M 64k", "write -z 1M 512k", "discard 64k 64k")
    if not (options.startswith("data_file") or options.startswith("prealloc") or encrypted):
        qemu_io(target, "write -c -P 3 4M 1M")
    if not (options.startswith("data_file") or encrypted):  # of an encrypted one, `convert` does not find them
        qemu_img("snapshot", "-c", "one", path)
        qemu_io(target, "write -P 4 100k 100k")
    content = guest(target, tmp_path)
    for operation in ("add", "put", "many", "set", "remove all"):
        with changing(target) as changed:
            for name, granularity in (("a", 512), ("b", MIB), ("off", 65536)):
                if name not in changed:
                    changed[name] = dm.Bitmap.from_extents(SIZE, [MIB], [MIB], granularity)
        with changing(target) as changed:
            OPERATIONS[operation](changed)
        report = dm.check(target)
        assert (report.corruptions, report.leaks, report.check_errors) == (0, 0, 0)
    assert guest(target, tmp_path) == content
    with changing(target) as changed:
        changed["last"] = dm.Bitmap.from_extents(SIZE, [MIB], [MIB], 512)
    assert_qemu_records(target, SIZE)


# Header extensions and what else a header holds.


@pytest.mark.parametrize("cluster", [4 * KIB, 64 * KIB])
@pytest.mark.parametrize("gap", [0, 8, 32, 33, 100])
@pytest.mark.parametrize("name", ["b", "backing/" + "n" * 200 + ".qcow2", "x" * 1023])
def test_a_backing_file_name_behind_the_end_marker(path: Path, cluster: int, gap: int, name: str) -> None:
    """Nothing of the backing file is looked at: it does not exist."""
    create(path, MIB, f"cluster_size={cluster}", "-u", "-b", name, "-F", "qcow2")
    header = read_header(path.read_bytes())
    header.extensions.append((0x12345678, b"unknown"))
    write_header(path, header, gap=gap)
    with nothing_else_changes(path, checked=False), dm.open(path) as image, image.transaction() as changed:
        changes.add(changed, "a")
        changes.add(changed, "b", 512)
        changed["b"].mark(5000, 1)
    assert set(bitmaps(path)) == {"a", "b"}
    told = qemu_img("info", "-f", "qcow2", path)
    assert f"backing file: {name}\n" in told or f"backing file: {name} " in told
    with nothing_else_changes(path, checked=False), dm.open(path) as image, image.transaction() as changed:
        changed.clear()
    assert bitmaps(path) == {}
    with nothing_else_changes(path, checked=False), dm.open(path) as image, image.transaction() as changed:
        changes.add(changed, "again")
    qemu_img("rebase", "-u", "-b", "", "-f", "qcow2", path)
    check(path)
    assert_qemu_records(path, MIB)


def test_a_first_cluster_without_room(path: Path) -> None:
    create(path, MIB, "cluster_size=512")
    header = read_header(path.read_bytes())
    fits = 512 - len(header.fields) - 8 - 8  # of its own head, and of the end marker
    for length, accepted in ((fits, False), (fits - 24, False), (fits - 32, True)):
        write_header(path, Header(header.fields, [(0x1234, bytes(length))], b""))
        before = path.read_bytes()
        refused = contextlib.nullcontext() if accepted else pytest.raises(dm.UnsupportedError, match="room")
        with refused, changing(path) as changed:
            changes.add(changed, "b0")
        assert (path.read_bytes() == before) == (not accepted)
    assert_qemu_records(path, MIB)


def test_everything_in_a_header_stays(path: Path, tmp_path: Path) -> None:
    """A long header with fields nobody knows, feature names, unknown extensions, a backing file with a format."""
    base = tmp_path / "base.raw"
    base.write_bytes(b"base" * 65536)
    create(path, MIB, "compression_type=zstd,lazy_refcounts=on,extended_l2=on", "-b", base, "-F", "raw")
    header = read_header(path.read_bytes())
    header.fields += b"unknown fields".ljust(24, b"\0")
    header.extensions.insert(0, (0xDEADBEEF, b"first, of odd length."))
    header.extensions += [(0x1, b""), (0xFFFFFFFF, bytes(range(256)) * 4)]
    write_header(path, header, gap=3)
    qemu_io(path, "write -c 64k 64k", "write 300k 100")
    qemu_img("snapshot", "-c", "a snapshot", path)
    qemu_io(path, "write 310k 100")
    content = guest(path, tmp_path)
    found = read_header(path.read_bytes())
    assert sorted(found.extensions) == sorted(header.extensions)
    assert found.fields.endswith(b"unknown fields".ljust(24, b"\0"))
    for operation in OPERATIONS.values():
        with changing(path) as changed:
            for name, granularity in (("a", 512), ("b", MIB), ("off", 65536)):
                if name not in changed:
                    changes.add(changed, name, granularity)
            changed.pop("new", None)
            changed.pop("copy", None)
        with changing(path) as changed, contextlib.suppress(dm.RangeError):
            operation(changed)
    assert "a snapshot" in qemu_img("snapshot", "-l", path)
    assert guest(path, tmp_path) == content
    assert read_header(path.read_bytes()) == found
    assert found.backing.decode() == str(base)
    assert_qemu_records(path, MIB)


def test_the_order_of_extensions_does_not_matter(path: Path) -> None:
    """QEMU puts bitmaps before unknown extensions; there, removing the last bitmap leaves room in the middle."""
    create(path, MIB)
    qemu_img("bitmap", "--add", path, "b0")
    before = read_header(path.read_bytes())
    with changing(path) as changed:
        del changed["b0"]
    before.extensions += [(0x1234, b"unknown")]
    write_header(path, before)
    qemu_img("bitmap", "--add", path, "b0")  # in front of the unknown one
    for _ in range(3):
        with changing(path) as changed:
            del changed["b0"]
        assert bitmaps(path) == {}
        with changing(path) as changed:
            changes.add(changed, "b0")
        assert_qemu_records(path, MIB)


def test_autoclear_bits(path: Path, tmp_path: Path) -> None:
    """Unknown ones go, since what they stand for may be stale now; "raw external data" stays."""
    data = tmp_path / "disk.raw"
    create(path, MIB, f"data_file={data},data_file_raw=on")
    qemu_img("bitmap", "--add", path, "b0")
    patch(path, 88, struct.pack(">Q", 1 << 61 | 3))
    with changing(path) as changed:
        changes.mark(changed, "b0", [0], [1])
    assert path.read_bytes()[88:96] == struct.pack(">Q", 3)
    assert_qemu_records(path, MIB)
    with changing(path) as changed:
        changes.remove(changed, "b0")
    assert path.read_bytes()[88:96] == struct.pack(">Q", 2)


@pytest.mark.parametrize(("bit", "name"), [(0, "dirty"), (1, "corrupt")])
def test_images_marked_dirty_or_corrupt_are_not_written(path: Path, bit: int, name: str) -> None:
    create(path, MIB, "lazy_refcounts=on")
    qemu_img("bitmap", "--add", path, "b0")
    patch(path, 72, struct.pack(">Q", 1 << bit))
    before = path.read_bytes()
    with pytest.raises(dm.UnsupportedError, match=name), dm.open(path) as image, image.transaction() as changed:
        changes.clear(changed, "b0")
    assert path.read_bytes() == before
    with dm.open(path) as image:
        assert extents(image["b0"]) == []


# Where the new clusters come from.


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("cluster", [512, 4 * KIB])
def test_widths_of_refcounts(path: Path, bits: int, cluster: int) -> None:
    """With 64 bits and 512 bytes a refcount block counts 64 clusters, so each bitmap needs a few new ones."""
    size = 8 * MIB
    create(path, size, f"cluster_size={cluster},refcount_bits={bits}")
    qemu_io(path, "write 1M 200k")
    with changing(path) as changed:
        for number in range(3):
            changed[f"b{number}"] = _scattered(size, cluster, number)
    assert_qemu_reads(path)
    with changing(path) as changed:
        del changed["b0"]
        changed["b1"].mark(0, MIB)
        changed["b3"] = changed["b2"]
    assert_qemu_records(path, size)


def _scattered(size: int, cluster: int, shift: int = 0) -> dm.Bitmap:
    """At a granularity of 512 bytes, with one dirty granule for each cluster of bits, so that each must be stored."""
    offsets = range(shift * 512, size, cluster * 8 * 512)
    return dm.Bitmap.from_extents(size, offsets, [1] * len(offsets), 512)


@pytest.mark.parametrize("bits", [1, 16, 64])
def test_the_refcount_table_grows(path: Path, bits: int) -> None:
    """A table of one cluster of 512 bytes has 64 entries; with 64-bit counts it covers 64 * 64 clusters, 2 MiB."""
    size = 2 << 30
    create(path, size, f"cluster_size=512,refcount_bits={bits}")
    for number in range(3 if bits == 64 else 1):
        with changing(path) as changed:
            changed[f"b{number}"] = _scattered(size, 512)  # 512 KiB of bits, all stored
    (clusters,) = struct.unpack_from(">I", path.read_bytes(), 56)
    assert clusters > 1 or bits != 64
    with StorageDaemon(path) as daemon:
        for name in daemon.bitmaps():
            assert daemon.digest(name) == hashlib.sha256(_scattered(size, 512).words).hexdigest()
    with nothing_else_changes(path), dm.open(path) as image, image.transaction() as changed:
        changed.clear()
    qemu_io(path, "write 0 1M")
    check(path)


def test_without_a_free_cluster_at_the_end(path: Path, tmp_path: Path) -> None:
    """The file ends at every distance from the end of what its last refcount block counts, 64 clusters."""
    create(path, 4 * MIB, "cluster_size=512,refcount_bits=64")
    left = set()
    for number in range(70):
        qemu_io(path, f"write {number * 512 + MIB} 512")
        copy = tmp_path / "copy.qcow2"
        copy.write_bytes(path.read_bytes())
        left.add(-path.stat().st_size // 512 % 64)
        with changing(copy) as changed:
            changed["b0"] = _scattered(4 * MIB, 512, 9)
    assert left >= set(range(60))
    assert_qemu_records(copy, 4 * MIB)


def test_room_is_used_again(path: Path) -> None:
    """What a removed bitmap had is free, and taken by the next, so the file does not grow for ever."""
    create(path, 512 * MIB, "cluster_size=4k")
    sizes = set()
    for number in range(12):
        with changing(path) as changed:
            changed["b0"] = _scattered(512 * MIB, 4 * KIB, number)
        sizes.add(path.stat().st_size)
    assert len(sizes) < 5
    assert_qemu_records(path, 512 * MIB)


def test_unchanged_clusters_stay_where_they_are(path: Path) -> None:
    """Marking one granule of a large bitmap writes little of it."""
    create(path, 1 << 30, "cluster_size=512")
    with changing(path) as changed:
        changed["b0"] = _scattered(1 << 30, 512)
    before = path.stat().st_size
    with changing(path) as changed:
        changed["b0"].mark(512, 1)
    assert path.stat().st_size - before < 20_000
    assert_qemu_records(path, 1 << 30)


def test_2000_bitmaps_in_one_transaction(path: Path) -> None:
    _fill(path, 2000)
    check(path)
    listed = bitmaps(path)
    assert listed == {f"b{number}": (512, {"auto"} if number % 2 else set()) for number in range(2000)}
    for number in (0, 1000, 1999):
        assert dirty(path, f"b{number}") == [(number * 512 % MIB, 512)]
    with changing(path) as changed:
        for number in range(0, 2000, 2):
            del changed[f"b{number}"]
    assert list(bitmaps(path)) == [f"b{number}" for number in range(1, 2000, 2)]


@pytest.mark.long
def test_65535_bitmaps_and_not_one_more(path: Path) -> None:
    """QEMU needs minutes for so many, since it looks each name up in a list; 8000 of them are enough for it."""
    _fill(path, 65535)
    assert not dm.check(path).findings
    with dm.open(path) as image, pytest.raises(dm.BitmapError, match="65535"), image.transaction() as changed:
        changes.add(changed, "one more")
    with dm.open(path) as image, image.transaction() as changed:
        for name in list(changed)[8000:]:
            del changed[name]
    check(path)


def _fill(path: Path, count: int) -> None:
    create(path, MIB, "cluster_size=4k")
    with dm.open(path) as image, image.transaction() as changed:
        for number in range(count):
            bitmap = dm.Bitmap(MIB, 512, recording=bool(number % 2))
            bitmap.mark(number * 512 % MIB, 1)
            changed[f"b{number}"] = bitmap


# Bitmaps that QEMU left behind, and images it no longer opens.


def _killed(target: Target) -> None:
    """Leaves ``a`` (with bits of before) and ``b`` in use."""
    qemu_img("bitmap", "--add", target, "a")
    qemu_img("bitmap", "--add", "--disable", "-g", "512", target, "b")
    qemu_io(target, "write 64k 64k")
    with StorageDaemon(target) as daemon:
        daemon.io("write 256k 4k")
        daemon.kill()


def test_recover_after_sigkill(path: Path) -> None:
    create(path, SIZE)
    _killed(path)
    with dm.open(path) as image:
        assert all(info.inconsistent and info.count is None for info in image.info().bitmaps)
        assert image["a"].inconsistent
        with pytest.raises(dm.BitmapError, match="inconsistent"):
            image["a"].extents()
    with changing(path) as changed:  # other bitmaps may still be changed
        changes.add(changed, "new")
    assert {name: flags for name, (_, flags) in bitmaps(path).items()} == {
        "a": {"in-use", "auto"},
        "b": {"in-use"},
        "new": {"auto"},
    }
    with nothing_else_changes(path):
        assert [item.name for item in dm.recover(path, ["a"])] == ["a"]
    assert dirty(path, "a") == [(0, SIZE)]
    with nothing_else_changes(path):
        assert [item.name for item in dm.recover(path)] == ["b"]
    assert assert_qemu_reads(path) == {"a": [(0, SIZE)], "b": [(0, SIZE)], "new": []}
    with changing(path) as changed:
        changes.clear(changed, "a")
    assert_qemu_records(path, SIZE)


@pytest.mark.parametrize("operation", ["clear", "merge", "rename", "mark", "enable", "put"])
def test_inconsistent_bitmaps_are_refused(path: Path, operation: str) -> None:
    create(path, MIB)
    _killed(path)
    before = path.read_bytes()
    attempts: dict[str, Callable[[dm.Transaction], object]] = {
        "clear": lambda changed: changes.clear(changed, "a"),
        "merge": lambda changed: changes.merge(changed, "b", [changed["a"]]),
        "rename": lambda changed: changes.rename(changed, "a", "c"),
        "mark": lambda changed: changes.mark(changed, "a", [0], [1]),
        "enable": lambda changed: changes.set_recording(changed, "b", True),
        "put": lambda changed: changes.put(changed, "c", changed["a"]),
    }
    with pytest.raises(dm.BitmapError, match="inconsistent"), dm.open(path) as image, image.transaction() as changed:
        attempts[operation](changed)
    assert path.read_bytes() == before


def test_inconsistent_bitmaps_can_be_removed(path: Path) -> None:
    create(path, MIB)
    _killed(path)
    with changing(path) as changed:
        changes.remove(changed, "a")
        changes.remove(changed, "b")
        changes.add(changed, "a", 4096)
    assert_qemu_records(path, MIB)


def test_bitmap_of_before_a_resize_left_in_use(path: Path) -> None:
    """The table of a bitmap in use may be of another length than the disk needs now."""
    create(path, 2 * MIB, "cluster_size=512")
    qemu_img("bitmap", "--add", "-g", "512", path, "a")
    qemu_io(path, "write 0 1M")
    qemu_io(path, "truncate 8M", "write 6M 1k", "flush", "sigraise 9", status=-9)
    with dm.open(path) as image:
        assert image.size == 8 * MIB
        assert image["a"].inconsistent
    assert dm.recover(path)
    dm.check(path, repair="leaks")
    assert assert_qemu_reads(path) == {"a": [(0, 8 * MIB)]}
    with changing(path) as changed:
        changes.clear(changed, "a")
    assert_qemu_records(path, 8 * MIB)


@pytest.mark.parametrize("entry", [0, 1, 2])
@pytest.mark.parametrize(
    ("field", "value"),
    [(8, b"\0\0\0\x09"), (12, b"\0\0\0\x04"), (12, b"\x80\0\0\0"), (16, b"\x02"), (17, b"\x40"), (0, b"\xff" * 8)],
    ids=["table size", "flag 2", "flag 31", "type", "granularity", "table offset"],
)
def test_one_bad_bitmap_is_dropped_and_the_others_kept(path: Path, entry: int, field: int, value: bytes) -> None:
    create(path, MIB)
    with changing(path) as changed:
        for number in range(3):
            changed[f"bitmap{number}"] = dm.Bitmap.from_extents(MIB, [number * 4096], [1], 4096)
    image = path.read_bytes()
    # Three entries of 24 + 7 bytes, padded to 32.
    patch(path, image.index(b"bitmap0") - 24 + entry * 32 + field, value)
    qemu_img("info", path, status=1)
    report = dm.check(path)
    assert report.corruptions
    assert report.dropped == []
    with pytest.raises(dm.FormatError, match=f"bitmap{entry}"):
        dm.open(path)
    mended = dm.check(path, repair="all")
    assert mended.dropped == [f"bitmap{entry}"]
    assert (mended.corruptions, mended.leaks) == (0, 0)
    check(path)
    assert assert_qemu_reads(path) == {f"bitmap{n}": [(n * 4096, 4096)] for n in range(3) if n != entry}
    assert_qemu_records(path, MIB)


def test_recovery_beside_a_bad_bitmap(path: Path) -> None:
    """The bad one stays as it was found, unknown flag and all; QEMU refuses the image until it is dropped."""
    create(path, SIZE)
    _killed(path)
    with changing(path) as changed:
        changes.add(changed, "bad name")
    image = path.read_bytes()
    patch(path, image.index(b"bad name") - 24 + 12, b"\0\0\0\x84")
    bad = path.read_bytes()[image.index(b"bad name") - 24 :][:32]
    with nothing_else_changes(path, checked=False):
        assert [item.name for item in dm.recover(path, ["a"])] == ["a"]
    assert bad in path.read_bytes()
    with pytest.raises(dm.FormatError, match="bad name"):
        dm.open(path)
    qemu_img("info", path, status=1)
    assert dm.check(path, repair="all").dropped == ["bad name"]
    check(path)
    assert dirty(path, "a") == [(0, SIZE)]


def test_leaks_of_an_interrupted_snapshot(path: Path) -> None:
    """Counts that are too high for guest data go with a flag in an L2 entry; lowered alone, QEMU would complain."""
    create(path, SIZE)
    qemu_img("bitmap", "--add", path, "a")
    qemu_io(path, "write 0 200k")
    qemu_img("snapshot", "-c", "lost", path)
    patch(path, 60, bytes(12))  # the snapshot table: how many, where
    for repair in ("leaks", "all"):
        with nothing_else_changes(path, checked=False):
            assert dm.check(path, repair=repair).corruptions == 0
        qemu_img("check", "-f", "qcow2", path, status=3)
    qemu_img("check", "-r", "leaks", "-f", "qcow2", path)
    assert_qemu_records(path, SIZE)


def test_leaks_of_a_killed_session_are_reclaimed(path: Path) -> None:
    """Bitmaps whose directory entry is lost leak their clusters; so do void ones."""
    create(path, 8 * MIB, "cluster_size=512,refcount_bits=4")
    with changing(path) as changed:
        changed["b0"] = _scattered(8 * MIB, 512)
        changed["b1"] = _scattered(8 * MIB, 512, 5)
    patch(path, 88, bytes(8))
    with changing_unclean(path) as changed:
        changes.add(changed, "new")
    leaks = dm.check(path).leaks
    qemu_img("check", "-f", "qcow2", path, status=3)
    mended = dm.check(path, repair="leaks")
    assert (mended.leaks_fixed, mended.leaks) == (leaks, 0)
    check(path)
    assert_qemu_records(path, 8 * MIB)


@contextlib.contextmanager
def changing_unclean(target: Target) -> Iterator[dm.Transaction]:
    """A transaction of an image that has leaks before and after."""
    with nothing_else_changes(target, checked=False), dm.open(target) as image, image.transaction() as changed:
        yield changed
