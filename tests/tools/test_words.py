"""How commands take and show words: names of any bytes, plurals, columns, completion."""

from __future__ import annotations

import os
import subprocess
import unicodedata
from pathlib import Path

import pytest
from support import qemu
from support.cli import COMMAND, dirtmap, error_of, json_of, listed

from dirtmap.fmt.errors import counted

MIB = 1 << 20
ODD = os.fsdecode(b"odd-\xff")  # as the shell would give the name
SHOWN = "odd-\\xff"  # as JSON shows it


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path("disk.qcow2")
    qemu.create(path, MIB)
    return path


# Names that are not UTF-8.


def test_a_name_as_json_shows_it(image: Path) -> None:
    dirtmap("add", image, ODD)
    (name,) = listed(image)
    assert name == SHOWN
    dirtmap("mark", image, name, 0, 1)
    assert [extent["type"] for extent in json_of("map", image, name)] == [1, 0]
    dirtmap("disable", image, name)
    dirtmap("copy", image, name, image, "--as", "copy")
    dirtmap("merge", image, "copy", name)
    dirtmap("recover", image, name)
    dirtmap("rename", image, name, "even")
    assert list(listed(image)) == ["even", "copy"]
    assert error_of("remove", image, name) == f"{image}: bitmap '{SHOWN}': there is no such bitmap"


def test_a_name_that_is_such_text_wins(image: Path) -> None:
    dirtmap("add", image, ODD)
    dirtmap("add", image, SHOWN)  # a new name is taken as it is
    dirtmap("mark", image, SHOWN, 0, 1)
    counts = {bitmap["count"] for bitmap in json_of("list", image)[0]["bitmaps"]}
    assert counts == {0, 64 << 10}
    dirtmap("remove", image, SHOWN)
    assert json_of("list", image)[0]["bitmaps"][0]["count"] == 0  # that of the byte is left
    dirtmap("remove", image, SHOWN)
    assert listed(image) == {}


def test_a_text_that_shows_two_names(image: Path) -> None:
    for name in (b"\\xff\xff", b"\xff\\xff"):
        dirtmap("add", image, os.fsdecode(name))
    assert "is how 2 names are shown" in error_of("remove", image, r"\xff\xff")
    assert len(json_of("list", image)[0]["bitmaps"]) == 2


def test_a_source_in_another_image(image: Path) -> None:
    other = Path("other.qcow2")
    qemu.create(other, MIB)
    dirtmap("add", other, ODD)
    dirtmap("add", image, "b")
    dirtmap("merge", image, "b", SHOWN, "-b", other)
    assert "no such bitmap" in error_of("merge", image, "b", SHOWN)


def test_finding_a_name(image: Path) -> None:
    dirtmap("store", "create", os.environ["DIRTMAP_STORE"])
    dirtmap("node", "add", "n", image)
    dirtmap("add", "n", ODD)
    dirtmap("index", "scan", ".")
    assert [hit["name"] for hit in json_of("find", SHOWN)] == [SHOWN]
    assert json_of("find", "odd-\\xfe") == []


# Plurals.


def test_counted() -> None:
    assert counted(0, "bitmap") == "0 bitmaps"
    assert counted(1, "bitmap") == "1 bitmap"
    assert counted(-1, "byte") == "-1 bytes"
    assert counted(1, "entry", "entries") == "1 entry"
    assert counted(2, "entry", "entries") == "2 entries"


def test_one_is_no_plural(image: Path) -> None:
    dirtmap("store", "create", os.environ["DIRTMAP_STORE"])
    dirtmap("node", "add", "n", image)
    dirtmap("add", "n", "b")
    assert dirtmap("index", "scan", ".").out.startswith("1 image, 1 store, 1 bitmap, 0 of them inconsistent; ")
    assert dirtmap("find", "b").out.startswith("b: 1 bitmap\n")
    assert f"bitmap 'b': 1 byte at {MIB} is not inside a disk of {MIB} bytes" in error_of("mark", "n", "b", MIB, 1)
    assert "has 1 bitmap, whose" in error_of("node", "rename", "n", "m")
    assert dirtmap("index", "rebuild").out in ("1 container\n", "2 containers\n")


# Columns.


@pytest.mark.parametrize(
    "name", ["月曜日", "한국어", "e\u0301te\u0301", "नमस्ते", "\uff46\uff55\uff4c\uff4c", "plain", "größe"]
)
def test_columns_of_names_in_any_script(name: str, image: Path) -> None:
    dirtmap("add", image, name)
    dirtmap("add", image, "another-long-one")

    def columns(text: str) -> int:
        wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
        return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me") for c in text)

    _, header, *rows = dirtmap("list", image).out.splitlines()
    at = header.index("GRANULARITY")
    for row, expected in zip(rows, (name, "another-long-one"), strict=True):
        head, _, _ = row.partition(" KiB")
        assert row.startswith(f"  {expected} ")
        assert columns(head) == at + len("GRANULARITY") - len(" KiB")


# Completion.


def complete(*words: str) -> list[str]:
    environment = {"_DIRTMAP_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(words)}
    environment["COMP_CWORD"] = str(len(words) - 1)
    done = subprocess.run([COMMAND], env=os.environ | environment, capture_output=True, timeout=60, check=False)
    assert done.stderr == b""
    return [line for line in done.stdout.decode().splitlines() if line]


def test_completion_of_nodes_devices_and_bitmaps(image: Path) -> None:
    assert complete("dirtmap", "map", "") == ["file,"]  # no store yet
    dirtmap("store", "create", os.environ["DIRTMAP_STORE"])
    Path("raw").write_bytes(bytes(MIB))
    dirtmap("node", "add", "system", image)
    dirtmap("node", "add", "store2", "raw")
    dirtmap("device", "add", "sda", "--root", "store2")
    dirtmap("add", "sda", "b0")
    dirtmap("add", "system", "--", "-x")
    dirtmap("add", "system", ODD)
    assert complete("dirtmap", "map", "s") == ["plain,sda", "plain,store2", "plain,system", "file,s"]
    assert complete("dirtmap", "node", "remove", "s") == ["plain,store2", "plain,system"]
    assert complete("dirtmap", "node", "add", "s") == []
    assert complete("dirtmap", "device", "remove", "s") == ["plain,sda"]
    assert complete("dirtmap", "device", "set-root", "sda", "st") == ["plain,store2"]
    assert complete("dirtmap", "device", "add", "new", "--root", "sy") == ["plain,system"]
    assert complete("dirtmap", "map", "sda", "") == ["plain,b0"]
    # Behind "--", where names may begin with a dash.
    assert complete("dirtmap", "map", "--", "sda", "b") == ["plain,b0"]
    assert complete("dirtmap", "map", "--", "sy") == ["plain,system", "file,sy"]
    assert complete("dirtmap", "map", "system", "--", "-") == ["plain,-x"]
    assert complete("dirtmap", "hold", "sda", "b0", "--", "l") == ["file,l"]
    assert complete("dirtmap", "merge", "-b", "sda", "system", "b", "b") == ["plain,b0"]
    assert f"plain,{SHOWN}" in complete("dirtmap", "map", "system", "o")


def test_names_are_completed_from_the_store_that_was_chosen(image: Path) -> None:
    dirtmap("store", "create", "mine.dmap")
    Path("raw").write_bytes(bytes(MIB))
    dirtmap("node", "add", "n1", "raw", "--store", "mine.dmap")
    assert "plain,n1" in complete("dirtmap", "map", "--store", "mine.dmap", "n")
    assert "plain,n1" in complete("dirtmap", "node", "remove", "--store", "mine.dmap", "n")
