"""A store at its limits: namespaces, bitmaps, names, disks."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest
from support import qemu
from support.hostless import stored

import dirtmap.engine as dm
from dirtmap.engine import identity as looks
from dirtmap.engine.identity import identity_of
from dirtmap.engine.model import changes
from dirtmap.engine.model.namespace import Namespace
from dirtmap.engine.namespaces import nodes
from dirtmap.engine.namespaces.nodes import add_node
from dirtmap.engine.storefile.file import Store, create
from dirtmap.fmt import directory, store
from dirtmap.fmt.identity import Identity
from dirtmap.fmt.store import Record


@pytest.fixture
def target(tmp_path: Path) -> Store:
    create(str(tmp_path / "s.dmap"))
    with Store(str(tmp_path / "s.dmap")) as opened:
        yield opened


def _add(image: Namespace, name: str, granularity: int | None = None) -> None:
    with image.transaction() as bitmaps:
        changes.add(bitmaps, name, granularity)


def test_70000_namespaces_and_not_one_more(target: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_NAMESPACES", 70_000)  # the format's own would take gigabytes
    disk = tmp_path / "disk"
    disk.touch()
    os.truncate(disk, 1 << 40)
    identity = identity_of(str(disk))

    def record(number: int) -> Record:
        name, path = b"node%d" % number, os.fsencode(disk)
        return Record(name, store.KIND_NODE, uuid.uuid4().bytes, 1 << 40, path=path, identity=identity)

    with target.change() as change:
        for number in range(store.MAX_NAMESPACES):
            change.table.put(record(number))

    def one_more() -> None:
        with target.change() as change:
            change.table.put(record(store.MAX_NAMESPACES))

    with pytest.raises(dm.FormatError, match="70001 are more than 70000"):
        one_more()
    with stored(Store(target.path), "node65537") as image, image.transaction() as bitmaps:
        changes.add(bitmaps, "b")
        bitmaps["b"].mark(5, 1)
    with stored(Store(target.path), "node65537") as image:
        assert qemu.extents(image["b"]) == [(0, 65536)]
    assert dm.check(target.path).findings == []


def test_65535_bitmaps_and_names_of_1023_bytes(target: Store, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(4096))
    add_node(target, "n", str(raw))
    with stored(Store(target.path), "n") as image:
        with image.transaction() as bitmaps:
            for number in range(directory.MAX_BITMAPS):
                changes.add(bitmaps, f"{number}".rjust(1023 if number % 1000 == 0 else 6, "x"))
        assert len(image) == directory.MAX_BITMAPS
        before = Path(target.path).read_bytes()
        with pytest.raises(dm.BitmapError, match="65535"):
            _add(image, "one more")
        with pytest.raises(dm.BitmapError, match="longer than 1023"):
            _add(image, "x" * 1024)
        assert Path(target.path).read_bytes() == before


@pytest.mark.parametrize("size", [2**63 - 1, 2**63 - 512, 1 << 60, 0, 1, 511, 513])
def test_disks_up_to_8_exbibytes(target: Store, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    for module in (looks, nodes):
        monkeypatch.setattr(module, "identity_of", lambda path: Identity(bytes(16), 1, 2, size))
    monkeypatch.setattr(nodes, "probe_path", lambda path: None)
    add_node(target, "n", "raw", raw=True)
    with stored(Store(target.path), "n") as image:
        if size > 1 << 50:
            with pytest.raises(dm.BitmapError, match="granularity"):
                _add(image, "fine", 512)
        with image.transaction() as bitmaps:
            changes.add(bitmaps, "b", 1 << 31)
            if size:
                bitmaps["b"].mark(size - 1, 1)
        start = max(size - 1, 0) >> 31 << 31
        assert qemu.extents(image["b"]) == ([(start, size - start)] if size else [])
