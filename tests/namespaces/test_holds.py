"""A hold counts as long as its holder lives, whoever asks from wherever, and not a moment longer."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import struct
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import qemu
from support.child import in_child
from support.cli import COMMAND, dirtmap, error_of, json_of
from support.unseen import PLACES, inside, needs_root, runs, started, told

import dirtmap.engine as dm
from dirtmap.engine.storefile import holds
from dirtmap.engine.storefile.file import Store
from dirtmap.engine.system import file as fileio
from dirtmap.engine.system.file import File, using
from dirtmap.fmt.errors import GoneError, LockedError, StorageError

SIZE = 8 << 20
STORE = "default.dmap"
UNSEEN = "busy: held by 'sh' (a process that cannot be seen from here)"
WAIT = ("--", "sh", "-c", "echo held; read line")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A raw image `one` and a qcow2 image `two`, both nodes with a bitmap `b`."""
    monkeypatch.chdir(tmp_path)
    Path("one.raw").touch()
    os.truncate("one.raw", SIZE)
    dirtmap("node", "add", "one", "one.raw")
    qemu.create(Path("two.qcow2"), SIZE)
    dirtmap("node", "add", "two", "two.qcow2")
    for node in ("one", "two"):
        dirtmap("add", node, "b")


def is_busy(node: str = "one") -> bool:
    return bool(json_of("list", node)[0]["bitmaps"][0]["busy"])


def flip(offset: int) -> None:
    with Path(STORE).open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))


# Who cannot see the holder.


@needs_root
@pytest.mark.parametrize("holder_is_inside", [True, False])
@pytest.mark.parametrize(("place", "node"), [*((place, "one") for place in PLACES), ("both", "two")])
def test_a_hold_counts_where_its_holder_cannot_be_seen(place: str, holder_is_inside: bool, node: str) -> None:
    theirs, ours = (place, "") if holder_is_inside else ("", place)
    clear = inside(ours, COMMAND, "clear", node, "b")
    with started(*inside(theirs, COMMAND, "hold", node, "b", *WAIT)):
        assert UNSEEN in told(*clear)
        assert "busy: held by" in told(*inside(ours, COMMAND, "store", "compact", STORE))
    runs(*clear)


