"""Records on disk, and the same with some of their fields changed."""

from __future__ import annotations

from typing import Any

from dirtmap.fmt.structure import AnyStructure


def values_of(structure: AnyStructure, raw: bytes | bytearray, offset: int = 0) -> dict[str, Any]:
    """The fields of the record that lies there."""
    return dict(zip((field.name for field in structure.fields), structure.unpack(raw, offset), strict=True))


def changed(structure: AnyStructure, raw: bytes | bytearray, offset: int = 0, /, **fields: Any) -> bytes:
    """The bytes of the record that lies there, with other values in these fields."""
    return structure.build(**{**values_of(structure, raw, offset), **fields})
