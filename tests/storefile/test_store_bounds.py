"""What a small store can claim to hold: bounds of time and memory."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import crc32c
import pytest
from support.damage import SIZE
from support.hostless import stored
from support.large import Disks, run_measured

import dirtmap.engine as dm
from dirtmap.engine.host.kind import Address
from dirtmap.engine.namespaces.nodes import add_node
from dirtmap.engine.storefile import few
from dirtmap.engine.storefile import header as headers
from dirtmap.engine.storefile.directory import place_directory, read_entries, replace_directory
from dirtmap.engine.storefile.entries import identified, tree_of, with_root
from dirtmap.engine.storefile.file import Snapshot, Store, create
from dirtmap.engine.system.file import File
from dirtmap.fmt import directory, store
from dirtmap.fmt.directory import build_directory
from dirtmap.fmt.extensions import build_extension
from dirtmap.fmt.parsers.store import LEAF, POINTER
from dirtmap.fmt.store import Area, Record

SECONDS, MEBIBYTES = 2 * 2.0, 256  # as in test_hostile_bounds


@pytest.mark.parametrize(("pattern", "leaks"), [(0xFF, (1 << 24) - 4), (0x55, (1 << 23) - 4)])
def test_millions_of_leaks_are_counted_and_a_thousand_runs_shown(tmp_path: Path, pattern: int, leaks: int) -> None:
    """In clusters of 2 MiB a leaf has 16 million marks."""
    path = str(tmp_path / "s.dmap")
    create(path, cluster_bits=21)
    size = 1 << 21
    leaf = bytes([pattern | 0xF]) + bytes([pattern]) * (size - 1)
    with open(path, "r+b") as file:
        chosen = headers.choose(path, file.read(store.RESERVED))
        place = LEAF.parse(os.pread(file.fileno(), LEAF.size, chosen.header.space.offset)).offset
        os.pwrite(file.fileno(), leaf, place)
        free = store.leaf_clusters(size) - int.from_bytes(leaf, "little").bit_count()
        root = LEAF.build(offset=place, free=free, checksum=crc32c.crc32c(leaf))
        os.pwrite(file.fileno(), root, chosen.header.space.offset)
        space = chosen.header.space._replace(checksum=crc32c.crc32c(root))
        header = replace(chosen.header, clusters=8 * size, space=space)
        for number, block in headers.pair(header, chosen.slot, followed=False):
            os.pwrite(file.fileno(), block, number * store.BLOCK)
    said, seconds, mebibytes = run_measured("check", path)
    *shown, total = said.splitlines()
    found = int(total.split(": ")[1].split()[0])
    assert abs(found - leaks) < 4, total
    assert len(shown) == (16 if pattern == 0xFF else 1000)
    assert seconds < SECONDS
    assert mebibytes < MEBIBYTES


@pytest.mark.parametrize("how", ["same", "nested", "own"])
def test_a_directory_that_two_namespaces_have_is_that_of_one(tmp_path: Path, how: str) -> None:
    """Else a store of 2 MiB could claim 65,536 times as many bitmaps as it has. Whichever is read first."""
    path, count, cluster = str(tmp_path / "s.dmap"), 64, 4096
    create(path)
    with Store(path) as target, target.change() as change:
        room = cluster - store.OWNER_SIZE  # for two entries
        filling = build_extension(0x46494C4C, bytes(room // 2 - 24 - 1000 - 8))
        packed = build_directory(
            directory.Entry(b"%01000d" % number, store.ALL_ONES, 0, 2, 16, extra_data=filling)
            for number in range(2 * count)
        )
        assert len(packed) == count * room
        data = bytearray(store.with_owner(packed, b"0", cluster))
        if how == "own":  # each has the first cluster of what it leads to
            for number in range(count):
                data[number * cluster : number * cluster + store.OWNER_SIZE] = store.directory_owner(b"%d" % number)
        place = change.place(bytes(data))
        for number in range(count):
            start = 0 if how == "same" else cluster * number
            area = Area(place.offset + start, len(data) - start, crc32c.crc32c(bytes(data[start:])))
            node = Record(b"%d" % number, store.KIND_DEVICE, os.urandom(16), SIZE, 1, area, area.length // cluster * 2)
            change.table.put(node)
    rightful, has = (count - 1, 2) if how == "own" else (0, 2 * count)
    info = dm.describe(path)
    assert len(info.errors) == count - 1
    assert all(re.search(r"directory of device '\d+' at 0x\w+: it, or a part of it, is the", it) for it in info.errors)
    assert len(info.bitmaps) == has
    findings = dm.check(path).findings
    refused = {it.where for it in findings if "is the directory of another namespace" in it.what}
    overlaps = {it.where for it in findings if "overlaps directory of device" in it.what}
    assert (len(refused), len(overlaps)) == (count - 1, count - 1)
    for number in range(count):  # each by itself
        with dm.open(Address(path, str(number))) as image:
            if number == rightful:
                assert len(image) == has
            else:
                with pytest.raises(dm.FormatError, match="directory of another namespace"):
                    len(image)
    with dm.open(Address(path, "1")) as image, pytest.raises(dm.FormatError, match="none of its bitmaps can be named"):
        image.recover()
    assert dm.check(path, repair="all").corruptions == 0
    info = dm.describe(path)
    assert info.errors == ()
    assert {bitmap.device for bitmap in info.bitmaps} == {str(rightful)}


def test_bits_that_many_bitmaps_share_are_read_for_few_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a store of 2 MiB could have a reader verify 20,000 times as many clusters as it has."""
    path, disk, many = str(tmp_path / "s.dmap"), tmp_path / "a.raw", 200
    disk.touch()
    os.truncate(disk, 4 << 30)
    create(path)
    with Store(path) as target:
        add_node(target, "a", str(disk))
        with stored(target, "a").transaction() as bitmaps:
            bitmaps["0"] = dm.Bitmap.from_extents(4 << 30, range(0, 4 << 30, 1 << 26), [1] * 64, 512)
        with target.change() as change:
            record = change.table.get(b"a")
            assert record
            (entry,) = read_entries(change.snapshot, record)
            shared = [identified(replace(entry, name=b"%d" % number), 1, new=True) for number in range(many)]
            place = replace_directory(change, record, [entry], shared)
            change.table.put(replace(record, directory=place, nb_bitmaps=many, generation=change.generation))
    reads = 0
    read_into = File.read_into

    def counted(file: File, offset: int, buffer: memoryview) -> None:
        nonlocal reads
        reads += len(buffer) // 4096
        read_into(file, offset, buffer)

    monkeypatch.setattr(File, "read_into", counted)
    clusters = os.path.getsize(path) // 4096
    info = dm.describe(path)
    assert reads <= clusters
    assert info.bitmaps[0].count == 64 * 512
    assert info.bitmaps[-1].count == 4 << 30
    assert "bits are damaged" in info.notes[-1]
    reads = 0
    assert dm.check(path).corruptions > many // 2
    assert reads <= 2 * clusters, "it looks a second time for the names of what overlaps"
    # Whoever asks for one of them alone is told what it has, and a repair parts them.
    with dm.open(Address(path, "a")) as image:
        assert image["199"].count == 64 * 512
    assert dm.check(path, repair="all").corruptions == 0
    assert dm.describe(path).notes == ()


