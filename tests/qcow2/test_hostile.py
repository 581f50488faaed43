"""Images made to do harm: where structures lead, and QEMU as the judge of what is refused.

`test_hostile_fields` tries single fields in process; here are the images that are dangerous as a whole.
`test_hostile_bounds` has those that claim to hold too much.
"""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import qemu
from support.craft import Craft, Place
from support.hostile import CHANGING, MIB, READING, Unsynced, require_good_message

import dirtmap.engine as dm
from dirtmap.engine.model import changes
from dirtmap.engine.system.file import using
from dirtmap.fmt import qcow2
from dirtmap.fmt.extensions import END_MARKER

CLUSTER = 4096
NAMES = ("one", "two", "three")


@pytest.fixture(autouse=True, scope="module")
def unsynced() -> Iterator[None]:
    with using(Unsynced):
        yield


def built(path: Path, options: str, *, snapshot: bool = False) -> Craft:
    target = qemu.create(path, MIB, options)
    if "compat=0.10" not in options:
        with dm.open(path) as image, image.transaction() as bitmaps:  # QEMU's own tool wants a password for some
            for name in NAMES:
                changes.add(bitmaps, name, 4096)
    qemu.qemu_io(target, "write -q 0 64k", "write -q 512k 4k")
    if snapshot:
        qemu.qemu_img("snapshot", "-c", "s", path)
        qemu.qemu_io(target, "write -q 0 4k")
    return Craft(path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Craft]:
    folder = tmp_path_factory.mktemp("sound")
    return {
        "plain": built(folder / "plain", f"cluster_size={CLUSTER}"),
        "snapshot": built(folder / "snapshot", f"cluster_size={CLUSTER}", snapshot=True),
        "version 2": built(folder / "v2", f"cluster_size={CLUSTER},compat=0.10", snapshot=True),
        "one bit": built(folder / "1bit", f"cluster_size={CLUSTER},refcount_bits=1"),
        "small clusters": built(folder / "small", "cluster_size=512", snapshot=True),
    }


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """Where each damaged image is put: memory, since thousands are."""
    memory = Path("/dev/shm")
    place = (memory if memory.is_dir() else tmp_path) / f"dirtmap-hostile-{os.getpid()}.qcow2"
    yield place
    place.unlink(missing_ok=True)


# Every operation, and how it came out.


@dataclass
class Outcome:
    """What became of an image: the complaint of each operation that refused it, and what the others made of it."""

    refused: dict[str, str] = field(default_factory=dict)
    changed: dict[str, bytes] = field(default_factory=dict)

    @property
    def accepted(self) -> bool:
        return "read" not in self.refused


def tried(craft: Craft, path: Path, *, rewrite: bool = True) -> Outcome:
    """Every operation on that image: each works or raises `Error`, which leaves the file as it was."""
    before = bytes(craft.data)
    outcome = Outcome()
    path.write_bytes(before)
    for name, act in (READING | CHANGING).items():
        try:
            act(path)
        except dm.Error as error:
            require_good_message(error, path)
            outcome.refused[name] = str(error)
        if name in outcome.refused:
            assert path.read_bytes() == before, f"{name} refused, and has changed it: {outcome.refused[name]}"
            continue
        assert path.stat().st_size < len(before) + 16 * MIB, name
        after = path.read_bytes()
        if after != before:
            assert name in CHANGING
            outcome.changed[name] = after
            path.write_bytes(before)
    return outcome


# QEMU as the judge.


def qemu_refuses(path: Path) -> str | None:
    """Why `qemu-img info` does not open it."""
    done = subprocess.run(["qemu-img", "info", "-f", "qcow2", path], capture_output=True, check=False, timeout=60)
    return done.stderr.decode(errors="replace") if done.returncode else None


def qemu_check(path: Path) -> tuple[int, int] | None:
    """Errors, corruptions included, and leaks that `qemu-img check` counts; None where it does not open the image."""
    command = ["qemu-img", "check", "--output=json", "-f", "qcow2", path]
    done = subprocess.run(command, capture_output=True, check=False, timeout=60)
    try:
        found = json.loads(done.stdout)
    except ValueError:
        return None
    return found.get("corruptions", 0) + found["check-errors"], found.get("leaks", 0)


def save_without_bitmaps(craft: Craft, path: Path) -> None:
    autoclear = craft.header("autoclear_features")
    craft.copy().set(autoclear, craft.get(autoclear) & ~qcow2.AUTOCLEAR_BITMAPS).save(path)


