"""A file without a name, for what is too much for memory."""

from __future__ import annotations

from pathlib import Path

import pytest

import dirtmap.engine as dm
from dirtmap.engine.system.spool import Spool


def test_what_is_written_is_read_and_all_else_is_zeros(tmp_path: Path) -> None:
    spool = Spool(str(tmp_path))
    spool.write(4, b"abc")
    assert spool.read(2, 8) == b"\0\0abc\0\0\0"
    spool.close()
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_a_place_or_a_folder_is_an_error_of_ours(tmp_path: Path) -> None:
    """The system's calls answer some of it with other errors than OSError."""
    spool = Spool(str(tmp_path))
    with pytest.raises(dm.StorageError, match="temporary file"):
        spool.write(1 << 63, b"abc")
    with pytest.raises(dm.StorageError, match="temporary file"):
        spool.read(1 << 63, 8)
    spool.close()
    for folder in (tmp_path / "none", f"{tmp_path}\0"):
        with pytest.raises(dm.StorageError, match="temporary file"):
            Spool(str(folder))
