"""Reads extents that other programs print: which ranges of a disk to mark.

    nbdinfo --map --json   [{"offset": 0, "length": 65536, "type": 1, "description": "dirty"}, ...]   the dirty ones
    qemu-img map           [{"start": 0, "length": 65536, "data": true, ...}, ...]              what the top image holds
    rbd diff               [{"offset": 0, "length": 65536, "exists": "true"}, ...]                    all, see rbd_diff
    lines                  0 65536                                                                    all

Numbers are bytes, sizes of `dirtmap.tools.sizes` in lines. What is not clearly one of these is refused, by its place;
so is what may have been cut off: nothing at all, as of a program that failed, and a last line without its end.
"""

from __future__ import annotations

import json
import re
from array import array
from typing import TYPE_CHECKING, Any, NamedTuple

from dirtmap.fmt.errors import Error, FormatError, RangeError
from dirtmap.fmt.geometry import MAX_DISK_SIZE
from dirtmap.tools.sizes import parse_size

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Extents(NamedTuple):
    """Ranges to mark.

    Attributes:
        where: what they were read from, for messages.
        unit: what ``places`` count: ``line`` or ``entry``.
        offsets, lengths: bytes, int64, shape (n,).
        places: where each was read, from 1 on; int64, shape (n,).
    """

    where: str
    unit: str
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    places: NDArray[np.int64]

    def require_inside(self, size: int) -> None:
        """Holds the ranges against a disk of ``size`` bytes.

        Raises:
            RangeError: one leaves it; names the first.
        """
        outside = self.offsets > size - self.lengths
        if outside.any():
            first = int(outside.argmax())
            what = f"{self.lengths[first]} bytes at {self.offsets[first]} are not inside the disk of {size} bytes"
            raise RangeError(f"{self.where}: {self.unit} {self.places[first]}", what)


def parse_extents(data: bytes, where: str) -> Extents:
    """The ranges to mark.

    Args:
        data: a whole document.
        where: its name, for messages.

    Raises:
        FormatError: not clearly of one of the formats, or not whole; names the line or entry.
    """
    if not data.strip():
        raise FormatError(where, "empty; a program that finds no extents says so with an empty JSON array, []")
    if data.lstrip()[:1] in (b"[", b"{"):
        return _parse_json(data, where)
    return _parse_lines(data, where)


class _Entries:
    """Takes JSON objects as the decoder meets them, so that a million of them need not exist at once."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.kind: str | None = None
        self.count = 0
        self.offsets, self.lengths, self.places = array("q"), array("q"), array("q")

    def take(self, pairs: list[tuple[str, Any]]) -> _Entries:
        self.count += 1
        entry = dict(pairs)
        if len(entry) < len(pairs):
            raise self.error("a key appears twice")
        kind, start = self._kind(entry)
        if self.kind not in (None, kind):
            raise self.error(f"an extent as of {kind} among those of {self.kind}")
        self.kind = kind
        offset, length = entry.get(start), entry.get("length")
        for key, value in ((start, offset), ("length", length)):
            if type(value) is not int or not 0 <= value <= MAX_DISK_SIZE:
                raise self.error(f"'{key}' is not a number of bytes")
        if _DIRTY[kind](self, entry):
            self.offsets.append(offset)  # type: ignore[arg-type]
            self.lengths.append(length)  # type: ignore[arg-type]
            self.places.append(self.count)
        return self

    def _kind(self, entry: dict[str, Any]) -> tuple[str, str]:
        """Which program's it is, and its key for the offset."""
        kinds = []
        if "description" in entry or "type" in entry:
            kinds.append(("nbdinfo", "offset"))
        if "start" in entry or "data" in entry:
            kinds.append(("qemu-img map", "start"))
        if "exists" in entry:
            kinds.append(("rbd diff", "offset"))
        if len(kinds) != 1:
            raise self.error("not clearly an extent as of nbdinfo, qemu-img map or rbd diff")
        return kinds[0]

    def nbdinfo(self, entry: dict[str, Any]) -> bool:
        kind, description = entry.get("type"), entry.get("description")
        if type(kind) is not int or (kind, description) not in ((0, "clean"), (1, "dirty")):
            raise self.error("neither type 0, 'clean', nor type 1, 'dirty': not the map of a dirty bitmap")
        return kind == 1

    def qemu_img_map(self, entry: dict[str, Any]) -> bool:
        if not isinstance(entry.get("data"), bool):
            raise self.error("'data' is neither true nor false")
        # What this image itself holds as zeros may have been something else before. Raw holes look the same.
        return bool(entry["data"]) or (bool(entry.get("present")) and entry.get("depth") == 0)

    def rbd_diff(self, entry: dict[str, Any]) -> bool:
        # Ceph prints strings. An extent that does not exist any more was discarded: that is a change, too.
        if not any(entry["exists"] is known or entry["exists"] == str(known).lower() for known in (True, False)):
            raise self.error("'exists' is neither true nor false")
        return True

    def error(self, what: str) -> Error:
        return FormatError(f"{self.where}: entry {self.count}", what)