def require_no_worse(craft: Craft, outcome: Outcome, path: Path) -> None:
    """What an operation made of an image QEMU opens, and finds no more errors in than before."""
    if not outcome.changed:
        return
    craft.save(path)
    before = qemu_check(path)
    bare = before is None
    if bare:
        save_without_bitmaps(craft, path)
        before = qemu_check(path)
    for name, data in outcome.changed.items():
        path.write_bytes(data)
        after = qemu_check(path)
        if outcome.accepted or name == "check -r all":  # `recover` leaves what else is wrong as it is
            # There are images that QEMU opens and then cannot check.
            assert after is not None or (before is None and qemu_refuses(path) is None), name
        if bare and after is not None:  # what is wrong with bitmaps was not counted before, either
            save_without_bitmaps(Craft(data), path)
            after = qemu_check(path)
        if before is not None and after is not None:
            assert after[0] <= before[0], (name, before, after)


# What dirtmap refuses although QEMU opens it, and why that is right.
STRICTER = {
    r"past the end of the file": "QEMU reads zeros there: dirty bits lost, or another structure to be written there",
    r"overlaps": "freeing or writing one would destroy the other",
    r"0 is the header's place": "a table over the header",
    r"header_length: \d+ is not a multiple of 8": "the format demands it; extensions would lie askew",
    r"backing_file_offset: \d+ lies inside the header": "the name would be part of the header",
    r"name contains a NUL byte": "QEMU takes names for C strings: two could be one",
    r"autoclear feature bit 0 \(bitmaps\) is set": "bitmaps were there, and were lost",
    r"appears twice": "which was meant cannot be known",
    r"external data file: there is none": "QEMU finds out when it opens it for more than its information",
    r"raw external data\) is set": "the same",
    r"is not a power of two|header ends": "sizes that only `info` takes",
}


def judge(craft: Craft, path: Path) -> Outcome:
    """Tries everything; then what dirtmap accepts, QEMU does, and the other way round but for `STRICTER`."""
    outcome = tried(craft, path)
    craft.save(path)
    complaint = qemu_refuses(path)
    if outcome.accepted:
        assert complaint is None
    elif complaint is None:
        assert any(re.search(reason, outcome.refused["read"]) for reason in STRICTER), outcome.refused["read"]
    require_no_worse(craft, outcome, path)
    return outcome


