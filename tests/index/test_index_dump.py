"""`dirtmap dump` of an index: every entry, held against LMDB's own reading; of a damaged one, what is left; no writing.

Also of what is neither an index nor an image.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import crc32c
import lmdb
import pytest
from support import qemu
from support.cli import dirtmap, error_of, json_of

from dirtmap.engine.index.database import connect
from dirtmap.fmt import index as layout

MIB = 1 << 20
PAGE = 4096
LONG = "n" * 250  # stands in keys as a digest


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of a host with two stores, a device, and images with a name and without."""
    folder = tmp_path_factory.mktemp("dump")
    index = folder / "index"
    here = ("--store", folder / "default.dmap", "--index", index)
    for name in ("one", LONG):
        (folder / f"{name[:9]}.raw").write_bytes(bytes(MIB))
    dirtmap("node", "add", "one", folder / "one.raw", *here)
    dirtmap("node", "add", LONG, folder / f"{LONG[:9]}.raw", "--store", folder / "other.dmap", "--index", index)
    dirtmap("device", "add", "disk0", "--root", "one", *here)
    for name in ("named", "plain"):
        qemu.create(folder / f"{name}.qcow2", MIB)
        qemu.qemu_img("bitmap", "--add", folder / f"{name}.qcow2", "b0")
    dirtmap("node", "add", "named", folder / "named.qcow2", *here)
    for target in ("one", "disk0"):
        dirtmap("add", target, "b0", *here)
    dirtmap("index", "scan", folder, *here)
    return index


@pytest.fixture
def index(made: Path, tmp_path: Path) -> Path:
    """A copy, which nobody has open."""
    (tmp_path / "copy").mkdir()
    shutil.copy(made / "data.mdb", tmp_path / "copy")
    return tmp_path / "copy"


def entries(index: Path) -> list[tuple[bytes, bytes]]:
    with lmdb.open(str(index), readonly=True, lock=False) as env, env.begin() as txn, txn.cursor() as cursor:
        return list(cursor)


def value_of(structure: dict[str, Any], name: str) -> Any:
    (value,) = (field["value"] for field in structure["fields"] if field["name"] == name)
    return value


def test_every_entry_field_by_field(index: Path) -> None:
    document = json_of("dump", "--hex", index)
    assert document["filename"] == str(index)
    assert document["format"] == "index"
    assert document["file-size"] == (index / "data.mdb").stat().st_size
    assert document["faults"] == []
    assert document["stopped"] is None
    stored = entries(index)
    assert {key[:1] for key, _ in stored} == set(layout.TAGS)
    for structure, (key, value) in zip(document["structures"], stored, strict=True):
        assert structure["offset"] is None
        assert structure["length"] == len(value)
        assert structure["hex"] == value.hex()
        assert structure["name"].split(":")[0] == layout.TAGS[key[:1]]
        at = 0
        for field in structure["fields"]:
            assert field["offset"] == at, structure["name"]  # each byte is in a field, and in one only
            raw = value[at : at + field["length"]]
            at += field["length"]
            order = "little" if field["name"] == "entry_checksum" else "big"
            shown = field["value"]
            assert shown in (int.from_bytes(raw, order), raw.hex(), raw.decode(errors="replace")), structure["name"]
        assert at == len(value)
        assert value_of(structure, "entry_checksum") == crc32c.crc32c(key + value[:-4])


def test_what_the_entries_are_called(index: Path) -> None:
    structures = {structure["name"]: structure for structure in json_of("dump", index)["structures"]}
    folder = os.fsdecode(next(value for key, value in entries(index) if key[:1] == b"i")[:-4]).rpartition("/")[0]
    numbers = {value_of(one, "path"): name.split(": ")[1] for name, one in structures.items() if name[:5] == "path:"}
    default, plain = f"{folder}/default.dmap", f"{folder}/plain.qcow2"
    for name in (
        f"container: {default}",
        f"members: {numbers[default]}, 0",
        "name: disk0",
        f"bitmap: P{plain}, b0",
        "bitmap: Ndisk0, b0",
        "bitmap by name: b0, Nnamed",
        "state",
    ):
        assert name in structures
    assert sum(name.startswith("name: digest ") for name in structures) == 1
    assert value_of(structures["name: disk0"], "[0].name") == "disk0"
    assert f"bitmap: Ndisk0, b0, {structures['bitmap: Ndisk0, b0']['length']} bytes" in dirtmap("dump", index).out
    kinds = Counter(name.split(":")[0] for name in structures)
    assert kinds["bitmap"] == kinds["bitmap by name"] == 4


def test_it_says_what_numbers_mean(index: Path) -> None:
    lines = dirtmap("dump", index).out.splitlines()
    assert lines[0] == f"{index}: index, {(index / 'data.mdb').stat().st_size} bytes"
    assert lines[-1] == "no faults"
    shown = {" ".join(line.split()[1:]) for line in lines}
    expected = ("kind 1 qcow2", "kind 2 dirtmap", "condition 0 sound", "[0].kind 2 device")
    assert shown >= {*expected, "[0].flags 0x2 auto", "[0].granularity_bits 16 65536 bytes"}


def test_it_writes_nothing(index: Path) -> None:
    before = {path: path.read_bytes() for path in index.parent.iterdir() if path.is_file()}
    whole = (index / "data.mdb").read_bytes()
    assert json_of("dump", index) == json_of("dump", index / "data.mdb")
    assert [path.name for path in index.iterdir()] == ["data.mdb"]
    assert (index / "data.mdb").read_bytes() == whole
    assert {path: path.read_bytes() for path in index.parent.iterdir() if path.is_file()} == before


def test_one_that_is_in_use(made: Path) -> None:
    database = connect(str(made))
    assert database.read(lambda _: len(json_of("dump", made)["structures"])) == database.info()["entries"]


