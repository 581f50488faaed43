"""The test vectors: dirtmap, the tests' own readers and QEMU say of each what its document says; all are as made."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import plain, qemu
from support.documents import SPEC, tables
from support.vectors import (
    VECTORS,
    Said,
    extents_of,
    plainly,
    told_of_image,
    told_of_store,
    told_of_tracker,
)
from vectors import make

from dirtmap.engine.storefile import header as headers
from dirtmap.fmt import store
from dirtmap.fmt.structures.directory import DIRECTORY_ENTRY
from dirtmap.fmt.structures.store import RECORD

SOUND = sorted(VECTORS.glob("stores/*.json"))
STORES = [*SOUND, *sorted(VECTORS.glob("damaged/*.json"))]
KILLED = sorted(VECTORS.glob("killed/*/said.json"))
IMAGES = sorted(VECTORS.glob("qcow2/*.json"))
README = (VECTORS / "README.md").read_text()


def titled(path: Path) -> str:
    return f"{path.parent.name}-{path.stem}"


def said_in(path: Path) -> Said:
    """What a document says, without what it is for."""
    said = json.loads(path.read_text())
    assert said.pop("what")
    return said  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All vectors, made anew."""
    folder = tmp_path_factory.mktemp("made")
    make.make_all(folder)
    return folder


def test_made_anew_they_are_the_same_bytes(made: Path) -> None:
    def files(folder: Path) -> dict[str, bytes]:
        found = itertools.chain.from_iterable((folder / part).rglob("*") for part in make.FOLDERS)
        return {str(path.relative_to(folder)): path.read_bytes() for path in found if path.is_file()}

    new, old = files(made), files(VECTORS)
    assert sorted(new) == sorted(old)
    assert [name for name in new if new[name] != old[name]] == []
    assert len(new) > 150


@pytest.mark.parametrize("document", STORES, ids=titled)
def test_store(document: Path, tmp_path: Path) -> None:
    said = said_in(document)
    path = tmp_path / said.pop("file")
    shutil.copy(document.with_name(path.name), path)
    assert told_of_store(path) == said


@pytest.mark.parametrize("document", SOUND, ids=titled)
def test_sound_store_by_the_other_reader(document: Path) -> None:
    said = said_in(document)
    found = plainly(document.with_name(said.pop("file")).read_bytes())
    for namespace in said["namespaces"]:  # which that reader does not look for
        namespace |= {"checkpoints": [], "holds": []}
    assert found == said


@pytest.mark.parametrize("document", KILLED, ids=lambda path: path.parent.name)
def test_killed_tracker(document: Path, tmp_path: Path) -> None:
    said = said_in(document)
    assert said["files"] == {
        "store": "store.dmap",
        "live": "live" if (document.parent / "live").exists() else None,
        "log": "intent" if (document.parent / "intent").exists() else None,
    }
    folder = tmp_path / "vector"
    shutil.copytree(document.parent, folder)
    assert [told_of_tracker(folder, said, case) for case in said["cases"]] == said["cases"]
    assert said["cases"]


def test_every_row_of_the_recovery_table_is_there() -> None:
    rows = {one["row"] for path in KILLED for case in said_in(path)["cases"] for one in case["namespaces"]}
    assert rows == {"exact", "logged regions", "all dirty"}


@pytest.mark.parametrize("document", IMAGES, ids=titled)
def test_image(document: Path, tmp_path: Path) -> None:
    said = said_in(document)
    path = tmp_path / said.pop("file")
    shutil.copy(document.with_name(path.name), path)
    assert told_of_image(path) == said


@pytest.mark.parametrize("document", IMAGES, ids=titled)
def test_image_by_qemu_and_the_other_reader(document: Path, tmp_path: Path) -> None:
    said = said_in(document)
    path = tmp_path / said.pop("file")
    shutil.copy(document.with_name(path.name), path)
    if not said["readable"]:
        qemu.run("qemu-img", "info", str(path), status=1)
        with pytest.raises(plain.Broken):
            plain.Reader(path.read_bytes()).bitmaps()
        return
    bitmaps = {one["name"]: one for one in said["bitmaps"]}
    found = plain.Reader(path.read_bytes()).bitmaps()
    assert {one.name.decode() for one in found} == set(bitmaps)
    for one in found:
        expected = bitmaps[one.name.decode()]
        assert (1 << one.granularity_bits, bool(one.flags & 2)) == (expected["granularity"], expected["recording"])
        if not one.flags & 1:
            assert extents_of(one.packed, said["size"], expected["granularity"]) == expected["dirty"]
    told: dict[str, Any] = qemu.info(path)
    assert (told["virtual-size"], told["cluster-size"]) == (said["size"], said["cluster_size"])
    flags = {
        one["name"]: (one["granularity"], "auto" in one["flags"], "in-use" in one["flags"])
        for one in told["format-specific"]["data"].get("bitmaps", [])
    }
    assert flags == {name: (one["granularity"], one["recording"], one["inconsistent"]) for name, one in bitmaps.items()}
    for name, one in bitmaps.items():
        if one["dirty"] is not None:
            assert qemu.dirty(path, name) == [tuple(extent) for extent in one["dirty"]]
    qemu.qemu_img("check", path, status=3 if document.stem == "void" else 0)


