"""How the structures of `dirtmap.fmt.structures.extensions` are parsed and built.

Made by `make parsers`: do not edit.
"""

from __future__ import annotations

from struct import Struct

from dirtmap.fmt.structure import Field, Structure

_extension_head = Struct(">LL")


class RawExtensionHead:
    """The fields of a structure: extension."""

    __slots__ = (
        "type",
        "length",
    )

    def __init__(
        self,
        type: int,
        length: int,
    ) -> None:
        self.type = type
        self.length = length


def _build_extension_head(
    *,
    type: int,
    length: int,
) -> bytes:
    return _extension_head.pack(
        type,
        length,
    )


EXTENSION_HEAD = Structure(
    "extension",
    _extension_head,
    RawExtensionHead,
    _build_extension_head,
    Field("type", 0, 4),
    Field("length", 4, 4),
)
