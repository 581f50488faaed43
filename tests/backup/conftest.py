"""A repository with some nights, made once for the tests of a file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.backups import make_nights


@pytest.fixture(scope="module")
def nights_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    return make_nights(tmp_path_factory.mktemp("nights"))


@pytest.fixture
def nights(nights_once: tuple[Path, list[bytes]], tmp_path: Path) -> tuple[Path, list[bytes]]:
    """A repository of the test's own, and what the disk had at each of its backups."""
    repository, contents = nights_once
    return shutil.copytree(repository, tmp_path / "repo"), contents
