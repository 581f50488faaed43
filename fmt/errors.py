"""The exceptions: one base class, and one class for each situation that a caller handles differently.

Every message is one line, ``WHERE: what is wrong``. WHERE names the file and, if a structure is at fault, the field
in it. The base class is public as `dirtmap.engine.Error`.
"""

from __future__ import annotations


def printable(text: str) -> str:
    """Returns the text with backslash escapes for unprintable characters: one line, and harmless to a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte that is not UTF-8, see PEP 383
        return f"\\x{ord(character) & 0xFF:02x}"
    return character.encode("unicode_escape").decode("ascii")


def counted(number: int, one: str, many: str = "") -> str:
    """A number and what it counts, as ``1 bitmap`` or ``2 bitmaps``; ``many`` where an s does not make it several."""
    return f"{number} {one}" if number == 1 else f"{number} {many or one + 's'}"


def errno_of(error: BaseException) -> int | None:
    """The operating system's number of an error, or of a `StorageError` that it became; None where it has none."""
    found = getattr(error, "errno", None)
    return found if isinstance(found, int) else None


class Error(Exception):
    """Base class of everything that dirtmap raises on purpose.

    Attributes:
        where: the file, and possibly the field in it, such as ``disk.qcow2: bitmaps.directory_offset``.
        what: what is wrong with it, one line.
    """

    def __init__(self, where: str, what: str) -> None:
        super().__init__(where, what)
        self.where = where
        self.what = what

    def __str__(self) -> str:
        return printable(f"{self.where}: {self.what}")


class FormatError(Error):
    """Bytes on disk break the format, or would be unsafe to act on."""


class UnsupportedError(Error):
    """The bytes are sound, but need a feature that dirtmap does not know or must not write."""


class BitmapError(Error):
    """A bitmap cannot be used in this way: its name is unknown or taken, its state or size does not allow it."""


class BitmapNotFoundError(BitmapError, KeyError):
    """The namespace has no bitmap of that name."""

    __str__ = Error.__str__


class MovedError(BitmapError):
    """The bitmaps are in another container by now: checked out for a tracker, or checked in again."""


class LockedError(Error):
    """Another process has locked the image; ``what`` names that process if it can be found."""


class GoneError(LockedError):
    """The open file was replaced, or what this process had stored in it is gone. Trying again does not help."""


class StorageError(Error):
    """The operating system refused to open, read, write or sync.

    Attributes:
        errno: the number of the operating system's error, as in the module `errno`; None where there was none.
    """

    def __init__(self, where: str, what: str, errno: int | None = None) -> None:
        super().__init__(where, what)
        self.errno = errno


class SyncError(StorageError):
    """A sync failed: it is unknown which data is durable, and another sync would not tell."""


class ArgumentError(Error, ValueError):
    """An argument that is none of the values it may have; nothing was read or written."""


class RangeError(Error, ValueError):
    """A byte range lies outside the disk, is negative or overflows. Nothing was marked."""
