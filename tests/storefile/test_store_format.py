"""The store's structures: what is built is parsed again, what is damaged is noticed, what is free is nobody's."""

from __future__ import annotations

import itertools
import os
import random
import struct
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import pytest
from construct import Array, Bytes, Const, Float32b, Int8ub, Int16ub, Int24ub, Int32sb, Int32ub, Int32ul, Padded
from hypothesis import example, given, settings
from hypothesis import strategies as st

import dirtmap.engine as dm
from dirtmap.engine.host.kind import Address
from dirtmap.engine.namespaces.nodes import add_node
from dirtmap.engine.storefile import header as headers
from dirtmap.engine.storefile.file import Store, create
from dirtmap.engine.storefile.header import Header
from dirtmap.engine.storefile.space import SpaceMap
from dirtmap.engine.storefile.table import NamespaceTable
from dirtmap.fmt import directory, geometry, store
from dirtmap.fmt.errors import Error, FormatError
from dirtmap.fmt.store import Area, Identity, Record
from dirtmap.fmt.structure import Structure
from dirtmap.fmt.structures.directory import parse_entries
from dirtmap.fmt.structures.store import (
    AREA,
    BITS_CHECKSUM,
    CHECKSUM,
    HEADER,
    LEAF,
    NAMESPACES_EXTENSION,
    RECORD,
    RUN,
    build_record,
    parse_records,
)

STRUCTURES = [
    HEADER,
    CHECKSUM,
    AREA,
    NAMESPACES_EXTENSION,
    LEAF,
    RUN,
    RECORD,
    BITS_CHECKSUM,
]


def numbers(size: int) -> st.SearchStrategy[int]:
    """Unsigned numbers of that many bytes, the outermost often."""
    most = 256**size - 1
    return st.sampled_from([0, 1, most - 1, most]) | st.integers(0, most)


areas = st.builds(Area, numbers(8), numbers(4), numbers(4))
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
    identity=st.builds(Identity, numbers(8), numbers(8), numbers(8), numbers(8)),
    root_uuid=st.binary(min_size=16, max_size=16),
)
others = st.lists(
    st.tuples(numbers(4).filter(lambda kind: kind and kind not in store.EXTENSION_NAMES), st.binary(max_size=200)),
    max_size=4,
)


@st.composite
def header_values(draw: st.DrawFn) -> Header:
    """Headers that may be written."""
    cluster_bits = draw(st.integers(store.MIN_CLUSTER_BITS, store.MAX_CLUSTER_BITS))
    bucket_bits = draw(st.integers(0, store.MAX_BUCKET_BITS))
    return Header(
        uuid=draw(st.binary(min_size=16, max_size=16)),
        generation=draw(st.integers(0, store.MAX_GENERATION)),
        commit_id=draw(st.binary(min_size=16, max_size=16)),
        doubt_generation=draw(numbers(8)),
        cluster_bits=cluster_bits,
        clusters=draw(st.integers(-(-store.RESERVED >> cluster_bits) or 1, store.MAX_FILE_BYTES >> cluster_bits)),
        table=draw(areas)._replace(length=AREA.size << bucket_bits),
        bucket_bits=bucket_bits,
        namespaces=draw(st.integers(0, store.MAX_NAMESPACES)),
        space=draw(areas)._replace(length=draw(st.integers(0, 1000)) * LEAF.size),
        released=draw(areas)._replace(length=draw(st.integers(0, 1000)) * RUN.size),
        compatible=draw(numbers(8)),
        others=tuple(draw(others)),
    )


# Structures


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda structure: structure.name)
@given(data=st.data())
def test_structure_is_built_as_it_is_parsed(structure: Structure, data: st.DataObject) -> None:
    raw = data.draw(st.binary(min_size=structure.size, max_size=structure.size))
    parsed = structure.parse(b"xyz" + raw, 3)
    values = {field.name: getattr(parsed, field.name) for field in structure.fields}
    assert structure.build(**values) == raw
    for field in structure.fields:
        part = raw[field.offset : field.offset + field.size]
        assert values[field.name] in (part, int.from_bytes(part, "big")), "bytes as they are, numbers big-endian"


