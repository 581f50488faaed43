"""Bitmap names: as bytes on disk, as text, and in messages."""

from __future__ import annotations

from dirtmap.fmt.errors import BitmapError, BitmapNotFoundError


def decode_name(name: bytes) -> str:
    """A stored bitmap name as text. Bytes that are not UTF-8 become lone surrogates; `encode_name` restores them."""
    return name.decode("utf-8", "surrogateescape")


def encode_name(name: str) -> bytes:
    """A bitmap name as the bytes that are stored.

    Raises:
        BitmapError: the name holds a lone surrogate that stands for no byte.
    """
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise BitmapError(f"bitmap {name!a}", "the name cannot be encoded") from error


def label(name: str) -> str:
    """How messages name a bitmap: always valid text, with undecodable bytes escaped."""
    text = encode_name(name).decode("utf-8", "backslashreplace")
    return f"bitmap '{text}'"


def a_checkpoint(where: str, name: str) -> BitmapError:
    """The error for a change that a checkpoint does not allow."""
    return BitmapError(f"{where}: {label(name)}", "a checkpoint, which others rely on; it can be removed")


def not_found(where: str, name: str) -> BitmapNotFoundError:
    """The error for a bitmap that does not exist."""
    return BitmapNotFoundError(f"{where}: {label(name)}", "there is no such bitmap")


def as_stored(where: str, name: object) -> str:
    """A name to look up, in the one spelling that `decode_name` gives.

    Raises:
        BitmapNotFoundError: the name is not text, or cannot be encoded, so that no bitmap has it.
    """
    try:
        if isinstance(name, str):
            return decode_name(encode_name(name))
    except BitmapError:
        pass
    raise BitmapNotFoundError(f"{where}: bitmap {name!a}", "no bitmap can have such a name")
