"""Where an image has few references, they are counted without numpy: with the same result, and for the same plans."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import qemu
from support.craft import Craft

from dirtmap.engine.model.content import Packed
from dirtmap.engine.qcow2 import commit, references
from dirtmap.engine.qcow2.few import count_few
from dirtmap.engine.qcow2.layout import read_layout
from dirtmap.engine.system.file import open_file
from dirtmap.fmt.directory import FLAG_AUTO
from dirtmap.fmt.errors import Error

MIB = 1 << 20
BUDGET = 16 << 20
NEW = Packed(16 * MIB >> 16, memoryview(bytes([255, 7] + 30 * [0])).cast("Q"))
OPTIONS = {
    "plain": "cluster_size=4096",
    "large clusters": "cluster_size=64k",
    "extended": "cluster_size=16k,extended_l2=on",
    **{f"refcount_bits={bits}": f"cluster_size=4096,refcount_bits={bits}" for bits in (1, 8, 32, 64)},
    "version 2": "cluster_size=4096,compat=0.10",
}


def build(path: Path, options: str) -> Path:
    qemu.create(path, 16 * MIB, options)
    if "compat=0.10" not in options:
        for name in ("b0", "b1"):
            qemu.qemu_img("bitmap", "--add", path, name)
    qemu.qemu_io(path, "write -q 0 64k", "write -q 3M 128k", "write -q -z 5M 64k", "discard -q 0 16k")
    return path


def compare(path: Path, *, few: bool | None = None) -> None:
    """Both ways, and what both plan; ``few`` says whether the image is one to be counted without numpy."""
    with open_file(str(path)) as file:
        try:
            layout = read_layout(file)
        except Error:
            return
        found, walked = count_few(file, layout, BUDGET), references.walk(file, layout, budget=BUDGET)
        assert few in (None, found is not None)
        if found is None:
            return
        assert not walked.faults
        assert not len(walked.unfollowed)
        runs = zip(walked.runs.starts.tolist(), walked.runs.ends.tolist(), walked.runs.counts.tolist(), strict=True)
        assert found.times == {number: count for start, end, count in runs for number in range(start, end)}
        assert found.end == walked.end
        every = range(found.end + 9)
        for question in ("unused", "shared", "claimed"):
            assert getattr(found, question)(every) == getattr(walked, question)(every)
        new = commit.Written(b"new", FLAG_AUTO, 16, NEW)
        kept = [commit.Kept(slot.entry.with_flags(set=FLAG_AUTO)) for slot in layout.slots]
        for wanted in (kept, kept[1:], [*kept, new], [new], []):
            plans = []
            for given_references in (None, walked):
                try:
                    plans.append(commit.make_plan(file, layout, wanted, given_references))
                except Error as error:
                    plans.append(str(error))
            assert plans[0] == plans[1]


@pytest.mark.parametrize("kind", OPTIONS)
def test_few_references_are_what_a_walk_finds(tmp_path: Path, kind: str) -> None:
    compare(build(tmp_path / "disk", OPTIONS[kind]), few=True)


def test_what_is_many_or_uncommon_is_left_to_a_walk(tmp_path: Path) -> None:
    path = build(tmp_path / "disk", "cluster_size=4096")
    with open_file(str(path)) as file:
        layout = read_layout(file)
        assert count_few(file, layout, BUDGET)
        assert count_few(file, layout, 4096) is None
    qemu.qemu_io(path, "write -q -c 8M 64k")  # compressed
    compare(path, few=False)
    path = build(tmp_path / "snapshot", "cluster_size=4096")
    qemu.qemu_img("snapshot", "-c", "s", path)
    compare(path, few=False)
    craft = Craft(build(tmp_path / "astray", "cluster_size=4096"))
    craft.set(craft.l2(1), 1 << 40 | 1 << 63).save(tmp_path / "astray")
    compare(tmp_path / "astray", few=False)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Craft:
    return Craft(build(tmp_path_factory.mktemp("sound") / "disk", OPTIONS["plain"]))


@given(data=st.data())
@settings(max_examples=200)
def test_few_references_of_an_image_with_other_numbers(
    sound: Craft, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Entries of its tables lead to other clusters, or nowhere, and counts are others."""
    path = tmp_path_factory.getbasetemp() / "other.qcow2"
    craft = sound.copy()
    clusters = len(craft.data) // 4096
    values = st.integers(0, clusters + 2).map(lambda number: number * 4096)
    values |= values.map(lambda offset: offset | 1 << 63) | st.sampled_from([1 << 62, 512, 1 << 40])
    places = [craft.l1(), craft.l2(), craft.l2(1), craft.l2(16), craft.block(), craft.block(1), craft.block(511)]
    for place in data.draw(st.lists(st.sampled_from(places), max_size=2)):
        craft.set(place, data.draw(values))
    path.write_bytes(craft.data)
    compare(path)
