"""The tree of namespaces: it holds what was put, a commit writes what changed, and damage hides what is below it."""

from __future__ import annotations

import itertools
import struct
from collections import defaultdict
from collections.abc import Iterator

import crc32c
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.leaves import parse_records

from dirtmap.engine.storefile.table import DamagedNodeError, NamespaceTable, Node
from dirtmap.fmt import geometry, store
from dirtmap.fmt.errors import FormatError
from dirtmap.fmt.store import Area, Record, build_record

POINTER = struct.Struct(">IIQII")  # as SPEC.md has it


def record(name: bytes, length: int = 10) -> Record:
    return Record(name, store.KIND_NODE, bytes(16), 1 << 20, path=b"/".ljust(length, b"x"))


def alike(count: int) -> list[bytes]:
    """Names that share a key, the first ones of a kind, in pairs."""
    found: dict[int, bytes] = {}
    pairs: list[bytes] = []
    for number in itertools.count():
        name = b"alike%d" % number
        other = found.setdefault(crc32c.crc32c(name), name)
        if other != name:
            pairs += [other, name]
        if len(pairs) >= count:
            return pairs
    raise AssertionError


ALIKE = alike(4)


class Clusters:
    """Areas in memory: places them one behind the other, remembers which were given up, reads what was placed."""

    def __init__(self) -> None:
        self.data: dict[int, bytes] = {}  # by offset
        self.live: set[Area] = set()
        self.placed = 0
        self.next = store.RESERVED

    def place(self, data: bytes) -> Area:
        area = Area(self.next, len(data), crc32c.crc32c(data))
        self.next += geometry.align_up(len(data), 4096)
        self.data[area.offset] = data
        self.live.add(area)
        self.placed += 1
        return area

    def release(self, area: Area) -> None:
        if area.length:
            self.live.remove(area)  # a KeyError is an area released twice, or never placed

    def read(self, area: Area, what: str) -> bytes:
        data = self.data.get(area.offset, b"")
        if len(data) != area.length or crc32c.crc32c(data) != area.checksum:
            raise FormatError(f"s: {what} at {area.offset:#x}", "its checksum is wrong")
        return data


class Tree:
    """A tree in memory as the last commit left it."""

    def __init__(self, node_bytes: int) -> None:
        self.clusters, self.node_bytes = Clusters(), node_bytes
        self.root, self.depth, self.count = Area(), 0, 0

    def table(self) -> NamespaceTable:
        return NamespaceTable("s", self.root, self.depth, self.count, 0, self.clusters.read, node_bytes=self.node_bytes)

    def commit(self, table: NamespaceTable) -> None:
        table.seal(self.clusters.place, self.clusters.release)
        self.root, self.depth, self.count = table.root.area, table.root.level, table.root.records

    def put(self, *records: Record) -> None:
        table = self.table()
        for each in records:
            table.put(each)
        self.commit(table)

    def walk(self) -> Iterator[tuple[int, Area, list[bytes]]]:
        """Level, area and names below of each node, read as SPEC.md says and in no other way."""
        if not self.root.length:
            assert (self.depth, self.count) == (0, 0)
            return
        found = list(self._below(self.depth, self.root))
        assert len(found[0][2]) == self.count
        yield from found

    def _below(self, level: int, area: Area) -> list[tuple[int, Area, list[bytes]]]:
        data = self.clusters.read(area, "")
        if not level:
            names = [each.name for each in parse_records(data)]
            pairs = [(crc32c.crc32c(name), name) for name in names]
            assert pairs == sorted(set(pairs))
            assert len(data) <= self.node_bytes or len({key for key, _ in pairs}) == 1
            return [(0, area, names)]
        assert len(data) <= self.node_bytes
        found: list[tuple[int, Area, list[bytes]]] = []
        names, keys = [], []
        for key, count, *place in POINTER.iter_unpack(data):
            below = self._below(level - 1, Area(*place))
            assert len(below[0][2]) == count
            assert crc32c.crc32c(below[0][2][0]) == key
            assert crc32c.crc32c(below[0][2][-1]) not in keys
            found += below
            names += below[0][2]
            keys.append(key)
        assert [crc32c.crc32c(name) for name in names] == sorted(crc32c.crc32c(name) for name in names)
        return [(level, area, names), *found]


