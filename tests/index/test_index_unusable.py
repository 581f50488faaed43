"""The index is never in the way: whatever keeps it from being used, names mean what they mean; one line tells of it."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from support.child import died_of
from support.cli import COMMAND, dirtmap
from support.indexed import PAGE

import dirtmap.engine as dm

MIB = 1 << 20
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems: needs root")


@pytest.fixture
def folder(in_memory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two stores with a node each, in a folder of their own, and no index yet."""
    tmp_path = Path(tempfile.mkdtemp(dir=in_memory))
    data = tmp_path / "data"
    data.mkdir()
    monkeypatch.setenv("DIRTMAP_STORE", str(data / "default.dmap"))
    monkeypatch.setenv("DIRTMAP_INDEX", str(tmp_path / "state" / "index"))
    index = str(tmp_path / "state" / "index")
    for name, store in (("here", "default.dmap"), ("there", "other.dmap")):
        (data / f"{name}.raw").write_bytes(bytes(MIB))
        with dm.Host(data / store, index) as host:
            host.add_node(name, str(data / f"{name}.raw"))
            with host.open(name) as image, image.transaction() as bitmaps:
                bitmaps["b"] = dm.Bitmap(MIB)
    shutil.rmtree(tmp_path / "state", ignore_errors=True)
    (tmp_path / "state").mkdir()
    return tmp_path


def run(*arguments: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, COMMAND, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


def answered(*, told: str | None) -> None:
    """Every kind of command that needs a name answers, with one line of warning at most."""
    for command in (("list", "here"), ("list", "there"), ("find", "b"), ("node", "list"), ("map", "there", "b")):
        done = run(*command)
        assert done.returncode == 0, (command, done)
        assert done.stdout
        lines = done.stderr.splitlines()
        assert len(lines) == (told is not None), done.stderr
        assert all(told in line and "rolled back is not noticed" in line for line in lines if told), done.stderr
    missing = run("list", "nobody")
    assert missing.returncode == 1
    assert "neither a file nor a node or device" in missing.stderr


@contextlib.contextmanager
def mounted(where: Path, *arguments: str) -> Iterator[None]:
    subprocess.run(["mount", *arguments, str(where)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(where)], check=True)


@contextlib.contextmanager
def read_only(where: Path) -> Iterator[None]:
    with mounted(where, "--bind", str(where)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(where)], check=True)
        yield


@AS_ROOT
@pytest.mark.parametrize("is_there", [False, True])
def test_on_a_read_only_file_system(folder: Path, is_there: bool) -> None:
    if is_there:
        answered(told=None)
    with read_only(folder / "state"):
        answered(told="Read-only file system")
    answered(told=None)


@AS_ROOT
def test_stores_that_are_read_only(folder: Path) -> None:
    with read_only(folder / "data"):
        answered(told=None)
        with read_only(folder / "state"):
            answered(told="Read-only file system")


@AS_ROOT
@pytest.mark.parametrize("free", [0, 1, 3, 17, 19])
def test_on_a_full_file_system(folder: Path, free: int) -> None:
    """LMDB maps its lock file without room for it: that was a SIGBUS."""
    with mounted(folder / "state", "-t", "tmpfs", "-o", "size=256k", "tmpfs"):
        (folder / "state" / "ballast").write_bytes(bytes((64 - free) * PAGE))
        answered(told="No space left")
        (folder / "state" / "ballast").unlink()
        answered(told=None)


@AS_ROOT
def test_one_that_becomes_full(folder: Path) -> None:
    with mounted(folder / "state", "-t", "tmpfs", "-o", "size=256k", "tmpfs"):
        answered(told=None)
        with contextlib.suppress(OSError), open(folder / "state" / "ballast", "wb", buffering=0) as file:
            while file.write(bytes(PAGE)):
                pass
        dm_add = run("add", "here", "c")
        assert dm_add.returncode == 0, dm_add
        for command in (("list", "here"), ("list", "there"), ("find", "c")):
            done = run(*command)
            assert done.returncode == 0, done
            assert len(done.stderr.splitlines()) <= 1


