"""A host of many stores: a node in each, and in the default one a qcow2 node and devices as well."""

from __future__ import annotations

import os
import time
from pathlib import Path

import dirtmap.engine as dm
from support import qemu

MIB = 1 << 20


def raw(path: Path) -> str:
    """An empty raw image of a MiB, not written to just now."""
    path.touch()
    os.truncate(path, MIB)
    os.utime(path, (1, 1.5))
    return str(path)


def settle() -> None:
    """Waits until what was written last can be told from what will be written, by its time."""
    time.sleep(0.06)


def make_host(folder: Path, stores: int) -> tuple[str, str]:
    """A host of so many stores, each with a node, and a qcow2 node and a device on it in the default one.

    The nodes are ``node0``, in the default store, to ``nodeN``; the qcow2 node is ``image``, in ``q.qcow2``; the
    devices are ``device``, on that, and ``on-raw``, on ``node0``. The first and last node, ``image`` and ``device``
    have a bitmap ``b``.

    Returns:
        The paths of the default store and of the index.
    """
    home, index = str(folder / "default.dmap"), str(folder / "index")
    with dm.Host(home, index) as host:
        host.add_node("node0", raw(folder / "0.raw"))
        qemu.create(folder / "q.qcow2", MIB)
        host.add_qcow2("image", str(folder / "q.qcow2"))
        host.add_device("device", "image")
        host.add_device("on-raw", "node0")
    for number in range(1, stores):
        path = str(folder / f"store{number}.dmap")
        with dm.Host(path, index) as other:
            other._parts.registry.add_node(f"node{number}", raw(folder / f"{number}.raw"))
    with dm.Host(home, index) as host:
        dm.scan(host, [str(folder)])
        for name in ("node0", "image", "device", f"node{stores - 1}"):
            with host.open(name) as opened, opened.transaction() as bitmaps:
                bitmaps.setdefault("b", dm.Bitmap(MIB))
    settle()
    with dm.Host(home, index) as host:
        host._parts.stores.stores()
    return home, index
