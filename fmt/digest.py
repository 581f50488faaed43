"""Checksums, and `digest`: a short name for long data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dirtmap.fmt import _crc32c

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# The CRC32C of bytes, an array or whatever else has its bytes in one piece, which are looked at where they are.
# Source: RFC 3720, section 12.1.
crc32c = _crc32c.crc32c
# The same, of what had the CRC32C that is the first argument and of the bytes behind it, the second.
crc32c_after = _crc32c.crc32c_after


def crc32c_each(data: memoryview, size: int, sums: NDArray[np.int64]) -> None:
    """Fills ``sums`` with the CRC32C of each ``size`` bytes of the data: several at once, which is faster by far.

    Raises:
        ValueError: the data are not as long as that.
    """
    _crc32c.crc32c_each(data, size, sums)


def digest(data: bytes, size: int) -> bytes:
    """Returns the BLAKE2b digest of the data, of ``size`` bytes. Source: RFC 7693."""
    # Where hashlib has it from. What hashlib imports beside it, OpenSSL, takes 3 ms, and many a command needs a digest.
    try:
        from _blake2 import blake2b
    except ImportError:  # another Python keeps it elsewhere
        from hashlib import blake2b

    return blake2b(data, digest_size=size).digest()
