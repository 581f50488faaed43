"""Memory for large arrays of which little is used."""

from __future__ import annotations

import mmap


def sparse(length: int) -> mmap.mmap:
    """``length`` zero bytes, at least one, of which each 4 KiB take memory only once they are written to.

    numpy asks for huge pages, so that a hundred bits set in an array of 512 MiB would take 200 MiB.

    Raises:
        MemoryError: the system has no room for them.
    """
    try:
        memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    except OSError:
        raise MemoryError from None
    return memory
