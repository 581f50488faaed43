"""SPEC.md and README.md say what the code does: their tables are compared with the declarations."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from support.documents import README, SPEC, judged, rows, tables

from dirtmap.engine.qcow2 import layout
from dirtmap.engine.system import locks
from dirtmap.fmt import directory, extensions, geometry, index, live, qcow2, store
from dirtmap.fmt.directory import build_directory, parse_entries
from dirtmap.fmt.extensions import parse_chain
from dirtmap.fmt.parsers.qcow2 import BITMAPS_EXTENSION, POINTER
from dirtmap.fmt.qcow2 import bitmaps_extension_faults
from dirtmap.fmt.structure import Structure
from dirtmap.tools.cli import main

# SPEC.md describes every limit of these modules, and every structure of those that declare the same formats.
DESCRIBED: list[ModuleType] = [geometry, extensions, directory, qcow2, store, index, live]
DECLARING = {
    module: importlib.import_module(module.__name__.replace(".fmt.", ".fmt.parsers."))
    for module in DESCRIBED
    if module is not geometry  # it has none
}
STRUCTURES = {
    found.name: found
    for module in DECLARING.values()
    for found in vars(module).values()
    if isinstance(found, Structure)
}


def fields_described(text: str) -> dict[str, list[tuple[str, int, int]]]:
    """By structure: name, offset and size of each field, from the byte tables.

    A table of one structure stands under its name; one of several names each where it begins.
    """
    found: dict[str, list[tuple[str, int, int]]] = {}
    for table in tables(text):
        if table.columns[-4:] == ("offset", "size", "field", "meaning"):
            name = table.heading
            for row in table.rows:
                name = row.get("structure") or name
                found.setdefault(name, []).append((row["field"], int(row["offset"]), int(row["size"])))
    return found


def fields_declared() -> dict[str, list[tuple[str, int, int]]]:
    return {name: [tuple(field) for field in structure.fields] for name, structure in STRUCTURES.items()}


def test_byte_tables_are_the_declarations() -> None:
    assert fields_described(SPEC) == fields_declared()


@pytest.mark.parametrize(
    "change",
    [
        lambda line: "",  # missing
        lambda line: line.replace("| 8 | 4 |", "| 12 | 4 |"),  # moved
        lambda line: line.replace("| 8 | 4 |", "| 8 | 8 |"),  # of another size
        lambda line: line.replace("table_size", "table_length"),  # renamed
        lambda line: f"{line}\n{line}",  # twice
    ],
)
def test_a_field_that_is_described_wrongly_is_noticed(change: Callable[[str], str]) -> None:
    line = "| 8 | 4 | table_size | its length in entries |"
    assert SPEC.count(line) == 1
    changed = SPEC.replace(f"{line}\n", f"{change(line)}\n".lstrip("\n"))
    assert fields_described(changed) != fields_declared()


def test_feature_bits() -> None:
    names = {
        "incompatible_features": qcow2.INCOMPATIBLE_NAMES,
        "compatible_features": qcow2.COMPATIBLE_NAMES,
        "autoclear_features": qcow2.AUTOCLEAR_NAMES,
    }
    declared = {(field, bit, name) for field, bits in names.items() for bit, name in bits.items()}
    found = rows("field", "bit", "name", "what dirtmap does")
    assert {(row["field"], 1 << int(row["bit"]), row["name"]) for row in found} == declared


def test_extension_types() -> None:
    assert {int(row["type"], 16): row["name"] for row in rows("type", "name")} == qcow2.EXTENSION_NAMES


def test_flags() -> None:
    found = rows("flag bit", "name", "meaning")
    assert {1 << int(row["flag bit"]): row["name"] for row in found} == directory.FLAG_NAMES


def test_limits() -> None:
    declared = {constant: value for module in [*DESCRIBED, layout] for constant, value in limits(module)}
    described = {row["constant"]: row["value"] for row in rows("limit", "value", "constant", "source")}
    assert all(re.fullmatch(r"[0-9a-fx]+( *[-*^] *[0-9]+)*", value) for value in described.values())
    assert {constant: eval(value.replace("^", "**")) for constant, value in described.items()} == declared


def limits(module: ModuleType) -> Iterator[tuple[str, int]]:
    """The limits that the module itself declares, not those it imports."""
    source = Path(str(module.__file__)).read_text()
    for name in re.findall("^(_?(?:MIN|MAX|MOST)_[A-Z0-9_]+) = ", source, re.MULTILINE):
        yield f"{module.__name__.rpartition('.')[2]}.{name}", getattr(module, name)


def test_locks() -> None:
    found = {
        row["who"]: (set(row["takes"].split()), set(row["tests"].split())) for row in rows("who", "takes", "tests")
    }
    takes, tests = found["dirtmap, writing"]
    assert takes == set(map(str, locks._WRITER_TAKES))
    assert tests == set(map(str, locks._WRITER_TESTS))


def test_every_field_that_can_be_at_fault_is_listed() -> None:
    listed = {row["field"] for row in rows("field", "refused", "judge", "reason")}
    found = judged(directory) | judged(qcow2)
    assert found <= listed
    assert {"magic", "cluster_bits", "nb_bitmaps", "flags", "table_size"} <= found


def test_example() -> None:
    """The hex dump of the example is what the parsers make of it, and what the builders make again."""
    lines = re.findall(r"^([0-9a-f]{8})  ((?:[0-9a-f]{2} )+)", SPEC, re.MULTILINE)
    image = {int(at, 16): bytes.fromhex(data) for at, data in lines}
    autoclear = POINTER.parse(image[0x50], qcow2.AUTOCLEAR_OFFSET - 0x50).offset
    assert autoclear == qcow2.AUTOCLEAR_BITMAPS
    chain = parse_chain(image[0x1F8] + image[0x200] + image[0x210], 0, 40)
    ((kind, _, data),) = chain.extensions
    assert chain.terminated
    assert kind == qcow2.EXTENSION_BITMAPS
    assert list(bitmaps_extension_faults(data, 65536, 1 << 30)) == []
    pointer = BITMAPS_EXTENSION.parse(data)
    entries_as_stored = image[pointer.directory_offset] + image[pointer.directory_offset + 16]
    assert len(entries_as_stored) == pointer.directory_size
    ((_, entry),) = parse_entries(entries_as_stored)
    assert list(directory.entry_faults(entry, 1 << 30, 65536)) == []
    assert build_directory([entry]) == entries_as_stored
    assert (entry.name, entry.granularity, entry.auto, entry.in_use) == (b"monday", 65536, True, False)
    (cluster,) = directory.parse_table(image[entry.table_offset])
    assert int.from_bytes(image[cluster], "little") == (1 << 64) - (1 << 16)


def test_readme_lists_the_commands() -> None:
    (listed,) = (table for table in tables(README) if table.columns == ("command", "does"))
    named = {row["command"].split()[0].strip("`") for row in listed.rows}
    assert named == set(main.list_commands(main.make_context("dirtmap", ["list"], resilient_parsing=True)))
