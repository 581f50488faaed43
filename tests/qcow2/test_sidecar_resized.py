"""A sidecar whose raw disk was resized by itself: its bitmaps may have missed writes, and that is said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.cli import dirtmap, json_of

import dirtmap.engine as dm
from dirtmap.engine.qcow2.sidecar import make_sidecar

MIB = 1 << 20


@pytest.fixture
def sidecar(tmp_path: Path) -> Path:
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.touch()
    os.truncate(raw, 4 * MIB)
    make_sidecar(str(raw), str(path))
    return path


@pytest.mark.parametrize("size", [2 * MIB, 8 * MIB, 4 * MIB + 512, None])
def test_list_and_check_tell_of_a_raw_disk_that_does_not_fit(sidecar: Path, size: int | None) -> None:
    with dm.open(sidecar) as image, image.transaction() as bitmaps:
        bitmaps["b"] = dm.Bitmap(4 * MIB)
    assert dm.check(sidecar).findings == []
    assert not json_of("list", sidecar)[0]["notes"]
    raw = sidecar.with_name("disk.raw")
    if size is None:
        raw.unlink()
        expected = "its external data cannot be looked at"
    else:
        os.truncate(raw, size)
        expected = f"its external data have {size} bytes and its disk {4 * MIB}"
    (finding,) = dm.check(sidecar).findings
    assert (finding.severity, finding.where) == ("note", "external data file")
    assert finding.what.startswith(expected)
    (note,) = json_of("list", sidecar)[0]["notes"]
    assert note.startswith(expected)
    assert expected in dirtmap("list", sidecar).error


def test_nothing_is_said_where_there_is_no_bitmap(sidecar: Path) -> None:
    os.truncate(sidecar.with_name("disk.raw"), 8 * MIB)
    assert dm.check(sidecar).findings == []
    assert not json_of("list", sidecar)[0]["notes"]
