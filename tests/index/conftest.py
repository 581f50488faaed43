"""The indexed host, as it was before each test, and what it says of everything there is."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest
from support import qemu
from support.child import in_child
from support.indexed import MIB, NODES, Answers, answers, restore, tiny

import dirtmap.engine as dm
from dirtmap.engine.host.host import Host
from dirtmap.engine.index.database import connect
from dirtmap.engine.model import changes


@pytest.fixture(scope="module")
def in_memory() -> Iterator[Path]:
    """In memory where that can be: an index is rebuilt hundreds of times, and synced."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def made(in_memory: Path) -> Host:
    """A host with a store, another store, a device, images, and an index of it all, which `pristine` brings back."""
    folder = in_memory
    here = Host(str(folder / "default.dmap"), str(folder / "index"))
    other = Host(str(folder / "other.dmap"), here._parts.stores.index.path)
    for number in range(NODES):
        (here if number % 4 else other).add_node(f"n{number}", tiny(folder / f"{number}.raw"))
    here._parts.registry.remember_store(other.store)
    qemu.create(folder / "disk.qcow2", MIB)
    here.add_qcow2("q", str(folder / "disk.qcow2"))
    here.add_device("d", "n1")
    for name in [f"n{number}" for number in range(NODES)] + ["q", "d"]:
        with (
            dm.open(name, store=here.store, index=here._parts.stores.index.path) as image,
            image.transaction() as bitmaps,
        ):
            for number in range(12):
                changes.add(bitmaps, f"b{number}")
    here._parts.stores.refresh()
    connect(here._parts.stores.index.path).suspend()
    with lmdb.open(here._parts.stores.index.path) as env:
        (folder / "pristine").mkdir()
        env.copy(str(folder / "pristine"), compact=True)  # so that no page is of an older state
    return here


@pytest.fixture
def host(made: Host) -> Iterator[Host]:
    """A `Host` with an index as it was; a new one, so that nothing of it is remembered."""
    restore(made)
    yield Host(made.store, made._parts.stores.index.path)
    restore(made)


@pytest.fixture(scope="module")
def expected(made: Host) -> Answers:
    found = in_child(lambda: answers(made))
    assert len(found["bitmap b3"]) == NODES + 2
    assert found["none"] is None
    assert found["d"].is_device
    return found
