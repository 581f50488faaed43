"""The examples of README and of the documents that go through dirtmap step by step do what is shown.

Their console blocks run, then their python blocks, in order, in one folder; as `support.examples` says.
"""

from __future__ import annotations

from pathlib import Path

from support import volumes
from support.examples import FOLDER, ROOT, commands, program, run
from support.volumes import loops, volume

README = ROOT / "README.md"
TOUR = [ROOT / "docs/tour.md", ROOT / "docs/python.md"]

# What an embedding program has besides: its disk, what it writes, and how it copies.
PROGRAM = f"""
import os

fd, offset, length, data = os.open("NAME", os.O_RDWR | os.O_CREAT), 7 << 20, 4096, bytes(4096)
os.chdir("{FOLDER}")
offsets, lengths = [8 << 30, 9 << 30], [4096, 1 << 20]


def copy(extents):
    pass


"""


def test_recipes(tmp_path: Path) -> None:
    assert len(commands(README)) > 15
    assert program("prints", README)
    with loops(), volume(volumes.make("xfs", tmp_path / "xfs"), tmp_path / "mounted") as mounted:
        folder = mounted / "srv"
        folder.mkdir()
        wrong = run([README], folder, PROGRAM.replace("NAME", f"{FOLDER}/vm.raw"))
    assert not wrong, "\n".join(wrong)


def test_tour(tmp_path: Path) -> None:
    assert sum(len(commands(document)) for document in TOUR) > 50
    assert program("prints", *TOUR)
    folder = tmp_path / "srv"
    folder.mkdir()
    grown = f'os.truncate("{FOLDER}/logs.raw", 1 << 30)\n'
    wrong = run(TOUR, folder, PROGRAM.replace("NAME", f"{FOLDER}/logs.raw") + grown)
    assert not wrong, "\n".join(wrong)


def test_readme_is_read_to_its_end() -> None:
    assert len(README.read_text().splitlines()) <= 250
    listed = README.read_text()
    for document in sorted((ROOT / "docs").glob("*.md")):
        assert f"[docs/{document.name}](docs/{document.name})" in listed, document.name
