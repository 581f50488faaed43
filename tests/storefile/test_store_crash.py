"""Crashes while a store is changed: whatever is left, all namespaces together are wholly old or wholly new.

Every operation runs once, recorded; then each state that a crash could have left is built and judged by
`support.store_crash`. More effort: ``DIRTMAP_CRASH_EFFORT=8 pytest tests/storefile/test_store_crash.py``.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from support import crash, hostless, quick, store_crash
from support.crash import Recording, Tally
from support.hostless import stored
from support.store_crash import Judge, Reader

import dirtmap.engine as dm
from dirtmap.engine.model import changes, content
from dirtmap.engine.model.transaction import Transaction
from dirtmap.engine.namespaces import compact, nodes
from dirtmap.engine.namespaces.changing import transaction
from dirtmap.engine.namespaces.nodes import add_node
from dirtmap.engine.namespaces.store_check import check
from dirtmap.engine.namespaces.stored import describe_store
from dirtmap.engine.storefile import chunks
from dirtmap.engine.storefile import file as storefile
from dirtmap.engine.storefile.directory import place_directory, read_entries
from dirtmap.engine.storefile.file import Store, create
from dirtmap.engine.storefile.header import Seen
from dirtmap.engine.system import file as fileio
from dirtmap.engine.system.file import File
from dirtmap.fmt import directory
from dirtmap.fmt import store as fmt_store

EFFORT = crash.Effort(pieces=8, most=16, random=40).times(int(os.environ.get("DIRTMAP_CRASH_EFFORT", "1")))
CHAIN_EFFORT = crash.Effort(pieces=4, most=8, random=20)
MUTANT_EFFORT = crash.Effort(pieces=8, most=24, random=16)

# 16,385 granules of 4 KiB: bits in five sectors, and a last granule that is cut short.
SIZE = (64 << 20) + 1536
CHUNK = 32768  # bits

Operation = Callable[[Path], object]
Step = Callable[[Transaction], object]


@dataclass(frozen=True)
class Case:
    """An operation on a store.

    Attributes:
        prepare: makes the store.
        operate: what is recorded.
        leaf: clusters that a leaf of the space map shows, to see several without a large file; 0 as always.
        streamed: bitmaps of more than a chunk are not loaded, a chunk is looked at after the other, and what is planned
            is written before anything else is.
    """

    prepare: Operation
    operate: Operation
    leaf: int = 0
    streamed: bool = False


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits, and nodes of the namespace table are so small that each record has a leaf of its own."""
    quick.hurry(monkeypatch)
    monkeypatch.setattr(fmt_store, "NODE_BYTES", 200)


