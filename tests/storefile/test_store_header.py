"""The header of a store and its four copies: built and parsed again, damage noticed, and which of them counts."""

from __future__ import annotations

import itertools
import random
import uuid
from dataclasses import replace
from typing import Any

import crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.generated import areas, numbers, others

import dirtmap.engine as dm
from dirtmap.engine.storefile import header as headers
from dirtmap.engine.storefile.header import Header
from dirtmap.fmt import store
from dirtmap.fmt.errors import Error, FormatError
from dirtmap.fmt.identity import FilePlace
from dirtmap.fmt.parsers.store import CHECKSUM, HEADER, LEAF, NAMESPACES_EXTENSION, PLACE_EXTENSION, RUN
from dirtmap.fmt.store import Area


@st.composite
def header_values(draw: st.DrawFn) -> Header:
    """Headers that may be written."""
    cluster_bits = draw(st.integers(store.MIN_CLUSTER_BITS, store.MAX_CLUSTER_BITS))
    writer = draw(st.text(max_size=store.MAX_WRITER // 4))
    return Header(
        uuid=draw(st.binary(min_size=16, max_size=16)),
        generation=draw(st.integers(0, store.MAX_GENERATION)),
        commit_id=draw(st.binary(min_size=16, max_size=16)),
        doubt_generation=draw(numbers(8)),
        cluster_bits=cluster_bits,
        clusters=draw(st.integers(-(-store.RESERVED >> cluster_bits) or 1, store.MAX_FILE_BYTES >> cluster_bits)),
        table=draw(areas),
        depth=draw(st.integers(0, store.MAX_DEPTH)),
        namespaces=draw(st.integers(0, store.MAX_NAMESPACES)),
        space=draw(areas)._replace(length=draw(st.integers(0, 1000)) * LEAF.size),
        released=draw(areas)._replace(length=draw(st.integers(0, 1000)) * RUN.size),
        sessions=draw(numbers(4)),
        commit_time=draw(numbers(8)),
        place=FilePlace(draw(st.binary(min_size=16, max_size=16)), draw(numbers(8)), draw(numbers(8))),
        writer=writer.encode(),
        read_only_compatible=draw(numbers(8)),
        compatible=draw(numbers(8)),
        others=tuple(draw(others)),
    )


@given(header_values())
def test_header_is_parsed_as_it_was_built(header: Header) -> None:
    block = headers.build_block(header, 0)
    assert len(block) == store.BLOCK
    assert headers.is_whole(block, 0)
    assert headers.parse_block("s", block) == header


@given(header_values())
@settings(max_examples=5)
def test_every_flipped_bit_of_a_header_is_noticed(header: Header) -> None:
    block = bytearray(headers.build_block(header, 0))
    for bit in range(store.BLOCK * 8):
        block[bit // 8] ^= 1 << bit % 8
        assert not headers.is_whole(bytes(block), 0)
        block[bit // 8] ^= 1 << bit % 8


@given(header_values(), st.lists(st.tuples(st.integers(0, 250), st.binary(min_size=1, max_size=16)), max_size=4))
@settings(max_examples=400)
def test_header_with_any_content_is_refused_or_survives_a_rewrite(
    header: Header, patches: list[tuple[int, bytes]]
) -> None:
    block = bytearray(headers.build_block(header, 0))
    for at, patch in patches:
        block[at : at + len(patch)] = patch
    block[-4:] = crc32c.crc32c(block[:-4]).to_bytes(4, "big")
    try:
        parsed = headers.parse_block("s", bytes(block))
    except Error as error:
        refused = str(error)
    else:
        refused = None
    if refused is not None:
        assert refused.startswith("s: ")
        assert "\n" not in refused
        return
    rebuilt = headers.build_block(parsed, 0)
    assert len(rebuilt) == store.BLOCK
    assert replace(headers.parse_block("s", rebuilt), autoclear=parsed.autoclear) == parsed


def test_header_without_room_for_an_end_marker_is_refused() -> None:
    # Written anew with a marker, it would reach into the next copy.
    header = headers.parse_block("s", headers.build_block(_header(7), 0))
    used = HEADER.size + 5 * 8 + NAMESPACES_EXTENSION.size + 2 * store.AREA_SIZE + PLACE_EXTENSION.size
    used += -(-len(store.WRITER) // 8) * 8
    full = store.BLOCK - CHECKSUM.size - used - 8
    block = bytearray(headers.build_block(replace(header, others=((0x99, bytes(full // 8 * 8 - 8)),)), 0))
    assert len(block) == store.BLOCK
    start = block.index((0x99).to_bytes(4, "big"), HEADER.size)
    block[start + 4 : start + 8] = full.to_bytes(4, "big")
    block[-4:] = crc32c.crc32c(block[:-4]).to_bytes(4, "big")
    with pytest.raises(FormatError, match="end marker"):
        headers.parse_block("s", bytes(block))


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("header.generation", {"generation": 2**62 + 1}),
        ("header.clusters", {"clusters": 3}),
        ("header.clusters", {"clusters": 2**62}),
        ("header.cluster_bits", {"cluster_bits": 11}),
        ("header.cluster_bits", {"cluster_bits": 22}),
        ("namespaces extension.namespaces", {"namespaces": (1 << 24) + 1}),
        ("namespaces extension.depth", {"depth": 9}),
        ("space map extension.length", {"space": Area(0x4000, (4 << 20) + 16)}),
        ("space map extension.length", {"space": Area(0x4000, 17)}),
        ("released clusters extension.length", {"released": Area(0x4000, (16 << 20) + 16)}),
        ("released clusters extension.length", {"released": Area(0x4000, 8)}),
        ("namespaces extension", {"others": ((store.EXTENSION_NAMESPACES, bytes(32)),)}),
        ("space map extension", {"others": ((store.EXTENSION_SPACE, bytes(16)),)}),
        ("place extension", {"others": ((store.EXTENSION_PLACE, bytes(32)),)}),
        ("writer extension", {"others": ((store.EXTENSION_WRITER, b"another"),)}),
        ("writer extension", {"writer": b"w" * 256}),
        ("writer extension", {"writer": b"\xff"}),
    ],
)
def test_header_that_breaks_a_rule_is_named(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(FormatError) as error:
        headers.parse_block("s", headers.build_block(replace(_header(7), **changes), 0))
    assert error.value.where == f"s: {field}"


@pytest.mark.parametrize(
    ("field", "value"),
    [("version", 1), ("version", 3), ("incompatible_features", 2), ("incompatible_features", 1 << 63)],
)
def test_header_of_a_newer_format_is_refused_as_such(field: str, value: int) -> None:
    block = _patched(headers.build_block(_header(7), 0), field, value)
    with pytest.raises(dm.UnsupportedError) as error:
        headers.parse_block("s", block)
    assert error.value.where == f"s: header.{field}"


@pytest.mark.parametrize(("field", "value"), [("incompatible_features", 1), ("sessions", 1)])
def test_header_that_contradicts_itself_about_sessions_is_refused(field: str, value: int) -> None:
    with pytest.raises(FormatError) as error:
        headers.parse_block("s", _patched(headers.build_block(_header(7), 0), field, value))
    assert error.value.where == "s: header.sessions"


def test_a_session_is_told_by_an_incompatible_bit() -> None:
    for sessions in (0, 1, 7):
        block = headers.build_block(replace(_header(7), sessions=sessions), 0)
        assert HEADER.parse(block).incompatible_features == (store.INCOMPATIBLE_SESSION if sessions else 0)


def test_a_store_of_the_earlier_layout_is_refused_by_name() -> None:
    block = b"DMS\xfb" + headers.build_block(_header(7), 0)[4:]
    with pytest.raises(dm.UnsupportedError, match="earlier layout"):
        headers.choose("s", bytes(store.BLOCK) + block + bytes(2 * store.BLOCK))


@pytest.mark.parametrize("value", [0, 88, 112, 121, 4096, 2**32 - 1])
def test_header_of_a_wrong_length_is_refused(value: int) -> None:
    with pytest.raises(FormatError):
        headers.parse_block("s", _patched(headers.build_block(_header(7), 0), "header_length", value))


def test_longer_header_of_a_later_dirtmap_is_read() -> None:
    block = headers.build_block(_header(7), 0)
    longer = bytearray(block[: HEADER.size] + bytes(16) + block[HEADER.size : -4 - 16] + bytes(4))
    assert headers.parse_block("s", _patched(bytes(longer), "header_length", HEADER.size + 16)) == _header(7)


def test_writer_clears_autoclear_bits_and_keeps_compatible_ones_and_extensions() -> None:
    header = replace(_header(7), compatible=5, others=((0x99, b"kept"),))
    block = _patched(headers.build_block(header, 0), "autoclear_features", 3)
    parsed = headers.parse_block("s", block)
    assert parsed.autoclear == 3
    assert headers.parse_block("s", headers.build_block(parsed, 0)) == header


class TestChoose:
    """The table at the head of engine/storefile/header.py, every case of it."""

    STATES = ("new", "old", "damaged")  # of a copy: its slot's last commit, the one before that, or neither

    @pytest.mark.parametrize("states", list(itertools.product(STATES, repeat=4)), ids="-".join)
    @pytest.mark.parametrize("newest", [0, 1])
    def test(self, states: tuple[str, ...], newest: int) -> None:
        generations = {}
        for number, state in enumerate(states):
            base = 9 if number % 2 == newest else 8
            generations[number] = {"new": base, "old": base - 2, "damaged": None}[state]
        # The second copy of a header says that another has followed it; the newest has not been followed.
        blocks = {
            number: _copy(generation, number, followed=number > 1 and generation < 9) if generation else _damaged(8)
            for number, generation in generations.items()
        }
        data = b"".join(blocks[number] for number in range(4))
        whole = {number: generation for number, generation in generations.items() if generation}
        if not whole:
            with pytest.raises(FormatError, match="all four copies"):
                headers.choose("s", data)
            return
        chosen = headers.choose("s", data)
        newest_of_all = max(whole.values())
        assert chosen.header.generation == newest_of_all
        assert generations[chosen.slot] == newest_of_all or generations[chosen.slot + 2] == newest_of_all
        others = [1 - chosen.slot, 3 - chosen.slot]
        followed = newest_of_all < 9 and whole.get(chosen.slot + 2) == newest_of_all
        older = max((whole[number] for number in others if number in whole), default=None)
        assert chosen.in_doubt == (followed or older != newest_of_all - 1)
        assert chosen.header.doubt_generation == (newest_of_all if chosen.in_doubt else 0)
        assert (chosen.older and chosen.older.generation) == older
        # Mending makes the copies of a slot the same, and changes no slot's last commit.
        mended = dict(blocks)
        for number, block in chosen.repairs:
            assert blocks[number] != block
            mended[number] = block
        again = headers.choose("s", b"".join(mended[number] for number in range(4)))
        assert (again.header, again.slot, again.repairs) == (chosen.header, chosen.slot, ())
        for slot in (0, 1) if not chosen.in_doubt else (chosen.slot,):
            assert headers.as_copy(mended[slot], slot + 2) == headers.as_copy(mended[slot + 2], slot + 2)
            assert any(mended[number] == blocks[number] for number in (slot, slot + 2)), "one of the two stays"
        # ... and a crash in the middle of it is no worse.
        for number, block in chosen.repairs:
            wiped = block if chosen.in_doubt and number in others else _damaged(8)  # a word, which is never torn
            torn = b"".join(wiped if n == number else blocks[n] for n in range(4))
            assert headers.choose("s", torn).header == chosen.header


def test_lost_header_does_not_come_back() -> None:
    """However the wipe of what is left of it is torn, or the next header over that: its areas may be gone by then."""
    rng = random.Random(1)
    lost, following = _copy(9, 1), _copy(10, 1)
    for bit in range(0, store.BLOCK * 8, 13):
        damaged = bytearray(lost)
        damaged[bit // 8] ^= 1 << bit % 8
        data = _copy(8, 0) + damaged + _copy(8, 2, followed=True) + headers.as_copy(bytes(store.BLOCK), 3)
        repairs = dict(headers.choose("s", data).repairs)
        wiped = repairs.get(1, bytes(damaged))
        assert sum(wiped[at : at + 8] != damaged[at : at + 8] for at in range(0, store.BLOCK, 8)) <= 1, "never torn"
        assert not headers.is_whole(wiped, 1)
        for _ in range(3):
            torn = bytearray(wiped)
            for at in range(0, store.BLOCK, 8):
                if rng.random() < 0.5:
                    torn[at : at + 8] = following[at : at + 8]
            assert not headers.is_whole(bytes(torn), 1) or torn == following
        # The nearest to it: all that tells the two apart is still to land.
        torn = bytearray(wiped)
        for at in range(0, store.BLOCK, 8):
            if following[at : at + 8] == lost[at : at + 8]:
                torn[at : at + 8] = following[at : at + 8]
        assert not headers.is_whole(bytes(torn), 1)


def test_what_is_no_store_is_refused() -> None:
    for data in (b"", b"QFI\xfb" + bytes(20000), bytes(store.RESERVED)):
        with pytest.raises(FormatError, match="not a dirtmap store"):
            headers.choose("s", data)


def test_header_copies_alternate() -> None:
    assert sorted(itertools.chain(*store.COPIES)) == [0, 1, 2, 3]
    assert all(number % 2 == slot for slot in (0, 1) for number in store.COPIES[slot])
    assert store.RESERVED == 4 * store.BLOCK


def _header(generation: int) -> Header:
    return Header(
        uuid=uuid.UUID(int=1).bytes,
        generation=generation,
        commit_id=uuid.UUID(int=generation).bytes,
        doubt_generation=0,
        cluster_bits=12,
        clusters=7,
        table=Area(0x4000, 16, 0),
        depth=0,
        namespaces=0,
        space=Area(0x6000, 16, 0),
        released=Area(),
    )


def _copy(generation: int, number: int, *, followed: bool = False) -> bytes:
    return headers.as_copy(headers.build_block(_header(generation), number), number, followed=followed)


def _damaged(generation: int) -> bytes:
    block = bytearray(headers.build_block(_header(generation), 0))
    block[1000:1008] = b"\xff" * 8
    return bytes(block)


def _patched(block: bytes, name: str, value: int) -> bytes:
    field = HEADER.field(name)
    changed = bytearray(block)
    changed[field.offset : field.offset + field.size] = value.to_bytes(field.size, "big")
    changed[-4:] = crc32c.crc32c(changed[:-4]).to_bytes(4, "big")
    return bytes(changed)
