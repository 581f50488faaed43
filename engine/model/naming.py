"""Bitmap names: as bytes on disk, as text, and in messages."""

from __future__ import annotations

from dirtmap.fmt.errors import BitmapError, BitmapNotFoundError


def decode_name(name: bytes) -> str:
    """A bitmap name from disk as text; bytes that are not UTF-8 become lone surrogates, and back with `encode_name`."""
    return name.decode("utf-8", "surrogateescape")


def encode_name(name: str) -> bytes:
    """A bitmap name as it is stored.

    Raises:
        BitmapError: it holds a lone surrogate that stands for no byte.
    """
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise BitmapError(f"bitmap {name!a}", "the name cannot be encoded") from error


def label(name: str) -> str:
    """How messages name a bitmap: always valid text, odd bytes escaped."""
    text = encode_name(name).decode("utf-8", "backslashreplace")
    return f"bitmap '{text}'"


def a_checkpoint(where: str, name: str) -> BitmapError:
    """The error for what cannot be done to a checkpoint."""
    return BitmapError(f"{where}: {label(name)}", "a checkpoint, which others rely on; it can be removed")


def not_found(where: str, name: str) -> BitmapNotFoundError:
    """The error for a name that is not there."""
    return BitmapNotFoundError(f"{where}: {label(name)}", "there is no such bitmap")


def as_stored(where: str, name: object) -> str:
    """A name to look up, in the one spelling that text from disk has; see `decode_name`.

    Raises:
        BitmapNotFoundError: it is no text, or cannot be encoded: no bitmap has it.
    """
    try:
        if isinstance(name, str):
            return decode_name(encode_name(name))
    except BitmapError:
        pass
    raise BitmapNotFoundError(f"{where}: bitmap {name!a}", "no bitmap can have such a name")
