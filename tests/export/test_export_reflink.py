"""`dirtmap export --reflink`: disks that are being written are cloned at the instant of their bitmaps."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from support import frozen
from support.cli import dirtmap, error_of, json_of
from support.exported import by_nbdinfo, ended, exporting, is_running, mapped
from support.frozen import SLOT, Served, Writer, last_write, slot_of
from support.nbd import WRITE, Client
from support.qemu import create, run
from support.tracking import make_node

import dirtmap.engine as dm

MIB, GRANULE = 1 << 20, 65536
SLOTS = 256


xfs = frozen.xfs


def read(uri: str, folder: Path) -> bytes:
    out = folder / "out"
    run("nbdcopy", uri, str(out))
    return out.read_bytes()


def busy(target: str) -> list[str]:
    return [bitmap["name"] for bitmap in json_of("list", target)[0]["bitmaps"] if bitmap["busy"]]


def test_clones_and_bitmaps_of_several_disks_are_of_one_instant(xfs: Path, tmp_path: Path) -> None:
    """One client writes to both in turn. Nothing is flushed: what is cloned is in the page cache alone."""
    targets = [Served(xfs, name, MIB) for name in ("drive0", "drive1")]
    with targets[0], targets[1], Writer([each.sock for each in targets], SLOTS) as writer:
        dirtmap("checkpoint", "add", "drive0", "drive1", "noon")
        noon = writer.submitted
        dirtmap("add", "drive0", "off", "--disabled")
        before = writer.acknowledged
        arguments = ["--reflink", "--since", "noon", "--unix", tmp_path / "sock"]
        with exporting("drive0", "drive1", *arguments) as server:
            after = writer.submitted
            first, second = (each["uri"] for each in server.ready)
            found = [last_write(read(uri, tmp_path), SLOTS) for uri in (first, second)]
            assert before <= found[1] <= found[0] <= after
            assert found[0] - found[1] <= 1
            while writer.submitted < after + 20:
                time.sleep(0.001)
            assert [last_write(read(uri, tmp_path), SLOTS) for uri in (first, second)] == found
            for uri, last in zip((first, second), found, strict=True):
                extents = by_nbdinfo(uri, "since-noon")
                dirty = {at // GRANULE for start, length in extents for at in range(start, start + length, GRANULE)}
                assert {slot_of(at, SLOTS) * SLOT // GRANULE for at in range(noon + 1, last + 1)} <= dirty
            assert busy("drive0") == ["b0", "noon", "off"]
            assert "busy" in error_of("clear", "drive0", "b0")
            assert "busy" in error_of("remove", "drive0", "off")
            assert server.ready[0]["notes"] == []
            server.terminate()
            assert ended(server) == (0, "")
        assert busy("drive0") == []
        dirtmap("remove", "drive0", "off")


def test_the_bitmap_has_no_later_write(xfs: Path, tmp_path: Path) -> None:
    with Served(xfs, "drive0", MIB) as target, Client(target.sock) as client:
        assert client.ask(WRITE, 0, 1) == 0
        with exporting("drive0", "--reflink", "--unix", tmp_path / "sock") as server:
            uri = server.ready[0]["uri"]
            for granule in (0, 3):
                assert client.ask(WRITE, granule * GRANULE, 2) == 0
            assert by_nbdinfo(uri, "b0") == [(0, GRANULE)]
            assert read(uri, tmp_path)[:2] == b"\xa5\0"
            assert mapped("drive0", "b0") == [(0, GRANULE), (3 * GRANULE, GRANULE)]


def free(where: Path) -> int:
    found = os.statvfs(where)
    return found.f_bfree * found.f_frsize


def test_nothing_is_left_of_a_clone_whoever_is_killed(xfs: Path, tmp_path: Path) -> None:
    with Served(xfs, "drive0", 16 * MIB) as target, Client(target.sock) as client:
        for at in range(16):
            client.ask(WRITE, at * MIB, MIB)
        os.sync()
        before, names = free(xfs), sorted(os.listdir(xfs))
        with exporting("drive0", "--reflink", "--unix", tmp_path / "sock") as server:
            for at in range(16):
                client.ask(WRITE, at * MIB, MIB)
            os.sync()
            assert free(xfs) < before - 12 * MIB  # both are there
            assert sorted(os.listdir(xfs)) == names
            server.send_signal(signal.SIGKILL)
            server.wait()
            deadline = time.monotonic() + 60
            while any(map(is_running, server.daemons)) or free(xfs) < before - 4 * MIB:
                assert time.monotonic() < deadline
                os.sync()
                time.sleep(0.01)
        assert busy("drive0") == []


def test_a_file_that_cannot_be_cloned(tmp_path: Path) -> None:
    """It says what else there is, and nothing is held."""
    make_node(tmp_path, MIB)
    with dm.open("node:drive0") as image, image.track():
        what = error_of("export", "drive0", "--reflink", "--run", "true")
        assert what.startswith(f"{tmp_path / 'drive0.raw'}: cannot be cloned")
        assert what.endswith("--source serves a frozen copy, --live insists")
        assert "--reflink serves a clone" in error_of("export", "drive0", "--run", "true")
        assert busy("drive0") == []
        assert "neither --source nor --live" in error_of("export", "drive0", "--reflink", "--live", "--run", "true")


def test_a_qcow2_image_is_not_cloned(tmp_path: Path) -> None:
    create(tmp_path / "d.qcow2", MIB)
    dirtmap("store", "create", tmp_path / "default.dmap")
    dirtmap("node", "add", "system", tmp_path / "d.qcow2")
    with dm.open("system") as image, image.track():
        assert "a qcow2 image" in error_of("export", "system", "--reflink", "--run", "true")


def test_a_disk_that_nobody_writes_is_kept_offline(tmp_path: Path) -> None:
    make_node(tmp_path, MIB)
    command = f"! qemu-io -f raw -c 'write 0 1' {tmp_path / 'drive0.raw'} 2>/dev/null"
    dirtmap("export", "drive0", "--reflink", "--run", command)


def test_another_file_at_the_disk_s_path_is_not_cloned(xfs: Path, tmp_path: Path) -> None:
    with Served(xfs, "drive0", MIB) as target:
        target.path.rename(xfs / "moved")
        subprocess.run(["cp", xfs / "moved", target.path], check=True)
        assert "is not what its tracker tracks" in error_of("export", "drive0", "--reflink", "--run", "true")
        assert busy("drive0") == []
        target.path.unlink()
        (xfs / "moved").rename(target.path)
        dirtmap("export", "drive0", "--reflink", "--run", "true")
