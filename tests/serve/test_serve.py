"""`dirtmap serve`: what clients write is marked, whoever dies."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from support import qemu, server, volumes
from support.cli import dirtmap, error_of, json_of, mapped
from support.nbd import TRIM, WRITE, ZERO, Client, write_until_it_ends
from support.server import SIZE, Started, granules, nbdkit, served, uri_of
from support.tls import certificates_in
from support.tracking import GRANULE, make_node, wait_for_beat

import dirtmap.engine as dm
from dirtmap.tools.serve.building import built_filter

NODE = Path("drive0")
nothing_goes_on = server.nothing_goes_on


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_node(tmp_path, SIZE)


def test_each_client_s_writes_zeroes_and_trims_are_marked(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"x" * (1 << 20))
    with served(tmp_path) as (serving, sock):
        write = ["-c", f"write {GRANULE - 1} 2", "-c", f"write -z {1 << 20} 1", "-c", f"discard {2 << 20} 65537"]
        more = ["-c", f"write -f {3 << 20} 512", "-c", f"read {4 << 20} 4k", "-c", "flush"]
        qemu.run("qemu-io", "-f", "raw", *write, *more, uri_of(sock))
        assert serving.tracker is not None
        expected = granules([(GRANULE - 1, 2), (1 << 20, 1), (2 << 20, 65537), (3 << 20, 512)])
        assert granules(mapped(NODE, "b0")) == expected  # while it is served
        serving.tracker.checkpoint("after")
        options = ["--size=8M", "--offset=8M", "--rw=randwrite", "--bs=64k", "--verify=crc32c", "--iodepth=4"]
        fio = ["fio", "--name=a", "--ioengine=nbd", f"--uri={uri_of(sock)}", *options]
        subprocess.run(fio, check=True, capture_output=True, cwd=tmp_path)
        found = serving.tracker.changed_since("after")
        assert granules(qemu.extents(found)) == granules([(8 << 20, 8 << 20)])
        subprocess.run(["nbdcopy", "--destination-is-zero", "small", uri_of(sock)], check=True, cwd=tmp_path)
    assert disk.read_bytes()[: 1 << 20] == b"x" * (1 << 20)
    expected |= granules([(8 << 20, 8 << 20), (0, 1 << 20)])
    assert granules(mapped(NODE, "b0")) == expected
    assert json_of("track", "status", "drive0")["tracked"] is False


def test_a_cut_waits_for_a_write_that_is_under_way(disk: Path, tmp_path: Path) -> None:
    with dm.open("node:drive0") as image, image.track() as tracker, nbdkit(image, tmp_path, "delay") as sock:
        with Client(sock) as client:
            client.send(WRITE, 0, 512)
            while not tracker.bitmap("b0").count:
                time.sleep(0.001)
            tracker.checkpoint("c")
            assert client._socket.recv(16, 0x42)  # MSG_PEEK | MSG_DONTWAIT: it has been answered
            client.drain()
        assert tracker.changed_since("c").count == 0


def test_any_number_of_clients(disk: Path, tmp_path: Path) -> None:
    """More writes are under way than there are slots, and more threads have written than there are."""
    with (
        dm.open("node:drive0") as image,
        image.track() as tracker,
        nbdkit(image, tmp_path, "delay") as sock,
        contextlib.ExitStack() as stack,
    ):
        clients = [stack.enter_context(Client(sock)) for _ in range(40)]
        for number, client in enumerate(clients):
            for at in range(16):
                client.send(WRITE, (number * 16 + at) * GRANULE, 1)
        for client in clients:
            client.drain()
            assert not client.refused
        assert tracker.bitmap("b0").count == 640 * GRANULE


def test_nothing_is_written_that_cannot_be_marked(disk: Path, tmp_path: Path) -> None:
    with served(tmp_path) as (serving, sock), Client(sock) as client:
        assert client.ask(WRITE, 0, 512) == 0
        before = disk.read_bytes()
        assert serving.tracker is not None
        serving.tracker.close()
        assert [client.ask(command, 1 << 20, 512) for command in (WRITE, ZERO, TRIM)] == [errno.EIO] * 3
        assert disk.read_bytes() == before
    assert granules(mapped(NODE, "b0")) == {0}


def test_a_disk_of_another_size_is_refused(disk: Path, tmp_path: Path) -> None:
    with (
        dm.open("node:drive0") as image,
        image.track(),
        nbdkit(image, tmp_path, "offset", "range=32M") as sock,
        pytest.raises((ConnectionRefusedError, ConnectionResetError)),
    ):
        Client(sock)
    assert f"a disk of {SIZE} bytes is tracked, and this one has {SIZE // 2}" in (tmp_path / "said").read_text()


def test_no_qemu_opens_a_disk_that_is_served(disk: Path, tmp_path: Path) -> None:
    write = ["qemu-io", "-f", "raw", "-c", "write 0 512", str(disk)]
    with served(tmp_path):
        with pytest.raises(qemu.ToolError, match='Failed to get "write" lock'):
            qemu.run(*write)
        assert "tracked by" in error_of("serve", "drive0", "--unix", tmp_path / "other")
    qemu.run(*write)


def test_a_disk_that_qemu_has_open_is_not_served(disk: Path, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    qemu.run("qemu-nbd", "-f", "raw", "-k", str(tmp_path / "q"), "--fork", f"--pid-file={pid}", str(disk))
    try:
        assert "held by qemu-nbd" in error_of("serve", "drive0", "--run", "true", "--wait", "0")
    finally:
        os.kill(int(pid.read_text()), signal.SIGTERM)
    assert json_of("track", "status", "drive0")["tracked"] is False


def test_its_tracker_is_asked(disk: Path, tmp_path: Path) -> None:
    started = Started(tmp_path)
    with Client(started.sock) as client:
        dirtmap("checkpoint", "add", "drive0", "noon")
        client.ask(WRITE, 0, 1)
        dirtmap("checkpoint", "add", "drive0", "evening")
        client.ask(WRITE, GRANULE, 1)
        assert granules(mapped(NODE, "noon")) == {0}
        dirtmap("track", "stop", "drive0")
    assert started.wait() == 0
    assert granules(mapped(NODE, "evening")) == {1}


def test_a_device_on_a_block_device_over_tcp(tmp_path: Path) -> None:
    """On loopback, and what is not needs TLS."""
    (tmp_path / "content").write_bytes(bytes(SIZE))
    with volumes.loops(), volumes.attached(tmp_path / "content") as path:
        dirtmap("store", "create", tmp_path / "default.dmap")
        dirtmap("node", "add", "root", path)
        dirtmap("add", "root", "b0")
        dirtmap("device", "add", "d", "--root", "root")
        dirtmap("add", "d", "mine")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = f'qemu-io -f raw -c "write 0 1" "$uri" && test "$port" = {port}'
        dirtmap("serve", "d", "--port", port, "--run", command)
        assert [granules(mapped(Path(name), bitmap)) for name, bitmap in (("root", "b0"), ("d", "mine"))] == [{0}, {0}]
        assert "needs TLS" in error_of("serve", "d", "--bind", "0.0.0.0", "--port", port)


def test_tls(disk: Path, tmp_path: Path) -> None:
    folder = certificates_in(tmp_path / "tls")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    secure = f'nbdinfo --size "$uri?tls-certificates={folder}"'
    command = f"{secure} && ! nbdinfo --size nbd://127.0.0.1:{port} 2>/dev/null"
    dirtmap("serve", "drive0", "--port", port, "--tls", folder, "--run", command)


def test_qcow2_is_refused_with_the_reason(tmp_path: Path) -> None:
    image = tmp_path / "q.qcow2"
    qemu.create(image, SIZE)
    what = f"{image}: a qcow2 image, whose bitmaps QEMU keeps by itself: qemu-nbd serves it"
    assert error_of("serve", image, "--unix", tmp_path / "sock") == what


def test_usage() -> None:
    assert "Where to listen?" in error_of("serve", "drive0")
    assert "is there already" in error_of("serve", "drive0", "--unix", "s", "--adopt")
    assert "exclude each other" in error_of("serve", "drive0", "--unix", "s", "--port", "10809")
    assert "--bind goes with --port" in error_of("serve", "drive0", "--unix", "s", "--bind", "127.0.0.2")
    assert dirtmap("serve", "--filter-path").out == f"{built_filter()}\n"


def test_where_it_cannot_listen_is_said_before_anything_begins(disk: Path, tmp_path: Path) -> None:
    """In one line that names what is wrong; nbdkit's and QEMU's own would not."""
    long = tmp_path / ("x" * 108)
    tls = certificates_in(tmp_path / "tls")
    (tls / "server-key.pem").unlink()
    for command in ("serve", "export"):
        what = f"{long}: has {len(os.fsencode(long))} bytes, and the path of a Unix socket 107 at most"
        assert error_of(command, "drive0", "--unix", long) == what
        for folder, missing in ((tmp_path / "none", "ca-cert.pem"), (tls, "server-key.pem")):
            error = error_of(command, "drive0", "--port", 10809, "--tls", folder)
            assert error == f"{folder / missing}: No such file or directory"
        there = tmp_path / "none" / "sock"
        assert error_of(command, "drive0", "--unix", there) == f"{there}: No such file or directory"
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            error = error_of(command, "drive0", "--port", port)
            assert error == f"127.0.0.1:{port}: Address already in use"
        error = error_of(command, "drive0", "--bind", "0.0.0.0", "--port", 10809)
        assert error == "bind: other machines reach 0.0.0.0, and anybody there could open the disk; that needs TLS"
    with dm.open("node:drive0") as image:
        assert image.tracking() is None


def test_a_socket_whose_path_is_as_long_as_it_may_be(disk: Path, tmp_path: Path) -> None:
    sock = tmp_path / ("x" * (107 - len(os.fsencode(tmp_path)) - 1))
    for command in ("serve", "export"):
        dirtmap(command, "drive0", "--unix", sock, "--run", 'nbdinfo --size "$uri"')


def test_a_socket_whose_path_is_no_utf_8(disk: Path, tmp_path: Path) -> None:
    """nbdkit takes any; QEMU, which `export` has, does not."""
    sock = os.fsdecode(bytes(tmp_path) + b"/\xff")
    dirtmap("serve", "drive0", "--unix", sock, "--run", 'test -S "$unixsocket" && nbdinfo --size "$uri"')
    assert "not UTF-8, as qemu-storage-daemon needs its paths" in error_of("export", "drive0", "--unix", sock)


def test_nothing_to_adopt(disk: Path, tmp_path: Path) -> None:
    error = error_of("serve", "drive0", "--adopt")
    assert error.endswith("no nbdkit that can be seen here serves it; 'dirtmap serve' begins anew")
    with served(tmp_path):
        assert "there is nothing to adopt" in error_of("serve", "drive0", "--adopt")


def test_read_only(disk: Path, tmp_path: Path) -> None:
    command = f'qemu-io -r -f raw -c "read 0 512" "$uri" && ! qemu-io -f raw -c "write 0 512" {disk} 2>/dev/null'
    dirtmap("serve", "drive0", "--read-only", "--run", f'{command} && ! qemu-io -f raw -c "write 0 1" "$uri" 2>&1')


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(disk: Path, tmp_path: Path, number: signal.Signals) -> None:
    started = Started(tmp_path, "--output=json")
    assert json.loads(started.ready)["uri"] == uri_of(started.sock)
    assert int((tmp_path / "pid").read_text()) == started.process.pid
    with Client(started.sock) as client:
        assert client.ask(WRITE, 0, 1) == 0
        assert started.end(number) == 0
    assert not (tmp_path / "pid").exists()
    assert not started.sock.exists()
    status = json_of("track", "status", "drive0")
    assert status["tracked"] is False
    assert "live" not in status
    assert granules(mapped(NODE, "b0")) == {0}


def test_the_command_s_status(disk: Path) -> None:
    assert dirtmap("serve", "drive0", "--run", 'test -S "$unixsocket" && exit 3', status=3).error == ""
    assert "nbdkit: was killed by signal 9" in error_of("serve", "drive0", "--run", f"{_KILL}; sleep 0.3")


_KILL = 'kill -9 $(pgrep -f "nbdkit.*$DIRTMAP_LIVE")'


def kill_some(folder: Path, seed: int) -> None:
    """Serves, writes, kills, recovers: what is dirty is all that was acknowledged, and nothing nobody asked for."""
    chance = random.Random(seed)
    dirtmap("clear", "drive0", "b0")
    started = Started(folder)
    clients = [write_until_it_ends(started.sock, SIZE, seed * 2 + number) for number in range(2)]
    time.sleep(chance.random() * 0.3)
    tracker, nbdkit, adopted = [(1, 0, 0), (0, 1, 0), (1, 1, 0), (1, 0, 1)][seed % 4]
    started.kill(tracker=bool(tracker), nbdkit=bool(nbdkit))
    if adopted:
        other = Started(folder, "--adopt")
    if not nbdkit:  # which goes on without it
        before = len(clients[0][0].acknowledged)
        while len(clients[0][0].acknowledged) < before + 20:
            time.sleep(0.001)
    if adopted:
        assert other.end() == 0
    elif not nbdkit:
        started.kill(tracker=False, nbdkit=True)
    for _, thread in clients:
        thread.join(60)
        assert not thread.is_alive()
    assert started.wait() == (-signal.SIGKILL if tracker else 1)
    with dm.open("node:drive0") as image:
        image.recover_session()
        assert image.doubt() is None
    found = granules(mapped(NODE, "b0"))
    acknowledged = granules([each for client, _ in clients for each in client.acknowledged])
    submitted = granules([each for client, _ in clients for each in client.submitted])
    assert acknowledged - found == set()
    assert found - submitted == set()
    assert {error for client, _ in clients for _, _, error in client.refused} <= {errno.ESHUTDOWN}  # when it ends


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_lost_whoever_is_killed(disk: Path, tmp_path: Path, seed: int) -> None:
    kill_some(tmp_path, seed)


def test_nbdkit_gives_signs_of_life_while_there_is_no_tracker(disk: Path, tmp_path: Path) -> None:
    started = Started(tmp_path)
    started.kill(tracker=True, nbdkit=False)
    died = time.time_ns()
    wait_for_beat(tmp_path / "default.dmap", SIZE, died)
    with dm.open("node:drive0") as image:
        status = image.tracking()
        assert status is not None
        assert status.seen is not None
        assert status.seen * 1e9 > died
    ended = f"node 'drive0' is tracked by a process that has ended ({started.process.pid} while it ran)"
    assert ended in dirtmap("list", "drive0").error
    for command in (("add", "drive0", "x"), ("node", "rename", "drive0", "x"), ("track", "stop", "drive0")):
        what = (
            "its tracker has died, and others mark; 'dirtmap serve --adopt TARGET' takes it over where nbdkit marks, "
        )
        what += "else Handle.track does"
        assert error_of(*command).endswith(f"node 'drive0': {what}")
    started.kill(tracker=False, nbdkit=True)
    started.wait()


@pytest.mark.long
def test_nothing_is_lost_in_many_deaths(disk: Path, tmp_path: Path) -> None:
    for seed in range(500):
        kill_some(tmp_path, seed)
