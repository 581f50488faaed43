"""nbdkit's filter is built where it runs, once, or says what is missing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import dirtmap.engine as dm
from dirtmap.tools.serve import building


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "dirtmap"


def test_it_is_built_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = building.built_filter()
    assert Path(path).parent.parent == cache
    assert os.listdir(Path(path).parent) == [building.NAME]
    monkeypatch.setattr(building, "_build", None)
    assert building.built_filter() == path
    monkeypatch.setattr(building, "nbdkit_version", lambda: "1.0")
    with pytest.raises(TypeError):  # another version needs another filter
        building.built_filter()


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    building.nbdkit_version.cache_clear()
    nbdkit = str(shutil.which("nbdkit"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(dm.Error, match=r"in the package nbdkit$"):
        building.built_filter()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nbdkit").symlink_to(nbdkit)
    with pytest.raises(dm.Error, match=r"install the Debian packages gcc and libc6-dev$"):
        building.built_filter()


def test_headers_have_to_be_there_and_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "_PROBE", "#include <no-such-header.h>\n")
    with pytest.raises(dm.Error, match=r"install the Debian package nbdkit-plugin-dev$"):
        building.built_filter()
    monkeypatch.setattr(building, "_PROBE", '"1.0.0"\n')
    with pytest.raises(dm.Error, match=r"its headers are of 1\.0\.0"):
        building.built_filter()


def test_nothing_is_loaded_that_others_can_write(cache: Path) -> None:
    path = Path(building.built_filter())
    path.chmod(0o775)
    with pytest.raises(dm.StorageError, match="others can write to it"):
        building.built_filter()
    path.chmod(0o755)
    cache.chmod(0o777)
    with pytest.raises(dm.StorageError, match="others can write to it"):
        building.built_filter()
