"""A tracker that is asked in bad conditions: it answers, or there is one clear error in bounded time."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import qemu
from support.child import in_child
from support.cli import dirtmap, error_of
from support.tracking import GRANULE, make_node

import dirtmap.engine as dm
from dirtmap.engine.control import client, server, wire
from dirtmap.engine.host import asking
from dirtmap.engine.tracking.tracker import Tracker

SIZE = 64 << 20
NOBODY = 65534


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[Tracker]:
    make_node(tmp_path, SIZE)
    with dm.open("node:drive0") as image, image.track(save_interval=0) as tracker:
        yield tracker


@contextlib.contextmanager
def elsewhere(work: Callable[[Callable[[], None]], None]) -> Iterator[int]:
    """Another process does that work, and is killed in the end; the work calls what it is given once it is ready.

    Yields:
        The process, which is ready.
    """
    ready, begun = os.pipe()
    pid = os.fork()
    if pid == 0:

        def stay() -> None:
            os.write(begun, b"!")
            signal.pause()

        try:
            work(stay)
        finally:
            os._exit(1)
    os.close(begun)
    try:
        assert os.read(ready, 1)
        yield pid
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@contextlib.contextmanager
def tracked_elsewhere(tmp_path: Path, spoil: Callable[[Tracker], None] = lambda tracker: None) -> Iterator[int]:
    """Another process tracks the disk, and is killed in the end; its tracker is spoilt beforehand."""
    make_node(tmp_path, SIZE)

    def track(stay: Callable[[], None]) -> None:
        with dm.open("node:drive0") as image, image.track(save_interval=0) as tracker:
            spoil(tracker)
            tracker.mark(0, 1)
            stay()

    with elsewhere(track) as pid:
        yield pid


def let_in(tracker: Tracker) -> None:
    """Opens the folder of the live files to everybody, as nothing else does."""
    folder = Path(tracker.live)
    for each in (folder, *folder.parents[:2]):
        each.chmod(0o777)


def connected(folder: str) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX)
    with wire.place(folder) as path:
        peer.connect(path)
    return peer


def test_one_that_was_stopped_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And does not do it later, when nobody waits for it any more."""
    monkeypatch.setattr(client, "_LOOK", 0.1)
    monkeypatch.setattr(asking, "_SILENCE_SECONDS", 1.0)
    with tracked_elsewhere(tmp_path) as pid:
        os.kill(pid, signal.SIGSTOP)
        try:
            assert "which gives no answer: it may be stopped" in error_of("clear", "drive0", "b0")
            error = error_of("checkpoint", "add", "drive0", "noon")
            assert "whether that was done is not known: look before you ask again" in error
        finally:
            os.kill(pid, signal.SIGCONT)
        dirtmap("add", "drive0", "x")
        with dm.open("node:drive0") as image:
            assert list(image) == ["b0", "x"]
            assert image["b0"].count == GRANULE