class TreeMachine(RuleBasedStateMachine):
    """Commits of a tree with small nodes, held against a dictionary."""

    @initialize(node_bytes=st.sampled_from([150, 400, 1000]))
    def begin(self, node_bytes: int) -> None:
        self.tree = Tree(node_bytes)
        self.model: dict[bytes, Record] = {}
        self.table = self.tree.table()
        self.changes = 0

    names = st.integers(0, 80).map(lambda number: b"node-%d" % number) | st.sampled_from(ALIKE)

    @rule(name=names, length=st.sampled_from([1, 40, 300, 1000]))
    def put(self, name: bytes, length: int) -> None:
        self.model[name] = record(name, length)
        self.table.put(self.model[name])
        self.changes += 1

    @rule(first=st.integers(0, 80), count=st.integers(1, 80), length=st.sampled_from([1, 200]))
    def put_many(self, first: int, count: int, length: int) -> None:
        for number in range(first, first + count):
            self.put(b"node-%d" % number, length)

    @rule(name=names)
    def remove(self, name: bytes) -> None:
        self.model.pop(name, None)
        self.table.remove(name)
        self.changes += 1

    @precondition(lambda self: self.model)
    @rule(share=st.sampled_from([2, 3, 10]))
    def remove_many(self, share: int) -> None:
        for name in list(self.model)[:: 1 if share == 10 else share]:
            self.remove(name)

    @rule()
    def commit(self) -> None:
        before, nodes = self.tree.table(), list(self.tree.walk())
        placed = self.tree.clusters.placed
        self.tree.commit(self.table)
        after, now = self.tree.table(), list(self.tree.walk())
        # Each change can make two nodes of one, and join it with two neighbours, on each level.
        most = self.changes * 4 * (max(before.root.level, after.root.level) + 1)
        assert self.tree.clusters.placed - placed <= most, "only what changed is written"
        self._compare(before, after, nodes, now)
        self.table, self.changes = after, 0

    def _compare(
        self,
        before: NamespaceTable,
        after: NamespaceTable,
        nodes: list[tuple[int, Area, list[bytes]]],
        now: list[tuple[int, Area, list[bytes]]],
    ) -> None:
        """Who knew all leaves before, and reads those that differ, knows all leaves."""
        old, new = ({area for level, area, _ in each if not level} for each in (nodes, now))
        mine, theirs = after.unlike(before, pytest.fail)
        assert {leaf.area for leaf in mine} >= new - old
        assert {leaf.area for leaf in theirs} >= old - new
        assert len(mine) <= len(new - old) + 1, "one leaf is the root before or after"
        every = after.unlike(None, pytest.fail)[0]
        assert [leaf.area for leaf in every] == [area for level, area, _ in now if not level]
        known = {leaf.key: leaf.area for leaf in before.unlike(None, pytest.fail)[0]}
        for leaf in theirs:
            del known[leaf.key]
        known |= {leaf.key: leaf.area for leaf in mine}
        assert known == {leaf.key: leaf.area for leaf in every}

    @invariant()
    def holds_what_was_put(self) -> None:
        assert self.table.count == len(self.model)
        assert list(self.table) == sorted(self.model.values(), key=lambda each: (crc32c.crc32c(each.name), each.name))
        for name in (b"node-5", b"node-50", *ALIKE):
            assert self.table.get(name) == self.model.get(name)

    @invariant()
    def what_is_not_used_was_given_up(self) -> None:
        if not self.changes:
            assert {area for _, area, _ in self.tree.walk()} == self.tree.clusters.live


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_a_tree_that_has_become_small_again_is_one_leaf() -> None:
    tree = Tree(400)
    tree.put(*(record(b"node-%d" % number) for number in range(300)))
    assert tree.depth >= 2
    for number in range(299):
        table = tree.table()
        table.remove(b"node-%d" % number)
        tree.commit(table)
    sizes = [len(tree.clusters.read(area, "")) for _, area, _ in tree.walk()]
    assert (tree.depth, len(sizes)) == (0, 1)


def test_one_change_of_20000_writes_the_path_to_it() -> None:
    tree = Tree(store.NODE_BYTES)
    tree.put(*(record(b"node-%d" % number) for number in range(20_000)))
    assert tree.depth == 2
    nodes = list(tree.walk())
    assert tree.clusters.placed == len(nodes) < 20_000 // 24
    placed = tree.clusters.placed
    tree.put(record(b"node-7", 11))
    assert tree.clusters.placed - placed == 3


