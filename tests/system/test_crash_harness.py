"""The crash harness itself: it builds the states it should, and its judge sees every kind of harm."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from support import crash, plain, qemu
from support.craft import Craft, Place
from support.crash import Effort, Fault, Recording, Truncate, Write

import dirtmap.engine as dm
from dirtmap.engine.model import changes
from dirtmap.engine.system import file as fileio

EVERYTHING = Effort(pieces=12)


def contents(recording: Recording, effort: Effort = EVERYTHING) -> set[bytes]:
    return {bytes(state.image) for state in crash.states(recording, effort)}


def test_an_epoch_lands_in_any_part_and_only_after_those_before() -> None:
    recording = Recording(b"....", [[Write(0, b"a"), Write(2, b"b")], [Write(0, b"c")]])
    assert contents(recording) == {b"....", b"a...", b"..b.", b"a.b.", b"c.b."}


def test_what_was_never_synced_is_an_epoch_too() -> None:
    recording = Recording(b"..", [[Write(0, b"a")]], [Write(1, b"b")])
    assert contents(recording) == {b"..", b"a.", b"ab"}
    with pytest.raises(crash.Harm, match="not synced"):
        crash.require_durable(recording)


def test_writes_are_torn_at_sectors() -> None:
    recording = Recording(bytes(1536), [[Write(500, b"x" * 600)]])
    parts = [(500, 512), (512, 1024), (1024, 1100)]
    expected = set()
    for chosen in itertools.product((False, True), repeat=3):
        image = bytearray(1536)
        for there, (start, end) in zip(chosen, parts, strict=True):
            image[start:end] = b"x" * (end - start) if there else image[start:end]
        expected.add(bytes(image))
    assert contents(recording) == expected


def test_a_file_may_be_shorter_have_holes_or_be_longer_than_its_data() -> None:
    recording = Recording(b"..", [[Write(2, b"a"), Write(3, b"b")]])
    assert contents(recording) == {b"..", b"..a", b"..\0b", b"..ab", b"..\0\0", b"..a\0"}


def test_a_cut_may_land_without_what_it_undoes() -> None:
    recording = Recording(b"..", [], [Write(2, b"a"), Truncate(2)])
    assert contents(recording) == {b"..", b"..a", b"..\0"}


def test_long_epochs_are_tried_at_the_edges_and_in_between() -> None:
    parts = [list(range(start, start + 5)) for start in range(0, 50, 5)]
    effort = Effort(pieces=3, most=100, random=50)
    tried = [frozenset(chosen) for chosen in crash.subsets(parts, effort, random.Random(0))]
    everything = frozenset(range(50))
    assert {frozenset(), everything} <= set(tried)
    assert {frozenset([number]) for number in everything} <= set(tried)
    assert {everything - {number} for number in everything} <= set(tried)
    assert {frozenset(range(number)) for number in everything} <= set(tried)
    assert {everything - set(part) for part in parts} <= set(tried)
    assert tried == [frozenset(chosen) for chosen in crash.subsets(parts, effort, random.Random(0))]


def write_and_sync(path: Path) -> None:
    with fileio.open_file(str(path), writable=True) as file:
        file.write(0, b"ab")
        file.write(4, b"c")
        file.sync()
        file.truncate(3)
        file.sync()
        file.write(1, b"d")


def test_a_recording_holds_every_step(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"....")
    recording = crash.record(path, write_and_sync)
    assert recording.epochs == [[Write(0, b"ab"), Write(4, b"c")], [Truncate(3)]]
    assert recording.unsynced == [Write(1, b"d")]
    assert recording.final == path.read_bytes() == b"ad."


@pytest.mark.parametrize(
    ("fault", "epochs", "unsynced"),
    [
        (Fault("write", 0), [], []),
        (Fault("write", 0, 1), [], [Write(0, b"a")]),
        (Fault("write", 2), [[Write(0, b"ab"), Write(4, b"c")], [Truncate(3)]], []),
        (Fault("sync", 1), [[Write(0, b"ab"), Write(4, b"c")]], [Truncate(3)]),
    ],
)
def test_a_fault_ends_it(tmp_path: Path, fault: Fault, epochs: object, unsynced: object) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"....")

    def operate(path: Path) -> None:
        with pytest.raises(dm.StorageError, match="injected"):
            write_and_sync(path)

    recording = crash.record(path, operate, fault=fault)
    assert (recording.epochs, recording.unsynced) == (epochs, unsynced)


def test_mutants() -> None:
    one, two, three = Write(0, b"1"), Write(1, b"2"), Write(2, b"3")
    mutants = list(crash.mutants(Recording(b"...", [[one, two], [three]])))
    assert [(mutant.recording.epochs, mutant.recording.unsynced) for mutant in mutants] == [
        ([[one, two, three]], []),
        ([[one, three], [two]], []),
        ([[one, two]], [three]),
    ]


# The judge. Each of these is done to an image that a whole, harmless operation has left.


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    path = tmp_path_factory.mktemp("harness") / "image.qcow2"
    qemu.create(path.with_name("backing.qcow2"), "64M")
    qemu.create(path, "64M", "cluster_size=4096", "-b", "backing.qcow2", "-F", "qcow2")
    header = qemu.read_header(path.read_bytes())
    header.extensions.append((0x12345678, b"unknown"))
    qemu.write_header(path, header)
    qemu.qemu_io(path, "write -q 0 20k")
    with dm.open(path) as image, image.transaction() as bitmaps:
        changes.add(bitmaps, "b0")
        changes.mark(bitmaps, "b0", [8 << 20], [1 << 20])
    craft = Craft(path)
    craft.set(craft.header("autoclear_features"), 1 | 1 << 63)
    craft.leak()
    craft.save(path)

    def operate(path: Path) -> None:
        with dm.open(path) as image, image.transaction() as bitmaps:
            changes.add(bitmaps, "b1")
            changes.mark(bitmaps, "b1", [0], [1 << 20])

    return crash.record(path, operate)


def test_the_plain_reader_reads_what_qemu_reads(recording: Recording, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    qemu.create(tmp_path / "backing.qcow2", "64M")
    path.write_bytes(recording.final)
    found = plain.Reader(recording.final).bitmaps()
    assert {b.name.decode(): 1 << b.granularity_bits for b in found} == {
        name: granularity for name, (granularity, _) in qemu.bitmaps(path).items()
    }
    for bitmap in found:
        expected = dm.Bitmap.from_packed(64 << 20, 1 << bitmap.granularity_bits, bitmap.packed)
        assert qemu.dirty(path, bitmap.name.decode()) == qemu.extents(expected)
    assert plain.leaks(recording.final)


def flipped(offset: Callable[[Craft], int]) -> Callable[[Craft], object]:
    """One byte changed."""
    return lambda craft: craft.put(offset(craft), bytes([craft.data[offset(craft)] ^ 0xFF]))


def guest_table(craft: Craft) -> int:
    return craft.get(Place(craft.get(craft.header("l1_table_offset")), 8)) & plain.OFFSET


def guest_data(craft: Craft) -> int:
    return craft.get(Place(guest_table(craft), 8)) & plain.OFFSET


def autoclear(bits: int) -> Callable[[Craft], object]:
    return lambda craft: craft.set(craft.header("autoclear_features"), bits)


HARM: dict[str, tuple[str, Callable[[Craft], object]]] = {
    "guest data": ("have changed", flipped(guest_data)),
    "guest table": ("have changed", flipped(guest_table)),
    "feature bits": ("have changed", flipped(lambda craft: craft.header("compatible_features").offset)),
    "unknown extension": ("have changed", flipped(lambda craft: craft.extension(0x12345678) + 8)),
    "backing file's name": ("have changed", flipped(lambda craft: craft.get(craft.header("backing_file_offset")))),
    "leaked cluster": ("have changed", flipped(lambda craft: craft.data.index(b"leaked"))),
    "old bits": ("have changed", flipped(lambda craft: craft.data_clusters(0)[0])),
    "new bits": ("neither old nor new", flipped(lambda craft: craft.data_clusters(1)[0])),
    "flags": ("neither old nor new", lambda craft: craft.set(craft.entry(1, "flags"), 0)),
    "void": ("neither old nor new", autoclear(0)),
    "number of bitmaps": ("broken", lambda craft: craft.set(craft.bitmaps("nb_bitmaps"), 1)),
    "pointer into nowhere": ("broken", lambda craft: craft.set(craft.table(1), 1 << 30)),
    "one table twice": (
        "share a cluster",
        lambda craft: craft.set(craft.entry(1, "table_offset"), craft.get(craft.entry(0, "table_offset"))),
    ),
    "unknown feature": ("does not know", autoclear(1 | 1 << 63)),
    "raw external data": ("bit 1", autoclear(3)),
    "uncounted": ("not counted", lambda craft: craft.set_refcount(craft.get(craft.table(1)), 0)),
    "guest data counted twice": ("of guest data", lambda craft: craft.set_refcount(guest_data(craft), 2)),
}


@pytest.mark.parametrize("what", HARM)
def test_the_judge_sees(what: str, recording: Recording) -> None:
    message, damage = HARM[what]
    # As if the operation had written everywhere: a judge looks for harm only where something was written.
    everywhere = Recording(recording.original, [*recording.epochs, [Write(0, recording.final)]])
    judge = crash.Judge(everywhere)
    judge.finish(bytearray(recording.final))
    craft = Craft(recording.final)
    damage(craft)
    with pytest.raises(crash.Harm, match=message):
        judge(craft.data)


def test_the_judge_sees_what_is_missing_at_the_end(recording: Recording) -> None:
    judge = crash.Judge(recording)
    judge(bytearray(recording.original))
    with pytest.raises(crash.Harm, match="asked for"):
        judge.finish(bytearray(recording.original))
    craft = Craft(recording.final)
    craft.leak()
    judge(craft.data)
    with pytest.raises(crash.Harm, match="leaked"):
        judge.finish(craft.data)


def test_void_only_when_all_else_is_done(recording: Recording) -> None:
    judge = crash.Judge(recording, may_void=True)
    craft = Craft(recording.final)
    autoclear(0)(craft)
    judge(craft.copy().data)
    flipped(lambda craft: craft.data.index(b"b1"))(craft)
    with pytest.raises(crash.Harm, match="before the new bitmaps were complete"):
        judge(craft.data)
