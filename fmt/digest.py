"""Checksums, and `digest`: a short name for long data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import google_crc32c

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# The CRC32C of bytes. It looks at them where they are, but takes no other buffer than an array.
# Source: RFC 3720, section 12.1.
crc32c: Callable[[bytes | NDArray[np.uint8]], int] = google_crc32c.value
# The same, of what had the CRC32C that is the first argument and of the bytes behind it, the second.
crc32c_after: Callable[[int, bytes], int] = google_crc32c.extend


def digest(data: bytes, size: int) -> bytes:
    """Returns the BLAKE2b digest of the data, of ``size`` bytes. Source: RFC 7693."""
    # Where hashlib has it from. What hashlib imports beside it, OpenSSL, takes 3 ms, and many a command needs a digest.
    try:
        from _blake2 import blake2b
    except ImportError:  # another Python keeps it elsewhere
        from hashlib import blake2b

    return blake2b(data, digest_size=size).digest()
