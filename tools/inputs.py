"""Reads documents that a user gives to a command: files, standard input and pipes, none of them without a limit."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from typing import BinaryIO

from dirtmap.fmt.errors import FormatError, StorageError

_HEAD = 1 << 16
# Enough for some 50,000 actions. The JSON decoder takes up to 50 bytes of memory for each byte.
_MOST_DOCUMENT = 4 << 20


class Input:
    """A file that is read once, from start to end.

    Attributes:
        where: its name in messages.
    """

    def __init__(self, file: BinaryIO, where: str) -> None:
        self.where = where
        self._file = file
        self._head = b""
        self._left: int | None = None
        self._limit = 0

    def head(self) -> bytes:
        """The first 64 KiB, or less if the file is shorter. `read` returns them again."""
        if not self._head:
            self._head = self._take(_HEAD)
        return self._head

    def limit(self, most: int) -> None:
        """Sets the most bytes that may be read in all. Compares the size of a regular file with that at once.

        Raises:
            FormatError: the file is longer.
        """
        self._limit = self._left = most
        with contextlib.suppress(OSError, AttributeError, ValueError):
            status = os.fstat(self._file.fileno())
            if stat.S_ISREG(status.st_mode) and status.st_size > most:
                raise self._too_long()

    def read(self, most: int) -> bytes:
        """The next bytes, at most ``most`` (the first 64 KiB at once after `head`); none at the end.

        Raises:
            FormatError: the file is longer than allowed.
            StorageError: the file cannot be read.
        """
        assert self._left is not None, "no limit was set"
        if self._head:
            data, self._head = self._head, b""
        else:
            data = self._take(min(most, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise self._too_long()
        return data

    def _take(self, most: int) -> bytes:
        try:
            return self._file.read(most)
        except OSError as error:
            raise StorageError(self.where, f"read: {error.strerror or error}", error.errno) from error

    def _too_long(self) -> FormatError:
        return FormatError(self.where, f"longer than {self._limit} bytes, the most that is read here")


@contextlib.contextmanager
def open_input(path: str) -> Iterator[Input]:
    """Opens a file; ``-`` is standard input.

    Raises:
        StorageError: the file cannot be opened.
    """
    if path == "-":
        yield Input(sys.stdin.buffer, "standard input")
        return
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb"))
        except OSError as error:
            raise StorageError(path, f"read: {error.strerror or error}", error.errno) from error
        yield Input(file, path)


def read_document(path: str) -> tuple[bytes, str]:
    """The whole of a small document, and its name in messages.

    Raises:
        FormatError: the document is longer than 4 MiB.
        StorageError: the document cannot be read.
    """
    with open_input(path) as source:
        source.limit(_MOST_DOCUMENT)
        return b"".join(iter(lambda: source.read(_MOST_DOCUMENT), b"")), source.where
