"""``qemu-img map --output=json``: what the top image of a chain holds, be it data or zeros.

    [{"start": 0, "length": 65536, "depth": 0, "present": true, "zero": false, "data": true, "offset": 327680}, ...]

Source: qemu-img(1), and ``get_block_status`` in QEMU's qemu-img.c.
"""

from __future__ import annotations

from typing import Any

from dirtmap.tools.foreign.jsonstream import entries
from dirtmap.tools.foreign.marks import Cover, Marks
from dirtmap.tools.inputs import Input


def read(source: Input, marks: Marks) -> None:
    """Marks what the top image holds, and all data below it.

    QEMU's own tests read a bitmap through the option ``x-dirty-bitmap``. Then ``data`` is false for what is dirty, the
    opposite of what it means here, and ``zero`` is false as well, which a map of an image never says: what is neither
    data nor zeros has no content. Such a map is refused.

    Raises:
        FormatError: not such a map, or not of the whole disk.
        RangeError: an extent leaves the disk.
    """
    cover = Cover(marks)
    for entry in entries(source, None, marks):
        offset, length = marks.number(entry, "start"), marks.number(entry, "length")
        data, zero = _flag(marks, entry, "data"), _flag(marks, entry, "zero")
        if not data and not zero:
            what = "neither data nor zeros, as only where a bitmap is read through x-dirty-bitmap, dirty as false; use"
            other = "nbdinfo --map=qemu:dirty-bitmap:NAME --json, or 'dirtmap map' or 'merge' of the image itself"
            raise marks.error(f"{what} {other}")
        depth = marks.number(entry, "depth")
        # What this image itself holds as zeros may have been something else before. Raw holes look the same. QEMU
        # before 6.1 does not tell such zeros from what no image holds.
        present = _flag(marks, entry, "present") if "present" in entry else True
        cover.take(offset, length, data or (present and depth == 0))
    cover.finish()


def _flag(marks: Marks, entry: dict[str, Any], key: str) -> bool:
    value = entry.get(key)
    if not isinstance(value, bool):
        raise marks.error(f"'{key}' is neither true nor false")
    return value
