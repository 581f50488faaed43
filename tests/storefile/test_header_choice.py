"""Any two damages to the four copies of a header: what counts then is the newest commit, or is in doubt."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from support.tracking import make_node, model_of

import dirtmap.engine as dm
from dirtmap.engine.storefile import header as headers
from dirtmap.engine.storefile.header import Header
from dirtmap.fmt import store
from dirtmap.fmt.parsers.store import HEADER
from dirtmap.fmt.store import Area

BLOCK = store.BLOCK
Damage = Callable[[int, list[bytes]], bytes]
GENERATION = HEADER.field("generation")


def a_header(generation: int, doubt: int = 0) -> Header:
    return Header(
        uuid=bytes(range(16)),
        generation=generation,
        commit_id=random.Random(generation).randbytes(16),
        doubt_generation=doubt,
        cluster_bits=12,
        clusters=7 + generation,
        table=Area(0x4000 + 0x1000 * (generation % 8), 16, generation * 77),
        depth=0,
        namespaces=0,
        space=Area(0x5000, 16, generation * 99),
        released=Area(),
    )


def copy_of(generation: int, number: int, doubt: int = 0, *, followed: bool = False) -> bytes:
    return headers.as_copy(headers.build_block(a_header(generation, doubt), number), number, followed=followed)


def a_store(first: int, second: int, doubt: int = 0) -> list[bytes]:
    """The four copies as a commit leaves them: the generation in each slot, and of what doubt the newest tells."""
    newest = max(first, second)
    return [
        copy_of(generation, number, doubt if generation == newest else 0, followed=number > 1 and generation < newest)
        for number, generation in enumerate((first, second, first, second))
    ]


def a_bit(at: int) -> Damage:
    def flip(number: int, blocks: list[bytes]) -> bytes:
        block = bytearray(blocks[number])
        block[at // 8] ^= 1 << at % 8
        return bytes(block)

    return flip


def of_copy(other: int) -> Damage:
    return lambda number, blocks: blocks[other]


def generations_back(count: int) -> Damage:
    """What the copy was so many changes of its slot ago."""

    def earlier(number: int, blocks: list[bytes]) -> bytes:
        mine, others = (HEADER.parse(blocks[n]).generation for n in (number, number ^ 1))
        before = others - 1 if mine > others else mine - 2
        return copy_of(before - 2 * (count - 1), number, followed=number > 1)

    return earlier


def zeroed(number: int, blocks: list[bytes]) -> bytes:
    return bytes(BLOCK)


def zeroed_sector(number: int, blocks: list[bytes]) -> bytes:
    return bytes(512) + blocks[number][512:]


FIELD_BITS = range(HEADER.size * 8)
DAMAGES: dict[str, Damage] = {
    "zeroed": zeroed,
    "its first sector zeroed": zeroed_sector,
    **{f"copy {other}": of_copy(other) for other in range(4)},
    "all ones": lambda number, blocks: b"\xff" * BLOCK,
    "one generation back": generations_back(1),
    "two generations back": generations_back(2),
    **{f"bit {at}": a_bit(at) for at in (0, 9, 8 * 60, 8 * 63 + 4, 8 * 63, 8 * 70 + 3, 8 * 4000, 8 * 4095 + 7)},
}
DAMAGES_OF_ONE = (zeroed, zeroed_sector, DAMAGES["all ones"], DAMAGES["one generation back"], *map(of_copy, range(4)))
STATES = {
    "ordinary": a_store(10, 9),
    "the other slot newest": a_store(10, 11),
    "after a commit in doubt": a_store(10, 12, 10),
    "after a commit that was missing": a_store(10, 40, 10),
    "a power of two": a_store(16, 15),
}


def verdict(blocks: list[bytes]) -> tuple[int, bool]:
    """The generation that counts, and whether it is doubted."""
    try:
        chosen = headers.choose("s", b"".join(blocks))
    except dm.FormatError:
        return 0, True  # refused
    return chosen.header.generation, chosen.in_doubt


def newest_of(blocks: list[bytes]) -> int:
    return max(HEADER.parse(block).generation for block in blocks)


def cases() -> list[tuple[int, int, str, str]]:
    pairs = itertools.product(itertools.combinations(range(4), 2), DAMAGES, DAMAGES)
    return [(one, other, first, second) for (one, other), first, second in pairs]


@pytest.mark.parametrize("state", STATES)
def test_two_damages_give_the_newest_commit_or_doubt(state: str) -> None:
    blocks = STATES[state]
    newest = newest_of(blocks)
    assert verdict(blocks) == (newest, False)
    for one, other, first, second in cases():
        damaged = list(blocks)
        damaged[one], damaged[other] = DAMAGES[first](one, blocks), DAMAGES[second](other, blocks)
        found, in_doubt = verdict(damaged)
        assert found == newest or in_doubt, (one, first, other, second, found)


@pytest.mark.parametrize("state", STATES)
def test_a_slot_that_has_lost_its_last_commit_is_noticed(state: str) -> None:
    """Any words of the two copies of the newest are what they were before that commit, as after lost writes."""
    blocks, chance = STATES[state], random.Random(1)
    newest = newest_of(blocks)
    one, other = (n for n in range(4) if HEADER.parse(blocks[n]).generation == newest)
    older = [DAMAGES["one generation back"](n, blocks) for n in range(4)]

    def torn(number: int, share: float) -> bytes:
        pieces = (older if chance.random() < share else blocks for _ in range(0, BLOCK, 8))
        return b"".join(piece[number][at : at + 8] for piece, at in zip(pieces, range(0, BLOCK, 8), strict=True))

    for share in (1, *([0.5] * 200)):
        damaged = list(blocks)
        damaged[one], damaged[other] = torn(one, share), torn(other, share)
        found, in_doubt = verdict(damaged)
        assert found == newest or in_doubt


def test_three_copies_as_they_were_before_are_the_store_as_it_was_before() -> None:
    """This cannot be told by the file alone: every copy that the last commit has written is gone."""
    blocks = a_store(10, 9)
    blocks[0], blocks[2], blocks[3] = copy_of(8, 0), copy_of(8, 2, followed=True), copy_of(9, 3)
    assert blocks == a_store(8, 9)
    assert verdict(blocks) == (9, False)


@pytest.mark.parametrize("state", STATES)
def test_one_copy_damaged_is_never_in_doubt(state: str) -> None:
    blocks = STATES[state]
    for number in range(4):
        for damage in (*DAMAGES_OF_ONE, *map(a_bit, range(0, BLOCK * 8, 29)), *map(a_bit, FIELD_BITS)):
            damaged = list(blocks)
            damaged[number] = damage(number, blocks)
            assert verdict(damaged) == (newest_of(blocks), False)


def test_every_flipped_bit_of_the_newest_beside_an_old_twin_is_in_doubt() -> None:
    for number, twin in ((0, 2), (2, 0)):
        for at in (*FIELD_BITS, *range(0, BLOCK * 8, 29), *range(BLOCK * 8 - 32, BLOCK * 8)):
            damaged = a_store(10, 9)
            damaged[number], damaged[twin] = a_bit(at)(number, damaged), copy_of(8, twin, followed=twin > 1)
            assert verdict(damaged) == (9, True), at


@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("second", range(4))
def test_a_copy_in_another_place_is_damaged(first: int, second: int) -> None:
    blocks = a_store(10, 9)
    assert headers.is_whole(blocks[first], second) == (first == second)


def test_a_commit_that_was_cut_off_is_not_in_doubt() -> None:
    """Each of its three writes to the headers is torn, at any words, with a sync behind the first."""
    chance = random.Random(2)
    before = a_store(10, 11)
    chosen = headers.choose("s", b"".join(before))
    assert chosen.repairs == ()
    now = list(before)
    for epoch in headers.switch(a_header(12), chosen):
        for _ in range(300):
            torn = list(now)
            for number, block in epoch:
                words = zip(range(0, BLOCK, 8), chance.choices((now[number], block), k=BLOCK // 8), strict=True)
                torn[number] = b"".join(source[at : at + 8] for at, source in words)
            assert verdict(torn) == (12 if headers.is_whole(torn[0], 0) and torn[0] != before[0] else 11, False)
        for number, block in epoch:
            now[number] = block
    assert now == a_store(12, 11)


@pytest.mark.parametrize("state", STATES)
def test_doubt_survives_whatever_its_repair_leaves(state: str) -> None:
    """A writer that repairs a store in doubt may be cut off: any of its words are on the disk, and none is torn."""
    blocks = STATES[state]
    for one, other, first, second in cases():
        damaged = list(blocks)
        damaged[one], damaged[other] = DAMAGES[first](one, blocks), DAMAGES[second](other, blocks)
        try:
            chosen = headers.choose("s", b"".join(damaged))
        except dm.FormatError:
            continue
        if not chosen.in_doubt:
            continue
        for count in range(len(chosen.repairs) + 1):
            for some in itertools.combinations(chosen.repairs, count):
                repaired = list(damaged)
                for number, block in some:
                    repaired[number] = block
                again = headers.choose("s", b"".join(repaired))
                assert again.in_doubt, (one, first, other, second, [number for number, _ in some])
                assert again.header == chosen.header


def test_a_copy_of_the_other_slot_in_place_of_the_newest_makes_all_dirty(tmp_path: Path) -> None:
    make_node(tmp_path, 1 << 20)
    path = tmp_path / "default.dmap"
    with dm.open("node:drive0") as image, image.transaction() as bitmaps:
        bitmaps["b0"] |= dm.Bitmap(1 << 20).replace()
        bitmaps["b0"].mark(0, 1)
    data = bytearray(path.read_bytes())
    slot = headers.choose(str(path), bytes(data[: store.RESERVED])).slot
    newest, twin = (number * BLOCK for number in store.COPIES[slot])
    data[newest : newest + BLOCK] = data[(1 - slot) * BLOCK :][:BLOCK]
    data[twin + 1000] ^= 1
    path.write_bytes(data)
    for index in tmp_path.glob("index*"):
        index.rename(tmp_path / f"gone-{index.name}")
    with dm.open("node:drive0") as image:
        assert model_of(image["b0"]).all()
        with image.transaction() as bitmaps:
            bitmaps["new"] = dm.Bitmap(1 << 20)
    chosen = headers.choose(str(path), path.read_bytes()[: store.RESERVED])
    assert not chosen.in_doubt
    with dm.open("node:drive0") as image:
        assert model_of(image["b0"]).all()
