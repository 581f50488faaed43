r"""How bytes that are not UTF-8 are spelled in JSON and in messages: ``\xff`` for each; and what such a text means.

What is shown can be given back: first a name or a path that is this very text is meant, then the one that is shown so.
In Python the byte is a lone surrogate, see PEP 383.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator


def escaped(name: str) -> str:
    """A name or path as JSON shows it: bytes that are not UTF-8 as a backslash, an x and two hexadecimal digits."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def spellings(text: str) -> Iterator[str]:
    """What a text may mean: itself first, then the name or path of other bytes that `escaped` shows so."""
    yield text
    if "\\x" in text:
        try:
            raw = text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:  # a surrogate that stands for no byte
            return
        found = re.sub(rb"\\x([89a-f][0-9a-f])", lambda match: bytes([int(match[1], 16)]), raw)
        meant = found.decode("utf-8", "surrogateescape")
        if meant != text and escaped(meant) == text:
            yield meant


def shown_as(text: str, names: Collection[str]) -> str:
    """Which of these names a text means: the one that it is, or the one that is shown so; the text where none is.

    Raises:
        ValueError: several are shown so, and none is this very text.
    """
    if "\\x" not in text or text in names:
        return text
    meant = [name for name in names if escaped(name) == text]
    if len(meant) > 1:
        raise ValueError(f"'{text}' is how {len(meant)} names are shown, none of which it is")
    return meant[0] if meant else text
