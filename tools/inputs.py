"""Documents that a user hands to a command: files, standard input and pipes, none of which is read without a limit."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from typing import BinaryIO

from dirtmap.fmt.errors import FormatError, StorageError

_HEAD = 1 << 16
# Some 50,000 actions; the decoder makes up to 50 bytes of one.
_MOST_DOCUMENT = 4 << 20


class Input:
    """A file that is read from its start to its end, once.

    Attributes:
        where: its name, for messages.
    """

    def __init__(self, file: BinaryIO, where: str) -> None:
        self.where = where
        self._file = file
        self._head = b""
        self._left: int | None = None
        self._limit = 0

    def head(self) -> bytes:
        """The first 64 KiB, or what there is; they are read again by `read`."""
        if not self._head:
            self._head = self._take(_HEAD)
        return self._head

    def limit(self, most: int) -> None:
        """Allows that many bytes in all; of a file on disk its size is held against that at once.

        Raises:
            FormatError: it is longer.
        """
        self._limit = self._left = most
        with contextlib.suppress(OSError, AttributeError, ValueError):
            status = os.fstat(self._file.fileno())
            if stat.S_ISREG(status.st_mode) and status.st_size > most:
                raise self._too_long()

    def read(self, most: int) -> bytes:
        """That many bytes, or fewer at the end; none behind it.

        Raises:
            FormatError: longer than allowed.
            StorageError: it cannot be read.
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
    """A file, ``-`` being standard input.

    Raises:
        StorageError: it cannot be opened.
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
    """All of a small document, and its name for messages.

    Raises:
        FormatError: it is longer than 4 MiB.
        StorageError: it cannot be read.
    """
    with open_input(path) as source:
        source.limit(_MOST_DOCUMENT)
        return b"".join(iter(lambda: source.read(_MOST_DOCUMENT), b"")), source.where
