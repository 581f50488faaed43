"""The documents of the project, taken apart: their tables, and what the code declares of what they list."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
BEHAVIOUR = (ROOT / "docs/behaviour.md").read_text()
EXAMPLES = (ROOT / "docs/examples.md").read_text()
SPEC = (ROOT / "SPEC.md").read_text() + BEHAVIOUR + EXAMPLES  # they are held against the code as one
README = (ROOT / "README.md").read_text()

Row = dict[str, str]


class Table(NamedTuple):
    """A table of a document: the ``heading`` it stands under, and its ``rows``, cells by column."""

    heading: str
    columns: tuple[str, ...]
    rows: list[Row]


def cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip().strip("|").split("|"))


def tables(text: str) -> list[Table]:
    """All tables, in order; fenced blocks hold none."""
    found: list[Table] = []
    heading, fenced, current = "", False, None
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and line.startswith("#"):
            heading, current = re.sub(r"^#+ ([0-9.]+ )?", "", line), None
        elif fenced or not line.startswith("|"):
            current = None
        elif current is None:
            current = Table(heading, cells(line), [])
            found.append(current)
        elif set(line) - set("|-: "):
            row = cells(line)
            assert len(row) == len(current.columns), f"{heading}: {line}"
            current.rows.append(dict(zip(current.columns, row, strict=True)))
    return found


SPEC_TABLES = tables(SPEC)


def rows(*columns: str) -> list[Row]:
    """The rows of the tables with exactly these columns."""
    found = [row for table in SPEC_TABLES if table.columns == columns for row in table.rows]
    assert found, f"SPEC.md has no table of {columns}"
    return found


def judged(module: ModuleType) -> set[str]:
    """The fields that a module's validators, `*_faults`, can find fault with."""
    tree = ast.parse(Path(str(module.__file__)).read_text())
    return {
        node.value.elts[0].value
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name.endswith("_faults")
        for node in ast.walk(function)
        if isinstance(node, ast.Yield)
        and isinstance(node.value, ast.Tuple)
        and isinstance(node.value.elts[0], ast.Constant)
    }
