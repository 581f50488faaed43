"""What is done with every image that was made to do harm, and how an operation may refuse it.

The tests of bounds do it in a process of its own, which imports this module and nothing that pytest needs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import dirtmap.engine as dm
from dirtmap.engine.model import changes
from dirtmap.engine.system.file import File

MIB = 1 << 20


class Unsynced(File):
    """Thousands of images are written to, none of which shall last."""

    def sync(self) -> None:
        pass


def _change(act: Callable[[dm.Transaction], None]) -> Callable[[Path], object]:
    def run(path: Path) -> None:
        with dm.open(path) as image, image.transaction() as bitmaps:
            act(bitmaps)

    return run


def _read_all(path: Path) -> None:
    with dm.open(path) as image:
        for name in list(image)[:3]:
            if not image[name].inconsistent:
                image[name].extents()


def _count_two(path: Path) -> None:
    with dm.open(path) as image:
        for name in list(image)[:2]:
            if not (bitmap := image[name]).inconsistent:
                assert 0 <= bitmap.count <= 1 << 63


def _merge_two(bitmaps: dm.Transaction) -> None:
    for name in list(bitmaps)[1:2]:
        changes.merge(bitmaps, next(iter(bitmaps)), [bitmaps[name]])


READING: dict[str, Callable[[Path], object]] = {
    "describe": dm.describe,
    "read": _read_all,
    "check": dm.check,
    "dump": lambda path: json.dumps(dm.dump(path, with_hex=True)),
}
CHANGING: dict[str, Callable[[Path], object]] = {
    "add": _change(lambda bitmaps: changes.add(bitmaps, "new")),
    "remove": _change(lambda bitmaps: changes.remove(bitmaps, next(iter(bitmaps), "none"))),
    "mark": _change(lambda bitmaps: changes.mark(bitmaps, "two", [0], [bitmaps.size])),
    "recover": dm.recover,
    "check -r leaks": lambda path: dm.check(path, repair="leaks"),
    "check -r all": lambda path: dm.check(path, repair="all"),
}
# Of large bitmaps, too.
LOOKING: dict[str, Callable[[Path], object]] = {"count": _count_two, "union": _change(_merge_two)}


def require_good_message(error: dm.Error, path: Path) -> None:
    text = str(error)
    assert text.isprintable()
    assert error.where.startswith(str(path))
    assert text.startswith(str(path))
    assert len(text) < 2000
