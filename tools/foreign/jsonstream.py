"""Reads JSON a value at a time, so that a long document never is in memory as a whole."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from dirtmap.fmt.errors import FormatError
from dirtmap.tools.foreign.marks import Marks
from dirtmap.tools.inputs import Input

_CHUNK = 1 << 18
# The longest value that is taken in one piece, and the longest run of blanks: characters.
_MOST_VALUE = 1 << 16
_BLANKS = re.compile(r"[ \t\n\r]*")


class _TwiceError(ValueError):
    """A key appears twice in one object."""


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values, for a decoder.

    Raises:
        ValueError: a key appears twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _TwiceError("a key appears twice in one object")
    return found


class JsonReader:
    """A document, of which the caller knows the shape.

    Every method raises `FormatError` where the document is not valid JSON, is no UTF-8, or has not got that shape.
    """

    def __init__(self, source: Input) -> None:
        self._source = source
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._decoder = json.JSONDecoder(object_pairs_hook=unique)
        self._scan = self._decoder.scan_once  # type: ignore[attr-defined]
        self._text, self._at, self._ended = "", 0, False
        self._before = 0  # characters that were read before the text

    def peek(self) -> str:
        """The next character that is not blank; empty at the end."""
        blanks = 0
        while True:
            end = _BLANKS.match(self._text, self._at).end()  # type: ignore[union-attr]
            blanks += end - self._at
            self._at = end
            if end < len(self._text):
                return self._text[end]
            if self._ended:
                return ""
            if blanks > _MOST_VALUE:
                raise self._error(f"more than {_MOST_VALUE} blanks in a row")
            self._fill()

    def value(self, place: Callable[[], str]) -> Any:
        """The next value, whole; ``place`` names it where it is wrong."""
        self.peek()
        while True:
            try:
                value, end = self._scan(self._text, self._at)
            except _TwiceError as error:
                raise FormatError(place(), "a key appears twice") from error
            except (StopIteration, ValueError, RecursionError) as error:
                # It may just go on in what was not read yet.
                if self._ended or len(self._text) - self._at > _MOST_VALUE or isinstance(error, RecursionError):
                    raise self._error(*_fault(error, self._at)) from error
                self._fill()
                continue
            if end == len(self._text) and not self._ended and not isinstance(value, dict | list | str):
                self._fill()  # a number may go on
                continue
            if end - self._at > _MOST_VALUE:
                raise FormatError(place(), f"longer than {_MOST_VALUE} characters")
            self._at = end
            return value

    def elements(self) -> Iterator[None]:
        """Enters an array, and stops before each of its elements, which the caller has to take."""
        yield from self._items("[", "]")

    def values(self, place: Callable[[], str]) -> Iterator[Any]:
        """The elements of an array; ``place`` names the next one.

        Objects are decoded by the hundred: what has a comma behind its brace is cut there, and if that was inside a
        string or an object, the piece is no valid JSON and is taken element by element.
        """
        tried = ""
        for _ in self._items("[", "]"):
            while self._text is not tried:
                tried, cut = self._text, self._text.rfind("},", self._at)
                if cut < 0:
                    break  # nor will it be found in this text for the elements that follow
                try:
                    some = self._decoder.decode(f"[{tried[self._at : cut + 1]}]")
                except (ValueError, RecursionError):
                    break
                yield from some
                self._at = cut + 2
                self.peek()  # reads on
            yield self.value(place)

    def keys(self, place: Callable[[], str]) -> Iterator[str]:
        """Enters an object; yields each key, whose value the caller has to take; ``place`` names the object."""
        seen = set()
        for _ in self._items("{", "}"):
            key = self.value(place) if self.peek() == '"' else None
            if key is None or self.peek() != ":":
                raise self._error("a key and a colon are missing")
            self._at += 1
            if key in seen:
                raise FormatError(place(), "a key appears twice")
            seen.add(key)
            yield key

    def end(self) -> None:
        """Nothing may follow."""
        if self.peek():
            raise self._error("something follows behind the end")

    def _items(self, opening: str, closing: str) -> Iterator[None]:
        if self.peek() != opening:
            raise self._error(f"'{opening}' is missing")
        self._at += 1
        if self.peek() == closing:
            self._at += 1
            return
        while True:
            yield
            char = self.peek()
            if char not in (",", closing):
                raise self._error(f"neither ',' nor '{closing}' behind a value" if char else "cut off")
            self._at += 1
            if char == closing:
                return

    def _fill(self) -> None:
        data = self._source.read(_CHUNK)
        try:
            more = self._decode(data, final=not data)
        except ValueError as error:
            raise self._error(str(error), len(self._text)) from error
        self._before += self._at
        self._text, self._at, self._ended = self._text[self._at :] + more, 0, not data

    def _error(self, what: str, at: int | None = None) -> FormatError:
        where = self._before + (self._at if at is None else at) + 1
        return FormatError(self._source.where, f"not valid JSON: {what}, at character {where}")


def _fault(error: Exception, at: int) -> tuple[str, int]:
    """What is wrong with a value at ``at``, and where."""
    match error:
        case StopIteration():
            return "a value is missing", at
        case RecursionError():
            return "too many arrays or objects inside each other", at
        case json.JSONDecodeError(msg=what, pos=where):
            return what, where
    return str(error), at


def entries(source: Input, names: frozenset[str] | None, marks: Marks) -> Iterator[dict[str, Any]]:
    """Each object of an array of them, which becomes the current entry of ``marks``.

    Args:
        source: the document.
        names: the keys that an object may have; None for any.
        marks: what takes the ranges, for messages.

    Raises:
        FormatError: not an array of objects, or one has another key.
    """
    reader = JsonReader(source)
    if reader.peek() != "[":
        raise FormatError(source.where, "not an array of extents")
    for entry in reader.values(lambda: marks.place(1)):
        marks.next()
        if not isinstance(entry, dict):
            raise marks.error("not an extent")
        if names is not None and not names.issuperset(entry):
            raise marks.error(f"'{min(entry.keys() - names)}' is not a key of this format")
        yield entry
    reader.end()
