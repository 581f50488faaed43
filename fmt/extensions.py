"""The chain of header extensions, which qcow2 images and stores share.

Each extension is a type, a length, and data padded to 8 bytes. An end marker follows the last one.

    start                                                                limit
      | type | length | data ... | pad | type | length | data | 0 | 0 | ... |
      |<---------- extension --------->|<---- extension ----->|<-end->|

Type and length are u32; the length is in bytes and does not count the padding.
Source: docs/interop/qcow2.txt, "Header extensions".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from dirtmap.fmt.geometry import align_up
from dirtmap.fmt.parsers.extensions import EXTENSION_HEAD

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


def parse_chain(data: bytes, start: int, limit: int) -> Chain:
    """Parses the chain in ``data[start:limit]``. The offsets in the result are offsets in ``data``.

    A chain may run exactly up to the limit, or be padded past it, without an end marker. QEMU accepts that, and refuses
    one that leaves less room than an extension's head takes (block/qcow2.c, qcow2_read_extensions).
    A chain that is not sound is no exception: the result has the extensions before the `Chain.fault`.
    """
    extensions: list[Extension] = []
    at = start
    while at < limit:
        body = at + HEAD_SIZE
        if body > limit:
            what = f"an extension would begin at byte {at}, {limit - at} bytes before their end"
            return Chain(extensions, at, False, what)
        kind, length = EXTENSION_HEAD.unpack(data, at)
        if length > limit - body:  # QEMU checks that for an end marker, too
            return Chain(extensions, at, False, f"extension {kind:#010x} of {length} bytes ends past byte {limit}")
        if kind == END:
            return Chain(extensions, at, True, None)
        extensions.append(Extension(kind, at, data[body : body + length]))
        at = align_up(body + length, 8)
    return Chain(extensions, at, False, None)


def build_extension(kind: int, data: bytes) -> bytes:
    """Returns the bytes of one extension, padded with zeros to a multiple of 8 bytes."""
    return EXTENSION_HEAD.build(type=kind, length=len(data)) + data.ljust(align_up(len(data), 8), b"\0")


def build_chain(extensions: Iterable[tuple[int, bytes]]) -> bytes:
    """Returns the bytes of a whole chain, given as (type, data), with its end marker."""
    return b"".join(build_extension(kind, data) for kind, data in extensions) + END_MARKER
