"""QEMU and dirtmap keep out of each other's way: nobody writes what another has open, and readers disturb nobody."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.qemu import StorageDaemon, ToolError, bitmaps, check, create, dirty, extents, qemu_img, qemu_io, run

import dirtmap.engine as dm
from dirtmap.engine.model import changes
from dirtmap.engine.system import file as fileio

MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An image with a bitmap ``b0``, its first 64 KiB and last granule dirty."""
    path = tmp_path / "disk.qcow2"
    create(path, 4 * MIB)
    qemu_img("bitmap", "--add", path, "b0")
    qemu_io(path, "write 0 1", f"write {4 * MIB - 1} 1")
    return path


B0 = [(0, 65536), (4 * MIB - 65536, 65536)]


WAIT = 0.2  # seconds; what is waited for here never comes


def write(path: Path) -> None:
    with dm.open(path, force_share=True, wait=WAIT) as image, image.transaction() as changed:
        changes.add(changed, "new")


WRITERS: dict[str, Callable[[Path], object]] = {
    "transaction": write,
    "recover": lambda path: dm.recover(path, wait=WAIT),
    "repair": lambda path: dm.check(path, repair="all", wait=WAIT),
}
READERS: dict[str, Callable[[Path], object]] = {
    "open": lambda path: dm.open(path, wait=WAIT),
    "describe": lambda path: dm.describe(path, wait=WAIT),
    "check": lambda path: dm.check(path, wait=WAIT),
    "dump": lambda path: dm.dump(path, wait=WAIT),
}


@pytest.mark.parametrize("use", [*WRITERS, *READERS])
def test_an_image_that_qemu_writes_is_refused(path: Path, use: str) -> None:
    with StorageDaemon(path) as daemon:
        before = path.read_bytes()
        with pytest.raises(dm.LockedError) as refusal:
            {**WRITERS, **READERS}[use](path)
        assert str(path) in str(refusal.value)
        assert f"qemu-storage-da (process {daemon.pid})" in str(refusal.value)
        assert path.read_bytes() == before
        daemon.io("write 1M 1")
        daemon.quit()
    assert dirty(path, "b0") == [B0[0], (MIB, 65536), B0[1]]
    check(path)


def test_forced_reading_of_an_image_that_qemu_writes(path: Path) -> None:
    """What QEMU has in memory is not seen: it has marked its bitmaps as in use."""
    with StorageDaemon(path) as daemon:
        daemon.io("write 1M 1")
        with dm.open(path, force_share=True) as image:
            assert list(image) == ["b0"]
            assert image["b0"].inconsistent
        assert dm.describe(path, force_share=True).bitmaps[0].inconsistent
        assert dm.dump(path, force_share=True)["faults"] == []
        assert dm.check(path, force_share=True).corruptions == 0
        daemon.quit()
    assert dirty(path, "b0") == [B0[0], (MIB, 65536), B0[1]]


def test_an_image_that_qemu_reads(path: Path) -> None:
    """It may be read, and not be written: QEMU does not expect it to change."""
    with StorageDaemon(path, "read-only=on") as daemon:
        with dm.open(path) as image:
            assert extents(image["b0"]) == B0
        assert dm.check(path).findings == []
        for use in WRITERS.values():
            with pytest.raises(dm.LockedError, match=f"process {daemon.pid}"):
                use(path)
        daemon.quit()
    write(path)


def test_an_image_that_qemu_reads_and_shares(path: Path) -> None:
    with StorageDaemon(path, "read-only=on", "force-share=on") as daemon:
        write(path)
        daemon.quit()
    check(path)
    assert set(bitmaps(path)) == {"b0", "new"}


def test_qemu_is_kept_out_of_a_transaction(path: Path) -> None:
    with dm.open(path) as image, image.transaction() as changed:
        for attempt in (
            lambda: qemu_io(path, "write 0 1"),
            lambda: qemu_img("bitmap", "--add", path, "b1"),
            lambda: qemu_img("resize", "-f", "qcow2", path, "8M"),
            lambda: qemu_img("info", path),
            lambda: StorageDaemon(path).__enter__(),
            lambda: run("qemu-io", "-f", "raw", "-c", "write 0 1", str(path)),  # would let others write beside it
        ):
            with pytest.raises(ToolError, match=r'Failed to get (shared )?"write" lock'):
                attempt()
        qemu_img("info", "-U", path)
        changes.add(changed, "b1")
        changes.mark(changed, "b0", [MIB], [1])
    check(path)
    qemu_io(path, "write 2M 1")
    assert dirty(path, "b0") == [B0[0], (MIB, 65536), (2 * MIB, 65536), B0[1]]
    assert dirty(path, "b1") == [(2 * MIB, 65536)]


def test_qemu_may_write_after_a_failed_transaction(path: Path) -> None:
    with dm.open(path) as image, contextlib.suppress(KeyboardInterrupt), image.transaction():
        raise KeyboardInterrupt
    qemu_io(path, "write 0 1")
    with dm.open(path) as image:
        assert image["b0"].count
        with StorageDaemon(path) as daemon:  # an open image that is not being read is nobody's concern
            with pytest.raises(dm.LockedError):
                len(image)
            daemon.quit()
        assert len(image) == 1


@contextlib.contextmanager
def during_a_read(happen: Callable[[], object]) -> Iterator[None]:
    """Lets something happen, once, when dirtmap has read an image's metadata and comes to a bitmap's bits."""

    class Interrupted(fileio.File):
        def read_into(self, offset: int, buffer: memoryview) -> None:
            nonlocal pending
            if pending:
                pending = False
                happen()
            super().read_into(offset, buffer)

    pending = True
    with fileio.using(Interrupted):
        yield
    assert not pending


