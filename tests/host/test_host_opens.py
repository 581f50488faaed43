"""How many stores a host opens: at most those that an answer is in, however many the host has."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from support.many import MIB, make_host, raw

import dirtmap.engine as dm
from dirtmap.engine.qcow2 import reading
from dirtmap.engine.qcow2.layout import Layout, read_layout
from dirtmap.engine.storefile.file import Store
from dirtmap.engine.system.file import File


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Which stores were opened, and how often."""
    counts: Counter[str] = Counter()
    begin = Store.__init__

    def counting(self: Store, path: str, *arguments: object, **more: object) -> None:
        counts[os.path.basename(path)] += 1
        begin(self, path, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "__init__", counting)
    return counts


@pytest.mark.parametrize("stores", [1, 6, 21, 200])
def test_opening_takes_one_store_at_most(tmp_path: Path, opened: Counter[str], stores: int) -> None:
    home, index = make_host(tmp_path, stores)
    last = f"node{stores - 1}"
    names = ("node0", last, "image", str(tmp_path / "q.qcow2"), "device", "device:on-raw")
    for name in names:
        with dm.Host(home, index) as host:
            opened.clear()
            with host.open(name) as image:
                list(image)
            assert opened.total() <= 1, (name, opened)
    with dm.Host(home, index) as host:
        for name in names:
            host.open(name).close()
            opened.clear()
            with host.open(name) as image:
                image.info()
            with host.open(name) as image, image.transaction() as bitmaps:
                bitmaps["again"] = dm.Bitmap(MIB)
            with host.open(name) as image, image.transaction() as bitmaps:
                del bitmaps["again"]
            assert not opened, name


@pytest.mark.parametrize("stores", [1, 6, 21, 200])
def test_a_copy_between_nodes_takes_two_at_most(tmp_path: Path, opened: Counter[str], stores: int) -> None:
    home, index = make_host(tmp_path, stores)
    with dm.Host(home, index) as host:
        opened.clear()
        with host.open(f"node{stores - 1}") as source, host.open("image") as there, there.transaction() as bitmaps:
            bitmaps["copy"] = source["b"]
        assert opened.total() <= 2, opened


def test_an_index_that_was_put_back_is_noticed(tmp_path: Path) -> None:
    """What saves the opening is a look at each store, which an older index does not pass."""
    home, index = make_host(tmp_path, 3)
    old = {path.name: path.read_bytes() for path in Path(index).iterdir()}
    with dm.Host(str(tmp_path / "store2.dmap"), index) as host:
        host._parts.registry.add_node("new", raw(tmp_path / "new.raw"))
    for name, data in old.items():
        Path(index, name).write_bytes(data)
    with dm.Host(home, index) as host, host.open("new") as image:
        assert image.name == "new"


def test_a_store_that_was_replaced_meanwhile_is_opened_anew(tmp_path: Path) -> None:
    home, index = make_host(tmp_path, 2)
    with dm.Host(home, index) as host:
        with host.open("node1") as image:
            assert list(image) == ["b"]
        with dm.Host(home, index) as other:
            other.compact(str(tmp_path / "store1.dmap"))
        with host.open("node1") as image, image.transaction() as bitmaps:
            bitmaps["c"] = dm.Bitmap(MIB)
        with dm.Host(home, index) as other, other.open("node1") as image:
            assert list(image) == ["b", "c"]


def test_a_named_image_is_described_by_reading_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, index = make_host(tmp_path, 2)
    read: list[str] = []

    def counting(file: File) -> Layout:
        read.append(os.path.basename(file.path))
        return read_layout(file)

    with dm.Host(home, index) as host, host.open("image") as image, image.hold(next(iter(image))):
        monkeypatch.setattr(reading, "read_layout", counting)
        info = host.describe("image")
        assert read == ["q.qcow2"]
        assert info.node == "image"
        assert info.bitmaps[0].busy
