"""`Structure`: one on-disk record, declared once with construct; parser, builder, size and field map follow from it."""

from __future__ import annotations

from typing import Any, NamedTuple

import construct

# An interpreted parse takes about 12 µs more than a compiled one, compiling about 1.5 ms: a command that looks
# at one image never earns the compilation back, one that looks at a thousand does.
_COMPILE_AFTER = 128


class Field(NamedTuple):
    """Where a field lies inside its structure: ``offset`` and ``size`` in bytes."""

    name: str
    offset: int
    size: int


class Structure:
    """A fixed-size record of named fields.

    Args:
        name: what messages and dumps call it.
        fields: ``"field" / construct.Type`` declarations, in order, each of a fixed size.
    """

    def __init__(self, name: str, *fields: Any) -> None:
        self.name = name
        self._declaration = construct.Struct(*fields)
        self._parser: Any = self._declaration
        self._parsed = 0
        self.size: int = self._declaration.sizeof()
        self.fields: list[Field] = []
        offset = 0
        for subcon in self._declaration.subcons:
            self.fields.append(Field(str(subcon.name), offset, subcon.sizeof()))
            offset += subcon.sizeof()

    def parse(self, data: bytes, offset: int = 0) -> Any:
        """The record at ``offset`` of ``data`` (which holds at least ``size`` bytes there), fields as attributes."""
        self._parsed += 1
        if self._parsed == _COMPILE_AFTER:
            self._parser = self._declaration.compile()
        return self._parser.parse(data[offset : offset + self.size])

    def build(self, **values: Any) -> bytes:
        """The ``size`` bytes of a record with those field values."""
        return self._declaration.build(values)

    def field(self, name: str) -> Field:
        """Where that field lies."""
        return next(field for field in self.fields if field.name == name)
