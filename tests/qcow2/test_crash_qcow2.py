"""Crashes while a qcow2 image is changed: whatever is left of it, each bitmap is wholly old or wholly new.

Every operation runs once, recorded; then each state that a crash could have left is built and judged by
`support.crash`, a sample by QEMU as well. ``DIRTMAP_CRASH_EFFORT=8 pytest tests/qcow2/test_crash_qcow2.py`` tries some
eight times the states.
"""

from __future__ import annotations

import functools
import os
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import crash, plain, qemu
from support.craft import Craft
from support.hostless import name_image

import dirtmap.engine as dm
from dirtmap.engine.model import changes
from dirtmap.engine.model.transaction import Transaction
from dirtmap.engine.qcow2 import commit
from dirtmap.engine.qcow2.check import check
from dirtmap.engine.qcow2.layout import read_layout
from dirtmap.engine.system import file as fileio
from dirtmap.fmt import qcow2

EFFORT = crash.Effort(random=120, qemu=5).times(int(os.environ.get("DIRTMAP_CRASH_EFFORT", "1")))
MUTANT_EFFORT = crash.Effort(pieces=8, most=24, random=16)

# 16,385 granules of 4 KiB: bits in five sectors, and a last granule that is cut short.
SIZE = (64 << 20) + 1536
UNKNOWN = 0x12345678


@dataclass(frozen=True)
class Case:
    """An operation on an image.

    Attributes:
        prepare: makes the image.
        operate: what is recorded.
        may_void: the extension lies across a sector border, so that its switch takes the bitmaps away for a moment.
        growable: the file gets longer; otherwise it behaves as a block device.
        target: how QEMU opens it.
        large: as if it had so many L2 tables that they are streamed, and not remembered.
    """

    prepare: Callable[[Path], object]
    operate: Callable[[Path], object]
    may_void: bool = False
    growable: bool = True
    target: Callable[[Path], qemu.Target] = Path
    large: bool = False


# Images.


def fill(bitmaps: Transaction, name: str, seed: float, granularity: int | None = None, ranges: int = 400) -> None:
    """A new bitmap with ranges marked here and there."""
    changes.add(bitmaps, name, granularity)
    scatter(bitmaps, name, seed, ranges)


def scatter(bitmaps: Transaction, name: str, seed: float, ranges: int = 400) -> None:
    """Ranges here and there."""
    rng = random.Random(seed)
    offsets = [rng.randrange(bitmaps.size - 4096) for _ in range(ranges)]
    changes.mark(bitmaps, name, offsets, [rng.randrange(1, 4096) for _ in range(ranges)])


def changing(*steps: Callable[[Transaction], object]) -> Callable[[Path], None]:
    """All those changes in one transaction."""

    def operate(path: Path) -> None:
        with dm.open(path) as image, image.transaction() as bitmaps:
            for step in steps:
                step(bitmaps)

    return operate


def add(name: str, **options: int) -> Callable[[Transaction], None]:
    return lambda bitmaps: fill(bitmaps, name, 7, **options)


def remove(name: str) -> Callable[[Transaction], None]:
    return lambda bitmaps: changes.remove(bitmaps, name)


def mark(name: str) -> Callable[[Transaction], None]:
    return lambda bitmaps: scatter(bitmaps, name, 8, 5)


def merge(name: str, *sources: str) -> Callable[[Transaction], None]:
    return lambda bitmaps: changes.merge(bitmaps, name, [bitmaps[source] for source in sources])


def created(
    options: str = "cluster_size=4096", size: int = SIZE, *arguments: str, snapshot: bool = True
) -> Callable[[Path], None]:
    """An image with guest data, and a snapshot of some."""

    def prepare(path: Path) -> None:
        qemu.create(path, size, options, *arguments)
        end = size // 65536 * 65536
        qemu.qemu_io(path, "write -q -P 1 0 20k", f"write -q -P 2 {end - 65536} 20k")
        if snapshot:
            qemu.qemu_img("snapshot", "-c", "first", path)
        qemu.qemu_io(path, "write -q -P 3 8k 30k", f"write -q -P 4 {end // 2} 1k")

    return prepare