def test_readme_tells_of_each() -> None:
    there = {path.parent.name for path in KILLED} | {path.stem for path in (*STORES, *IMAGES)}
    assert set(re.findall(r"^\| `([a-z0-9-]+)` \|", README, re.M)) == there
    for path in (*KILLED, *STORES, *IMAGES):
        title = path.parent.name if path.name == "said.json" else path.stem
        assert f"| `{title}` | {json.loads(path.read_text())['what']} |" in README


# The example of SPEC.md.

EXAMPLE = re.split(r"^#.* Example of a killed tracker$", SPEC, flags=re.M)[1].partition("\n#")[0]
FOLDER = VECTORS / "killed" / "example"
# The name of a file, and what is shown of it: offset, bytes and a comment, with two spaces between.
BLOCKS = re.findall(r"^`([a-z0-9./-]+)`,[^`]*(?:`[a-z]+`[^`]*)?\n\n```\n(.*?)```", EXAMPLE, re.M | re.S)


def _shown(text: str) -> dict[int, bytes]:
    lines = re.findall(r"^([0-9a-f]{5})  ((?:[0-9a-f]{2} ?)+)(?= |$)", text, re.M)
    return {int(at, 16): bytes.fromhex(data) for at, data in lines}


def test_example_shows_the_files_of_the_vector() -> None:
    assert [name for name, _ in BLOCKS] == [
        "store.dmap",
        "live/control",
        "live/bits",
        "live/markers",
        "intent",
    ]
    for name, text in BLOCKS:
        data, shown = (FOLDER / name).read_bytes(), _shown(text)
        assert len(shown) == text.count("\n"), name
        for at, line in shown.items():
            assert data[at : at + len(line)] == line, f"{name}, {at:05x}"
        if name != "store.dmap":
            assert f"`{name}`, {len(data)} bytes" in EXAMPLE
            rest = bytearray(data)
            for at, line in shown.items():
                rest[at : at + len(line)] = bytes(len(line))
            assert not any(rest), f"{name}: not all is shown that is not zero"


def test_example_shows_record_directory_and_bits_whole() -> None:
    shown = _shown(dict(BLOCKS)["store.dmap"])
    data = (FOLDER / "store.dmap").read_bytes()
    table = headers.choose("", data[: store.RESERVED]).header.table
    record = RECORD.parse(data[table.offset : table.offset + RECORD.size])
    assert record.length == table.length
    areas = (table.offset, table.length), (record.directory_offset, record.directory_length)
    expected = [at for start, length in areas for at in range(start, start + length, 16)]
    entry = DIRECTORY_ENTRY.parse(data[record.directory_offset : record.directory_offset + DIRECTORY_ENTRY.size])
    assert sorted(shown) == sorted([entry.table_offset, *expected])
    assert not any(data[entry.table_offset + 16 : entry.table_offset + store.BLOCK])


def test_example_says_what_recovery_makes_of_it() -> None:
    granule = 64 << 10

    def extents(text: str) -> list[list[int]]:
        runs = [[int(number) for number in part.split(" to ")] for part in text.split(", ")]
        return [[run[0] * granule, (run[-1] - run[0] + 1) * granule] for run in runs]

    (table,) = tables(EXAMPLE)
    assert [
        {
            "image_unchanged": row["image"] == "unchanged",
            "same_boot": row["boot"] == "the same",
            "namespaces": [
                {
                    "name": "disk",
                    "row": row["row"],
                    "bitmaps": [{"name": name, "dirty": extents(row[name])} for name in ("monday", "tuesday")],
                }
            ],
        }
        for row in table.rows
    ] == said_in(FOLDER / "said.json")["cases"]
