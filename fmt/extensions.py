"""The header-extension chain that qcow2 and the store share: type, length, data padded to 8 bytes, ... end marker.

    start                                                                limit
      | type | length | data ... | pad | type | length | data | 0 | 0 | ... |
      |<---------- extension --------->|<---- extension ----->|<-end->|

Source: docs/interop/qcow2.txt, "Header extensions". A type is a u32, so is a length (bytes of data without padding).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from construct import Int32ub

from dirtmap.fmt.geometry import align_up
from dirtmap.fmt.structure import Structure

END = 0
EXTENSION_HEAD = Structure("extension", "type" / Int32ub, "length" / Int32ub)
END_MARKER = EXTENSION_HEAD.build(type=END, length=0)


class Extension(NamedTuple):
    """One header extension as found: ``offset`` of its head in bytes from the start of the file, ``data`` unpadded."""

    type: int
    offset: int
    data: bytes

    @property
    def data_offset(self) -> int:
        """Where the data begins, in bytes from the start of the file."""
        return self.offset + EXTENSION_HEAD.size

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


def parse_chain(data: bytes, start: int, limit: int) -> Chain:
    """Parses the chain in ``data[start:limit]``; offsets are those in ``data``.

    QEMU accepts a chain that runs exactly up to the limit, or is padded past it, without an end marker, and refuses one
    that leaves less room than an extension's head takes (block/qcow2.c, qcow2_read_extensions). So do we.
    """
    extensions: list[Extension] = []
    at = start
    while at < limit:
        if at + EXTENSION_HEAD.size > limit:
            what = f"an extension would begin at byte {at}, {limit - at} bytes before their end"
            return Chain(extensions, at, False, what)
        head = EXTENSION_HEAD.parse(data, at)
        kind, length = head.type, head.length
        body = at + EXTENSION_HEAD.size
        if length > limit - body:  # QEMU judges an end marker by that as well
            return Chain(extensions, at, False, f"extension {kind:#010x} of {length} bytes ends past byte {limit}")
        if kind == END:
            return Chain(extensions, at, True, None)
        extensions.append(Extension(kind, at, data[body : body + length]))
        at = align_up(body + length, 8)
    return Chain(extensions, at, False, None)


def build_extension(kind: int, data: bytes) -> bytes:
    """One extension, padded with zeros to a multiple of 8 bytes."""
    return EXTENSION_HEAD.build(type=kind, length=len(data)) + data.ljust(align_up(len(data), 8), b"\0")


def build_chain(extensions: Iterable[tuple[int, bytes]]) -> bytes:
    """A whole chain of (type, data), with its end marker."""
    return b"".join(build_extension(kind, data) for kind, data in extensions) + END_MARKER
