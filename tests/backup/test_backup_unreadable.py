"""What cannot be read is said, nothing comes of it, and the next act is right."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.backups import SIZE, back_up, same, write_raw
from support.cli import dirtmap, error_of
from support.volumes import attached, loops

import dirtmap.engine as dm
from dirtmap.tools.backup import Repository, files, prune, restore, verify

GRANULE = 65536


def test_a_disk_that_cannot_be_read(tmp_path: Path) -> None:
    """A disk whose file got shorter gives input/output errors behind its end."""
    medium, repository = tmp_path / "medium", tmp_path / "repo"
    medium.write_bytes(b"\5" * (5 << 20))
    os.truncate(medium, SIZE)
    with loops(), attached(medium) as device:
        with dm.Host() as host:
            host.add_node("data", device)
        assert back_up(repository, "data").kind == "full"
        write_raw(Path(device), {4 << 20: b"x", 9 << 20: b"y"})
        content = medium.read_bytes()
        os.truncate(medium, 4 << 20)
        assert "Input/output error" in error_of("backup", "create", "data", repository)
        assert "Input/output error" in error_of("backup", "verify", repository, "data")
        bitmap = Repository(repository).backups()[-1].bitmap
        assert "Input/output error" in error_of("rebuild", "data", bitmap, "--against", repository)
        assert len(list(repository.iterdir())) == 4
        medium.write_bytes(content)
        made = back_up(repository, "data")
        assert (made.kind, made.dirty) == ("incremental", 2 * GRANULE)
        same(repository, made, Path(device))


def do_restore(repository: Path) -> None:
    with dm.Host() as host:
        restore(host, repository, "data", repository.with_name("out"))


def do_prune(repository: Path) -> None:
    prune(repository, 1)


def cannot_read(work: Callable[[], None]) -> bool:
    try:
        work()
    except dm.StorageError as error:
        return error.errno == errno.EIO
    return False


@pytest.mark.parametrize("act", [do_restore, do_prune])
def test_a_repository_that_cannot_be_read(
    nights: tuple[Path, list[bytes]], act: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any of its reads."""
    repository, contents = nights
    before, read = sorted(repository.iterdir()), files.os.preadv
    for at in range(0, 1000, 5):
        left = at

        def failing(*arguments: object) -> int:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return read(*arguments)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "preadv", failing)
            if not cannot_read(lambda: act(repository)):
                break
        assert sorted(repository.iterdir()) == before
        assert not repository.with_name("out").exists()
    assert at > 0
    assert verify(repository) == []
    repository.with_name("out").unlink(missing_ok=True)
    do_restore(repository)
    assert repository.with_name("out").read_bytes() == contents[-1]
    dirtmap("backup", "list", repository)