def test_table_is_full_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_NAMESPACES", 3)
    tree = Tree(400)
    tree.put(*(record(b"%d" % number) for number in range(3)))
    with pytest.raises(FormatError, match="s: namespaces: 4 are more than 3"):
        tree.put(record(b"3"))
    assert [each.name for each in tree.table()] == sorted([b"0", b"1", b"2"], key=crc32c.crc32c)


def test_names_that_share_a_key_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_NODE_BYTES", 1000)
    tree = Tree(400)
    tree.put(*(record(name, 300) for name in ALIKE))
    assert tree.count == 4
    with pytest.raises(FormatError, match=f"2 names share the key {crc32c.crc32c(ALIKE[0]):08x}, too many"):
        tree.put(*(record(name, 500) for name in ALIKE[:2]))


def test_a_record_that_breaks_a_rule_is_not_put() -> None:
    with pytest.raises(FormatError, match=r"namespace 'n'\.path: too long"):
        Tree(400).table().put(record(b"n", 5000))


# Damage.


@pytest.fixture(scope="module")
def small() -> Tree:
    """Two levels of nodes above some leaves, one of them with names that share a key."""
    tree = Tree(190)
    tree.put(*(record(b"n%d" % number) for number in range(12)), *(record(name) for name in ALIKE[:2]))
    assert tree.depth == 2
    return tree


