"""The answer of VMware's ``QueryChangedDiskAreas``, a DiskChangeInfo, as JSON; or an array of its pages.

    {"startOffset": 0, "length": 21474836480, "changedArea": [{"start": 0, "length": 65536}, ...]}

Source: vSphere Web Services API, data object DiskChangeInfo: ``startOffset`` and ``length`` (bytes) are the part of
the disk that the answer is about, and callers ask again from its end until they have the entire disk; ``changedArea``
may be missing where nothing was modified. The JSON form adds ``_typeName``.
"""

from __future__ import annotations

from typing import Any

from dirtmap.fmt.errors import FormatError, counted
from dirtmap.fmt.geometry import MAX_DISK_SIZE
from dirtmap.tools.foreign.jsonstream import JsonReader
from dirtmap.tools.foreign.marks import Marks
from dirtmap.tools.inputs import Input

_KEYS = ("_typeName", "startOffset", "length", "changedArea")


def read(source: Input, marks: Marks) -> None:
    """Marks the changed areas of all pages.

    Raises:
        FormatError: not such an answer, an area is outside its page, or the pages are not about the whole disk.
        RangeError: an area leaves the disk.
    """
    reader = JsonReader(source)
    end = 0
    if reader.peek() == "{":
        end = _page(reader, marks, 0, f"{source.where}: page 1")
    else:
        for number, _ in enumerate(reader.elements(), 1):
            marks.require_few("page", number)
            end = _page(reader, marks, end, f"{source.where}: page {number}")
    reader.end()
    if end != marks.size:
        what = f"about {counted(end, 'byte')}, but the disk has {marks.size}"
        more = f"; query again from {end} on, and put all answers in an array" if end < marks.size else ""
        raise FormatError(source.where, what + more)


def _page(reader: JsonReader, marks: Marks, expected: int, place: str) -> int:
    """Reads a DiskChangeInfo that has to begin at ``expected`` bytes; where it ends."""
    if reader.peek() != "{":
        raise FormatError(place, "not a DiskChangeInfo")
    found: dict[str, Any] = {}
    lowest, highest = MAX_DISK_SIZE, 0
    for key in reader.keys(lambda: place):
        if key not in _KEYS:
            raise FormatError(place, f"'{key}' is not a key of a DiskChangeInfo")
        if key == "changedArea" and reader.peek() == "[":
            for entry in reader.values(lambda: marks.place(1)):
                offset, length = _area(entry, marks)
                lowest, highest = min(lowest, offset), max(highest, offset + length)
        else:
            found[key] = reader.value(lambda: place)
            if key == "changedArea" and found[key] is not None:
                raise FormatError(place, "'changedArea' is not an array")
    for key in ("startOffset", "length"):
        if type(found.get(key)) is not int or not 0 <= found[key] <= MAX_DISK_SIZE:
            raise FormatError(place, f"'{key}' is not a number of bytes")
    start, end = found["startOffset"], found["startOffset"] + found["length"]
    if start != expected:
        raise FormatError(place, f"begins at {start}; what is at {expected} is not known")
    if highest and (lowest < start or highest > end):
        about = counted(found["length"], "byte")
        raise FormatError(place, f"an area is outside the {about} at {start} that it is about")
    return int(end)


def _area(entry: Any, marks: Marks) -> tuple[int, int]:
    marks.next()
    if not isinstance(entry, dict) or not {"_typeName", "start", "length"}.issuperset(entry):
        raise marks.error("not a changed area")
    offset, length = marks.number(entry, "start"), marks.number(entry, "length")
    marks.add(offset, length)
    return offset, length
