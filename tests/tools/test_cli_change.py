"""Commands that change bitmaps: `add` to `rename`, `merge`, `copy`, `move`, `recover`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import qemu
from support.cli import dirtmap, error_of, json_of, listed, mapped

import dirtmap.engine as dm

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Bitmap ``a`` with 64 KiB dirty, at 64 KiB; ``b`` with another 64 KiB, at 128 KiB."""
    return make(tmp_path / "disk.qcow2", 4 * MIB)


def make(path: Path, size: int) -> Path:
    qemu.create(path, size)
    qemu.qemu_img("bitmap", "--add", path, "a")
    qemu.qemu_io(path, "write -q 64k 64k")
    qemu.qemu_img("bitmap", "--disable", path, "a")
    qemu.qemu_img("bitmap", "--add", "-g", "128k", path, "b")
    qemu.qemu_io(path, "write -q 1M 64k")
    return path


@pytest.fixture
def other(tmp_path: Path) -> Path:
    path = tmp_path / "other.qcow2"
    qemu.create(path, 4 * MIB, "cluster_size=4096")
    return path


def leave_in_use(path: Path) -> None:
    """As after a crash of QEMU."""
    with qemu.StorageDaemon(path):
        pass


def test_add(image: Path) -> None:
    dirtmap("add", image, "c")
    dirtmap("add", "-g", "1M", "--disabled", image, "d")
    dirtmap("add", image, "--", "-e")
    qemu.check(image)
    assert list(qemu.bitmaps(image).items())[2:] == [
        ("c", (64 * KIB, {"auto"})),
        ("d", (MIB, set())),
        ("-e", (64 * KIB, {"auto"})),
    ]
    qemu.qemu_io(image, "write -q 0 1")
    assert mapped(image, "c") == [(0, 64 * KIB)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a"], "bitmap 'a': the name is taken"),
        ([""], "bitmap '': name is empty"),
        (["x" * 1024], f"bitmap '{'x' * 1024}': name of 1024 bytes is longer than 1023"),
        (["n", "-g", "100K"], "bitmap 'n': granularity 102400 is not a power of two from 512 bytes to 2 GiB"),
        (["n", "-g", "4G"], "bitmap 'n': granularity 4294967296 is not a power of two from 512 bytes to 2 GiB"),
        (["n", "-g", "0"], "bitmap 'n': granularity 0 is not a power of two from 512 bytes to 2 GiB"),
    ],
)
def test_add_refused(image: Path, arguments: list[str], message: str) -> None:
    before = image.read_bytes()
    assert error_of("add", image, *arguments) == f"{image}: {message}"
    assert image.read_bytes() == before


def test_remove_clear_enable_disable_rename(image: Path) -> None:
    dirtmap("enable", image, "a")
    dirtmap("disable", image, "b")
    assert qemu.bitmaps(image) == {"a": (64 * KIB, {"auto"}), "b": (128 * KIB, set())}
    assert qemu.dirty(image, "a") == [(64 * KIB, 64 * KIB)]
    dirtmap("clear", image, "a")
    dirtmap("rename", image, "b", "ж")
    assert list(qemu.bitmaps(image)) == ["a", "ж"]
    assert qemu.dirty(image, "a") == []
    assert qemu.dirty(image, "ж") == [(MIB, 128 * KIB)]
    dirtmap("remove", image, "a")
    dirtmap("remove", image, "ж")
    assert qemu.bitmaps(image) == {}
    qemu.check(image)


def test_merge_across_granularities(image: Path) -> None:
    dirtmap("merge", image, "a", "b", "a")
    assert qemu.dirty(image, "a") == [(64 * KIB, 64 * KIB), (MIB, 128 * KIB)]
    dirtmap("merge", image, "b", "a")
    assert qemu.dirty(image, "b") == [(0, 128 * KIB), (MIB, 128 * KIB)]
    assert qemu.bitmaps(image) == {"a": (64 * KIB, set()), "b": (128 * KIB, {"auto"})}
    qemu.check(image)


def test_merge_across_images(image: Path, other: Path) -> None:
    dirtmap("add", other, "sum")
    before = image.read_bytes()
    dirtmap("merge", other, "sum", "a", "b", "-b", image)
    assert qemu.dirty(other, "sum") == [(64 * KIB, 64 * KIB), (MIB, 128 * KIB)]
    assert image.read_bytes() == before
    dirtmap("merge", image, "a", "b", "-b", f"file:{image}")  # the very same image
    assert qemu.dirty(image, "a") == [(64 * KIB, 64 * KIB), (MIB, 128 * KIB)]