_DIRTY = {"nbdinfo": _Entries.nbdinfo, "qemu-img map": _Entries.qemu_img_map, "rbd diff": _Entries.rbd_diff}


def _parse_json(data: bytes, where: str) -> Extents:
    import numpy as np

    entries = _Entries(where)
    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=entries.take)
    except (ValueError, RecursionError) as error:
        raise FormatError(where, f"not valid JSON: {error}") from error
    if not isinstance(document, list):
        raise FormatError(where, "not an array of extents")
    for number, item in enumerate(document, 1):
        if item is not entries:
            raise FormatError(f"{where}: entry {number}", "not an extent")
    if len(document) != entries.count:
        raise FormatError(where, "an extent inside another")
    offsets, lengths, places = (np.array(x, np.int64) for x in (entries.offsets, entries.lengths, entries.places))
    return Extents(where, "entry", offsets, lengths, places)


_CHUNK = 1 << 20
# Two numbers below 10**18 on each line: numpy may parse these. Possessive, so that nothing is tried twice.
_PLAIN_LINES = re.compile(rb"(?:[ \t]*+[0-9]{1,18}+[ \t]++[0-9]{1,18}+[ \t]*+\r?+\n)*+")


def _parse_lines(data: bytes, where: str) -> Extents:
    import numpy as np

    if not data.endswith(b"\n"):
        last = data.count(b"\n") + 1
        raise FormatError(f"{where}: line {last}", "cut off: it does not end with a newline")
    parts = []
    line, at = 1, 0
    while at < len(data):
        end = data.find(b"\n", at + _CHUNK) + 1 or len(data)
        chunk = data[at:end]
        count = chunk.count(b"\n")
        if _PLAIN_LINES.fullmatch(chunk):
            numbers = np.fromstring(chunk, np.int64, sep=" ")
            parts.append((numbers[0::2], numbers[1::2], np.arange(line, line + count)))
        else:
            parts.append(_parse_each(chunk, where, line))
        line += count
        at = end
    offsets, lengths, places = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Extents(where, "line", offsets, lengths, places)


def _parse_each(chunk: bytes, where: str, first: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Line by line; empty ones are passed over."""
    import numpy as np

    rows = []
    for line, text in enumerate(chunk.split(b"\n"), first):
        words = text.decode("ascii", "backslashreplace").split()
        if not words:
            continue
        if len(words) != 2:
            raise FormatError(f"{where}: line {line}", f"{len(words)} words instead of an offset and a length")
        try:
            rows.append((parse_size(words[0]), parse_size(words[1]), line))
        except ValueError as error:
            raise FormatError(f"{where}: line {line}", str(error)) from error
    table = np.array(rows, np.int64).reshape(-1, 3)
    return table[:, 0], table[:, 1], table[:, 2]
