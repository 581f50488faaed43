"""What all dumps share: how they show structures, their fields and the entries of a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dirtmap.fmt.qcow2 import feature_text
from dirtmap.fmt.structure import AnyStructure

MOST_RUNS = 4096  # of one table; a hostile table could have millions

# For each flags field, the names of its bits.
Flags = Mapping[str, dict[int, str]]


class Shown:
    """Collects structures in the form in which a dump shows them.

    Args:
        with_hex: whether each structure also gets ``hex``, its bytes in hexadecimal.
        flags: for each flags field, the names of its bits.

    Attributes:
        structures: dicts of ``name``, ``offset`` (bytes; None if unknown), ``length`` (bytes), ``fields`` or ``runs``.
    """

    def __init__(self, with_hex: bool, flags: Flags) -> None:
        self.with_hex, self._flags = with_hex, flags
        self.structures: list[dict[str, Any]] = []

    def add(self, name: str, offset: int | None, raw: bytes, **content: Any) -> None:
        """Adds a structure whose content is given as keywords, such as ``fields`` or ``runs``."""
        place = None if offset is None else int(offset)
        structure = {"name": name, "offset": place, "length": len(raw), **content}
        if self.with_hex:
            structure["hex"] = raw.hex()
        self.structures.append(structure)

    def record(self, structure: AnyStructure, offset: int, raw: bytes, name: str | None = None) -> None:
        """Adds a declared structure, field by field; without fields if the end of the file cuts it short."""
        raw = raw[: structure.size]
        if len(raw) < structure.size:
            self.add(name or structure.name, offset, raw, fields=[], note="cut short by the end of the file")
            return
        self.add(name or structure.name, offset, raw, fields=self.fields(structure, offset, raw))

    def fields(self, structure: AnyStructure, offset: int, raw: bytes) -> list[dict[str, Any]]:
        """The fields of a declared structure. Each has its value, and a meaning where one is known."""
        found = []
        for field, value in zip(structure.fields, structure.unpack(raw), strict=True):
            shown = {"name": field.name, "offset": int(offset) + field.offset, "length": field.size}
            shown["value"] = value.hex() if isinstance(value, bytes) else value
            if field.name in self._flags and value:
                shown["meaning"] = ", ".join(feature_text(value, self._flags[field.name]))
            elif field.name.endswith("_bits") and value < 64:
                shown["meaning"] = f"{1 << value} bytes"
            elif field.name == "refcount_order" and value < 8:
                shown["meaning"] = f"{1 << value} bits"
            found.append(shown)
        return found


def text(name: str, offset: int, raw: bytes, length: int | None = None) -> dict[str, Any]:
    """A text field. Bytes that are not UTF-8 are escaped."""
    value = raw.decode("utf-8", "backslashreplace")
    return {"name": name, "offset": int(offset), "length": len(raw) if length is None else length, "value": value}


def data(name: str, offset: int, raw: bytes) -> dict[str, Any]:
    """A field of bytes without a declared meaning, shown as its first 64 bytes in hexadecimal."""
    return {"name": name, "offset": int(offset), "length": len(raw), "value": raw[:64].hex()}
