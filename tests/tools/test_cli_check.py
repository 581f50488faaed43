"""`dirtmap check`: exit codes, the keys of qemu-img check, mending."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from support import qemu
from support.cli import dirtmap, error_of, json_of, listed

KIB, MIB = 1 << 10, 1 << 20
KEYS = ["filename", "format", "check-errors", "corruptions", "leaks", "corruptions-fixed", "leaks-fixed", "findings"]
COUNTS = KEYS[2:7]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qemu.create(path, 4 * MIB)
    qemu.qemu_img("bitmap", "--add", path, "good")
    qemu.qemu_img("bitmap", "--add", path, "bad")
    qemu.qemu_io(path, "write -q 64k 64k")
    return path


def leak(path: Path) -> None:
    """One more cluster, counted and used by nobody."""
    size = path.stat().st_size
    cluster = -(-size // (64 * KIB))
    with path.open("r+b") as file:
        file.truncate((cluster + 1) * 64 * KIB)
    qemu.patch(path, 0x20000 + 2 * cluster, struct.pack(">H", 1))


def spoil(path: Path, name: str) -> None:
    """Makes QEMU refuse the image because of that bitmap."""
    structures = json_of("dump", path)["structures"]
    (entry,) = (found for found in structures if found["name"] == f"directory entry: bitmap '{name}'")
    (bits,) = (field for field in entry["fields"] if field["name"] == "granularity_bits")
    qemu.patch(path, bits["offset"], b"\x40")
    qemu.qemu_img("info", path, status=1)


def counts(report: dict[str, Any]) -> list[int]:
    return [report[key] for key in COUNTS]


def test_a_sound_image(image: Path) -> None:
    report = json_of("check", image)
    assert report == {
        "filename": str(image),
        "format": "qcow2",
        **dict.fromkeys(COUNTS, 0),
        "findings": [],
        "dropped": [],
        "dropped-unnamed": 0,
        "made-dirty": [],
    }
    assert list(report) == [*KEYS, "dropped", "dropped-unnamed", "made-dirty"]
    theirs = json.loads(qemu.qemu_img("check", "--output=json", image))
    for key in ("filename", "format", "check-errors"):
        assert report[key] == theirs[key]
    assert dirtmap("check", image).out == f"{image}: no errors\n"


def test_leaks(image: Path) -> None:
    leak(image)
    qemu.qemu_img("check", image, status=3)
    before = image.read_bytes()
    report = json_of("check", image, status=3)
    assert counts(report) == [0, 0, 1, 0, 0]
    (finding,) = report["findings"]
    assert set(finding) == {"severity", "where", "what"}
    assert finding["severity"] == "leak"
    done = dirtmap("check", image, status=3)
    assert done.out.startswith("leak: clusters 0x")
    assert done.out.endswith(f"{image}: 1 leaked cluster\n")
    assert dirtmap("check", "-q", image, status=3).out == ""
    assert image.read_bytes() == before
    assert counts(json_of("check", "-r", "leaks", image)) == [0, 0, 0, 0, 1]
    assert counts(json_of("check", image)) == [0, 0, 0, 0, 0]
    qemu.check(image)


def test_a_bad_bitmap_is_dropped_and_the_others_kept(image: Path) -> None:
    before = listed(image)
    spoil(image, "bad")
    report = json_of("check", image, status=2)
    assert report["corruptions"] == 1
    assert report["findings"][0] == {
        "severity": "corruption",
        "where": "bitmap 'bad'.granularity_bits",
        "what": "64 is outside 9..31",
    }
    spoiled = image.read_bytes()
    done = dirtmap("check", "-r", "all", image)
    assert "dropped: bitmap 'bad'\n" in done.out
    assert done.out.endswith(f"{image}: no errors\n")
    qemu.check(image)
    assert listed(image) == {"good": before["good"]}
    assert qemu.dirty(image, "good") == [(64 * KIB, 64 * KIB)]
    image.write_bytes(spoiled)
    report = json_of("check", "-r", "all", image)
    assert report["dropped"] == ["bad"]
    assert report["corruptions"] == 0
    assert report["corruptions-fixed"] >= 1


def test_leaks_are_not_mended_where_more_is_wrong(image: Path) -> None:
    spoil(image, "bad")
    before = image.read_bytes()
    assert json_of("check", "-r", "leaks", image, status=2)["corruptions"] >= 1
    assert image.read_bytes() == before


def test_what_cannot_be_checked(image: Path) -> None:
    qemu.patch(image, 116, b"\xff\xff\xff\xff")  # the length of the first header extension
    report = json_of("check", image, status=2)
    assert report["check-errors"] == 1
    assert report["corruptions"] == 1
    assert dirtmap("check", image, status=2).out.endswith(f"{image}: 1 corruption, 1 part not checked\n")


def test_refusals(image: Path) -> None:
    qemu.patch(image, 79, b"\x02")  # marked corrupt
    spoil(image, "bad")
    before = image.read_bytes()
    assert "marked corrupt" in error_of("check", "-r", "all", image)
    assert image.read_bytes() == before
    image.write_bytes(b"no image")
    assert error_of("check", image).startswith(f"{image}: header.magic: not a qcow2 image")
