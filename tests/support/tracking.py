"""Nodes to track, and a byte-per-granule model to hold their bitmaps against."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import dirtmap.engine as dm
from dirtmap.engine import bits
from dirtmap.engine.store.nodes import add_node
from dirtmap.engine.store.store import Store, create

Model = NDArray[np.uint8]
GRANULE = 65536


def make_node(folder: Path, size: int, name: str = "drive0", *, granularity: int = GRANULE) -> Path:
    """A raw image as a node of the default store of ``folder``, with a recording bitmap ``b0``; returns its path."""
    image, path = folder / f"{name}.raw", folder / "default.dmap"
    image.touch()
    with image.open("r+b") as file:
        file.truncate(size)
    if not path.exists():
        create(str(path))
    with Store(str(path)) as target:
        add_node(target, name, str(image))
    with dm.open(f"node:{name}", store=str(path)) as opened, opened.transaction() as bitmaps:
        bitmaps["b0"] = dm.Bitmap(size, granularity)
    return image


def model_of(bitmap: dm.Bitmap) -> Model:
    """A byte for each granule: 1 where it is dirty."""
    count = -(-bitmap.size // bitmap.granularity)
    return np.unpackbits(np.frombuffer(bitmap.packed(), np.uint8), count=count, bitorder="little")


def mark(model: Model, offset: int, length: int, granularity: int = GRANULE) -> None:
    """What a mark does, as plain as can be."""
    if length:
        model[offset // granularity : (offset + length - 1) // granularity + 1] = 1


def lost(model: Model, bitmap: dm.Bitmap) -> list[int]:
    """Granules that the model has and the bitmap has not."""
    return np.flatnonzero((model == 1) & (model_of(bitmap) == 0)).tolist()  # type: ignore[no-any-return]


def bytes_of(words: bits.Words, count: int) -> Model:
    """As `model_of`, of plain words."""
    return np.unpackbits(words.view(np.uint8), count=count, bitorder="little")


def files_in(folder: Path) -> list[str]:
    """What is in a folder, but for the index of the default store that it has."""
    return sorted(file.name for file in folder.iterdir() if not file.name.startswith("index"))


def forget_index(folder: Path) -> None:
    """Takes the index away: it knows later commits than a store has that a test puts back."""
    for path in folder.glob("index*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