def test_merge_refused(image: Path, other: Path, tmp_path: Path) -> None:
    small = make(tmp_path / "small.qcow2", 2 * MIB)
    unusable = make(tmp_path / "crashed.qcow2", 4 * MIB)
    leave_in_use(unusable)
    before = image.read_bytes()
    assert error_of("merge", image, "a", "b", "c") == f"{image}: bitmap 'c': there is no such bitmap"
    assert error_of("merge", image, "c", "a") == f"{image}: bitmap 'c': there is no such bitmap"
    assert "a disk of 2097152 bytes" in error_of("merge", image, "a", "b", "-b", small)
    assert error_of("merge", image, "a", "b", "-b", unusable).startswith(f"{unusable}: bitmap 'b': inconsistent")
    assert error_of("merge", image, "a", "b", "-b", other) == f"{other}: bitmap 'b': there is no such bitmap"
    assert error_of("merge", image, "a", "b", "-b", tmp_path / "no").startswith(f"{tmp_path}/no: ")
    assert image.read_bytes() == before


@pytest.mark.parametrize("command", ["copy", "move"])
def test_copy_and_move_across_images(command: str, image: Path, other: Path) -> None:
    left = {"a", "b"} if command == "copy" else set()
    before = listed(image)
    dirtmap(command, image, "a", other)
    dirtmap(command, image, "b", other, "--as", "renamed")
    assert set(qemu.bitmaps(image)) == left
    assert listed(other) == {
        "a": before["a"],
        "renamed": before["b"] | {"name": "renamed"},
    }
    assert qemu.dirty(other, "a") == [(64 * KIB, 64 * KIB)]
    assert qemu.dirty(other, "renamed") == [(MIB, 128 * KIB)]
    qemu.check(image)
    qemu.check(other)


def test_copy_and_move_within_an_image(image: Path) -> None:
    before = listed(image)
    link = image.with_name("link.qcow2")
    link.symlink_to(image)
    dirtmap("copy", image, "a", image, "--as", "copy")
    dirtmap("move", image, "b", link, "--as", "moved")
    assert listed(image) == {
        "a": before["a"],
        "moved": before["b"] | {"name": "moved"},
        "copy": before["a"] | {"name": "copy"},
    }
    qemu.check(image)


