"""The answer of the Kubernetes CSI call ``GetMetadataDelta``: an array of its messages, as JSON.

    [{"block_metadata_type": 1, "volume_capacity_bytes": 4194304, "block_metadata": [{"size_bytes": 65536},
      {"byte_offset": 1048576, "size_bytes": 65536}]}, ...]

Source: proto/schema.proto and pkg/iterator/emitters.go of kubernetes-csi/external-snapshot-metadata, whose
``snapshot-metadata-lister -o json`` prints this. The JSON of protobuf itself writes keys in camelCase, types by name
and int64 as strings. Both leave out an offset of 0. Type and capacity are the same in all messages; ranges are in
order, do not overlap, and are of one length where the type is FIXED_LENGTH. ``GetMetadataAllocated`` answers in the
same form with what a single snapshot holds.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from dirtmap.fmt.errors import FormatError, counted
from dirtmap.fmt.geometry import MAX_DISK_SIZE
from dirtmap.tools.foreign.jsonstream import JsonReader
from dirtmap.tools.foreign.marks import Marks, Order
from dirtmap.tools.inputs import Input

_FIXED, _VARIABLE = "FIXED_LENGTH", "VARIABLE_LENGTH"
_TYPES = {1: _FIXED, 2: _VARIABLE, _FIXED: _FIXED, _VARIABLE: _VARIABLE}
_INT64 = re.compile("[0-9]{1,19}")


def read(source: Input, marks: Marks) -> None:
    """Marks all ranges.

    Raises:
        FormatError: not such an answer, or of a volume of another size.
        RangeError: a range leaves the disk.
    """
    reader = JsonReader(source)
    if reader.peek() != "[":
        raise FormatError(source.where, "not an array of messages; without one, an answer that was cut off looks whole")
    order, ranges = Order(marks), _Ranges(marks)
    types = set()
    for number, _ in enumerate(reader.elements(), 1):
        marks.require_few("message", number)
        place = f"{source.where}: message {number}"
        here = partial(str, place)
        if reader.peek() != "{":
            raise FormatError(place, "not a message")
        capacity = kind = None
        seen: set[str] = set()
        for key in reader.keys(here):
            if (field := _snake(key)) in seen:
                raise FormatError(place, f"'{field}' appears twice")
            seen.add(field)
            match field:
                case "block_metadata" if reader.peek() == "[":
                    for entry in reader.values(lambda: marks.place(1)):
                        ranges.take(entry, order)
                case "volume_capacity_bytes":
                    capacity = _int64(reader.value(here))
                case "block_metadata_type":
                    value = reader.value(here)
                    kind = _TYPES.get(value) if type(value) in (int, str) else None
                case _:
                    raise FormatError(place, f"'{key}' is not a key of such a message, or not an array")
        if capacity is None:
            raise FormatError(place, "'volume_capacity_bytes' is not a number of bytes")
        if capacity != marks.size:
            raise FormatError(place, f"of a volume of {counted(capacity, 'byte')}, but the disk has {marks.size}")
        if kind is None:
            raise FormatError(place, f"'block_metadata_type' is neither {_FIXED} nor {_VARIABLE}")
        types.add(kind)
        if len(types) > 1:
            raise FormatError(place, f"{kind}, unlike the messages before it")
    reader.end()
    if types == {_FIXED} and ranges.uneven:
        raise FormatError(source.where, f"ranges of different lengths, although they are {_FIXED}")


class _Ranges:
    """Takes the ranges of all messages.

    Attributes:
        uneven: one had another length than the first; the last one of the disk may be cut short.
    """

    def __init__(self, marks: Marks) -> None:
        self.uneven = False
        self._marks = marks
        self._length: int | None = None

    def take(self, entry: Any, order: Order) -> None:
        marks = self._marks
        marks.next()
        found = {_snake(key): value for key, value in entry.items()} if isinstance(entry, dict) else {}
        if not found or not {"byte_offset", "size_bytes"}.issuperset(found) or len(found) < len(entry):
            raise marks.error("not a range of byte_offset and size_bytes")
        offset, length = _int64(found.get("byte_offset", 0)), _int64(found.get("size_bytes"))
        if offset is None or length is None:
            raise marks.error("'byte_offset' or 'size_bytes' is not a number of bytes")
        order.take(offset, length)
        marks.add(offset, length)
        self._length = self._length or length
        self.uneven |= length != self._length and not (length < self._length and order.end == marks.size)


def _int64(value: Any) -> int | None:
    """A number of bytes, as one or as the string that protobuf makes of it; None where it is neither."""
    if isinstance(value, str) and _INT64.fullmatch(value):
        value = int(value)
    return value if type(value) is int and 0 <= value <= MAX_DISK_SIZE else None


def _snake(key: str) -> str:
    """The name of a field in the schema: ``byteOffset`` is ``byte_offset``."""
    return re.sub("[A-Z]", lambda match: f"_{match[0].lower()}", key)
