"""A damaged part of a store's namespace table hides the names in it, and none else, with an index or without."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import crc32c
import pytest
from support.cli import dirtmap, error_of, json_of

import dirtmap.engine as dm
from dirtmap.engine.storefile.file import Store

MIB = 1 << 20
NODES = [f"n{number}" for number in range(40)]


class Part(NamedTuple):
    """What a damaged leaf can have, and how messages call it."""

    what: str
    keys: range

    def may_have(self, name: str) -> bool:
        """As SPEC.md says it."""
        return crc32c.crc32c(name.encode()) in self.keys


@pytest.fixture(params=["default.dmap", "other.dmap"])
def damaged(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Part:
    """A store with many nodes, and the part of its namespace table that is damaged."""
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
    dirtmap("find", "b")
    with Store(request.param) as target:
        leaves, _ = target.read(lambda snapshot: snapshot.table().unlike(None, pytest.fail))
    (leaf,) = [leaf for leaf in leaves if leaf.key <= crc32c.crc32c(b"n7") < leaf.end]
    with open(request.param, "r+b") as file:
        file.seek(leaf.offset + 5)
        file.write(b"\xff")
    return Part(leaf.what, range(leaf.key, leaf.end))


@pytest.mark.parametrize("with_index", [False, True])
def test_only_its_own_names_are_hidden(damaged: Part, with_index: bool) -> None:
    if not with_index:
        shutil.rmtree("index")
    hidden = set(filter(damaged.may_have, NODES))
    assert "n7" in hidden
    assert len(hidden) < len(NODES)
    for name in NODES:
        if name in hidden:
            assert damaged.what in error_of("list", name)
            assert damaged.what in error_of("map", name, "b")
        else:
            assert json_of("list", name)[0]["bitmaps"]
    done = dirtmap("node", "list", status=1)
    assert damaged.what in done.error
    assert {line.split()[0] for line in done.out.splitlines()} >= {*NODES} - hidden
    # An index that has read the part before knows what was in it; without one, it is said that something is missing.
    done = dirtmap("find", "b", status=0 if with_index else 1)
    assert {line.split()[0] for line in done.out.splitlines()[2:]} == {*NODES} - (set() if with_index else hidden)


def test_a_name_that_may_be_hidden_is_neither_free_nor_missing(damaged: Part) -> None:
    shutil.rmtree("index")
    names = [f"m{each}" for each in range(60)]
    may = next(filter(damaged.may_have, names))
    Path("m.raw").write_bytes(bytes(MIB))
    assert damaged.what in error_of("list", may)
    assert damaged.what in error_of("node", "add", may, "m.raw")
