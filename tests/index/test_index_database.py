"""The index's database: looked at before it is mapped, whatever is there; grown, forked, shared, killed, full.

What may kill the process that reads it is tried in a child, whose end is looked at.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import random
import shutil
import signal
import struct
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest
from support import qemu
from support.child import SignalError, died_of, in_child
from support.cli import dirtmap, error_of, json_of
from support.hostless import index_at

import dirtmap.engine as dm
from dirtmap.engine.host.host import Host
from dirtmap.engine.host.maintenance import rebuild, verify
from dirtmap.engine.index import database
from dirtmap.engine.index.database import DamagedError, Database, connect, fault, replace
from dirtmap.engine.index.reading import look
from dirtmap.engine.model import changes
from dirtmap.engine.namespaces import nodes
from dirtmap.engine.storefile.file import Store, create
from dirtmap.fmt import index as layout
from dirtmap.fmt import store
from dirtmap.fmt.errors import StorageError
from dirtmap.fmt.store import Record
from dirtmap.fmt.structures.index import NAMESPACE_VALUE, STATE_VALUE, build_members, parse_members
from dirtmap.fmt.structures.lmdb import META_PAGE, meta_fault

MIB = 1 << 20
NODES = 24
PAGE = 4096

Answers = dict[str, Any]


def tiny(path: Path) -> str:
    path.touch()
    os.truncate(path, MIB)
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Host:
    """A host with a store, another store, a device, images, and an index of it all, which `pristine` brings back."""
    folder = tmp_path_factory.mktemp("database")
    here = Host(str(folder / "default.dmap"), str(folder / "index"))
    other = Host(str(folder / "other.dmap"), here.stores.index.path)
    for number in range(NODES):
        (here if number % 4 else other).add_node(f"n{number}", tiny(folder / f"{number}.raw"))
    here.registry.remember_store(other.store)
    qemu.create(folder / "disk.qcow2", MIB)
    here.add_qcow2("q", str(folder / "disk.qcow2"))
    here.add_device("d", "n1")
    for name in [f"n{number}" for number in range(NODES)] + ["q", "d"]:
        with dm.open(name, store=here.store, index=here.stores.index.path) as image, image.transaction() as bitmaps:
            for number in range(12):
                changes.add(bitmaps, f"b{number}")
    here.stores.refresh()
    connect(here.stores.index.path).suspend()
    with lmdb.open(here.stores.index.path) as env:
        (folder / "pristine").mkdir()
        env.copy(str(folder / "pristine"), compact=True)  # so that no page is of an older state
    return here


@pytest.fixture
def host(made: Host) -> Iterator[Host]:
    """A `Host` with an index as it was; a new one, so that nothing of it is remembered."""
    yield from _fresh(made)


def _fresh(made: Host) -> Iterator[Host]:
    restore(made)
    yield Host(made.store, made.stores.index.path)
    restore(made)


def restore(made: Host) -> None:
    if known := database._connected.pop(made.stores.index.path, None):
        known.close()
    for path in Path(made.store).parent.glob("index*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    shutil.copytree(Path(made.store).with_name("pristine"), made.stores.index.path)


def answers(made: Host) -> Answers:
    """What the host says of everything there is; asked anew."""
    here = Host(made.store, made.stores.index.path)
    found: Answers = {}
    for name in [f"n{number}" for number in range(NODES)] + ["q", "d", "none"]:
        found[name] = here.names.resolve(name)
    for bitmap in ("b3", "none"):
        found[f"bitmap {bitmap}"] = [(hit.path, hit.kind, hit.holder, hit.namespace) for hit in here.find(bitmap)]
    found["containers"] = sorted(here.containers())
    one = here.names.resolve("n1")
    assert one
    found["devices"] = here.names.devices_of(one.uuid)
    return found


@pytest.fixture(scope="module")
def expected(made: Host) -> Answers:
    found = in_child(lambda: answers(made))
    assert len(found["bitmap b3"]) == NODES + 2
    assert found["none"] is None
    assert found["d"].is_device
    return found


def data_of(host: Host) -> Path:
    return Path(host.stores.index.path, "data.mdb")


def verified(host: Host) -> list[str]:
    return in_child(lambda: verify(Host(host.store, host.stores.index.path)).faults)


# The value that says what a bucket contributed, as SPEC.md has it.


def test_members_are_an_area_pointer_and_namespaces() -> None:
    one = layout.Member(b"n", store.KIND_NODE, b"u" * 16, bytes(16), MIB, b"/x", (4096, 100, 7))
    other = layout.Member(b"", store.KIND_PLACE, bytes(16), b"r" * 16, 0)
    raw = b"".join(
        struct.pack(">QB3xHH16s16sQQLL", 9, m.kind, len(m.name), len(m.path), m.uuid, m.root_uuid, m.size, *m.directory)
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


# What is there is looked at first.


def test_a_file_cut_short_anywhere_is_begun_anew(host: Host, expected: Answers) -> None:
    whole = data_of(host).read_bytes()
    sizes = {0, 1, 100, PAGE - 1, PAGE, PAGE + 1, PAGE + 100, 2 * PAGE - 1, 2 * PAGE, 2 * PAGE + 1, len(whole) - 1}
    sizes |= set(range(2 * PAGE, len(whole), len(whole) // 12 // PAGE * PAGE))
    for size in sorted(sizes):
        restore(host)
        os.truncate(data_of(host), size)
        assert fault(host.stores.index.path), size
        assert in_child(lambda: answers(host)) == expected, size
        assert Path(host.stores.index.path + ".bad", "data.mdb").stat().st_size == size
        assert fault(host.stores.index.path) is None


def _zeros(data: bytearray) -> None:
    data[:] = bytes(len(data))


def _first_meta(data: bytearray) -> None:
    data[:PAGE] = bytes(PAGE)


def _second_meta(data: bytearray) -> None:
    data[PAGE : 2 * PAGE] = bytes(PAGE)


def _noise(data: bytearray) -> None:
    data[:] = random.Random(1).randbytes(len(data))


def _first_magic(data: bytearray) -> None:
    data[16] ^= 1


def _second_magic(data: bytearray) -> None:
    data[PAGE + 16] ^= 1


def _version(data: bytearray) -> None:
    data[PAGE + 20] ^= 2


def _text(data: bytearray) -> None:
    data[:] = b"hello\n"


@pytest.mark.parametrize(
    "damage", [_zeros, _first_meta, _second_meta, _noise, _first_magic, _second_magic, _version, _text]
)
def test_what_is_no_database_is_put_aside(host: Host, expected: Answers, damage: Callable[[bytearray], None]) -> None:
    data = bytearray(data_of(host).read_bytes())
    damage(data)
    data_of(host).write_bytes(data)
    assert fault(host.stores.index.path)
    assert in_child(lambda: answers(host)) == expected
    assert Path(host.stores.index.path + ".bad", "data.mdb").read_bytes() == data
    assert verified(host) == []


@pytest.mark.parametrize("count", [30, pytest.param(2 * 152 * 8, marks=pytest.mark.long)])
def test_every_bit_of_the_meta_pages_may_be_wrong(host: Host, expected: Answers, count: int) -> None:
    whole = data_of(host).read_bytes()
    chance = random.Random(2)
    places = [(page, bit) for page in (0, PAGE) for bit in range(152 * 8)]
    for page, bit in chance.sample(places, count):
        restore(host)
        data = bytearray(whole)
        data[page + bit // 8] ^= 1 << bit % 8
        data_of(host).write_bytes(data)
        assert in_child(lambda: answers(host)) == expected, (page, bit)


def test_the_meta_page_is_lmdbs(host: Host) -> None:
    """What LMDB itself tells of the database, against what we read in the newer of its meta pages."""
    with lmdb.open(host.stores.index.path) as env:
        info, stat = env.info(), env.stat()
    pages = data_of(host).read_bytes()
    assert meta_fault(pages, len(pages)) is None
    metas = [META_PAGE.parse(pages, at) for at in (0, stat["psize"])]
    newest = max(metas, key=lambda meta: meta.transaction)
    assert (newest.mapsize, newest.last_page) == (info["map_size"], info["last_pgno"])
    assert (newest.transaction, newest.page_size) == (info["last_txnid"], stat["psize"])
    assert (newest.entries, newest.main_depth) == (stat["entries"], stat["depth"])
    assert (newest.branch_pages, newest.leaf_pages) == (stat["branch_pages"], stat["leaf_pages"])


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("magic", 0xBEEFC0DF, "is not an LMDB database"),
        ("version", 2, "is not an LMDB database"),
        ("flags", 0x02, "is not an LMDB database"),
        ("page_size", 4095, "has no second meta page"),
        ("page_size", 1 << 17, "has no second meta page"),
        ("free_flags", 0x0C, "has flags that an index does not have"),
        ("main_flags", 0x04, "has flags that an index does not have"),
        ("mapsize", (1 << 46) + 1, "says to be larger than any file can be"),
        ("last_page", 1 << 46, "says to be larger than any file can be"),
        ("last_page", 8, "is cut short"),
        ("root", 8, "has a root outside of the file"),
        ("free_root", 8, "has a root outside of the file"),
    ],
)
def test_each_fault_of_a_meta_page_has_its_words(field: str, value: int, what: str) -> None:
    sound = {field.name: 0 for field in META_PAGE.fields} | {
        "flags": 0x08,
        "magic": 0xBEEFC0DE,
        "version": 1,
        "mapsize": 1 << 20,
        "page_size": 4096,
        "free_flags": 0x08,
        "free_root": 2**64 - 1,
        "root": 7,
        "last_page": 7,
    }

    def pages(**changed: int) -> bytes:
        metas = [sound | {"transaction": 1}, sound | {"transaction": 2} | changed]
        if "page_size" in changed:
            metas.reverse()  # it is the first one's that says where the second is
        return b"".join(META_PAGE.build(**meta).ljust(4096, b"\0") for meta in metas)

    assert meta_fault(pages(), 8 * 4096) is None
    assert meta_fault(pages(**{field: value}), 8 * 4096) == what


def test_nothing_in_its_place(host: Host, expected: Answers) -> None:
    path = Path(host.stores.index.path)
    for make in (
        path.mkdir,
        lambda: path.symlink_to("nowhere"),
        lambda: (path.mkdir(), Path(path, "lock.mdb").touch()),
    ):
        if path.is_symlink():
            path.unlink()
            shutil.rmtree(path.with_name("nowhere"))
        else:
            shutil.rmtree(path)
        make()
        assert in_child(lambda: answers(host)) == expected
        assert fault(host.stores.index.path) is None


def _snapshot(folder: Path) -> dict[str, object]:
    """What is in a folder: names with modes, and the contents of files."""
    return {
        str(path): (path.lstat().st_mode, path.read_bytes() if path.is_file() and not path.is_symlink() else b"")
        for path in sorted(folder.rglob("*"))
    }


def _folder(path: Path) -> None:
    path.mkdir()
    Path(path, "photo").write_bytes(b"a user's")


def _folder_beside_an_index(path: Path) -> None:
    with lmdb.open(str(path)):
        Path(path, "photo").write_bytes(b"a user's")


def _link_to_a_folder(path: Path) -> None:
    _folder(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _link_inside(path: Path) -> None:
    path.mkdir()
    path.with_name("precious").write_bytes(b"a user's")
    Path(path, "data.mdb").symlink_to("../precious")


def _pipe_inside(path: Path) -> None:
    path.mkdir()
    os.mkfifo(path / "data.mdb")


_FOREIGN: list[Callable[[Path], object]] = [
    *(_folder, _folder_beside_an_index, _link_to_a_folder, _link_inside, _pipe_inside),
    *(os.mkfifo, lambda path: path.write_bytes(b"a file"), lambda path: path.symlink_to("/dev/null")),
    lambda path: path.symlink_to(path.name),
]


@pytest.mark.parametrize("make", _FOREIGN)
def test_what_is_no_index_is_refused_and_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object]
) -> None:
    dirtmap("store", "create", tmp_path / "default.dmap")
    monkeypatch.setenv("DIRTMAP_INDEX", str(tmp_path / "foreign"))
    make(tmp_path / "foreign")
    before = _snapshot(tmp_path)
    commands = (["find", "b"], ["list", "a"], ["list"], ["index", "scan", str(tmp_path)])
    for command in (*commands, ["index", "verify"], ["index", "rebuild"], ["index", "stats"]):
        if command[0] == "list" or command[1] in ("b", "verify", "rebuild"):
            message = f"{tmp_path}/foreign: not an index; --index names another"
            assert in_child(lambda command=command: error_of(*command)) == message
        else:
            in_child(lambda command=command: error_of(*command))
        assert _snapshot(tmp_path) == before


@pytest.mark.parametrize("make", _FOREIGN)
def test_what_a_user_has_where_an_index_is_put_aside_stays(
    host: Host, expected: Answers, make: Callable[[Path], object]
) -> None:
    bad = Path(host.stores.index.path + ".bad")
    try:
        make(bad)
        os.truncate(data_of(host), 100)
        before = _snapshot(bad.parent)
        with pytest.raises(StorageError, match="is put aside, and not one; move it away"):
            Host(host.store, host.stores.index.path).names.resolve("n1")
        Path(host.stores.index.path + ".guard").unlink()
        before.pop(host.stores.index.path + ".guard", None)
        assert _snapshot(bad.parent) == before
    finally:
        for name in ("elsewhere", "precious"):
            path = bad.with_name(name)
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    restore(host)
    assert in_child(lambda: answers(host)) == expected


@pytest.mark.parametrize("named", [False, True])
def test_a_foreign_database_is_put_aside_whole(host: Host, expected: Answers, named: bool) -> None:
    shutil.rmtree(host.stores.index.path)

    def make() -> None:
        with lmdb.open(host.stores.index.path, max_dbs=4) as env, env.begin(write=True) as txn:
            for number in range(100):
                txn.put(f"k{number}".encode(), b"v" * 50, db=env.open_db(b"x", txn=txn) if named else None)

    in_child(make)
    before = data_of(host).read_bytes()
    assert in_child(lambda: answers(host)) == expected
    assert Path(host.stores.index.path + ".bad", "data.mdb").read_bytes() == before


def test_an_index_of_another_version_is_begun_anew(host: Host, expected: Answers) -> None:
    def make() -> None:
        state = STATE_VALUE.build(version=2, reserved=0, containers=0)
        Database(host.stores.index.path).change(lambda writer: writer.put(layout.STATE, state))

    in_child(make)
    assert in_child(lambda: answers(host)) == expected
    assert Path(host.stores.index.path + ".bad").is_dir()


def test_what_is_put_aside_replaces_what_was(host: Host, expected: Answers) -> None:
    bad = Path(host.stores.index.path + ".bad")
    for make in (bad.mkdir, lambda: shutil.copytree(host.stores.index.path, bad)):
        restore(host)
        make()
        os.truncate(data_of(host), 100)
        assert in_child(lambda: answers(host)) == expected
        assert Path(bad, "data.mdb").stat().st_size == 100


# Damage inside.


def test_a_wrong_value_is_noticed(host: Host, expected: Answers) -> None:
    """A bit of the contents of every kind of value, which LMDB itself takes for sound."""
    whole = data_of(host).read_bytes()
    with lmdb.open(host.stores.index.path, readonly=True, lock=False) as env, env.begin() as txn:
        stored = list(txn.cursor())
    chance = random.Random(3)
    kinds = {key[:1] for key, _ in stored}
    assert kinds == set(layout.TAGS)
    for kind in sorted(kinds):
        key, value = chance.choice([item for item in stored if item[0][:1] == kind])
        assert whole.count(key + value) == 1, key
        at = whole.index(key + value)
        data = bytearray(whole)
        data[at + len(key) + chance.randrange(len(value))] ^= 1 << chance.randrange(8)
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
        result = in_child(lambda: verify(Host(host.store, host.stores.index.path)))
        assert result.rebuilt
        assert result.faults
        assert in_child(lambda: answers(host)) == expected
    assert verified(host) == []


def test_verify_tells_an_index_that_says_too_little_or_too_much(host: Host, expected: Answers) -> None:
    def spoil(work: Callable[[database.Writer], None]) -> None:
        Database(host.stores.index.path).change(work)

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
    before = in_child(lambda: Host(host.store, host.stores.index.path).stores.index.all_seen())
    assert len(before) == 2
    in_child(lambda: rebuild(Host(host.store, host.stores.index.path)))
    assert in_child(lambda: Host(host.store, host.stores.index.path).stores.index.all_seen()) == before


# Growth.


def _fill(here: Database, start: int, count: int) -> None:
    here.change(
        lambda writer: [writer.put(b"x" + number.to_bytes(4, "big"), bytes(4000)) for number in range(start, count)]
    )


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setattr(database, "_FIRST_SIZE", 1 << 18)
    return str(tmp_path / "small")


def test_it_grows(small: str) -> None:
    here = connect(small)
    _fill(here, 0, 1000)
    assert here.info()["map-size"] >= 4_000_000
    assert sum(1 for _ in here.read(lambda reader: list(reader.scan(b"x")))) == 1000
    here.suspend()
    assert in_child(lambda: connect(small).get(b"x" + bytes(4))) == bytes(4000)  # which asks for less space


def test_it_sees_that_another_process_has_grown_it(small: str) -> None:
    here = connect(small)
    _fill(here, 0, 3)
    ready, go = os.pipe(), os.pipe()

    def grow() -> None:
        os.write(ready[1], b".")
        os.read(go[0], 1)
        _fill(connect(small), 3, 600)

    grown = threading.Thread(target=in_child, args=(grow,))
    grown.start()
    os.read(ready[0], 1)
    assert here.info()["map-size"] == 1 << 18  # mapped here, too
    assert here.get(b"x" + bytes(4)) == bytes(4000)
    os.write(go[1], b".")
    grown.join()
    assert here.get(b"x" + (599).to_bytes(4, "big")) == bytes(4000)
    assert len(here.read(lambda reader: list(reader.scan(b"x")))) == 600
    in_child(lambda: _fill(connect(small), 600, 2000))
    _fill(here, 2000, 2100)
    assert len(here.read(lambda reader: list(reader.scan(b"x")))) == 2100
    for end in (*ready, *go):
        os.close(end)


def test_a_file_never_looks_cut_short_and_is_never_cut(small: str) -> None:
    here = connect(small)
    for number in range(30):
        here.change(lambda writer: [writer.put(b"y" + bytes([n]), bytes(9000)) for n in range(8)])
        here.change(lambda writer: [writer.delete(b"y" + bytes([n])) for n in range(8)])
        _fill(here, number, number + 1)
        assert fault(small) is None


# Processes.


def test_a_child_opens_it_anew(host: Host, expected: Answers) -> None:
    assert answers(host) == expected
    mapped = database._connected[os.path.realpath(host.stores.index.path)]
    assert mapped._env is not None

    def work() -> tuple[bool, Answers]:
        inherited = any("data.mdb" in line for line in Path("/proc/self/maps").read_text().splitlines())
        return inherited, answers(host)

    assert in_child(work) == (False, expected)
    assert answers(host) == expected
    assert database._connected[os.path.realpath(host.stores.index.path)] is mapped
    # A grandchild, and changes on both sides.
    in_child(lambda: in_child(lambda: _fill(connect(host.stores.index.path), 0, 10)))
    assert mapped.get(b"x" + bytes(4)) == bytes(4000)


def test_a_fork_waits_for_threads_that_use_it(host: Host, expected: Answers) -> None:
    stop = threading.Event()
    failed: list[BaseException] = []

    def use() -> None:
        here = Host(host.store, host.stores.index.path)
        try:
            while not stop.is_set():
                assert here.names.resolve("n1") == expected["n1"]
                connect(host.stores.index.path).change(lambda writer: writer.put(b"x", os.urandom(8)))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(30):
            assert in_child(lambda: Host(host.store, host.stores.index.path).names.resolve("n2")) == expected["n2"]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed


def test_many_processes_at_once(tmp_path: Path) -> None:
    here = Host(str(tmp_path / "default.dmap"), str(tmp_path / "index"))
    here.add_node("first", tiny(tmp_path / "first.raw"))

    def work(worker: int) -> None:
        mine = Host(here.store, here.stores.index.path)
        for number in range(6):
            name = f"{worker}-{number}"
            mine.add_node(name, tiny(tmp_path / f"{name}.raw"))
            assert mine.names.resolve(name)
            assert mine.names.resolve("first")
            with dm.open(name, store=here.store, index=here.stores.index.path) as image, image.transaction() as bitmaps:
                changes.add(bitmaps, "b")

    failed: list[BaseException] = []

    def run(worker: int) -> None:
        try:
            in_child(lambda: work(worker))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(here.find("b")) == 24
    assert not verify(here).faults
    assert not Path(here.stores.index.path + ".bad").exists()


def test_an_index_replaced_under_a_process_is_not_used_any_more(host: Host, expected: Answers) -> None:
    assert answers(host) == expected
    in_child(lambda: rebuild(Host(host.store, host.stores.index.path)))
    assert answers(host) == expected
    shutil.rmtree(host.stores.index.path)
    assert answers(host) == expected
    os.rename(host.stores.index.path, host.stores.index.path + ".elsewhere")
    assert answers(host) == expected


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "ceph", "9p", "fuse.sshfs", "lustre"])
def test_network_file_systems_are_refused(host: Host, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    shutil.rmtree(host.stores.index.path)
    monkeypatch.setattr(database, "_file_system", lambda folder: kind)
    with pytest.raises(StorageError, match=rf"network file system \({kind}\).*choose another --index"):
        host.names.resolve("n1")
    assert not Path(host.stores.index.path).exists()
    # What names a path needs no index.
    monkeypatch.setenv("DIRTMAP_STORE", "none")
    assert len(json_of("list", Path(host.store).with_name("disk.qcow2"))[0]["bitmaps"]) == 12


def test_the_file_system_is_known() -> None:
    assert database._file_system("/proc") == "proc"
    assert database._file_system("/") != ""


# Killed, or without room.


class Killer:
    """Ends its process with the n-th step in a module."""

    def __init__(self, module: str, left: int) -> None:
        self.module, self.left = module, left

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        if frame.f_code.co_filename == self.module:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("act", "step"),
    [
        *(("replace", 7), ("rebuild", 307)),
        *(pytest.param(act, step, marks=pytest.mark.long) for act, step in (("replace", 1), ("rebuild", 19))),
    ],
)
def test_killed_at_every_step_of_a_replacement(host: Host, expected: Answers, act: str, step: int) -> None:
    folder = Path(host.store).parent

    def work(left: int) -> None:
        here = Host(host.store, host.stores.index.path)
        sys.setprofile(Killer(database.__file__, left))
        if act == "replace":
            replace(host.stores.index.path, even_if_good=True)
        else:
            rebuild(here)
        sys.setprofile(None)

    killed = 0
    while end := died_of(functools.partial(work, 1 + killed * step)):
        assert end == signal.SIGKILL
        killed += 1
        assert in_child(lambda: answers(host)) == expected, killed
    assert killed > 10
    # The one that came through has removed what the others left behind.
    assert not list(folder.glob("index.new-*"))
    assert verified(host) == []


def test_a_full_disk_does_not_make_a_commit_look_failed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Database, work: object) -> None:
        with database._errors(self.path):
            raise lmdb.DiskError(": No space left on device")

    with dm.open("n1", store=host.store, index=host.stores.index.path) as image:
        with monkeypatch.context() as patch:
            patch.setattr(Database, "change", full)
            with image.transaction() as bitmaps:
                bitmaps["b0"].mark(0, 1)
            with pytest.raises(StorageError, match="No space left"):
                Host(host.store, host.stores.index.path).names.resolve("n1")
        assert image["b0"].count == 65536
    found = Host(host.store, host.stores.index.path)
    assert found.names.resolve("n1")
    with Store(host.store) as target:
        assert not [node.doubt for node in nodes.nodes(target) if node.doubt]
    with dm.open("n1", store=host.store, index=host.stores.index.path) as image, image.transaction() as bitmaps:
        bitmaps["b0"].clear(0, MIB)


def test_lmdb_that_loses_its_way_is_damage(host: Host) -> None:
    for error in (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.PanicError, lmdb.InvalidError):
        with pytest.raises(DamagedError), database._errors(host.stores.index.path):
            raise error("x")


# Not to be opened, and other arguments that cannot be.


@pytest.fixture
def forbidden(chosen: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    """An index of another user, as `os.open` sees it; root may open anything, so it is said here."""
    real = os.open

    def refuse(path: Any, *arguments: Any, **more: Any) -> int:
        if os.fspath(path) == chosen.stores.index.path + ".guard":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, *arguments, **more)

    database.connect(chosen.stores.index.path).suspend()
    database._connected.pop(chosen.stores.index.path).close()
    monkeypatch.setattr(os, "open", refuse)
    return chosen


def test_a_path_needs_no_index_that_may_not_be_opened(forbidden: Host) -> None:
    image = Path(forbidden.store).with_name("disk.qcow2")
    for path in (image, forbidden.store):
        assert json_of("list", path)[0]["bitmaps"]
    assert json_of("map", image, "b0")
    with dm.open(image) as opened:
        assert opened["b0"].count == 0


def test_a_name_needs_an_index_and_says_so(forbidden: Host) -> None:
    for command in (
        ["list", "n1"],
        ["map", "q", "b0"],
        ["list"],
        ["find", "b0"],
        ["index", "verify"],
        ["node", "list"],
    ):
        message = f"{forbidden.index_path}: index: Permission denied; --index names another"
        assert error_of(*command) == message
    elsewhere = forbidden.store + "-another-index"
    assert json_of("list", "n1", "--index", elsewhere)[0]["bitmaps"]
    shutil.rmtree(elsewhere)


def test_arguments_that_cannot_be(host: Host, tmp_path: Path) -> None:
    with pytest.raises(dm.Error, match="index"):
        dm.open("n1", store=host.store, index="/proc/x")
    with pytest.raises(dm.Error, match="NUL"):
        _ = dm.this_host(host.store, str(tmp_path / "a\0b")).stores
    with pytest.raises(dm.Error):
        dm.this_host(str(tmp_path / "a\0b"), host.stores.index.path).opened().__enter__()
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
    monkeypatch.setenv("DIRTMAP_INDEX", host.stores.index.path)
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
    database.connect(chosen.stores.index.path).suspend()
    os.truncate(data_of(chosen), 5 * PAGE)
    done = dirtmap("index", "verify")
    assert "rebuilt" in done.out
    assert "cut short" in done.error
    assert dirtmap("index", "verify", "-q").out == dirtmap("index", "verify", "-q").error == ""
    shutil.rmtree(chosen.stores.index.path)
    for command in ("verify", "stats"):
        assert "there is no index" in error_of("index", command)
    assert json_of("index", "rebuild") == {"containers": 3}
    assert json_of("index", "verify")["faults"] == []


def test_after_a_commit_only_the_buckets_that_it_changed_are_looked_at(tmp_path: Path) -> None:
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
            assert len(reading.buckets) == len(keys) == 1
            sizes = {member.name: member.size for _, found in reading.buckets.values() for member, _ in found}
            assert sizes[b"node%d" % number] == 2 << 20
            list(index.refresh([path]))
    index.database.close()