def test_nobody_counts_bits_to_see_that_it_lives(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    with dm.open("node:drive0") as image, asking.asked(image) as talk:
        monkeypatch.setattr(dm.Handle, "tracking", lambda _: pytest.fail("that counts all bits"))
        assert talk._lives()
        monkeypatch.setattr(asking, "_SILENCE_SECONDS", 0.0)
        assert not talk._lives()


def test_one_that_is_slow_is_waited_for(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write does not end; the tracker lives all the same."""
    monkeypatch.setattr(client, "_LOOK", 0.05)
    monkeypatch.setattr(client, "_PATIENCE", 0.5)
    monkeypatch.setattr(asking, "_SILENCE_SECONDS", 60.0)
    begun, end, done = threading.Event(), threading.Event(), []

    def write() -> None:
        with tracker.write(0, 1):
            begun.set()
            end.wait()

    thread = threading.Thread(target=write)
    thread.start()
    begun.wait()
    try:
        assert "which gives no answer" in error_of("clear", "drive0", "b0")
        monkeypatch.setattr(client, "_PATIENCE", 60.0)
        asker = threading.Thread(target=lambda: done.append(dirtmap("checkpoint", "add", "drive0", "noon")))
        asker.start()
        while not tracker._frozen:
            time.sleep(0.001)
        assert not done
    finally:
        end.set()
        thread.join()
    asker.join()
    assert tracker.checkpoints() == ["noon"]
    assert tracker.bitmap("b0").count == GRANULE


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_one_that_dies_in_the_middle(tmp_path: Path, before: bool) -> None:
    """Whether the change was made is for whoever asks to look: here it is one of the two, and never a part of it."""

    def let_die(tracker: Tracker) -> None:
        change = tracker._change

        def die(*arguments: object) -> None:
            if not before:
                change(*arguments)  # type: ignore[arg-type]
            os.kill(os.getpid(), signal.SIGKILL)

        tracker._change = die  # type: ignore[method-assign,assignment]

    with (
        tracked_elsewhere(tmp_path, let_die),
        dm.open("node:drive0") as image,
        pytest.raises(dm.StorageError, match="ended before it answered; whether that was done is not known"),
    ):
        add_and_clear(image)
    with dm.open("node:drive0") as image:
        assert (list(image), image["b0"].count) == ((["b0"], GRANULE) if before else (["b0", "x"], 0))
        image.recover()
        assert (list(image), image["b0"].count) == ((["b0"], GRANULE) if before else (["b0", "x"], 0))


def add_and_clear(image: dm.Handle) -> None:
    with image.transaction() as bitmaps:
        dm.changes.add(bitmaps, "x")
        dm.changes.clear(bitmaps, "b0")


def test_an_asker_of_another_user(tracker: Tracker) -> None:
    """The folder lets nobody else in, nor does the tracker answer."""
    let_in(tracker)
    os.chmod(os.path.join(tracker.live, wire.NAME), 0o777)

    def ask() -> str:
        os.setgroups([])
        os.setresuid(NOBODY, NOBODY, NOBODY)
        with connected(tracker.live) as peer:
            with contextlib.suppress(OSError):
                wire.send(peer, {"act": "save", "namespace": ""})
            try:
                return str(wire.receive(peer))
            except OSError as error:
                return type(error).__name__

    assert in_child(ask) in ("None", "ConnectionResetError")


def test_a_listener_of_another_user_is_not_believed(tracker: Tracker) -> None:
    path = os.path.join(tracker.live, wire.NAME)
    os.unlink(path)
    let_in(tracker)

    def listen(stay: Callable[[], None]) -> None:
        os.setgroups([])
        os.setresuid(NOBODY, NOBODY, NOBODY)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            stay()

    with elsewhere(listen):
        error = error_of("clear", "drive0", "b0")
    assert f"it cannot be asked from here: {path}: user {NOBODY} listens there, who has to ask himself" in error


def test_an_asker_in_another_mount_namespace(tracker: Tracker) -> None:
    """It sees that the disk is tracked by the lock of the log, but not the live files."""
    live = Path(tracker.live)
    run = (
        "import sys, subprocess; from dirtmap.tools.cli import main\n"
        "subprocess.run(['mount', '-t', 'tmpfs', 'none', sys.argv[1]], check=True)\n"
        "main(['add', 'drive0', 'x'])"
    )
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", run, live.parent], text=True, capture_output=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "tracked by" in done.stderr
    assert "whose live files cannot be read" in done.stderr
    with dm.open("node:drive0") as image:
        assert list(image) == ["b0"]


MESSAGE = struct.Struct(">IQ")
HOSTILE = {
    "a long line": lambda peer: peer.sendall(b"x" * (64 << 20)),
    "a long text": lambda peer: peer.sendall(MESSAGE.pack(1 << 24, 0) + b"[" * (1 << 24)),
    "too many bytes": lambda peer: peer.sendall(MESSAGE.pack(2, 1 << 31) + b"{}"),
    "half a head": lambda peer: peer.sendall(b"\0\0"),
    "half a message": lambda peer: peer.sendall(MESSAGE.pack(100, 0) + b'{"act"'),
    "half its bytes": lambda peer: peer.sendall(MESSAGE.pack(2, 100) + b"{}" + bytes(50)),
    "no object": lambda peer: peer.sendall(MESSAGE.pack(2, 0) + b"[]"),
    "no act": lambda peer: wire.send(peer, {}),
    "an unknown act": lambda peer: wire.send(peer, {"act": ["x"], "namespace": 5}),
    "no changes": lambda peer: wire.send(peer, {"act": "change", "namespace": uuid(), "changes": 7}),
    "odd changes": lambda peer: wire.send(peer, {"act": "change", "namespace": uuid(), "changes": [["put"], [], "x"]}),
    "too few bits": lambda peer: wire.send(
        peer, {"act": "change", "namespace": uuid(), "changes": [["merge", "b0", 512]]}, b"xx"
    ),
    "a change of no bitmap": lambda peer: wire.send(
        peer, {"act": "change", "namespace": uuid(), "changes": [["rename", {"b0": "a\0"}]]}
    ),
}


def uuid() -> str:
    with dm.open("node:drive0") as image:
        return str(image.uuid)


@pytest.mark.parametrize("send", HOSTILE.values(), ids=HOSTILE)
def test_hostile_bytes(tracker: Tracker, send: Callable[[socket.socket], None]) -> None:
    tracker.mark(0, 1)
    with connected(tracker.live) as peer:
        with contextlib.suppress(OSError):
            send(peer)
        dirtmap("add", "drive0", "x")
        tracker.mark(GRANULE, 1)
        with dm.open("node:drive0") as image:
            assert qemu.extents(image["b0"]) == [(0, 2 * GRANULE)]
            assert list(image) == ["b0", "x"]


ODD = [
    5,
    [],
    ("clear",),
    ("clear", 5),
    ("add", "x", "64K", True),
    ("add", "x", 65536),
    ("rename", "b0"),
    ("rename", {}, 5),
]


@pytest.mark.parametrize("change", ODD, ids=str)
def test_who_asks_for_what_is_no_change_is_told_so_at_once(tracker: Tracker, change: tuple[object, ...]) -> None:
    with dm.open("node:drive0") as image:
        with pytest.raises(TypeError):
            image.change_tracked([("remove", "b0"), change])
        with pytest.raises(dm.UnsupportedError, match="no change to a bitmap is called 'x'"):
            image.change_tracked([("x", 5)])
        assert list(image) == ["b0"]
        image.change_tracked([("add", "x", 65536, True), ["rename", {"x": "y"}], ("clear", "y")])
        assert list(image) == ["b0", "y"]


def test_a_checkpoint_has_a_name(tracker: Tracker) -> None:
    with dm.open("node:drive0") as image, pytest.raises(TypeError, match="name is text, and not 5"):
        image.checkpoint(5)  # type: ignore[arg-type]
    with dm.open("node:drive0") as image, dm.Host() as host, pytest.raises(TypeError, match="name is text, and not 5"):
        checkpoint_of(host, image)


def checkpoint_of(host: dm.Host, image: dm.Handle) -> None:
    with host.instant([image]) as instant:
        instant.checkpoint(image, 5)  # type: ignore[arg-type]


def test_a_thousand_connections(tracker: Tracker) -> None:
    """Who is one too many is told so, and no mark is lost meanwhile."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, limits[1]), limits[1]))
    peers = []
    try:
        for number in range(1000):
            peers.append(connected(tracker.live))
            tracker.mark(number % 100 * GRANULE, 1)
        assert "is asked by 64 others already; try again" in error_of("add", "drive0", "x")
        assert tracker.bitmap("b0").count == 100 * GRANULE
    finally:
        for peer in peers:
            peer.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    while tracker._control._peers:  # type: ignore[union-attr]
        time.sleep(0.01)
    dirtmap("add", "drive0", "x")


def test_who_says_nothing_is_sent_away(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_PATIENCE", 0.2)
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(connected(tracker.live)) for _ in range(3)]
        peers[0].sendall(MESSAGE.pack(100, 0) + b'{"act"')
        for peer in peers:
            assert peer.recv(100) == b""


def test_it_listens_again_once_there_are_descriptors(tracker: Tracker) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    peer = socket.socket(socket.AF_UNIX)
    with peer, wire.place(tracker.live) as path:
        lowest = os.dup(peer.fileno())
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
        try:
            peer.connect(path)
            time.sleep(0.3)  # it fails to accept meanwhile
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    dirtmap("add", "drive0", "x")
