"""Sizes as users write and read them."""

from __future__ import annotations

import re

from dirtmap.fmt.geometry import MAX_DISK_SIZE

_SIZE = re.compile("0*([0-9]+)(k|[KMGTP](?:iB)?)?|0x0*([0-9A-Fa-f]+)")
_SHIFTS = {"k": 10, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50}
_MOST_DIGITS = len(str(MAX_DISK_SIZE))


def parse_size(text: str) -> int:
    """A size in bytes: ASCII digits, perhaps with a unit (k K M G T P or KiB to PiB, ×1024); or 0x and hex digits.

    So it reads every size in whole units, and every offset, that dirtmap itself prints.

    Raises:
        ValueError: the text is anything else, or more than 2**63 - 1.
    """
    match = _SIZE.fullmatch(text)
    if not match:
        raise ValueError(f"'{text}' is not a size: digits, or digits and one of k K M G T P KiB .. PiB (×1024), or 0x")
    digits, unit, hexadecimal = match.groups()
    if len(digits or hexadecimal) <= _MOST_DIGITS:
        size = int(hexadecimal, 16) if digits is None else int(digits) << _SHIFTS.get((unit or "")[:1], 0)
        if size <= MAX_DISK_SIZE:
            return size
    raise ValueError(f"'{text}' is more than 2^63-1 bytes")


def human_share(part: int, whole: int) -> str:
    """A percentage. A small share that is not zero does not show as zero. Empty if the whole is zero."""
    if not whole:
        return ""
    return "<0.1%" if 0 < part < whole / 1000 else f"{min(100.0, 100.0 * part / whole):.1f}%"


def human_size(size: int) -> str:
    """A size in about three digits and a unit, such as ``9.3 GiB``. It is exact if it has no decimal point."""
    for shift, unit in ((60, "EiB"), (50, "PiB"), (40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        whole, rest = divmod(size, 1 << shift)
        if whole:
            return f"{size / (1 << shift):.1f} {unit}" if rest else f"{whole} {unit}"
    return f"{size} B"
