"""`dirtmap export` serves what `dirtmap map` prints, refuses what is not known, and lets go however it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from support.cli import dirtmap, error_of, json_of
from support.exported import by_nbdinfo, by_qemu_img, clipped, contexts, ended, exporting, is_running, mapped
from support.hostless import ALONE
from support.qemu import StorageDaemon, create, extents
from support.tracking import make_node

import dirtmap.engine as dm
from dirtmap.engine.tracking.home import Home
from dirtmap.fmt.spelling import escaped
from dirtmap.tools.export import Listener, carrier, export
from dirtmap.tools.qsd import nodes
from dirtmap.tools.qsd.daemon import Daemon

MIB, TIB = 1 << 20, 1 << 40


def mark(target: str | Path, name: str, *ranges: tuple[int, int], granularity: int = 65536) -> None:
    """Makes those ranges dirty, in a bitmap that is made where it is missing."""
    with dm.open(target) as image, image.transaction() as bitmaps:
        bitmap = bitmaps[name] if name in bitmaps else dm.Bitmap(image.size, granularity)
        for offset, length in ranges:
            bitmap.mark(offset, length)
        bitmaps[name] = bitmap


def saved(path: Path, command: str) -> str:
    """A command for --run that leaves its output in a file."""
    return f"{command} >{path}"


@pytest.fixture
def drive0(tmp_path: Path) -> str:
    """A raw disk of 1 MiB with a bitmap ``b0``, half of it dirty."""
    make_node(tmp_path, MIB)
    mark("drive0", "b0", (0, MIB // 2))
    return "drive0"


def busy(target: str | Path) -> list[str]:
    """The bitmaps of a target that are held."""
    return [bitmap["name"] for bitmap in json_of("list", target)[0]["bitmaps"] if bitmap["busy"]]


def test_maps_are_those_of_dirtmap_map(tmp_path: Path) -> None:
    """Of disks of any size, raw and qcow2, all in one daemon."""
    odd, large = 1_000_001, 8 * TIB + 12345
    for name, size in (("odd", odd), ("empty", 0), ("large", large)):
        make_node(tmp_path, size, name)
    mark("odd", "fine", (700, 1), (5000, 3000), (odd - 1, 1), granularity=512)
    mark("odd", "clean at the end, \N{SNOWMAN}", (0, 1), granularity=4096)
    mark("odd", "no UTF-8: \udcff", (MIB // 2, 1))
    mark("large", "b0", (0, 1), (4 * TIB - 1, 6 << 32), (large - 1, 1))
    image, named = tmp_path / "d.qcow2", tmp_path / "named.qcow2"
    create(image, 3 * MIB + 512, "cluster_size=512")
    create(named, MIB)
    dirtmap("node", "add", "system", named)
    for target in (image, named):
        mark(target, "b0", (MIB // 3, 1), granularity=4096)
    targets = {"odd": odd, "empty": 0, "large": large, image: 3 * MIB + 512, "system": MIB}
    with (
        dm.Host() as host,
        export(host, [str(target) for target in targets], Listener(unix=str(tmp_path / "sock"))) as served,
    ):
        assert [each.name for each in served.exports] == ["odd", "empty", "large", "d.qcow2", "system"]
        assert [each.size for each in served.exports] == list(targets.values())
        for (target, size), each in zip(targets.items(), served.exports, strict=True):
            with dm.open(target) as opened:
                assert [escaped(name) for name in opened] == list(each.bitmaps) == contexts(each.uri)
            for name in each.bitmaps:
                expected = mapped(target, name)
                assert clipped(by_nbdinfo(each.uri, name), size) == expected
                assert clipped(by_qemu_img(each.uri, name), size) == expected
        assert busy("odd") == ["b0", "fine", "clean at the end, \N{SNOWMAN}", "no UTF-8: \\xff"]
        assert busy("system") == ["b0"]
        with pytest.raises(dm.LockedError), dm.Host(wait=0).transaction([image]):
            pass
    assert not busy("odd") + busy("system")
    assert not (tmp_path / "sock").exists()


def test_a_smaller_carrier_would_tell_its_tail_clean(drive0: str, tmp_path: Path) -> None:
    """The trap, as QEMU has it; and that no such carrier is made, or served."""
    small, disk = tmp_path / "small.qcow2", str(tmp_path / "drive0.raw")
    bitmap = dm.Bitmap(MIB)
    bitmap.mark(0, MIB)
    listener = Listener(unix=str(tmp_path / "sock"))
    with dm.Host() as host:
        carrier.make_carrier(str(small), MIB // 2)
        with pytest.raises(dm.BitmapError, match="would be told clean"):
            carrier.put_into_carrier(host, str(small), {"b0": bitmap})
        half = dm.Bitmap(MIB // 2)
        half.mark(0, MIB // 2)
        carrier.put_into_carrier(host, str(small), {"b0": half})
        with Daemon() as daemon:
            size = daemon.open(disk, "disk", nodes.image(disk, "raw"))
            there = daemon.open(str(small), "bitmaps", nodes.image(str(small), "qcow2"))
            daemon.listen(listener)
            daemon.add_export("d", "disk", [("bitmaps", "b0")])
            assert by_nbdinfo(listener.uri("d"), "b0") == [(0, MIB // 2)]  # and all of the disk is dirty
        assert (size, there) == (MIB, MIB // 2)
        with pytest.raises(dm.StorageError, match="would be told clean"):
            carrier.require_sizes("d", MIB, size, there)
    assert carrier.carrier_size(MIB + 1) == MIB + 512


def test_a_disk_of_another_size_is_not_served(drive0: str, tmp_path: Path) -> None:
    larger = tmp_path / "larger"
    larger.touch()
    os.truncate(larger, MIB + 512)
    said = error_of("export", drive0, "--source", larger, "--run", "false")
    assert said == f"{larger}: has {MIB + 512} bytes, and the bitmaps are of a disk of {MIB}"
    os.truncate(tmp_path / "drive0.raw", 2 * MIB)
    assert "'node resize' adopts the new size" in error_of("export", drive0, "--bitmap", "b0", "--run", "false")


def test_a_bitmap_with_more_bits_than_qemu_has_loses_none() -> None:
    bitmap = dm.Bitmap(MIB, 512)
    bitmap.mark(513, 1)
    bitmap.mark(MIB - 1, 1)
    fitted = carrier._fitted(bitmap, MIB, 2048 // 8 // 4)
    assert fitted == dm.Bitmap.from_extents(MIB, [0, MIB - 2048], [2048, 2048], 2048, recording=False)


def test_bitmaps_that_cannot_be_used(tmp_path: Path) -> None:
    image = tmp_path / "d.qcow2"
    create(image, MIB)
    with StorageDaemon(image) as daemon:
        said = error_of("export", image, "--run", "false")
        assert said.endswith(f"(process {daemon.pid}); --source serves a frozen copy, --live insists")
        daemon.add("left in use")
        daemon.quit()
    with StorageDaemon(image):
        pass  # killed
    mark(image, "b0", (0, 1))
    found = tmp_path / "found"
    done = dirtmap("export", image, "--run", saved(found, 'nbdinfo --list "$uri"'))
    assert done.error == f"dirtmap: {image}: 'left in use' is left out: inconsistent; recover or remove it\n"
    assert "qemu:dirty-bitmap:b0" in found.read_text()
    assert "left in use" not in found.read_text()
    assert "'left in use': inconsistent" in error_of("export", image, "--bitmap", "left in use", "--run", "false")
    assert "'none': there is no such bitmap" in error_of("export", image, "--bitmap", "none", "--run", "false")


def test_what_changed_since_a_checkpoint(tmp_path: Path) -> None:
    make_node(tmp_path, MIB)
    with dm.open("drive0") as image, image.track() as tracker:
        for number, name in enumerate(("one", "two", "three")):
            tracker.checkpoint(name, 65536 >> number)
            tracker.mark(number * 100_000, 1)
        expected = tracker.changed_since("two")
    with dm.Host() as host:
        listener = Listener(unix=str(tmp_path / "sock"))
        with export(host, ["drive0"], listener, bitmaps=["b0"], since="two") as served:
            (each,) = served.exports
            assert each.bitmaps == ("b0", "since-two")
            assert by_nbdinfo(each.uri, "since-two") == extents(expected)
            assert busy("drive0") == ["b0", "two", "three"]
    mark("drive0", "since-two", (0, 1))
    said = error_of("export", "drive0", "--since", "two", "--run", "false")
    assert "'since-two': two bitmaps would be served by this name" in said
    assert "'b0': there is no such checkpoint" in error_of("export", "drive0", "--since", "b0", "--run", "false")
    with Home(ALONE, str(tmp_path / "default.dmap"), b"drive0").change(None) as home:
        home.entries.pop("three")  # by software that knows no checkpoints
    said = error_of("export", "drive0", "--since", "two", "--run", "false")
    assert "'two': not all that was written since is known" in said


def test_a_disk_that_is_being_written(drive0: str, tmp_path: Path) -> None:
    disk, found = tmp_path / "drive0.raw", tmp_path / "found"
    frozen = tmp_path / "frozen"
    frozen.write_bytes(disk.read_bytes())
    command = saved(found, 'nbdinfo --map=qemu:dirty-bitmap:b0 "$uri"')
    with dm.open(drive0) as image, image.track() as tracker:
        assert "its disk is being written: tracked by" in error_of("export", drive0, "--run", command)
        tracker.mark(MIB - 1, 1)
        for how in (("--live",), ("--source", frozen)):
            assert dirtmap("export", drive0, *how, "--run", command).error == ""
            assert "983040       65536    1  dirty" in found.read_text()
    with StorageDaemon(frozen, "driver=raw") as daemon:
        daemon.io("write 0 1")
        said = error_of("export", drive0, "--source", frozen, "--run", command)
        assert f"open for writing by qemu-storage-da (process {daemon.pid})" in said
        assert "--live insists" in said


def test_a_write_by_whoever_takes_no_locks_is_told(drive0: str, tmp_path: Path) -> None:
    found = tmp_path / "found"
    assert "drive0.raw: was written to, changed or replaced" in error_of(
        "export", drive0, "--run", f"echo x | dd of={tmp_path}/drive0.raw conv=notrunc 2>{found}"
    )
    mark(drive0, "b0", (0, 1))
    refused = f"qemu-io -f raw -c 'write 0 1' {tmp_path}/drive0.raw >{found} 2>&1"
    assert dirtmap("export", "-q", drive0, "--run", refused, status=1).error == ""
    assert 'Failed to get "write" lock' in found.read_text()


def test_run_has_the_status_and_the_variables_of_nbdkit(drive0: str, tmp_path: Path) -> None:
    found = tmp_path / "found"
    dirtmap("export", drive0, "--run", saved(found, 'echo "$uri $unixsocket $port"; exit 7;:'), status=7)
    dirtmap("export", drive0, "--run", f'(echo "$uri $unixsocket $port") >{found}; kill -9 $$', status=137)
    uri, path = found.read_text().split()
    assert uri == f"nbd+unix:///drive0?socket={path}"
    assert not Path(path).parent.exists()
    assert busy(drive0) == []
    # Not any other child of the process that runs the tests; and on a busy machine the threads take time to end.
    died = """
        for child in $(cat /proc/$PPID/task/*/children); do
            if [ "$(cat /proc/$child/comm)" = qemu-storage-da ]; then
                kill -9 $child
                while [ "$(cat /proc/$child/task/*/stat 2>/dev/null | cut -d" " -f3 | tr -d "Z\\n")" ]; do :; done
            fi
        done
    """
    assert error_of("export", drive0, "--run", died) == "qemu-storage-daemon: was killed by signal 9"


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(other, marks=pytest.mark.long) for other in (signal.SIGINT, signal.SIGHUP))],
)
def test_signals_end_it_cleanly(drive0: str, tmp_path: Path, number: signal.Signals) -> None:
    path, pid = tmp_path / "sock", tmp_path / "pid"
    with exporting(drive0, "--unix", path, "--pidfile", pid) as process:
        assert pid.read_text() == f"{process.pid}\n"
        assert path.stat().st_mode & 0o777 == 0o700
        assert busy(drive0) == ["b0"]
        with socket.socket(socket.AF_UNIX) as client:  # one that stays
            client.connect(str(path))
            process.send_signal(number)
            assert ended(process) == (0, "")
    assert busy(drive0) == []
    assert not path.exists()
    assert not pid.exists()
    assert not any(map(is_running, process.daemons))


def test_it_ends_when_the_daemon_dies(drive0: str, tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with exporting(drive0, "--unix", path) as process:
        (daemon,) = process.daemons
        os.kill(daemon, signal.SIGKILL)
        assert ended(process) == (1, "dirtmap: qemu-storage-daemon: was killed by signal 9\n")
    assert busy(drive0) == []
    assert not path.exists()


def test_nothing_goes_on_when_it_is_killed(drive0: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anything in the way of the next one, to which the service manager listens."""
    path = tmp_path / "sock"
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where it leaves an empty folder
    with exporting(drive0, "--unix", path) as process:
        process.kill()
        process.wait()
        deadline = time.monotonic() + 60
        while any(map(is_running, process.daemons)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert busy(drive0) == []
    assert path.exists()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with exporting(drive0, "--unix", path) as process:
            assert manager.recv(100) == b"READY=1"
            assert process.ready == [
                {
                    "target": drive0,
                    "export": drive0,
                    "uri": f"nbd+unix:///drive0?socket={path}",
                    "virtual-size": MIB,
                    "bitmaps": ["b0"],
                    "left-out": {},
                    "notes": [],
                }
            ]
            assert f"{path}: exists already" in error_of("export", drive0, "--unix", path)
            process.terminate()
            assert ended(process)[0] == 0
        assert manager.recv(100) == b"STOPPING=1"


def test_a_reserved_path_is_left_to_its_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is there before it, for whom somebody may wait; a living one stays in the end, and a dead one goes."""
    path = tmp_path / "sock"
    bound: list[object] = []

    class Watched(socket.socket):
        def bind(self, address: object) -> None:  # type: ignore[override]
            bound.append(address)
            super().bind(address)  # type: ignore[arg-type]

    server, clients = socket.socket(socket.AF_UNIX), [socket.socket(socket.AF_UNIX) for _ in range(2)]
    monkeypatch.setattr(socket, "socket", Watched)
    with Listener(unix=str(path)).reserved():
        assert len(bound) == 1
        assert str(path) not in bound
        assert not list(tmp_path.iterdir())
        server.bind(str(path))
        server.listen(0)
    assert path.exists()
    for client in clients:  # one more than may wait
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            client.connect(str(path))
    with pytest.raises(dm.StorageError, match="exists already"), Listener(unix=str(path)).reserved():
        pass
    for each in (server, *clients):
        each.close()
    with Listener(unix=str(path)).reserved():
        assert not path.exists()
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    assert not path.exists()


def test_ipv4_and_ipv6_have_a_port_each(tmp_path: Path) -> None:
    for name in ("ca-cert.pem", "server-cert.pem", "server-key.pem"):
        (tmp_path / name).touch()
    with socket.create_server(("0.0.0.0", 0)) as other:
        port = other.getsockname()[1]
        with Listener(port=port, bind="::", tls=str(tmp_path)).reserved():
            pass
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as other:
        port = other.getsockname()[1]
        error = f"[::1]:{port}: Address already in use"
        with pytest.raises(dm.StorageError) as found, Listener(port=port, bind="::1").reserved():
            pass
        assert str(found.value) == error


def test_where_it_listens(tmp_path: Path) -> None:
    assert Listener(unix="/a b?/s").uri("c/d &") == "nbd+unix:///c%2Fd%20%26?socket=/a%20b%3F/s"
    assert Listener(port=10809).uri("d") == "nbd://127.0.0.1:10809/d"
    assert Listener(port=1, bind="::1").uri("d") == "nbd://[::1]:1/d"
    assert Listener(port=1, bind="0.0.0.0", tls="/x").uri("d") == "nbds://0.0.0.0:1/d"
    there = tmp_path / "there"
    there.write_text("precious")
    make_node(tmp_path, MIB)
    for arguments, what in (
        ((), "Where to listen?"),
        (("--port", 1, "--unix", "s"), "exclude each other"),
        (("--port", 1, "--bind", "0.0.0.0"), "anybody there could open the disk"),
        (("--unix", "s", "--bind", "::1"), "--bind goes with --port"),
        (("--port", 1, "--bind", "host"), "'host' is no IP address"),
        (("--port", 1, "--live", "--source", "s"), "goes with no frozen source"),
        (("--port", 1, "--source", tmp_path / "drive0.raw"), "is the disk itself, and no frozen copy"),
        (("--port", 1, "--source", "s", "--source", "s"), "2 given, and 1 targets"),
        (("--unix", there), "exists already"),
    ):
        assert what in error_of("export", "drive0", *arguments)
    assert there.read_text() == "precious"
    assert error_of("export", "drive0", "node:drive0", "--run", "false") == "node:drive0: is named twice"
    folders = [tmp_path / name / "disk.qcow2" for name in ("one", "two")]
    for path in folders:
        path.parent.mkdir()
        create(path, 1 << 20)
    assert error_of("export", folders[0], folders[0], "--run", "false") == f"{folders[0]}: is named twice"
    error = error_of("export", *folders, "--run", "false")
    assert error == f"{folders[1]}: its export would be called 'disk.qcow2', as that of {folders[0]}"
