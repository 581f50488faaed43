"""`dirtmap list` and `dump`: what is in an image."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support import qemu
from support.cli import dirtmap, json_of, listed

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Three bitmaps, one of them disabled; 128 KiB of 10 MiB and a bit written."""
    path = tmp_path / "disk.qcow2"
    qemu.create(path, 10 * MIB + 512)
    qemu.qemu_img("bitmap", "--add", path, "b0")
    qemu.qemu_img("bitmap", "--add", "-g", "1M", path, "weekly backup")
    qemu.qemu_img("bitmap", "--add", "--disable", path, "off")
    qemu.qemu_io(path, "write -q 64k 64k", "write -q 10M 512")
    return path


def test_json_has_exactly_the_promised_keys(image: Path) -> None:
    common = {"inconsistent": False, "damaged": False, "busy": False, "checkpoint": False, "began": None, "since": None}
    common |= {"uuid": None, "generation": None}
    assert json_of("list", image) == [
        {
            "filename": str(image),
            "format": "qcow2",
            "virtual-size": 10 * MIB + 512,
            "cluster-size": 64 * KIB,
            "notes": [],
            "doubt": None,
            "errors": [],
            "checkpoints": [],
            "bitmaps": [
                {
                    "name": "b0",
                    "granularity": 64 * KIB,
                    "flags": ["auto"],
                    "recording": True,
                    "count": 128 * KIB,
                    **common,
                },
                {
                    "name": "weekly backup",
                    "granularity": MIB,
                    "flags": ["auto"],
                    "recording": True,
                    "count": 2 * MIB,
                    **common,
                },
                {"name": "off", "granularity": 64 * KIB, "flags": [], "recording": False, "count": 0, **common},
            ],
        }
    ]


def test_as_qemu_lists_them(image: Path) -> None:
    theirs = qemu.info(image)
    (ours,) = json_of("list", image)
    for key in ("filename", "format", "virtual-size", "cluster-size"):
        assert ours[key] == theirs[key]
    shown = [{key: bitmap[key] for key in ("name", "granularity", "flags")} for bitmap in ours["bitmaps"]]
    assert shown == theirs["format-specific"]["data"]["bitmaps"]