@needs_root
@pytest.mark.parametrize("place", ["", "both"])
def test_a_hold_ends_with_its_holder_while_the_command_goes_on(place: str) -> None:
    with started(COMMAND, "hold", "one", "b", *WAIT) as holder:
        clear = inside(place, COMMAND, "clear", "one", "b")
        assert (UNSEEN if place else "busy: held by 'sh' (process ") in told(*clear)
        holder.kill()
        holder.wait(60)
        runs(*clear)
        runs(*inside(place, COMMAND, "store", "compact", STORE))


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that any user may use."""
    with tempfile.TemporaryDirectory(prefix="dirtmap-tests-", dir="/dev/shm") as path:
        os.chmod(path, 0o1777)
        yield Path(path)


@needs_root
def test_a_hold_counts_where_proc_hides_its_holder(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.access(COMMAND, os.X_OK) or os.stat(Path(COMMAND).parent).st_mode & 0o005 != 0o005:
        pytest.skip("another user cannot start the command")
    monkeypatch.chdir(shared)
    monkeypatch.setenv("DIRTMAP_STORE", str(shared / STORE))
    Path("one.raw").touch()
    os.truncate("one.raw", SIZE)
    dirtmap("node", "add", "one", "one.raw")
    dirtmap("add", "one", "b")
    for path in (STORE, "one.raw"):
        os.chmod(path, 0o666)
    hide = 'mount -t proc -o hidepid=2 proc /proc && exec setpriv --reuid=65534 --regid=65534 --clear-groups "$@"'
    other = ["env", f"DIRTMAP_INDEX={shared}/other", "unshare", "--mount", "sh", "-c", hide, "sh"]
    with started(COMMAND, "hold", "--trust", "one", "b", *WAIT):  # root knows that the other may write the store
        assert UNSEEN in told(*other, COMMAND, "clear", "one", "b")
    runs(*other, COMMAND, "clear", "one", "b")


# The lock is what tells.


def test_the_byte_of_a_hold_is_the_one_of_the_specification() -> None:
    with dm.open("one") as image, image.hold("b"), Store(STORE) as target:
        record = target.record(b"one")
        assert record
        (held,) = holds.all_holds(record)
        byte = 2**62 + int.from_bytes(held.token[:8], "big") % 2**62
        with Path(STORE).open("rb") as file:
            form = struct.Struct("@hhqqi")
            asked = form.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            assert form.unpack(fcntl.fcntl(file, fcntl.F_OFD_GETLK, asked))[0] == fcntl.F_WRLCK


def test_a_hold_that_nobody_locks_is_stale_though_its_process_number_is_in_use() -> None:
    with Store(STORE) as target, target.change() as change:
        record = change.table.get(b"one")
        assert record
        change.table.put(holds.with_holds(record, [holds.hold(b"b", "before the reboot")]))
    assert not is_busy()
    dirtmap("clear", "one", "b")


class Untold(File):
    """Of a file system that tells nothing of the locks of holds."""

    def locked_by_other(self, offset: int, length: int = 1) -> bool:
        if offset < 1 << 62:
            return super().locked_by_other(offset, length)
        raise StorageError(self.path, "lock: Invalid argument")


def test_a_hold_of_which_the_file_system_tells_nothing_counts() -> None:
    with Store(STORE) as target, target.change() as change:
        record = change.table.get(b"one")
        assert record
        change.table.put(holds.with_holds(record, [holds.hold(b"b", "who knows")]))
    with using(Untold):
        error = error_of("clear", "one", "b")
        assert "busy: held by 'who knows'" in error
        assert "nobody can tell whether that has ended (lock: Invalid argument); --no-lock takes it for ended" in error
        assert is_busy()
    dirtmap("clear", "one", "b")


def test_a_hold_of_which_the_file_system_tells_nothing_ends_with_the_word_of_the_user() -> None:
    for target in ("one", "two"):
        with Store(STORE) as store, store.change() as change:
            record = change.table.get(target.encode())
            assert record
            change.table.put(holds.with_holds(record, [holds.hold(b"b", "who knows")]))
        with using(Untold):
            assert "--no-lock" in error_of("clear", target, "b")
            dirtmap("clear", target, "b", "--no-lock")
            with dm.open(target, lock=False) as image, image.transaction() as bitmaps:
                bitmaps.rename("b", "c")


def test_a_hold_counts_where_locks_stay_on_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(STORE) as target, target.change() as change:
        record = change.table.get(b"one")
        assert record
        change.table.put(holds.with_holds(record, [holds.hold(b"b", "another machine")]))
    monkeypatch.setattr(fileio, "file_system", lambda device: ("nfs", "nolock"))
    monkeypatch.setattr(fileio, "_lock_faults", {})  # what was found a moment ago
    assert is_busy()
    assert "--no-lock" in error_of("clear", "one", "b")
    dirtmap("clear", "one", "b", "--no-lock")
    with dm.open("one", lock=False) as image, image.hold("b"):
        assert "busy: held by 'dirtmap'" in error_of("clear", "one", "b", "--no-lock")


# Several holds of one process, and its children.


def test_holds_of_threads_end_one_by_one() -> None:
    begun, end = threading.Barrier(3), [threading.Event(), threading.Event()]

    def hold(number: int) -> None:
        with dm.open("one") as image, image.hold("b", f"thread {number}"):
            begun.wait(60)
            end[number].wait(60)

    threads = [threading.Thread(target=hold, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    begun.wait(60)
    for number in range(2):
        assert "busy: held by" in error_of("clear", "one", "b")
        end[number].set()
        threads[number].join(60)
    dirtmap("clear", "one", "b")


def test_one_bitmap_is_held_twice_by_one_handle() -> None:
    with dm.open("one") as image, image.hold("b", "outer"):
        with image.hold("b", "inner"):
            assert is_busy()
        assert "held by 'outer'" in error_of("clear", "one", "b")
    dirtmap("clear", "one", "b")


@pytest.mark.parametrize("node", ["one", "two"])
def test_a_forked_child_does_not_end_the_hold_of_its_parent(node: str) -> None:
    def leave() -> bool:
        hold.__exit__(None, None, None)
        return True

    with dm.open(node) as image:
        hold = image.hold("b")
        hold.__enter__()
        assert in_child(leave)
        assert is_busy(node)
        hold.__exit__(None, None, None)
        assert not is_busy(node)


def test_a_forked_child_does_not_keep_the_hold_of_its_parent() -> None:
    readable, writable = os.pipe()
    parent = os.fork()
    if parent == 0:
        try:
            with dm.open("one") as image, image.hold("b"):
                child = os.fork()
                if child:
                    os.write(writable, child.to_bytes(8))
                signal.pause()
        finally:
            os._exit(1)
    child = int.from_bytes(os.read(readable, 8))
    try:
        assert is_busy()
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        os.kill(child, 0)
        assert not is_busy()
        dirtmap("clear", "one", "b")
    finally:
        os.kill(child, signal.SIGKILL)


# The lock is on the file: nothing takes the store's place meanwhile.


@pytest.mark.parametrize("command", ["compact", "new-identity"])
def test_no_other_file_takes_the_place_of_a_store_in_which_a_bitmap_is_held(command: str) -> None:
    inode = os.stat(STORE).st_ino
    for node in ("one", "two"):
        with dm.open(node) as image, image.hold("b"):
            assert f"node '{node}': bitmap 'b': busy: held by 'dirtmap' (process " in error_of("store", command, STORE)
    assert os.stat(STORE).st_ino == inode
    assert list(Path().glob("*.tmp")) == []
    dirtmap("store", command, STORE)
    assert os.stat(STORE).st_ino != inode


def test_repair_waits_for_a_hold_though_damage_hides_its_record() -> None:
    inode = os.stat(STORE).st_ino
    hold = dm.open("one").hold("b")
    hold.__enter__()

    def damage_table() -> None:
        with Store(STORE) as target:
            flip(target.read(lambda snapshot: snapshot.header.table.offset))

    damage_table()
    assert "a bitmap in it is held" in error_of("check", "-r", "all", STORE)
    assert os.stat(STORE).st_ino == inode
    hold.__exit__(None, None, None)  # it has read what is damaged now, and writes it anew
    dirtmap("check", STORE)
    damage_table()
    dirtmap("check", "-r", "all", STORE)
    assert os.stat(STORE).st_ino != inode


def test_a_holder_is_told_that_its_store_was_replaced() -> None:
    with dm.open("one") as image:
        hold = image.hold("b")
        hold.__enter__()
        shutil.copy(STORE, "copy")
        os.replace("copy", STORE)
        with pytest.raises(GoneError, match="was replaced while bitmap 'b' was held"):
            hold.__exit__(None, None, None)


def test_a_byte_that_somebody_else_locks_is_refused() -> None:
    with File(STORE, writable=True) as file:
        form = struct.Struct("@hhqqi")
        fcntl.fcntl(file.fd, fcntl.F_OFD_SETLK, form.pack(fcntl.F_WRLCK, os.SEEK_SET, 2**62, 0, 0))
        with dm.open("one") as image, pytest.raises(LockedError, match="bytes that are for holds"), image.hold("b"):
            pass
    assert not is_busy()


# Several at once.


def commits() -> int:
    with Store(STORE) as target:
        return target.read(lambda snapshot: snapshot.header.generation)


@pytest.mark.parametrize("node", ["one", "two"])
def test_several_holds_by_one_commit(node: str) -> None:
    dirtmap("add", node, "c")
    dirtmap("add", node, "free")
    with dm.open(f"node:{node}") as image:
        before = commits()
        with image.hold_all(["b", "c", "b"], "backup"):
            assert commits() == before + 1
            assert [bitmap.name for bitmap in image.info().bitmaps if bitmap.busy] == ["b", "c"]
            assert "busy: held by 'backup'" in error_of("remove", node, "c")
            with image.hold("c"):
                pass
            assert "busy: held by 'backup'" in error_of("clear", node, "c")
            dirtmap("clear", node, "free")
        with image.hold_all([]):
            pass
        with pytest.raises(dm.BitmapNotFoundError), image.hold_all(["b", "none"]):
            pytest.fail("held")
        assert not any(bitmap.busy for bitmap in image.info().bitmaps)


def put_copy_in_place() -> None:
    shutil.copy(STORE, "new")
    os.replace("new", STORE)


def test_several_holds_end_with_their_store() -> None:
    dirtmap("add", "one", "c")
    gone = pytest.raises(GoneError, match="replaced while 2 bitmaps were held")
    with dm.open("node:one") as image, gone, image.hold_all(["b", "c"]):
        put_copy_in_place()
