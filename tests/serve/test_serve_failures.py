"""`dirtmap serve` where space or a disk fails: the client is told, and nothing is written that is not marked."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from support import server, volumes
from support.cli import dirtmap, error_of, mapped
from support.nbd import TRIM, WRITE, ZERO, Client
from support.server import SIZE, Started, granules, nbdkit, served
from support.tracking import GRANULE, make_node

import dirtmap.engine as dm
from dirtmap.tools.cli import main

nothing_goes_on = server.nothing_goes_on

NODE = Path("drive0")
REGION = 1 << 20  # of a disk as small as this
NO_SPACE = "No space left on device"


@contextmanager
def full(folder: Path) -> Iterator[None]:
    """Leaves no space in the file system of a folder."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for step in (1 << 20, 4096, 1):
            written = step
            while written:
                with contextlib.suppress(OSError):
                    written = 0
                    written = file.write(bytes(step))
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def volume(kind: str, folder: Path) -> Iterator[Path]:
    """A small file system of its own."""
    with volumes.loops(), ExitStack() as stack:
        device = stack.enter_context(volumes.attached(volumes.make(kind, folder / "volume")))
        yield stack.enter_context(volumes.mounted(device, folder / "mount"))


def make_apart(disk: Path, store: Path) -> None:
    """A disk, and its bitmap in a store elsewhere. The intent log will be beside the store."""
    disk.touch()
    os.truncate(disk, SIZE)
    dirtmap("store", "create", store)
    dirtmap("node", "add", "drive0", disk)
    dirtmap("add", "drive0", "b0")


def written(disk: Path) -> set[int]:
    """The granules that are not zero any more."""
    return set(np.flatnonzero(np.fromfile(disk, np.uint8).reshape(-1, GRANULE).any(axis=1)).tolist())


def ask_at(client: Client, numbers: Iterable[int]) -> list[int]:
    """Writes a byte to each of these granules; the errors."""
    return [client.ask(WRITE, number * GRANULE, 1) for number in numbers]


# No space


@pytest.mark.parametrize("kind", ["ext4", "btrfs"])
def test_no_space_for_the_log_and_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A log needs no more space than it has, but where a file system writes elsewhere: there it is an error."""
    disk, per_region = tmp_path / "drive0.raw", REGION // GRANULE
    with volume(kind, tmp_path) as mount:
        monkeypatch.setenv("DIRTMAP_STORE", str(mount / "default.dmap"))
        make_apart(disk, mount / "default.dmap")
        with served(tmp_path) as (_, sock), Client(sock) as client:
            assert ask_at(client, [0]) == [0]
            with full(mount):
                errors = ask_at(client, range(per_region, 10 * per_region, per_region))
                assert NO_SPACE in error_of("track", "save", "drive0")
                assert NO_SPACE in error_of("checkpoint", "add", "drive0", "noon")
                errors += ask_at(client, [1])
                assert written(disk) <= granules(client.acknowledged) == granules(mapped(NODE, "b0"))
            assert ask_at(client, range(32 * per_region, 64 * per_region, per_region)) == [0] * 32
            dirtmap("track", "save", "drive0")
            dirtmap("checkpoint", "add", "drive0", "noon")
            assert ask_at(client, [2]) == [0]
        assert set(errors) <= ({0} if kind == "ext4" else {0, errno.ENOSPC})
        assert errno.ENOSPC in errors or kind == "ext4"
        assert granules(mapped(NODE, "b0")) == granules(client.acknowledged) == written(disk)
        assert granules(mapped(NODE, "noon")) == {2}


def test_no_space_for_the_data(tmp_path: Path) -> None:
    with volume("ext4", tmp_path) as mount:
        make_apart(mount / "drive0.raw", tmp_path / "default.dmap")
        with served(tmp_path) as (_, sock), Client(sock) as client:
            with full(mount):
                errors = ask_at(client, range(0, 64, 8))
            assert set(errors) <= {0, errno.ENOSPC}
            assert errno.ENOSPC in errors
            assert granules(mapped(NODE, "b0")) == granules(client.submitted)
            assert ask_at(client, range(4, 64, 8)) == [0] * 8
        assert granules(mapped(NODE, "b0")) == granules(client.submitted)
        assert written(mount / "drive0.raw") <= granules(client.submitted)


def test_no_space_for_live_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut that gets no buffer is an error, and clients go on; tracking that gets none does not begin."""
    make_node(tmp_path, SIZE)
    live = tmp_path / "live"
    monkeypatch.setenv("DIRTMAP_LIVE", str(live))
    with volumes.tmpfs(live, "3m"):
        with full(live):
            assert NO_SPACE in error_of("serve", "drive0", "--run", "true")
        with served(tmp_path) as (_, sock), Client(sock) as client:
            assert ask_at(client, [0]) == [0]
            with full(live):
                errors = []
                for number in range(1, 5):
                    errors += ask_at(client, [number])  # a thread of nbdkit that has not written yet needs space
                    said = CliRunner().invoke(main, ["checkpoint", "add", "drive0", f"c{number}"]).stderr
            assert NO_SPACE in said  # there may have been spares
            assert set(errors) <= {0, errno.ENOSPC}
            dirtmap("checkpoint", "add", "drive0", "later")
            assert ask_at(client, [9]) == [0]
        assert granules(mapped(NODE, "b0")) == granules(client.acknowledged) >= {0, 9}
    assert granules(mapped(NODE, "later")) == {9}


