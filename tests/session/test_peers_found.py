"""The store of a session's other namespace, whatever is at its path: the session is lost there, and nothing breaks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import crc32c
import pytest
from support.tracking import make_node

from dirtmap.engine.session import peers
from dirtmap.engine.storefile.file import Store, create
from dirtmap.fmt import store
from dirtmap.fmt.live import Peer


def of_a_later_version(path: Path) -> None:
    create(str(path))
    data = bytearray(path.read_bytes())
    for at in range(0, store.RESERVED, store.BLOCK):
        block = data[at : at + store.BLOCK - 4]
        block[7] = 9
        data[at : at + store.BLOCK] = block + crc32c.crc32c(bytes(block)).to_bytes(4, "big")
    path.write_bytes(data)


def with_a_namespace(path: Path) -> None:
    create(str(path))
    with Store(str(path)) as target, target.change() as change:
        change.table.put(store.Record(b"d", store.KIND_DEVICE, bytes(16), 0, path=b"/disk", root_uuid=bytes(16)))


def with_a_damaged_table(path: Path) -> None:
    with_a_namespace(path)
    with Store(str(path)) as target:
        area = target.read(lambda snapshot: snapshot.header.table)
    with path.open("r+b") as file:
        file.seek(area.offset)
        file.write(b"\xff" * area.length)


PLACES: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: None,
    "an empty file": lambda path: path.touch(),
    "no store": lambda path: path.write_bytes(os.urandom(20000)),
    "a store of a later version": of_a_later_version,
    "a store with a damaged table": with_a_damaged_table,
    "a store cut short": lambda path: (with_a_namespace(path), os.truncate(path, 5000)),
    "a folder": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "a link to itself": lambda path: path.symlink_to(path),
    "a huge file": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_session_is_lost_there_and_its_files_may_be_needed(tmp_path: Path, place: str) -> None:
    path = tmp_path / "other.dmap"
    PLACES[place](path)
    began = time.monotonic()
    found = peers.find(str(tmp_path / "s.dmap"), Peer(bytes(16), b"d", os.fsencode(path)), bytes(16), of_node=True)
    assert (found.record, found.needs_files) == (None, True)
    assert time.monotonic() - began < 2


def test_another_namespace_of_that_name_is_not_the_peer(tmp_path: Path) -> None:
    make_node(tmp_path, 1 << 20)
    path = str(tmp_path / "default.dmap")
    with Store(path) as target:
        record = target.record(b"drive0")
    assert record
    for uuid, of_node in ((bytes(16), False), (record.uuid, True), (record.uuid, False)):
        found = peers.find(path, Peer(uuid, b"drive0", b""), b"s" * 16, of_node=of_node)
        assert (found.record, found.needs_files) == (None, False)