def test_where_files_may_not_be_so_long(folder: Path) -> None:
    done = run("find", "b", before=("prlimit", "--fsize=4096"))
    assert done.returncode == 0, done
    assert "here" in done.stdout
    assert "there" in done.stdout
    assert len(done.stderr.splitlines()) == 1


_HOLD = """
import os, sys
import dirtmap.engine as dm
with dm.Host() as host:
    list(host.find("b"))
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


@AS_ROOT
def test_beside_a_container_with_the_same_process_number(folder: Path) -> None:
    """LMDB locks a byte for each process number; two name spaces of these have the same numbers."""
    python = str(Path(COMMAND).with_name("python"))
    inside = ("unshare", "--pid", "--fork", "--mount-proc")
    answered(told=None)
    with subprocess.Popen(
        [*inside, python, "-c", _HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "1\n"
        for command in (("list", "here"), ("find", "b"), ("node", "list")):
            done = run(*command, before=inside)
            assert done.returncode == 0, done
            assert done.stdout
            assert len(done.stderr.splitlines()) <= 1
        holder.communicate()
    answered(told=None)


def test_damaged_pages_end_nobody(folder: Path) -> None:
    """Two bytes of any page: LMDB would follow them to where nothing is; its list of free pages included.

    Each command is a fork of this process, which has no index open: that is as good as a new one, and begins at once.
    """
    answered(told=None)
    state = folder / "state"
    shutil.copytree(state, folder / "sound")
    data = (state / "index" / "data.mdb").read_bytes()
    chance = random.Random(7)
    for page in range(2, len(data) // PAGE):
        for offset in (chance.randrange(4) * 2 + 8, 16 + 2 * chance.randrange(4)):
            shutil.rmtree(state)
            shutil.copytree(folder / "sound", state)
            with open(state / "index" / "data.mdb", "r+b", buffering=0) as file:
                file.seek(page * PAGE + offset)
                file.write(b"\xff\xff")
            for command in (("list", "there"), ("add", "here", "c"), ("remove", "here", "c"), ("find", "b")):
                assert died_of(partial(dirtmap, *command)) == 0, (page, offset, command)


def test_what_an_index_has_seen_outlives_its_last_writer(folder: Path) -> None:
    """A commit that was killed leaves a file that looks otherwise; it is read, found sound, and kept."""
    answered(told=None)
    index = folder / "state" / "index"
    inode = (index / "data.mdb").stat().st_ino
    stamp = folder / "state" / "index.stamp"
    noted = stamp.read_bytes()
    stamp.write_bytes(b"another\n")
    answered(told=None)
    assert (index / "data.mdb").stat().st_ino == inode
    assert stamp.read_bytes() == noted


def test_memory_is_as_the_database(folder: Path) -> None:
    """The same questions have the same answers, whichever is asked; and a change that fails changes nothing."""
    from dirtmap.engine.index.memory import Memory

    memory = Memory("x")
    chance = random.Random(1)
    expected: dict[bytes, bytes] = {}
    for _ in range(3000):
        key = bytes(chance.choices(b"abc", k=chance.randrange(1, 7)))
        if chance.random() < 0.6:
            expected[key] = key * 2
            memory.change(lambda writer, key=key: writer.put(key, key * 2))
        else:
            expected.pop(key, None)
            memory.change(lambda writer, key=key: writer.delete(key))

    def fail(writer: object) -> None:
        for key in (b"a", b"abc", b"new"):
            writer.put(key, b"wrong")  # type: ignore[attr-defined]
            writer.delete(b"ab")  # type: ignore[attr-defined]
        raise KeyError

    with pytest.raises(KeyError):
        memory.change(fail)
    for prefix in (b"", b"a", b"ab", b"abc", b"abca", b"c", b"x"):
        wanted = [(key, expected[key]) for key in sorted(expected) if key.startswith(prefix)]
        assert memory.read(lambda reader, prefix=prefix: list(reader.scan(prefix))) == wanted
    assert all(memory.get(key) == expected.get(key) for key in (*expected, b"none"))
