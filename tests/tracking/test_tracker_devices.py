"""Tracking a device: one mark feeds its bitmaps and its root's, wherever these are, and neither ever loses a bit."""

from __future__ import annotations

import functools
import json
import mmap
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from support import qemu
from support.power import REGION, SIZE, Recording, expected, use
from support.tracking import GRANULE, Shared, forget_index, kill, make_node, mark, model_of

import dirtmap.engine as dm
from dirtmap.engine.host import calls as containers
from dirtmap.engine.host import tracked
from dirtmap.engine.storefile.file import Store, create
from dirtmap.engine.system import file as fileio
from dirtmap.engine.system import livefs
from dirtmap.engine.tracking import recorder
from dirtmap.engine.tracking.home import Home, HomeChange
from dirtmap.engine.tracking.tracker import Tracker
from dirtmap.fmt import live
from dirtmap.fmt import store as fmt_store
from dirtmap.fmt.store import KIND_DEVICE, Record
from dirtmap.fmt.structures.live import build_peer
from dirtmap.tools.cli import main

COUNT = SIZE // GRANULE
STEP = 11  # of the points at which a short run dies
DEVICE, NODE = "device:disk0", "node:drive0"
BOTH = (DEVICE, NODE)
EXACT, LOGGED, ALL_DIRTY = "exact", "logged regions", "all dirty"


def raw_here(folder: Path) -> Path:
    """A raw root in the device's store."""
    return make_node(folder, SIZE)


def raw_elsewhere(folder: Path) -> Path:
    """A raw root in a store of its own, which the default store knows."""
    there = folder / "there"
    there.mkdir()
    path = make_node(there, SIZE)
    create(str(folder / "default.dmap"))
    containers.this_host().registry.remember_store(str(there / "default.dmap"))
    return path


def qcow2(folder: Path) -> Path:
    """A qcow2 root, which keeps its bitmaps itself."""
    path = folder / "drive0.qcow2"
    qemu.create(path, SIZE)
    qemu.qemu_img("bitmap", "--add", path, "b0")
    create(str(folder / "default.dmap"))
    containers.this_host().add_qcow2("drive0", str(path))
    return path


ROOTS = (raw_here, raw_elsewhere, qcow2)


def make(folder: Path, root: Callable[[Path], Path]) -> Path:
    """A device ``disk0`` with a recording bitmap ``d0``, on the node ``drive0``, which has ``b0``; the image's path."""
    path = root(folder)
    containers.this_host().add_device("disk0", "drive0")
    with dm.open(DEVICE) as image, image.transaction() as bitmaps:
        bitmaps["d0"] = dm.Bitmap(SIZE, GRANULE)
    return path


@pytest.fixture(params=ROOTS, ids=lambda root: root.__name__)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make(tmp_path, request.param)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return make(tmp_path, raw_here)


def granules(bitmap: dm.Bitmap) -> list[int]:
    return np.flatnonzero(model_of(bitmap)).tolist()  # type: ignore[no-any-return]


def dirty(target: str, name: str) -> list[int]:
    with dm.open(target) as image:
        return granules(image[name])


def both() -> tuple[list[int], list[int]]:
    """What the device has, and what its root."""
    return dirty(DEVICE, "d0"), dirty(NODE, "b0")


def in_child(act: Callable[[], object]) -> None:
    """Has a child do it, that kills itself when it is done, or fails the test."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os.kill(os.getpid(), signal.SIGKILL)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def recover(target: str) -> dict[str, str]:
    return {item.name: item.how.partition(":")[0] for item in dm.recover(target)}


def no_traces(folder: Path) -> None:
    """Neither live files nor logs are left."""
    assert not list(folder.rglob("*.intent"))
    live = Path(os.environ["DIRTMAP_LIVE"])
    assert not [file for file in live.rglob("*") if file.is_file()]


# What is fed.


def test_one_mark_feeds_both(path: Path, tmp_path: Path) -> None:
    with dm.open("disk0") as image, image.track() as tracker:
        tracker.mark(5 * GRANULE, 1)
        assert both() == ([5], [5])
        tracker.save()
        tracker.checkpoint("monday")
        tracker.mark(6 * GRANULE, 1)
        assert both() == ([5, 6], [5, 6])
        tracker.clear("d0")  # an act on the device's bitmaps; the root's go on
        tracker.mark(7 * GRANULE, 1)
        assert both() == ([7], [5, 6, 7])
        with dm.open(NODE) as root:
            assert "monday" not in root
    assert both() == ([7], [5, 6, 7])
    assert dirty(DEVICE, "monday") == [6, 7]
    with dm.open("disk0") as image, image.track() as tracker:  # nothing has come into doubt
        tracker.mark(0, 1)
        assert np.flatnonzero(model_of(tracker.changed_since("monday"))).tolist() == [0, 6, 7]
    assert both() == ([0, 7], [0, 5, 6, 7])
    no_traces(tmp_path)


def test_exact_against_a_model_with_threads_cuts_and_saves(path: Path) -> None:
    models = [np.zeros(COUNT, np.uint8) for _ in range(3)]
    with dm.open("disk0") as image, image.track(save_interval=0) as tracker:
        tracker.add("fine", 4096)

        def work(number: int) -> None:
            rng = random.Random(number)
            for _ in range(2000):
                offset, length = rng.randrange(SIZE - (1 << 18)), rng.choice((512, 4096, 1 << 18))
                mark(models[number], offset, length)
                with tracker.write(offset, length):
                    pass

        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        rng = random.Random(99)
        for number in range(12):
            if rng.random() < 0.5:
                tracker.save()
            else:
                tracker.checkpoint(f"c{number}")
            seen = [set(found) for found in both()]
            assert seen[0] <= set(np.flatnonzero(np.bitwise_or.reduce(models)).tolist())
        for thread in threads:
            thread.join()
    expected = np.flatnonzero(np.bitwise_or.reduce(models)).tolist()
    assert both() == (expected, expected)


def failing(tracker: Tracker, patch: pytest.MonkeyPatch) -> list[bool]:
    """Has the root's store fail, as long as the list is not empty."""
    fails, change = [True], Home.change

    def changing(home: Home, session: bytes | None) -> AbstractContextManager[HomeChange]:
        if fails and home is tracker._homes[-1]:
            raise dm.StorageError("root", "no space left on device")
        return change(home, session)

    patch.setattr(Home, "change", changing)
    return fails


