"""Any backup is served over NBD, and read by QEMU and by a kernel's file system."""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.backups import SIZE, back_up, make_nights, raw_disk, write_raw
from support.cli import COMMAND, dirtmap, error_of
from support.qemu import ToolError, qemu_img, run
from support.volumes import attached, loops, make, mounted

import dirtmap.engine as dm
from dirtmap.tools.backup import Listener, mount, prune


@contextmanager
def served(*arguments: str | Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`dirtmap backup mount`, and the URI that it prints."""
    command = [COMMAND, "backup", "mount", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            ready, uri = process.stdout.readline().split()
            assert ready == "ready:"
            yield process, uri
        finally:
            process.kill()


def test_each_night_is_served(tmp_path: Path) -> None:
    repository, contents = make_nights(tmp_path)
    rounded = contents[1] + bytes(-len(contents[1]) % 512)
    path = tmp_path / "socket"
    with served("--at=2", "--unix", path, repository, "data") as (process, uri):
        (tmp_path / "expected").write_bytes(rounded)
        prune(repository, 1)  # what is served stays
        qemu_img("compare", "-q", "-f", "raw", "-F", "raw", tmp_path / "expected", uri)
        assert "is_read_only: true" in run("nbdinfo", uri)
        assert not path.stat().st_mode & 0o077
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert not path.exists()
    with mount(repository, "data", Listener(unix=str(path))) as mounted_:
        (tmp_path / "expected").write_bytes(contents[3])
        qemu_img("compare", "-q", "-f", "raw", "-F", "raw", tmp_path / "expected", mounted_.uri)
        assert mounted_.backup.number == 4


def test_what_cannot_be_served(tmp_path: Path) -> None:
    raw_disk(tmp_path / "data.raw")
    back_up(tmp_path / "repo", "data")
    path = tmp_path / "socket"
    path.touch()
    assert "exists already" in error_of("backup", "mount", "--unix", path, tmp_path / "repo", "data")
    assert path.exists()
    assert error_of("backup", "mount", "--at=2", "--run=true", tmp_path / "repo", "data")
    assert "Where to listen?" in error_of("backup", "mount", tmp_path / "repo", "data")
    assert "needs TLS" in error_of("backup", "mount", "--port=10809", "--bind=192.0.2.1", tmp_path / "repo", "data")


def test_while_a_command_runs(tmp_path: Path) -> None:
    raw_disk(tmp_path / "data.raw", SIZE)
    back_up(tmp_path / "repo", "data")
    pidfile, copy = tmp_path / "pid", tmp_path / "copy.raw"
    script = f'test -s {pidfile} && test -S "$unixsocket" && qemu-img convert -O raw "$uri" {copy}'
    dirtmap("backup", "mount", "--run", script, "--pidfile", pidfile, tmp_path / "repo", "data")
    assert copy.read_bytes() == (tmp_path / "data.raw").read_bytes()
    assert not pidfile.exists()
    dirtmap("backup", "mount", "--run=exit 7", tmp_path / "repo", "data", status=7)


def test_a_socket_that_nobody_listens_at_is_replaced(tmp_path: Path) -> None:
    raw_disk(tmp_path / "data.raw", SIZE)
    back_up(tmp_path / "repo", "data")
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with served("--unix", path, tmp_path / "repo", "data") as (_, uri):
        assert run("nbdinfo", "--size", uri).strip() == str(SIZE)


def test_the_server_ends_with_its_command(tmp_path: Path) -> None:
    raw_disk(tmp_path / "data.raw")
    back_up(tmp_path / "repo", "data")
    with served("--unix", tmp_path / "socket", tmp_path / "repo", "data") as (process, uri):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        process.wait(30)
        assert len(children) == 1
        for _ in range(1000):
            try:
                run("nbdinfo", "--size", uri)
            except ToolError:
                return
        raise AssertionError("it goes on")


@pytest.mark.long
def test_files_of_any_night_are_read(tmp_path: Path) -> None:
    """A real ext4, written night by night, and read from what is mounted."""
    with loops():
        image = make("ext4", tmp_path / "data.raw")
        with dm.Host() as host:
            host.add_node("data", str(image))
        repository = tmp_path / "repo"
        for night in range(3):
            before = image.read_bytes()
            changed = copied(image, tmp_path / "work")
            with attached(changed) as device, mounted(device, tmp_path / "mnt") as folder:
                (folder / f"night-{night}").write_text(f"{night}" * 5000)
            after = changed.read_bytes()
            step = 4096
            write_raw(
                image,
                {
                    at: after[at : at + step]
                    for at in range(0, len(after), step)
                    if after[at : at + step] != before[at : at + step]
                },
            )
            assert back_up(repository, "data").number == night + 1
        for night in range(3):
            dirtmap("backup", "restore", "-q", f"--at={night + 1}", repository, "data", tmp_path / f"{night}")
            with mount(repository, "data", Listener(unix=str(tmp_path / "socket")), at=str(night + 1)) as there:
                qemu_img("convert", "-f", "raw", "-O", "raw", there.uri, tmp_path / "copy")
            assert (tmp_path / "copy").read_bytes() == (tmp_path / f"{night}").read_bytes()
            with attached(tmp_path / "copy") as device, mounted(device, tmp_path / "mnt", "-o", "ro") as folder:
                found = sorted(path.name for path in folder.glob("night-*"))
                assert found == [f"night-{number}" for number in range(night + 1)]
                assert (folder / f"night-{night}").read_text() == f"{night}" * 5000


def copied(source: Path, target: Path) -> Path:
    target.write_bytes(source.read_bytes())
    return target