def test_no_space_for_the_marks_of_another_thread(tmp_path: Path) -> None:
    make_node(tmp_path, SIZE)
    with volumes.tmpfs(tmp_path / "live", "2m") as live, dm.open("node:drive0") as image, image.track(live=live):
        status = image.tracking()
        assert status is not None
        with nbdkit(image, tmp_path) as sock, full(live), ExitStack() as stack:
            clients = [stack.enter_context(Client(sock)) for _ in range(8)]  # each has threads of its own
            errors = [client.ask(WRITE, at * GRANULE, 1) for at, client in enumerate(clients)]
        assert set(errors) <= {0, errno.ENOSPC}  # slots come several to a page, and the first page may have memory
        assert errno.ENOSPC in errors
        assert granules(mapped(NODE, "b0")) == {at for at in range(8) if not errors[at]}
        said = f"session {status.live}: nothing was written: {NO_SPACE}"
    assert said in (tmp_path / "said").read_text()


# A disk that fails


@pytest.mark.parametrize(("name", "command"), [("pwrite", WRITE), ("zero", ZERO), ("trim", TRIM)])
def test_what_fails_in_the_disk_stays_marked(tmp_path: Path, name: str, command: int) -> None:
    disk, failing = make_node(tmp_path, SIZE), tmp_path / "failing"
    below = [f"error-{name}=EIO", f"error-{name}-rate=100%", f"error-{name}-file={failing}"]
    with dm.open("node:drive0") as image, image.track() as tracker:
        with nbdkit(image, tmp_path, "error", *below, plugin=("file", str(disk))) as sock, Client(sock) as client:
            assert client.ask(command, 0, 1) == 0
            failing.touch()
            assert client.ask(command, 5 * GRANULE, GRANULE + 1) == errno.EIO
            failing.unlink()
            assert client.ask(command, 8 * GRANULE, 1) == 0
        tracker.checkpoint("c")
    assert granules(mapped(NODE, "b0")) == {0, 5, 6, 8}
    assert written(disk) == ({0, 8} if command == WRITE else set())


def test_nothing_is_written_into_a_region_that_cannot_be_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, mount = tmp_path / "drive0.raw", tmp_path / "mount"
    monkeypatch.setenv("DIRTMAP_STORE", str(mount / "default.dmap"))
    with volumes.loops(), volumes.attached(volumes.make("ext4", tmp_path / "volume")) as device:
        with volumes.mounted(device, mount):
            make_apart(disk, mount / "default.dmap")
            started = Started(tmp_path)
            with Client(started.sock) as client:
                assert ask_at(client, [0, 17]) == [0, 0]
                volumes.shut_down(mount)
                assert ask_at(client, [40, 50]) == [errno.EIO] * 2
                assert "Input/output error" in error_of("track", "save", "drive0")
                errors = ask_at(client, range(64))
            started.kill(tracker=True, nbdkit=True)
            started.wait()
        volumes.forgotten(device)
        with volumes.mounted(device, mount):
            dirtmap("recover", "drive0")
            found = granules(mapped(NODE, "b0"))
    assert set(errors) <= {0, errno.EIO}
    assert errors[32:] == [errno.EIO] * 32
    assert written(disk) <= granules(client.acknowledged) <= found
    assert found <= set(range(32))  # whether exact or by region