@pytest.mark.parametrize("then", ["killed", "power loss", "saved"])
def test_a_root_whose_save_failed_loses_nothing(path: Path, then: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved in the device's store, not in the root's; then the process dies."""

    def act() -> None:
        tracker = dm.open("disk0").track(save_interval=0, region_size=1 << 20)
        tracker.mark(1 * GRANULE, 1)
        tracker.checkpoint("one")
        fails = failing(tracker, monkeypatch)
        for granule in (20, 40, 60):  # no log may be begun anew while the root needs it
            tracker.mark(granule * GRANULE, 1)
            with pytest.raises(dm.StorageError, match="no space"):
                tracker.save()
        tracker.checkpoint("two")
        tracker.take("d0")
        tracker.give_back("d0")  # which forgets the writesets that nobody needs
        if then == "saved":
            fails.clear()
            tracker.save()
        tracker.mark(80 * GRANULE, 1)

    in_child(act)
    marked = [1, 20, 40, 60, 80]
    if then == "power loss":
        with dm.open(NODE) as root:
            status = root.tracking()
        assert status
        shutil.rmtree(status.live)
        for target, name in ((DEVICE, "d0"), (NODE, "b0")):
            found = set(dirty(target, name))
            assert set(marked) <= found <= {granule // 16 * 16 + at for granule in marked for at in range(16)}
        assert recover(NODE) == {"b0": LOGGED}
        return
    assert dirty(NODE, "b0") == marked
    assert sorted({*dirty(DEVICE, "d0"), *dirty(DEVICE, "one"), *dirty(DEVICE, "two")}) == marked
    assert recover(NODE) == {"b0": EXACT}
    assert dirty(NODE, "b0") == marked


def test_a_root_whose_end_failed_is_recovered(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with dm.open("disk0") as image, monkeypatch.context() as patch:
        tracker = image.track(save_interval=0)
        tracker.mark(3 * GRANULE, 1)
        failing(tracker, patch)
        with pytest.raises(dm.StorageError, match="no space"):
            tracker.close()
    assert sessions() == [False, True]
    assert both() == ([3], [3])
    assert recover(NODE) == {"b0": EXACT}
    assert both() == ([3], [3])
    no_traces(tmp_path)


def test_as_fine_as_the_finest_of_both(raw: Path) -> None:
    with dm.open(NODE) as image, image.transaction() as bitmaps:
        bitmaps["fine"] = dm.Bitmap(SIZE, 512)
    with dm.open(DEVICE) as image, image.transaction() as bitmaps:
        bitmaps["finer"] = dm.Bitmap(SIZE, 4096)
    with dm.open("disk0") as image, image.track() as tracker:
        tracker.mark(8192, 512)
    assert dirty(NODE, "fine") == [16]
    assert dirty(DEVICE, "finer") == [2]
    with dm.open(NODE) as image, image.transaction() as bitmaps:
        del bitmaps["fine"]
    with dm.open("disk0") as image, image.track() as tracker:
        tracker.mark(1 << 20, 4096)
    assert dirty(DEVICE, "finer") == [2, 256]


@pytest.mark.parametrize("bitmaps", [0, 1])
def test_others_that_write_to_a_qcow2_root_while_it_is_tracked_make_both_all_dirty(
    tmp_path: Path, bitmaps: int
) -> None:
    path = make(tmp_path, qcow2)
    if not bitmaps:  # then a check-in has nothing to write
        qemu.qemu_img("bitmap", "--remove", path, "b0")
    warned = pytest.warns(RuntimeWarning, match="another program has opened the image")
    with warned, dm.open("disk0") as image, image.track() as tracker:
        tracker.mark(0, 1)
        qemu.qemu_io(path, "write 1M 1")
    for target, name in ((DEVICE, "d0"), (NODE, "b0"))[: bitmaps + 1]:
        assert dirty(target, name) == list(range(COUNT))


# Deaths.


def sessions() -> list[bool]:
    """Whether the device and the root have one."""
    found = []
    for target in BOTH:
        with dm.open(target) as image:
            found.append(image.tracking() is not None)
    return found


@pytest.mark.parametrize("order", [BOTH, BOTH[::-1]], ids=["device first", "root first"])
def test_exact_after_sigkill_in_either_order(path: Path, tmp_path: Path, order: tuple[str, str]) -> None:
    def act() -> None:
        tracker = dm.open("disk0").track()
        tracker.mark(5 * GRANULE, 1)
        tracker.save()
        tracker.checkpoint("monday")
        tracker.mark(6 * GRANULE, 1)

    in_child(act)
    assert sessions() == [True, True]
    assert both() == ([5, 6], [5, 6])  # shown at once, whichever is read first
    how = {**recover(order[0])}
    assert both() == ([5, 6], [5, 6])
    assert sessions() == [False, order[0] == DEVICE]  # the device's ends before its root's, or alone
    how.update(recover(order[1]))
    assert set(how.values()) == {EXACT}
    assert both() == ([5, 6], [5, 6])
    assert dirty(DEVICE, "monday") == [6]
    assert recover(DEVICE) == recover(NODE) == {}
    no_traces(tmp_path)
    if path.suffix == ".qcow2":
        qemu.check(path)
        found = [
            at // GRANULE for first, length in qemu.dirty(path, "b0") for at in range(first, first + length, GRANULE)
        ]
        assert found == [5, 6]
    with dm.open("disk0") as image, image.track() as tracker:
        tracker.mark(7 * GRANULE, 1)
    assert both() == ([5, 6, 7], [5, 6, 7])


def test_neither_needs_bitmaps(path: Path, tmp_path: Path) -> None:
    for target in BOTH:
        with dm.open(target) as image, image.transaction() as bitmaps:
            bitmaps.clear()
    with dm.open("disk0") as image, image.track() as tracker:
        tracker.mark(0, 1)
    assert sessions() == [False, False]
    in_child(lambda: dm.open("disk0").track().mark(0, 1))
    assert sessions() == [True, True]
    assert recover(NODE) == {}
    assert sessions() == [False, False]
    no_traces(tmp_path)


@pytest.mark.parametrize("order", [BOTH, BOTH[::-1]], ids=["device first", "root first"])
@pytest.mark.parametrize("intent", ["region", "off"])
def test_a_power_loss_leaves_a_superset_of_both(
    path: Path, tmp_path: Path, order: tuple[str, str], intent: str
) -> None:
    def act() -> None:
        tracker = dm.open("disk0").track(region_size=1 << 20, intent=intent)
        tracker.mark(5 * GRANULE, 1)
        tracker.save()
        tracker.mark(40 * GRANULE, 1)
        tracker.checkpoint("monday")

    in_child(act)
    with dm.open(DEVICE) as image:
        status = image.tracking()
        assert status
        assert not status.alive
    shutil.rmtree(status.live)
    expected = [5, *range(32, 48)] if intent == "region" else list(range(COUNT))
    assert both() == (expected, expected)
    how = recover(order[0]) | recover(order[1])
    assert set(how.values()) == {LOGGED if intent == "region" else ALL_DIRTY}
    assert both() == (expected, expected)
    no_traces(tmp_path)


def test_what_others_wrote_makes_both_all_dirty(path: Path) -> None:
    in_child(lambda: dm.open("disk0").track().mark(0, 1))
    if path.suffix == ".qcow2":
        qemu.qemu_io(path, "write 1M 1")
    else:
        time.sleep(0.6)
        with path.open("r+b") as file:
            file.write(b"x")
    for target in BOTH:
        assert set(recover(target).values()) == {ALL_DIRTY}
    assert both() == (list(range(COUNT)), list(range(COUNT)))


def test_a_device_is_judged_before_its_root_is_tracked_again(path: Path) -> None:
    """Else writes of the second tracker, of which the device is told nothing, would look like the first one's."""
    in_child(lambda: dm.open("disk0").track().mark(0, 1))
    with dm.open(NODE) as image, image.track() as tracker:
        assert sessions() == [False, True]
        tracker.mark(GRANULE, 1)
        if path.suffix == ".raw":
            with path.open("r+b") as file:
                file.write(b"x")
    assert dirty(NODE, "b0") == [0, 1]
    assert 1 in dirty(DEVICE, "d0")


def test_a_device_whose_root_has_lost_the_session_is_all_dirty(raw: Path) -> None:
    in_child(lambda: dm.open("disk0").track().mark(0, 1))
    with Store(os.environ["DIRTMAP_STORE"]) as target, target.change() as change:
        record = change.table.get(b"drive0")
        assert record
        change.table.put(replace(record, extensions=()))
    assert dirty(DEVICE, "d0") == list(range(COUNT))
    assert recover(DEVICE) == {"d0": ALL_DIRTY}


@pytest.mark.parametrize("damaged", [DEVICE, NODE])
def test_only_recover_itself_gives_up_what_a_damaged_directory_had(path: Path, damaged: str) -> None:
    """Each change recovers first what a tracker has left; nobody is told what becomes of it then."""
    in_child(lambda: dm.open("disk0").track().mark(0, 1))
    kind, name = damaged.split(":")
    stores = {Path(os.environ["DIRTMAP_STORE"]), path.parent / "default.dmap"}
    for store in stores:
        with Store(str(store)) as target:
            record = target.record(name.encode())
        if record is not None:
            where, offset = store, record.directory.offset
    with where.open("r+b") as file:
        file.seek(offset + 40)
        file.write(b"???")
    before = [store.read_bytes() for store in stores]

    def change(target: str) -> None:
        with dm.open(target) as image, image.transaction() as bitmaps:
            bitmaps["x"] = dm.Bitmap(SIZE)

    def track(target: str) -> None:
        dm.open(target).track()

    acts: list[Callable[[], object]] = [lambda: change(damaged), lambda: track(damaged), lambda: track(DEVICE)]
    if damaged == DEVICE:  # the device ends its session before the root does
        acts += [lambda: change(NODE), lambda: track(NODE), lambda: recover(NODE)]
    for act in acts:
        with pytest.raises(dm.FormatError, match=f"directory of {kind} '{name}' at .* its checksum is wrong"):
            act()
    if damaged == DEVICE:
        assert [store.read_bytes() for store in stores] == before
    assert recover(damaged) == {"d0" if damaged == DEVICE else "b0": ALL_DIRTY}
    assert dirty(damaged, "d0" if damaged == DEVICE else "b0") == list(range(COUNT))


def die_at(point: int, folder: Path) -> set[int]:
    """A tracker that dies before the n-th write, sync or live file of anything; returns the granules it has marked."""
    granules, begun = (3, 20, 900), mmap.mmap(-1, 4096)

    def act() -> None:
        left = [point]

        def counting(original: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **kwargs: object) -> object:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            return call

        for holder, name in (
            (fileio.File, "write"),
            (fileio.File, "sync"),
            (livefs, "create_live"),
            (livefs, "remove_live_files"),
        ):
            setattr(holder, name, counting(getattr(holder, name)))
        with dm.open("disk0") as image:
            tracker = image.track(save_interval=0, region_size=1 << 20)
            for number, granule in enumerate(granules):
                with tracker.write(granule * GRANULE, 1):
                    begun[number] = 1
                if number == 0:
                    tracker.save()
                if number == 1:
                    tracker.checkpoint("monday")
            tracker.close()
        if left[0] > 0:
            begun[8] = 1
        os.kill(os.getpid(), signal.SIGKILL)

    in_child(act)
    if begun[8]:
        raise EOFError
    return {granule for number, granule in enumerate(granules) if begun[number]}


def dies_everywhere(folder: Path, root: Callable[[Path], Path], points: range, *, power: bool) -> int:
    """Killed before every n-th act on a disk, between the commits of two stores, too; with ``power``: tmpfs is lost."""
    made = folder / "made"
    made.mkdir()
    rng, wide = random.Random(0), 0
    for point in points:
        work = folder / f"{point}"
        work.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DIRTMAP_STORE", str(work / "default.dmap"))
            patch.setenv("DIRTMAP_INDEX", str(work / "index"))
            make(work, root)
            try:
                marked = die_at(point, work)
            except EOFError:
                return wide
            if power:
                for file in Path(os.environ["DIRTMAP_LIVE"]).rglob("*"):
                    if file.is_file():
                        file.unlink()
            for target in rng.sample(BOTH, 2):
                name = "d0" if target == DEVICE else "b0"
                found = set(dirty(target, name))
                assert marked <= found, (point, target, marked, len(found))
                if not power and not found <= {3, 20, 900}:
                    # All dirty only where a qcow2 root's image was being changed for check-out or check-in.
                    assert (root, target, len(found)) == (qcow2, DEVICE, COUNT), (point, target, found)
                    wide += 1
                recover(target)
                assert set(dirty(target, name)) == found, (point, target)
            with dm.open("disk0") as image, image.track() as tracker:
                tracker.mark(5 * GRANULE, 1)
            device, node = both()
            assert {5, *marked} <= set(device), point
            assert {5, *marked} <= set(node), point
            if root is qcow2:
                qemu.qemu_img("check", "-r", "leaks", work / "drive0.qcow2")  # leaks, and nothing worse
            no_traces(work)
        shutil.rmtree(work)
    raise AssertionError("it never came to its end")


@pytest.mark.parametrize("power", [False, True], ids=["killed", "power loss"])
@pytest.mark.parametrize("root", ROOTS, ids=lambda root: root.__name__)
def test_dead_before_any_act_on_a_disk(tmp_path: Path, root: Callable[[Path], Path], power: bool) -> None:
    print(dies_everywhere(tmp_path, root, range(1 + power, 1000, STEP), power=power), "times all dirty")


@pytest.mark.long
@pytest.mark.parametrize("power", [False, True], ids=["killed", "power loss"])
@pytest.mark.parametrize("root", ROOTS, ids=lambda root: root.__name__)
def test_dead_before_every_act_on_a_disk(tmp_path: Path, root: Callable[[Path], Path], power: bool) -> None:
    print(dies_everywhere(tmp_path, root, range(1, 1000), power=power), "times all dirty")


def lose_power(folder: Path, root: Callable[[Path], Path], seed: int, acts: int, crashes: int) -> int:
    """Runs a device's tracker to its end, then tries what crashes may leave, sector by sector; returns how many."""
    make(folder, root)
    with dm.open(DEVICE) as image, image.transaction() as bitmaps:
        bitmaps["b1"] = dm.Bitmap(SIZE)
    recording, rng = Recording(), random.Random(seed)
    with fileio.using(recording.files()), dm.open("disk0") as image:
        with image.track(save_interval=0, region_size=REGION) as tracker:
            recording.events.append("begun")
            use(recording, tracker, rng, acts)
            recording.events.append("closing")
        recording.events.append("closed")
    begun, closing, closed = map(recording.events.index, ("begun", "closing", "closed"))
    for at, disks in recording.states(rng, crashes):
        forget_index(folder)
        for path, disk in disks.items():
            times = os.stat(path) if os.path.exists(path) else None
            Path(path).write_bytes(disk)
            if times:
                os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        least, most, since = expected(recording.events[:at])
        how: dict[str, str] = {}
        for target in rng.sample(BOTH, 2):
            how |= recover(target)
        for target, name in ((DEVICE, "d0"), (NODE, "b0")):
            with dm.open(target) as image:
                assert image.tracking() is None
                found = {name: model_of(image[name]) for name in image}
            assert not (least & ~found[name]).any(), f"event {at}: {name} lost {np.flatnonzero(least & ~found[name])}"
            if begun < at <= closing:
                assert how.get(name, LOGGED) == LOGGED, f"event {at}: {how}"
            if begun < at <= closing or at > closed or root is not qcow2:
                assert not (found[name] & ~most).any(), f"event {at}: {name} not bounded: {how}"
            if target == DEVICE:
                names = [name for name in found if name.startswith("c")]
                for name, model in since.items():  # durable once the cut has returned
                    union = np.bitwise_or.reduce([found[later] for later in names[names.index(name) :]])
                    assert not (model & ~union).any(), f"event {at}: {name} lost {np.flatnonzero(model & ~union)}"
    return crashes


@pytest.mark.parametrize("root", ROOTS, ids=lambda root: root.__name__)
def test_power_loss_at_any_moment_loses_no_mark_of_either(tmp_path: Path, root: Callable[[Path], Path]) -> None:
    print(lose_power(tmp_path, root, 1, 60, 60), "crashes")


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("root", ROOTS, ids=lambda root: root.__name__)
def test_power_loss_at_any_of_many_moments_loses_no_mark_of_either(
    tmp_path: Path, root: Callable[[Path], Path], seed: int
) -> None:
    print(lose_power(tmp_path, root, 100 + seed, 200, 500), "crashes")


# What a damaged or hostile store says of peers.


def replace_peer(name: bytes, data: Callable[[Record], bytes]) -> None:
    with Store(os.environ["DIRTMAP_STORE"]) as target, target.change() as change:
        record = change.table.get(name)
        assert record
        kept = tuple(item for item in record.extensions if item[0] != fmt_store.EXTENSION_PEER)
        change.table.put(replace(record, extensions=(*kept, (fmt_store.EXTENSION_PEER, data(record)))))


def itself(record: Record) -> bytes:
    return build_peer(live.Peer(record.uuid, record.name, b""))


@pytest.mark.parametrize(
    "data",
    [
        itself,
        lambda record: itself(record)[:-1],
        lambda record: b"",
        lambda record: build_peer(live.Peer(bytes(16), b"\0", b"")),
        lambda record: build_peer(live.Peer(bytes(16), b"drive0", b"")),
        lambda record: build_peer(live.Peer(record.uuid, b"none", b"")),
        lambda record: build_peer(live.Peer(record.uuid, record.name, b"/nowhere")),
        lambda record: build_peer(live.Peer(record.uuid, record.name, b"/dev/zero")),
    ],
)
def test_a_peer_that_is_none_makes_the_device_all_dirty(raw: Path, data: Callable[[Record], bytes]) -> None:
    in_child(lambda: dm.open("disk0").track().mark(0, 1))
    replace_peer(b"disk0", data)
    replace_peer(b"drive0", data)
    assert both() == (list(range(COUNT)), [0])
    assert recover(NODE) == {"b0": EXACT}
    assert recover(DEVICE) == {"d0": ALL_DIRTY}
    assert both() == (list(range(COUNT)), [0])


def test_dump_tells_the_peers(path: Path) -> None:
    with dm.open("disk0") as image, image.track():
        for target in {dm.this_host().locate(DEVICE).path, os.environ["DIRTMAP_STORE"]}:
            fields = [field for area in dm.dump(target)["structures"] for field in area.get("fields", [])]
            assert {"name_size", "store_size"} <= {field["name"] for field in fields}


# Real processes, killed in the middle of everything.


def tracking(seed: int, shared: Shared, path: Path) -> None:
    """What the child does until it is killed: marks by threads, with writes to a raw root, beside cuts and saves."""
    rng = random.Random(seed)
    fd = os.open(path, os.O_RDWR)
    tracker = dm.open("disk0").track(save_interval=0, region_size=1 << 20)

    def work(number: int) -> None:
        own = random.Random(seed * 10 + number)
        while True:
            offset, length = own.randrange(SIZE - (1 << 18)), own.choice((512, 4096, 1 << 18))
            mark(shared.asked, offset, length)
            with tracker.write(offset, length):
                mark(shared.returned, offset, length)
                if path.suffix == ".raw":
                    os.pwrite(fd, b"x", offset)
            time.sleep(0.001)

    for number in range(3):
        threading.Thread(target=work, args=(number,), daemon=True).start()
    shared.started[0] = 1
    cuts = 0
    while True:
        if rng.random() < 0.5:
            tracker.save()
        else:
            cuts += 1
            tracker.checkpoint(f"c{seed}-{cuts}")


def kill_often(folder: Path, kills: int, root: Callable[[Path], Path]) -> int:
    """Kills trackers of a device; both namespaces have what had returned, and no more than was asked for."""
    path = make(folder, root)
    shared, rng = Shared(COUNT), random.Random(kills)
    for number in range(kills):
        kill(functools.partial(tracking, number, shared, path), shared, rng, 0.05)
        for target in rng.sample(BOTH, 2):
            with dm.open(target) as image:
                name = "d0" if target == DEVICE else "b0"
                before = model_of(image[name])
                how = {item.how.partition(":")[0] for item in image.recover()}
            with dm.open(target) as image:
                after = model_of(image[name])
            assert np.array_equal(before, after), (number, target)
            assert not (shared.returned & ~after).any(), (number, target, "lost")
            assert not (after & ~shared.asked).any(), (number, target, "more than was marked")
            assert how <= {EXACT}, (number, target, how)
        with dm.open(DEVICE) as image, image.transaction() as bitmaps:
            for name in [name for name in bitmaps if name != "d0"]:
                del bitmaps[name]
    return kills


@pytest.mark.parametrize("root", ROOTS, ids=lambda root: root.__name__)
def test_every_mark_that_returned_survives_sigkill_in_both(tmp_path: Path, root: Callable[[Path], Path]) -> None:
    print(kill_often(tmp_path, 6, root), "processes killed")
    no_traces(tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("root", ROOTS, ids=lambda root: root.__name__)
def test_every_mark_that_returned_survives_hundreds_of_sigkills_in_both(
    tmp_path: Path, root: Callable[[Path], Path]
) -> None:
    print(kill_often(tmp_path, int(os.environ.get("K", 300)), root), "processes killed")


# Refusals.


@pytest.fixture
def other(path: Path) -> Path:
    """Another node, of the same size."""
    image = path.with_name("other.raw")
    image.touch()
    os.truncate(image, SIZE)
    containers.this_host().add_node("other", str(image))
    return image


def test_one_live_session_a_node(path: Path, other: Path) -> None:
    containers.this_host().add_device("disk1", "drive0")
    mine = f"process {os.getpid()}"
    with dm.open("disk0") as image, image.track() as tracker:
        for target in (*BOTH, "disk1"):
            with dm.open(target) as again, pytest.raises(dm.LockedError, match=mine):
                again.track()
        for target in BOTH:
            with dm.open(target) as again, pytest.raises(dm.LockedError, match=mine), again.transaction():
                pass
            with pytest.raises(dm.LockedError, match=mine):
                dm.recover(target)
            with pytest.raises(dm.LockedError, match=mine), dm.transaction([target]):
                pass
        for unchanged in (False, True):
            with pytest.raises(dm.LockedError, match=mine):
                containers.this_host().set_root("disk0", "other", content_unchanged=unchanged)
        with pytest.raises(dm.LockedError, match=mine):
            containers.this_host().remove_device("disk0")
        tracker.mark(0, 1)
    assert both() == ([0], [0])
    with dm.open(NODE) as image, image.track(), dm.open("disk0") as device, pytest.raises(dm.LockedError, match=mine):
        device.track()
    with dm.open("disk0") as image, image.track():
        pass


def test_set_root_after_a_death_takes_the_session_along(path: Path, other: Path, tmp_path: Path) -> None:
    in_child(lambda: dm.open("disk0").track().mark(3 * GRANULE, 1))
    containers.this_host().set_root("disk0", "other", content_unchanged=True)
    assert both() == ([3], [3])
    assert sessions() == [False, True]
    assert recover(NODE) == {"b0": EXACT}
    no_traces(tmp_path)


def test_a_tracker_gives_its_device_another_root_wherever_the_program_is(
    path: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("live", "elsewhere"):
        (tmp_path / name).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path)
    with dm.open("disk0") as image:
        tracker = image.track(live="live", save_interval=0)
    monkeypatch.chdir("elsewhere")
    with tracker:  # the image that it was made of is closed
        tracker.mark(1 * GRANULE, 1)
        for root in ("other", "drive0"):
            tracker.set_root(root, content_unchanged=True)
            tracker.mark(2 * GRANULE, 1)
        assert list((tmp_path / "live").iterdir())
        assert not list((tmp_path / "elsewhere").iterdir())
    assert dirty(DEVICE, "d0") == [1, 2]


@pytest.mark.parametrize("unchanged", [False, True])
def test_a_tracker_gives_its_device_another_root(path: Path, other: Path, tmp_path: Path, unchanged: bool) -> None:
    with dm.open("other") as image, image.transaction() as bitmaps:
        bitmaps["o"] = dm.Bitmap(SIZE)
    with dm.open("disk0") as image, image.track() as tracker:
        tracker.mark(1 * GRANULE, 1)
        tracker.checkpoint("monday")
        ticket = tracker.begin(2 * GRANULE, 1)
        with pytest.raises(dm.BitmapError, match="in flight"):
            tracker.set_root("other", content_unchanged=unchanged)
        tracker.end(ticket)
        tracker.take("d0")
        with pytest.raises(dm.BitmapError, match="busy"):
            tracker.set_root("other", content_unchanged=unchanged)
        tracker.give_back("d0")
        for wrong in ("nothing", "disk0"):
            with pytest.raises(dm.BitmapError, match="no such node"):
                tracker.set_root(wrong)
            tracker.mark(3 * GRANULE, 1)  # it goes on with the old one
        tracker.set_root("other", content_unchanged=unchanged)
        status = image.tracking()
        assert status
        assert status.alive
        tracker.mark(4 * GRANULE, 1)
        with tracker.write(5 * GRANULE, 1):
            pass
        with dm.open("other") as root:
            assert granules(root["o"]) == [4, 5]
        with dm.open(NODE) as root, root.transaction() as bitmaps:  # it is free
            assert granules(bitmaps["b0"]) == [1, 2, 3]
        expected = [1, 2, 3, 4, 5] if unchanged else list(range(SIZE // GRANULE))
        assert granules(tracker.bitmap("d0")) == granules(image["d0"]) == expected
        assert granules(tracker.changed_since("monday")) == ([2, 3, 4, 5] if unchanged else expected)
    assert sessions() == [False, False]
    with dm.open("disk0") as image:
        assert granules(image["d0"]) == expected
        assert image.info().notes == ()
    no_traces(tmp_path)


def test_a_tracker_that_dies_while_it_changes_the_root_loses_nothing(path: Path, other: Path) -> None:
    for step in ("close", "track_device", "end"):

        def work(step: str = step) -> None:
            with dm.open("disk0") as image:
                tracker = image.track()
                tracker.mark(3 * GRANULE, 1)

                def die(*_: object) -> None:
                    os.kill(os.getpid(), signal.SIGKILL)

                if step == "close":
                    dm.Host.change_root = die  # type: ignore[method-assign]
                elif step == "track_device":
                    tracked.track_stored = die
                tracker.set_root("other", content_unchanged=True)
                tracker.mark(4 * GRANULE, 1)

        in_child(work)
        with dm.open("disk0") as image:
            image.recover()
            assert granules(image["d0"]) == ([3, 4] if step == "end" else [3])
        with dm.open(NODE) as image:
            assert granules(image["b0"]) == [3]
        containers.this_host().set_root("disk0", "drive0", content_unchanged=True)
        for target, name in (("disk0", "d0"), (NODE, "b0")):
            with dm.open(target) as image, image.transaction() as bitmaps:
                bitmaps[name] = dm.Bitmap(SIZE)


def test_a_tracker_whose_new_root_cannot_be_tracked_has_ended(path: Path, other: Path) -> None:
    with dm.open("other") as image, image.transaction() as bitmaps:
        bitmaps["o"] = dm.Bitmap(SIZE)
    with dm.open("disk0") as image, dm.open("other") as root, root.hold("o"):
        tracker = image.track()
        mark = tracker.mark
        mark(GRANULE, 1)
        with pytest.raises(dm.LockedError, match="held by"):
            tracker.set_root("other", content_unchanged=True)
        for act in (lambda: mark(0, 1), lambda: tracker.begin(0, 1), lambda: tracker.mark_many([0], [1]), tracker.save):
            with pytest.raises(dm.StorageError):
                act()
        tracker.close()
        assert granules(image["d0"]) == [1]
    assert sessions() == [False, False]


def test_other_threads_wait_for_another_root(path: Path, other: Path) -> None:
    faults: list[BaseException] = []
    stop = threading.Event()
    with dm.open("disk0") as image, image.track() as tracker:

        def use() -> None:
            try:
                while not stop.is_set():
                    tracker.bitmap("d0")
                    tracker.save()
            except BaseException as error:
                faults.append(error)

        def cut() -> None:
            number = 0
            try:
                while not stop.is_set():
                    tracker.checkpoint(f"c{number}")
                    tracker.remove(f"c{number}")
                    number += 1
            except BaseException as error:
                faults.append(error)

        threads = [threading.Thread(target=act) for act in (use, cut)]
        for thread in threads:
            thread.start()
        for number in range(6):
            tracker.set_root(("other", "drive0")[number % 2], content_unchanged=True)
            tracker.mark(number * GRANULE, 1)
        stop.set()
        for thread in threads:
            thread.join(60)
        assert not faults
        assert granules(tracker.bitmap("d0")) == list(range(6))


def test_another_root_inside_a_write_is_refused_even_while_a_cut_waits(path: Path, other: Path) -> None:
    with dm.open("disk0") as image, image.track() as tracker:
        cut = threading.Thread(target=lambda: tracker.checkpoint("monday"))
        with tracker.write(0, 1):
            cut.start()
            while tracker._kernel._state.writeset.number == 0:
                time.sleep(0)
            with pytest.raises(dm.BitmapError, match="in flight"):
                tracker.set_root("other")
        cut.join(60)
        assert tracker.checkpoints() == ["monday"]


def test_a_tracker_of_a_node_has_no_root_to_change(path: Path, other: Path) -> None:
    with dm.open(NODE) as image, image.track() as tracker, pytest.raises(dm.BitmapError, match="no root"):
        tracker.set_root("other")


def test_files_of_a_root_stay_when_its_device_is_tracked_on_another(path: Path, other: Path, tmp_path: Path) -> None:
    in_child(lambda: dm.open("disk0").track().mark(3 * GRANULE, 1))
    containers.this_host().set_root("disk0", "other", content_unchanged=True)
    with dm.open("disk0") as image, image.track() as tracker:
        tracker.mark(4 * GRANULE, 1)
        assert both() == ([3, 4], [3])
        assert recover(NODE) == {"b0": EXACT}
    assert both() == ([3, 4], [3])
    no_traces(tmp_path)


def test_a_device_that_gets_another_root_while_tracking_begins_is_refused(
    path: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dm.open("disk0") as image, monkeypatch.context() as patch:
        enter = recorder.Recorder._enter

        def entering(tracker: recorder.Recorder, change: HomeChange) -> None:
            if change.record.kind == KIND_DEVICE:
                change.record = replace(change.record, root_uuid=bytes(16))
            enter(tracker, change)

        patch.setattr(recorder.Recorder, "_enter", entering)
        with pytest.raises(dm.BitmapError, match="try again"):
            image.track()
    assert sessions() == [False, False]


def test_a_device_of_another_size_than_its_root_is_refused(raw: Path) -> None:
    with dm.open(DEVICE) as image, image.transaction() as bitmaps:
        del bitmaps["d0"]
    os.truncate(raw, 2 * SIZE)
    containers.this_host().resize_node("drive0")
    with dm.open(DEVICE) as image, pytest.raises(dm.BitmapError, match="set-root"):
        image.track()
    assert sessions() == [False, False]


def test_a_failure_while_it_begins_leaves_no_session(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise dm.StorageError("device", "no space left on device")

    entered = recorder.Recorder._enter
    calls: list[int] = []

    def enter(tracker: recorder.Recorder, change: object) -> None:
        calls.append(1)
        fail() if len(calls) == 2 else entered(tracker, change)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, dm.open("disk0") as image:
        patch.setattr(recorder.Recorder, "_enter", enter)
        with pytest.raises(dm.StorageError, match="no space"):
            image.track()
    assert sessions() == [False, False]
    assert both() == ([], [])
    no_traces(tmp_path)
    with dm.open("disk0") as image, image.track() as tracker:
        tracker.mark(0, 1)
    assert both() == ([0], [0])


def test_status_of_a_device(path: Path) -> None:
    with dm.open("disk0") as image, image.track() as tracker:
        with tracker.write(0, 1):
            pass
        for target in ("disk0", "drive0"):
            result = CliRunner().invoke(main, ["track", "status", "--output=json", target])
            document = json.loads(result.stdout)
            assert result.exit_code == 0, result.output
            assert (document["tracked"], document["pid"], document["writes"]) == (True, os.getpid(), 1)
    result = CliRunner().invoke(main, ["track", "status", "disk0"])
    assert result.stdout == "disk0: not tracked\n"
