"""Devices to track, on roots of every kind, and what their bitmaps and their roots' have."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import dirtmap.engine as dm
from dirtmap.engine.storefile.file import create
from support import qemu
from support.power import SIZE
from support.tracking import GRANULE, make_node, model_of

COUNT = SIZE // GRANULE
DEVICE, NODE = "device:disk0", "node:drive0"
BOTH = (DEVICE, NODE)
EXACT, LOGGED, ALL_DIRTY = "exact", "logged regions", "all dirty"


def raw_here(folder: Path) -> Path:
    """A raw root in the device's store."""
    return make_node(folder, SIZE)


def raw_elsewhere(folder: Path) -> Path:
    """A raw root in a store of its own, which the default store knows."""
    there = folder / "there"
    there.mkdir()
    path = make_node(there, SIZE)
    create(str(folder / "default.dmap"))
    dm.this_host()._parts.registry.remember_store(str(there / "default.dmap"))
    return path


def qcow2(folder: Path) -> Path:
    """A qcow2 root, which keeps its bitmaps itself."""
    path = folder / "drive0.qcow2"
    qemu.create(path, SIZE)
    qemu.qemu_img("bitmap", "--add", path, "b0")
    create(str(folder / "default.dmap"))
    dm.this_host().add_qcow2("drive0", str(path))
    return path


ROOTS = (raw_here, raw_elsewhere, qcow2)
on_every_root = pytest.mark.parametrize("root", ROOTS, ids=lambda root: root.__name__)


def make(folder: Path, root: Callable[[Path], Path]) -> Path:
    """A device ``disk0`` with a recording bitmap ``d0``, on the node ``drive0``, which has ``b0``; the image's path."""
    path = root(folder)
    dm.this_host().add_device("disk0", "drive0")
    with dm.open(DEVICE) as image, image.transaction() as bitmaps:
        bitmaps["d0"] = dm.Bitmap(SIZE, GRANULE)
    return path


# A test module that uses one of these fixtures gives it a name of its own: ``path = devices.path``.


@pytest.fixture(params=ROOTS, ids=lambda root: root.__name__)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The image of a device's root, of every kind; see `make`."""
    return make(tmp_path, request.param)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """The image of a device's root that is raw, in the device's store; see `make`."""
    return make(tmp_path, raw_here)


@pytest.fixture
def other(path: Path) -> Path:
    """The image of the node ``other``, as large as that of ``path``."""
    image = path.with_name("other.raw")
    image.touch()
    os.truncate(image, SIZE)
    dm.this_host().add_node("other", str(image))
    return image


def granules(bitmap: dm.Bitmap) -> list[int]:
    return np.flatnonzero(model_of(bitmap)).tolist()  # type: ignore[no-any-return]


def dirty(target: str, name: str) -> list[int]:
    with dm.open(target) as image:
        return granules(image[name])


def both() -> tuple[list[int], list[int]]:
    """What the device has, and what its root."""
    return dirty(DEVICE, "d0"), dirty(NODE, "b0")


@contextlib.contextmanager
def made_in(work: Path, root: Callable[[Path], Path]) -> Iterator[Path]:
    """A new folder with the device and its root, and with a store and an index of its own, which are the default."""
    work.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIRTMAP_STORE", str(work / "default.dmap"))
        patch.setenv("DIRTMAP_INDEX", str(work / "index"))
        yield make(work, root)


def lose_tmpfs() -> None:
    """The machine has lost its power: no live file is left."""
    for file in Path(os.environ["DIRTMAP_LIVE"]).rglob("*"):
        if file.is_file():
            file.unlink()


def in_child(act: Callable[[], object]) -> None:
    """Has a child do it, that kills itself when it is done, or fails the test."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os.kill(os.getpid(), signal.SIGKILL)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def recover(target: str) -> dict[str, str]:
    return {item.name: item.how.partition(":")[0] for item in dm.recover(target)}


def sessions() -> list[bool]:
    """Whether the device and the root have one."""
    found = []
    for target in BOTH:
        with dm.open(target) as image:
            found.append(image.tracking() is not None)
    return found


def no_traces(folder: Path) -> None:
    """Neither live files nor logs are left."""
    assert not list(folder.rglob("*.intent"))
    live = Path(os.environ["DIRTMAP_LIVE"])
    assert not [file for file in live.rglob("*") if file.is_file()]
