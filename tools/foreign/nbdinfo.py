"""``nbdinfo --map=qemu:dirty-bitmap:NAME --json``, and what `dirtmap map` prints in the same form.

    [{"offset": 0, "length": 65536, "type": 1, "description": "dirty"}, ...]

Source: nbdinfo(1), and QEMU's docs/interop/nbd.txt. The maps of other contexts look alike, and mean other things by
the same types: 1 is a hole in ``base:allocation`` and what the top image holds in ``qemu:allocation-depth``. So both
type and description have to be those of a dirty bitmap.
"""

from __future__ import annotations

from dirtmap.tools.foreign.jsonstream import entries
from dirtmap.tools.foreign.marks import Cover, Marks, Order
from dirtmap.tools.inputs import Input

_KEYS = frozenset(("offset", "length", "type", "description"))


def read(source: Input, marks: Marks) -> None:
    """Marks the dirty extents.

    A map is held against the disk: all of it, in order. Without a single clean extent, as ``dirtmap map --dirty``
    prints it, it is a list instead.

    Raises:
        FormatError: not the map of a dirty bitmap, or not of the whole disk.
        RangeError: an extent leaves the disk.
    """
    cover, order = Cover(marks), Order(marks)
    has_clean = False
    gap: int | None = None
    for entry in entries(source, _KEYS, marks):
        kind = entry.get("type")
        if type(kind) is not int or (kind, entry.get("description")) not in ((0, "clean"), (1, "dirty")):
            what = "neither type 0, 'clean', nor type 1, 'dirty': not the map of a dirty bitmap"
            raise marks.error(f"{what}, as of nbdinfo --map=qemu:dirty-bitmap:NAME --json")
        offset, length = marks.number(entry, "offset"), marks.number(entry, "length")
        order.take(offset, length)
        has_clean = has_clean or kind == 0
        if gap is None and offset != cover.end:
            gap = cover.end
        if has_clean and gap is not None:
            raise marks.error(f"the map says nothing of what is at {gap}: not a map of the whole disk")
        if gap is None:
            cover.take(offset, length, kind == 1)
        else:
            marks.add(offset, length)
    if has_clean:
        cover.finish()
