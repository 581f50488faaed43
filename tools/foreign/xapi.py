"""The answer of XAPI's ``VDI.list_changed_blocks``: a bitmap in base64, as ``xe vdi-list-changed-blocks`` prints it.

A bit stands for 64 KiB, the most significant one of each byte for the first of its blocks.

Source: XenServer's Changed Block Tracking Developer Guide ("each bit in the bitmap indicates whether a 64 kB block
in the VDI has been changed"), and ``list_changed_blocks`` in drivers/VDI.py of xapi-project/sm, which reverses the bits
of each byte that tapdisk has written least significant first. Nothing in the text says what it is, and a bitmap in
another order looks the same; so this format has to be asked for by name.
"""

from __future__ import annotations

import binascii
from typing import TYPE_CHECKING

from dirtmap.fmt.errors import FormatError, counted
from dirtmap.tools.foreign.marks import Marks
from dirtmap.tools.inputs import Input

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_BLOCK = 1 << 16
_BLANKS = b" \t\r\n"
_CHUNK = 1 << 20


def read(source: Input, marks: Marks) -> None:
    """Marks the blocks whose bits are set.

    Raises:
        FormatError: not base64, of a disk of another size, or bits behind its end are set.
    """
    import numpy as np

    blocks = -(-marks.size // _BLOCK)
    least = -(-blocks // 8)
    most = -(-least // 8) * 8  # tapdisk keeps it in words of 64 bits
    source.limit(-(-most // 3) * 4 + _CHUNK)  # and blanks around it
    text = b"".join(iter(lambda: source.read(_CHUNK), b"")).strip(_BLANKS)
    try:
        data = binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:
        raise FormatError(source.where, f"not base64: {error}") from error
    if not least <= len(data) <= most:
        given = counted(len(data), "byte")
        what = f"a bitmap of {given}, but a disk of {marks.size} bytes takes {least} at a bit for 64 KiB"
        raise FormatError(source.where, what)
    for begin in range(0, len(data), _CHUNK):
        bits = np.unpackbits(np.frombuffer(data, np.uint8)[begin : begin + _CHUNK])
        first, last = _runs(bits)
        first, last = first + begin * 8, last + begin * 8
        if len(last) and last[-1] > blocks:
            raise FormatError(source.where, f"bits behind the last of {blocks} blocks are set")
        for offset, end in zip((first * _BLOCK).tolist(), (last * _BLOCK).tolist(), strict=True):
            marks.add(offset, min(end, marks.size) - offset)


def _runs(bits: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where runs of ones begin, and where each has ended."""
    import numpy as np

    edges = np.diff(bits.astype(np.int8), prepend=0, append=0)
    return np.flatnonzero(edges == 1).astype(np.int64), np.flatnonzero(edges == -1).astype(np.int64)
