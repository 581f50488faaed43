"""Memory for arrays, without numpy; also for large ones of which little is used."""

from __future__ import annotations

import contextlib
import mmap

_TINY = 1 << 20  # bytes: so much is cleared at once
SMALL = 64 << 20  # bytes: so much may take memory, as it is several times as fast in huge pages


def zeros(length: int) -> memoryview:
    """``length`` zero bytes, to be written to; of many, each page takes memory once it is written to.

    Raises:
        MemoryError: the system has no room for them.
    """
    return memoryview(bytearray(length) if length <= _TINY else sparse(length))


def words(octets: memoryview, nbits: int) -> memoryview:
    """The same memory as words, each a uint64; bits behind the last of ``nbits`` are made zero."""
    found = octets.cast("Q")
    if nbits % 64:
        found[-1] &= (1 << nbits % 64) - 1
    return found


def sparse(length: int) -> mmap.mmap:
    """``length`` zero bytes, at least one; where they are many, each 4 KiB take memory once they are written to.

    numpy asks for huge pages, so that a hundred bits set in an array of 512 MiB would take 200 MiB.

    Raises:
        MemoryError: the system has no room for them.
    """
    try:
        memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        raise MemoryError from None
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE if length > SMALL else mmap.MADV_HUGEPAGE)
    return memory
