"""`Structure`: one record on disk. Its parser, builder, size and field offsets all follow from one declaration."""

from __future__ import annotations

import re
import struct
from collections import namedtuple
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import construct


class Field(NamedTuple):
    """Where a field lies inside its structure: ``offset`` and ``size`` in bytes."""

    name: str
    offset: int
    size: int


class Structure:
    """A fixed-size record of named fields.

    construct interprets the declaration only; `struct` reads and writes the bytes. For a directory of 65,535 entries
    construct itself needs a second, and its compiled parser a quarter of a second.

    Args:
        name: how messages and dumps call it.
        fields: declarations in order, ``"field" / construct.Type``. A type is ``Bytes(n)`` or an unsigned number. All
            numbers have one byte order: big-endian, or the machine's own where the record never leaves the machine.

    Attributes:
        size: bytes of the record.
        fields: where each field lies.

    Raises:
        TypeError: a field has another type, or the numbers have more than one byte order.
    """

    def __init__(self, name: str, *fields: Any) -> None:
        self.name = name
        declared = construct.Struct(*fields).subcons
        self.fields: list[Field] = []
        offset = 0
        for subcon in declared:
            self.fields.append(Field(str(subcon.name), offset, subcon.sizeof()))
            offset += subcon.sizeof()
        codes = [_code(subcon) for subcon in declared]
        orders = {order for order, _ in codes if order}
        if len(orders) > 1:
            raise TypeError(f"{name}: more than one byte order")
        self._struct = struct.Struct("".join([*(orders or ">"), *(code for _, code in codes)]))
        self._bytes = [(f.name, f.size) for f, subcon in zip(self.fields, declared, strict=True) if _is_bytes(subcon)]
        self._names = dict.fromkeys(field.name for field in self.fields).keys()
        self.size: int = self._struct.size

    @cached_property  # most commands use a few structures only, and making such a class takes 0.1 ms
    def _record(self) -> Any:
        return namedtuple("_".join(re.findall(r"\w+", self.name)), [field.name for field in self.fields])

    def parse(self, data: bytes | memoryview, offset: int = 0) -> Any:
        """Returns the record at byte ``offset`` of ``data``, as a named tuple of its fields.

        Raises:
            struct.error: ``data`` has fewer than ``size`` bytes from there on. Callers check that first.
        """
        return self._record._make(self._struct.unpack_from(data, offset))

    def unpack(self, data: bytes, offset: int = 0) -> tuple[Any, ...]:
        """Returns the same as a plain tuple, which is faster to make."""
        return self._struct.unpack_from(data, offset)

    def unpack_all(self, data: bytes) -> Iterator[tuple[Any, ...]]:
        """Returns the records in an array of them, as plain tuples.

        Raises:
            struct.error: ``data`` does not end with a whole record. Callers check that first.
        """
        return self._struct.iter_unpack(data)

    def build(self, **values: Any) -> bytes:
        """Returns the ``size`` bytes of a record with these field values.

        Raises:
            TypeError: a field has no value, or a value has no field.
            ValueError: a bytes value is not as long as its field.
            struct.error: a number is negative or too large for its field.
        """
        if values.keys() != self._names:
            raise TypeError(f"{self.name} has the fields {', '.join(self._names)}, not {', '.join(values)}")
        for name, size in self._bytes:  # `struct` would silently pad or cut them
            if len(values[name]) != size:
                raise ValueError(f"{self.name}.{name}: {len(values[name])} bytes, not {size}")
        return self._struct.pack(*map(values.__getitem__, self._names))

    def pack(self, *values: Any) -> bytes:
        """Returns the same for values in the order of the fields, which is faster; all of them numbers."""
        return self._struct.pack(*values)

    def field(self, name: str) -> Field:
        """Returns where the field of that name lies.

        Raises:
            StopIteration: there is no such field.
        """
        return next(field for field in self.fields if field.name == name)


def _is_bytes(subcon: Any) -> bool:
    return isinstance(subcon.subcon, construct.Bytes)


def _code(subcon: Any) -> tuple[str, str]:
    """Returns a field's byte order (empty for bytes) and its code, both as `struct` formats write them."""
    if _is_bytes(subcon):
        return "", f"{subcon.sizeof()}s"
    code = str(getattr(subcon.subcon, "fmtstr", None))
    if code[:1] not in (">", "=") or code[1:] not in ("B", "H", "L", "Q"):
        raise TypeError(f"{subcon.name}: neither an unsigned number nor bytes")
    return code[0], code[1]
