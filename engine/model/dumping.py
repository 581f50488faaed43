"""What all dumps share: how structures, their fields and the entries of a table are shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dirtmap.fmt.qcow2 import feature_text
from dirtmap.fmt.structure import Structure

MOST_RUNS = 4096  # of one table; a hostile table could have millions

# For each field of flags, what its bits are called.
Flags = Mapping[str, dict[int, str]]


class Shown:
    """Structures as a dump shows them.

    Args:
        with_hex: each also gets ``hex``, its bytes.
        flags: how to call the bits of fields.

    Attributes:
        structures: a list of ``name``, ``offset`` (None: not known), ``length`` (bytes), and ``fields`` or ``runs``.
    """

    def __init__(self, with_hex: bool, flags: Flags) -> None:
        self.with_hex, self._flags = with_hex, flags
        self.structures: list[dict[str, Any]] = []

    def add(self, name: str, offset: int | None, raw: bytes, **content: Any) -> None:
        """One structure whose content is known."""
        place = None if offset is None else int(offset)
        structure = {"name": name, "offset": place, "length": len(raw), **content}
        if self.with_hex:
            structure["hex"] = raw.hex()
        self.structures.append(structure)

    def record(self, structure: Structure, offset: int, raw: bytes, name: str | None = None) -> None:
        """One declared structure, field by field."""
        raw = raw[: structure.size]
        if len(raw) < structure.size:
            self.add(name or structure.name, offset, raw, fields=[], note="cut short by the end of the file")
            return
        self.add(name or structure.name, offset, raw, fields=self.fields(structure, offset, raw))

    def fields(self, structure: Structure, offset: int, raw: bytes) -> list[dict[str, Any]]:
        """The fields of a declared structure, each with its value and, where there is one, its meaning."""
        found = []
        for field, value in zip(structure.fields, structure.parse(raw), strict=True):
            shown = {"name": field.name, "offset": int(offset) + field.offset, "length": field.size}
            shown["value"] = value.hex() if isinstance(value, bytes) else value
            if field.name in self._flags and value:
                shown["meaning"] = ", ".join(feature_text(value, self._flags[field.name]))
            elif field.name == "bucket_bits" and value < 64:
                shown["meaning"] = f"{1 << value} buckets"
            elif field.name.endswith("_bits") and value < 64:
                shown["meaning"] = f"{1 << value} bytes"
            elif field.name == "refcount_order" and value < 8:
                shown["meaning"] = f"{1 << value} bits"
            found.append(shown)
        return found


def text(name: str, offset: int, raw: bytes, length: int | None = None) -> dict[str, Any]:
    """A field that holds text; bytes that are not UTF-8 are escaped."""
    value = raw.decode("utf-8", "backslashreplace")
    return {"name": name, "offset": int(offset), "length": len(raw) if length is None else length, "value": value}


def data(name: str, offset: int, raw: bytes) -> dict[str, Any]:
    """A field of bytes without a declared meaning: the first 64 of them, in hexadecimal."""
    return {"name": name, "offset": int(offset), "length": len(raw), "value": raw[:64].hex()}