@contextlib.contextmanager
def limits_of(case: Case) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if case.leaf:
            patch.setattr(fmt_store, "leaf_clusters", lambda cluster_size: case.leaf)
        if case.streamed:
            patch.setattr(content, "LARGE", CHUNK)
            patch.setattr(content, "BLOCK", CHUNK)
            patch.setattr(chunks, "_BLOCK", CHUNK // 8)
            patch.setattr(storefile, "_MOST_PLANNED", 0)
        yield


# Stores.


def created(cluster_bits: int = 12) -> Operation:
    return lambda path: create(str(path), cluster_bits=cluster_bits)


def node(name: str, size: int = SIZE) -> Operation:
    """Another node, with an image of its own."""

    def operate(path: Path) -> None:
        image = path.with_name(f"disk {len(list(path.parent.iterdir()))}")
        with image.open("xb") as file:
            file.truncate(size)
        with Store(str(path)) as target:
            add_node(target, name, str(image))

    return operate


def on(name: str, *steps: Step) -> Operation:
    """All those changes of a node in one transaction."""

    def operate(path: Path) -> None:
        with Store(str(path)) as target, stored(target, name).transaction() as bitmaps:
            for step in steps:
                step(bitmaps)

    return operate


def together(**steps: list[Step]) -> Operation:
    """Changes of several nodes in one transaction."""

    def operate(path: Path) -> None:
        with Store(str(path)) as target, transaction(target) as namespaces:
            for name, each in steps.items():
                for step in each:
                    step(namespaces[name])

    return operate


def moving(path: Path) -> None:
    """A bitmap from one node to another, in one transaction."""
    with Store(str(path)) as target, transaction(target) as namespaces:
        changes.put(namespaces["b"], "moved", namespaces["a"]["b0"])
        changes.remove(namespaces["a"], "b0")


def of_node(act: Callable[..., object], *arguments: object, **options: object) -> Operation:
    """One of `dirtmap.engine.namespaces.nodes`."""

    def operate(path: Path) -> None:
        with Store(str(path)) as target:
            act(target, *arguments, **options)

    return operate


def recovering(path: Path) -> None:
    with Store(str(path)) as target:
        stored(target, "a").recover()


def after(*operations: Operation) -> Operation:
    def prepare(path: Path) -> None:
        for operate in operations:
            operate(path)

    return prepare


def scatter(bitmaps: Transaction, name: str, seed: int, ranges: int = 400) -> None:
    rng = random.Random(seed)
    offsets = [rng.randrange(bitmaps.size - 4096) for _ in range(ranges)]
    changes.mark(bitmaps, name, offsets, [rng.randrange(1, 4096) for _ in range(ranges)])


def add(name: str, granularity: int = 4096, seed: int = 7) -> Step:
    def step(bitmaps: Transaction) -> None:
        changes.add(bitmaps, name, granularity)
        scatter(bitmaps, name, seed)

    return step


def remove(name: str) -> Step:
    return lambda bitmaps: changes.remove(bitmaps, name)


def mark(name: str, seed: int = 8) -> Step:
    return lambda bitmaps: scatter(bitmaps, name, seed, 5)


def mark_all(name: str) -> Step:
    return lambda bitmaps: changes.mark(bitmaps, name, [0], [bitmaps.size])


def merge(name: str, *sources: str) -> Step:
    return lambda bitmaps: changes.merge(bitmaps, name, [bitmaps[source] for source in sources])


def enable(name: str, recording: bool) -> Step:
    return lambda bitmaps: changes.set_recording(bitmaps, name, recording)


def in_use(path: Path) -> None:
    """Makes the first node's bitmaps inconsistent."""
    with Store(str(path)) as target, target.change() as change:
        record = change.table.get(b"a")
        assert record
        entries = [entry.with_flags(set=directory.FLAG_IN_USE) for entry in read_entries(change.snapshot, record)]
        change.release(record.directory)
        change.table.put(replace(record, directory=place_directory(change, b"a", entries)))


def image_of(path: Path, name: str) -> Path:
    with Store(str(path)) as target:
        return next(Path(node.path) for node in nodes.nodes(target) if node.name == name)


def touched(path: Path) -> None:
    """The first node's image changes while nobody looks."""
    os.utime(image_of(path, "a"), (1, 1))


def resized(size: int) -> Operation:
    return lambda path: os.truncate(image_of(path, "a"), size)


def doubting(path: Path) -> None:
    """Somebody has seen a commit that is not there any more."""
    with Store(str(path)) as target:
        target.expect(Seen(target.read(lambda snapshot: snapshot.header.generation), bytes(16)))
        with target.change():
            pass


def damaged(*copies: int, at: int = store_crash.UUID_AT) -> Operation:
    """Header copies by number, each with a wrong bit in that byte."""

    def operate(path: Path) -> None:
        data = bytearray(path.read_bytes())
        store_crash.damage(data, *copies, at=at)
        path.write_bytes(data)

    return operate


def crashed(operate: Operation, whole: int, part: int = 0) -> Operation:
    """A crash during the operation: so many epochs are there from its beginning, and so many bytes of what follows."""

    def prepare(path: Path) -> None:
        recording = crash.record(path, operate)
        image = bytearray(recording.original)
        for epoch in recording.epochs[:whole]:
            for step in epoch:
                crash.land(image, step)
        if part:
            step, *_ = recording.epochs[whole]
            assert isinstance(step, crash.Write)
            crash.land(image, step._replace(data=step.data[:part]))
        path.write_bytes(image)

    return prepare


EMPTY = created()
ONE = after(EMPTY, node("a"), on("a", add("b0")))
TWO = after(EMPTY, node("a"), node("b"), on("a", add("b0", seed=1), add("b1", seed=2)), on("b", add("b0", seed=3)))
# Enough commits for clusters to be free inside, with stale bytes.
USED = after(
    TWO,
    *(
        on(name, mark(bitmap, seed))
        for seed, (name, bitmap) in enumerate([("a", "b0"), ("b", "b0"), ("a", "b1"), ("a", "b0")], 20)
    ),
)
# Bits in five chunks below a node, and a few of them written anew since.
TREE = after(ONE, on("a", add("t", 512)), on("a", mark("t", 30)), on("a", mark("b0", 31)), on("a", mark("t", 32)))
EIGHT = after(EMPTY, *(node(name) for name in "abcdefgh"), *(on(name, add("b0")) for name in "ah"))
MARK = on("a", mark("b0"))
CRASHED = on("b", mark("b0", 9))
LEAF = 64

CASES = {
    "add node, first": Case(EMPTY, node("a")),
    "add node, second": Case(ONE, node("a second one with a longer name")),
    "add node, the table grows": Case(EIGHT, node("i")),
    "add node, 64 KiB clusters": Case(created(16), node("a")),
    "remove node": Case(after(ONE, node("b")), of_node(hostless.remove, "b")),
    "remove node, last": Case(after(EMPTY, node("a")), of_node(hostless.remove, "a")),
    "rename node": Case(after(EMPTY, node("a")), of_node(hostless.rename, "a", "b")),
    "rename node with its bitmaps": Case(TWO, of_node(hostless.rename, "a", "c", with_bitmaps=True)),
    "rename node, many": Case(after(EIGHT, node("i")), of_node(hostless.rename, "a", "x", with_bitmaps=True)),
    "resize node, larger": Case(after(TWO, resized(2 * SIZE)), of_node(nodes.resize_node, "a")),
    "resize node, smaller": Case(after(TWO, resized(SIZE // 2)), of_node(nodes.resize_node, "a")),
    "confirm node": Case(after(TWO, touched), of_node(nodes.confirm_node, "a")),
    "add, first": Case(after(EMPTY, node("a")), on("a", add("b0"))),
    "add, second": Case(ONE, on("a", add("b1"))),
    "add, several clusters": Case(USED, on("a", add("b2", 512))),
    "add, 64 KiB clusters": Case(after(created(16), node("a"), on("a", add("b0"))), on("a", add("b1", 512))),
    "add, empty": Case(ONE, on("a", lambda bitmaps: changes.add(bitmaps, "b1"))),
    "add, all dirty": Case(ONE, on("a", lambda bitmaps: changes.add(bitmaps, "b1"), mark_all("b1"))),
    "remove": Case(TWO, on("a", remove("b0"))),
    "remove, last": Case(ONE, on("a", remove("b0"))),
    "clear": Case(TWO, on("a", lambda bitmaps: changes.clear(bitmaps, "b1"))),
    "mark": Case(TWO, on("a", mark("b1"))),
    "mark, free clusters inside": Case(USED, MARK),
    "mark, all": Case(TWO, on("a", mark_all("b0"))),
    "merge": Case(TWO, on("a", merge("b0", "b1"))),
    "rename": Case(TWO, on("a", lambda bitmaps: changes.rename(bitmaps, "b1", "a longer name"))),
    "enable": Case(after(TWO, on("a", enable("b0", False))), on("a", enable("b0", True))),
    "disable": Case(TWO, on("a", enable("b0", False))),
    "recover, inconsistent": Case(after(TWO, in_use), recovering),
    "recover, changed image": Case(after(TWO, touched), recovering),
    "recover, everything in doubt": Case(after(TWO, doubting), recovering),
    "doubt everything": Case(TWO, doubting),
    "several changes": Case(
        USED, on("a", add("b2", 512), merge("b2", "b0", "b1"), remove("b0"), mark("b1"), enable("b1", False))
    ),
    "several nodes": Case(USED, together(a=[mark("b0"), remove("b1")], b=[add("b1"), mark("b0")])),
    "several nodes, some emptied": Case(
        after(EIGHT, on("b", add("b0", 512))),
        together(a=[remove("b0")], b=[mark("b0")], h=[remove("b0")], c=[add("c0")]),
    ),
    "several nodes, a large table": Case(
        after(EIGHT, node("i")), together(**{name: [add("b1")] for name in "abcdefghi"})
    ),
    "move from node to node": Case(USED, moving),
    "tree, a few bits": Case(TREE, on("a", lambda bitmaps: changes.mark(bitmaps, "t", [SIZE // 2, SIZE - 1], [1, 1]))),
    "tree, all dirty in part": Case(TREE, on("a", lambda bitmaps: changes.mark(bitmaps, "t", [1 << 20], [40 << 20]))),
    "tree, clean in part": Case(TREE, on("a", lambda bitmaps: bitmaps["t"].clear(1 << 20, 40 << 20))),
    "tree, all dirty": Case(TREE, on("a", mark_all("t"))),
    "tree, of a copy": Case(TREE, on("a", lambda bitmaps: changes.put(bitmaps, "u", bitmaps["t"]), mark("t"))),
    "tree, removed": Case(TREE, on("a", remove("t"))),
    "streamed, a few bits": Case(
        TREE, on("a", lambda bitmaps: changes.mark(bitmaps, "t", [SIZE // 2, SIZE - 1], [1, 1])), streamed=True
    ),
    "streamed, a new one": Case(USED, on("a", add("c", 512), add("d", 1024)), streamed=True),
    "streamed, merge": Case(after(TREE, on("a", add("u", 512, 41))), on("a", merge("t", "u", "b0")), streamed=True),
    "streamed, merge into a coarser one": Case(TREE, on("a", merge("b0", "t")), streamed=True),
    "streamed, of a copy": Case(
        TREE, on("a", lambda bitmaps: changes.put(bitmaps, "u", bitmaps["t"]), mark("t")), streamed=True
    ),
    "streamed, several leaves": Case(
        after(USED, on("a", add("c", 512))), on("b", add("c", 512), add("d", 512)), LEAF, streamed=True
    ),
    "streamed, resize node": Case(
        after(TREE, node("b"), on("b", add("b0")), resized(2 * SIZE)), of_node(nodes.resize_node, "a"), streamed=True
    ),
    "space map, a second leaf": Case(
        after(USED, on("a", *(add(f"c{i}", 512) for i in range(2)))), on("b", add("c", 512), add("d", 512)), LEAF
    ),
    "space map, an area across leaves": Case(USED, on("a", add("c", 512)), LEAF // 2),
    "space map, an area over several leaves": Case(
        after(EMPTY, node("a", 1 << 30), on("a", add("b0"))), on("a", add("c", 512)), LEAF // 2
    ),
    "space map, leaves given back": Case(
        after(EMPTY, node("a", 1 << 30), on("a", add("b0"), add("c", 512)), MARK), on("a", remove("c")), LEAF // 2
    ),
    "space map, leaves reused": Case(
        after(
            EMPTY, node("a", 1 << 30), on("a", add("b0"), add("c", 512)),
            MARK, on("a", remove("c")), on("a", mark("b0", 9)), on("a", remove("b0")),
        ),
        on("a", add("d", 512)),
        LEAF // 2,
    ),
    "copies: one of the newest damaged": Case(after(USED, damaged(0)), MARK),
    "copies: each first one damaged": Case(after(USED, damaged(0, 1)), MARK),
    "copies: each second one damaged": Case(after(USED, damaged(2, 3)), MARK),
    "copies: first and second one damaged": Case(after(USED, damaged(0, 3)), on("b", mark("b0"))),
    "copies: second and first one damaged": Case(after(USED, damaged(1, 2)), node("c")),
    "copies: first one torn": Case(after(USED, crashed(CRASHED, 1, 100)), MARK),
    "copies: second one outdated": Case(after(USED, crashed(CRASHED, 2)), MARK),
    "copies: second one torn": Case(after(USED, crashed(CRASHED, 2, 100)), MARK),
    "copies: one torn, one damaged, of one slot": Case(after(USED, damaged(0), crashed(CRASHED, 3)), MARK),
    "a lost slot": Case(after(USED, damaged(0, 2)), MARK),
    "a lost slot, the other one": Case(after(USED, damaged(1, 3)), together(b=[mark("b0")])),
    "a lost slot, wrong generation": Case(after(USED, damaged(1, 3, at=63)), MARK),
    "a lost slot, wrong checksum": Case(after(USED, damaged(1, 3, at=4095)), MARK),
    "a lost slot, recover": Case(after(USED, damaged(0, 2)), recovering),
}  # fmt: skip


@pytest.fixture(scope="module")
def tallies(request: pytest.FixtureRequest) -> Iterator[dict[str, Tally]]:
    """States tried, by operation; printed when all is done."""
    found: dict[str, Tally] = {}
    yield found
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        reporter.ensure_newline()
        mutants = found.pop(MUTANTS, Tally()).built
        reporter.write_line(f"{mutants} commits with a sync missing or two writes swapped: each caught")
        reporter.write_line("crash states of stores: built, distinct (all judged)")
        total = sum(found.values(), Tally())
        for name, tally in [*found.items(), (f"total of {len(found)} operations", total)]:
            reporter.write_line(f"{tally.built:8} {tally.distinct:8}  {name}")
    if found.keys() >= {*CASES, *(f"{name}, {TORN}" for name in IN_EVERY_WAY)}:  # all of them ran in this process
        assert total.distinct >= 50_000


MUTANTS = "mutants"
Recorded = Callable[[str], tuple[Path, Recording]]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Each operation runs once: the store afterwards, and what was done to it."""

    @functools.cache
    def run(name: str) -> tuple[Path, Recording]:
        path = tmp_path_factory.mktemp("crash") / "store"
        case = CASES[name]
        with limits_of(case):
            case.prepare(path)
            recording = crash.record(path, case.operate)
        assert path.read_bytes() == recording.final
        return path, recording

    return run


@pytest.mark.parametrize("name", CASES)
def test_every_state_is_old_or_new(name: str, recorded: Recorded, tallies: dict[str, Tally]) -> None:
    _, recording = recorded(name)
    with limits_of(CASES[name]):
        judge = Judge(recording, CHAIN_EFFORT)
        assert judge.old != judge.new
        crash.require_durable(recording)
        tallies[name] = crash.explore(store_crash.shredded(recording), judge, EFFORT) + judge.chained
        assert tallies[name].distinct > 750
        judge.finish(bytearray(recording.final))


TORN = "headers torn in every way"
IN_EVERY_WAY = "mark, free clusters inside", "copies: second one torn"


@pytest.mark.parametrize("name", IN_EVERY_WAY)
def test_headers_torn_in_every_way(name: str, recorded: Recorded, tallies: dict[str, Tally]) -> None:
    """Every subset of the words of a header that a commit changes."""
    _, recording = recorded(name)
    effort = crash.Effort(pieces=13, most=0, random=0)
    epochs = range(1, len(recording.epochs))
    tallies[f"{name}, {TORN}"] = found = crash.explore(
        store_crash.shredded(recording), Judge(recording), effort, epochs
    )
    assert found.distinct > 2000


@pytest.mark.parametrize("name", CASES)
def test_every_sync_is_needed(name: str, recorded: Recorded, tallies: dict[str, Tally]) -> None:
    """Without any one of them, or with two writes across it swapped, some crash does harm: and the judge sees it.

    But for the two copies of a header, which are alike: which of them comes first makes no difference; and where the
    slot was lost before, it is no harm to lose it again.
    """
    _, recording = recorded(name)
    with limits_of(CASES[name]):
        judge = Judge(recording)
        harmless = []
        for mutant in crash.mutants(recording):
            tallies.setdefault(MUTANTS, Tally()).built += 1
            shredded = mutant._replace(recording=store_crash.shredded(mutant.recording))
            if not crash.caught(shredded, judge, MUTANT_EFFORT):
                harmless.append(mutant.what)
    tallies[MUTANTS].built -= len(harmless)
    assert harmless == ["no sync 1"] * name.startswith("a lost slot") + ["swapped at sync 1"]


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("a lost slot")])
def test_doubt_outlives_the_next_commit(name: str, recorded: Recorded) -> None:
    """Once a commit may be lost, every bitmap is all dirty: those that are written, and those that are not."""
    _, recording = recorded(name)
    assert all(namespace.doubted for namespace in store_crash.contents(recording.original).values())
    image = recording.final
    for _ in range(3):
        for namespace in store_crash.contents(image).values():
            old = [bitmap for bitmap in namespace.bitmaps if bitmap.name.startswith(b"b")]
            assert namespace.doubted or all(bitmap.bits == 1 for bitmap in old)
        image = store_crash.record_in_memory(image, store_crash.next_commit).final


def test_a_crash_while_a_store_is_made_leaves_an_empty_one_or_none(tmp_path: Path, tallies: dict[str, Tally]) -> None:
    path = tmp_path / "store"
    path.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "O_EXCL", 0)
        recording = crash.record(path, EMPTY)
    crash.require_durable(recording)

    def judge(image: bytearray) -> None:
        with store_crash.in_memory(image) as name, contextlib.suppress(dm.FormatError):
            report = check(name)
            assert report.check_errors or report.corruptions in (0, 2)  # no store yet, or a lost slot
            with Store(name) as target:
                assert describe_store(target).bitmaps == ()
            store_crash.next_commit(name)
            assert check(name).findings == []

    tallies["create"] = crash.explore(store_crash.shredded(recording), judge, MUTANT_EFFORT)
    assert store_crash.contents(recording.final) == {}


RANDOM_STEPS: list[Callable[[random.Random, Transaction], object]] = [
    lambda rng, bitmaps: add(f"{rng.random()}"[: rng.randrange(3, 16)], 512 << rng.randrange(9), rng.random())(bitmaps),
    lambda rng, bitmaps: changes.remove(bitmaps, rng.choice(list(bitmaps))),
    lambda rng, bitmaps: mark(rng.choice(list(bitmaps)), rng.random())(bitmaps),
    lambda rng, bitmaps: changes.clear(bitmaps, rng.choice(list(bitmaps))),
    lambda rng, bitmaps: changes.rename(bitmaps, rng.choice(list(bitmaps)), f"b{rng.random()}"),
]


@pytest.mark.parametrize("seed", range(6))
def test_one_crash_after_another(seed: int, tmp_path: Path, tallies: dict[str, Tally]) -> None:
    """What crashes leave behind is a sound store to go on with, again and again."""
    rng = random.Random(seed)
    path = tmp_path / "store"
    tally = tallies.setdefault("one crash after another", Tally())

    def operate(path: Path) -> None:
        with Store(str(path)) as target, transaction(target) as namespaces:
            for name in rng.sample(sorted(namespaces), rng.randrange(1, 3)):
                step = rng.choice(RANDOM_STEPS) if namespaces[name] else RANDOM_STEPS[0]
                step(rng, namespaces[name])

    with limits_of(Case(EMPTY, EMPTY, rng.choice([0, 48, 64]), streamed=seed % 2 == 1)):
        USED(path)
        for number in range(12):
            recording = crash.record(path, operate if number % 4 else node(f"node {number}"))
            judge = Judge(recording)
            found = crash.explore(store_crash.shredded(recording), judge, crash.Effort(pieces=4, most=4, random=8))
            judge.finish(bytearray(recording.final))
            tally.built, tally.distinct = tally.built + found.built, tally.distinct + found.distinct
            path.write_bytes(rng.choice([state.image for state in found.sample.values()] + [recording.final]))


# The judge. Each of these is done to a store that a whole, harmless operation has left.


def flipped(image: bytearray, pointer: store_crash.Pointer) -> None:
    image[pointer[0]] ^= 1


def leaking(image: bytearray) -> None:
    with store_crash.in_memory(image) as path, Store(path) as target, target.change() as change:
        change.space.take(1)
        record = change.table.get(b"a")
        assert record
        change.table.put(record)


def twice(image: bytearray) -> None:
    """A directory is given up, and in use."""
    with store_crash.in_memory(image) as path, Store(path) as target, target.change() as change:
        record = change.table.get(b"a")
        assert record
        change.release(record.directory)
        change.table.put(record)


def going_on(image: bytearray) -> None:
    image[:] = store_crash.record_in_memory(image, store_crash.next_commit).final


HARM: dict[str, tuple[str, Callable[[bytearray], object]]] = {
    "the newest header": ("in doubt", lambda image: store_crash.damage(image, 0, 2)),
    "the older header": ("in doubt", lambda image: store_crash.damage(image, 1, 3)),
    "all headers": ("no header copy is whole", lambda image: store_crash.damage(image, 0, 1, 2, 3)),
    "the table": ("damaged", lambda image: flipped(image, Reader(image).header.table)),
    "what the older header leads to": ("damaged", lambda image: flipped(image, Reader(image).newest(1).table)),
    "the space map": ("damaged", lambda image: flipped(image, Reader(image).header.space)),
    "a leak": ("leaked", leaking),
    "used and released": ("used twice", twice),
    "another change": ("neither old nor new", going_on),
}


@pytest.mark.parametrize("what", HARM)
def test_the_judge_sees(what: str, recorded: Recorded) -> None:
    _, recording = recorded("mark, free clusters inside")
    judge = Judge(recording)
    image = bytearray(recording.final)
    judge.finish(image)
    assert Reader(image).slot == 0
    message, damage = HARM[what]
    damage(image)
    with pytest.raises(crash.Harm, match=message):
        judge(image)


def test_the_judge_sees_what_is_missing_at_the_end(recorded: Recorded) -> None:
    _, recording = recorded("mark, free clusters inside")
    judge = Judge(recording)
    judge(bytearray(recording.original))
    with pytest.raises(crash.Harm, match="asked for"):
        judge.finish(bytearray(recording.original))
    # One copy of the new header is missing.
    image = bytearray(recording.final)
    image[8192:12288] = recording.original[8192:12288]
    judge(image)
    with pytest.raises(crash.Harm, match="has put the store in doubt"):
        judge.finish(image)


# Compaction makes another file.


def compacted(path: Path, act: Operation) -> tuple[Recording, list[str]]:
    """What a compaction does to the file that takes the store's place; and what it does to folders, in order."""
    before = path.read_bytes()
    recording = Recording(b"")
    events = []

    class Recorder(File):
        def write(self, offset: int, data: bytes | memoryview) -> None:
            assert self.path != str(path)
            super().write(offset, data)
            recording.step(crash.Write(offset, bytes(data)))

        def sync(self) -> None:
            super().sync()
            recording.sync()

    def replace_file(new: str, old: str) -> None:
        crash.require_durable(recording)
        assert (old, path.read_bytes(), Path(new).read_bytes()) == (str(path), before, recording.final)
        events.append("replace")
        os.rename(new, old)

    with fileio.using(Recorder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace_file)
        patch.setattr(fileio, "sync_folder", lambda where: events.append(f"sync folder of {where}"))
        act(path)
    assert path.read_bytes() == recording.final
    return recording, events


COMPACTED = {
    "empty": EMPTY,
    "used": USED,
    "many": after(EIGHT, node("i")),
    "inconsistent": after(TWO, in_use),
    "a lost slot": after(USED, damaged(0, 2)),
    "after a crash": after(USED, crashed(CRASHED, 2, 100)),
}


@pytest.mark.parametrize("name", COMPACTED)
def test_a_crash_during_compaction_leaves_the_old_file_or_the_new_one(name: str, tmp_path: Path) -> None:
    path = tmp_path / "store"
    COMPACTED[name](path)
    before = Reader(path.read_bytes())
    _, events = compacted(path, lambda path: compact.compact(str(path)))
    assert events == ["replace", f"sync folder of {path}"]
    image = bytearray(path.read_bytes())
    judge = Judge(Recording(before.image, [[crash.Truncate(0), crash.Write(0, bytes(image))]]), CHAIN_EFFORT)
    assert judge.new == judge.old
    judge(image)
    judge.finish(image)
    after = Reader(image)
    assert after.header.generation > before.header.generation
    # Loss of the newest header leads to what was there before: the same, all dirty.
    store_crash.damage(image, after.slot, after.slot + 2)
    assert store_crash.contents(image) == {
        name: namespace._replace(doubted=True) for name, namespace in judge.old.items()
    }
    assert list(tmp_path.glob("*.tmp")) == []
