"""A forked child has nothing of a change that its parent is making: neither the lock, nor a way to commit it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import qemu
from support.child import in_child

import dirtmap.engine as dm
from dirtmap.engine.model import changes
from dirtmap.engine.system import locks
from dirtmap.engine.system.file import open_file

MIB = 1 << 20
TARGETS = ["one", "disk.qcow2"]  # a node in a store, and an image


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A qcow2 image and a node, with a bitmap ``b`` each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIRTMAP_STORE", "default.dmap")
    monkeypatch.setenv("DIRTMAP_INDEX", "index")
    qemu.create(tmp_path / "disk.qcow2", MIB)
    Path("one.raw").write_bytes(bytes(MIB))
    with dm.Host() as host:
        host.add_node("one", "one.raw")
    for target in TARGETS:
        change(target, "b")
    return tmp_path


def change(target: str, name: str) -> None:
    """Adds a bitmap at once or not at all."""
    with dm.transaction([target], wait=0) as transactions:
        changes.add(transactions[target], name, None)


def names(target: str) -> list[str]:
    with dm.open(target) as image:
        return list(image)


@contextlib.contextmanager
def idle_child() -> Iterator[int]:
    """A fork of this process that does nothing, and lives to the end of the block."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(60)
            signal.pause()
        finally:
            os._exit(1)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("target", TARGETS)
def test_the_lock_ends_with_the_block_of_the_parent(target: str) -> None:
    with contextlib.ExitStack() as stack:
        with dm.transaction([target]) as transactions:
            stack.enter_context(idle_child())
            changes.add(transactions[target], "first", None)
        change(target, "second")
    assert names(target) == ["b", "first", "second"]


@pytest.mark.parametrize("target", TARGETS)
def test_the_lock_ends_with_the_parent(target: str) -> None:
    readable, writable = os.pipe()
    parent = os.fork()
    if parent == 0:
        try:
            with dm.transaction([target]) as transactions, idle_child() as child:
                changes.add(transactions[target], "never", None)
                os.write(writable, child.to_bytes(8))
                signal.pause()
        finally:
            os._exit(1)
    child = int.from_bytes(os.read(readable, 8))
    try:
        with pytest.raises(dm.LockedError):
            change(target, "c")
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        os.kill(child, 0)
        change(target, "c")
    finally:
        os.kill(child, signal.SIGKILL)
    assert names(target) == ["b", "c"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_child_cannot_commit_the_change_of_its_parent(target: str) -> None:
    with contextlib.ExitStack() as block:
        transactions = block.enter_context(dm.transaction([target]))
        changes.add(transactions[target], "first", None)

        def leave() -> str:
            with pytest.raises(dm.StorageError) as caught:
                block.close()
            return str(caught.value)

        assert "open in the process that this one was forked from, and not here" in in_child(leave)
        with pytest.raises(dm.LockedError):  # the parent still has the lock
            in_child_raising(lambda: change(target, "second"))
    assert names(target) == ["b", "first"]


def in_child_raising(work: object) -> None:
    """Calls ``work`` in a child, and raises here what it has raised there."""

    def caught() -> dm.Error | None:
        try:
            work()  # type: ignore[operator]
        except dm.Error as error:
            return error
        return None

    if error := in_child(caught):
        raise error


@pytest.mark.parametrize("target", TARGETS)
def test_a_child_that_was_forked_in_a_change_makes_changes_of_its_own(target: str) -> None:
    readable, writable = os.pipe()
    with dm.transaction([target]) as transactions:
        changes.add(transactions[target], "first", None)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.alarm(60)
                os.read(readable, 1)
                change(target, "second")
                code = 0
            finally:
                os._exit(code)
    os.write(writable, b".")
    assert os.waitpid(child, 0)[1] == 0
    assert names(target) == ["b", "first", "second"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_child_reads_on(target: str) -> None:
    with dm.open(target) as image:
        assert in_child(lambda: [image[name].count for name in image]) == [0]
        assert [image[name].count for name in image] == [0]


def test_a_reader_that_closes_the_file_leaves_no_lock() -> None:
    for locking in (locks.USUAL, locks.UNLOCKED):
        with open_file("disk.qcow2") as file, open_file("disk.qcow2") as other:
            with locks.reading(file, locking=locking, briefly=True, closing=True):
                assert other.locked_by_other(100, 201)
            assert file.fd < 0
            assert not other.locked_by_other(0, 1000)


def test_a_reader_of_the_child_is_not_the_parents() -> None:
    with open_file("disk.qcow2") as file, locks.reading(file):
        with contextlib.ExitStack() as stack:
            stack.enter_context(idle_child())

            def read() -> bool:
                with locks.reading(file, briefly=True):
                    return True

            assert in_child(read)
            with open_file("disk.qcow2") as other:
                assert other.fd != file.fd
                assert other.locked_by_other(100), "what the child gives up is the child's"
        file.unlock(100)
        with open_file("disk.qcow2") as other:
            assert not other.locked_by_other(100)
