"""`Structure`: one on-disk record, declared once with construct; parser, builder, size and field map follow from it."""

from __future__ import annotations

import re
import struct
from collections import namedtuple
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

    construct reads the declaration, `struct` the bytes: a directory of 65,535 entries takes construct a second, and a
    compiled one a quarter of that.

    Args:
        name: what messages and dumps call it.
        fields: ``"field" / construct.Type`` declarations, in order: ``Bytes(n)``, and unsigned numbers, all of them
            big-endian, or, for what never leaves the machine, all of them in its own byte order.

    Raises:
        TypeError: a field of another type, or of another byte order than those before.
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
        """The record at ``offset`` of ``data``, a named tuple of its fields.

        Raises:
            struct.error: fewer than ``size`` bytes are there; callers look first.
        """
        return self._record._make(self._struct.unpack_from(data, offset))

    def unpack(self, data: bytes, offset: int = 0) -> tuple[Any, ...]:
        """The same as a bare tuple, for who reads millions."""
        return self._struct.unpack_from(data, offset)

    def build(self, **values: Any) -> bytes:
        """The ``size`` bytes of a record with those field values.

        Raises:
            TypeError: a field has no value, or a value no field.
            ValueError: bytes are not as long as their field.
            struct.error: a number is negative or does not fit its field.
        """
        if values.keys() != self._names:
            raise TypeError(f"{self.name} has the fields {', '.join(self._names)}, not {', '.join(values)}")
        for name, size in self._bytes:  # `struct` would pad or cut them
            if len(values[name]) != size:
                raise ValueError(f"{self.name}.{name}: {len(values[name])} bytes, not {size}")
        return self._struct.pack(*map(values.__getitem__, self._names))

    def field(self, name: str) -> Field:
        """Where that field lies."""
        return next(field for field in self.fields if field.name == name)


def _is_bytes(subcon: Any) -> bool:
    return isinstance(subcon.subcon, construct.Bytes)


def _code(subcon: Any) -> tuple[str, str]:
    """A field's byte order, empty for bytes, and its code in a format of `struct`."""
    if _is_bytes(subcon):
        return "", f"{subcon.sizeof()}s"
    code = str(getattr(subcon.subcon, "fmtstr", None))
    if code[:1] not in (">", "=") or code[1:] not in ("B", "H", "L", "Q"):
        raise TypeError(f"{subcon.name}: neither an unsigned number nor bytes")
    return code[0], code[1]