def with_changes(prepare: Callable[[Path], object], *operations: Callable[[Path], object]) -> Callable[[Path], None]:
    """An image that has seen these operations."""

    def prepare_more(path: Path) -> None:
        prepare(path)
        for operate in operations:
            operate(path)

    return prepare_more


def with_bitmaps(prepare: Callable[[Path], object], *names: str, **options: int) -> Callable[[Path], None]:
    """With bitmaps that dirtmap made."""

    def add_all(bitmaps: Transaction) -> None:
        for seed, name in enumerate(names):
            fill(bitmaps, name, seed, **options)

    return with_changes(prepare, changing(add_all))


def crafted(prepare: Callable[[Path], object], *steps: Callable[[Craft], object]) -> Callable[[Path], None]:
    """An image changed byte by byte."""

    def prepare_more(path: Path) -> None:
        prepare(path)
        craft = Craft(path)
        for step in steps:
            step(craft)
        craft.save(path)

    return prepare_more


def backed(name: str, options: str = "cluster_size=4096") -> Callable[[Path], None]:
    """With a backing file, whose name is right behind the end of the extensions, where QEMU often puts it."""

    def prepare(path: Path) -> None:
        qemu.create(path.with_name(name), SIZE)
        created(options, SIZE, "-b", name, "-F", "qcow2")(path)
        qemu.write_header(path, qemu.read_header(path.read_bytes()))

    return prepare


def stale_room(craft: Craft) -> None:
    """Bytes that are not zero behind the end of the extensions."""
    start = craft.extension(0) + 8
    craft.put(start, b"\xa5" * (512 - start % 512))


def stale_end(craft: Craft) -> None:
    """Room behind the end, as on a block device that held something else before."""
    craft.append(random.Random(3).randbytes(40 * craft.cluster_size))


def unknown_bits(craft: Craft) -> None:
    place = craft.header("autoclear_features")
    craft.set(place, craft.get(place) | 1 << 61 | 1 << 7)


def void(craft: Craft) -> None:
    place = craft.header("autoclear_features")
    craft.set(place, craft.get(place) & ~1)


def in_use(index: int) -> Callable[[Craft], object]:
    return lambda craft: craft.set(craft.entry(index, "flags"), craft.get(craft.entry(index, "flags")) | 1)


def holes(craft: Craft) -> None:
    """Free clusters, in places one and in places three side by side, with stale bytes in them."""
    offsets = craft.leak(14)
    for number, offset in enumerate(offsets):
        if number not in (1, 5, 6, 13):
            craft.set_refcount(offset, 0)


def behind(craft: Craft) -> None:
    """An unknown extension behind all others."""
    at = craft.extension(0)
    craft.put(at, struct.pack(">II", UNKNOWN, 40) + bytes(range(40)) + bytes(8))


def across(prepare: Callable[[Path], object], payload: int = 496) -> Callable[[Path], None]:
    """With the bitmaps extension moved, by an unknown one before it, so that its data begin at that byte."""

    def step(craft: Craft) -> None:
        at = craft.extension(qcow2.EXTENSION_BITMAPS)
        whole = craft.data[at : at + 32]
        assert craft.get(craft.header("backing_file_offset")) == 0
        filler = payload - 8 - at - 8
        craft.put(at, struct.pack(">II", UNKNOWN, filler) + random.Random(5).randbytes(filler) + whole + bytes(8))

    return crafted(prepare, step)


def external(path: Path) -> None:
    qemu.create(path, SIZE, f"cluster_size=4096,data_file={path.with_suffix('.raw')},data_file_raw=on")
    qemu.qemu_io(path, "write -q -P 1 0 20k")


def encrypted(path: Path) -> None:
    target = qemu.create(path, 1 << 20, "cluster_size=4096", encrypted=True)
    qemu.qemu_io(target, "write -q -P 1 0 20k")


def compressed(path: Path) -> None:
    plain_image = path.with_suffix(".plain")
    created()(plain_image)
    qemu.qemu_img("convert", "-c", "-O", "qcow2", "-o", "cluster_size=4096,compression_type=zstd", plain_image, path)