@pytest.mark.parametrize("command", ["copy", "move"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "other.qcow2", "--as", "taken"], "other.qcow2: bitmap 'taken': the name is taken"),
        (["a", "other.qcow2", "--as", ""], "other.qcow2: bitmap '': name is empty"),
        (["a", "disk.qcow2"], "disk.qcow2: bitmap 'a': the name is taken"),
        (["a", "disk.qcow2", "--as", "b"], "disk.qcow2: bitmap 'b': the name is taken"),
        (["c", "other.qcow2"], "disk.qcow2: bitmap 'c': there is no such bitmap"),
        (["a", "small.qcow2", "--as", "n"], "small.qcow2: bitmap 'n': made for a disk of 4194304 bytes"),
        (["a", "old.qcow2"], "old.qcow2: header.version: 2"),
        (["a", "missing.qcow2"], "missing.qcow2: "),
    ],
)
def test_copy_and_move_refused(
    command: str, arguments: list[str], message: str, image: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(image.parent)
    qemu.qemu_img("bitmap", "--add", other, "taken")
    make(Path("small.qcow2"), 2 * MIB)
    qemu.create(Path("old.qcow2"), 4 * MIB, "compat=0.10")
    files = {path: path.read_bytes() for path in Path.cwd().iterdir()}
    assert error_of(command, "disk.qcow2", *arguments).startswith(message)
    assert {path: path.read_bytes() for path in Path.cwd().iterdir()} == files


@pytest.mark.parametrize("command", ["copy", "move"])
def test_an_inconsistent_bitmap_stays_where_it_is(command: str, image: Path, other: Path) -> None:
    leave_in_use(image)
    before = image.read_bytes(), other.read_bytes()
    assert error_of(command, image, "a", other).startswith(f"{image}: bitmap 'a': inconsistent")
    assert error_of(command, image, "a", image, "--as", "n").startswith(f"{image}: bitmap 'a': inconsistent")
    assert (image.read_bytes(), other.read_bytes()) == before


def test_a_move_from_what_may_not_be_written_copies_nothing(image: Path, other: Path) -> None:
    qemu.patch(image, 79, b"\x01")  # incompatible feature bit 0: dirty
    before = image.read_bytes(), other.read_bytes()
    assert "marked dirty" in error_of("move", image, "a", other)
    with qemu.StorageDaemon(other):
        held = other.read_bytes()
        assert "marked dirty" in error_of("move", image, "a", other)
        qemu.patch(image, 79, b"\x00")
        assert "held by qemu-storage-da" in error_of("move", image, "a", other, "--wait", "0.2")
        assert other.read_bytes() == held
        qemu.patch(image, 79, b"\x01")
    assert image.read_bytes() == before[0]


def test_a_move_removes_the_source_only_when_the_destination_is_durable(
    image: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of writes and syncs on the two files, as they reach the operating system."""
    from dirtmap.engine.system import file as fileio

    log: list[tuple[str, str]] = []

    class Watched(fileio.File):
        def write(self, offset: int, data: bytes | memoryview) -> None:
            log.append((Path(self.path).name, "write"))
            super().write(offset, data)

        def sync(self) -> None:
            log.append((Path(self.path).name, "sync"))
            super().sync()

    with fileio.using(Watched):
        dirtmap("move", image, "a", other)
    first = next(number for number, (name, _) in enumerate(log) if name == image.name)
    assert {name for name, _ in log[:first]} == {other.name}
    assert {name for name, _ in log[first:]} == {image.name}
    assert log[first - 1] == (other.name, "sync")
    assert log[-1] == (image.name, "sync")


@pytest.mark.parametrize("act", ["write", "sync"])
def test_a_move_that_fails_in_the_end_says_who_has_the_bitmap(image: Path, other: Path, act: str) -> None:
    """The operating system fails at the first write to the source, or at its first sync."""
    from dirtmap.engine.system import file as fileio

    class Failing(fileio.File):
        def write(self, offset: int, data: bytes | memoryview) -> None:
            if act == "write" and self.path == str(image):
                raise dm.StorageError(self.path, "write: Input/output error", 5)
            super().write(offset, data)

        def sync(self) -> None:
            if act == "sync" and self.path == str(image):
                raise dm.SyncError(self.path, "sync: Input/output error", 5)
            super().sync()

    with fileio.using(Failing):
        error = error_of("move", image, "a", other, "--as", "moved")
    half = f"the move is half done: {other} has it as 'moved' for good, and {image} may have 'a' still; if it does, "
    assert error == f"{image}: {act}: Input/output error; {half}'dirtmap remove' takes it away"
    assert mapped(other, "moved") == [(64 * KIB, 64 * KIB)]
    dirtmap("list", image)
    dirtmap("remove", image, "a")
    assert list(listed(image)) == ["b"]


def test_recover(image: Path) -> None:
    leave_in_use(image)
    assert error_of("recover", image, "c") == f"{image}: bitmap 'c': there is no such bitmap"
    assert dirtmap("recover", image, "b").out == "b: all dirty: left in use by a writer that did not finish\n"
    assert mapped(image, "b") == [(0, 4 * MIB)]
    assert json_of("recover", image) == {
        "filename": str(image),
        "recovered": [{"name": "a", "result": "all dirty: left in use by a writer that did not finish"}],
    }
    assert qemu.dirty(image, "a") == [(0, 4 * MIB)]
    assert qemu.bitmaps(image) == {"a": (64 * KIB, set()), "b": (128 * KIB, {"auto"})}
    before = image.read_bytes()
    assert dirtmap("recover", image).out == ""
    assert dirtmap("recover", image, "a").out == ""
    assert json_of("recover", image)["recovered"] == []
    assert image.read_bytes() == before
    qemu.check(image)


def test_names_are_bytes(image: Path) -> None:
    name = os.fsdecode(b"\xe4\xff")
    dirtmap("rename", image, "a", name)
    dirtmap("merge", image, name, "b")
    dirtmap("copy", image, name, image, "--as", os.fsdecode(b"\xe4\xfe"))
    assert error_of("rename", image, "b", name) == f"{image}: bitmap '\\xe4\\xff': the name is taken"
    with dm.open(image) as opened:
        assert [os.fsencode(found) for found in opened] == [b"\xe4\xff", b"b", b"\xe4\xfe"]
