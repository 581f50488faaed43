"""Tracking a device: one mark feeds its bitmaps and its root's, wherever these are, and neither ever loses a bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from support import devices, qemu
from support.devices import (
    ALL_DIRTY,
    BOTH,
    COUNT,
    DEVICE,
    EXACT,
    LOGGED,
    NODE,
    both,
    dirty,
    in_child,
    make,
    no_traces,
    qcow2,
    recover,
    sessions,
)
from support.power import SIZE
from support.tracking import GRANULE, mark, model_of

import dirtmap.engine as dm
from dirtmap.engine.storefile.file import Store
from dirtmap.engine.tracking import recorder
from dirtmap.engine.tracking.home import Home, HomeChange
from dirtmap.engine.tracking.tracker import Tracker
from dirtmap.fmt import live
from dirtmap.fmt import store as fmt_store
from dirtmap.fmt.live import build_peer
from dirtmap.fmt.store import Record
from dirtmap.tools.cli import main

path, raw = devices.path, devices.raw


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


# Refusals.


def test_a_device_of_another_size_than_its_root_is_refused(raw: Path) -> None:
    with dm.open(DEVICE) as image, image.transaction() as bitmaps:
        del bitmaps["d0"]
    os.truncate(raw, 2 * SIZE)
    dm.this_host().resize_node("drive0")
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
