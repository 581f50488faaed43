"""Tracking a qcow2 image: its bitmaps are checked out, and checked in again whatever happens, and QEMU takes them."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import hostless, qemu
from support.cli import dirtmap, error_of, json_of
from support.devices import in_child
from support.tracking import damage_directory, files_in, model_of

import dirtmap.engine as dm
from dirtmap.engine.host import tracked
from dirtmap.engine.model import changes
from dirtmap.engine.namespaces import check_in as checkout
from dirtmap.engine.namespaces.nodes import add_node
from dirtmap.engine.qcow2 import commit as qcow2_commit
from dirtmap.engine.qcow2.sidecar import make_sidecar
from dirtmap.engine.storefile.file import Store, create
from dirtmap.engine.system import file as fileio
from dirtmap.engine.system.file import File
from dirtmap.engine.tracking.tracker import Tracker
from dirtmap.fmt import store

SIZE = 64 << 20
GRANULE = 65536
EXACT, ALL_DIRTY = "exact", "all dirty"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qemu.create(path, SIZE)
    qemu.qemu_img("bitmap", "--add", path, "b0")
    qemu.qemu_img("bitmap", "--add", "--disable", path, "still")
    qemu.qemu_io(path, "write 0 1")  # b0 has its first granule
    store = tmp_path / "default.dmap"
    create(str(store))
    with Store(str(store)) as target:
        hostless.add_image(target, "drive0", str(path))
    return path


def dirty(bitmap: dm.Bitmap) -> list[int]:
    return np.flatnonzero(model_of(bitmap)).tolist()  # type: ignore[no-any-return]


def qemu_dirty(path: Path, name: str) -> list[int]:
    """What QEMU says."""
    return [at // GRANULE for first, length in qemu.dirty(path, name) for at in range(first, first + length, GRANULE)]


def flags(path: Path) -> dict[str, set[str]]:
    return {name: flags for name, (_, flags) in qemu.bitmaps(path).items()}


def is_marked(path: Path) -> bool:
    return bool(int.from_bytes(path.read_bytes()[88:96], "big") >> 62 & 1)


def goes_on(path: Path, name: str, expected: list[int]) -> None:
    """QEMU finds nothing wrong, has the same map, and goes on recording."""
    qemu.check(path)
    assert not is_marked(path)
    assert qemu_dirty(path, name) == expected
    with dm.open(path) as image:
        assert dirty(image[name]) == expected
    qemu.qemu_io(path, f"write {500 * GRANULE} 1")
    assert qemu_dirty(path, name) == sorted({*expected, 500})
    assert not list(path.parent.glob("*.intent"))


def test_a_clean_close_checks_in(path: Path) -> None:
    with dm.open(path) as image, image.track() as tracker:
        assert is_marked(path)
        assert flags(path) == {"b0": {"in-use", "auto"}, "still": {"in-use"}}
        tracker.mark(5 * GRANULE, 1)
        tracker.checkpoint("monday")
        tracker.mark(6 * GRANULE, 1)
        for target in (path, "node:drive0"):
            with dm.open(target) as other:
                assert dirty(other["b0"]) == [0, 5, 6]
                assert other.format == "qcow2"
                assert "tracked by" in other.info().notes[0]
                tracker.take("b0")
                assert [(name, bitmap.busy) for name, bitmap in other.items()][:2] == [("b0", True), ("still", False)]
                assert [bitmap.busy for bitmap in other.info().bitmaps][:2] == [True, False]
                tracker.give_back("b0")
                for names in (("b0", "x"), ("x", "b0")):
                    with other.transaction() as bitmaps:
                        bitmaps.rename(*names)
                with pytest.raises(dm.LockedError, match="tracked by"):
                    other.track()
    goes_on(path, "monday", [6])
    assert qemu_dirty(path, "b0") == [0, 5, 6, 500]
    assert flags(path) == {"b0": {"auto"}, "still": set(), "monday": {"auto"}}
    with dm.open(path) as image, image.track() as tracker:
        assert dirty(tracker.changed_since("monday")) == [6, 500]


def test_exact_after_sigkill(path: Path) -> None:
    def act() -> None:
        tracker = dm.open(path).track()
        tracker.mark(5 * GRANULE, 1)
        tracker.checkpoint("monday")
        tracker.remove("still")
        tracker.save()
        tracker.mark(6 * GRANULE, 1)

    in_child(act)
    qemu.check(path)
    with dm.open(path) as image:
        assert "not recovered yet: exact" in image.info().notes[0]
        assert image.info().doubt is None
        assert {name: dirty(image[name]) for name in image} == {"b0": [0, 5, 6], "monday": [6]}
    recovered = dm.recover(path)
    assert {item.name: item.how.partition(":")[0] for item in recovered} == {"b0": EXACT, "monday": EXACT}
    assert dm.recover(path) == []
    assert qemu_dirty(path, "monday") == [6]
    goes_on(path, "b0", [0, 5, 6])


def test_an_image_without_bitmaps_is_tracked_all_the_same(path: Path) -> None:
    with dm.open(path) as image, image.transaction() as bitmaps:
        bitmaps.clear()
    with dm.open(path) as image, image.track():
        for target in (path, "node:drive0"):
            with dm.open(target) as other:
                assert other.tracking()
            assert "tracked by" in dm.describe(target).notes[0]
            with pytest.raises(dm.LockedError, match="tracked by"):
                dm.recover(target)
    in_child(lambda: dm.open(path).track().mark(0, 1))
    assert is_marked(path)
    dm.recover(path)
    assert not is_marked(path)
    with dm.open(path) as image:
        assert image.tracking() is None
    assert not list(path.parent.glob("*.intent"))


def test_logged_regions_after_a_power_loss(path: Path) -> None:
    def act() -> None:
        tracker = dm.open(path).track(region_size=1 << 20)
        tracker.mark(5 * GRANULE, 1)
        tracker.save()
        tracker.mark(40 * GRANULE, 1)
        tracker.checkpoint("monday")

    in_child(act)
    with dm.open(path) as image:
        tracking = image.tracking()
        assert tracking
        shutil.rmtree(tracking.live)
        assert dirty(image["b0"]) == [0, 5, *range(32, 48)]
    assert {item.how.partition(":")[0] for item in dm.recover(path)} == {"logged regions"}
    goes_on(path, "monday", list(range(32, 48)))
    assert qemu_dirty(path, "b0") == [0, 5, *range(32, 48), 500]


def test_all_dirty_after_a_power_loss_without_a_log(path: Path) -> None:
    in_child(lambda: dm.open(path).track(intent="off").mark(5 * GRANULE, 1))
    with dm.open(path) as image:
        tracking = image.tracking()
        assert tracking
        shutil.rmtree(tracking.live)
    assert {item.how.partition(":")[0] for item in dm.recover(path)} == {ALL_DIRTY}
    goes_on(path, "b0", list(range(SIZE // GRANULE)))


def test_the_first_change_recovers_too(path: Path) -> None:
    in_child(lambda: dm.open(path).track().mark(5 * GRANULE, 1))
    with dm.open(path) as image, image.transaction() as bitmaps:
        assert dirty(bitmaps["b0"]) == [0, 5]
        bitmaps["b0"].mark(7 * GRANULE, 1)
    goes_on(path, "b0", [0, 5, 7])


def test_all_dirty_where_qemu_opened_it_in_between(path: Path) -> None:
    in_child(lambda: dm.open(path).track().checkpoint("monday"))
    qemu.qemu_io(path, f"write {9 * GRANULE} 1")
    everything = list(range(SIZE // GRANULE))
    why = "another program has opened the image for writing since"
    with dm.open(path) as image:
        assert dirty(image["b0"]) == dirty(image["monday"]) == everything
        assert image.doubt() == why
    (listed,) = json_of("list", path)
    assert (listed["doubt"], listed["notes"]) == (why, [f"node 'drive0' is not recovered yet: all dirty: {why}"])
    assert f"its bitmaps count as all dirty: {why}" in dirtmap("map", path, "b0").error
    assert {item.name: item.how.partition(":")[0] for item in dm.recover(path)} == {
        "b0": ALL_DIRTY,
        "still": ALL_DIRTY,
        "monday": ALL_DIRTY,
    }
    goes_on(path, "b0", everything)


def test_all_dirty_where_qemu_opened_it_while_it_was_tracked(path: Path) -> None:
    warned = pytest.warns(RuntimeWarning, match="another program has opened the image")
    with warned, dm.open(path) as image, image.track():
        qemu.qemu_io(path, f"write {9 * GRANULE} 1")
    goes_on(path, "b0", list(range(SIZE // GRANULE)))


def test_a_checkpoint_of_an_image_without_bitmaps_survives(tmp_path: Path, path: Path) -> None:
    for name in ("b0", "still"):
        qemu.qemu_img("bitmap", "--remove", path, name)

    def act() -> None:
        tracker = dm.open(path).track()
        tracker.checkpoint("monday")
        tracker.mark(6 * GRANULE, 1)

    in_child(act)
    with dm.open(path) as image:
        assert dirty(image["monday"]) == [6]
    dm.recover(path)
    goes_on(path, "monday", [6])


class Stop(Exception):
    """Where a test has a process die."""


STEPS = {
    "before the session is in the store": (Tracker, "_begin", False),
    "before the image is marked": (tracked, "set_tracked", False),
    "before the bitmaps are in use": (tracked, "commit", False),
    "after the check-out": (tracked, "commit", True),
}


@pytest.mark.parametrize("qemu_came", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_death_within_the_check_out(path: Path, monkeypatch: pytest.MonkeyPatch, step: str, qemu_came: bool) -> None:
    room, name, after = STEPS[step]
    whole = getattr(room, name)

    def dies(*args: object) -> None:
        if after:
            whole(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    def act() -> None:
        monkeypatch.setattr(room, name, dies)
        dm.open(path).track()

    in_child(act)
    in_use = step == "after the check-out"
    expected = [0]
    if qemu_came:
        qemu.qemu_io(path, f"write {9 * GRANULE} 1")
        expected = list(range(SIZE // GRANULE)) if in_use else [0, 9]
    with dm.open(path) as image:
        assert dirty(image["b0"]) == expected
    dm.recover(path)
    with dm.open(path) as image, image.track() as tracker:
        assert dirty(tracker.bitmap("b0")) == expected
    goes_on(path, "b0", expected)


LATE_STEPS = {
    "before the image is written": ("commit", False),
    "before the mark is taken off": ("set_tracked", False),
    "before the session is gone": ("set_tracked", True),
}


@pytest.mark.parametrize("qemu_came", [False, True])
@pytest.mark.parametrize("step", LATE_STEPS)
def test_death_within_the_check_in(path: Path, monkeypatch: pytest.MonkeyPatch, step: str, qemu_came: bool) -> None:
    name, after = LATE_STEPS[step]
    whole = getattr(checkout, name)

    def dies(*args: object) -> None:
        if after:
            whole(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    def act() -> None:
        tracker = dm.open(path).track()
        tracker.checkpoint("monday")
        tracker.mark(5 * GRANULE, 1)
        monkeypatch.setattr(checkout, name, dies)
        tracker.close()

    in_child(act)
    expected = [5]
    if qemu_came:
        qemu.qemu_io(path, f"write {9 * GRANULE} 1")
        expected = list(range(SIZE // GRANULE)) if step == "before the image is written" else [5, 9]
    with dm.open(path) as image:
        assert dirty(image["monday"]) == expected
    dm.recover(path)
    assert dirty(dm.open(path)["b0"]) == sorted({0, *expected})
    goes_on(path, "monday", expected)


class Deadly(File):
    """Kills the process before a write to the image, once so many are done."""

    left = -1

    def write(self, offset: int, data: bytes | memoryview) -> None:
        if self.path.endswith(".qcow2") and Deadly.left >= 0:
            if Deadly.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            Deadly.left -= 1
        super().write(offset, data)


@pytest.mark.parametrize("writes", range(8))
def test_death_at_any_write_of_the_check_in_leaves_no_leak(path: Path, writes: int) -> None:
    def act() -> None:
        with fileio.using(Deadly):
            tracker = dm.open(path).track()
            tracker.mark(5 * GRANULE, 1)
            Deadly.left = writes
            tracker.close()

    in_child(act)
    dm.recover(path)
    goes_on(path, "b0", [0, 5])


def test_recover_of_a_bitmap_that_is_not_there_checks_nothing_in(path: Path) -> None:
    in_child(lambda: dm.open(path).track().mark(5 * GRANULE, 1))
    before = path.read_bytes()
    assert "bitmap 'nosuch': there is no such bitmap" in error_of("recover", path, "b0", "nosuch")
    assert path.read_bytes() == before
    assert dirtmap("recover", path, "b0").out.startswith("b0: exact")
    goes_on(path, "b0", [0, 5])


@pytest.mark.parametrize("damaged", [False, True])
def test_a_node_whose_image_is_gone_can_be_removed(path: Path, damaged: bool) -> None:
    in_child(lambda: dm.open(path).track().mark(0, 1))
    place = path.with_name("default.dmap")
    with Store(str(place)) as target:
        with pytest.raises(dm.BitmapError, match="recover"):
            hostless.remove(target, "drive0")
        path.unlink()
        record = target.record(b"drive0")
        assert record
        if damaged:
            with place.open("r+b") as file:
                file.seek(record.directory.offset + store.OWNER_SIZE + 10)
                file.write(b"?")
        hostless.remove(target, "drive0")
    assert files_in(path.parent) == ["default.dmap"]
    report = dm.check(place)
    assert (report.corruptions, report.leaks > 0) == (0, damaged), "nobody knows what the lost directory led to"


def test_a_tool_may_change_its_folder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("DIRTMAP_STORE", "default.dmap")
    with dm.open(path.name) as image, image.track() as tracker:
        monkeypatch.chdir("/")
        tracker.mark(5 * GRANULE, 1)
        tracker.checkpoint("monday")
    monkeypatch.chdir(path.parent)
    goes_on(path, "b0", [0, 5])


def test_a_copy_of_a_tracked_image_is_refused(path: Path) -> None:
    with dm.open(path) as image, image.track() as tracker:
        tracker.mark(5 * GRANULE, 1)
        copy = path.with_name("copy.qcow2")
        shutil.copy(path, copy)
        with pytest.raises(dm.BitmapError, match="a copy of"):
            dm.open(copy)
    goes_on(path, "b0", [0, 5])


def test_an_image_without_a_name_has_nowhere_to_keep_its_bitmaps(tmp_path: Path) -> None:
    path = tmp_path / "plain.qcow2"
    qemu.create(path, SIZE)
    with dm.open(path) as image, pytest.raises(dm.BitmapError, match="'dirtmap node add NAME IMAGE'"):
        image.track()
    assert not is_marked(path)


def test_a_check_out_that_fails_is_undone_by_the_next(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise dm.StorageError("disk.qcow2", "injected")

    with monkeypatch.context() as patched:
        patched.setattr(tracked, "commit", fails)
        with dm.open(path) as image, pytest.raises(dm.StorageError, match="injected"):
            image.track()
    with dm.open(path) as image:
        assert dirty(image["b0"]) == [0]
        with image.track() as tracker:
            tracker.mark(5 * GRANULE, 1)
    goes_on(path, "b0", [0, 5])


def test_a_tracked_image_is_found_with_usable_bitmaps(path: Path) -> None:
    with dm.open(path) as image, image.track():
        (hit,) = dm.this_host().find("b0")
        assert not hit.inconsistent
    (hit,) = dm.this_host().find("b0")
    assert not hit.inconsistent


def test_checkpoints_outlive_the_session(path: Path) -> None:
    def act() -> None:
        tracker = dm.open(path).track()
        assert tracker.checkpoints() == ["sunday", "monday"]
        tracker.checkpoint("tuesday")
        tracker.mark(7 * GRANULE, 1)

    with dm.open(path) as image, image.track() as tracker:
        tracker.checkpoint("sunday")
        tracker.mark(5 * GRANULE, 1)
        tracker.checkpoint("monday")
        tracker.mark(6 * GRANULE, 1)
    in_child(act)
    dm.recover(path)
    with dm.open(path) as image, image.track() as tracker:
        assert tracker.checkpoints() == ["sunday", "monday", "tuesday"]
        assert dirty(tracker.changed_since("sunday")) == [5, 6, 7]


def test_checkpoints_are_relied_on_while_nobody_tracks(path: Path) -> None:
    with dm.open(path) as image, image.track() as tracker:
        for number, name in enumerate("abc", 5):
            tracker.checkpoint(name)
            tracker.mark(number * GRANULE, 1)
    for act in (
        lambda bitmaps: changes.clear(bitmaps, "b"),
        lambda bitmaps: changes.set_recording(bitmaps, "c", False),
        lambda bitmaps: changes.rename(bitmaps, "c", "x"),
    ):
        with (
            dm.open(path) as image,
            pytest.raises(dm.BitmapError, match="which others rely on"),
            image.transaction() as bitmaps,
        ):
            act(bitmaps)
    with dm.open(path) as image, image.transaction() as bitmaps:
        changes.remove(bitmaps, "b")
    with dm.open(path) as image, image.track() as tracker:
        assert tracker.checkpoints() == ["a", "c"]
        assert dirty(tracker.changed_since("a")) == [5, 6, 7]
    qemu.qemu_img("bitmap", "--disable", path, "c")
    with dm.open(path) as image, image.transaction() as bitmaps:
        changes.remove(bitmaps, "still")
    qemu.qemu_img("bitmap", "--enable", path, "c")  # too late
    with dm.open(path) as image, image.track() as tracker:
        tracker.checkpoint("d")
        for name in "ac":
            with pytest.raises(dm.BitmapError, match="not all that was written since is known"):
                tracker.changed_since(name)
        tracker.remove("c")
        assert dirty(tracker.changed_since("d")) == []


@pytest.mark.parametrize("after", [0, 1])
def test_a_death_while_a_checkpoint_is_removed_never_joins_its_neighbours(
    path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """A plain bitmap that takes a checkpoint's name in the same act is none, whatever was written down of it."""
    with dm.open(path) as image, image.track() as tracker:
        for number, name in enumerate("abc", 5):
            tracker.checkpoint(name)
            tracker.mark(number * GRANULE, 1)

    def act() -> None:
        def commit(*arguments: object) -> None:
            if after:
                real_commit(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(qcow2_commit, "commit", commit)
        with dm.open(path) as image, image.transaction() as bitmaps:
            changes.remove(bitmaps, "b")
            changes.add(bitmaps, "b")

    real_commit = qcow2_commit.commit
    in_child(act)
    with dm.open(path) as image, image.track() as tracker, pytest.raises(dm.BitmapError, match="not all that was"):
        tracker.changed_since("a")


@pytest.mark.parametrize("others", ["nobody", "write", "replace", "remove"])
def test_raw_external_data_is_judged_as_a_raw_image_is(path: Path, others: str) -> None:
    """Whoever writes to it does not open the qcow2 file, so that does not tell."""
    raw, sidecar, store = path.with_name("d.raw"), path.with_name("s.qcow2"), path.with_name("default.dmap")
    raw.touch()
    os.truncate(raw, SIZE)
    make_sidecar(str(raw), str(sidecar))
    qemu.qemu_img("bitmap", "--add", sidecar, "b0")
    with Store(str(store)) as target:
        hostless.add_image(target, "s0", str(sidecar))

    def act() -> None:
        tracker = dm.open(sidecar).track()
        with raw.open("r+b") as file, tracker.write(5 * GRANULE, 1):
            file.seek(5 * GRANULE)
            file.write(b"x")
            file.flush()

    in_child(act)
    later = os.stat(raw).st_mtime_ns + 50_000_000
    if others == "write":
        with raw.open("r+b") as file:
            file.write(b"y")
        os.utime(raw, ns=(later, later))  # so much later did it write
    elif others == "replace":
        shutil.copy2(raw, path.with_name("copy"))
        os.replace(path.with_name("copy"), raw)
    elif others == "remove":
        raw.unlink()
    (how,) = (item.how.partition(":")[0] for item in dm.recover(sidecar))
    assert how == (EXACT if others == "nobody" else ALL_DIRTY)
    with dm.open(sidecar) as image:
        assert dirty(image["b0"]) == ([5] if others == "nobody" else list(range(SIZE // GRANULE)))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, the default store is another one, which knows nothing."""

    def go() -> None:
        create(str(tmp_path / "other.dmap"))
        monkeypatch.setenv("DIRTMAP_STORE", str(tmp_path / "other.dmap"))
        monkeypatch.setenv("DIRTMAP_INDEX", str(tmp_path / "other-index"))

    return go


def test_who_does_not_know_the_store_changes_no_tracked_image(
    path: Path, tmp_path: Path, elsewhere: Callable[[], None]
) -> None:
    tracker = dm.open(path).track()
    before = path.read_bytes()
    elsewhere()
    for command in (
        ("add", path, "x"),
        ("remove", path, "b0"),
        ("track", "status", path),
        ("map", path, "b0"),
        ("merge", path, "still", "b0"),
    ):
        assert "in another store; say which with --store" in error_of(*command), command
    with dm.open(path) as image:
        for act in (image.transaction, image.track):
            with pytest.raises(dm.LockedError, match="in another store"), act():
                pass
    assert "in another store" in dirtmap("list", path).error
    assert path.read_bytes() == before
    known = "--store", tmp_path / "default.dmap", "--index", tmp_path / "index"
    assert json_of("track", "status", path, *known)["tracked"]
    tracker.mark(5 * GRANULE, 1)
    tracker.close()
    goes_on(path, "b0", [0, 5])


def test_recover_gives_up_a_store_that_is_lost(path: Path, elsewhere: Callable[[], None]) -> None:
    in_child(lambda: dm.open(path).track().mark(5 * GRANULE, 1))
    elsewhere()
    assert dirtmap("recover", path).out.splitlines() == [
        f"{name}: all dirty: what its tracker had in another store is given up" for name in ("b0", "still")
    ]
    assert dirtmap("recover", path).out == ""
    dirtmap("remove", path, "still")
    for log in path.parent.glob("*.intent"):  # which nobody knows of
        log.unlink()
    goes_on(path, "b0", list(range(SIZE // GRANULE)))


def replace_b0(path: Path) -> None:
    qemu.qemu_img("bitmap", "--remove", path, "b0")
    qemu.qemu_img("bitmap", "--add", path, "b0")


@pytest.mark.parametrize("killed", [False, True])
def test_what_the_tracker_marks_is_in_a_bitmap_that_others_have_made_usable(path: Path, killed: bool) -> None:
    def act() -> None:
        tracker = dm.open(path).track()
        tracker.mark(5 * GRANULE, 1)
        replace_b0(path)
        qemu.qemu_img("bitmap", "--add", path, "fresh")
        qemu.qemu_io(path, f"write {8 * GRANULE} 1")
        tracker.mark(6 * GRANULE, 1)
        tracker.save()
        tracker.mark(7 * GRANULE, 1)
        if not killed:
            with pytest.warns(RuntimeWarning, match="another program has opened the image"):
                tracker.close()

    everything = list(range(SIZE // GRANULE))
    if killed:
        in_child(act)
        recovered = {item.name: item.how.partition(":")[0] for item in dm.recover(path)}
        assert recovered == {"b0": EXACT, "still": ALL_DIRTY, "fresh": ALL_DIRTY}
    else:
        act()
    with dm.open(path) as image:
        assert dirty(image["fresh"]) == dirty(image["still"]) == everything
        assert dirty(image["b0"]) == [0, 5, 6, 7, 8], "what QEMU has recorded, and what the tracker has"
    goes_on(path, "fresh", everything)


def test_who_does_not_know_the_store_gives_nothing_up_while_the_tracker_lives(
    path: Path, elsewhere: Callable[[], None]
) -> None:
    with dm.open(path) as image, image.track() as tracker:
        tracker.mark(5 * GRANULE, 1)
        elsewhere()
        assert "its tracker lives, and uses another store" in error_of("recover", path)
        assert "its tracker lives, and uses another store" in error_of("node", "add", "--new-identity", "mine", path)
        tracker.mark(6 * GRANULE, 1)
    with dm.open(path) as image:
        assert dirty(image["b0"]) == [0, 5, 6]


def test_recover_of_a_session_with_a_damaged_directory_makes_all_dirty_that_the_image_names(path: Path) -> None:
    def act() -> None:
        tracker = dm.open(path).track()
        tracker.mark(5 * GRANULE, 1)
        tracker.save()

    in_child(act)
    place = path.parent / "default.dmap"
    damage_directory(place)
    with pytest.raises(dm.FormatError, match="directory of node 'drive0'"), dm.open(path) as image:
        image["b0"]
    recovered = {item.name: item.how for item in dm.recover(path)}
    assert recovered == dict.fromkeys(["b0", "still"], "all dirty: its directory was damaged")
    everything = list(range(SIZE // GRANULE))
    assert qemu_dirty(path, "still") == everything
    goes_on(path, "b0", everything)
    assert dm.check(place).corruptions == 0


def damage_both_slots(place: Path, *, name: bool = False) -> None:
    """Damages a tracked image's directory so that nothing can be named, or in a name, where both slots lead to it."""
    with Store(str(place)) as target:
        for number in range(3):
            (place.parent / f"{number}.raw").touch()
            add_node(target, f"other{number}", str(place.parent / f"{number}.raw"))
    damage_directory(place, name=name)


@pytest.mark.parametrize("name", [False, True])
def test_mending_a_damaged_directory_takes_no_bitmap_from_a_tracked_image(path: Path, name: bool) -> None:
    """What a session lacks counts as removed by its tracker; of a damaged one that is not known."""
    live = path.parent / "live"
    live.mkdir()
    in_child(lambda: dm.open(path).track(live=live).mark(5 * GRANULE, 1))
    place = path.parent / "default.dmap"
    damage_both_slots(place, name=name)
    report = dm.check(place, repair="all")
    assert (report.corruptions, report.leaks, len(report.dropped), len(report.made_dirty)) == (
        (0, 0, 0, 2) if name else (0, 0, 1, 0)
    )
    assert [file for file in live.rglob("*") if file.is_file()] == [], "the tracker has died, and nobody needs them"
    known = ["?0", "still", "b0"] if name else ["b0", "still"]
    with dm.open(path) as image:
        assert [(name, bitmap.count) for name, bitmap in image.items()] == [(name, SIZE) for name in known]
    assert {item.name: item.how for item in dm.recover(path)} == dict.fromkeys(
        known, "all dirty: what its tracker had is lost"
    )
    everything = list(range(SIZE // GRANULE))
    assert qemu_dirty(path, "still") == everything
    goes_on(path, "b0", everything)
    assert dm.check(place).findings == []


def test_mending_a_damaged_directory_forgets_no_mark_in_what_others_have_made_usable(path: Path) -> None:
    def act() -> None:
        tracker = dm.open(path).track()
        qemu.qemu_img("bitmap", "--remove", path, "b0")
        qemu.qemu_img("bitmap", "--add", path, "b0")
        tracker.mark(5 * GRANULE, 1)

    in_child(act)
    damage_both_slots(path.parent / "default.dmap")
    dm.check(path.parent / "default.dmap", repair="all")
    dm.recover(path)
    goes_on(path, "b0", list(range(SIZE // GRANULE)))


def test_a_damaged_directory_is_not_mended_while_its_tracker_lives(path: Path) -> None:
    with dm.open(path) as image:
        tracker = image.track(save_interval=0)
    damage_both_slots(path.parent / "default.dmap")
    before = path.read_bytes()
    assert "tracked by" in error_of("check", "-r", "all", path.parent / "default.dmap")
    assert "tracked by" in error_of("recover", path)
    assert "its checksum is wrong" in error_of("add", path, "x")
    with pytest.raises(dm.FormatError, match="directory of node 'drive0'"):
        tracker.close()
    assert path.read_bytes() == before
    dirtmap("check", "-r", "all", path.parent / "default.dmap")
    dm.recover(path)
    goes_on(path, "b0", list(range(SIZE // GRANULE)))


def test_a_copy_of_a_tracked_image_becomes_one_of_its_own(path: Path, tmp_path: Path) -> None:
    with dm.open(path) as image, image.track():
        shutil.copy(path, tmp_path / "copy.qcow2")
        dirtmap("node", "add", "--new-identity", "drive1", tmp_path / "copy.qcow2")
        how = "all dirty: left in use by a writer that did not finish"
        assert dirtmap("recover", "drive1").out.splitlines() == [f"b0: {how}", f"still: {how}"]
    goes_on(tmp_path / "copy.qcow2", "b0", list(range(SIZE // GRANULE)))


def test_an_image_that_was_moved_after_its_trackers_death_is_recovered_where_it_is(path: Path, tmp_path: Path) -> None:
    in_child(lambda: dm.open(path).track().mark(5 * GRANULE, 1))
    moved = path.rename(tmp_path / "moved.qcow2")
    before = moved.read_bytes()
    for command in (("recover", moved), ("list", moved), ("add", moved, "x"), ("check", "-r", "all", moved)):
        assert "node 'drive0', moved while a tracker had its bitmaps; 'index scan' finds" in error_of(*command)
    assert moved.read_bytes() == before
    dirtmap("index", "scan", tmp_path)
    assert dirtmap("recover", moved).out.startswith("b0: exact")
    goes_on(moved, "b0", [0, 5])


def test_check_tells_a_tracked_image_from_one_left_in_use(path: Path) -> None:
    qemu.qemu_io(path, "write 0 1")
    with dm.open(path) as image, image.track():
        assert {finding.what for finding in dm.check(path).findings} == {
            "checked out by a tracker: 'track status' tells which; if it has died, 'recover' checks in"
        }
        summary = json_of("index", "scan", path.parent)
        assert (summary["bitmaps"], summary["inconsistent"]) == (2, 0)
        for repair in ("leaks", "all"):
            assert f"(process {os.getpid()}); 'dirtmap track stop TARGET' ends it" in error_of(
                "check", "-r", repair, path
            )
    in_child(lambda: dm.open(path).track().mark(5 * GRANULE, 1))
    assert "its tracker has died; 'dirtmap recover' first" in error_of("check", "-r", "all", path)
