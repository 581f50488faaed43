"""The sound store that every test here damages, in memory, and nobody who waits."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import quick
from support.damage import Sound, make_sound

from dirtmap.engine.system.file import File
from dirtmap.fmt.identity import NO_FILE_PLACE


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """In memory where that can be: thousands of stores are written and synced."""
    where = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    yield where
    shutil.rmtree(where)


@pytest.fixture(scope="module")
def sound(folder: Path) -> Sound:
    return make_sound(folder)


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    quick.hurry(monkeypatch)


@pytest.fixture(autouse=True)
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sound store is put back into the file that a repair has made: nobody can tell that this is another."""
    monkeypatch.setattr(File, "place", lambda file: NO_FILE_PLACE)
