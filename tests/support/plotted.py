"""Images with bitmaps to be drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import dirtmap.engine as dm
from support import qemu

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


def make(path: Path, size: int, bitmaps: Mapping[str, Sequence[tuple[int, int]]], granularity: int = 64 * KIB) -> Path:
    """A qcow2 image with these bitmaps, each with these ranges dirty, in bytes."""
    qemu.create(path, size)
    with dm.open(path) as image, image.transaction() as changing:
        for name, extents in bitmaps.items():
            offsets, lengths = zip(*extents, strict=True) if extents else ((), ())
            changing[name] = dm.Bitmap.from_extents(size, offsets, lengths, granularity)
    return path