# Damage.


def test_a_wrong_checksum_is_told_and_all_is_shown(index: Path) -> None:
    data = bytearray((index / "data.mdb").read_bytes())
    for key, value in entries(index):
        if key == layout.NAME + b"disk0\0":
            at = data.index(key + value, 2 * PAGE)
            while at >= 0:  # also in pages of older states
                data[at + len(key) + 20] ^= 1
                at = data.find(key + value, at + 1)
    number = len(entries(index))
    (index / "data.mdb").write_bytes(data)
    document = json_of("dump", index)
    assert document["faults"] == [{"where": "name: disk0", "what": "its checksum is wrong"}]
    assert len(document["structures"]) == number
    assert dirtmap("dump", index).out.endswith("\nfault: name: disk0: its checksum is wrong\n")


def test_forms_that_no_entry_has(index: Path) -> None:
    bad = {
        b"z\x01": (b"unheard of", "unknown 01", "nobody knows what this is"),
        layout.STATE + b"2": (bytes(16), "state 32", None),
        layout.SEEN + bytes(16): (
            bytes(31),
            f"seen commit: {bytes(16).hex()}",
            "index seen commit: 31 bytes are not 32",
        ),
        layout.CONTAINER + b"x\0": (bytes(97), "container: x", "index container: 97 bytes are not 96"),
        layout.NAME + b"y\0": (bytes(79), "name: y", "a namespace is cut short"),
        layout.UUID + bytes(16): (
            struct.pack(">12xH66x", 1),
            f"uuid: {bytes(16).hex()}",
            "a namespace's name or path is cut short",
        ),
        layout.BITMAP + b"Nq\0b\0": (b"\xff\xff", "bitmap: Nq, b", "a bitmap's name is cut short"),
        layout.MEMBERS + bytes(12): (b"", "members: 0, 0", "area pointer: 0 bytes are not 16"),
        layout.FOUND + b"\xff\0\xfe\0": (b"\xff", "bitmap by name: \\xff, \\xfe", None),
        layout.PATH + b"short": (b"", "path 73686f7274", None),
    }
    with lmdb.open(str(index), map_size=64 * MIB) as env, env.begin(write=True) as txn:
        for key, (contents, _, _) in bad.items():
            txn.put(key, layout.seal(key, contents))
        txn.put(layout.NAME + b"tiny\0", b"abc")
    document = json_of("dump", index)
    named = {structure["name"]: structure for structure in document["structures"]}
    for contents, name, _ in bad.values():
        fields = named[name]["fields"]
        assert sum(field["length"] for field in fields) == len(contents) + 4
    expected = {(name, what) for _, name, what in bad.values() if what} | {("name: tiny", "its checksum is wrong")}
    assert {(fault["where"], fault["what"]) for fault in document["faults"]} == expected


@pytest.mark.parametrize("size", [0, 100, PAGE, 2 * PAGE, -1])
def test_a_file_that_is_cut_short(index: Path, size: int) -> None:
    data = index / "data.mdb"
    os.truncate(data, size % data.stat().st_size if size < 0 else size)
    document = json_of("dump", index)
    assert document["structures"] == []
    assert document["stopped"].startswith("data.mdb ")
    assert "\nstopped: data.mdb " in dirtmap("dump", data).out


def test_any_damage_ends_nobody_but_the_reader(index: Path) -> None:
    whole = (index / "data.mdb").read_bytes()
    chance, stopped = random.Random(7), 0
    for _ in range(6):
        data = bytearray(whole)
        for _ in range(40):
            at = chance.randrange(2 * PAGE, len(data) - 8)
            data[at : at + 8] = chance.randbytes(8)
        (index / "data.mdb").write_bytes(data)
        document = json_of("dump", index)
        assert document["faults"] or document["stopped"]
        stopped += document["stopped"] is not None
        assert (index / "data.mdb").read_bytes() == data
    assert stopped


def test_it_is_bounded(index: Path) -> None:
    with lmdb.open(str(index), map_size=256 * MIB) as env, env.begin(write=True) as txn:
        for number in range(10_001):
            txn.put(b"a%d" % number, b"")
    document = json_of("dump", "--hex", index)
    assert len(document["structures"]) == 10_000
    assert document["stopped"] == "more than 10000 entries, the others are not shown"
    with lmdb.open(str(index), map_size=256 * MIB) as env, env.begin(write=True) as txn:
        txn.put(b"a0", bytes(5 * MIB))
        txn.put(b"a1", bytes(15 * MIB))
    document = json_of("dump", "--hex", index)
    assert len(document["structures"]) == 1
    assert "hex" not in document["structures"][0]
    assert "too many" in document["structures"][0]["note"]
    assert document["stopped"] == "more than 1 entries, the others are not shown"


# What is no index.


def test_nothing_is_called_what_it_is_not(index: Path, tmp_path: Path) -> None:
    (tmp_path / "data.raw").write_bytes(bytes(PAGE))
    (tmp_path / "folder").mkdir()
    qemu.create(tmp_path / "folder" / "disk.qcow2", MIB)
    assert error_of("dump", tmp_path / "folder").endswith(": neither a regular file nor a block device")
    (tmp_path / "folder" / "disk.qcow2").rename(tmp_path / "folder" / "data.mdb")
    assert json_of("dump", tmp_path / "folder" / "data.mdb")["format"] == "qcow2"
    for name in ("data.raw", "empty"):
        (tmp_path / name).touch()
        document = json_of("dump", tmp_path / name)
        assert document["format"] == "unknown"
        assert document["stopped"] == "header.magic: not a qcow2 image"
    (index / "more").touch()
    assert error_of("dump", index).startswith(f"{index}: not an index")
