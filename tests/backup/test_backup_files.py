"""What the files of a repository leave behind while they are written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dirtmap.tools.backup import files

MIB = 1 << 20
SIZE = 256 * MIB


@pytest.fixture
def new(tmp_path: Path) -> Iterator[Path]:
    yield (path := tmp_path / "new")
    path.unlink()


def cached(path: Path) -> int:
    """How many mebibytes of a file the kernel has in memory; it reads none for that."""
    found = 0
    with open(path, "rb", buffering=0) as file:
        for at in range(0, SIZE, MIB):
            try:
                found += os.preadv(file.fileno(), [bytearray(1)], at, os.RWF_NOWAIT)
            except BlockingIOError:
                continue
    return found


def test_what_is_written_does_not_stay_in_memory(new: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is on the disk, where it is here a moment after that was asked for."""
    advise = os.posix_fadvise

    def advised(number: int, *arguments: int) -> None:
        advise(number, *arguments)
        os.fdatasync(number)

    monkeypatch.setattr(os, "posix_fadvise", advised)
    file = files.Writing(str(new), SIZE)
    for at in range(0, SIZE, MIB):
        file.write(at, memoryview(b"data" * (MIB // 4)))
    file.close()
    assert cached(new) <= 80
    assert new.read_bytes() == b"data" * (SIZE // 4)
