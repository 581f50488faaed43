"""`Structure`: how one record on disk is parsed and built. Those of each format are in `dirtmap.fmt.parsers`."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, ParamSpec, TypeAlias, TypeVar

_Values = ParamSpec("_Values")
_Record = TypeVar("_Record")


class Field(NamedTuple):
    """Where a field lies inside its structure: ``offset`` and ``size`` in bytes."""

    name: str
    offset: int
    size: int


class Structure(Generic[_Values, _Record]):
    """A fixed-size record of named fields, which are unsigned numbers or bytes.

    `dirtmap.fmt.generate` writes the calls of this constructor; who calls it otherwise is a test.

    Attributes:
        name: how messages and dumps call it.
        size: bytes of the record.
        fields: where each field lies, in order.
        build: returns the ``size`` bytes of a record. It takes the value of every field by name, and raises `TypeError`
            where a field has no value or a value no field, `ValueError` where bytes are not as long as their field, and
            `struct.error` where a number is negative or too large.
        pack: the same for values in the order of the fields, which is faster; all of them numbers.
        unpack: returns the record at a byte offset (0 if none is given) of some data, as a plain tuple. It raises
            `struct.error` where less than ``size`` bytes are left, which callers check first.
        unpack_all: iterates over the records in an array of them, as plain tuples. It raises `struct.error` where the
            last one is cut short, which callers check first.
    """

    def __init__(
        self,
        name: str,
        code: struct.Struct,
        record: Callable[..., _Record],
        build: Callable[_Values, bytes],
        *fields: Field,
    ) -> None:
        self.name = name
        self.size = code.size
        self.fields = fields
        self.build = build
        self.pack: Callable[..., bytes] = code.pack
        self.unpack: Callable[..., tuple[Any, ...]] = code.unpack_from
        self.unpack_all: Callable[[bytes], Iterator[tuple[Any, ...]]] = code.iter_unpack
        self._record = record

    def parse(self, data: bytes | memoryview, offset: int = 0) -> _Record:
        """Returns the record at byte ``offset`` of ``data``, with an attribute for each field.

        Raises:
            struct.error: ``data`` has fewer than ``size`` bytes from there on. Callers check that first.
        """
        return self._record(*self.unpack(data, offset))

    def field(self, name: str) -> Field:
        """Returns where the field of that name lies.

        Raises:
            StopIteration: there is no such field.
        """
        return next(field for field in self.fields if field.name == name)


AnyStructure: TypeAlias = "Structure[..., Any]"
