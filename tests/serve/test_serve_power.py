"""`dirtmap serve` when the power is lost: a real file system, shut down under a real nbdkit and its clients.

Disk, store and log are on an ext4 of their own. It is shut down while clients write, as if the disk had been unplugged:
what the journal and the disk have by then is what there is when it is mounted again. Live files go with the power.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from support import server, volumes
from support.cli import dirtmap, mapped
from support.nbd import Client, write_until_it_ends
from support.server import SIZE, Started, granules
from support.tracking import GRANULE, Model, make_node

import dirtmap.engine as dm

nothing_goes_on = server.nothing_goes_on

NODE = Path("drive0")
REGION = 1 << 20  # of a disk as small as this


class Bounds:
    """What may be dirty at most: what was asked for, and the regions of what had not ended when the last save began."""

    def __init__(self, clients: list[Client]) -> None:
        self._clients, self._saved = clients, [0 for _ in clients]

    def save(self) -> None:
        """Saves, while the clients go on."""
        ended = [len(client.acknowledged) for client in self._clients]
        dirtmap("track", "save", "drive0")
        self._saved = ended

    def most(self) -> set[int]:
        """Once the clients have ended: granules."""
        regions = []
        for client, ended in zip(self._clients, self._saved, strict=True):
            for offset, length in Counter(client.submitted) - Counter(client.acknowledged[:ended]):
                regions += [(start, REGION) for start in range(offset // REGION * REGION, offset + length, REGION)]
        return granules([*regions, *(each for client in self._clients for each in client.submitted)])


def write_and_lose(folder: Path, socket: Path, chance: random.Random) -> tuple[list[Client], Bounds, list[int] | None]:
    """Serves, writes, saves and cuts, and loses the power; how much each client had asked for when the cut was made."""
    started = Started(socket)
    sizes = chance.choices((REGION * 3, SIZE // 4, SIZE), k=2)  # most regions stay clean, or soon none
    writing = [write_until_it_ends(started.sock, size, chance.randrange(1 << 30)) for size in sizes]
    clients = [client for client, _ in writing]
    bounds, cut = Bounds(clients), None
    for act in chance.sample(("wait", "save", "cut"), k=chance.randrange(4)):
        time.sleep(chance.random() * 0.1)
        if act == "save":
            bounds.save()
        if act == "cut":
            dirtmap("checkpoint", "add", "drive0", "noon")
            cut = [len(client.submitted) for client in clients]
    time.sleep(chance.random() * 0.2)
    how = (volumes.FLUSHED, volumes.JOURNAL_FLUSHED, volumes.NOT_FLUSHED, volumes.NOT_FLUSHED)
    volumes.shut_down(folder, chance.choice(how))
    time.sleep(chance.random() * 0.05)  # what it does about errors counts, too
    started.kill(tracker=True, nbdkit=True)
    started.wait()
    for _, thread in writing:
        thread.join(60)
        assert not thread.is_alive()
    shutil.rmtree(os.environ["DIRTMAP_LIVE"])
    os.mkdir(os.environ["DIRTMAP_LIVE"], 0o700)
    return clients, bounds, cut


def judge(clients: list[Client], bounds: Bounds, cut: list[int] | None, changed: set[int]) -> None:
    """Recovers, and holds what is dirty against what the clients know and what has changed on the disk."""
    with dm.open("node:drive0") as image:
        status = image.tracking()
        assert status is not None
        assert status.how.startswith("logged regions"), status.how
        image.recover_session()
        assert image.doubt() is None
    found = granules(mapped(NODE, "b0"))
    assert granules([each for client in clients for each in client.acknowledged]) - found == set()
    assert changed - found == set()
    assert found - bounds.most() == set()
    if cut is not None:
        later = [set(client.submitted[at:]) & set(client.acknowledged) for client, at in zip(clients, cut, strict=True)]
        assert granules([each for ranges in later for each in ranges]) - granules(mapped(NODE, "noon")) == set()
        dirtmap("remove", "drive0", "noon")


def lose_power(folder: Path, monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    """So many times, on a file system that goes on with what it has after each."""
    mount, writes = folder / "mount", 0
    monkeypatch.setenv("DIRTMAP_STORE", str(mount / "default.dmap"))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory, volumes.loops(), ExitStack() as stack:
        device = stack.enter_context(volumes.attached(volumes.make("ext4", Path(memory, "volume"), size=2 * SIZE)))
        with volumes.mounted(device, mount):
            make_node(mount, SIZE)
        for seed in range(rounds):
            chance = random.Random(seed)
            with volumes.mounted(device, mount):
                dirtmap("clear", "drive0", "b0")
                before = content(mount)
                clients, bounds, cut = write_and_lose(mount, folder, chance)
            volumes.forgotten(device)
            with volumes.mounted(device, mount):
                changed = set(np.flatnonzero((content(mount) != before).any(axis=1)).tolist())
                judge(clients, bounds, cut, changed)
            writes += sum(len(client.acknowledged) for client in clients)
    print(rounds, "times without power,", writes, "writes acknowledged")


def content(mount: Path) -> Model:
    """What the disk has, a row for each granule."""
    return np.fromfile(mount / "drive0.raw", np.uint8).reshape(-1, GRANULE)


def test_power_loss_under_load_loses_no_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lose_power(tmp_path, monkeypatch, 3)


@pytest.mark.long
def test_power_loss_under_load_loses_no_write_in_many_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lose_power(tmp_path, monkeypatch, 100)
