"""The structures of a store: what is built is parsed again, and what breaks a rule is named."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.generated import areas, numbers
from support.leaves import parse_records

from dirtmap.fmt import directory, geometry, store
from dirtmap.fmt.identity import Identity
from dirtmap.fmt.store import (
    Area,
    Record,
    build_items,
    build_record,
    item_faults,
    parse_items,
    unknown_item,
)

names = st.binary(min_size=1, max_size=1023).filter(lambda name: b"\0" not in name) | st.sampled_from(
    [b"a", b"drive0", b"\xff" * 1023, "Bücher".encode()]
)


records = st.builds(
    Record,
    name=names,
    kind=st.sampled_from(sorted(store.KIND_NAMES)),
    uuid=st.binary(min_size=16, max_size=16),
    size=st.integers(0, geometry.MAX_DISK_SIZE),
    generation=numbers(8),
    directory=areas.filter(lambda area: area.length),
    nb_bitmaps=st.integers(1, directory.MAX_BITMAPS),
    path=st.binary(max_size=300).filter(lambda path: b"\0" not in path),
    identity=st.builds(Identity, st.binary(min_size=16, max_size=16), *[numbers(8)] * 5),
    root_uuid=st.binary(min_size=16, max_size=16),
)


@given(st.lists(records, max_size=6))
def test_records_are_parsed_as_they_were_built(values: list[Record]) -> None:
    raw = b"".join(map(build_record, values))
    assert list(parse_records(raw)) == values
    assert len(raw) % 8 == 0
    assert all(not list(store.record_faults(record)) for record in values)


@given(st.lists(records, min_size=1, max_size=3), st.data())
@settings(max_examples=200)
def test_records_that_do_not_fit_are_refused(values: list[Record], data: st.DataObject) -> None:
    raw = b"".join(map(build_record, values))
    cut = data.draw(st.integers(1, len(raw) - 1))
    ends = set(itertools.accumulate(len(build_record(record)) for record in values))
    if cut in ends:
        assert list(parse_records(raw[:cut])) == values[: sorted(ends).index(cut) + 1]
    else:
        with pytest.raises(ValueError, match="record"):
            list(parse_records(raw[:cut]))


@given(st.binary(max_size=1000))
@example(bytes(112))
@example(b"\xff" * 1000)
def test_any_bytes_are_records_or_refused(raw: bytes) -> None:
    try:
        parsed = list(parse_records(raw))
    except ValueError:
        return
    assert sum(len(build_record(record)) for record in parsed) == len(raw)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("name", {"name": b""}),
        ("name", {"name": b"x" * 1024}),
        ("name", {"name": b"a\0b"}),
        ("kind", {"kind": 0}),
        ("kind", {"kind": max(store.KIND_NAMES) + 1}),
        ("size", {"size": 2**63}),
        ("path", {"path": b"/" * 4097}),
        ("path", {"path": b"/a\0"}),
        ("nb_bitmaps", {"nb_bitmaps": 65536}),
        ("nb_bitmaps", {"nb_bitmaps": 0}),
        ("nb_bitmaps", {"directory": Area()}),
    ],
)
def test_record_that_breaks_a_rule_is_named(field: str, changes: dict[str, Any]) -> None:
    sound = Record(b"drive0", store.KIND_NODE, bytes(16), 1, directory=Area(0x4000, 32), nb_bitmaps=1, path=b"/a")
    assert not list(store.record_faults(sound))
    assert [fault for fault, _ in store.record_faults(replace(sound, **changes))] == [field]


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("type", {"type": 2}),
        ("name", {"name": b""}),
        ("granularity_bits", {"granularity_bits": 8}),
        ("granularity_bits", {"granularity_bits": 32}),
        ("granularity_bits", {"granularity_bits": 255}),
        ("table_size", {"table_size": 2}),
        ("table_size", {"table_offset": store.ALL_ZEROS}),
        ("table_size", {"table_offset": store.ALL_ONES}),
        ("offset", {"table_offset": 0x3000}),
        ("offset", {"table_offset": 0x4800}),
        ("offset", {"table_offset": 0x10000}),
        ("offset", {"table_offset": 2**64 - 4096}),
    ],
)
def test_entry_that_breaks_a_rule_is_named(field: str, changes: dict[str, Any]) -> None:
    sound = directory.Entry(b"b0", 0x4000, 1, 0xFFFF0002, 9)
    assert not list(store.entry_faults(sound, 1 << 20, 4096, 0x10000))
    assert [fault for fault, _ in store.entry_faults(replace(sound, **changes), 1 << 20, 4096, 0x10000)] == [field]


def test_entry_whose_bits_are_too_many_is_named() -> None:
    entry = directory.Entry(b"b0", store.ALL_ONES, 0, 0, 15)
    assert [fault for fault, _ in store.entry_faults(entry, 2**63 - 1, 4096, 0)] == ["granularity_bits"]
    assert not list(store.entry_faults(replace(entry, granularity_bits=16), 2**62, 4096, 0))


ITEMS = ((store.ITEM_BITS, bytes(8)), (store.ITEM_IDENTITY, bytes(24)), (7, b"1"))


@pytest.mark.parametrize(
    "extra",
    [
        b"1234567",
        build_items(ITEMS) + bytes(8),
        build_items(ITEMS)[:-8],
        build_items(ITEMS[1:]),
        build_items([*ITEMS, ITEMS[0]]),
        build_items([(store.ITEM_BITS, bytes(7))]),
        build_items([*ITEMS, (store.ITEM_WINDOW, bytes(23))]),
    ],
)
def test_extra_data_that_breaks_a_rule_is_named(extra: bytes) -> None:
    entry = directory.Entry(b"b0", 0x4000, 1, 0, 9, extra_data=build_items(ITEMS))
    assert parse_items(entry.extra_data) == ITEMS
    assert not list(item_faults(entry))
    assert [fault for fault, _ in item_faults(replace(entry, extra_data=extra))] == ["extra_data"]


@pytest.mark.parametrize(("kind", "found"), [(7, None), (store.CRITICAL_ITEM | 7, store.CRITICAL_ITEM | 7)])
def test_only_a_critical_item_has_to_be_known(kind: int, found: int | None) -> None:
    entry = directory.Entry(
        b"b0", 0, 0, 0, 9, extra_data=build_items([*ITEMS, (store.ITEM_WINDOW, bytes(24)), (kind, b"")])
    )
    assert unknown_item(entry) == found


def test_levels() -> None:
    assert [store.root_level(chunks, 4096) for chunks in (0, 1, 2, 256, 257, 65536, 65537)] == [0, 0, 1, 1, 2, 2, 3]
    assert store.root_level(store.MAX_CHUNKS, 4096) == 4


@given(
    st.lists(st.tuples(st.integers(1, 2**32 - 1), st.binary(max_size=40)), max_size=4),
    st.binary(min_size=1, max_size=9),
)
def test_extensions_of_a_record_come_back(extensions: list[tuple[int, bytes]], path: bytes) -> None:
    record = Record(name=b"n", kind=store.KIND_NODE, uuid=bytes(16), size=5, path=path, extensions=tuple(extensions))
    packed = build_record(record)
    assert list(parse_records(packed + packed)) == [record, record]
    assert len(packed) % 8 == 0


@pytest.mark.parametrize(("at", "value"), [(-4, 1), (-4, 12), (-8, 0)])
def test_extensions_that_do_not_end_where_their_record_does_are_refused(at: int, value: int) -> None:
    record = Record(name=b"n", kind=store.KIND_NODE, uuid=bytes(16), size=5, extensions=((7, b""),))
    packed = bytearray(build_record(record))
    packed[at : len(packed) + at + 4] = value.to_bytes(4, "big")
    with pytest.raises(ValueError, match="extensions"):
        list(parse_records(bytes(packed)))
