"""``rbd diff --from-snap SNAP --format json``: what has changed in a Ceph image since a snapshot.

    [{"offset": 0, "length": 65536, "exists": "true"}, ...]

Source: rbd(8), and ``diff_cb`` in Ceph's src/tools/rbd/action/Diff.cc, which prints ``exists`` as a string; offsets
and lengths are bytes, in order. Without ``--from-snap`` it lists what was ever written and still is there, which looks
the same.
"""

from __future__ import annotations

from dirtmap.tools.foreign.jsonstream import entries
from dirtmap.tools.foreign.marks import Marks, Order
from dirtmap.tools.inputs import Input

_KEYS = frozenset(("offset", "length", "exists"))


def read(source: Input, marks: Marks) -> None:
    """Marks all extents: one that does not exist any more was discarded, which is a change, too.

    Raises:
        FormatError: not such a list, or not in order.
        RangeError: an extent leaves the disk.
    """
    order = Order(marks)
    for entry in entries(source, _KEYS, marks):
        offset, length = marks.number(entry, "offset"), marks.number(entry, "length")
        exists = entry.get("exists")
        if not any(exists is known or exists == str(known).lower() for known in (True, False)):
            raise marks.error("'exists' is neither true nor false")
        order.take(offset, length)
        marks.add(offset, length)
