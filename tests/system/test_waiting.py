"""Whoever finds an image or a store held waits for it, as long as was said; and nobody waits in vain."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.child import in_child
from support.cli import COMMAND, dirtmap, error_of
from support.qemu import StorageDaemon, create

import dirtmap.engine as dm
from dirtmap.engine.model import changes

MIB = 1 << 20
TIMES = 30


@pytest.fixture(params=["image", "store"])
def target(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A qcow2 image, or a node of a store; with a bitmap ``b``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIRTMAP_STORE", "default.dmap")
    monkeypatch.setenv("DIRTMAP_INDEX", "index")
    name = "disk.qcow2"
    if request.param == "image":
        create(tmp_path / name, 4 * MIB)
    else:
        name = "one"
        Path("one.raw").write_bytes(bytes(4 * MIB))
        dirtmap("node", "add", "one", "one.raw")
    dirtmap("add", name, "b")
    return name


def transactions(target: str, name: str) -> int:
    """How many of 30 transactions were refused."""
    refused = 0
    for number in range(TIMES):
        try:
            with dm.open(target) as image, image.transaction() as bitmaps:
                changes.add(bitmaps, f"{name} {number}", None)
        except dm.LockedError:
            refused += 1
    return refused


def together(count: int, work: Callable[[int], int]) -> list[int]:
    """What threads return that work at the same time."""
    answers = [-1] * count

    def one(number: int) -> None:
        answers[number] = work(number)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_processes_that_change_one_image_wait_for_each_other(target: str) -> None:
    assert together(4, lambda number: in_child(lambda: transactions(target, f"process {number}"))) == [0] * 4
    assert len(dm.open(target)) == 1 + 4 * TIMES


def test_threads_that_change_one_image_wait_for_each_other(target: str) -> None:
    assert together(4, lambda number: transactions(target, f"thread {number}")) == [0] * 4
    assert len(dm.open(target)) == 1 + 4 * TIMES


def test_threads_that_share_a_handle_wait_for_each_other(target: str) -> None:
    with dm.open(target) as image:

        def work(number: int) -> int:
            for turn in range(TIMES):
                with image.transaction() as bitmaps:
                    changes.add(bitmaps, f"{number} {turn}", None)
                assert "b" in image
            return 0

        assert together(4, work) == [0] * 4
        assert len(image) == 1 + 4 * TIMES


def test_threads_come_in_the_order_in_which_they_asked(target: str) -> None:
    came: list[int] = []

    def work(number: int) -> None:
        with dm.open(target, force_share=True) as image, image.transaction():
            came.append(number)

    with dm.open(target, force_share=True) as image, image.transaction():
        threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
        for thread in threads:
            thread.start()
            time.sleep(0.1)
    for thread in threads:
        thread.join()
    assert came == [0, 1, 2, 3, 4]


def holding(target: str) -> subprocess.Popen[bytes]:
    """Another process that is in the middle of a change."""
    code = (
        "import sys, time, dirtmap.engine as dm\n"
        "with dm.open(sys.argv[1]) as image, image.transaction():\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    python = str(Path(COMMAND).with_name("python"))
    held = subprocess.Popen([python, "-c", code, target], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert held.stdout is not None
    assert held.stdout.readline() == b"held\n"
    return held


COMMANDS = [("add", "n"), ("remove", "b"), ("mark", "b", "0", "1"), ("rename", "b", "n"), ("clear", "b")]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_command_waits_no_longer_than_it_is_told(target: str, command: tuple[str, ...]) -> None:
    verb, *rest = command
    with holding(target) as held:
        try:
            for wait in (0.0, 0.5):
                began = time.monotonic()
                assert f"(process {held.pid})" in error_of(verb, target, *rest, "--wait", f"{wait:g}")
                assert wait <= time.monotonic() - began < wait + 1
        finally:
            held.communicate()


def test_a_command_goes_on_once_it_can(target: str) -> None:
    with holding(target) as held:
        waiting = subprocess.Popen([COMMAND, "mark", target, "b", "0", "1", "--wait", "20"], stderr=subprocess.PIPE)
        time.sleep(1)
        assert waiting.poll() is None
        held.communicate()
        assert waiting.wait(10) == 0
        waiting.communicate()


def test_an_interrupt_ends_the_wait_at_once(target: str) -> None:
    with holding(target) as held:
        waiting = subprocess.Popen([COMMAND, "mark", target, "b", "0", "1", "--wait", "60"], stderr=subprocess.PIPE)
        time.sleep(1)
        began = time.monotonic()
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(10) == 130
        assert time.monotonic() - began < 2
        assert waiting.communicate()[1].strip() == b""
        held.communicate()


def test_reading_waits_for_a_change_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, MIB)
    with holding(str(path)) as held:
        with pytest.raises(dm.LockedError, match=f"process {held.pid}"):
            dm.open(path, wait=0)
        ending = threading.Timer(0.5, lambda: held.communicate())
        ending.start()
        with dm.open(path) as image:
            assert not list(image)
        ending.join()


def test_a_virtual_machine_is_waited_for_by_changes_alone(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, MIB)
    with StorageDaemon(path) as daemon:
        began = time.monotonic()
        error = error_of("add", path, "b", "--wait", "1")
        assert "storage" in error
        assert "process" in error
        assert 1 <= time.monotonic() - began < 4  # seconds; as a rule it waits 5
        began = time.monotonic()
        error_of("list", path)
        assert time.monotonic() - began < 4
        del daemon


def test_a_thread_does_not_wait_for_itself(target: str) -> None:
    began = time.monotonic()
    with dm.open(target) as image, image.transaction():
        with pytest.raises(dm.LockedError, match="this very process"), image.transaction():
            pass
        with dm.open(target, force_share=True) as again, pytest.raises(dm.LockedError), again.transaction():
            pass
    assert time.monotonic() - began < 1


def test_a_fork_of_a_process_with_waiting_threads_is_free(target: str) -> None:
    with dm.open(target) as image, image.transaction():
        # The child has this image's lock from its parent, but no thread that would give it back.
        assert in_child(lambda: Path("other.qcow2").exists()) is False
        pid = os.fork()
        if pid == 0:
            from dirtmap.engine.system import locks

            os._exit(len(locks._lines))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("wait", [-1, float("nan")])
def test_no_number_of_seconds(wait: float) -> None:
    with pytest.raises(dm.ArgumentError, match="wait: "):
        dm.Host(wait=wait)


@pytest.mark.parametrize("wait", ["-1", "nan", "inf", "1e3", "", "x", "1 "])
def test_no_number_of_seconds_on_the_command_line(wait: str) -> None:
    assert "--wait" in error_of("add", "disk.qcow2", "b", f"--wait={wait}")
