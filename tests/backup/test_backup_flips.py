"""A byte of a repository is another one: each backup is restored right or not at all, and verifying tells the truth."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.backups import image_of, make_nights
from support.qemu import ToolError, qemu_img

import dirtmap.engine as dm
from dirtmap.tools.backup import Backup, Repository, prune, restore, verify


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    return make_nights(tmp_path_factory.mktemp("flips"))


def restored(repository: Path, number: int) -> bytes | None:
    """What is restored; None where that is refused."""
    out = repository.with_name("out")
    out.unlink(missing_ok=True)
    try:
        with dm.Host() as host:
            restore(host, repository, "data", out, at=str(number))
    except dm.Error:
        assert not out.exists()
        return None
    return out.read_bytes()


def read_by_qemu(repository: Path, backup: Backup) -> bytes | None:
    """What QEMU reads of a backup, without its document; None where it refuses."""
    out = repository.with_name("converted")
    try:
        qemu_img("convert", "-f", "qcow2", "-O", "raw", image_of(repository, backup), out)
    except ToolError:
        return None
    return out.read_bytes()[: backup.size]


def judge(repository: Path, contents: list[bytes]) -> None:
    found = [restored(repository, number) for number in range(1, 5)]
    for one, content in zip(found, contents, strict=True):
        assert one in (None, content)
    if not verify(repository):
        assert found == contents
        assert [read_by_qemu(repository, backup) for backup in Repository(repository).backups("data")] == contents


def flip(repository: Path, data: st.DataObject) -> None:
    """Changes one byte anywhere; often where images have what is not data, at their beginning and at their end."""
    path = data.draw(st.sampled_from(sorted(path for path in repository.iterdir() if path.stat().st_size)), "file")
    content = bytearray(path.read_bytes())
    last = len(content) - 1
    at = st.integers(0, last) | st.integers(0, min(last, 200)) | st.integers(max(0, last - 5 * 65536), last)
    content[data.draw(at, "at")] ^= data.draw(st.integers(1, 255), "changed bits")
    path.write_bytes(content)


def try_one(original: tuple[Path, list[bytes]], folder: Path, data: st.DataObject) -> None:
    repository, contents = shutil.copytree(original[0], folder / "repo"), original[1]
    flip(repository, data)
    with contextlib.suppress(dm.Error):  # what is refused does no harm
        judge(repository, contents)
        prune(repository, 1)
        assert restored(repository, 4) == contents[3]


@settings(max_examples=8)
@given(data=st.data())
def test_a_byte(
    original: tuple[Path, list[bytes]], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    try_one(original, tmp_path_factory.mktemp("flip"), data)


@pytest.mark.long
@settings(max_examples=400)
@given(data=st.data())
def test_any_byte(
    original: tuple[Path, list[bytes]], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    try_one(original, folder, data)
    shutil.rmtree(folder)
