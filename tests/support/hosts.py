"""A host of a few nodes, images and a device, for commands that take names; and what no command may touch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import qemu
from support.cli import dirtmap, error_of, json_of

KIB, MIB = 1 << 10, 1 << 20
SIZE = 8 * MIB
ALL = [(0, SIZE)]


def make_host(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes in two stores and two images, a device on one of those, and an image without a name; goes there."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DIRTMAP_STORE", "default.dmap")
    for name in ("one", "two", "other"):
        Path(f"{name}.raw").touch()
        os.truncate(f"{name}.raw", SIZE)
    for name in ("q0", "q1", "plain"):
        qemu.create(Path(f"{name}.qcow2"), SIZE)
    dirtmap("store", "create", "other.dmap")
    dirtmap("node", "add", "other", "other.raw", "--store", "other.dmap")
    for name in ("one", "two"):
        dirtmap("node", "add", name, f"{name}.raw")
    for name in ("q0", "q1"):
        dirtmap("node", "add", name, f"{name}.qcow2")
    dirtmap("device", "add", "d0", "--root", "q0")


def mapped(target: str, name: str) -> list[tuple[int, int]]:
    return [(e["offset"], e["length"]) for e in json_of("map", "--dirty", target, name)]


def names(target: str) -> list[str]:
    return [bitmap["name"] for bitmap in json_of("list", target)[0]["bitmaps"]]


def everything() -> dict[str, bytes | int]:
    """What is in each container and image; of a file that nobody has written to, only how long it is."""
    paths = [path for path in Path().rglob("*") if path.suffix in (".dmap", ".qcow2", ".raw")]
    return {str(path): path.read_bytes() if path.stat().st_blocks else path.stat().st_size for path in paths}


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """No container has another byte after the block."""
    before = everything()
    yield
    assert everything() == before


def refused(*arguments: str | int, given: str | None = None) -> str:
    with untouched():
        return error_of(*arguments, given=given)


def fill_device(granularity: str = "64K") -> None:
    for name in ("b", "empty"):
        dirtmap("add", "d0", name, "-g", granularity)
    dirtmap("mark", "d0", "b", MIB, 1)
