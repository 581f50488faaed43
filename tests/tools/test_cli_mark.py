"""`dirtmap mark`, and the extents that it takes from other programs."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import qemu
from support.cli import dirtmap, error_of, mapped

import dirtmap.engine as dm
from dirtmap.fmt.geometry import MAX_DISK_SIZE
from dirtmap.tools.extents import read_extents
from dirtmap.tools.foreign import lines as lines_module
from dirtmap.tools.inputs import Input

KIB, MIB = 1 << 10, 1 << 20

DIRTY = {"offset": 0, "length": 5, "type": 1, "description": "dirty"}
CLEAN = {"offset": 5, "length": 5, "type": 0, "description": "clean"}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qemu.create(path, 4 * MIB)
    dirtmap("add", path, "b")
    return path


def parse(text: str | bytes | list[Any], size: int = MAX_DISK_SIZE) -> list[tuple[int, int]]:
    data = json.dumps(text) if isinstance(text, list) else text
    found: list[tuple[int, int]] = []

    def put(offsets: Any, lengths: Any) -> None:
        assert offsets.dtype == lengths.dtype == np.int64
        found.extend(zip(offsets.tolist(), lengths.tolist(), strict=True))

    read_extents(Input(io.BytesIO(data if isinstance(data, bytes) else data.encode()), "F"), size, put)
    return found


def test_a_range(image: Path) -> None:
    dirtmap("mark", image, "b", "64K", "1")
    dirtmap("mark", image, "b", 4 * MIB - 1, 1)
    dirtmap("mark", image, "b", 4 * MIB, 0)
    assert mapped(image, "b") == qemu.dirty(image, "b") == [(64 * KIB, 64 * KIB), (4 * MIB - 64 * KIB, 64 * KIB)]
    qemu.check(image)


@pytest.mark.parametrize(
    ("offset", "length"), [("4M", "1"), ("0", str(4 * MIB + 1)), ("8191P", "8191P"), ("1", str(MAX_DISK_SIZE))]
)
def test_a_range_outside_the_disk(offset: str, length: str, image: Path) -> None:
    before = image.read_bytes()
    assert error_of("mark", image, "b", offset, length).startswith(f"{image}: bitmap 'b': ")
    assert error_of("mark", image, "b", "--from", "-", given=f"0 1\n{offset} {length}\n").startswith(
        "standard input: line 2: "
    )
    assert image.read_bytes() == before


def test_what_nbdinfo_prints(image: Path) -> None:
    dirtmap("mark", image, "b", "1M", "192K")
    dirtmap("add", image, "copy", "-g", "512")
    dirtmap("mark", image, "copy", "--from", "-", given=dirtmap("map", "--output=json", image, "b").out)
    assert mapped(image, "copy") == [(MIB, 192 * KIB)]


def test_what_qemu_img_map_prints(image: Path) -> None:
    qemu.qemu_io(image, "write -q 128k 64k", "write -q -z 2M 64k", "write -q 3M 1M")
    dirtmap("clear", image, "b")
    file = image.with_name("extents")
    file.write_text(qemu.qemu_img("map", "--output=json", image))
    dirtmap("mark", image, "b", "--from", file)
    # Zeros that the top image holds may have been something else before.
    assert mapped(image, "b") == [(128 * KIB, 64 * KIB), (2 * MIB, 64 * KIB), (3 * MIB, MIB)]


def test_what_rbd_diff_prints(image: Path) -> None:
    changed = [
        {"offset": 0, "length": 65536, "exists": "true"},
        {"offset": MIB, "length": 1, "exists": "false"},  # discarded since: changed as well
        {"offset": 2 * MIB, "length": 1, "exists": True},
    ]
    dirtmap("mark", image, "b", "--from", "-", given=json.dumps(changed))
    assert mapped(image, "b") == [(offset, 64 * KIB) for offset in (0, MIB, 2 * MIB)]


def test_lines() -> None:
    assert parse("0 1\n10\t20 \n\n 1K 2M\r\n5 5\n") == [(0, 1), (10, 20), (1024, 2 * MIB), (5, 5)]
    assert parse("\n0 1\n\n") == [(0, 1)]
    assert parse(f"0 {MAX_DISK_SIZE}\n") == [(0, MAX_DISK_SIZE)]


def test_json() -> None:
    assert parse([DIRTY, CLEAN], 10) == [(0, 5)]
    assert parse([]) == []
    assert parse(b" \n" + json.dumps([DIRTY, {**DIRTY, "offset": 8}]).encode()) == [(0, 5), (8, 5)]
    assert parse([{"start": 0, "length": 1, "data": True, "depth": 0, "zero": False, "new key": [{}]}], 1) == [(0, 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "F: empty; "),
        (" \n\n", "F: empty; "),
        ("0 1", "F: line 1: cut off"),
        ("0 1\n1048576 40", "F: line 2: cut off"),  # of 1048576 4096
        ("0 1\n1048576 4096\r", "F: line 2: cut off"),
        ("0\n", "F: line 1: 1 word instead of an offset and a length"),
        ("0 1\n\n0 1 2\n", "F: line 3: 3 words instead of an offset and a length"),
        ("0 1\n0 -1\n", "F: line 2: '-1' is not a size"),
        ("0 1\n0x1G 1\n", "F: line 2: '0x1G' is not a size"),
        ("0 1\n1.5K 1\n", "F: line 2: '1.5K' is not a size"),
        ("0 9223372036854775808\n", "F: line 1: '9223372036854775808' is more than 2^63-1 bytes"),
        ("# a comment\n", "F: line 1: 3 words"),
        ("Offset Length\n0 1\n", "F: line 1: 'Offset' is not a size"),
        (b"0 1\n\xff 1\n", "F: line 2: '\\xff' is not a size"),
        (b"0 1\n\0 1\n", "F: line 2: '\0' is not a size"),
        ("[", "F: entry 1: not clearly"),
        ("[" * 100_000, "F: entry 1: not clearly"),
        (b'[{"exists": "\xff"}]', "F: not valid JSON: "),
        ('[{"exists": ' + "9" * 5000 + "}]", "F: not valid JSON: "),
        ("{}", "F: entry 1: not clearly an extent as of nbdinfo, qemu-img, rbd, vmware or csi"),
        (json.dumps(DIRTY), "F: not an array of extents"),
        ([DIRTY, 5], "F: entry 2: not an extent"),
        (json.dumps([DIRTY])[:-1], "F: not valid JSON: cut off"),
        (json.dumps([DIRTY]) + "x", "F: not valid JSON: something follows"),
        ("[DIRTY,]".replace("DIRTY", json.dumps(DIRTY)), "F: not valid JSON: a value is missing"),
        ([[DIRTY]], "F: entry 1: not an extent"),
        ([{"offset": 0, "length": 1}], "F: entry 1: not clearly"),
        ([{**DIRTY, "exists": "true"}], "F: entry 1: not clearly"),
        ([DIRTY, {"offset": 0, "length": 1, "exists": "true"}], "F: entry 2: 'exists' is not a key"),
        ([{**DIRTY, "extra": DIRTY}], "F: entry 1: 'extra' is not a key of this format"),
        ([DIRTY, {**DIRTY, "offset": -1}], "F: entry 2: 'offset' is not a number of bytes"),
        ([{**DIRTY, "length": 1.0}], "F: entry 1: 'length' is not a number of bytes"),
        ([{**DIRTY, "length": True}], "F: entry 1: 'length' is not a number of bytes"),
        ([{**DIRTY, "length": "1"}], "F: entry 1: 'length' is not a number of bytes"),
        ([{**DIRTY, "length": 2**63}], "F: entry 1: 'length' is not a number of bytes"),
        ([{"type": 1, "description": "dirty", "length": 1}], "F: entry 1: 'offset' is not a number of bytes"),
        ([{**DIRTY, "type": 0}], "F: entry 1: neither type 0, 'clean', nor type 1, 'dirty'"),
        ([{**DIRTY, "type": True}], "F: entry 1: neither type 0"),
        ([{**DIRTY, "description": "hole"}], "F: entry 1: neither type 0"),  # a map of base:allocation
        ([{"offset": 0, "length": 5, "type": 1}], "F: entry 1: neither type 0"),
        ([{"start": 0, "length": 5, "zero": True}], "F: entry 1: 'data' is neither true nor false"),
        ([{"start": 0, "length": 5, "data": "true"}], "F: entry 1: 'data' is neither true nor false"),
        ([{"offset": 0, "length": 5, "exists": "yes"}], "F: entry 1: 'exists' is neither true nor false"),
        ('[{"offset": 0, "offset": 1, "length": 5, "exists": "true"}]', "F: entry 1: a key appears twice"),
        ('[{"offset": NaN, "length": 5, "exists": "true"}]', "F: entry 1: 'offset' is not a number of bytes"),
    ],
)
def test_what_is_unclear_is_refused_by_its_place(text: str | bytes | list[Any], message: str) -> None:
    with pytest.raises(dm.Error) as caught:
        parse(text)
    assert f"{caught.value.where}: {caught.value.what}".startswith(message)


def test_refusals(image: Path) -> None:
    before = image.read_bytes()
    assert error_of("mark", image, "b", "--from", "-", given="0 1\nx y\n").startswith("standard input: line 2: ")
    assert error_of("mark", image, "b", "--from", image.parent).startswith(f"{image.parent}: read: ")
    # As behind a program that failed: qemu-img map --output=json gone.qcow2 | dirtmap mark ... --from -
    assert error_of("mark", image, "b", "--from", "-", given="").startswith("standard input: empty; ")
    assert error_of("mark", image, "c", "0", "1") == f"{image}: bitmap 'c': there is no such bitmap"
    assert image.read_bytes() == before


SIZES = st.integers(0, MAX_DISK_SIZE) | st.integers(0, 100)
GAPS = st.text(" \t", min_size=1, max_size=3)


@given(
    st.lists(st.tuples(SIZES, SIZES, GAPS, st.text(" \t\r", max_size=2), st.booleans()), min_size=1, max_size=30),
    st.integers(1, 200),
)
def test_lines_whatever_their_blanks(rows: list[tuple[int, int, str, str, bool]], chunk: int) -> None:
    inside = [(min(offset, MAX_DISK_SIZE - length), length) for offset, length, *_ in rows]
    text = "".join(
        f"{offset}{gap}{length}{end}\n" + "\n" * empty
        for (offset, length), (_, _, gap, end, empty) in zip(inside, rows, strict=True)
    )
    number = text.count("\n") + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines_module, "_CHUNK", chunk)
        assert sorted(parse(text)) == sorted(inside)
        with pytest.raises(dm.FormatError, match=f"^F: line {number}: "):
            parse(text + "x y\n")
        with pytest.raises(dm.RangeError, match=f"^F: line {number}: "):
            parse(text + f"1 {MAX_DISK_SIZE}\n")


@given(st.lists(st.tuples(st.integers(1, 1 << 40), st.booleans()), min_size=1))
def test_json_of_all_kinds(parts: list[tuple[int, bool]]) -> None:
    rows, size = [], 0
    for length, flag in parts:
        rows.append((size, length, flag))
        size += length
    dirty = [(offset, length) for offset, length, flag in rows if flag]
    words = ("clean", "dirty")
    extents = [{"offset": o, "length": n, "type": int(f), "description": words[f]} for o, n, f in rows]
    assert parse(extents, size) == dirty
    top = [{"start": o, "length": n, "depth": 1, "data": f, "zero": not f, "present": f} for o, n, f in rows]
    assert parse(top, size) == dirty
    every = [(offset, length) for offset, length, _ in rows]
    assert parse([{"offset": o, "length": n, "exists": str(f).lower()} for o, n, f in rows], size) == every


def test_big_files_are_read_reasonably_fast() -> None:
    lines = "".join(f"{number * 65536} 65536\n" for number in range(500_000)).encode()
    begin = time.process_time()
    assert len(parse(lines)) == 500_000
    assert time.process_time() - begin < 2  # takes 0.2 s
