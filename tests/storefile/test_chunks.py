"""The tree of a bitmap's bits against an array of booleans: written, read, changed, damaged, carried over, given up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dirtmap.engine.model import bits
from dirtmap.engine.model.content import Whole
from dirtmap.engine.storefile import chunks, few
from dirtmap.engine.storefile.entries import Tree
from dirtmap.engine.storefile.file import Change, Snapshot, Store, create

CLUSTER = 4096
CHUNK = CLUSTER * 8  # bits
FAN = CLUSTER // 16
SIZES = [
    1,
    7,
    64,
    65,
    CHUNK - 1,
    CHUNK,
    CHUNK + 1,
    3 * CHUNK + 100,
    FAN * CHUNK,
    FAN * CHUNK + 1,
    (FAN + 3) * CHUNK - 63,
]

Flags = NDArray[np.bool_]


class Written(NamedTuple):
    """What one commit did."""

    tree: Tree
    clusters: int  # taken for the tree
    released: int


def words_of(flags: Flags) -> bits.Words:
    return bits.from_packed(np.packbits(flags, bitorder="little").tobytes(), len(flags))


def flags_of(words: bits.Words, nbits: int) -> Flags:
    return np.unpackbits(words.view(np.uint8), bitorder="little", count=nbits).view(np.bool_)


def committed(target: Store, act: Callable[[Change], tuple[int, int]], nbits: int) -> Written:
    with target.change() as change:
        taken = -sum(change.space.free), len(change.space.places)
        tree = Tree(*act(change), nbits)
        used = -sum(change.space.free) - taken[0] + (len(change.space.places) - taken[1]) * change.space.per_leaf
        released = sum(count for _, count in change.space.newly_released)
    return Written(tree, used, released)


def write(target: Store, flags: Flags, base: Tree | None = None, among: list[int] | None = None) -> Written:
    def act(change: Change) -> tuple[int, int]:
        chosen = None if among is None else np.array(among, np.int64)
        return chunks.write(change, Whole(len(flags), words_of(flags)), base or Tree(0, 0, len(flags)), chosen)

    return committed(target, act, len(flags))


def read(target: Store, tree: Tree) -> tuple[Flags, str | None]:
    words, told = target.read(lambda snapshot: chunks.load(snapshot, tree))
    number, told_again = target.read(lambda snapshot: chunks.count(snapshot, tree))
    assert (number, told_again) == (bits.count(words), told)
    plain = target.read(lambda snapshot: few.load(snapshot, tree))
    assert (plain is None) == (told is not None), "the trees here have few clusters"
    assert plain is None or plain.tobytes() == words.tobytes()
    return flags_of(words, tree.nbits), told


def cost(flags: Flags) -> int:
    """The clusters that a tree takes, by SPEC.md."""
    level = [
        int(part.any()) + int(part.all()) for part in np.array_split(flags, range(CHUNK, len(flags), CHUNK))
    ]  # 0: clean, 1: mixed, 2: all dirty
    total = level.count(1)
    while len(level) > 1:
        parts = [level[at : at + FAN] for at in range(0, len(level), FAN)]
        level = [part[0] if len(set(part)) == 1 and part[0] != 1 else 1 for part in parts]
        total += level.count(1)
    return total


@pytest.fixture
def target(tmp_path: Path) -> Store:
    create(str(tmp_path / "store"))
    return Store(str(tmp_path / "store"))


def some(nbits: int, seed: int, runs: int) -> Flags:
    """Some runs dirty, some of them over whole chunks, and some clean again."""
    random = np.random.default_rng(seed)
    flags = np.zeros(nbits, np.bool_)
    for _ in range(runs):
        length = int(min(nbits, 2 ** random.uniform(0, 20)))
        start = int(random.integers(0, nbits - length + 1))
        flags[start : start + length] = random.random() < 0.7
    return flags


@pytest.mark.parametrize("nbits", SIZES)
@pytest.mark.parametrize("dirty", ["none", "all", "first", "last", "but first", "but last"])
def test_what_is_written_is_read(target: Store, nbits: int, dirty: str) -> None:
    flags = np.full(nbits, dirty == "all" or dirty.startswith("but"))
    if dirty not in ("none", "all"):
        flags[0 if dirty.endswith("first") else -1] ^= True
    written = write(target, flags)
    assert written.clusters == cost(flags)
    assert (written.tree.place <= 1) == (flags.all() or not flags.any())
    found, told = read(target, written.tree)
    assert told is None
    assert np.array_equal(found, flags)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SIZES),
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 8)), min_size=1, max_size=5),
    st.booleans(),
)
def test_changes_one_after_the_other(
    tmp_path_factory: pytest.TempPathFactory, nbits: int, steps: list[tuple[int, int]], known: bool
) -> None:
    path = str(tmp_path_factory.mktemp("chunks") / "store")
    create(path)
    flags, tree, owned = np.zeros(nbits, np.bool_), Tree(0, 0, nbits), 0
    with Store(path) as target:
        for seed, runs in steps:
            changed = flags ^ some(nbits, seed, runs)
            differs = np.unique(np.flatnonzero(changed != flags) // CHUNK)
            before = owned
            written = write(target, changed, tree, differs.tolist() if known else None)
            flags, tree = changed, written.tree
            owned += written.clusters - written.released
            assert owned == cost(flags)
            assert written.clusters <= len(differs) * 3
            assert len(differs) or before == owned
            found, told = read(target, tree)
            assert told is None
            assert np.array_equal(found, flags)
        released = committed(target, lambda change: (chunks.release(change, tree), (0, 0))[1], nbits).released
        assert released == owned


def test_one_more_bit_writes_a_chunk_and_the_nodes_above(target: Store) -> None:
    flags = np.random.default_rng(1).random((FAN + 3) * CHUNK) < 0.1
    first = write(target, flags)
    flags[5 * CHUNK] ^= True
    second = write(target, flags, first.tree)
    assert (second.clusters, second.released) == (3, 3)
    assert np.array_equal(read(target, second.tree)[0], flags)


@pytest.mark.parametrize("nbits", SIZES)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), runs=st.integers(0, 3), more=st.integers(0, 3))
def test_merging_is_or(tmp_path_factory: pytest.TempPathFactory, nbits: int, seed: int, runs: int, more: int) -> None:
    path = str(tmp_path_factory.mktemp("chunks") / "store")
    create(path)
    flags, marks = some(nbits, seed, runs), some(nbits, seed + 1, more)
    with Store(path) as target:
        first = write(target, flags)
        merged = committed(
            target, lambda change: chunks.merge(change, Whole(nbits, words_of(marks)), first.tree), nbits
        )
        assert first.clusters + merged.clusters - merged.released == cost(flags | marks)
        assert merged.clusters == 0 or not (flags >= marks).all()
        assert np.array_equal(read(target, merged.tree)[0], flags | marks)


def test_large_bitmaps_are_in_one_piece(target: Store) -> None:
    flags = np.random.default_rng(1).random(FAN * CHUNK) < 0.1
    tree = write(target, flags).tree
    found = target.read(lambda snapshot: chunks.walk(snapshot, tree))
    assert (np.diff(found.places) == CLUSTER).all()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SIZES), st.integers(0, 2**32 - 1), st.integers(1, 8), st.data())
def test_a_damaged_cluster_makes_dirty_what_it_covers(
    tmp_path_factory: pytest.TempPathFactory, nbits: int, seed: int, runs: int, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("chunks") / "store"
    create(str(path))
    flags = some(nbits, seed, runs)
    flags[0], flags[-1] = True, nbits == 1
    with Store(str(path)) as target:
        tree = write(target, flags).tree
        if tree.place <= 1:
            return
        found = target.read(lambda snapshot: chunks.walk(snapshot, tree, keep=True))
        level, index, place = data.draw(
            st.sampled_from(
                [(level, index, place) for (level, index), place in found.at.items()]
                + [(0, *pair) for pair in zip(found.chunks.tolist(), found.places.tolist(), strict=True)]
            )
        )
        with path.open("r+b") as file:
            file.seek(place + data.draw(st.integers(0, CLUSTER - 1)))
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1 << data.draw(st.integers(0, 7))]))
        below = slice(index * FAN**level * CHUNK, (index + 1) * FAN**level * CHUNK)
        expected = flags.copy()
        expected[below] = True
        shown, told = read(target, tree)
        assert np.array_equal(shown, expected)
        assert told is not None
        assert f"{place:#x}" in told
        # The next commit that has these bits makes them so for good, and what it carries over is sound.
        other = path.with_name("other")
        create(str(other))
        with Store(str(other)) as copy:
            carried = committed(
                copy,
                lambda change: target.read(lambda snapshot: chunks.carry_over(snapshot, tree, change)[0]),
                nbits,
            )
            assert carried.clusters == cost(expected)
            assert read(copy, carried.tree)[1] is None
            assert np.array_equal(read(copy, carried.tree)[0], expected)
        mended = write(target, expected, tree).tree
        shown, told = read(target, mended)
        assert told is None
        assert np.array_equal(shown, expected)


@pytest.mark.parametrize("nbits", [3 * CHUNK + 100, (FAN + 3) * CHUNK - 63])
def test_what_is_cleared_below_a_damaged_node_is_clean(tmp_path: Path, nbits: int) -> None:
    """Its chunks are dirty as they are read. One that is neither all clean nor all dirty then is written, too."""
    path = tmp_path / "store"
    create(str(path))
    flags = np.zeros(nbits, np.bool_)
    flags[[0, -1]] = True
    with Store(str(path)) as target:
        tree = write(target, flags).tree
        with path.open("r+b") as file:
            file.seek(tree.place)
            file.write(b"?")
        shown, _ = read(target, tree)
        assert shown.all()
        for run in (slice(100, 200), slice(CHUNK + 7, 3 * CHUNK + 9), slice(0, 1)):
            shown[run] = False
        mended = write(target, shown, tree).tree
        assert np.array_equal(read(target, mended)[0], shown)
        assert read(target, mended)[1] is None


@pytest.mark.parametrize("place", [2, 3, CLUSTER, 4 * CLUSTER + 512, 1 << 40, 2**63, 2**64 - CLUSTER])
def test_a_place_where_no_cluster_can_be_counts_as_damaged(target: Store, place: int) -> None:
    for nbits in (5, CHUNK + 5):
        shown, told = read(target, Tree(place, 0, nbits))
        assert shown.all()
        assert told is not None


def test_damaged_neighbours_are_told_together(target: Store) -> None:
    """Else a store of 16 MB could have a million of them, each in memory on its own."""
    nbits = FAN**2 * CHUNK
    pointers = [place.to_bytes(8, "big") + bytes(8) for place in range(3, 3 + FAN)]
    pointers[7] = bytes(16)
    with target.change() as change:
        low = change.place(b"".join(pointers))
        root = change.place(low.offset.to_bytes(8, "big") + low.checksum.to_bytes(4, "big") + bytes(4 + CLUSTER - 16))
    tree = Tree(root.offset, root.checksum, nbits)
    found = target.read(lambda snapshot: chunks.walk(snapshot, tree, keep=True))
    assert found.damaged == [(0, 7, 3), (8, FAN, 11)]
    assert found.nodes[1, 0]["place"].tolist() == [1] * 7 + [0] + [1] * (FAN - 8)
    assert target.read(lambda snapshot: chunks.count(snapshot, tree))[0] == (FAN - 1) * CHUNK


@pytest.mark.parametrize("levels", [2, 3])
@pytest.mark.parametrize("clusters", [None, 1 << 40])
def test_a_small_store_does_not_keep_a_reader_busy(tmp_path: Path, levels: int, clusters: int | None) -> None:
    """Nodes that lead to themselves, or all to one, could make a tree of any size; and a header can say anything."""
    path = str(tmp_path / "store")
    create(path)
    nbits = FAN**levels * CHUNK
    with Store(path) as target:
        with target.change() as change:
            root = change.place(b"\1".ljust(CLUSTER, b"\0"))
            for _ in range(levels):
                pointer = root.offset.to_bytes(8, "big") + root.checksum.to_bytes(4, "big") + bytes(4)
                root = change.place(pointer * FAN)
        reads = 0

        def look(snapshot: Snapshot) -> tuple[int, str | None]:
            nonlocal reads
            plain, plain_into = snapshot.file.read, snapshot.file.read_into

            def counted(offset: int, length: int) -> bytes:
                nonlocal reads
                reads += 1
                assert reads < 100
                return plain(offset, length)

            def counted_into(offset: int, buffer: memoryview) -> None:
                nonlocal reads
                reads += 1
                assert reads < 100
                plain_into(offset, buffer)

            snapshot.header = replace(snapshot.header, clusters=clusters or snapshot.header.clusters)
            snapshot.file.read = counted  # type: ignore[method-assign]
            snapshot.file.read_into = counted_into  # type: ignore[method-assign]
            try:
                return chunks.count(snapshot, Tree(root.offset, root.checksum, nbits))
            finally:
                del snapshot.file.read, snapshot.file.read_into

        dirty, told = target.read(look)
        assert told is not None
        assert dirty > nbits // 2
