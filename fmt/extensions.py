"""The header-extension chain that qcow2 and the store share: type, length, data padded to 8 bytes, ... end marker.

    start                                                                limit
      | type | length | data ... | pad | type | length | data | 0 | 0 | ... |
      |<---------- extension --------->|<---- extension ----->|<-end->|

Source: docs/interop/qcow2.txt, "Header extensions". A type is a u32, so is a length (bytes of data without padding).
"""

from __future__ import annotations

from typing import NamedTuple

from dirtmap.fmt.geometry import align_up

END = 0
HEAD_SIZE = 8  # bytes of a type and a length
END_MARKER = END.to_bytes(4, "big") + bytes(4)


class Extension(NamedTuple):
    """One header extension as found: ``offset`` of its head in bytes from the start of the file, ``data`` unpadded."""

    type: int
    offset: int
    data: bytes

    @property
    def data_offset(self) -> int:
        """Where the data begins, in bytes from the start of the file."""
        return self.offset + HEAD_SIZE

    @property
    def end(self) -> int:
        """Where the next extension begins."""
        return align_up(self.data_offset + len(self.data), 8)


class Chain(NamedTuple):
    """A parsed chain.

    Attributes:
        extensions: in their order on disk.
        end: offset of the end marker, or of the first byte that is not part of the chain where there is no marker.
        terminated: True where an end marker was found.
        fault: why parsing stopped early, or None.
    """

    extensions: list[Extension]
    end: int
    terminated: bool
    fault: str | None