def test_human(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(image.parent)
    empty = image.parent / "empty.qcow2"
    qemu.create(empty, MIB)
    assert dirtmap("list", "disk.qcow2", "empty.qcow2").out.splitlines() == [
        "disk.qcow2: qcow2, 10.0 MiB (10486272 bytes)",
        "  BITMAP         GRANULARITY    DIRTY         STATE",
        "  b0                  64 KiB  128 KiB   1.2%  recording",
        "  weekly backup        1 MiB    2 MiB  20.0%  recording",
        "  off                 64 KiB      0 B   0.0%  disabled",
        "empty.qcow2: qcow2, 1 MiB (1048576 bytes), no bitmaps",
    ]


def test_inconsistent(image: Path) -> None:
    with qemu.StorageDaemon(image):
        pass  # killed
    for bitmap in listed(image).values():
        assert bitmap["inconsistent"]
        assert not bitmap["damaged"]
        assert bitmap["count"] is None
        assert "in-use" in bitmap["flags"]
    assert "inconsistent" in dirtmap("list", image).out


def test_several_images_of_which_some_fail(image: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("no image")
    done = dirtmap("list", "--output=json", text, image, tmp_path / "missing", image, status=1)
    assert [found["filename"] for found in json.loads(done.out)] == [str(image)] * 2
    assert [line.split(":")[1].strip() for line in done.error.splitlines()] == [str(text), str(tmp_path / "missing")]
    done = dirtmap("list", text, image, status=1)
    assert done.out.startswith(f"{image}: qcow2")


def test_notes_go_to_standard_error(image: Path) -> None:
    qemu.patch(image, 88, bytes(8))  # autoclear bits: as software that does not know bitmaps leaves them
    done = dirtmap("list", "--output=json", image)
    (document,) = json.loads(done.out)
    assert document["bitmaps"] == []
    assert document["notes"][0].startswith("its bitmaps are void")
    assert done.error == f"dirtmap: {image}: {document['notes'][0]}\n"
    assert dirtmap("list", "-q", image).error == ""


def test_names_that_are_not_utf8(image: Path) -> None:
    odd = os.fsdecode(b"\xff\xfe\n")
    dirtmap("rename", image, "off", odd)
    assert listed(image)["\\xff\\xfe\n"]["granularity"] == 64 * KIB
    assert "\\xff\\xfe\\n" in dirtmap("list", image).out
    moved = image.rename(image.with_name(odd))
    assert json_of("list", moved)[0]["filename"] == f"{image.parent}/\\xff\\xfe\n"


# dump


def test_dump_json(image: Path) -> None:
    document = json_of("dump", image)
    assert set(document) == {"filename", "format", "file-size", "structures", "faults", "stopped"}
    assert document["file-size"] == image.stat().st_size
    assert document["faults"] == []
    assert document["stopped"] is None
    found = {structure["name"]: structure for structure in document["structures"]}
    assert "directory entry: bitmap 'weekly backup'" in found
    data = image.read_bytes()
    for structure in document["structures"]:
        for field in structure.get("fields", ()):
            raw = data[field["offset"] : field["offset"] + field["length"]]
            if isinstance(field["value"], int):
                assert field["value"] == int.from_bytes(raw, "big")


def test_dump_hex(image: Path) -> None:
    data = image.read_bytes()
    for structure in json_of("dump", "--hex", image)["structures"]:
        start = structure["offset"]
        assert structure["hex"] == data[start : start + structure["length"]].hex()
    lines = dirtmap("dump", "--hex", image).out.splitlines()
    assert any(line.startswith("  00000000  51 46 49 fb 00 00 00 03") for line in lines)
    assert "  *" in lines  # the refcount table is mostly zeros
    assert len(lines) < 400


def test_dump_shows_the_identity_field_by_field(image: Path) -> None:
    dirtmap("node", "add", "drive ü", image)
    (node,) = json_of("node", "list")
    (found,) = (
        each for each in json_of("dump", image)["structures"] if each["name"] == "extension: dirtmap: namespace"
    )
    fields = {field["name"]: field for field in found["fields"]}
    assert list(fields) == ["type", "length", "uuid", "name"]
    assert fields["uuid"]["value"] == node["uuid"].replace("-", "")
    assert (fields["name"]["value"], fields["name"]["length"]) == (node["name"], len("drive ü".encode()))
    for name, raw in (("uuid", bytes.fromhex(fields["uuid"]["value"])), ("name", "drive ü".encode())):
        start = fields[name]["offset"]
        assert image.read_bytes()[start : start + fields[name]["length"]] == raw
    assert "name    drive ü\n" in dirtmap("dump", image).out
    qemu.patch(image, fields["length"]["offset"], bytes(3) + b"\x07")  # shorter than a UUID
    (found,) = (
        each for each in json_of("dump", image)["structures"] if each["name"] == "extension: dirtmap: namespace"
    )
    assert [field["name"] for field in found["fields"]] == ["type", "length", "data"]


def test_dump_human(image: Path) -> None:
    lines = dirtmap("dump", image).out.splitlines()
    assert lines[0] == f"{image}: qcow2, {image.stat().st_size} bytes"
    assert lines[2] == "header @ 0x0, 72 bytes"
    assert "  0x58  autoclear_features     0x1  bitmaps" in lines
    assert "  0x1fc  length            24" in lines
    assert any(line.startswith("table: bitmap 'weekly backup' @ 0x") for line in lines)
    assert lines[-1] == "no faults"


def test_dump_of_damage(image: Path) -> None:
    entry = next(s for s in json_of("dump", image)["structures"] if s["name"] == "directory entry: bitmap 'b0'")
    bits = next(field for field in entry["fields"] if field["name"] == "granularity_bits")
    qemu.patch(image, bits["offset"], b"\x3f")
    done = dirtmap("list", image, status=1)
    assert done.error == f"dirtmap: {image}: bitmap 'b0'.granularity_bits: 63 is outside 9..31\n"
    document = json_of("dump", image)
    assert document["faults"] == [{"where": "bitmap 'b0'.granularity_bits", "what": "63 is outside 9..31"}]
    assert dirtmap("dump", image).out.endswith("\nfault: bitmap 'b0'.granularity_bits: 63 is outside 9..31\n")


@pytest.mark.parametrize("size", [0, 3, 60, 100, 600, 70000, 200000])
def test_dump_of_what_is_left(image: Path, size: int) -> None:
    os.truncate(image, size)
    document = json_of("dump", image)
    assert document["file-size"] == size
    assert document["stopped"] or document["faults"]
    assert "fault: " in dirtmap("dump", image).out
    assert image.stat().st_size == size