def limits(craft: Craft, place: Place) -> list[int]:
    """A field's limits, the places of other structures, and numbers about as long as the file."""
    cluster, end = craft.cluster_size, len(craft.data)
    values = {0, 1, 2, 8, 511, 512, cluster - 1, cluster, cluster + 512, 2 * cluster, 3 * cluster}
    values |= {end - 1, end, -(-end // cluster) * cluster, end // cluster * cluster, 1 << 31, (1 << 32) - 1, 1 << 55}
    values |= {(1 << 56) - cluster, (1 << 63) - cluster, place.most, place.most - 1, place.most >> 1, 1 << 62}
    values |= {craft.get(where) & qcow2.OFFSET_MASK for _, where in craft.fields() if where.size == 8}
    own = craft.get(place)
    values |= {own - 1, own + 1, own ^ 1 << 63, own ^ 1 << 62, own + cluster}
    return sorted(value for value in values if 0 <= value <= place.most and value != own)


SAMPLES = {"plain": 3, "snapshot": 3, "version 2": 2, "one bit": 2, "small clusters": 3}


@pytest.mark.parametrize("kind", SAMPLES)
def test_fields_as_qemu_judges_them(sound: dict[str, Craft], path: Path, kind: str) -> None:
    """A sample; `test_all_fields_as_qemu_judges_them` takes all."""
    craft = sound[kind]
    number = 0
    for _, place in craft.fields():
        for value in limits(craft, place):
            number += 7  # not a divisor of how many there are of each
            if number % 300 < 7 * SAMPLES[kind]:
                judge(craft.copy().set(place, value), path)


@pytest.mark.long
@pytest.mark.parametrize("kind", SAMPLES)
def test_all_fields_as_qemu_judges_them(sound: dict[str, Craft], path: Path, kind: str) -> None:
    craft = sound[kind]
    judged = [
        judge(craft.copy().set(place, value), path) for _, place in craft.fields() for value in limits(craft, place)
    ]
    assert len(judged) > 500
    assert any(outcome.accepted for outcome in judged)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("L1 entry", lambda craft: craft.l1()),
        ("L2 entry", lambda craft: craft.l2()),
        ("a snapshot's L1 table", lambda craft: craft.snapshot(0, "l1_table_offset")),
    ],
)
def test_nothing_is_written_where_the_guest_would_find_it(
    sound: dict[str, Craft], path: Path, name: str, place: Callable[[Craft], Place]
) -> None:
    """References to the end of the file, where a change would put what is new."""
    craft = sound["snapshot"].copy()
    craft.set(place(craft), -(-len(craft.data) // CLUSTER) * CLUSTER)
    outcome = judge(craft, path)
    assert "a reference that makes no sense leads there" in outcome.refused["add"]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["snapshot", "version 2", "small clusters"])
def test_cut_at_every_sector(sound: dict[str, Craft], path: Path, kind: str) -> None:
    for size in range(0, len(sound[kind].data), 512):
        judge(Craft(sound[kind].data[:size]), path)


# Structures that lead to each other.


def _table_at(index: int, where: Callable[[Craft], int]) -> Callable[[Craft], Craft]:
    return lambda c: c.set(c.entry(index, "table_offset"), where(c))


def _bits_at(index: int, where: Callable[[Craft], int]) -> Callable[[Craft], Craft]:
    return lambda c: c.set(c.table(index), where(c))


def _directory_at(where: Callable[[Craft], int]) -> Callable[[Craft], Craft]:
    def act(c: Craft) -> Craft:
        at, size = c.get(c.bitmaps("directory_offset")), c.get(c.bitmaps("directory_size"))
        return c.put(where(c), bytes(c.data[at : at + size])).set(c.bitmaps("directory_offset"), where(c))

    return act


PLACES: dict[str, Callable[[Craft], int]] = {
    "refcount table": lambda c: c.get(c.header("refcount_table_offset")),
    "L1 table": lambda c: c.get(c.header("l1_table_offset")),
    "snapshot table": lambda c: c.get(c.header("snapshots_offset")),
    "L1 table of a snapshot": lambda c: c.get(c.snapshot(0, "l1_table_offset")),
    "directory": lambda c: c.get(c.bitmaps("directory_offset")),
    "table of another bitmap": lambda c: c.get(c.entry(1, "table_offset")),
    "bits of another bitmap": lambda c: c.data_clusters(1)[0],
}
# These are found by a walk only: reading harms nothing, and whatever would free or write to them is refused.
WALKED: dict[str, Callable[[Craft], int]] = {
    "refcount block": lambda c: c.get(c.block()),
    "L2 table": lambda c: c.get(c.l1()) & qcow2.OFFSET_MASK,
    "guest data": lambda c: c.get(c.l2()) & qcow2.OFFSET_MASK,
}


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("what", ["table", "bits", "directory"])
def test_overlaps_are_refused(sound: dict[str, Craft], path: Path, what: str, where: str) -> None:
    craft = sound["snapshot"].copy()
    moved = {"table": _table_at, "bits": _bits_at}
    (moved[what](0, PLACES[where]) if what in moved else _directory_at(PLACES[where]))(craft)
    if (what, where) == ("directory", "directory"):
        return  # where it is already
    outcome = tried(craft, path)
    assert set(outcome.refused) >= {"read", "add", "remove", "mark"}
    craft.save(path)
    assert dm.check(path).corruptions
    if what != "directory":
        assert "bitmap 'one'" in str(dm.check(path).findings)
    if qemu_refuses(path) is None:
        require_no_worse(craft, outcome, path)


@pytest.mark.parametrize("where", WALKED)
@pytest.mark.parametrize("what", ["table", "bits", "directory"])
def test_overlaps_with_guest_data_and_refcounts(sound: dict[str, Craft], path: Path, what: str, where: str) -> None:
    craft = sound["snapshot"].copy()
    at = WALKED[where](craft)
    if what == "table":  # an empty table, or QEMU's check of entries would refuse whatever lies there
        craft.put(at, bytes(8))
    moved = {"table": _table_at, "bits": _bits_at}
    (moved[what](0, WALKED[where]) if what in moved else _directory_at(WALKED[where]))(craft)
    outcome = tried(craft, path)
    if outcome.accepted:
        assert "remove" in outcome.refused  # it would free the cluster
        if where == "refcount block":
            assert "add" in outcome.refused  # it would write there
    craft.save(path)
    assert dm.check(path).corruptions
    require_no_worse(craft, outcome, path)


BLOCKS: dict[str, Callable[[Craft], int]] = {
    **{f"over the {name}": where for name, where in PLACES.items()},
    "over guest data": WALKED["guest data"],
    "over an L2 table": WALKED["L2 table"],
    "past the end": lambda c: -(-len(c.data) // CLUSTER) * CLUSTER,
    "askew": lambda c: c.get(c.block()) + 512,
    "far away": lambda c: 1 << 62,
    "nowhere": lambda c: 0,
}


@pytest.mark.parametrize("where", BLOCKS)
@pytest.mark.parametrize("entry", [0, 1, 511])
def test_refcount_blocks_in_bad_places(sound: dict[str, Craft], path: Path, where: str, entry: int) -> None:
    """Writing to such a block would destroy what lies there; so would allocating by what it says."""
    craft = sound["snapshot"].copy()
    if entry == 0:
        at = craft.get(craft.block())
        copied = bytes(craft.data[at : at + CLUSTER])
        if where.startswith("over"):
            return  # its counts would be the other structure's: nothing says so but chaos
        if BLOCKS[where](craft) and BLOCKS[where](craft) < len(craft.data):
            craft.put(BLOCKS[where](craft), copied)
    craft.set(craft.block(entry), BLOCKS[where](craft))
    outcome = tried(craft, path)
    require_no_worse(craft, outcome, path)


def test_two_entries_lead_to_one_refcount_block(sound: dict[str, Craft], path: Path) -> None:
    craft = sound["plain"].copy()
    craft.set(craft.block(1), craft.get(craft.block()))
    outcome = tried(craft, path)
    assert {"add", "remove", "mark"} <= set(outcome.refused)
    assert "used twice" in outcome.refused["add"]


def test_counts_up_to_the_end_of_the_world(path: Path) -> None:
    """The last cluster that can be addressed is counted: behind it there is no room, and none is made."""
    cluster = 2 * MIB
    qemu.create(path, MIB, "cluster_size=2M,refcount_bits=1")
    qemu.qemu_img("bitmap", "--add", path, "b")
    craft = Craft(path)
    # 2**24 counts a block, 2**45 bytes: entry 2047 ends at 2**56.
    block = craft.append(b"\xff" * cluster)
    craft.set(craft.block(2047), block).set_refcount(block, 1)
    outcome = tried(craft, path)
    assert "end of what can be addressed" in outcome.refused.get("add", "end of what can be addressed")
    assert path.stat().st_size < 1 << 40


@pytest.mark.parametrize("kind", ["two bitmaps extensions", "two, the first unknown before", "end marker too long"])
def test_chains(sound: dict[str, Craft], path: Path, kind: str) -> None:
    craft = sound["plain"].copy()
    at = craft.extension(qcow2.EXTENSION_BITMAPS)
    extension = bytes(craft.data[at : at + 32])
    end = craft.extension(0)
    if kind == "end marker too long":
        craft.put(end, struct.pack(">II", 0, 1 << 20))
    else:
        craft.put(end, extension + END_MARKER)
    outcome = judge(craft, path)
    assert not outcome.accepted
    assert "check -r all" not in outcome.changed  # neither can be told to be the wrong one


# Random damage.


@settings(max_examples=80)
@given(data=st.data())
def test_flipped_bits_of_all_metadata(sound: dict[str, Craft], data: st.DataObject) -> None:
    """In tables, directory, refcounts and L2 tables as well, where no single field shows what goes wrong."""
    craft = sound[data.draw(st.sampled_from(["plain", "snapshot", "small clusters"]))].copy()
    places = [where for _, where in craft.fields()]
    offsets = st.sampled_from([where.offset + step for where in places for step in range(where.size)])
    block, l2 = craft.get(craft.block()), craft.l2().offset
    offsets |= st.sampled_from([*range(block, block + 80), *range(l2, l2 + 128)])
    for offset, bit in data.draw(st.lists(st.tuples(offsets, st.integers(0, 7)), min_size=1, max_size=4)):
        craft.data[offset % len(craft.data)] ^= 1 << bit
    place = Path("/dev/shm") / f"dirtmap-flip-{os.getpid()}.qcow2"
    try:
        judge(craft, place)
    finally:
        place.unlink(missing_ok=True)


@settings(max_examples=100)
@given(noise=st.binary(max_size=4096), start=st.sampled_from([0, 4, 72, 104, 112]))
def test_noise(sound: dict[str, Craft], noise: bytes, start: int) -> None:
    """A header that begins well and goes on with anything."""
    craft = Craft(sound["plain"].data[:start] + noise)
    place = Path("/dev/shm") / f"dirtmap-noise-{os.getpid()}.qcow2"
    try:
        tried(craft, place)
    finally:
        place.unlink(missing_ok=True)


@pytest.mark.parametrize("act", READING | CHANGING)
@pytest.mark.parametrize("kind", ["nul", "surrogate", "loop", "long", "newline", "null", "zero", "fifo", "folder"])
def test_paths_that_are_no_images(tmp_path: Path, act: str, kind: str) -> None:
    path = {
        "nul": tmp_path / "a\0b",
        "surrogate": tmp_path / "\ud800",
        "long": tmp_path / ("x" * 5000),
        "newline": tmp_path / "two\nlines\x1b[31m\udcff",
        "null": Path("/dev/null"),
        "zero": Path("/dev/zero"),
    }.get(kind, tmp_path / kind)
    if kind == "loop":
        path.symlink_to(path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(dm.Error) as caught:
        (READING | CHANGING)[act](path)
    assert str(caught.value).isprintable()
