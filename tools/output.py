"""The output of commands: one-line errors, JSON that is always valid, text that cannot harm a terminal, tables."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dirtmap.fmt.errors import printable

PROGRAM = "dirtmap"


def complain(message: str) -> None:
    """Prints one line on standard error."""
    print(f"{PROGRAM}: {printable(message)}", file=sys.stderr)


def write_json(document: list[Any] | dict[str, Any]) -> None:
    """Prints one document on standard output, in ASCII. A list takes one line per element, as in nbdinfo."""
    import json

    document = _utf8(document)
    if isinstance(document, list):
        sys.stdout.write("[\n" + ",\n".join(json.dumps(item) for item in document) + "\n]\n")
    else:
        sys.stdout.write(json.dumps(document, indent=4) + "\n")


def _utf8(value: Any) -> Any:
    """The same value with every string valid: bytes that are not UTF-8 become backslash escapes."""
    if isinstance(value, str) and not value.isascii():
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if isinstance(value, dict):
        return {key: _utf8(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_utf8(item) for item in value]
    return value


def write_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Prints a titled table on standard output: with colour on a terminal, otherwise in plain columns.

    Args:
        title: the line above the table, already printable.
        header: the name of each column.
        rows: the cells, already printable.
        right: the numbers of the columns to align to the right.
    """
    if colourful():
        return _write_rich_table(title, header, rows, right)
    print(title)
    widths = [max(map(columns_of, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows) if rows else ():
        gaps = [" " * (width - columns_of(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [
            gap + cell if number in right else cell + gap
            for number, (cell, gap) in enumerate(zip(row, gaps, strict=True))
        ]
        print(("  " + "  ".join(cells)).rstrip())


def columns_of(text: str) -> int:
    """The width of a text on a terminal, in columns: combining characters take none, wide ones such as CJK two."""
    if text.isascii():
        return len(text)
    from unicodedata import category, east_asian_width

    return sum(0 if category(c) in ("Mn", "Me") else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def _write_rich_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(title, "bold"))
    if not rows:
        return
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 2), header_style="dim")
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, _STYLES.get(cell, "")) for cell in row))
    console.print(table)


# Cells that are highlighted on a terminal.
_STYLES = {"inconsistent": "bold red", "recording": "green"}


def colourful() -> bool:
    """True if standard output is a terminal that may get colour."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


@contextlib.contextmanager
def progress_bar(title: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on standard error, which disappears at the end of the block.

    Yields:
        A function that moves it, of (done, in all); None if standard error is not a terminal, or ``quiet``.
    """
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
