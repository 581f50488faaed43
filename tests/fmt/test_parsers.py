"""The parsers are those that the declarations ask for: as text, and by what they do with values and with bytes."""

from __future__ import annotations

import importlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from construct import (
    Array,
    Bytes,
    Const,
    ConstructError,
    Float32b,
    Int8ub,
    Int16ub,
    Int24ub,
    Int32sb,
    Int32ub,
    Int32ul,
    Int32un,
    Padded,
    Struct,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dirtmap.fmt import generate, parsers
from dirtmap.fmt.structure import AnyStructure

FOLDER = Path(str(parsers.__file__)).parent


def structure_of(name: str, constant: str) -> AnyStructure:
    found: AnyStructure = getattr(importlib.import_module(f"dirtmap.fmt.parsers.{name}"), constant)
    return found


# Each declaration, and the structure that was made of it.
ALL = {
    f"{name}.{constant}": (declared, structure_of(name, constant))
    for name in generate.formats()
    for constant, declared in generate.declarations(name).items()
}
each = pytest.mark.parametrize(("declared", "structure"), ALL.values(), ids=ALL)


def made(declared: Any) -> AnyStructure:
    """A structure, made of a declaration as those of a format are."""
    names: dict[str, Any] = {}
    exec(generate._HEAD.format(name="test") + generate.structure("TEST", declared), names)
    found: AnyStructure = names["TEST"]
    return found


def outcome(act: Callable[[], Any]) -> Any:
    """What comes of it; an error is one like any other."""
    try:
        return act()
    except (ConstructError, KeyError, TypeError, ValueError, struct.error):
        return "an error"


def attributes_of(structure: AnyStructure, parsed: Any) -> dict[str, Any]:
    return {field.name: getattr(parsed, field.name) for field in structure.fields}


@pytest.mark.parametrize("name", generate.formats())
def test_parsers_are_made_of_the_declarations_that_there_are(name: str) -> None:
    assert (FOLDER / f"{name}.py").read_text() == generate.source(name), "run 'make parsers'"


def test_every_declaration_has_a_parser() -> None:
    assert len(ALL) > 30
    for declared, structure in ALL.values():
        assert (structure.name, structure.size) == (declared.name, declared.sizeof())


@each
@settings(max_examples=20)  # there are 40 structures
@given(data=st.data())
def test_bytes_are_parsed_as_construct_parses_them(declared: Any, structure: AnyStructure, data: st.DataObject) -> None:
    size = structure.size
    raw = data.draw(st.binary(min_size=size, max_size=size) | st.binary(max_size=size + 8))
    expected = outcome(lambda: dict(declared.parse(raw), _io=None))
    found = outcome(lambda: attributes_of(structure, structure.parse(raw)))
    assert found == (expected if expected == "an error" else {name: expected[name] for name in found})
    assert found == outcome(lambda: attributes_of(structure, structure.parse(b"xyz" + raw, 3)))
    assert (found == "an error") == (len(raw) < size)
    if found != "an error":
        assert tuple(found.values()) == structure.unpack(raw)
        assert structure.build(**found) == raw[:size]


@each
@settings(max_examples=20)  # there are 40 structures
@given(data=st.data())
def test_values_are_built_as_construct_builds_them(declared: Any, structure: AnyStructure, data: st.DataObject) -> None:
    """Of the right values, and of those where one is too large, negative, too short, too long or not there."""
    lying = {field.name: field for field in structure.fields}
    values: dict[str, Any] = {}
    for field in declared.subcon.subcons:
        size = lying[field.name].size
        number = st.integers(0, 256**size - 1)
        values[field.name] = data.draw(
            st.binary(min_size=size, max_size=size) if isinstance(field.subcon, Bytes) else number
        )
    wrong = data.draw(st.sampled_from([None, "not there", *values]))
    if wrong == "not there":
        del values[data.draw(st.sampled_from(sorted(values)))]
    elif wrong:
        if isinstance(values[wrong], bytes):
            size = lying[wrong].size
            values[wrong] = data.draw(st.binary(max_size=size + 8).filter(lambda part: len(part) != size))
        else:
            values[wrong] = data.draw(st.integers(max_value=-1) | st.integers(256 ** lying[wrong].size))
    expected = outcome(lambda: declared.build(values))
    assert outcome(lambda: structure.build(**values)) == expected
    assert (expected == "an error") == bool(wrong)
    if not wrong and bytes not in map(type, values.values()):
        assert structure.pack(*values.values()) == expected


@each
@settings(max_examples=20)  # there are 40 structures
@given(data=st.data())
def test_records_in_a_row_are_those_one_by_one(declared: Any, structure: AnyStructure, data: st.DataObject) -> None:
    size, count = structure.size, data.draw(st.integers(0, 3))
    raw = data.draw(st.binary(min_size=size * count, max_size=size * count))
    assert list(structure.unpack_all(raw)) == [structure.unpack(raw, at) for at in range(0, len(raw), size)]
    with pytest.raises(struct.error):
        list(structure.unpack_all(raw + b"x"))


@each
def test_a_structure_has_no_gaps_and_its_numbers_are_aligned(declared: Any, structure: AnyStructure) -> None:
    at = 0
    for field, named in zip(structure.fields, declared.subcon.subcons, strict=True):
        assert field == (named.name, at, named.sizeof())
        assert isinstance(named.subcon, Bytes) or field.offset % field.size == 0, field
        assert structure.field(field.name) == field
        at += field.size
    assert at == structure.size


@pytest.mark.parametrize(
    "declared", [Int32ul, Int32sb, Int24ub, Float32b, Array(2, Int8ub), Const(b"magic"), Padded(8, Int32ub)]
)
def test_a_structure_takes_unsigned_numbers_and_bytes_only(declared: object) -> None:
    with pytest.raises(TypeError, match=r"s\.field: neither an unsigned number nor bytes"):
        generate.structure("S", "s" / Struct("field" / declared))


def test_a_structure_has_one_byte_order() -> None:
    with pytest.raises(TypeError, match="s: more than one byte order"):
        generate.structure("S", "s" / Struct("here" / Int32un, "anywhere" / Int32ub))


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
def test_a_structure_builds_nothing_that_does_not_fit(values: dict[str, Any], error: type[Exception]) -> None:
    structure = made("s" / Struct("magic" / Bytes(4), "count" / Int16ub))
    assert structure.build(magic=b"abcd", count=1) == b"abcd\0\1"
    with pytest.raises(error):
        structure.build(**values)
