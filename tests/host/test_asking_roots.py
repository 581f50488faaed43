"""While a device is tracked, the bitmaps of its root are changed through the same tracker, by whoever asks for them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import devices
from support.cli import dirtmap, error_of, json_of
from support.devices import BOTH, COUNT, DEVICE, EXACT, NODE, both, dirty, granules, in_child, recover
from support.power import SIZE
from support.tracking import GRANULE, make_node

import dirtmap.engine as dm
from dirtmap.engine.host.asking import asked
from dirtmap.engine.tracking.tracker import Tracker

path, raw = devices.path, devices.raw


def names(target: str) -> list[str]:
    with dm.open(target) as image:
        return list(image)


def test_its_bitmaps_are_changed_as_of_a_cut(path: Path) -> None:
    """Whatever keeps them: the device's store, another one, or a qcow2 image, which has them back in the end."""
    with dm.open(DEVICE) as device, device.track(save_interval=0) as tracker:
        tracker.mark(0, 1)
        dirtmap("add", NODE, "new")
        tracker.mark(GRANULE, 1)
        assert (dirty(NODE, "new"), both()) == ([1], ([0, 1], [0, 1]))
        dirtmap("clear", NODE, "b0")
        tracker.mark(2 * GRANULE, 1)
        assert both() == ([0, 1, 2], [2])
        dirtmap("disable", NODE, "b0")
        tracker.mark(3 * GRANULE, 1)
        assert both() == ([0, 1, 2, 3], [2])
        dirtmap("enable", NODE, "b0")
        tracker.mark(4 * GRANULE, 1)
        dirtmap("mark", NODE, "b0", 5 * GRANULE, 1)
        dirtmap("merge", NODE, "b0", "new")
        assert both() == ([0, 1, 2, 3, 4], [1, 2, 3, 4, 5])
        dirtmap("copy", NODE, "b0", NODE, "--as", "fine")
        dirtmap("rename", NODE, "fine", "copied")
        dirtmap("add", NODE, "finer", "-g", "4K")
        tracker.mark(6 * GRANULE, 1)
        tracker.save()
        assert (dirty(NODE, "copied"), dirty(NODE, "finer")) == ([1, 2, 3, 4, 5, 6], [6 * GRANULE // 4096])
        dirtmap("remove", NODE, "new")
        dirtmap("move", NODE, "finer", DEVICE)
        assert "no such bitmap" in error_of("clear", NODE, "d0")
        assert names(DEVICE) == ["d0", "finer"]
        assert [bitmap["name"] for bitmap in json_of("list", NODE)[0]["bitmaps"]] == ["b0", "copied"]
    assert both() == ([0, 1, 2, 3, 4, 6], [1, 2, 3, 4, 5, 6])
    assert dirty(NODE, "copied") == [1, 2, 3, 4, 5, 6]
    dirtmap("clear", NODE, "copied")  # nobody tracks it any more


CHANGES = {
    "cleared": lambda bitmaps: dm.changes.clear(bitmaps, "b0"),
    "partly cleared": lambda bitmaps: bitmaps["b0"].clear(0, 2 * GRANULE),
    "finer": lambda bitmaps: bitmaps.update(b0=bitmaps["b0"].at(4096)),
    "anew": lambda bitmaps: (bitmaps.pop("b0"), bitmaps.update(b0=dm.Bitmap(SIZE))),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("save", [False, True], ids=["", "saved"])
def test_what_is_written_during_a_transaction_stays_marked(
    raw: Path, change: Callable[[dm.Transaction], object], save: bool
) -> None:
    with dm.open(DEVICE) as device, device.track(save_interval=0) as tracker, dm.open(NODE) as root:
        tracker.mark(0, 1)
        with root.transaction() as bitmaps:
            if save:
                tracker.save()
            tracker.mark(5 * GRANULE, 1)
            change(bitmaps)
            tracker.mark(7 * GRANULE, 1)
            if save:
                tracker.save()
        assert dirty(DEVICE, "d0") == [0, 5, 7]
        found = root["b0"]
        assert not (dm.Bitmap.from_extents(SIZE, [5 * GRANULE, 7 * GRANULE], [1, 1], 512) - found).count
        assert found.count <= 3 * GRANULE
        tracker.save()
        assert root["b0"] == found
        with pytest.raises(dm.LockedError, match="changed meanwhile"):
            remove_and(root, "b0", lambda: tracker.change([("clear", "b0")], namespace=root.uuid))
        assert "b0" in root
        remove_and(root, "b0", lambda: tracker.clear("d0"))  # which is another bitmap
        assert "b0" not in root


def remove_and(image: dm.Handle, name: str, act: Callable[[], object]) -> None:
    with image.transaction() as bitmaps:
        del bitmaps[name]
        act()


def test_checkpoints_are_those_of_the_namespace_that_is_named(raw: Path) -> None:
    with dm.open(DEVICE) as device, device.track(save_interval=0) as tracker, dm.open(NODE) as root:
        dirtmap("checkpoint", "add", NODE, "noon")
        tracker.mark(0, 1)
        tracker.checkpoint("noon")
        dirtmap("checkpoint", "add", NODE, "evening", "-g", "128K")
        tracker.mark(2 * GRANULE, 1)
        assert [each["name"] for each in json_of("checkpoint", "list", NODE)["checkpoints"]] == ["noon", "evening"]
        assert tracker.checkpoints() == ["noon"]
        assert granules(root.changed_since("noon")) == [0, 2, 3]
        assert granules(root.changed_since("noon", "evening")) == [0]
        assert granules(device.changed_since("noon")) == [2]
        dirtmap("checkpoint", "remove", NODE, "evening")
        tracker.mark(4 * GRANULE, 1)
        assert granules(root.changed_since("noon")) == [0, 2, 4]
        assert "a checkpoint" in error_of("rename", NODE, "noon", "x")
        dirtmap("checkpoint", "add", DEVICE, NODE, "both")  # a disk with one gate, which is closed once
        tracker.mark(6 * GRANULE, 1)
        assert (dirty(DEVICE, "both"), dirty(NODE, "both")) == ([6], [6])
        assert "name is taken" in error_of("checkpoint", "add", NODE, DEVICE, "b0")
    assert names(NODE) == ["b0", "noon", "both"]


def test_an_instant_of_both_has_one_conversation(raw: Path) -> None:
    with (
        dm.open(DEVICE) as device,
        device.track() as tracker,
        dm.open(NODE) as root,
        dm.Host() as host,
        host.instant([root, device]),
    ):
        deadline = time.monotonic() + 60
        while len(tracker._control._peers) > 1:  # type: ignore[union-attr]
            assert time.monotonic() < deadline
            time.sleep(0.001)


def test_a_checkpoint_of_the_root_is_rebuilt(raw: Path) -> None:
    with dm.open(DEVICE) as device, device.track(save_interval=0) as tracker, dm.open(NODE) as root:
        root.checkpoint("old")
        tracker.checkpoint("old")
        root.checkpoint("now")
        tracker.mark(GRANULE, 1)
        root.rebuild("old", "now", dm.Bitmap.from_extents(SIZE, [8 * GRANULE], [1], GRANULE))
        assert granules(root.changed_since("old")) == [1, 8]
        assert granules(device.changed_since("old")) == [1]


@contextlib.contextmanager
def dead_with_a_marker(folder: Path) -> Iterator[None]:
    """The device's tracker is killed, with two checkpoints of both and marks that are not saved; a marker lives on."""
    told = folder / "live"

    def track() -> None:
        with dm.open(NODE) as root:
            tracker = dm.open(DEVICE).track(save_interval=0)
            for name in ("noon", "evening"):
                for each in (tracker, root):
                    each.checkpoint(name)
                tracker.mark(GRANULE if name == "noon" else 2 * GRANULE, 1)
            told.with_suffix(".new").write_text(tracker.live)
            told.with_suffix(".new").rename(told)
            signal.pause()

    pid = os.fork()
    if pid == 0:
        try:
            track()
        finally:
            os._exit(1)
    try:
        while not told.exists():
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the child failed"
            time.sleep(0.01)
        marker = dm.Marker(told.read_text())
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with marker:
        yield


def test_no_rebuild_takes_over_what_others_mark_in(raw: Path) -> None:
    with dead_with_a_marker(raw.parent), dm.open(NODE) as root, dm.open(DEVICE) as device:
        with pytest.raises(dm.LockedError, match="has died, and others mark"):
            root.rebuild("noon", "evening", dm.Bitmap(SIZE, GRANULE))
        error = error_of("serve", DEVICE, "--adopt")  # which nobody is to be sent back to
        assert error.endswith("no nbdkit that can be seen here serves it; others mark, and Handle.track takes it over")
        assert error_of("add", NODE, "x").endswith("takes it over where nbdkit marks, else Handle.track does")
        for image in (root, device):
            assert granules(image.changed_since("noon")) == [1, 2]
            status = image.tracking()
            assert status is not None
            assert status.alive


def test_who_takes_over_as_the_root_changes_what_is_the_roots(raw: Path) -> None:
    with dead_with_a_marker(raw.parent), dm.open(NODE) as root, dm.open(DEVICE) as device:
        with root.track(save_interval=0) as tracker:
            assert tracker.bitmap("b0").count
            with pytest.raises(dm.BitmapError, match="no such bitmap"):
                tracker.bitmap("d0")
            tracker.remove("evening")
            tracker.mark(3 * GRANULE, 1)
            assert list(device) == ["d0", "noon", "evening"]
            assert granules(tracker.take("b0")) == [1, 2, 3]
            with pytest.raises(dm.BitmapError, match=r"'drive0'.*not taken"):
                tracker.drop("noon")
        for image in (root, device):
            assert granules(image.changed_since("noon")) == [1, 2, 3]


def busy(target: str) -> list[str]:
    return [bitmap["name"] for bitmap in json_of("list", target)[0]["bitmaps"] if bitmap["busy"]]


def test_a_hold_is_of_one_namespace_and_says_who_holds(raw: Path) -> None:
    """The other one may have a bitmap of that name."""
    dirtmap("add", DEVICE, "b0")
    with dm.open(DEVICE) as device, device.track(save_interval=0) as tracker, dm.open(NODE) as root:
        tracker.mark(0, 1)
        with root.hold("b0", "nightly") as held:
            tracker.mark(GRANULE, 1)
            tracker.save()
            tracker.mark(2 * GRANULE, 1)
            assert granules(held) in ([0], [0, 1])
            assert (busy(NODE), busy(DEVICE)) == (["b0"], [])
            for command in (("clear", NODE, "b0"), ("remove", NODE, "b0"), ("rename", NODE, "b0", "x")):
                assert f"bitmap 'b0': busy: held by 'nightly' (process {os.getpid()})" in error_of(*command)
            dirtmap("clear", DEVICE, "b0")
        assert busy(NODE) == []
        tracker.take("b0")
        assert (busy(NODE), busy(DEVICE)) == ([], ["b0"])
        dirtmap("clear", NODE, "b0")
        assert "busy: held by its tracker, for a backup" in error_of("remove", DEVICE, "b0")
        with device.hold("d0"), root.hold("b0"):
            tracker.save()
            assert (busy(NODE), busy(DEVICE)) == (["b0"], ["d0", "b0"])


def test_one_conversation_holds_of_one_namespace_at_a_time(raw: Path) -> None:
    dirtmap("add", DEVICE, "b0")
    with dm.open(DEVICE) as device, device.track(save_interval=0), dm.open(NODE) as root, asked(root) as talk:
        talk.ask("hold", namespace=root.uuid, names=["b0"], owner="a test")
        for act, more in (("held", {"name": "b0"}), ("hold", {"names": ["b0"], "owner": "x"}), ("give", {})):
            with pytest.raises(dm.BitmapError, match="holds bitmaps of another namespace"):
                talk.ask(act, namespace=device.uuid, **more)
        assert (busy(NODE), busy(DEVICE)) == (["b0"], [])
        talk.ask("give", namespace=root.uuid)
        talk.ask("hold", namespace=device.uuid, names=["b0"], owner="a test")
        assert (busy(NODE), busy(DEVICE)) == ([], ["b0"])


def test_a_hold_of_the_root_whose_end_could_not_be_written_ends_with_the_next_save(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise dm.StorageError("the store", "No space left on device")

    with dm.open(DEVICE) as device, device.track(save_interval=0) as tracker, dm.open(NODE) as root:
        hold = tracker.hold(["b0"], namespace=root.uuid)
        with monkeypatch.context() as patch:
            patch.setattr(Tracker, "_set_busy", full)
            with pytest.raises(dm.StorageError):
                tracker.release(hold)
        assert busy(NODE) == ["b0"]
        tracker.mark(0, 1)
        tracker.save()
        assert busy(NODE) == []


def test_what_was_begun_for_the_one_changes_nothing_of_the_other(raw: Path) -> None:
    """Also where one conversation is about both."""
    dirtmap("add", DEVICE, "b0")
    with dm.open(DEVICE) as device, device.track(save_interval=0) as tracker, dm.open(NODE) as root:
        tracker.mark(0, 1)
        with asked(root) as talk:
            talk.ask("begin", namespace=root.uuid, owner="a test")
            tracker.mark(GRANULE, 1)
            with pytest.raises(dm.BitmapError, match="tracks another disk"):
                talk.ask("change", namespace="something", changes=[("clear", "b0")])
            talk.ask("change", namespace=device.uuid, changes=[("clear", "d0"), ("remove", "b0")])
            tracker.mark(2 * GRANULE, 1)
            talk.ask("change", namespace=root.uuid, changes=[("clear", "b0")])
        assert (names(DEVICE), both()) == (["d0"], ([2], [1, 2]))


def test_what_is_asked_while_another_root_comes_is_to_be_asked_again(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dm.open(DEVICE) as device, device.track() as tracker, dm.open(NODE) as root, asked(root) as talk:
        with monkeypatch.context() as patch:
            patch.setattr(tracker._homes[-1], "_left", None)  # as it is until its session begins
            with pytest.raises(dm.LockedError, match="is being given another root; try again"):
                talk.ask("save", namespace=root.uuid)
        talk.ask("save", namespace=root.uuid)


def test_changes_outlive_the_tracker(path: Path) -> None:
    """It is killed with marks that are not saved, and bitmaps of both that were begun anew."""

    def work() -> None:
        tracker = dm.open(DEVICE).track(save_interval=0)
        tracker.mark(0, 1)
        dirtmap("clear", NODE, "b0")
        dirtmap("checkpoint", "add", NODE, "noon")
        tracker.mark(2 * GRANULE, 1)
        dirtmap("clear", DEVICE, "d0")
        tracker.mark(3 * GRANULE, 1)
        with dm.open(NODE) as root, root.hold("b0"):
            os.kill(os.getpid(), 9)

    in_child(work)
    assert both() == ([3], [2, 3])
    for target in BOTH:
        assert set(recover(target).values()) <= {EXACT}
    assert (both(), dirty(NODE, "noon"), busy(NODE)) == (([3], [2, 3]), [2, 3], [])


def test_any_bitmap_comes_and_goes(raw: Path) -> None:
    make_node(raw.parent, SIZE, "other1")
    with dm.open(DEVICE) as device, device.track(save_interval=0) as tracker:
        tracker.mark(0, 1)
        dirtmap("copy", NODE, "b0", "other1", "--as", "from-root")
        dirtmap("copy", "other1", "b0", NODE, "--as", "there")
        dirtmap("move", NODE, "b0", "other1", "--as", "gone")
        tracker.mark(GRANULE, 1)
        assert (names(NODE), dirty(NODE, "there")) == (["there"], [1])
        assert dirty("other1", "gone") == dirty("other1", "from-root") == [0]
        dirtmap("track", "save", NODE)
        assert json_of("track", "status", DEVICE)["regions"] == 0
        dirtmap("track", "stop", NODE)
    assert len(dirty(NODE, "there")) == 1 < COUNT
