"""`digest`: a short name for long data."""

from __future__ import annotations


def digest(data: bytes, size: int) -> bytes:
    """Returns the BLAKE2b digest of the data, of ``size`` bytes. Source: RFC 7693."""
    import hashlib  # takes longer to import than most commands take to do their work, and few need a digest

    return hashlib.blake2b(data, digest_size=size).digest()
