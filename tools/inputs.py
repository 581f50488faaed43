"""Documents that a user hands to a command."""

from __future__ import annotations

import sys

from dirtmap.fmt.errors import StorageError


def read_input(path: str) -> tuple[bytes, str]:
    """All of a file, ``-`` being standard input, and its name for messages.

    Raises:
        StorageError: it cannot be read.
    """
    name = "standard input" if path == "-" else path
    try:
        if path == "-":
            return sys.stdin.buffer.read(), name
        with open(path, "rb") as file:
            return file.read(), name
    except OSError as error:
        raise StorageError(name, f"read: {error.strerror or error}") from error
