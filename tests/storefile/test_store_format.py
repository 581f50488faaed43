"""What a store is made of: its space map, and the whole file as the format says."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.store_crash import contents

import dirtmap.engine as dm
from dirtmap.engine.host.kind import Address
from dirtmap.engine.identity import identity_of
from dirtmap.engine.namespaces.nodes import add_node
from dirtmap.engine.storefile.file import Store, create
from dirtmap.engine.storefile.space import SpaceMap
from dirtmap.fmt import directory, geometry, store
from dirtmap.fmt.directory import parse_entries
from dirtmap.fmt.errors import FormatError
from dirtmap.fmt.parsers.store import LEAF
from dirtmap.fmt.store import Area, Record

# The space map


class SpaceModel:
    """Commits of a space map in memory, each held against what neither header slot may refer to."""

    def __init__(self, cluster_size: int) -> None:
        self.cluster = cluster_size
        self.file: dict[int, bytes] = {}
        first = geometry.ceil_div(store.RESERVED, cluster_size)
        used = first + 2
        leaf = ((1 << used) - 1).to_bytes(cluster_size, "little")
        root = LEAF.build(offset=first * cluster_size, free=cluster_size * 8 - used, checksum=crc32c.crc32c(leaf))
        self.file = {first * cluster_size: leaf, (first + 1) * cluster_size: root}
        self.reserved = set(range(first))
        self.clusters = used
        self.root = Area((first + 1) * cluster_size, len(root), crc32c.crc32c(root))
        self.released = Area()
        self.held: dict[int, Area] = {}  # what users of the map have
        self.keys = itertools.count(1)
        self.used = self._used()
        self.older: set[int] = set()  # clusters that the commit before the last one used

    def read(self, area: Area, what: str) -> bytes:
        data = self.file[area.offset] if area.length else b""
        assert crc32c.crc32c(data) == area.checksum
        return data

    def _map(self) -> SpaceMap:
        values = directory.parse_table(self.read(self.released, ""))
        runs = list(zip(values[::2], values[1::2], strict=True))
        return SpaceMap("s", self.cluster, self.clusters, self.read(self.root, ""), runs, self.read)

    def _used(self) -> set[int]:
        space = self._map()
        own = [self.root, self.released, *space.places, *self.held.values()]
        return self.reserved.union(*(area.clusters(self.cluster) for area in own))

    def commit(self, takes: list[int], gives: list[int]) -> None:
        space = self._map()
        untouchable = self.used | self.older
        for key in gives:
            if key in self.held:
                space.release(self.held.pop(key))
        taken: list[int] = []
        for count in takes:
            first = space.take(count)
            taken += range(first, first + count)
            self.held[next(self.keys)] = Area(first * self.cluster, count * self.cluster)
        root, released, writes = space.seal(self.root, self.released)
        for offset, data in writes:
            taken += range(offset // self.cluster, geometry.ceil_div(offset + len(data), self.cluster))
        assert len(taken) == len(set(taken)), "a cluster was taken twice"
        assert not untouchable & set(taken), "a commit wrote where a header slot still leads to"
        self.file.update((offset, bytes(data)) for offset, data in writes)
        self.older, (self.root, self.released, self.clusters) = self.used, (root, released, space.clusters)
        self.used = self._used()
        self.verify()

    def verify(self) -> None:
        space = self._map()
        values = directory.parse_table(self.read(self.released, ""))
        released = set().union(*(range(f, f + n) for f, n in zip(values[::2], values[1::2], strict=True)))
        assert released >= self.older - self.used, "what this commit stopped using is not listed"
        assert not released & self.used
        leaves = b"".join(space.leaf(index).to_bytes(4096, "little") for index in range(len(space.places)))
        marked = np.flatnonzero(np.unpackbits(np.frombuffer(leaves, np.uint8), bitorder="little"))
        assert set(marked.tolist()) == self.used | released
        assert max(self.used) < self.clusters


@given(
    st.lists(st.tuples(st.lists(st.integers(1, 9), max_size=6), st.lists(st.integers(1, 40), max_size=8)), max_size=30)
)
@settings(max_examples=150)
def test_cluster_is_reused_only_when_neither_slot_leads_to_it(commits: list[tuple[list[int], list[int]]]) -> None:
    model = SpaceModel(4096)
    for takes, gives in commits:
        model.commit(takes, gives)


@pytest.mark.parametrize("count", [1, 5000, 4 * 8 * 4096 + 7])
def test_space_given_up_is_taken_again_however_large(count: int) -> None:
    model = SpaceModel(4096)
    model.commit([8000] * 17, [])
    # Every other cluster of the first four leaves is given up: much room, and no two clusters of it adjacent.
    for area in list(model.held.values()):
        for cluster in area.clusters(4096):
            model.held[next(model.keys)] = Area(cluster * 4096, 4096)
    for key in range(1, 18):
        del model.held[key]
    model.commit([], list(model.held)[::2])
    sizes, last = [], None
    for _ in range(9):
        model.commit([count], [last] if last else [])
        last = max(model.held)
        sizes.append(model.clusters)
    assert sizes[4] == sizes[-1], "replacing an area makes the file longer only until the first place is free again"


@pytest.mark.parametrize("wrong", ["free", "headers", "leaves", "shared"])
def test_space_map_that_contradicts_itself_is_refused(wrong: str) -> None:
    model = SpaceModel(4096)
    leaf = bytearray(model.file[0x4000])
    leaf[0] &= 0xF0 if wrong == "headers" else 0xFF
    free = 4096 * 8 - sum(map(int.bit_count, leaf)) + (wrong == "free")
    root = LEAF.build(offset=0x4000, free=free, checksum=crc32c.crc32c(leaf)) * (1 + (wrong == "shared"))
    model.file[0x4000] = bytes(leaf)
    clusters = 4096 * 8 + 1 if wrong in ("leaves", "shared") else model.clusters
    with pytest.raises(FormatError, match="s: space map"):
        SpaceMap("s", 4096, clusters, root, [], model.read).leaf(0)


# The whole file


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    """An empty store, and a disk of a million bytes beside it that is its node ``disk``."""
    where = str(tmp_path / "s.dmap")
    create(where)
    with open(tmp_path / "disk.raw", "wb") as disk:
        disk.truncate(1_000_000)
    with Store(where) as target:
        add_node(target, "disk", str(tmp_path / "disk.raw"))
    yield where
    assert not dm.check(where).findings


@given(seed=st.integers(0, 2**32), granularity=st.sampled_from([512, 4096, 65536]))
@settings(max_examples=25)
def test_bits_lie_as_the_format_says(seed: int, granularity: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    tmp_path = tmp_path_factory.mktemp("bits")
    where = str(tmp_path / "s.dmap")
    size = random.Random(seed).randrange(0, 40_000_000)
    (tmp_path / "disk").write_bytes(b"")
    os.truncate(tmp_path / "disk", size)
    create(where)
    with Store(where) as target:
        add_node(target, "disk", str(tmp_path / "disk"))
    count = geometry.granules(size, granularity)
    dirty = np.random.default_rng(seed).random(count) < random.Random(seed).choice([0, 0.1, 0.9, 1])
    offsets = np.flatnonzero(dirty) * granularity
    lengths = np.minimum(granularity, size - offsets)
    with dm.open(Address(where, "disk")) as image, image.transaction() as bitmaps:
        bitmaps["b"] = dm.Bitmap.from_extents(size, offsets, lengths, granularity)
    with Store(where) as target:
        record = target.read(lambda snapshot: snapshot.table().get(b"disk"))
        area = record.directory
    raw = Path(where).read_bytes()
    ((_, entry),) = parse_entries(raw[area.offset + store.OWNER_SIZE : area.offset + area.length])
    expected = np.packbits(dirty, bitorder="little").tobytes()
    if not dirty.any() or dirty.all():
        assert entry.table_offset == (store.ALL_ONES if count and dirty.all() else store.ALL_ZEROS)
        assert entry.table_size == 0
    else:
        assert entry.table_offset % 4096 == 0
        assert entry.table_size == geometry.ceil_div(len(expected), 4096)
        assert contents(raw)[b"disk"].bitmaps[0].bits == expected
    assert entry.granularity == granularity


@pytest.mark.parametrize("why", ["all was verified", "a checksum was wrong", "live files were read"])
@pytest.mark.parametrize(("moved", "asked"), [(0, 1), (1, 1), (2, 2)])
def test_answer_counts_unless_the_store_moved_on_by_two(path: str, moved: int, asked: int, why: str) -> None:
    calls = []
    if why == "all was verified":
        asked = 1

    def read(snapshot: Any) -> int:
        calls.append(snapshot.header.generation)
        if why == "live files were read":
            snapshot.watched[b"disk"] = snapshot.record(b"disk")
        if len(calls) == 1:
            snapshot.doubted = why == "a checksum was wrong"
            for number in range(moved):
                with dm.open(Address(path, "disk")) as image, image.transaction() as bitmaps:
                    bitmaps[f"b{number}"] = dm.Bitmap(image.size)
        return len(calls)

    with Store(path) as target:
        assert target.read(read) == asked
    assert calls == [calls[0], calls[0] + moved][:asked]


def test_failed_checksum_counts_only_if_the_store_stood_still(path: str) -> None:
    calls = []

    def read(snapshot: Any) -> str:
        calls.append(None)
        if len(calls) == 1:
            with dm.open(Address(path, "disk")) as image, image.transaction() as bitmaps:
                bitmaps["b"] = dm.Bitmap(image.size)
            raise FormatError(path, "made up")
        return "read"

    with Store(path) as target:
        assert target.read(read) == "read"
        with pytest.raises(FormatError, match="made up"):
            target.read(lambda snapshot: (_ for _ in ()).throw(FormatError(path, "made up")))


def test_bits_taken_over_from_another_namespace_are_copied(path: str, tmp_path: Path) -> None:
    (tmp_path / "twin.raw").write_bytes(bytes(1_000_000))
    with Store(path) as target:
        add_node(target, "twin", str(tmp_path / "twin.raw"))
    with dm.open(Address(path, "disk")) as disk, dm.open(Address(path, "twin")) as twin:
        with disk.transaction() as bitmaps:
            bitmaps["b"] = dm.Bitmap.from_extents(1_000_000, [0], [70_000], 4096)
        with twin.transaction() as bitmaps:
            bitmaps["b"] = disk["b"]
        with disk.transaction() as bitmaps:
            del bitmaps["b"]
        for number in range(4):
            with disk.transaction() as bitmaps:
                bitmaps[f"{number}"] = dm.Bitmap.from_extents(1_000_000, [0], [1], 512)
        assert twin["b"].count == 18 * 4096


def test_image_from_before_1970_can_be_a_node(path: str, tmp_path: Path) -> None:
    (tmp_path / "old.raw").write_bytes(b"x")
    os.utime(tmp_path / "old.raw", ns=(-1, -1))
    with Store(path) as target:
        add_node(target, "old", str(tmp_path / "old.raw"))
    with dm.open(Address(path, "old")) as image:
        with image.transaction() as bitmaps:
            bitmaps["b"] = dm.Bitmap(1)
        assert image["b"].count == 0


def test_granularity_too_fine_for_the_disk_is_refused_without_making_the_bits(path: str, tmp_path: Path) -> None:
    size = 1 << 60
    with Store(path) as target, target.change() as change:  # a device, or there would have to be a file of that size
        (tmp_path / "huge.raw").touch()
        where, identity = os.fsencode(tmp_path / "huge.raw"), identity_of(str(tmp_path / "huge.raw"))
        change.table.put(Record(b"huge", store.KIND_DEVICE, bytes(16), size, path=where, identity=identity))
    with (
        dm.open(Address(path, "huge")) as image,
        pytest.raises(dm.BitmapError, match="bytes of bits"),
        image.transaction() as bitmaps,
    ):
        bitmaps["b"] = dm.Bitmap(size, 512)


def test_dump_shows_every_byte_of_metadata(path: str) -> None:
    with dm.open(Address(path, "disk")) as image, image.transaction() as bitmaps:
        bitmaps["b"] = dm.Bitmap.from_extents(1_000_000, [0], [70_000], 512)
        bitmaps["ones"] = dm.Bitmap.from_extents(1_000_000, [0], [1_000_000])
    document = dm.dump(path, with_hex=True)
    raw = Path(path).read_bytes()
    assert document["faults"] == []
    assert document["stopped"] is None
    assert document["format"] == "dirtmap"
    seen = []
    for structure in document["structures"]:
        start, length = structure["offset"], structure["length"]
        assert bytes.fromhex(structure["hex"]) == raw[start : start + length]
        seen.append(structure["name"])
        for field in structure.get("fields", ()):
            part = raw[field["offset"] : field["offset"] + field["length"]]
            value = field["value"]
            assert (
                value in (part.hex(), part.decode(errors="replace"))
                if isinstance(value, str)
                else value == int.from_bytes(part, "big")
            )
    assert [name for name in seen if not name.startswith("header")] == [
        "namespace table",
        "namespace record: node 'disk'",
        "directory owner: node 'disk'",
        "directory entry: node 'disk', bitmap 'b'",
        "bits: node 'disk', bitmap 'b'",
        "directory entry: node 'disk', bitmap 'ones'",
        "space map",
        "space map leaf 0",
        "released clusters",
    ]


def test_a_directory_of_several_clusters_is_dumped_as_it_is_in_the_file(path: str) -> None:
    """An entry that goes on in another cluster has the owner in its midst."""
    names = [f"{number:02}".ljust(1000, "n") for number in range(20)]
    with dm.open(Address(path, "disk")) as image:
        with image.transaction() as bitmaps:
            for name in names:
                bitmaps[name] = dm.Bitmap(image.size)
        assert list(image) == names
    raw = Path(path).read_bytes()
    document = dm.dump(path, with_hex=True)
    assert document["faults"] == []
    shown = [one for one in document["structures"] if one["name"].startswith("directory entry")]
    assert [one["fields"][-1]["value"] for one in shown] == names
    owner = store.directory_owner(b"disk")
    for one in shown:
        assert bytes.fromhex(one["hex"]) == raw[one["offset"] : one["offset"] + one["length"]]
        assert (owner in bytes.fromhex(one["hex"])) == (
            one["offset"] // 4096 != (one["offset"] + one["length"] - 1) // 4096
        )
    assert sum(owner in bytes.fromhex(one["hex"]) for one in shown) > 3
    assert contents(raw)[b"disk"].bitmaps[-1].name == names[-1].encode()