def filled(prepare: Callable[[Path], object], clusters: int) -> Callable[[Path], None]:
    """With guest data until the file has that many clusters, or a few less."""

    def prepare_more(path: Path) -> None:
        prepare(path)
        size = Craft(path).cluster_size
        at = 1 << 20
        while (left := clusters - -(-path.stat().st_size // size)) > 1:
            length = max(left * 3 // 4, 1) * size
            qemu.qemu_io(path, f"write -q -P 5 {at} {length}")
            at += length

    return prepare_more


def free_leaks(path: Path) -> None:
    check(str(path), repair="leaks")


def named(name: str | None) -> Callable[[Path], None]:
    """Gives the image this name as a node, or takes it away."""

    def operate(path: Path) -> None:
        name_image(path, name)

    return operate


PLAIN = created()
ONE = with_bitmaps(PLAIN, "b0")
TWO = with_bitmaps(PLAIN, "b0", "b1")
# Refcount blocks of 64 counts, tables of 64 blocks: a block covers 32 KiB, a table 2 MiB.
TINY = created("cluster_size=512,refcount_bits=64", 16 << 20)
LONG_NAME = "a-backing-file-with-a-long-name-indeed.qcow2"

CASES = {
    "add first": Case(PLAIN, changing(add("b0"))),
    "add first, 64 KiB clusters": Case(created("cluster_size=65536"), changing(add("b0", granularity=512))),
    "add first, stale bytes behind the end": Case(crafted(PLAIN, stale_room), changing(add("b0"))),
    "add first, name behind the end": Case(backed(LONG_NAME), changing(add("b0"))),
    "add first, short name behind the end": Case(backed("b"), changing(add("b0"))),
    "add first, raw external data": Case(external, changing(add("b0"))),
    "add first, encrypted": Case(encrypted, changing(add("b0")), target=qemu.Encrypted),
    "add first, old ones void": Case(crafted(TWO, void), changing(add("b0"))),
    "add first, old ones void, across a sector border": Case(crafted(across(ONE), void), changing(add("b0"))),
    "add first, into vacant room": Case(
        with_changes(crafted(ONE, behind), changing(remove("b0"))), changing(add("a longer name"))
    ),
    "add second": Case(ONE, changing(add("b1"))),
    "add empty": Case(ONE, changing(lambda bitmaps: changes.add(bitmaps, "b1"))),
    "add, neighbour in use": Case(crafted(TWO, in_use(0)), changing(add("b2"))),
    "add, 1-bit refcounts": Case(
        with_bitmaps(created("refcount_bits=1,cluster_size=4096", snapshot=False), "b0"), changing(add("b1"))
    ),
    "add, free clusters inside": Case(crafted(ONE, holes), changing(add("b1", granularity=512))),
    "add, block device": Case(crafted(ONE, stale_end), changing(add("b1")), growable=False),
    "add, large image, free clusters inside": Case(
        crafted(ONE, holes), changing(add("b1", granularity=512)), large=True
    ),
    "add, large image, compressed clusters, free ones inside": Case(
        crafted(with_bitmaps(compressed, "b0"), holes), changing(add("b1")), large=True
    ),
    "add, large image, extended L2 entries, free clusters inside": Case(
        crafted(with_bitmaps(created("cluster_size=16k,extended_l2=on"), "b0"), holes), changing(add("b1")), large=True
    ),
    "add, large image, block device": Case(crafted(ONE, stale_end), changing(add("b1")), growable=False, large=True),
    "add, raw external data, free clusters inside": Case(
        crafted(with_bitmaps(external, "b0"), holes), changing(add("b1")), large=True
    ),
    "mark, large image, freed clusters again": Case(
        with_changes(TWO, changing(mark("b1")), changing(remove("b0")), changing(add("b0"))),
        changing(mark("b0")),
        large=True,
    ),
    "add, compressed clusters": Case(with_bitmaps(compressed, "b0"), changing(add("b1"))),
    "add, extended L2 entries": Case(
        with_bitmaps(created("cluster_size=16k,extended_l2=on"), "b0"), changing(add("b1"))
    ),
    # Images that have just about as many clusters as they can count.
    "add, a refcount block more": Case(with_bitmaps(filled(TINY, 64 * 6 - 4), "b0"), changing(add("b1"))),
    "add first, a refcount block more": Case(filled(TINY, 64 * 6), changing(add("b0"))),
    "add first, a refcount block more, name behind the end": Case(
        filled(backed(LONG_NAME, "cluster_size=512,refcount_bits=64"), 64 * 12), changing(add("b0", granularity=512))
    ),
    "add, several refcount blocks more": Case(
        filled(with_bitmaps(created("cluster_size=512,refcount_bits=64", 128 << 20), "b0"), 64 * 8),
        changing(*(add(name, granularity=512) for name in ("b1", "b2", "b3", "b4"))),
    ),
    "add, a longer refcount table": Case(with_bitmaps(filled(TINY, 64 * 64 - 4), "b0"), changing(add("b1"))),
    "add first, a longer refcount table": Case(filled(TINY, 64 * 64), changing(add("b0", granularity=512))),
    "add, unknown autoclear bits": Case(crafted(ONE, unknown_bits), changing(add("b1"))),
    "add first, unknown autoclear bits": Case(crafted(PLAIN, unknown_bits), changing(add("b0"))),
    "add, across a sector border": Case(across(ONE), changing(add("b1")), may_void=True),
    "add, across a sector border, unknown autoclear bits": Case(
        crafted(across(ONE, 504), unknown_bits), changing(add("b1")), may_void=True
    ),
    "add, across a sector border, a refcount block more": Case(
        across(filled(with_bitmaps(created("cluster_size=1024,refcount_bits=64"), "b0"), 128)),
        changing(add("b1", granularity=512)),
        may_void=True,
    ),
    "remove one": Case(TWO, changing(remove("b0"))),
    "remove one, across a sector border": Case(across(TWO, 504), changing(remove("b0")), may_void=True),
    "remove last": Case(ONE, changing(remove("b0"))),
    "remove last, unknown extension behind": Case(crafted(ONE, behind), changing(remove("b0"))),
    "remove last, unknown autoclear bits": Case(crafted(ONE, unknown_bits), changing(remove("b0"))),
    "remove last, across a sector border": Case(across(ONE), changing(remove("b0"))),
    "remove one in use": Case(crafted(TWO, in_use(0)), changing(remove("b0"))),
    "clear": Case(TWO, changing(lambda bitmaps: changes.clear(bitmaps, "b0"))),
    "mark": Case(TWO, changing(mark("b1"))),
    "mark, 64 KiB clusters": Case(
        with_bitmaps(created("cluster_size=65536"), "b0", granularity=512), changing(mark("b0"))
    ),
    "mark, a few of many clusters": Case(with_bitmaps(TINY, "b0", granularity=512), changing(mark("b0"))),
    "mark, across a sector border": Case(across(TWO), changing(mark("b1")), may_void=True),
    "merge": Case(TWO, changing(merge("b0", "b1"))),
    "rename": Case(TWO, changing(lambda bitmaps: changes.rename(bitmaps, "b1", "a longer name"))),
    "enable": Case(
        with_changes(TWO, changing(lambda bitmaps: changes.set_recording(bitmaps, "b0", False))),
        changing(lambda bitmaps: changes.set_recording(bitmaps, "b0", True)),
    ),
    "disable": Case(TWO, changing(lambda bitmaps: changes.set_recording(bitmaps, "b0", False))),
    "recover": Case(crafted(TWO, in_use(0), in_use(1)), dm.recover),
    "recover void ones": Case(crafted(TWO, void), dm.recover),
    "recover void ones, large image": Case(crafted(TWO, void, holes), dm.recover, large=True),
    "several changes": Case(TWO, changing(add("b2"), merge("b2", "b0", "b1"), remove("b0"), mark("b1"))),
    "first identity": Case(PLAIN, named("disk")),
    "first identity, stale bytes behind the end": Case(crafted(PLAIN, stale_room), named("disk")),
    "first identity, name behind the end": Case(backed(LONG_NAME), named("disk")),
    "first identity, unknown autoclear bits": Case(crafted(ONE, unknown_bits), named("disk")),
    "another identity": Case(with_changes(ONE, named("disk")), named("another name")),
    "another identity, into vacant room": Case(with_changes(PLAIN, named("disk"), named(None)), named("name")),
    "no identity any more": Case(with_changes(ONE, named("disk")), named(None)),
    "add first, identity before": Case(with_changes(PLAIN, named("disk")), changing(add("b0"))),
    "remove last, identity behind": Case(with_changes(ONE, named("disk")), changing(remove("b0"))),
    "check -r leaks": Case(crafted(created("refcount_bits=64"), lambda craft: craft.leak(300)), free_leaks),
    "check -r leaks, unknown autoclear bits": Case(crafted(ONE, unknown_bits, lambda craft: craft.leak()), free_leaks),
}


def mending(path: Path) -> None:
    check(str(path), repair="all")


Recorded = Callable[[str], tuple[Path, crash.Recording]]
MUTANTS = "mutants"

# Damaged images, by what is wrong with them.
DAMAGED = {
    "check -r all, a bad entry": crafted(TWO, lambda craft: craft.set(craft.entry(0, "flags"), 0x82)),
    "check -r all, a bad entry and leaks": crafted(
        TWO, lambda craft: craft.leak(3), lambda craft: craft.set(craft.table(1), 0x80)
    ),
    "check -r all, one table twice": crafted(
        with_bitmaps(PLAIN, "b0", "b1", "b2"),
        lambda craft: craft.set(craft.entry(1, "table_offset"), craft.get(craft.entry(0, "table_offset"))),
    ),
    "check -r all, counts too low and too high": crafted(
        TWO,
        lambda craft: craft.leak(),
        lambda craft: craft.set_refcount(craft.data_clusters(1)[0], 0),
        lambda craft: craft.set_refcount(craft.get(craft.header("l1_table_offset")), 0),
    ),
    "check -r all, no good bitmap left": crafted(ONE, lambda craft: craft.set(craft.entry(0, "type"), 9), behind),
    "check -r all, across a sector border": crafted(
        across(TWO), lambda craft: craft.set(craft.entry(0, "granularity_bits"), 40)
    ),
}


class VoidJudge(crash.Judge):
    """As `Judge`, where void bitmaps come back: as long as they are void, `recover` can still bring them back."""

    def __call__(self, image: bytearray) -> None:
        super().__call__(image)
        if not plain.Reader(image).bitmaps():
            with crash.in_memory(image) as path, fileio.open_file(path) as file:
                layout = read_layout(file, void=True)
            if layout.faults or [slot.entry.name for slot in layout.slots] != [bitmap.name for bitmap in self.new]:
                raise crash.Harm("void bitmaps are lost")


def judge_of(name: str, recording: crash.Recording) -> crash.Judge | crash.RepairJudge:
    if name in DAMAGED:
        return crash.RepairJudge(recording, may_void="across" in name)
    case = CASES[name]
    kind = VoidJudge if name.startswith("recover void") and not case.may_void else crash.Judge
    return kind(recording, may_void=case.may_void)


@pytest.fixture(scope="module")
def tallies(request: pytest.FixtureRequest) -> Iterator[dict[str, crash.Tally]]:
    """States tried, by operation; printed when all is done."""
    found: dict[str, crash.Tally] = {}
    yield found
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        reporter.ensure_newline()
        mutants = found.pop(MUTANTS, crash.Tally()).built
        reporter.write_line(f"{mutants} commits with a sync missing or two steps swapped: each caught")
        reporter.write_line("crash states: built, distinct (all judged), judged by QEMU as well")
        total = sum(found.values(), crash.Tally())
        for name, tally in [*found.items(), (f"total of {len(found)} operations", total)]:
            reporter.write_line(f"{tally.built:8} {tally.distinct:8} {tally.qemu:6}  {name}")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Each operation runs once: the image afterwards, and what was done to it."""

    @functools.cache
    def run(name: str) -> tuple[Path, crash.Recording]:
        path = tmp_path_factory.mktemp("crash") / "image.qcow2"
        case = CASES[name] if name in CASES else Case(DAMAGED[name], mending)
        case.prepare(path)
        with pytest.MonkeyPatch.context() as patch:
            if case.large:
                patch.setattr(commit, "_PROOF_BUDGET", 0)
            recording = crash.record(path, case.operate, growable=case.growable)
        assert path.read_bytes() == recording.final
        return path, recording

    return run


@pytest.mark.parametrize("name", CASES)
def test_every_state_is_old_or_new(name: str, recorded: Recorded, tallies: dict[str, crash.Tally]) -> None:
    path, recording = recorded(name)
    judge = judge_of(name, recording)
    crash.require_durable(recording)
    tallies[name] = tally = crash.explore(recording, judge, EFFORT)
    judge.finish(bytearray(recording.final))
    for number, state in enumerate(tally.sample.values()):
        # Beside the image, where its backing file and its data file are.
        copy = path.with_name("crashed.qcow2")
        copy.write_bytes(state.image)
        judged_by_qemu(CASES[name].target(copy), plain.Reader(state.image), contents=number == 0)
        tally.qemu += 1


def judged_by_qemu(target: qemu.Target, reader: plain.Reader, *, contents: bool) -> None:
    """QEMU finds leaks at worst, lists the bitmaps that are there, and dirtmap frees what leaked."""
    found = reader.bitmaps()
    assert qemu.bitmaps(target) == {
        bitmap.name.decode(): (
            1 << bitmap.granularity_bits,
            {flag for bit, flag in ((1, "in-use"), (2, "auto")) if bitmap.flags & bit},
        )
        for bitmap in found
    }
    qemu.qemu_img("check", *qemu.opened(target), status=3 if plain.leaks(reader.image) else 0)
    for bitmap in found if contents else ():
        if not bitmap.flags & 1:
            expected = dm.Bitmap.from_packed(reader.header.size, 1 << bitmap.granularity_bits, bitmap.packed)
            assert qemu.dirty(target, bitmap.name.decode()) == qemu.extents(expected)
    if crash.checked(bytearray(reader.image)).leaks:  # which may be past the end of the file: QEMU does not look there
        check(os.fspath(target), repair="leaks")
        qemu.check(target)
        assert plain.Reader(Path(target).read_bytes()).bitmaps() == found


@pytest.mark.parametrize("name", [name for name in CASES if "refcount block" in name or "refcount table" in name])
def test_the_refcounts_do_grow(name: str, recorded: Recorded) -> None:
    """These operations are what their names say."""
    _, recording = recorded(name)
    old, new = plain.Reader(recording.original), plain.Reader(recording.final)
    tables = [reader.header.refcount_table for reader in (old, new)]
    blocks = [len(reader.refcounts()) - table[1] for reader, table in zip((old, new), tables, strict=True)]
    assert (tables[0][1] < tables[1][1]) == ("table" in name or "several" in name)
    assert blocks[1] - blocks[0] > 1 if "several" in name else blocks[1] - blocks[0] == 1


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].large])
def test_free_clusters_are_used_again(name: str, recorded: Recorded) -> None:
    """These operations are what their names say: they write into clusters that were free, and hardly behind the end."""
    _, recording = recorded(name)
    taken = used_by_bitmaps(recording.final) - used_by_bitmaps(recording.original)
    end = len(recording.original) // plain.Reader(recording.original).cluster
    assert taken
    assert len([number for number in taken if number < end]) >= (len(taken) + 1) // 2


def used_by_bitmaps(image: bytes) -> set[int]:
    """The numbers of their clusters."""
    reader = plain.Reader(image)
    reader.bitmaps()
    return set(reader.references)


@pytest.mark.parametrize("name", DAMAGED)
def test_every_state_is_damaged_or_mended(name: str, recorded: Recorded, tallies: dict[str, crash.Tally]) -> None:
    path, recording = recorded(name)
    judge = judge_of(name, recording)
    crash.require_durable(recording)
    tallies[name] = crash.explore(recording, judge, EFFORT)
    judge.finish(bytearray(recording.final))
    qemu.check(path)


# A repair is several commits: of the bitmaps, of counts too low, of counts too high. Each is durable when it ends,
# even where the next could do without: at these syncs.
SPARE = {
    "check -r all, no good bitmap left": 1,
    "check -r all, across a sector border": 3,
    "check -r all, counts too low and too high": 0,
}


@pytest.mark.parametrize("name", [*CASES, *DAMAGED])
def test_every_sync_is_needed(name: str, recorded: Recorded, tallies: dict[str, crash.Tally]) -> None:
    """Without any one of them, or with two steps across it swapped, some crash does harm: and the judge sees it."""
    _, recording = recorded(name)
    judge = judge_of(name, recording)
    mutants = [mutant for mutant in crash.mutants(recording) if mutant.epochs[0] != SPARE.get(name)]
    assert mutants
    tallies.setdefault(MUTANTS, crash.Tally()).built += len(mutants)
    assert [mutant.what for mutant in mutants if not crash.caught(mutant, judge, MUTANT_EFFORT)] == []


# What can fail on the way, in an image whose commit has an epoch of every kind; and in a plain one.
FAILING = (
    "add first, a refcount block more, name behind the end",
    "add second",
    "add, a longer refcount table",
    "add, across a sector border, unknown autoclear bits",
    "add first, into vacant room",
    "add first, old ones void",
    "add, free clusters inside",
    "remove last",
    "check -r leaks, unknown autoclear bits",
)


@pytest.mark.parametrize("name", FAILING)
def test_failed_write_or_sync(name: str, recorded: Recorded, tmp_path: Path) -> None:
    """The operating system refuses one write or sync: that is reported, and every state is still old or new."""
    _, good = recorded(name)
    case = CASES[name]
    judge = crash.Judge(good, may_void=case.may_void)
    path = tmp_path / "image.qcow2"

    def operate(path: Path) -> None:
        with pytest.raises(dm.StorageError, match="injected"):
            case.operate(path)

    for fault in faults(good):
        path.write_bytes(good.original)
        recording = crash.record(path, operate, growable=case.growable, fault=fault)
        # What the syncs before it made durable has been judged already.
        crash.explore(recording, judge, MUTANT_EFFORT, only=[len(recording.epochs)])
        judge(bytearray(recording.final))
        if fault.action == "write" and not recording.epochs:
            assert len(recording.final) == len(good.original)


def faults(recording: crash.Recording) -> Iterator[crash.Fault]:
    """Each sync, and the first and the last write of each epoch: at once, or after their first sector."""
    done = 0
    for number, epoch in enumerate(recording.epochs):
        yield crash.Fault("sync", number)
        for index in {0, len(epoch) - 1}:
            yield crash.Fault("write", done + index)
            parts = crash.pieces(epoch[index : index + 1], len(recording.final))[0]
            if len(parts) > 1:
                yield crash.Fault("write", done + index, len(parts[0].data))
        done += len(epoch)


STEPS: list[Callable[[Transaction, random.Random], object]] = [
    lambda bitmaps, rng: fill(bitmaps, f"{rng.random()}"[: rng.randrange(3, 16)], rng.random(), ranges=9),
    lambda bitmaps, rng: changes.remove(bitmaps, rng.choice(list(bitmaps))),
    lambda bitmaps, rng: scatter(bitmaps, rng.choice(list(bitmaps)), rng.random(), 3),
    lambda bitmaps, rng: changes.clear(bitmaps, rng.choice(list(bitmaps))),
    lambda bitmaps, rng: changes.rename(bitmaps, rng.choice(list(bitmaps)), f"b{rng.random()}"[: rng.randrange(3, 16)]),
    lambda bitmaps, rng: [changes.remove(bitmaps, name) for name in list(bitmaps)],
]


@pytest.mark.parametrize("seed", range(8))
def test_one_crash_after_another(seed: int, tmp_path: Path, tallies: dict[str, crash.Tally]) -> None:
    """What crashes leave behind is a sound image to go on with, again and again."""
    rng = random.Random(seed)
    images = [across(ONE), PLAIN, backed(LONG_NAME), TINY, crafted(TWO, behind), crafted(PLAIN, stale_room)]
    path = tmp_path / "image.qcow2"
    number = seed % len(images)
    images[number](path)
    tally = tallies.setdefault("one crash after another", crash.Tally())
    for _ in range(10):
        step = rng.choice(STEPS)
        with dm.open(path) as image:
            if not len(image):
                step = STEPS[0]
        recording = crash.record(path, changing(lambda bitmaps, step=step: step(bitmaps, rng)))
        judge = crash.Judge(recording, may_void=number == 0)
        found = crash.explore(recording, judge, crash.Effort(pieces=4, most=4, random=4, qemu=8))
        tally.built, tally.distinct = tally.built + found.built, tally.distinct + found.distinct
        judge.finish(bytearray(recording.final))
        path.write_bytes(rng.choice(list(found.sample.values())).image if found.sample else recording.final)
    check(str(path), repair="leaks")
    qemu.check(path)
