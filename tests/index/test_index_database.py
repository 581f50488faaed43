"""The index's database: what a leaf's value says, damage inside, arguments that cannot be, and the commands."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import shutil
import signal
import struct
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import pytest
from support.child import SignalError, in_child
from support.cli import dirtmap, error_of, json_of
from support.hostless import index_at
from support.indexed import MIB, NODES, PAGE, Answers, answers, data_of, restore, verified

import dirtmap.engine as dm
from dirtmap.engine.host.host import Host
from dirtmap.engine.host.maintenance import rebuild, verify
from dirtmap.engine.index import database
from dirtmap.engine.index.database import Database
from dirtmap.engine.index.reading import look
from dirtmap.engine.storefile.file import Store, create
from dirtmap.fmt import index as layout
from dirtmap.fmt import store
from dirtmap.fmt.index import build_members, parse_members
from dirtmap.fmt.parsers.index import NAMESPACE_VALUE
from dirtmap.fmt.store import Record

# The value that says what a leaf contributed, as SPEC.md has it.


def test_members_are_an_area_pointer_and_namespaces() -> None:
    one = layout.Member(b"n", store.KIND_NODE, b"u" * 16, bytes(16), MIB, b"/x", (4096, 100, 7), b"its file")
    other = layout.Member(b"", store.KIND_PLACE, bytes(16), b"r" * 16, 0)
    raw = b"".join(
        struct.pack(
            ">QB3xHH16s16sQQLL8s",
            9,
            m.kind,
            len(m.name),
            len(m.path),
            m.uuid,
            m.root_uuid,
            m.size,
            *m.directory,
            m.image,
        )
        + m.name
        + m.path
        for m in (one, other)
    )
    pointer = bytes(range(16))
    assert build_members(pointer, [(9, one), (9, other)]) == pointer + raw
    found, members = parse_members(pointer + raw)
    assert (found, list(members)) == (pointer, [(9, one), (9, other)])
    found, members = parse_members(None)
    assert (found, list(members)) == (b"", [])
    for size in range(len(raw)):
        members = parse_members(pointer + raw[:size])[1]
        if size in (0, len(raw) - NAMESPACE_VALUE.size):  # between two
            assert len(list(members)) == bool(size)
        else:
            with pytest.raises(layout.BadValueError, match="cut short"):
                list(members)


# Damage inside.


def test_a_wrong_value_is_noticed(host: Host, expected: Answers) -> None:
    """A bit of the contents of every kind of value, which LMDB itself takes for sound."""
    whole = data_of(host).read_bytes()
    with lmdb.open(host._parts.stores.index.path, readonly=True, lock=False) as env, env.begin() as txn:
        stored = list(txn.cursor())
    chance = random.Random(3)
    kinds = {key[:1] for key, _ in stored}
    assert kinds == set(layout.TAGS)
    for kind in sorted(kinds):
        key, value = chance.choice([item for item in stored if item[0][:1] == kind])
        before = key if kind != layout.MEMBERS else b""  # a value so long can be on pages of its own
        wrong = bytearray(value)
        wrong[chance.randrange(len(value))] ^= 1 << chance.randrange(8)
        assert before + value in whole, key
        data = whole.replace(before + value, before + wrong)  # also in a page that LMDB has freed
        restore(host)
        data_of(host).write_bytes(data)
        assert in_child(lambda: answers(host)) == expected, key
        restore(host)
        data_of(host).write_bytes(data)
        assert any(verified(host)), key
        assert in_child(lambda: answers(host)) == expected
    assert verified(host) == []


def test_pages_that_are_zero_or_noise(host: Host, expected: Answers) -> None:
    """The answer is right, or LMDB gives up; `verify` outlives it, and then all is well."""
    whole = data_of(host).read_bytes()
    chance = random.Random(4)
    died = 0
    for page in chance.sample(range(2, len(whole) // PAGE), min(12, len(whole) // PAGE - 2)):
        for new in (bytes(PAGE), chance.randbytes(PAGE)):
            restore(host)
            data = bytearray(whole)
            data[page * PAGE : (page + 1) * PAGE] = new
            data_of(host).write_bytes(data)
            end = 0
            try:
                found = in_child(lambda: answers(host))
            except SignalError as error:
                end = error.number
            if end:
                died += 1
                assert end == signal.SIGABRT, page
                restore(host)
                data_of(host).write_bytes(data)
                assert verified(host)
                found = in_child(lambda: answers(host))
            assert found == expected, page
    assert died < 6


def test_verify_outlives_any_damage_and_rebuilds(host: Host, expected: Answers) -> None:
    whole = data_of(host).read_bytes()
    chance = random.Random(5)
    for _ in range(6):
        restore(host)
        data = bytearray(whole)
        for _ in range(40):  # enough for LMDB to lose its way
            at = chance.randrange(2 * PAGE, len(data) - 16)
            data[at : at + 8] = chance.randbytes(8)
        data_of(host).write_bytes(data)
        result = in_child(lambda: verify(Host(host.store, host._parts.stores.index.path)))
        assert result.rebuilt
        assert result.faults
        assert in_child(lambda: answers(host)) == expected
    assert verified(host) == []


def test_verify_tells_an_index_that_says_too_little_or_too_much(host: Host, expected: Answers) -> None:
    def spoil(work: Callable[[database.Writer], None]) -> None:
        Database(host._parts.stores.index.path).change(work)

    def one(writer: database.Writer, tag: bytes) -> bytes:
        return next(key for key, _ in writer.scan(tag))

    for tag in (layout.BITMAP, layout.FOUND, layout.NAME, layout.UUID, layout.MEMBERS):
        restore(host)
        in_child(lambda tag=tag: spoil(lambda writer: writer.delete(one(writer, tag))))
        assert verified(host), tag
        assert in_child(lambda: answers(host)) == expected
    assert verified(host) == []
    restore(host)
    in_child(lambda: spoil(lambda writer: writer.put(b"z", b"unheard of")))
    assert "nobody knows" in verified(host)[0]


def test_a_rebuilt_index_still_knows_what_it_has_seen(host: Host) -> None:
    before = in_child(lambda: Host(host.store, host._parts.stores.index.path)._parts.stores.index.all_seen())
    assert len(before) == 2
    in_child(lambda: rebuild(Host(host.store, host._parts.stores.index.path)))
    assert in_child(lambda: Host(host.store, host._parts.stores.index.path)._parts.stores.index.all_seen()) == before


# Not to be opened, and other arguments that cannot be.


@pytest.fixture
def forbidden(chosen: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    """An index of another user, as `os.open` sees it; root may open anything, so it is said here."""
    real = os.open

    def refuse(path: Any, *arguments: Any, **more: Any) -> int:
        if os.fspath(path) == chosen._parts.stores.index.path + ".guard":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, *arguments, **more)

    database.connect(chosen._parts.stores.index.path).suspend()
    database._connected.pop(chosen._parts.stores.index.path).close()
    monkeypatch.setattr(os, "open", refuse)
    return chosen


def test_a_path_needs_no_index_that_may_not_be_opened(forbidden: Host) -> None:
    image = Path(forbidden.store).with_name("disk.qcow2")
    for path in (image, forbidden.store):
        assert json_of("list", path)[0]["bitmaps"]
    assert json_of("map", image, "b0")
    with dm.open(image) as opened:
        assert opened["b0"].count == 0


def test_a_name_needs_no_index_that_may_not_be_opened(forbidden: Host) -> None:
    message = f"{forbidden.index_path}: index: Permission denied; --index names another"
    for command in (["list", "n1"], ["map", "q", "b0"], ["list"], ["find", "b0"], ["node", "list"]):
        done = dirtmap(*command)
        assert "b0" in done.out or "n1" in done.out or command[0] == "map"
        assert done.error == (
            f"dirtmap: {message}; without it, containers are read anew, "
            "and a store that was rolled back is not noticed\n"
        )
        assert dirtmap(*command, "-q").error == ""
    assert error_of("index", "verify") == message
    elsewhere = forbidden.store + "-another-index"
    assert json_of("list", "n1", "--index", elsewhere)[0]["bitmaps"]
    for path in Path(elsewhere).parent.glob(Path(elsewhere).name + "*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_arguments_that_cannot_be(host: Host, tmp_path: Path) -> None:
    with dm.open("n1", store=host.store, index="/proc/x") as image:
        assert "b0" in image
    with pytest.raises(dm.Error, match="NUL"):
        _ = dm.this_host(host.store, str(tmp_path / "a\0b"))._parts.stores
    with pytest.raises(dm.Error):
        dm.this_host(str(tmp_path / "a\0b"), host._parts.stores.index.path)._parts.opened().__enter__()
    with dm.Lookup(host) as lookup:
        for node, name in (("\ud800", "b0"), ("n1", "\ud800"), ("\ud800" * 300, "b0")):
            with pytest.raises(dm.BitmapError, match="cannot be encoded"):
                lookup.find(node, name)
    with dm.transaction([]) as targets:
        assert targets == {}


# The commands.


@pytest.fixture
def chosen(host: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setenv("DIRTMAP_STORE", host.store)
    monkeypatch.setenv("DIRTMAP_INDEX", host._parts.stores.index.path)
    return host


def test_index_verify_rebuild_and_stats(chosen: Host) -> None:
    clean = json_of("index", "verify")
    assert clean["faults"] == []
    assert not clean["rebuilt"]
    assert clean["entries"] > NODES * 12
    stats = json_of("index", "stats")
    assert (stats["containers"], stats["sound"], stats["bitmaps"]) == (3, 3, (NODES + 2) * 12)
    assert stats["entries"] == clean["entries"]
    assert json_of("index", "rebuild") == {"containers": 3}
    assert "all as the containers say" in dirtmap("index", "verify").out
    database.connect(chosen._parts.stores.index.path).suspend()
    os.truncate(data_of(chosen), 5 * PAGE)
    done = dirtmap("index", "verify")
    assert "rebuilt" in done.out
    assert "cut short" in done.error
    assert dirtmap("index", "verify", "-q").out == dirtmap("index", "verify", "-q").error == ""
    shutil.rmtree(chosen._parts.stores.index.path)
    for command in ("verify", "stats"):
        assert "there is no index" in error_of("index", command)
    assert json_of("index", "rebuild") == {"containers": 3}
    assert json_of("index", "verify")["faults"] == []


def test_after_a_commit_only_the_leaves_that_it_changed_are_looked_at(tmp_path: Path) -> None:
    path = str(tmp_path / "store.dmap")
    create(path)
    with Store(path) as target:
        with target.change() as change:
            for number in range(400):
                name = b"node%d" % number
                change.table.put(Record(name, store.KIND_NODE, uuid.uuid4().bytes, 1 << 20, path=b"/none" + name))
        index = index_at(str(tmp_path / "index"))
        list(index.refresh([path]))
        for number in (7, 8):
            with target.change() as change:
                record = change.table.get(b"node%d" % number)
                assert record
                change.table.put(dataclasses.replace(record, size=2 << 20))
            keys: list[bytes] = []

            def get(key: bytes, keys: list[bytes] = keys) -> bytes | None:
                keys.append(key)
                return index.database.get(key)

            reading = look(index.readers, get, path, index.container(path), False)
            assert reading
            assert len(reading.leaves) == len(keys) == 1
            sizes = {member.name: member.size for _, found in reading.leaves.values() for member, _ in found}
            assert sizes[b"node%d" % number] == 2 << 20
            list(index.refresh([path]))
    index.database.close()
