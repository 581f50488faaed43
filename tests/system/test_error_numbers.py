"""An error of the operating system keeps its number, whatever it is wrapped in; what else is wrong has none."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.cli import dirtmap, error_of, json_of

import dirtmap.engine as dm
from dirtmap.engine.identity import identity_of
from dirtmap.engine.index.reading import fingerprint
from dirtmap.engine.system.file import make_folder_of, open_file, replace_file, room_at, sync_folder

ACTS: list[tuple[Callable[[], object], int | None]] = [
    (lambda: dm.open("nothing"), None),
    (lambda: dm.open("./nothing"), None),
    (lambda: dm.open("file:nothing"), errno.ENOENT),
    (lambda: dm.open("file:folder"), None),
    (lambda: dm.open("file:file/below"), errno.ENOTDIR),
    (lambda: dm.open("file:loop"), errno.ELOOP),
    (lambda: dm.open("file:" + "n" * 300), errno.ENAMETOOLONG),
    (lambda: dm.open("file:a\0b"), None),
    (lambda: dm.create_store("file"), errno.EEXIST),
    (lambda: open_file("nothing"), errno.ENOENT),
    (lambda: open_file("file").write(0, b"x"), errno.EBADF),
    (lambda: open_file("file").read_exactly(0, 1), None),
    (lambda: identity_of("nothing"), errno.ENOENT),
    (lambda: identity_of("folder"), None),
    (lambda: fingerprint("nothing"), errno.ENOENT),
    (lambda: make_folder_of("file/a/b", "b"), errno.ENOTDIR),
    (lambda: sync_folder("nothing/a"), errno.ENOENT),
    (lambda: replace_file("nothing", "a"), errno.ENOENT),
    (lambda: room_at("nothing/a"), errno.ENOENT),
    (lambda: dm.Host(store="loop").nodes([]), errno.ELOOP),
    (lambda: dm.Host(store="nothing").nodes([]), errno.ENOENT),
    (lambda: dm.scan(dm.Host(), ["nothing"]), errno.ENOENT),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIRTMAP_INDEX", str(tmp_path / "state/index"))
    monkeypatch.delenv("DIRTMAP_STORE", raising=False)
    Path("folder").mkdir()
    Path("file").touch()
    Path("loop").symlink_to("loop")
    dm.create_store("s.dmap")


@pytest.mark.parametrize(("act", "number"), ACTS)
def test_the_number_is_kept(act: Callable[[], object], number: int | None) -> None:
    with pytest.raises(dm.StorageError) as caught:
        act()
    assert caught.value.errno == number
    if number is not None:
        assert os.strerror(number) in str(caught.value) or "no such store" in str(caught.value)


def test_a_failed_sync_has_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with open_file("file", writable=True) as file:
        monkeypatch.setattr(os, "fdatasync", fails)
        with pytest.raises(dm.SyncError) as caught:
            file.sync()
    assert caught.value.errno == errno.EIO


# Words: which field, and what is wrong with it.


@pytest.mark.parametrize(("version", "size"), [(3, 100), (3, 103), (3, 8), (2, 71), (2, 8)])
def test_a_file_that_ends_inside_the_header_is_said_to(version: int, size: int) -> None:
    Path("cut.qcow2").write_bytes((b"QFI\xfb" + version.to_bytes(4, "big")).ljust(size, b"\0"))
    assert error_of("list", "cut.qcow2") == f"cut.qcow2: header: the file ends after {size} bytes, inside the header"


def test_a_scan_names_the_field() -> None:
    header = bytearray(b"QFI\xfb\0\0\0\3".ljust(300, b"\0"))
    header[23] = 16  # cluster_bits
    Path("folder/bad.qcow2").write_bytes(header)
    Path("folder/bad.dmap").write_bytes(b"DMS\xfc" + bytes(40_000))
    Path("folder/cut.qcow2").write_bytes(header[:100])
    told = [
        ("bad.dmap", "header: all four copies are damaged"),
        ("bad.qcow2", "header.header_length: 0 is outside 104..65536"),
        ("cut.qcow2", "header: the file ends after 100 bytes, inside the header"),
    ]
    for _ in range(2):  # the second time it is known to be damaged
        done = json_of("index", "scan", "folder")
        assert [(os.path.basename(each["filename"]), each["what"]) for each in done["damaged"]] == told
    said = dirtmap("index", "scan", "folder").error
    for name, what in told:
        assert f"dirtmap: {Path('folder', name).absolute()}: damaged: {what}\n" in said