@pytest.mark.parametrize(
    "declared", [Int32ul, Int32sb, Int24ub, Float32b, Array(2, Int8ub), Const(b"magic"), Padded(8, Int32ub)]
)
def test_structure_takes_unsigned_numbers_and_bytes_only(declared: object) -> None:
    with pytest.raises(TypeError, match="field: neither an unsigned number nor bytes"):
        Structure("s", "field" / declared)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"magic": b"abc", "count": 1}, ValueError),
        ({"magic": b"abcde", "count": 1}, ValueError),
        ({"magic": b"abcd", "count": -1}, struct.error),
        ({"magic": b"abcd", "count": 1 << 16}, struct.error),
        ({"magic": b"abcd"}, TypeError),
        ({"count": 1}, TypeError),
        ({"magic": b"abcd", "count": 1, "more": 1}, TypeError),
    ],
)
def test_structure_builds_nothing_that_does_not_fit(values: dict[str, Any], error: type[Exception]) -> None:
    structure = Structure("s", "magic" / Bytes(4), "count" / Int16ub)
    assert structure.build(magic=b"abcd", count=1) == b"abcd\0\1"
    with pytest.raises(error):
        structure.build(**values)


@pytest.mark.parametrize("offset", [0, 1, 7])
def test_structure_is_not_parsed_past_the_end(offset: int) -> None:
    structure = Structure("s", "magic" / Bytes(4), "count" / Int16ub)
    data = bytes(structure.size + offset)
    assert structure.parse(data, offset).count == 0
    with pytest.raises(struct.error):
        structure.parse(data[:-1], offset)


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda structure: structure.name)
def test_structure_has_no_gaps_and_its_numbers_are_aligned(structure: Structure) -> None:
    at = 0
    for field in structure.fields:
        assert field.offset == at
        assert field.size == 16 or field.offset % field.size == 0, field
        at += field.size
    assert at == structure.size


# Records


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
        ("extra_data_size", {"extra_data": b"1234567"}),
        ("offset", {"table_offset": 0x3000}),
        ("offset", {"table_offset": 0x4800}),
        ("offset", {"table_offset": 0x10000}),
        ("offset", {"table_offset": 2**64 - 4096}),
    ],
)
def test_entry_that_breaks_a_rule_is_named(field: str, changes: dict[str, Any]) -> None:
    sound = directory.Entry(b"b0", 0x4000, 1, 0xFFFF0002, 9, extra_data=bytes(8))
    assert not list(store.entry_faults(sound, 1 << 20, 4096, 0x10000))
    assert [fault for fault, _ in store.entry_faults(replace(sound, **changes), 1 << 20, 4096, 0x10000)] == [field]


def test_entry_whose_bits_are_too_many_is_named() -> None:
    entry = directory.Entry(b"b0", store.ALL_ONES, 0, 0, 30)
    assert [fault for fault, _ in store.entry_faults(entry, 2**63 - 1, 4096, 0)] == ["granularity_bits"]
    assert not list(store.entry_faults(replace(entry, granularity_bits=31), 2**63 - 1, 4096, 0))


# The header


@given(header_values())
def test_header_is_parsed_as_it_was_built(header: Header) -> None:
    block = headers.build_block(header)
    assert len(block) == store.BLOCK
    assert headers.is_whole(block)
    assert headers.parse_block("s", block) == header


