"""The database of an index grows, is shared, forked and replaced, by processes that are killed or have no room."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import lmdb
import pytest
from support.child import died_of, in_child
from support.cli import json_of
from support.indexed import MIB, Answers, answers, tiny, verified
from support.unseen import inside, needs_root, started

import dirtmap.engine as dm
from dirtmap.engine.host.host import Host
from dirtmap.engine.host.maintenance import rebuild, verify
from dirtmap.engine.index import database
from dirtmap.engine.index.database import DamagedError, Database, connect, fault, replace
from dirtmap.engine.model import changes
from dirtmap.engine.namespaces import nodes
from dirtmap.engine.storefile.file import Store


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


def test_a_child_opens_it_anew(host: Host, expected: Answers) -> None:
    assert answers(host) == expected
    mapped = database._connected[os.path.realpath(host._parts.stores.index.path)]
    assert mapped._env is not None

    def work() -> tuple[bool, Answers]:
        inherited = any("data.mdb" in line for line in Path("/proc/self/maps").read_text().splitlines())
        return inherited, answers(host)

    assert in_child(work) == (False, expected)
    assert answers(host) == expected
    assert database._connected[os.path.realpath(host._parts.stores.index.path)] is mapped
    # A grandchild, and changes on both sides.
    in_child(lambda: in_child(lambda: _fill(connect(host._parts.stores.index.path), 0, 10)))
    assert mapped.get(b"x" + bytes(4)) == bytes(4000)


def test_a_fork_waits_for_threads_that_use_it(host: Host, expected: Answers) -> None:
    stop = threading.Event()
    failed: list[BaseException] = []

    def use() -> None:
        here = Host(host.store, host._parts.stores.index.path)
        try:
            while not stop.is_set():
                assert here._parts.names.resolve("n1") == expected["n1"]
                connect(host._parts.stores.index.path).change(lambda writer: writer.put(b"x", os.urandom(8)))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(30):
            assert (
                in_child(lambda: Host(host.store, host._parts.stores.index.path)._parts.names.resolve("n2"))
                == expected["n2"]
            )
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed


def test_many_processes_at_once(tmp_path: Path) -> None:
    here = Host(str(tmp_path / "default.dmap"), str(tmp_path / "index"))
    here.add_node("first", tiny(tmp_path / "first.raw"))

    def work(worker: int) -> None:
        mine = Host(here.store, here._parts.stores.index.path)
        for number in range(6):
            name = f"{worker}-{number}"
            mine.add_node(name, tiny(tmp_path / f"{name}.raw"))
            assert mine._parts.names.resolve(name)
            assert mine._parts.names.resolve("first")
            with (
                dm.open(name, store=here.store, index=here._parts.stores.index.path) as image,
                image.transaction() as bitmaps,
            ):
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
    assert not Path(here._parts.stores.index.path + ".bad").exists()


def test_an_index_replaced_under_a_process_is_not_used_any_more(host: Host, expected: Answers) -> None:
    assert answers(host) == expected
    in_child(lambda: rebuild(Host(host.store, host._parts.stores.index.path)))
    assert answers(host) == expected
    shutil.rmtree(host._parts.stores.index.path)
    assert answers(host) == expected
    os.rename(host._parts.stores.index.path, host._parts.stores.index.path + ".elsewhere")
    assert answers(host) == expected


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "ceph", "9p", "fuse.sshfs", "lustre"])
def test_network_file_systems_are_refused(host: Host, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    shutil.rmtree(host._parts.stores.index.path)
    monkeypatch.setattr(database, "_file_system", lambda folder: kind)
    assert host._parts.names.resolve("n1") is not None
    assert host.notice is not None
    assert f"network file system ({kind})" in host.notice
    assert not Path(host._parts.stores.index.path).exists()
    # What names a path needs no index.
    monkeypatch.setenv("DIRTMAP_STORE", "none")
    assert len(json_of("list", Path(host.store).with_name("disk.qcow2"))[0]["bitmaps"]) == 12


def test_the_file_system_is_known() -> None:
    assert database._file_system("/proc") == "proc"
    assert database._file_system("/") != ""


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
        here = Host(host.store, host._parts.stores.index.path)
        sys.setprofile(Killer(database.__file__, left))
        if act == "replace":
            replace(host._parts.stores.index.path, even_if_good=True)
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


MAKER = """
import sys
from dirtmap.engine.index.database import replace

def fill(new):
    print("half made", flush=True)
    sys.stdin.readline()
    new.change(lambda writer: writer.put(b"x", b"made elsewhere"))

replace(sys.argv[1], fill, even_if_good=True)
print("made", flush=True)
"""


@needs_root
def test_what_a_process_that_cannot_be_seen_makes_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "index"
    # There its number is one that no process has here.
    number = next(number for number in range(30000, 1 << 15) if not os.path.exists(f"/proc/{number}"))
    as_that = f'echo {number - 1} > /proc/sys/kernel/ns_last_pid; "$0" "$@"; exit $?'
    with started(*inside("both", "sh", "-c", as_that, sys.executable, "-c", MAKER, str(path))) as maker:
        (half,) = tmp_path.glob(f"index.new-{number}-*")
        connect(str(path)).close()
        assert list(tmp_path.glob("index.new-*")) == [half]
        assert maker.stdin
        assert maker.stdout
        maker.stdin.write("\n")
        maker.stdin.flush()
        assert maker.stdout.readline() == "made\n"
    assert connect(str(path)).get(b"x") == b"made elsewhere"
    assert not list(tmp_path.glob("index.new-*"))


def test_what_nobody_makes_any_more_is_removed_though_its_number_is_in_use(tmp_path: Path) -> None:
    left = tmp_path / f"index.new-{os.getpid()}-x"
    left.mkdir()
    (left / "data.mdb").touch()
    others = [tmp_path / f"index.new-{os.getpid()}-y", tmp_path / "index.new-mine"]
    for other in others:
        other.mkdir()
        (other / "note").touch()
    connect(str(tmp_path / "index")).close()
    assert sorted(tmp_path.glob("index.new-*")) == sorted(others)


def test_a_full_disk_does_not_make_a_commit_look_failed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Database, work: object) -> None:
        with database._errors(self.path):
            raise lmdb.DiskError(": No space left on device")

    with dm.open("n1", store=host.store, index=host._parts.stores.index.path) as image:
        with monkeypatch.context() as patch:
            patch.setattr(Database, "change", full)
            with image.transaction() as bitmaps:
                bitmaps["b0"].mark(0, 1)
            with Host(host.store, host._parts.stores.index.path) as here:
                assert here._parts.names.resolve("n1")
                assert here.notice is not None
                assert "No space left" in here.notice
        assert image["b0"].count == 65536
    found = Host(host.store, host._parts.stores.index.path)
    assert found._parts.names.resolve("n1")
    with Store(host.store) as target:
        assert not [node.doubt for node in nodes.nodes(target) if node.doubt]
    with dm.open("n1", store=host.store, index=host._parts.stores.index.path) as image, image.transaction() as bitmaps:
        bitmaps["b0"].clear(0, MIB)


def test_lmdb_that_loses_its_way_is_damage(host: Host) -> None:
    for error in (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.PanicError, lmdb.InvalidError):
        with pytest.raises(DamagedError), database._errors(host._parts.stores.index.path):
            raise error("x")
