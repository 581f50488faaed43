"""A store of many namespaces: what concerns one of them reads few records, and `check` reads each once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import qemu
from support.hostless import stored
from support.many import MIB, raw, settle

import dirtmap.engine as dm
from dirtmap.engine.index.renewal import examine
from dirtmap.engine.model import changes
from dirtmap.engine.storefile import table
from dirtmap.engine.storefile.directory import place_directory
from dirtmap.engine.storefile.file import Store, create
from dirtmap.engine.system.file import File
from dirtmap.fmt import store
from dirtmap.fmt.directory import Entry
from dirtmap.fmt.identity import Identity
from dirtmap.fmt.store import Record

MANY = 20_000
FEW = 400  # records: those of some leaves


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a default store of many nodes, and its index."""
    folder = tmp_path_factory.mktemp("many")
    create(str(folder / "default.dmap"))
    with Store(str(folder / "default.dmap")) as target, target.change() as change:
        for number in range(MANY):
            change.table.put(
                Record(
                    b"node %d" % number,
                    store.KIND_NODE,
                    number.to_bytes(16, "big"),
                    MIB,
                    change.generation,
                    path=b"/nowhere/%d.raw" % number,
                    identity=Identity(b"nowhere".ljust(16), number),
                )
            )
    settle()
    with dm.Host(str(folder / "default.dmap"), str(folder / "index")) as host:
        host.add_node("a", raw(folder / "a.raw"))
        with host.open("a") as image, image.transaction() as bitmaps:
            changes.add(bitmaps, "monday")
        host.containers()
    settle()
    return folder


@pytest.fixture
def host(made: Path) -> Iterator[dm.Host]:
    with dm.Host(str(made / "default.dmap"), str(made / "index")) as found:
        yield found


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], int]:
    """Counts the records that a call reads."""
    count = 0
    split = table.split_records

    def counted(data: bytes) -> Iterator[tuple[bytes, bytes]]:
        nonlocal count
        for found in split(data):
            count += 1
            yield found

    monkeypatch.setattr(table, "split_records", counted)

    def read_by(call: Callable[[], Any]) -> int:
        before = count
        call()
        return count - before

    return read_by


def test_what_concerns_one_namespace_reads_few_records(
    host: dm.Host, made: Path, records: Callable[[Callable[[], Any]], int]
) -> None:
    qemu.create(made / "q.qcow2", MIB)
    (made / "other.raw").write_bytes(bytes(MIB))
    raw(made / "b.raw")

    def refused(path: str) -> None:
        with pytest.raises(dm.BitmapError, match=r"is node '[ab]' already"):
            host.add_node("twin", path)

    def listed() -> None:
        with host.open("b") as image:
            assert image.info().bitmaps == ()

    os.link(made / "a.raw", made / "link.raw")
    os.symlink(made / "a.raw", made / "symlink.raw")
    acts: list[tuple[str, Callable[[], Any]]] = [
        ("add", lambda: host.add_node("b", str(made / "b.raw"))),
        ("add a qcow2 image", lambda: host.add_qcow2("q", str(made / "q.qcow2"))),
        ("add a device", lambda: host.add_device("d", "b")),
        ("the same image", lambda: refused(str(made / "a.raw"))),
        ("the same file", lambda: refused(str(made / "link.raw"))),
        ("a link to it", lambda: refused(str(made / "symlink.raw"))),
        ("list", listed),
        ("find", lambda: host.find("monday")),
        ("remove a device", lambda: host.remove_device("d")),
        ("rename", lambda: host.rename_node("b", "new")),
        ("relocate", lambda: host.relocate_node("new", str(made / "other.raw"))),
        ("remove", lambda: host.remove_node("new")),
        ("remove a qcow2 image", lambda: host.remove_node("q")),
        (
            "another store",
            lambda: dm.Host(str(made / "another.dmap"), str(made / "index")).add_node("c", raw(made / "c.raw")),
        ),
        ("a sidecar", lambda: host.make_sidecar(str(made / "a.raw"), str(made / "a.qcow2"))),
    ]
    found = {what: records(act) for what, act in acts}
    assert {what: count for what, count in found.items() if count > FEW} == {}
    assert found["add"] > 0, "they are counted"
    assert examine(str(made / "index")).faults == []


def test_without_an_index_the_answer_is_the_same_and_all_records_are_read(
    made: Path, tmp_path: Path, records: Callable[[Callable[[], Any]], int]
) -> None:
    (tmp_path / "file").write_text("no index can be in a file")

    def refused() -> None:
        host = dm.Host(str(made / "default.dmap"), str(tmp_path / "file" / "index"))
        with host, pytest.raises(dm.BitmapError, match="is node 'a' already"):
            host.add_node("twin", str(made / "a.raw"))

    assert records(refused) >= MANY


def test_opening_and_changing_one_namespace_touches_few_areas(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as among a few namespaces, and one more for each level of the table."""
    calls = {"read": 0, "write": 0, "sync": 0}

    def count(name: str) -> None:
        act = getattr(File, name)

        def counted(file: File, *given: Any) -> Any:
            calls[name] += 1
            return act(file, *given)

        monkeypatch.setattr(File, name, counted)

    for name in calls:
        count(name)
    few = str(made / "few.dmap")
    create(few)
    found = []
    for path in (few, str(made / "default.dmap")):
        with Store(path) as target, target.change() as change:
            node = Record(b"mine", store.KIND_DEVICE, bytes(15) + b"1", MIB, change.generation, path=b"/nowhere")
            change.table.put(node)
        with Store(path) as target, stored(target, "mine").transaction() as bitmaps:
            changes.add(bitmaps, "b")
        for act in ("mark", "open"):
            calls.update(dict.fromkeys(calls, 0))
            with Store(path) as target:
                if act == "open":
                    assert stored(target, "mine")["b"].count
                else:
                    with stored(target, "mine").transaction() as bitmaps:
                        changes.clear(bitmaps, "b")
            found.append(dict(calls))
        depth = Store(path).read(lambda snapshot: snapshot.header.depth)
    mark, opened, mark_many, opened_many = found
    assert depth == 2
    assert mark_many["sync"] == mark["sync"] == 3
    # In a small store one more pair of areas lies side by side, and is written at once.
    assert mark_many["write"] <= mark["write"] + depth + 1
    assert mark_many["read"] <= mark["read"] + 8 * depth
    assert opened_many["read"] <= opened["read"] + 2 * depth
    assert opened_many["write"] == 0


def test_check_reads_each_record_once(made: Path, records: Callable[[Callable[[], Any]], int]) -> None:
    """And each leaf's first one to see that it is the right leaf."""
    with Store(str(made / "default.dmap")) as target:
        header = target.read(lambda snapshot: snapshot.header)
    assert header.namespaces > MANY
    assert records(lambda: dm.check(str(made / "default.dmap"))) < 1.1 * header.namespaces


def test_check_names_a_thousand_namespaces_in_doubt_and_counts_the_others(tmp_path: Path) -> None:
    path, many = str(tmp_path / "s.dmap"), 1100
    create(path)
    with Store(path) as target, target.change() as change:
        for number in range(many):
            name = b"node %d" % number
            place = place_directory(change, name, [Entry(b"b", store.ALL_ONES, 0, 2, 16)])
            change.table.put(Record(name, store.KIND_NODE, bytes(16), MIB, change.generation, place, 1, b"/nowhere"))
    *first, last = dm.check(path).findings
    assert len(first) == 1000
    assert all(finding.what.startswith("counts as all dirty") for finding in first)
    assert (last.severity, last.where, last.what) == ("note", "namespaces", "100 more count as all dirty")
