"""`Structure`: one on-disk record, declared once with construct; parser, builder, size and field map follow from it."""

from __future__ import annotations

import struct
from collections import namedtuple
from typing import Any, NamedTuple

import construct


class Field(NamedTuple):
    """Where a field lies inside its structure: ``offset`` and ``size`` in bytes."""

    name: str
    offset: int
    size: int


class Structure:
    """A fixed-size record of named fields.

    The declaration is construct's; what it comes to in a `struct.Struct` does the work, 50 times as fast.

    Args:
        name: what messages and dumps call it.
        fields: ``"field" / type`` in order; a type is ``Bytes(n)`` or an integer of construct's, all of one byte order.
    """

    def __init__(self, name: str, *fields: Any) -> None:
        self.name = name
        declaration: Any = construct.Struct(*fields)
        self.size: int = declaration.sizeof()
        self.fields: list[Field] = []
        # Bytes fields have to be exactly as long as declared: struct would cut them off or fill them up.
        self._lengths: dict[str, int] = {}
        offset, orders, codes = 0, set(), []
        for subcon in declaration.subcons:
            self.fields.append(Field(str(subcon.name), offset, subcon.sizeof()))
            offset += subcon.sizeof()
            if isinstance(subcon.subcon, construct.Bytes):
                codes.append(f"{subcon.sizeof()}s")
                self._lengths[str(subcon.name)] = subcon.sizeof()
            else:
                order, code = subcon.subcon.fmtstr
                orders.add(order)
                codes.append(code)
        if len(orders) > 1:
            raise TypeError(f"{name}: more than one byte order")
        self._packer = struct.Struct("".join([*(orders or ">"), *codes]))
        self._names = [field.name for field in self.fields]
        self._record: Any = namedtuple("Record", self._names)  # type: ignore[misc]

    def parse(self, data: bytes, offset: int = 0) -> Any:
        """The record at ``offset`` of ``data`` (which holds at least ``size`` bytes there), fields as attributes."""
        return self._record._make(self._packer.unpack_from(data, offset))

    def build(self, **values: Any) -> bytes:
        """The ``size`` bytes of a record with those field values.

        Raises:
            ValueError, struct.error: a value does not fit its field.
        """
        for name, length in self._lengths.items():
            if len(values[name]) != length:
                raise ValueError(f"{self.name}: {name} takes {length} bytes, not {len(values[name])}")
        return self._packer.pack(*(values[name] for name in self._names))

    def field(self, name: str) -> Field:
        """Where that field lies."""
        return next(field for field in self.fields if field.name == name)
