"""The tests themselves: none imports another, and each module has a name of its own."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
MODULES = sorted(TESTS.rglob("*.py"))
# In text rather than in syntax: programs that a test runs are strings in it.
IMPORTS = re.compile(r"^\s*(?:from|import)\s.*\b(?:test|bench)_\w+", re.MULTILINE)


def test_no_test_imports_another() -> None:
    """What several tests need is in support/, so that each test can be read, moved and run by itself."""
    found = {str(path.relative_to(TESTS)): IMPORTS.findall(path.read_text()) for path in MODULES}
    assert {name: imports for name, imports in found.items() if imports} == {}
    assert len(found) > 60


@pytest.mark.parametrize(
    "line",
    ["import test_a", "from test_a import b", "from tests.fmt.test_a import b", "    from fmt import test_a as a"],
)
def test_an_import_of_a_test_is_noticed(line: str) -> None:
    assert IMPORTS.findall(f'"""Text."""\n\n{line}\n')


def test_every_module_has_a_name_of_its_own() -> None:
    names = Counter(path.name for path in MODULES)
    assert [name for name, count in names.items() if count > 1 and name not in ("__init__.py", "conftest.py")] == []