@given(header_values())
@settings(max_examples=5)
def test_every_flipped_bit_of_a_header_is_noticed(header: Header) -> None:
    block = bytearray(headers.build_block(header))
    for bit in range(store.BLOCK * 8):
        block[bit // 8] ^= 1 << bit % 8
        assert not headers.is_whole(block)
        block[bit // 8] ^= 1 << bit % 8


@given(header_values(), st.lists(st.tuples(st.integers(0, 250), st.binary(min_size=1, max_size=16)), max_size=4))
@settings(max_examples=400)
def test_header_with_any_content_is_refused_or_survives_a_rewrite(
    header: Header, patches: list[tuple[int, bytes]]
) -> None:
    block = bytearray(headers.build_block(header))
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
    rebuilt = headers.build_block(parsed)
    assert len(rebuilt) == store.BLOCK
    assert replace(headers.parse_block("s", rebuilt), autoclear=parsed.autoclear) == parsed


def test_header_without_room_for_an_end_marker_is_refused() -> None:
    # Written anew with a marker, it would reach into the next copy.
    header = headers.parse_block("s", headers.build_block(_header(7)))
    used = HEADER.size + 3 * 8 + NAMESPACES_EXTENSION.size + 2 * AREA.size
    full = store.BLOCK - CHECKSUM.size - used - 8
    block = bytearray(headers.build_block(replace(header, others=((0x99, bytes(full // 8 * 8 - 8)),))))
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
        ("namespaces extension.namespaces", {"namespaces": 65537}),
        ("namespaces extension.bucket_bits", {"bucket_bits": 17, "table": Area(0x4000, 16 << 17)}),
        ("namespaces extension.length", {"bucket_bits": 1}),
        ("space map extension.length", {"space": Area(0x4000, (4 << 20) + 16)}),
        ("space map extension.length", {"space": Area(0x4000, 17)}),
        ("released clusters extension.length", {"released": Area(0x4000, (16 << 20) + 16)}),
        ("released clusters extension.length", {"released": Area(0x4000, 8)}),
        ("namespaces extension", {"others": ((store.EXTENSION_NAMESPACES, bytes(24)),)}),
        ("space map extension", {"others": ((store.EXTENSION_SPACE, bytes(16)),)}),
    ],
)
def test_header_that_breaks_a_rule_is_named(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(FormatError) as error:
        headers.parse_block("s", headers.build_block(replace(_header(7), **changes)))
    assert error.value.where == f"s: {field}"


@pytest.mark.parametrize(
    ("field", "value"),
    [("version", 0), ("version", 2), ("incompatible_features", 1), ("incompatible_features", 1 << 63)],
)
def test_header_of_a_newer_format_is_refused_as_such(field: str, value: int) -> None:
    block = _patched(headers.build_block(_header(7)), field, value)
    with pytest.raises(dm.UnsupportedError) as error:
        headers.parse_block("s", block)
    assert error.value.where == f"s: header.{field}"


@pytest.mark.parametrize("value", [0, 88, 97, 4096, 2**32 - 1])
def test_header_of_a_wrong_length_is_refused(value: int) -> None:
    with pytest.raises(FormatError):
        headers.parse_block("s", _patched(headers.build_block(_header(7)), "header_length", value))


def test_longer_header_of_a_later_dirtmap_is_read() -> None:
    block = headers.build_block(_header(7))
    longer = bytearray(block[: HEADER.size] + bytes(16) + block[HEADER.size : -4 - 16] + bytes(4))
    assert headers.parse_block("s", _patched(bytes(longer), "header_length", HEADER.size + 16)) == _header(7)


def test_writer_clears_autoclear_bits_and_keeps_compatible_ones_and_extensions() -> None:
    header = replace(_header(7), compatible=5, others=((0x99, b"kept"),))
    block = _patched(headers.build_block(header), "autoclear_features", 3)
    parsed = headers.parse_block("s", block)
    assert parsed.autoclear == 3
    assert headers.parse_block("s", headers.build_block(parsed)) == header


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
        blocks = {
            number: headers.build_block(_header(generation)) if generation else _damaged(8)
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
        assert chosen.in_doubt == (not any(number in whole for number in others))
        assert chosen.header.doubt_generation == (newest_of_all if chosen.in_doubt else 0)
        # Mending makes the copies of a slot the same, and changes no slot's last commit.
        mended = dict(blocks)
        for number, block in chosen.mends:
            assert blocks[number] != block
            mended[number] = block
        again = headers.choose("s", b"".join(mended[number] for number in range(4)))
        assert (again.header, again.slot, again.mends) == (chosen.header, chosen.slot, ())
        assert chosen.in_doubt or mended[others[0]] == mended[others[1]]
        # ... and a crash in the middle of it is no worse.
        for number, _ in chosen.mends:
            torn = b"".join(_damaged(8) if n == number else blocks[n] for n in range(4))
            assert headers.choose("s", torn).header == chosen.header


def test_lost_header_does_not_come_back() -> None:
    """However the wipe of what is left of it is torn, or the next header over that: its areas may be gone by then."""
    rng = random.Random(1)
    lost, following = headers.build_block(_header(9)), headers.build_block(_header(10))
    sound = headers.build_block(_header(8))
    for bit in range(0, store.BLOCK * 8, 13):
        damaged = bytearray(lost)
        damaged[bit // 8] ^= 1 << bit % 8
        mends = dict(headers.choose("s", sound + damaged + sound + damaged).mends)
        wiped = mends.get(1, bytes(damaged))
        assert sum(wiped[at : at + 8] != damaged[at : at + 8] for at in range(0, store.BLOCK, 8)) <= 1, "never torn"
        assert not headers.is_whole(wiped)
        for _ in range(3):
            torn = bytearray(wiped)
            for at in range(0, store.BLOCK, 8):
                if rng.random() < 0.5:
                    torn[at : at + 8] = following[at : at + 8]
            assert not headers.is_whole(torn) or torn == following
        # The nearest to it: all that tells the two apart is still to land.
        torn = bytearray(wiped)
        for at in range(0, store.BLOCK, 8):
            if following[at : at + 8] == lost[at : at + 8]:
                torn[at : at + 8] = following[at : at + 8]
        assert not headers.is_whole(torn)


def test_what_is_no_store_is_refused() -> None:
    for data in (b"", b"QFI\xfb" + bytes(20000), bytes(store.RESERVED)):
        with pytest.raises(FormatError, match="not a dirtmap store"):
            headers.choose("s", data)


def test_header_copies_alternate() -> None:
    assert sorted(itertools.chain(*store.COPIES)) == [0, 1, 2, 3]
    assert all(number % 2 == slot for slot in (0, 1) for number in store.COPIES[slot])
    assert store.RESERVED == 4 * store.BLOCK


# The namespace table


class Clusters:
    """Areas in memory: places them one behind the other, remembers which were given up, reads what was placed."""

    def __init__(self, cluster_size: int = 4096) -> None:
        self.data: dict[Area, bytes] = {}
        self.live: set[Area] = set()
        self.next, self.cluster = store.RESERVED, cluster_size

    def place(self, data: bytes) -> Area:
        area = Area(self.next, len(data), crc32c.crc32c(data))
        self.next += geometry.align_up(len(data), self.cluster)
        self.data[area] = data
        self.live.add(area)
        return area

    def release(self, area: Area) -> None:
        if area.length:
            self.live.remove(area)  # a KeyError is an area released twice, or never placed

    def read(self, area: Area, what: str) -> bytes:
        return self.data[area] if area.length else b""


@given(st.lists(st.lists(st.tuples(st.booleans(), st.integers(0, 60)), max_size=40), max_size=6), st.randoms())
@settings(max_examples=60)
def test_table_holds_what_was_put(commits: list[list[tuple[bool, int]]], rng: random.Random) -> None:
    clusters = Clusters()
    area = clusters.place(AREA.build(**Area()._asdict()))
    model: dict[bytes, Record] = {}
    bits = 0
    for changes in commits:
        table = NamespaceTable("s", clusters.read(area, ""), len(model), clusters.read)
        for remove, number in changes:
            name = b"node-%d" % number
            if remove and name in model:
                table.remove(name)
                del model[name]
            elif not remove:
                model[name] = Record(name, store.KIND_NODE, rng.randbytes(16), number, path=b"/x")
                table.put(model[name])
        assert table.count == len(model)
        area = table.seal(clusters.place, clusters.release, area)
        assert table.bucket_bits >= bits, "a table only grows"
        bits = table.bucket_bits
        assert len(model) <= store.RECORDS_PER_BUCKET << bits
        found = NamespaceTable("s", clusters.read(area, ""), len(model), clusters.read)
        assert {record.name: record for record in found} == model
        for name, record in model.items():
            assert found.get(name) == record
            assert record in parse_records(clusters.read(found.areas()[crc32c.crc32c(name) % (1 << bits)], ""))
        assert clusters.live == {area, *found.areas()} - {Area()}, "what is not used was given up, and nothing else"


@pytest.mark.parametrize("wrong", ["bucket", "twice", "count"])
def test_table_with_a_record_out_of_place_is_refused(wrong: str) -> None:
    record = Record(b"a", store.KIND_NODE, bytes(16), 0, path=b"/a")
    clusters = Clusters()
    bucket = clusters.place(build_record(record) * (2 if wrong == "twice" else 1))
    home = crc32c.crc32c(b"a") % 2
    pointers = [Area(), Area()]
    pointers[1 - home if wrong == "bucket" else home] = bucket
    raw = b"".join(AREA.build(**pointer._asdict()) for pointer in pointers)
    table = NamespaceTable("s", raw, 0 if wrong == "count" else 2, clusters.read)
    with pytest.raises(FormatError, match=f"s: bucket {pointers.index(bucket)}"):
        list(table)


def test_table_is_full_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_NAMESPACES", 3)
    table = NamespaceTable("s", AREA.build(**Area()._asdict()), 0, Clusters().read)
    for number in range(3):
        table.put(Record(b"%d" % number, store.KIND_NODE, bytes(16), 0, path=b"/a"))
    with pytest.raises(FormatError, match="more than 3"):
        table.put(Record(b"3", store.KIND_NODE, bytes(16), 0, path=b"/a"))


# The space map


class SpaceModel:
    """Commits of a space map in memory, each held against what neither header slot may refer to."""

    def __init__(self, cluster_size: int) -> None:
        self.cluster = cluster_size
        self.file: dict[int, bytes] = {}
        first = geometry.ceil_div(store.RESERVED, cluster_size)
        used = first + 2
        leaf = ((1 << used) - 1).to_bytes(cluster_size, "little")
        root = LEAF.build(offset=first * cluster_size, free=cluster_size * 8 - used, checksum=crc32c.crc32c(leaf))
        self.file = {first * cluster_size: leaf, (first + 1) * cluster_size: root}
        self.reserved = set(range(first))
        self.clusters = used
        self.root = Area((first + 1) * cluster_size, len(root), crc32c.crc32c(root))
        self.released = Area()
        self.held: dict[int, Area] = {}  # what users of the map have
        self.keys = itertools.count(1)
        self.used = self._used()
        self.older: set[int] = set()  # clusters that the commit before the last one used

    def read(self, area: Area, what: str) -> bytes:
        data = self.file[area.offset] if area.length else b""
        assert crc32c.crc32c(data) == area.checksum
        return data

    def _map(self) -> SpaceMap:
        values = directory.parse_table(self.read(self.released, ""))
        runs = list(zip(values[::2], values[1::2], strict=True))
        return SpaceMap("s", self.cluster, self.clusters, self.read(self.root, ""), runs, self.read)

    def _used(self) -> set[int]:
        space = self._map()
        own = [self.root, self.released, *space.places, *self.held.values()]
        return self.reserved.union(*(area.clusters(self.cluster) for area in own))

    def commit(self, takes: list[int], gives: list[int]) -> None:
        space = self._map()
        untouchable = self.used | self.older
        for key in gives:
            if key in self.held:
                space.release(self.held.pop(key))
        taken: list[int] = []
        for count in takes:
            first = space.take(count)
            taken += range(first, first + count)
            self.held[next(self.keys)] = Area(first * self.cluster, count * self.cluster)
        root, released, writes = space.seal(self.root, self.released)
        for offset, data in writes:
            taken += range(offset // self.cluster, geometry.ceil_div(offset + len(data), self.cluster))
        assert len(taken) == len(set(taken)), "a cluster was taken twice"
        assert not untouchable & set(taken), "a commit wrote where a header slot still leads to"
        self.file.update((offset, bytes(data)) for offset, data in writes)
        self.older, (self.root, self.released, self.clusters) = self.used, (root, released, space.clusters)
        self.used = self._used()
        self.verify()

    def verify(self) -> None:
        space = self._map()
        values = directory.parse_table(self.read(self.released, ""))
        released = set().union(*(range(f, f + n) for f, n in zip(values[::2], values[1::2], strict=True)))
        assert released >= self.older - self.used, "what this commit stopped using is not listed"
        assert not released & self.used
        leaves = b"".join(space.leaf(index).to_bytes(4096, "little") for index in range(len(space.places)))
        marked = np.flatnonzero(np.unpackbits(np.frombuffer(leaves, np.uint8), bitorder="little"))
        assert set(marked.tolist()) == self.used | released
        assert max(self.used) < self.clusters


@given(
    st.lists(st.tuples(st.lists(st.integers(1, 9), max_size=6), st.lists(st.integers(1, 40), max_size=8)), max_size=30)
)
@settings(max_examples=150)
def test_cluster_is_reused_only_when_neither_slot_leads_to_it(commits: list[tuple[list[int], list[int]]]) -> None:
    model = SpaceModel(4096)
    for takes, gives in commits:
        model.commit(takes, gives)


@pytest.mark.parametrize("count", [1, 5000, 4 * 8 * 4096 + 7])
def test_space_given_up_is_taken_again_however_large(count: int) -> None:
    model = SpaceModel(4096)
    model.commit([8000] * 17, [])
    # Every other cluster of the first four leaves is given up: much room, and no two clusters of it adjacent.
    for area in list(model.held.values()):
        for cluster in area.clusters(4096):
            model.held[next(model.keys)] = Area(cluster * 4096, 4096)
    for key in range(1, 18):
        del model.held[key]
    model.commit([], list(model.held)[::2])
    sizes, last = [], None
    for _ in range(9):
        model.commit([count], [last] if last else [])
        last = max(model.held)
        sizes.append(model.clusters)
    assert sizes[4] == sizes[-1], "replacing an area makes the file longer only until the first place is free again"


@pytest.mark.parametrize("wrong", ["free", "headers", "leaves", "shared"])
def test_space_map_that_contradicts_itself_is_refused(wrong: str) -> None:
    model = SpaceModel(4096)
    leaf = bytearray(model.file[0x4000])
    leaf[0] &= 0xF0 if wrong == "headers" else 0xFF
    free = 4096 * 8 - sum(map(int.bit_count, leaf)) + (wrong == "free")
    root = LEAF.build(offset=0x4000, free=free, checksum=crc32c.crc32c(leaf)) * (1 + (wrong == "shared"))
    model.file[0x4000] = bytes(leaf)
    clusters = 4096 * 8 + 1 if wrong in ("leaves", "shared") else model.clusters
    with pytest.raises(FormatError, match="s: space map"):
        SpaceMap("s", 4096, clusters, root, [], model.read).leaf(0)


# The whole file


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    """An empty store, and a disk of a million bytes beside it that is its node ``disk``."""
    where = str(tmp_path / "s.dmap")
    create(where)
    with open(tmp_path / "disk.raw", "wb") as disk:
        disk.truncate(1_000_000)
    with Store(where) as target:
        add_node(target, "disk", str(tmp_path / "disk.raw"))
    yield where
    assert not dm.check(where).findings


@given(seed=st.integers(0, 2**32), granularity=st.sampled_from([512, 4096, 65536]))
@settings(max_examples=25)
def test_bits_lie_as_the_format_says(seed: int, granularity: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    tmp_path = tmp_path_factory.mktemp("bits")
    where = str(tmp_path / "s.dmap")
    size = random.Random(seed).randrange(0, 40_000_000)
    (tmp_path / "disk").write_bytes(b"")
    os.truncate(tmp_path / "disk", size)
    create(where)
    with Store(where) as target:
        add_node(target, "disk", str(tmp_path / "disk"))
    count = geometry.granules(size, granularity)
    dirty = np.random.default_rng(seed).random(count) < random.Random(seed).choice([0, 0.1, 0.9, 1])
    offsets = np.flatnonzero(dirty) * granularity
    lengths = np.minimum(granularity, size - offsets)
    with dm.open(Address(where, "disk")) as image, image.transaction() as bitmaps:
        bitmaps["b"] = dm.Bitmap.from_extents(size, offsets, lengths, granularity)
    with Store(where) as target:
        record = target.read(lambda snapshot: snapshot.table().get(b"disk"))
        area = record.directory
    raw = Path(where).read_bytes()
    ((_, entry),) = parse_entries(raw[area.offset : area.offset + area.length])
    expected = np.packbits(dirty, bitorder="little").tobytes()
    if not dirty.any() or dirty.all():
        assert entry.table_offset == (store.ALL_ONES if count and dirty.all() else store.ALL_ZEROS)
        assert entry.table_size == 0
    else:
        assert entry.table_offset % 4096 == 0
        assert entry.table_size == geometry.ceil_div(len(expected), 4096)
        assert raw[entry.table_offset : entry.table_offset + len(expected)] == expected
        assert BITS_CHECKSUM.parse(entry.extra_data).checksum == crc32c.crc32c(expected)
    assert entry.granularity == granularity


@pytest.mark.parametrize(("moved", "asked"), [(0, 1), (1, 1), (2, 2)])
def test_answer_counts_unless_the_store_moved_on_by_two(path: str, moved: int, asked: int) -> None:
    calls = []

    def read(snapshot: Any) -> int:
        calls.append(snapshot.header.generation)
        if len(calls) == 1:
            for number in range(moved):
                with dm.open(Address(path, "disk")) as image, image.transaction() as bitmaps:
                    bitmaps[f"b{number}"] = dm.Bitmap(image.size)
        return len(calls)

    with Store(path) as target:
        assert target.read(read) == asked
    assert calls == [calls[0], calls[0] + moved][:asked]


def test_failed_checksum_counts_only_if_the_store_stood_still(path: str) -> None:
    calls = []

    def read(snapshot: Any) -> str:
        calls.append(None)
        if len(calls) == 1:
            with dm.open(Address(path, "disk")) as image, image.transaction() as bitmaps:
                bitmaps["b"] = dm.Bitmap(image.size)
            raise FormatError(path, "made up")
        return "read"

    with Store(path) as target:
        assert target.read(read) == "read"
        with pytest.raises(FormatError, match="made up"):
            target.read(lambda snapshot: (_ for _ in ()).throw(FormatError(path, "made up")))


def test_bits_taken_over_from_another_namespace_are_copied(path: str, tmp_path: Path) -> None:
    (tmp_path / "twin.raw").write_bytes(bytes(1_000_000))
    with Store(path) as target:
        add_node(target, "twin", str(tmp_path / "twin.raw"))
    with dm.open(Address(path, "disk")) as disk, dm.open(Address(path, "twin")) as twin:
        with disk.transaction() as bitmaps:
            bitmaps["b"] = dm.Bitmap.from_extents(1_000_000, [0], [70_000], 4096)
        with twin.transaction() as bitmaps:
            bitmaps["b"] = disk["b"]
        with disk.transaction() as bitmaps:
            del bitmaps["b"]
        for number in range(4):
            with disk.transaction() as bitmaps:
                bitmaps[f"{number}"] = dm.Bitmap.from_extents(1_000_000, [0], [1], 512)
        assert twin["b"].count == 18 * 4096


def test_image_from_before_1970_can_be_a_node(path: str, tmp_path: Path) -> None:
    (tmp_path / "old.raw").write_bytes(b"x")
    os.utime(tmp_path / "old.raw", ns=(-1, -1))
    with Store(path) as target:
        add_node(target, "old", str(tmp_path / "old.raw"))
    with dm.open(Address(path, "old")) as image:
        with image.transaction() as bitmaps:
            bitmaps["b"] = dm.Bitmap(1)
        assert image["b"].count == 0


def test_granularity_too_fine_for_the_disk_is_refused_without_making_the_bits(path: str, tmp_path: Path) -> None:
    with open(tmp_path / "huge.raw", "wb") as huge:
        huge.truncate(1 << 43)
    with Store(path) as target:
        add_node(target, "huge", str(tmp_path / "huge.raw"))
    with (
        dm.open(Address(path, "huge")) as image,
        pytest.raises(dm.BitmapError, match="bytes of bits"),
        image.transaction() as bitmaps,
    ):
        bitmaps["b"] = dm.Bitmap(1 << 43, 512)


def test_dump_shows_every_byte_of_metadata(path: str) -> None:
    with dm.open(Address(path, "disk")) as image, image.transaction() as bitmaps:
        bitmaps["b"] = dm.Bitmap.from_extents(1_000_000, [0], [70_000], 512)
        bitmaps["ones"] = dm.Bitmap.from_extents(1_000_000, [0], [1_000_000])
    document = dm.dump(path, with_hex=True)
    raw = Path(path).read_bytes()
    assert document["faults"] == []
    assert document["stopped"] is None
    assert document["format"] == "dirtmap"
    seen = []
    for structure in document["structures"]:
        start, length = structure["offset"], structure["length"]
        assert bytes.fromhex(structure["hex"]) == raw[start : start + length]
        seen.append(structure["name"])
        for field in structure.get("fields", ()):
            part = raw[field["offset"] : field["offset"] + field["length"]]
            value = field["value"]
            assert (
                value in (part.hex(), part.decode(errors="replace"))
                if isinstance(value, str)
                else value == int.from_bytes(part, "big")
            )
    assert [name for name in seen if not name.startswith("header")] == [
        "namespace table",
        "namespace record: node 'disk'",
        "directory entry: node 'disk', bitmap 'b'",
        "bits: node 'disk', bitmap 'b'",
        "directory entry: node 'disk', bitmap 'ones'",
        "space map",
        "space map leaf 0",
        "released clusters",
    ]


# Helpers


def _header(generation: int) -> Header:
    return Header(
        uuid=uuid.UUID(int=1).bytes,
        generation=generation,
        commit_id=uuid.UUID(int=generation).bytes,
        doubt_generation=0,
        cluster_bits=12,
        clusters=7,
        table=Area(0x4000, 16, 0),
        bucket_bits=0,
        namespaces=0,
        space=Area(0x6000, 16, 0),
        released=Area(),
    )


def _damaged(generation: int) -> bytes:
    block = bytearray(headers.build_block(_header(generation)))
    block[1000] ^= 1
    return bytes(block)


def _patched(block: bytes, name: str, value: int) -> bytes:
    field = HEADER.field(name)
    changed = bytearray(block)
    changed[field.offset : field.offset + field.size] = value.to_bytes(field.size, "big")
    changed[-4:] = crc32c.crc32c(changed[:-4]).to_bytes(4, "big")
    return bytes(changed)


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
