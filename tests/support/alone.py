"""What only one test of this machine may do at a time, whichever process runs it."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def alone(name: str) -> Iterator[None]:
    """Waits until no other process of this user is inside a block of that name, in this run of the tests or another."""
    path = os.path.join(tempfile.gettempdir(), f"dirtmap-tests-{os.geteuid()}-{name}.lock")
    fd = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
