"""The error family: one root, one class per situation a caller handles differently.

Every message is one line, ``WHERE: what is wrong``: WHERE names the file and, where a structure is
at fault, the field inside it. The root is public as `dirtmap.engine.Error`.
"""

from __future__ import annotations


def printable(text: str) -> str:
    """The text on one line and harmless to a terminal: with backslash escapes for what is not printable."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte that is not UTF-8, see PEP 383
        return f"\\x{ord(character) & 0xFF:02x}"
    return character.encode("unicode_escape").decode("ascii")


class Error(Exception):
    """Root of everything dirtmap raises on purpose.

    Attributes:
        where: the file, and the field inside it, as ``disk.qcow2: bitmaps.directory_offset``.
        what: what is wrong with it, one line.
    """

    def __init__(self, where: str, what: str) -> None:
        super().__init__(where, what)
        self.where = where
        self.what = what

    def __str__(self) -> str:
        return printable(f"{self.where}: {self.what}")


class FormatError(Error):
    """Bytes on disk that break the format, or that would be unsafe to act on."""


class UnsupportedError(Error):
    """Sound bytes that ask for something dirtmap does not know, or must not write."""


class BitmapError(Error):
    """The bitmap asked for cannot be used so: unknown name, name taken, inconsistent, wrong size."""


class BitmapNotFoundError(BitmapError, KeyError):
    """No bitmap has that name in the namespace."""

    __str__ = Error.__str__


class LockedError(Error):
    """Another process holds the image; ``what`` names it as far as it can be known."""


class GoneError(LockedError):
    """What was open is another file by now, or has lost what this process had in it: it will not come back."""


class StorageError(Error):
    """The operating system refused to open, read, write or sync."""


class SyncError(StorageError):
    """A sync failed: what of the data is durable is not known, and asking again would not tell."""


class ArgumentError(Error, ValueError):
    """An argument that is none of the values it may have; nothing was read or written."""


class RangeError(Error, ValueError):
    """A byte range that lies outside the disk, is negative or overflows; nothing was marked."""