@pytest.mark.parametrize("kind", ["one node", "holes"])
def test_a_sparse_store_has_no_more_nodes_than_it_holds(tmp_path: Path, kind: str) -> None:
    """Pointers to one and the same node, or each to another hole, of which a file of a few KiB can have any number."""
    cluster = 4096 if kind == "one node" else 65536
    disks, fan = Disks(tmp_path, cluster.bit_length() - 1), cluster // store.POINTER_SIZE
    levels = 3 if kind == "one node" else 2
    size = fan**levels * cluster * 8 * 65536
    disks.add("a", size)
    with Store(disks.path) as target, target.change() as change:
        record = change.table.get(b"a")
        assert record
        if kind == "one node":  # of chunks that are clean and dirty in turn; 65,536 times
            root = change.place((bytes(store.POINTER_SIZE) + POINTER.pack(store.ALL_ONES, 0, 0)) * (fan // 2))
            for _ in range(2, levels + 1):
                root = change.place(POINTER.pack(root.offset, root.checksum, 0) * fan)
        else:
            sum_, start = crc32c.crc32c(bytes(cluster)), 64 * cluster
            root = change.place(b"".join(POINTER.pack(start + at * cluster, sum_, 0) for at in range(fan)))
        entry = with_root(directory.Entry(b"b", store.ALL_ZEROS, 0, 2, 16), root.offset, root.checksum, fan**levels)
        place = place_directory(change, b"a", [identified(entry, 1, new=True)])
        change.take((512 << 20) // cluster)
        change.table.put(replace(record, directory=place, nb_bitmaps=1, generation=change.generation))
    os.truncate(disks.path, 600 << 20)
    assert os.stat(disks.path).st_blocks * 512 < 1 << 20
    program = "import dirtmap.engine as dm; print(dm.describe(sys.argv[1]).notes)"
    said, seconds, mebibytes = run_measured(disks.path, program=program)
    assert ("bits are damaged" in said) == (kind == "one node"), said
    assert seconds < SECONDS
    assert mebibytes < MEBIBYTES
    run_measured("check", "--repair", "all", disks.path)
    with dm.open(Address(disks.path, "a")) as image:
        once = fan // 2 * cluster * 8  # granules of the node where it is first
        dirty = (fan**levels - fan) * cluster * 8 + once if kind == "one node" else 0
        assert image["b"].count == dirty * 65536


def test_a_chunk_that_two_pointers_lead_to_is_that_of_the_first(tmp_path: Path) -> None:
    """For whoever maps so few clusters without numpy, too."""
    disks, cluster = Disks(tmp_path), 4096
    disks.add("a", 2 * cluster * 8 * 65536)
    with Store(disks.path) as target, target.change() as change:
        record = change.table.get(b"a")
        assert record
        chunk = change.place(b"\1" + bytes(cluster - 1))
        root = change.place((POINTER.pack(chunk.offset, chunk.checksum, 0) * 2).ljust(cluster, b"\0"))
        entry = with_root(directory.Entry(b"b", store.ALL_ZEROS, 0, 2, 16), root.offset, root.checksum, 2)
        place = place_directory(change, b"a", [identified(entry, 1, new=True)])
        change.table.put(replace(record, directory=place, nb_bitmaps=1, generation=change.generation))
    (bitmap,) = dm.describe(disks.path).bitmaps
    assert bitmap.count == (1 + cluster * 8) * 65536
    with dm.open(Address(disks.path, "a")) as image:
        found = [column.tolist() for column in image["b"].extents()]
        assert found == [[0, cluster * 8 * 65536], [65536, cluster * 8 * 65536]]
    assert few_load(disks.path) is None


def few_load(path: str) -> object:
    """What `few.load` says of the only bitmap."""
    with Store(path) as target:

        def load(snapshot: Snapshot) -> object:
            record = snapshot.table().get(b"a")
            assert record
            (entry,) = read_entries(snapshot, record)
            return few.load(snapshot, tree_of(record, entry))

        return target.read(load)


def test_recovery_of_the_largest_directory_keeps_little_of_it(tmp_path: Path) -> None:
    """66 MiB of names. They are in memory as found, as written and as told; not the damaged directory, too."""
    path = str(tmp_path / "s.dmap")
    (tmp_path / "a.raw").write_bytes(bytes(512))
    create(path)
    with Store(path) as target:
        add_node(target, "a", str(tmp_path / "a.raw"))
        entry = directory.Entry(b"n" * directory.MAX_NAME_SIZE, store.ALL_ONES, 0, 2, 16)
        names = (b"%05d" % number + entry.name[5:] for number in range(directory.MAX_BITMAPS))
        with target.change() as change:
            record = change.table.get(b"a")
            assert record
            place = place_directory(change, b"a", [replace(entry, name=name) for name in names])
            change.table.put(replace(record, directory=place, nb_bitmaps=directory.MAX_BITMAPS))
    with open(path, "r+b") as file:
        file.seek(place.offset + place.length - 100)
        file.write(b"?")
    said, _, mebibytes = run_measured("recover", "--index", tmp_path / "index", "--store", path, "a")
    assert len(said.splitlines()) == directory.MAX_BITMAPS, said[:1000]
    assert mebibytes < 300
