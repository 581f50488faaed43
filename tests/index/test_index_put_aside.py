"""An index is looked at before it is mapped: what is none is put aside or refused, and what a user has there stays."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest
from support.child import in_child
from support.cli import dirtmap, error_of
from support.indexed import PAGE, Answers, answers, data_of, restore, verified

from dirtmap.engine.host.host import Host
from dirtmap.engine.index.database import Database, fault
from dirtmap.fmt import index as layout
from dirtmap.fmt.lmdb import meta_fault
from dirtmap.fmt.parsers.index import STATE_VALUE
from dirtmap.fmt.parsers.lmdb import META_PAGE


def test_a_file_cut_short_anywhere_is_begun_anew(host: Host, expected: Answers) -> None:
    whole = data_of(host).read_bytes()
    sizes = {0, 1, 100, PAGE - 1, PAGE, PAGE + 1, PAGE + 100, 2 * PAGE - 1, 2 * PAGE, 2 * PAGE + 1, len(whole) - 1}
    sizes |= set(range(2 * PAGE, len(whole), len(whole) // 12 // PAGE * PAGE))
    for size in sorted(sizes):
        restore(host)
        os.truncate(data_of(host), size)
        assert fault(host._parts.stores.index.path), size
        assert in_child(lambda: answers(host)) == expected, size
        assert Path(host._parts.stores.index.path + ".bad", "data.mdb").stat().st_size == size
        assert fault(host._parts.stores.index.path) is None


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
    assert fault(host._parts.stores.index.path)
    assert in_child(lambda: answers(host)) == expected
    assert Path(host._parts.stores.index.path + ".bad", "data.mdb").read_bytes() == data
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
    with lmdb.open(host._parts.stores.index.path) as env:
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
    path = Path(host._parts.stores.index.path)
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
        assert fault(host._parts.stores.index.path) is None


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
    bad = Path(host._parts.stores.index.path + ".bad")
    try:
        make(bad)
        os.truncate(data_of(host), 100)
        before = _snapshot(bad.parent)
        with Host(host.store, host._parts.stores.index.path) as here:
            assert here._parts.names.resolve("n1") == expected["n1"]
            assert here.notice is not None
            assert "is put aside, and not one; move it away" in here.notice
        Path(host._parts.stores.index.path + ".guard").unlink()
        before.pop(host._parts.stores.index.path + ".guard", None)
        assert _snapshot(bad.parent) == before
    finally:
        for name in ("elsewhere", "precious"):
            path = bad.with_name(name)
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    restore(host)
    assert in_child(lambda: answers(host)) == expected


@pytest.mark.parametrize("named", [False, True])
def test_a_foreign_database_is_put_aside_whole(host: Host, expected: Answers, named: bool) -> None:
    shutil.rmtree(host._parts.stores.index.path)

    def make() -> None:
        with lmdb.open(host._parts.stores.index.path, max_dbs=4) as env, env.begin(write=True) as txn:
            for number in range(100):
                txn.put(f"k{number}".encode(), b"v" * 50, db=env.open_db(b"x", txn=txn) if named else None)

    in_child(make)
    before = data_of(host).read_bytes()
    assert in_child(lambda: answers(host)) == expected
    assert Path(host._parts.stores.index.path + ".bad", "data.mdb").read_bytes() == before


def test_an_index_of_another_version_is_begun_anew(host: Host, expected: Answers) -> None:
    def make() -> None:
        state = STATE_VALUE.build(version=99, reserved=0, containers=0)
        Database(host._parts.stores.index.path).change(lambda writer: writer.put(layout.STATE, state))

    in_child(make)
    assert in_child(lambda: answers(host)) == expected
    assert Path(host._parts.stores.index.path + ".bad").is_dir()


def test_what_is_put_aside_replaces_what_was(host: Host, expected: Answers) -> None:
    bad = Path(host._parts.stores.index.path + ".bad")
    for make in (bad.mkdir, lambda: shutil.copytree(host._parts.stores.index.path, bad)):
        restore(host)
        make()
        os.truncate(data_of(host), 100)
        assert in_child(lambda: answers(host)) == expected
        assert Path(bad, "data.mdb").stat().st_size == 100
