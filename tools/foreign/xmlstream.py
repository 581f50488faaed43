"""Reads XML element by element, in bounded memory: no document type, no entities, no text."""

from __future__ import annotations

from collections.abc import Callable
from xml.parsers import expat

from dirtmap.fmt.errors import Error, FormatError
from dirtmap.tools.inputs import Input

_CHUNK = 1 << 16
# What the parser may hold back of a tag, comment or the like that has not ended yet: bytes.
_MOST_PENDING = 4 * _CHUNK


def parse(source: Input, begin: Callable[[str, dict[str, str]], None], end: Callable[[str], None]) -> None:
    """Calls ``begin`` with the name and the attributes of every element, and ``end`` with its name.

    Raises:
        FormatError: not well-formed XML, with a document type, with text between the elements, or a tag is too long.
        dirtmap.engine.Error: what the functions raise.
    """
    parser = expat.ParserCreate()
    where = source.where

    def refuse_doctype(*_: object) -> None:
        raise FormatError(where, "XML with a document type, which none of these programs print")

    def refuse_text(text: str) -> None:
        if text.strip():
            raise FormatError(f"{where}: line {parser.CurrentLineNumber}", "text between the elements")

    parser.StartDoctypeDeclHandler = refuse_doctype
    parser.StartElementHandler, parser.EndElementHandler = begin, end
    parser.CharacterDataHandler = refuse_text
    fed = 0
    try:
        while data := source.read(_CHUNK):
            fed += len(data)
            parser.Parse(data, False)
            if fed - parser.CurrentByteIndex > _MOST_PENDING:
                raise FormatError(
                    f"{where}: line {parser.CurrentLineNumber}", f"a tag of more than {_MOST_PENDING} bytes"
                )
        parser.Parse(b"", True)
    except expat.ExpatError as error:
        raise FormatError(where, f"not well-formed XML: {error}") from error
    except Error:
        raise
    except (ValueError, LookupError) as error:  # an encoding that Python does not know
        raise FormatError(where, f"not well-formed XML: {error}") from error
