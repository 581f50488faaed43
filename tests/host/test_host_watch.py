"""Every commit of a store that belongs to a host is watched: a store that was put back over it is noticed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support import qemu

import dirtmap.engine as dm
from dirtmap.engine.storefile.file import Store

SIZE = 16 << 20
GRANULE = 65536


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with a qcow2 node and a device on it, in another store than the default one."""
    monkeypatch.chdir(tmp_path)
    qemu.create(tmp_path / "q.qcow2", SIZE)
    with dm.Host("other.dmap") as other:
        other.add_qcow2("image", "q.qcow2")
    with dm.Host() as host:
        host.add_device("device", "image")
    for name in ("image", "device"):
        with dm.open(name) as opened, opened.transaction() as bitmaps:
            bitmaps["b"] = dm.Bitmap(SIZE)
    return tmp_path


def die_tracking(target: str) -> None:
    pid = os.fork()
    if pid == 0:
        tracker = dm.open(target).track(save_interval=0)
        tracker.mark(GRANULE, 1)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def is_known(path: Path) -> bool:
    """True where the index has seen the last commit of a store."""
    with dm.Host() as host, Store(str(path)) as target:
        seen = host._parts.stores.index.seen(target.uuid)
        return seen is not None and seen.commit == target.read(lambda snapshot: snapshot.header.commit)


ACTS: dict[str, Callable[[], object]] = {
    "recover by name": lambda: dm.recover("image"),
    "recover by path": lambda: dm.recover("q.qcow2"),
    "a change": lambda: _change("image"),
    "a change of the device": lambda: _change("device"),
    "another tracker": lambda: dm.open("image").track().close(),
}


def _change(target: str) -> None:
    with dm.open(target) as image, image.transaction() as bitmaps:
        bitmaps["b"].mark(0, 1)


@pytest.mark.parametrize("tracked", ["image", "device"])
@pytest.mark.parametrize("act", ACTS)
def test_what_follows_a_death_is_watched(folder: Path, tracked: str, act: str) -> None:
    die_tracking(tracked)
    ACTS[act]()
    assert is_known(folder / "default.dmap")
    assert is_known(folder / "other.dmap")
