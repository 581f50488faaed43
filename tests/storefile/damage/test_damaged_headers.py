"""A store with damaged headers: one copy less changes nothing, and a lost header makes the older state all dirty."""

from __future__ import annotations

import random

import pytest
from support.damage import SIZE, Region, Sound, break_blocks, flipped, found_damage, mended, use

import dirtmap.engine as dm
from dirtmap.engine.host.kind import Address
from dirtmap.engine.storefile import header as headers
from dirtmap.fmt import store
from dirtmap.fmt.errors import Error


def test_flipped_bit_of_one_header_copy_changes_nothing(sound: Sound) -> None:
    """Every bit of the four blocks: the header that counts is the same, and the damaged copy is to be mended.

    Whatever a reader does depends on that choice and the areas alone.
    """
    before = headers.choose(sound.path, sound.data)
    for number in range(4):
        block = sound.data[number * store.BLOCK : (number + 1) * store.BLOCK]
        for bit in range(store.BLOCK * 8):
            damaged = bytearray(block)
            damaged[bit // 8] ^= 1 << bit % 8
            data = (
                sound.data[: number * store.BLOCK] + damaged + sound.data[(number + 1) * store.BLOCK : store.RESERVED]
            )
            chosen = headers.choose(sound.path, data)
            assert (chosen.header, chosen.slot, chosen.in_doubt) == (before.header, before.slot, False)
            assert chosen.repairs == ((number, block),)


def _sampled(region: Region, count: int, seed: int) -> list[int]:
    return sorted(random.Random(seed).sample(range(region.start * 8, region.stop * 8), count))


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize(("step", "count"), [(23, 20), pytest.param(1, 500, marks=pytest.mark.long)])
def test_flipped_bit_of_one_header_copy_is_invisible(sound: Sound, number: int, step: int, count: int) -> None:
    region = sound.regions[number]
    assert region.name.startswith(f"header copy {number}")
    used = range(region.start * 8, (region.start + 180) * 8, step)  # the fields
    for _ in flipped(sound, sorted({*used, *_sampled(region, count, number)})):
        answers = use(sound)
        assert answers["names"] == set(sound.bits)
        assert not answers["describe"].notes
        assert found_damage(answers)
        assert answers["change"] is None


# Both copies of a header


def test_without_the_newest_header_the_older_state_is_all_dirty(sound: Sound) -> None:
    newest = headers.choose(sound.path, sound.data).slot
    damaged = break_blocks(sound, *store.COPIES[newest])
    sound.write(damaged)
    info = dm.describe(sound.path)
    assert {(bitmap.node, bitmap.name) for bitmap in info.bitmaps} == set(sound.bits), "as one commit earlier"
    assert len(info.notes) == 2
    assert all("copies of the header are damaged" in note for note in info.notes)
    assert all(bitmap.count >= SIZE for bitmap in info.bitmaps)
    for node, name in sound.bits:
        with dm.open(Address(sound.path, node)) as image:
            assert image[name].extents()[1].tolist() == [SIZE]
    report = dm.check(sound.path)
    assert report.corruptions >= 2
    assert any(finding.severity == "note" and "all dirty" in finding.what for finding in report.findings)
    assert any("all dirty" in fault["what"] for fault in dm.dump(sound.path)["faults"])


def test_doubt_outlives_the_next_commits_and_ends_with_recover(sound: Sound) -> None:
    newest = headers.choose(sound.path, sound.data).slot
    sound.write(break_blocks(sound, *store.COPIES[newest]))
    generation = headers.choose(sound.path, sound.data).header.generation
    with dm.open(Address(sound.path, "a")) as image, image.transaction() as bitmaps:
        bitmaps["monday"].clear(0, SIZE)
        bitmaps["new"] = dm.Bitmap(SIZE)
    chosen = headers.choose(sound.path, sound.read())
    assert not chosen.in_doubt
    assert chosen.header.generation == generation + 1, "past the number of the commit that was lost"
    for _ in range(3):
        with dm.open(Address(sound.path, "a")) as image:
            assert image["monday"].count == 0, "cleared since"
            assert image["full"].count >= SIZE
            assert image["clean"].count >= SIZE, "written down as all dirty with the first change"
            with image.transaction() as bitmaps:
                bitmaps["more"] = dm.Bitmap.from_extents(SIZE, [0], [1], 512)
            with image.transaction() as bitmaps:
                del bitmaps["more"]
        with dm.open(Address(sound.path, "b")) as image:
            assert image["\udcff"].extents()[1].tolist() == [SIZE]
            assert "lost a commit" in image.info().notes[0]
    assert not dm.check(sound.path).corruptions
    with dm.open(Address(sound.path, "b")) as image:
        assert [recovery.how for recovery in image.recover()] == ["all dirty: the store lost a commit"]
        assert not image.info().notes
        assert image.recover() == []


@pytest.mark.parametrize("damaged", [(0, 1, 2, 3), (0, 2), (1, 3), (0, 1), (2, 3), (0, 1, 2), (1, 2, 3)])
def test_damaged_header_copies_never_lose_a_bit(sound: Sound, damaged: tuple[int, ...]) -> None:
    sound.write(break_blocks(sound, *damaged))
    answers = use(sound)
    if len(damaged) == 4:
        assert all(isinstance(answers[key], Error) for key in ("describe", "change"))
        report = dm.check(sound.path, repair="all")
        assert (report.corruptions, report.check_errors, report.corruptions_fixed) == (1, 1, 0)
        assert not answers["names"]
        assert answers["dump"]["stopped"]
    else:
        assert answers["names"] == set(sound.bits)
        assert found_damage(answers)
        assert answers["change"] is None


def test_mending_a_lost_header_keeps_the_doubt(sound: Sound) -> None:
    newest = headers.choose(sound.path, sound.data).slot
    sound.write(break_blocks(sound, *store.COPIES[newest]))
    mended(sound)
    sound.write(break_blocks(sound, *store.COPIES[newest]))
    dm.check(sound.path, repair="all")
    for node, name in sound.bits:
        with dm.open(Address(sound.path, node)) as image:
            assert image[name].extents()[1].tolist() == [SIZE]
