"""The structure of a header extension's head."""

from __future__ import annotations

from construct import Int32ub, Struct

EXTENSION_HEAD = "extension" / Struct("type" / Int32ub, "length" / Int32ub)
