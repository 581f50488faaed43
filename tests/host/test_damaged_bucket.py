"""One damaged bucket of a store hides the names in it, and none else, with an index or without."""

from __future__ import annotations

import shutil
from pathlib import Path

import crc32c
import pytest
from support.cli import dirtmap, error_of, json_of

import dirtmap.engine as dm
from dirtmap.engine.storefile.file import Store

MIB = 1 << 20
NODES = [f"n{number}" for number in range(40)]


def bucket_of(name: bytes, buckets: int) -> int:
    """As SPEC.md says it."""
    return int(crc32c.crc32c(name)) % buckets


@pytest.fixture(params=["default.dmap", "other.dmap"])
def damaged(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """A store with many nodes and a damaged bucket: its number, and how many there are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIRTMAP_STORE", raising=False)
    Path("first.raw").write_bytes(bytes(MIB))
    dirtmap("node", "add", "first", "first.raw")
    with dm.Host(request.param) as host:
        for name in NODES:
            Path(f"{name}.raw").write_bytes(bytes(MIB))
            host.add_node(name, f"{name}.raw")
            with host.open(name) as image, image.transaction() as bitmaps:
                bitmaps["b"] = dm.Bitmap(MIB)
    with Store(request.param) as target:
        areas = target.read(lambda snapshot: snapshot.table().areas())
    number = bucket_of(b"n7", len(areas))
    with open(request.param, "r+b") as file:
        file.seek(areas[number].offset + 5)
        file.write(b"\xff")
    return number, len(areas)


@pytest.mark.parametrize("with_index", [False, True])
def test_only_its_own_names_are_hidden(damaged: tuple[int, int], with_index: bool) -> None:
    number, count = damaged
    if not with_index:
        shutil.rmtree("index")
    hidden = {name for name in NODES if bucket_of(name.encode(), count) == number}
    assert "n7" in hidden
    assert len(hidden) < len(NODES)
    for name in NODES:
        if name in hidden:
            assert f"bucket {number}" in error_of("list", name)
            assert f"bucket {number}" in error_of("map", name, "b")
        else:
            assert json_of("list", name)[0]["bitmaps"]
    done = dirtmap("node", "list", status=1)
    assert f"bucket {number}" in done.error
    assert {line.split()[0] for line in done.out.splitlines()} >= {*NODES} - hidden
    assert "n8" in dirtmap("find", "b", status=0 if with_index else 1).out


def test_a_name_that_may_be_hidden_is_neither_free_nor_missing(damaged: tuple[int, int]) -> None:
    number, count = damaged
    shutil.rmtree("index")
    names = [f"m{each}" for each in range(60)]
    may = next(name for name in names if bucket_of(name.encode(), count) == number)
    Path("m.raw").write_bytes(bytes(MIB))
    assert f"bucket {number}" in error_of("list", may)
    assert f"bucket {number}" in error_of("node", "add", may, "m.raw")