def test_a_reader_does_not_disturb_qemu_but_does_not_answer_either(path: Path) -> None:
    daemon = StorageDaemon(path)
    with during_a_read(daemon.__enter__), dm.open(path) as image:
        try:
            with pytest.raises(dm.LockedError, match=f"process {daemon.pid if hasattr(daemon, 'pid') else ''}"):
                image["b0"]
            daemon.io("write 1M 1")
            daemon.quit()
        finally:
            daemon.kill()
        assert extents(image["b0"]) == [B0[0], (MIB, 65536), B0[1]]


def test_a_writer_that_came_and_went_while_dirtmap_read(path: Path) -> None:
    """Where the bits were, there are zeros of the guest now: to answer with them would lose dirty bits."""

    def happen() -> None:
        qemu_img("bitmap", "--remove", path, "b0")
        qemu_io(path, *(f"write -P 0 {2 * MIB + number * 65536} 64k" for number in range(4)))

    with during_a_read(happen), dm.open(path) as image:
        with contextlib.suppress(dm.LockedError):
            assert extents(image["b0"]) == B0
        with pytest.raises(dm.BitmapNotFoundError):
            image["b0"]


def test_a_dirtmap_that_writes_keeps_other_dirtmaps_out(path: Path) -> None:
    with dm.open(path) as image, image.transaction() as changed:
        for use in {**READERS, **WRITERS}.values():
            with pytest.raises(dm.LockedError):
                use(path)
        with dm.open(path, force_share=True) as other:
            assert extents(other["b0"]) == B0
        changes.clear(changed, "b0")
        with dm.open(path, force_share=True) as other:
            assert extents(other["b0"]) == B0
    with dm.open(path) as image:
        assert extents(image["b0"]) == []


def test_a_writer_waits_for_a_short_while(path: Path) -> None:
    entered = threading.Event()

    def hold() -> None:
        with dm.open(path) as image, image.transaction() as changed:
            entered.set()
            time.sleep(0.1)
            changes.mark(changed, "b0", [MIB], [1])

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait()
    write(path)
    holder.join()
    assert set(bitmaps(path)) == {"b0", "new"}
    assert dirty(path, "b0") == [B0[0], (MIB, 65536), B0[1]]


def test_a_holder_that_is_a_process(path: Path) -> None:
    script = """
import sys
import dirtmap.engine as dm
with dm.open(sys.argv[1]) as image, image.transaction() as changed:
    print("ready", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout
        holder.stdout.readline()
        for use in {**READERS, **WRITERS}.values():
            with pytest.raises(dm.LockedError, match=f"process {holder.pid}"):
                use(path)
        holder.kill()
    write(path)
    check(path)


ADD_MANY = """
import sys
import dirtmap.engine as dm
from dirtmap.engine.model import changes
path, worker, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for number in range(count):
    while True:
        try:
            with dm.open(path, force_share=True) as image, image.transaction() as changed:
                changes.add(changed, f"{worker}.{number}", 4096)
                changes.mark(changed, f"{worker}.{number}", [worker * 65536 + number * 4096], [1])
                changes.mark(changed, "b0", [1 << 20 | worker << 18 | number << 16], [1])
            break
        except dm.LockedError:
            pass
"""


def test_many_writers_at_once_lose_nothing(path: Path) -> None:
    workers, count = 4, 4
    running = [
        subprocess.Popen([sys.executable, "-c", ADD_MANY, path, str(worker), str(count)]) for worker in range(workers)
    ]
    try:
        # QEMU is one of them.
        for number in range(8):
            while True:
                try:
                    qemu_io(path, f"write {3 * MIB + number * 65536} 1")
                    break
                except ToolError as error:
                    if "lock" not in str(error):
                        raise
        assert [process.wait(timeout=60) for process in running] == [0] * workers
    finally:
        for process in running:
            process.kill()
            process.wait()
    check(path)
    assert set(bitmaps(path)) == {"b0"} | {f"{worker}.{number}" for worker in range(workers) for number in range(count)}
    assert dirty(path, "b0") == [B0[0], (MIB, MIB), (3 * MIB, 512 * 1024), B0[1]]
    for worker in range(workers):
        for number in range(count):
            assert dirty(path, f"{worker}.{number}")[0] == (worker * 65536 + number * 4096, 4096)


def test_an_image_that_was_replaced_is_not_written(path: Path, tmp_path: Path) -> None:
    """Locks follow the file, not its name."""
    other = tmp_path / "other.qcow2"
    create(other, 4 * MIB)
    qemu_img("bitmap", "--add", other, "b0")
    with dm.open(path) as image:
        os.replace(other, path)
        before = path.read_bytes()
        with pytest.raises(dm.LockedError, match="replaced"), image.transaction() as changed:
            changes.clear(changed, "b0")
        with pytest.raises(dm.LockedError, match="replaced"):
            image["b0"]
        assert path.read_bytes() == before


def test_an_image_that_is_replaced_while_dirtmap_waits_for_it(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.qcow2"
    create(other, 4 * MIB)
    entered = threading.Event()

    def hold() -> None:
        with dm.open(path) as image, image.transaction():
            entered.set()
            time.sleep(0.1)
            os.replace(other, path)

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait()
    with pytest.raises(dm.LockedError, match="replaced"):
        write(path)
    holder.join()
    assert bitmaps(path) == {}
