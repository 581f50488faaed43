"""Sections of SPEC.md and of docs/ are named in the code, in tests and in the documents: each that is named exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.documents import ROOT, SPEC_TABLES

NAMING = [
    path
    for folder in ("engine", "fmt", "tools", "tests", "docs", ".")
    for path in sorted((ROOT / folder).glob("*.md" if folder == "." else "**/*"))
    if path.suffix in {".py", ".pyx", ".h", ".c", ".md"} and path != Path(__file__)
]
# A document, a comma, a section; or a section, and the document that has it.
DOCUMENT = (
    rf"(?:\[[^\]]*\]\()?(?:\.\./|docs/)?(SPEC|{'|'.join(sorted(path.stem for path in ROOT.glob('docs/*.md')))})\.md"
)
NAMED = re.compile(rf'{DOCUMENT}\)?`?, "([^"]+)"|"([^"]+)" (?:in|of) {DOCUMENT}')
# In SPEC.md and docs/behaviour.md, which name their own sections and those of each other.
NAMED_HERE = re.compile(r'\b(?:[Ss]ee|in|under) "([A-Za-z][^"]+)"(?! (?:in|of) (?:\[|docs/))')


def unwrapped(text: str) -> str:
    """The text with each white space one blank; a line goes on behind the sign of a comment."""
    return re.sub(r"\s+", " ", re.sub(r"\n *(?:#|\*|//)? +", " ", text))


def sections(document: str) -> set[str]:
    """The headings of a document, without their numbers."""
    return set(re.findall(r"^#+ (?:[0-9.]+ )?(.+)$", (ROOT / document).read_text(), re.MULTILINE))


def structures() -> set[str]:
    """What a table of several structures describes."""
    return {row["structure"] for table in SPEC_TABLES if "structure" in table.columns for row in table.rows} - {""}


def named(text: str) -> Iterator[tuple[str, str]]:
    """Document and section, for each section of a document that is named."""
    for first, section, other, second in NAMED.findall(unwrapped(text)):
        document = first or second
        yield document if document == "SPEC" else f"docs/{document}", section or other


def test_every_section_that_is_named_with_its_document_exists() -> None:
    found = {(str(path.relative_to(ROOT)), *name) for path in NAMING for name in named(path.read_text())}
    assert len(found) > 30
    assert [name for name in sorted(found) if name[2] not in sections(f"{name[1]}.md")] == []


@pytest.mark.parametrize("document", ["SPEC.md", "docs/behaviour.md"])
def test_every_section_that_a_document_names_exists(document: str) -> None:
    found = set(NAMED_HERE.findall(unwrapped((ROOT / document).read_text())))
    assert len(found) > 3
    assert found - sections("SPEC.md") - sections("docs/behaviour.md") - structures() == set()


def test_the_contents_are_the_sections() -> None:
    text = (ROOT / "SPEC.md").read_text()
    contents, _, body = text.partition("\n## ")
    listed = [
        name
        for chapter in re.findall(r"^\d+\. [^\n]+(?:\n +[^\n]+)*", contents, re.MULTILINE)
        for name in re.split(r", (?=\d)|: (?=\d)", unwrapped(chapter))
    ]
    assert listed == re.findall(r"^##+ (\d.*)$", f"## {body}", re.MULTILINE)
