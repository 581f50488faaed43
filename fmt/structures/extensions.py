"""The structure of a header extension's head; parsing and building of extension chains."""

from __future__ import annotations

from collections.abc import Iterable

from construct import Int32ub

from dirtmap.fmt.extensions import END, END_MARKER, Chain, Extension
from dirtmap.fmt.geometry import align_up
from dirtmap.fmt.structure import Structure

EXTENSION_HEAD = Structure("extension", "type" / Int32ub, "length" / Int32ub)


def parse_chain(data: bytes, start: int, limit: int) -> Chain:
    """Parses the chain in ``data[start:limit]``. The offsets in the result are offsets in ``data``.

    A chain may run exactly up to the limit, or be padded past it, without an end marker. QEMU accepts that, and refuses
    one that leaves less room than an extension's head takes (block/qcow2.c, qcow2_read_extensions).
    A chain that is not sound is no exception: the result has the extensions before the `Chain.fault`.
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
