"""The chain of header extensions, which qcow2 images and stores share.

Each extension is a type, a length, and data padded to 8 bytes. An end marker follows the last one.

    start                                                                limit
      | type | length | data ... | pad | type | length | data | 0 | 0 | ... |
      |<---------- extension --------->|<---- extension ----->|<-end->|

Type and length are u32; the length is in bytes and does not count the padding.
Source: docs/interop/qcow2.txt, "Header extensions".
"""

from __future__ import annotations

from typing import NamedTuple

from dirtmap.fmt.geometry import align_up

END = 0
HEAD_SIZE = 8  # bytes of a type and a length
END_MARKER = END.to_bytes(4, "big") + bytes(4)


class Extension(NamedTuple):
    """One header extension as found.

    Attributes:
        type: which kind of extension it is.
        offset: where its head begins, in bytes from the start of the file.
        data: its data without padding.
    """

    type: int
    offset: int
    data: bytes

    @property
    def data_offset(self) -> int:
        """Where the data begins, in bytes from the start of the file."""
        return self.offset + HEAD_SIZE

    @property
    def end(self) -> int:
        """Where the next extension begins, in bytes from the start of the file."""
        return align_up(self.data_offset + len(self.data), 8)


class Chain(NamedTuple):
    """A parsed chain.

    Attributes:
        extensions: in their order on disk.
        end: offset of the end marker. If there is no marker: of the first byte that is not part of the chain.
        terminated: True if an end marker was found.
        fault: why parsing stopped early, or None.
    """

    extensions: list[Extension]
    end: int
    terminated: bool
    fault: str | None
