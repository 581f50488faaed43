"""`Spool`: a file without a name, for what is too much for memory. Nothing of it is left when its process has ended."""

from __future__ import annotations

import os
import tempfile

from dirtmap.engine.system.file import FAILURES, failure


class Spool:
    """Bytes at any place; those that nobody has written are zeros.

    Args:
        folder: on the disk that is to have them.

    Raises:
        StorageError: there can be no file.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  see `close`
        except FAILURES as error:
            raise failure(folder, "temporary file", error) from error

    def write(self, offset: int, data: bytes) -> None:
        """Writes all of the data.

        Raises:
            StorageError: there is no room for them.
        """
        view = memoryview(data)
        try:
            while view:
                done = os.pwrite(self._file.fileno(), view, offset)
                view, offset = view[done:], offset + done
        except FAILURES as error:
            raise failure(self._folder, "temporary file", error) from error

    def read(self, offset: int, length: int) -> bytearray:
        """So many bytes. Errors as `write`."""
        data, done = bytearray(length), 0
        try:
            while done < length and (step := os.preadv(self._file.fileno(), [memoryview(data)[done:]], offset + done)):
                done += step
        except FAILURES as error:
            raise failure(self._folder, "temporary file", error) from error
        return data

    def close(self) -> None:
        """Gives it up."""
        self._file.close()
