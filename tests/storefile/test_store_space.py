"""The space map alone, with clusters so small that its root, its leaves and its list of released runs take several."""

from __future__ import annotations

import random
import struct
import time

import crc32c
import pytest

from dirtmap.engine.storefile.space import SpaceMap
from dirtmap.fmt import store
from dirtmap.fmt.parsers.store import LEAF
from dirtmap.fmt.store import Area


class SpaceModel:
    """A space map's own areas in memory, and which clusters are in use."""

    def __init__(self, cluster: int) -> None:
        self.cluster, self.per_leaf = cluster, store.leaf_clusters(cluster)
        self.headers = set(range(-(-store.RESERVED // cluster)))
        leaves = self.clusters = 0
        while leaves * self.per_leaf <= self.clusters:
            leaves += 1
            self.clusters = len(self.headers) + leaves + -(-leaves * LEAF.size // cluster)
        self.areas: dict[int, bytes] = {}
        root = b""
        for index in range(leaves):
            used = max(0, min(self.per_leaf, self.clusters - index * self.per_leaf))
            place = self.write((len(self.headers) + index) * cluster, ((1 << used) - 1).to_bytes(cluster, "little"))
            root += LEAF.build(offset=place.offset, free=self.per_leaf - used, checksum=place.checksum)
        self.root, self.released = self.write((len(self.headers) + leaves) * cluster, root), Area()
        self.held: list[Area] = []
        self.slots: list[set[int]] = [set(), set()]  # what both slots' states have in use

    def write(self, offset: int, data: bytes) -> Area:
        self.areas[offset] = bytes(data)
        return Area(offset, len(data), crc32c.crc32c(data))

    def read(self, area: Area, what: str) -> bytes:
        data = self.areas[area.offset] if area.length else b""
        assert crc32c.crc32c(data) == area.checksum, what
        return data

    def runs(self) -> list[tuple[int, int]]:
        return list(struct.iter_unpack(">QQ", self.read(self.released, "released")))

    def map(self) -> SpaceMap:
        return SpaceMap("store", self.cluster, self.clusters, self.read(self.root, "root"), self.runs(), self.read)

    def commit(self, wanted: list[int], given_up: list[Area]) -> None:
        """Takes areas of so many clusters, and gives others up."""
        space, before = self.map(), self.clusters
        marked = sum(self.map().read_leaf(index) << index * self.per_leaf for index in range(len(space.places)))
        taken: set[int] = set()
        for count in wanted:
            self.held.append(Area(space.take(count) * self.cluster, count * self.cluster))
            taken |= set(self.held[-1].clusters(self.cluster))
        for area in given_up:
            space.release(area)
        self.root, self.released, writes = space.seal(self.root, self.released)
        for offset, data in writes:
            taken |= set(self.write(offset, bytes(data)).clusters(self.cluster))
        assert not taken & self.slots[0], "written over what the newest header leads to"
        assert not taken & self.slots[1], "written over what the older header leads to"
        inside = {cluster for cluster in taken if cluster < before}
        assert not any(marked >> cluster & 1 for cluster in inside), "not free in the map of the commit before"
        self.clusters = space.clusters
        self.slots = [self.sound(), self.slots[0]]

    def sound(self) -> set[int]:
        """The clusters in use; marked are these and the released ones."""
        space, used = self.map(), set(self.headers)
        for area in [*self.held, self.root, self.released, *space.places]:
            clusters = set(area.clusters(self.cluster))
            assert not clusters & used
            used |= clusters
        released = {cluster for first, count in self.runs() for cluster in range(first, first + count)}
        assert not released & used
        bits = sum(space.read_leaf(index) << index * self.per_leaf for index in range(len(space.places)))
        marked = {cluster for cluster in range(bits.bit_length()) if bits >> cluster & 1}
        assert marked == used | released
        assert max(marked) < self.clusters
        return used


@pytest.mark.parametrize("seed", [pytest.param(n, marks=[pytest.mark.long] if n >= 20 else []) for n in range(200)])
def test_space_map_counts_every_cluster(seed: int) -> None:
    rng = random.Random(seed)
    model = SpaceModel([16, 32, 64][seed % 3])
    sizes = [1, 1, 1, 2, 3, 7, model.per_leaf // 3, 2 * model.per_leaf]
    for _ in range(30):
        rng.shuffle(model.held)
        count = min(len(model.held), rng.choice([0, 1, 2, 1000, rng.randrange(100)]))
        given_up = [model.held.pop() for _ in range(count)]
        model.commit([rng.randrange(rng.choice(sizes)) + 1 for _ in range(rng.choice([0, 1, 2, 10, 60]))], given_up)


def test_no_run_costs_as_much_as_a_leaf() -> None:
    """In clusters of 2 MiB a leaf has as many bytes: neither what is released nor what is taken may go over all."""
    cluster = 2 << 20
    per_leaf, runs = store.leaf_clusters(cluster), 100_000
    leaf = ((1 << 2 * runs + 10) - 1).to_bytes(cluster, "little")
    root = LEAF.build(offset=1 << 30, free=per_leaf - 2 * runs - 10, checksum=crc32c.crc32c(leaf))
    released = [(10 + 2 * number, 1) for number in range(runs)]
    space = SpaceMap("store", cluster, 2 * runs + 10, root, released, lambda area, what: leaf)
    before = time.process_time()
    taken = [space.take(1) for _ in range(1000)]
    _, _, writes = space.seal(Area(), Area())
    assert time.process_time() - before < 2, "each took milliseconds, with 2 MiB written anew"
    assert taken == list(range(2 * runs + 10, 2 * runs + 1010))
    bits = int.from_bytes(writes[0][1], "little")
    assert [bits >> number & 1 for number in (9, 10, 11, 12, 2 * runs + 8, 2 * runs + 9)] == [1, 0, 1, 0, 0, 1]
    assert space.free[0] == per_leaf - bits.bit_count()