def test_every_flipped_bit_is_told_and_hides_only_what_is_below(small: Tree) -> None:
    nodes = list(small.walk())
    every = nodes[0][2]
    for level, area, names in nodes:
        sound = small.clusters.data[area.offset]
        sure = [name for name in every if name not in names]
        for bit in range(8 * len(sound)):
            damaged = bytearray(sound)
            damaged[bit // 8] ^= 1 << bit % 8
            small.clusters.data[area.offset] = bytes(damaged)
            broken: list[FormatError] = []
            assert [each.name for each in small.table().readable(broken.append)] == sure
            (error,) = broken
            assert isinstance(error, DamagedNodeError)
            assert (error.node.level, error.node.area) == (level, area)
            assert all(error.node.key <= crc32c.crc32c(name) < error.node.end for name in names)
        for name in every:
            if name in names:
                with pytest.raises(FormatError, match=r"its checksum is wrong"):
                    small.table().get(name)
            else:
                assert small.table().get(name) == record(name)
        small.clusters.data[area.offset] = sound


def test_what_is_short_beside_a_damaged_leaf_can_be_changed() -> None:
    tree = Tree(320)
    tree.put(*(record(b"n%d" % number) for number in range(24)))
    leaves = [(area, names) for level, area, names in tree.walk() if not level]
    spoilt = {leaves[1][0].offset: b"", leaves[3][0].offset: b""}
    tree.clusters.data |= spoilt
    table = tree.table()
    for name in leaves[2][1][1:]:
        table.remove(name)
    table.put(record(leaves[2][1][0], 1))
    tree.node_bytes = 2000  # so that what is left is short
    table = NamespaceTable("s", tree.root, tree.depth, tree.count, 0, tree.clusters.read, node_bytes=2000)
    table.put(record(leaves[2][1][0], 1))
    tree.commit(table)
    assert tree.table().get(leaves[2][1][0]) == record(leaves[2][1][0], 1)
    broken: list[FormatError] = []
    left = {each.name for each in tree.table().readable(broken.append)}
    assert left == {name for area, names in leaves if area.offset not in spoilt for name in names}
    assert len(broken) == 2


NAMES = sorted((b"n%d" % number for number in range(6)), key=crc32c.crc32c)
KEYS = [crc32c.crc32c(name) for name in NAMES]


class Forge:
    """A root with three leaves of two records each, whatever their numbers say; checksums are right."""

    def __init__(self) -> None:
        self.clusters = Clusters()
        self.leaves = [[record(name) for name in NAMES[at : at + 2]] for at in (0, 2, 4)]
        self.keys, self.counts, self.lengths = KEYS[::2], [2, 2, 2], {}
        self.order, self.count, self.depth, self.extra = [0, 1, 2], 6, 1, b""

    def table(self) -> NamespaceTable:
        areas = [self.clusters.place(b"".join(map(build_record, leaf)) + self.extra) for leaf in self.leaves]
        areas = [area._replace(length=self.lengths.get(number, area.length)) for number, area in enumerate(areas)]
        pointers = b"".join(POINTER.pack(self.keys[n], self.counts[n], *areas[self.order[n]]) for n in range(3))
        root = self.clusters.place(pointers)
        return NamespaceTable("s", root, self.depth, self.count, 0, self.clusters.read, node_bytes=4096)


def _swapped(forge: Forge) -> None:
    forge.keys[1:], forge.order[1:] = forge.keys[:0:-1], forge.order[:0:-1]


def _in_another_leaf(forge: Forge) -> None:
    forge.leaves[0][1], forge.leaves[1][1] = forge.leaves[1][1], forge.leaves[0][1]


LIES = {
    "a count": (lambda f: f.counts.__setitem__(1, 3), ".count: 3, but there are 2|namespaces: 6, but there are 7"),
    "the count of all": (lambda f: setattr(f, "count", 5), "namespaces extension.namespaces: 5, but there are 6"),
    "a smaller key": (lambda f: f.keys.__setitem__(1, KEYS[1] + 1), "does not lead to it"),
    "a larger key": (lambda f: f.keys.__setitem__(1, KEYS[2] + 1), "does not lead to it"),
    "two pointers to one leaf": (lambda f: f.order.__setitem__(1, 0), "does not lead to it"),
    "two equal pointers": (lambda f: (f.order.__setitem__(1, 0), f.keys.__setitem__(1, KEYS[0])), "do not ascend"),
    "pointers out of order": (_swapped, "do not ascend"),
    "records out of order": (lambda f: f.leaves[1].reverse(), "does not lead to it"),
    "a record twice": (lambda f: f.leaves[1].insert(1, f.leaves[1][0]), "do not ascend"),
    "a record in another leaf": (_in_another_leaf, "does not lead to it"),
    "an empty leaf": (lambda f: (f.leaves[1].clear(), f.counts.__setitem__(1, 0)), "but there are 4|length: 0 is"),
    "half a record": (lambda f: setattr(f, "extra", bytes(8)), "too few for a record"),
    "a long leaf": (lambda f: f.lengths.update({1: store.MAX_NODE_BYTES + 1}), "length: 131073 is outside"),
    "a leaf for a node": (lambda f: setattr(f, "depth", 2), "not an array|do not ascend|does not lead to it"),
    "a node for a leaf": (lambda f: setattr(f, "depth", 0), "does not fit|too few for a record"),
}


@pytest.mark.parametrize("lie", LIES)
def test_numbers_that_lie_are_told(lie: str) -> None:
    change, message = LIES[lie]
    forge = Forge()
    change(forge)
    table = forge.table()
    with pytest.raises(FormatError, match=message):
        list(table)
    broken: list[FormatError] = []
    names = [each.name for each in table.readable(broken.append)]
    assert broken
    assert len(set(names)) == len(names), "no namespace is there twice"
    answers: dict[str, list[bytes]] = defaultdict(list)
    for name in NAMES:
        try:
            answers["found" if table.get(name) == record(name) else "missing"].append(name)
        except FormatError:
            answers["refused"].append(name)
    assert not answers["missing"] or lie in ("a smaller key", "a larger key", "a record in another leaf"), answers
    if answers["missing"]:  # such a tree contradicts itself: the leaf that should have the name is refused elsewhere
        assert len(broken) > 0


@pytest.mark.parametrize("pointers", [1, 2, 170, store.MAX_NODE_BYTES // 24])
def test_nodes_that_lead_back_to_themselves_end(pointers: int) -> None:
    """Of whatever is read, as if its checksum were right, there is no way to go round or to go twice."""
    data = b"".join(POINTER.pack(number, 1, 4096, 24 * pointers, 0) for number in range(pointers))
    reads = itertools.count()

    def read(area: Area, what: str) -> bytes:
        next(reads)
        return data

    table = NamespaceTable(
        "s", Area(4096, len(data), 0), store.MAX_DEPTH, pointers, 0, read, node_bytes=store.NODE_BYTES
    )
    broken: list[FormatError] = []
    assert list(table.readable(broken.append)) == []
    assert len(broken) <= pointers
    assert next(reads) <= pointers + store.MAX_DEPTH
    with pytest.raises(FormatError):
        table.get(b"n")


def test_a_node_says_which_keys_it_has() -> None:
    assert Node(1, 1 << 32, 0, 5, 4096, 24, 0).what == "namespace table"
    assert Node(0, 0x80, 0x10, 5, 4096, 24, 0).what == "namespace table, keys 00000010..0000007f"
