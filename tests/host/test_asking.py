"""A tracked image is changed through its tracker, by whoever asks."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import qemu
from support.child import SignalError, in_child
from support.cli import COMMAND, dirtmap, error_of, json_of
from support.tracking import GRANULE, make_node

import dirtmap.engine as dm
from dirtmap.engine.control import wire
from dirtmap.engine.storefile.chain import with_chain
from dirtmap.engine.storefile.file import Store
from dirtmap.engine.tracking.tracker import Tracker

SIZE = 64 << 20


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[Tracker]:
    make_node(tmp_path, SIZE)
    with dm.open("node:drive0") as image, image.track(save_interval=0) as tracker:
        yield tracker


def dirty(name: str) -> list[tuple[int, int]]:
    with dm.open("node:drive0") as image:
        return qemu.extents(image[name])


def test_bitmaps_are_changed(tracker: Tracker) -> None:
    """Each command is asked from another process, as the lock of the tracker shows to anybody else."""
    tracker.mark(0, 1)
    in_child(lambda: dirtmap("add", "drive0", "new") and None)
    tracker.mark(GRANULE, 1)
    assert dirty("new") == [(GRANULE, GRANULE)]
    assert dirty("b0") == [(0, 2 * GRANULE)]
    in_child(lambda: dirtmap("clear", "drive0", "b0") and None)
    assert dirty("b0") == []
    dirtmap("disable", "drive0", "new")
    tracker.mark(2 * GRANULE, 1)
    assert dirty("new") == [(GRANULE, GRANULE)]
    dirtmap("enable", "drive0", "new")
    tracker.mark(3 * GRANULE, 1)
    assert dirty("new") == [(GRANULE, GRANULE), (3 * GRANULE, GRANULE)]
    dirtmap("remove", "drive0", "b0")
    dirtmap("add", "drive0", "off", "--disabled", "-g", "4K")
    assert [(b["name"], b["recording"], b["granularity"]) for b in json_of("list", "drive0")[0]["bitmaps"]] == [
        ("new", True, GRANULE),
        ("off", False, 4096),
    ]
    assert "there is no such bitmap" in error_of("remove", "drive0", "b0")
    assert "name is taken" in error_of("add", "drive0", "off")


def test_a_transaction_is_all_or_nothing(tracker: Tracker) -> None:
    tracker.mark(0, 1)
    with dm.open("node:drive0") as image:
        with image.transaction() as bitmaps:
            dm.changes.clear(bitmaps, "b0")
            dm.changes.add(bitmaps, "b1", 4096)
            dm.changes.add(bitmaps, "b2", recording=False)
        tracker.mark(0, 1)
        assert [(name, image[name].count) for name in image] == [("b0", GRANULE), ("b1", 4096), ("b2", 0)]
        with pytest.raises(ZeroDivisionError):
            fail(image)
        assert list(image) == ["b0", "b1", "b2"]
        tracker.take("b0")
        with pytest.raises(dm.BitmapError, match="busy"):
            remove(image, "b1", "b0")
        assert list(image) == ["b0", "b1", "b2"]


def remove(image: dm.Handle, *names: str) -> None:
    with image.transaction() as bitmaps:
        for name in names:
            del bitmaps[name]


def fail(image: dm.Handle) -> None:
    with image.transaction() as bitmaps:
        del bitmaps["b1"]
        _ = 1 / 0


def test_any_change_goes_through_the_tracker(tracker: Tracker) -> None:
    tracker.mark(0, 1)
    dirtmap("mark", "drive0", "b0", "1M", "1")
    assert dirty("b0") == [(0, GRANULE), (1 << 20, GRANULE)]
    dirtmap("copy", "drive0", "b0", "drive0", "--as", "copy")
    tracker.mark(2 << 20, 1)
    assert dirty("copy") == dirty("b0") == [(0, GRANULE), (1 << 20, GRANULE), (2 << 20, GRANULE)]
    dirtmap("clear", "drive0", "b0")
    dirtmap("rename", "drive0", "copy", "old")
    dirtmap("add", "drive0", "sum", "--disabled", "-g", "1M")
    tracker.mark(3 << 20, 1)
    dirtmap("merge", "drive0", "sum", "b0", "old")
    tracker.mark(4 << 20, 1)
    assert dirty("sum") == [(0, 4 << 20)]
    assert dirty("b0") == [(3 << 20, GRANULE), (4 << 20, GRANULE)]
    other = make_other(tracker)
    dirtmap("copy", "drive0", "old", other)
    with dm.open("node:drive1") as image:
        assert image["old"].count == 5 * GRANULE
    assert [b["name"] for b in json_of("list", "drive0")[0]["bitmaps"]] == ["b0", "old", "sum"]
    assert "name is taken" in error_of("rename", "drive0", "b0", "old")
    tracker.checkpoint("noon")
    assert "a checkpoint" in error_of("rename", "drive0", "noon", "x")


CHANGES = {
    "partly cleared": lambda bitmaps: bitmaps["b0"].clear(0, 2 * GRANULE),
    "cleared": lambda bitmaps: dm.changes.clear(bitmaps, "b0"),
    "marked": lambda bitmaps: bitmaps["b0"].mark(0, 1),
    "finer": lambda bitmaps: bitmaps.update(b0=bitmaps["b0"].at(4096)),
    "copied": lambda bitmaps: bitmaps.update(copy=bitmaps["b0"]),
    "replaced": lambda bitmaps: bitmaps.update(b0=dm.Bitmap(SIZE)),
    "anew": lambda bitmaps: (bitmaps.pop("b0"), bitmaps.update(b0=dm.Bitmap(SIZE))),
    "enabled": lambda bitmaps: dm.changes.set_recording(bitmaps, "off", True),
    "added": lambda bitmaps: dm.changes.add(bitmaps, "new", 512),
    "renamed and enabled": lambda bitmaps: (
        bitmaps.rename("off", "on"),
        dm.changes.set_recording(bitmaps, "on", True),
    ),
    "renamed": lambda bitmaps: bitmaps.rename("b0", "b1"),
    "swapped": lambda bitmaps: (bitmaps.rename("b0", "x"), bitmaps.rename("off", "b0"), bitmaps.rename("x", "off")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("save", [False, True], ids=["", "saved"])
def test_what_is_written_during_a_transaction_stays_marked(
    tracker: Tracker, change: Callable[[dm.Transaction], object], save: bool
) -> None:
    """In whatever records at its end, wherever a save falls."""
    tracker.add("off", recording=False)
    tracker.mark(0, 3 * GRANULE)
    written = [5 * GRANULE, 7 * GRANULE]
    with dm.open("node:drive0") as image:
        with image.transaction() as bitmaps:
            if save:
                tracker.save()
            tracker.mark(written[0], 1)
            change(bitmaps)
            tracker.mark(written[1], 1)
            if save:
                tracker.save()
        recording = [name for name, bitmap in image.items() if bitmap.recording]
        assert recording
        tracker.save()
        for name in recording:
            bitmap = image[name]
            assert bitmap == tracker.bitmap(name)
            assert not (dm.Bitmap.from_extents(SIZE, written, [1, 1], 512) - bitmap).count
            rest = bitmap - dm.Bitmap.from_extents(SIZE, [0, *written], [3 * GRANULE, GRANULE, GRANULE])
            assert not rest.count


def remove_and(image: dm.Handle, act: Callable[[], object]) -> None:
    with image.transaction() as bitmaps:
        del bitmaps["b0"]
        act()


def test_what_the_tracker_s_program_changes_is_not_overwritten(tracker: Tracker) -> None:
    tracker.mark(0, 1)
    with dm.open("node:drive0") as image:
        for act in (lambda: tracker.clear("b0"), lambda: tracker.checkpoint("noon"), lambda: tracker.resize(2 * SIZE)):
            with pytest.raises(dm.LockedError, match="changed meanwhile"):
                remove_and(image, act)
            assert "b0" in image
        remove_and(image, tracker.save)
        assert list(image) == ["noon"]


def test_checkpoints_in_a_transaction(tracker: Tracker) -> None:
    """One that goes leaves its bits, and what another bitmap has is none of them."""
    tracker.checkpoint("a")
    tracker.mark(0, 1)
    tracker.checkpoint("b")
    tracker.mark(GRANULE, 1)
    tracker.checkpoint("c")
    tracker.add("other")
    tracker.mark(2 * GRANULE, 1)
    with dm.open("node:drive0") as image:
        with image.transaction() as bitmaps:
            dm.changes.merge(bitmaps, "a", [bitmaps["other"]])
            del bitmaps["b"]
            del bitmaps["other"]
        assert dirty("a") == [(0, 3 * GRANULE)]
        with image.transaction() as bitmaps:
            del bitmaps["c"]
        tracker.mark(4 * GRANULE, 1)
        assert tracker.changed_since("a").count == 4 * GRANULE
        with pytest.raises(dm.BitmapError, match="checkpoint"), image.transaction() as bitmaps:
            bitmaps["a"].clear(0, SIZE)
        with pytest.raises(dm.BitmapError, match="checkpoint"):
            tracker.change([("put", "a", GRANULE, False, dm.Bitmap(SIZE, GRANULE))])
        tracker.change([("put", "a", GRANULE, True, dm.Bitmap(SIZE, GRANULE))])
        assert tracker.changed_since("a").count == 4 * GRANULE


def test_a_transaction_of_several_targets(tracker: Tracker, tmp_path: Path) -> None:
    """A tracker commits by itself: so it is one target, or an error before anything was changed."""
    other = make_other(tracker)
    tracker.mark(0, 1)
    with dm.transaction(["drive0", "node:drive0"]) as namespaces:
        dm.changes.add(namespaces["drive0"], "x")
        dm.changes.merge(namespaces["node:drive0"], "x", [namespaces["drive0"]["b0"]])
    assert dirty("x") == [(0, GRANULE)]
    actions = tmp_path / "actions"

    def write(*acts: tuple[str, str, str]) -> Path:
        found = [{"type": f"block-dirty-bitmap-{verb}", "data": {"node": node, "name": n}} for verb, node, n in acts]
        actions.write_text(json.dumps({"actions": found}))
        return actions

    dirtmap("transaction", write(("disable", "drive0", "x"), ("clear", "drive0", "b0"), ("add", "drive0", "new")))
    tracker.mark(GRANULE, 1)
    assert (dirty("x"), dirty("b0"), dirty("new")) == ([(0, GRANULE)], [(GRANULE, GRANULE)], [(GRANULE, GRANULE)])
    for order in (("drive0", other), (other, "drive0")):
        error = error_of("transaction", write(*(("clear", node, "b0") for node in order)))
        assert "its tracker commits by itself, and one commit cannot span two" in error
        assert "change each target by itself" in error
    assert dirty("b0") == [(GRANULE, GRANULE)]
    dirtmap("move", "drive0", "new", "drive0", "--as", "newer")
    assert dirty("newer") == [(GRANULE, GRANULE)]
    assert "no such bitmap" in error_of("transaction", write(("clear", "drive0", "b0"), ("clear", "drive0", "none")))
    assert dirty("b0") == [(GRANULE, GRANULE)]


def test_a_bitmap_moves_between_a_tracked_disk_and_an_image(tracker: Tracker, tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    qemu.create(image, SIZE)
    tracker.mark(0, 1)
    dirtmap("move", "drive0", "b0", image)
    assert dirtmap("map", "--dirty", image, "b0").out.split()[:2] == ["0", str(GRANULE)]
    dirtmap("move", image, "b0", "drive0", "--as", "back")
    tracker.mark(GRANULE, 1)
    assert dirty("back") == [(0, 2 * GRANULE)]


def test_a_bitmap_moves_between_a_tracked_disk_and_another_of_its_store(tracker: Tracker) -> None:
    """From a tracked one to any; to a tracked one only from elsewhere, since its tracker would wait for the store."""
    other = make_other(tracker)
    with dm.open("node:drive1") as image, image.transaction() as bitmaps:
        del bitmaps["b0"]
    tracker.mark(0, 1)
    assert "no such bitmap" in error_of("move", "drive0", "none", other)
    dirtmap("move", "drive0", "b0", other)
    with dm.open("node:drive0") as here, dm.open("node:drive1") as there:
        assert (list(here), list(there)) == ([], ["b0"])
        assert qemu.extents(there["b0"]) == [(0, GRANULE)]
        error = error_of("move", other, "b0", "drive0")
        assert "node 'drive0': tracked; its tracker commits by itself" in error
        assert "'dirtmap copy', then 'dirtmap remove'" in error
        with there.track(save_interval=0) as second:
            second.mark(GRANULE, 1)
            dirtmap("move", other, "b0", "drive0", "--as", "back")
            tracker.mark(2 * GRANULE, 1)
            assert (list(here), list(there)) == (["back"], [])
            assert qemu.extents(here["back"]) == [(0, 3 * GRANULE)]


def test_a_hold_ends_with_its_block(tracker: Tracker) -> None:
    tracker.mark(0, 1)
    with dm.open("node:drive0") as image:
        with image.hold("b0") as bitmap:
            assert qemu.extents(bitmap) == [(0, GRANULE)]
            tracker.mark(GRANULE, 1)
            assert image.info().bitmaps[0].busy
            with pytest.raises(dm.BitmapError, match="busy"):
                tracker.clear("b0")
        assert not image.info().bitmaps[0].busy
        assert image["b0"].count == 2 * GRANULE


def test_bitmaps_of_any_kind_are_held_as_they_are_at_one_cut(tracker: Tracker) -> None:
    """By several holders, and while checkpoints and saves come."""
    tracker.add("off", recording=False)
    tracker.checkpoint("one")
    tracker.mark(0, 1)
    with dm.open("node:drive0") as image, image.hold_all(["b0", "off", "one"], "nightly") as held:
        tracker.mark(GRANULE, 1)
        expected = {"b0": [(0, GRANULE)], "off": [], "one": [(0, GRANULE)]}
        assert {name: qemu.extents(bitmap) for name, bitmap in held.items()} == expected
        with image.hold_all(["one"], "other") as others:
            assert qemu.extents(others["one"]) == [(0, 2 * GRANULE)]
        tracker.checkpoint("two")
        tracker.mark(2 * GRANULE, 1)
        for act in (tracker.clear, tracker.remove):
            with pytest.raises(dm.BitmapError, match="busy: held by 'nightly'"):
                act("b0")
        with pytest.raises(dm.BitmapError, match="busy"):
            tracker.remove("two")  # whose bits would go into one that is held
        assert {name: qemu.extents(bitmap) for name, bitmap in held.items()} == expected
        tracker.save()
        assert [bitmap.name for bitmap in image.info().bitmaps if bitmap.busy] == ["b0", "off", "one"]
        with pytest.raises(dm.BitmapNotFoundError):
            held["two"]
    assert dirty("b0") == [(0, 3 * GRANULE)]
    tracker.remove("two")
    tracker.clear("b0")
    assert dirty("one") == [(0, 3 * GRANULE)]


def test_the_command_that_holds(tracker: Tracker) -> None:
    dirtmap("hold", "drive0", "b0", "--", "sh", "-c", f"{COMMAND} list drive0 2>/dev/null | grep -q busy")


def busy() -> list[str]:
    """Those that are busy, as another process sees it."""
    return in_child(lambda: [bitmap["name"] for bitmap in json_of("list", "drive0")[0]["bitmaps"] if bitmap["busy"]])


def test_one_that_does_not_record_is_seen_busy_until_its_holder_dies(tracker: Tracker) -> None:
    """Saves and checkpoints leave it so, and it records nothing meanwhile."""
    tracker.add("off", recording=False)
    held, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with dm.open("node:drive0") as image, image.hold("off"):
                os.write(tell, b"!")
                signal.pause()
        finally:
            os._exit(1)
    os.close(tell)
    with open(held, "rb") as pipe:
        assert pipe.read(1), "it was not held"
    try:
        assert busy() == ["off"]
        assert "busy" in error_of("remove", "drive0", "off")
        tracker.mark(0, 1)
        tracker.save()
        tracker.checkpoint("noon")
        tracker.mark(GRANULE, 1)
        assert busy() == ["off"]
        assert dirty("off") == []
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    while busy():
        time.sleep(0.001)
    tracker.save()
    assert dirty("off") == []
    dirtmap("enable", "drive0", "off")
    tracker.mark(2 * GRANULE, 1)
    assert dirty("off") == [(2 * GRANULE, GRANULE)]


def test_a_hold_ends_with_who_holds(tracker: Tracker) -> None:
    def hold() -> None:
        with dm.open("node:drive0") as image, image.hold("b0"):
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(SignalError):
        in_child(hold)
    with dm.open("node:drive0") as image:
        while image.info().bitmaps[0].busy:
            time.sleep(0.001)


def test_a_hold_whose_end_could_not_be_written_ends_with_the_next_save(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise dm.StorageError("the store", "No space left on device")

    hold = tracker.hold(["b0"])
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "_set_busy", full)
        with pytest.raises(dm.StorageError):
            tracker.release(hold)
    with dm.open("node:drive0") as image:
        assert image.info().bitmaps[0].busy
        tracker.mark(0, 1)
        tracker.save()
        assert not image.info().bitmaps[0].busy


def test_checkpoints(tracker: Tracker) -> None:
    dirtmap("checkpoint", "add", "drive0", "noon")
    tracker.mark(0, 1)
    dirtmap("checkpoint", "add", "drive0", "evening", "-g", "128K")
    tracker.mark(1 << 20, 1)
    assert [(each["name"], each["since"]) for each in json_of("checkpoint", "list", "drive0")["checkpoints"]] == [
        ("noon", 64 << 10 | 128 << 10),
        ("evening", 128 << 10),
    ]
    shown = dirtmap("checkpoint", "list", "drive0").out
    assert re.sub(r"since [-:\d ]+$", "since", shown, flags=re.M) == (
        "noon: 192 KiB written since\nevening: 128 KiB written since\n"
    )
    assert tracker.changed_since("noon").count == 2 * GRANULE
    dirtmap("checkpoint", "remove", "drive0", "evening")
    assert tracker.checkpoints() == ["noon"]
    assert tracker.changed_since("noon").extents()[0].tolist() == [0, 1 << 20]
    assert "no such checkpoint" in error_of("checkpoint", "remove", "drive0", "b0")
    assert "is not tracked" in error_of("checkpoint", "add", str(make_other(tracker)), "x")


def make_other(tracker: Tracker) -> str:
    make_node(Path(os.environ["DIRTMAP_STORE"]).parent, SIZE, "drive1")
    return "drive1"


def test_a_checkpoint_of_several_disks_is_of_one_instant(tracker: Tracker) -> None:
    """A writer writes to the one and then to the other: what the second has before, the first has before."""
    make_other(tracker)
    with dm.open("node:drive1") as image, image.track() as second, dm.Host() as host:
        end, counts = threading.Event(), [0, 0]

        def write() -> None:
            while not end.is_set():
                for number, each in enumerate((tracker, second)):
                    with each.write(counts[number] % 1000 * GRANULE, 1):
                        counts[number] += 1

        thread = threading.Thread(target=write)
        thread.start()
        try:
            host.checkpoint(["drive1", "drive0"], "a")
            for number in range(5):
                host.checkpoint(["drive0", "drive1"], f"c{number}")
        finally:
            end.set()
            thread.join()
        for start, stop in (("a", "c0"), ("c0", "c1"), ("c1", "c2"), ("c2", "c3")):
            one, other = (each.changed_between(start, stop) for each in (tracker, second))
            assert (one ^ other).count <= 2 * GRANULE
        with pytest.raises(dm.BitmapError, match="name is taken"):
            host.checkpoint(["drive0", "drive1"], "b0")
        second.add("only-here")
        with pytest.raises(dm.BitmapError, match="name is taken"):
            host.checkpoint(["drive0", "drive1"], "only-here")
        assert "only-here" not in tracker.checkpoints()


def test_whoever_makes_one_meanwhile_is_waited_for(tracker: Tracker) -> None:
    other = make_other(tracker)
    with dm.open("node:drive1") as image, image.track() as second:
        with second.gated():
            error = error_of("checkpoint", "add", "drive0", other, "a", "--wait", "0")
            assert error.endswith("node 'drive1': somebody else is making a checkpoint or a clone of it; try again")
            asker = threading.Thread(target=lambda: dirtmap("checkpoint", "add", "drive0", other, "b"))
            asker.start()
            while len(tracker._control._peers) == 0:  # type: ignore[union-attr]
                time.sleep(0.001)
            time.sleep(0.1)
        asker.join()
        assert tracker.checkpoints() == second.checkpoints() == ["b"]


def test_what_was_written_between_checkpoints(tmp_path: Path) -> None:
    """Whether the disk is tracked or not."""
    make_node(tmp_path, SIZE)

    def since(*options: str) -> list[tuple[int, int]]:
        found = json.loads(dirtmap("map", "drive0", "--dirty", "--output=json", *options).out)
        return [(each["offset"], each["length"]) for each in found]

    def look() -> None:
        assert since("--since", "a") == [(0, GRANULE), (2 * GRANULE, GRANULE), (4 * GRANULE, GRANULE)]
        assert since("--since", "b") == [(2 * GRANULE, GRANULE), (4 * GRANULE, GRANULE)]
        assert since("--since", "a", "--until", "b") == [(0, GRANULE)]
        assert since("--since", "a", "--until", "c") == [(0, GRANULE), (2 * GRANULE, GRANULE)]
        assert "since a until b" in dirtmap("map", "drive0", "--picture", "--since", "a", "--until", "b").out
        for wrong, why in (
            (("--since", "b0"), "there is no such checkpoint"),
            (("--since", "a", "--until", "x"), "there is no such checkpoint"),
            (("--since", "b", "--until", "a"), "not a checkpoint after"),
            (("--since", "b", "--until", "b"), "not a checkpoint after"),
            (("b0", "--since", "a"), "--since goes with no BITMAP"),
            (("b0", "--until", "a"), "--until goes with --since only"),
            ((), "Missing argument 'BITMAP'. Or --since tells a checkpoint"),
        ):
            assert why in error_of("map", "drive0", *wrong)

    with dm.open("node:drive0") as image, image.track(save_interval=0) as tracker:
        for name, granule in (("a", 0), ("b", 2), ("c", 4)):
            tracker.checkpoint(name)
            tracker.mark(granule * GRANULE, 1)
        look()
        tracker.save()
        look()
        for names in (("a", None), ("a", "b"), ("b", "c"), ("c", None)):
            start, end = names
            told = tracker.changed_since(start) if end is None else tracker.changed_between(start, end)
            assert image.changed_since(start, end) == told
    look()
    with Store(str(tmp_path / "default.dmap")) as target, target.change() as change:
        record = change.table.get(b"drive0")
        assert record
        change.table.put(with_chain(record, ["a", "b", "", "c"]))  # as when another program has removed one
    assert "not all that was written since is known" in error_of("map", "drive0", "--since", "a")
    assert since("--since", "c") == [(4 * GRANULE, GRANULE)]


def test_the_status_tells_what_a_user_wants(tracker: Tracker) -> None:
    with tracker.write(0, 1):
        status = json_of("track", "status", "drive0")
        assert (status["writes"], status["in-flight"], status["dirty"]) == (1, 1, GRANULE)
        assert (status["pid"], status["tracked"]) == (os.getpid(), True)
        assert status["socket"] == f"{tracker.live}/socket"
        assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", status["session"])
    tracker.save()
    text = dirtmap("track", "status", "drive0").out
    assert f"  session   {status['session']}\n" in text
    assert "  writes    1, of which 0 have not ended\n" in text
    assert f"  asked at  {status['socket']}\n" in text
    os.unlink(status["socket"])
    assert json_of("track", "status", "drive0")["socket"] is None
    assert "nowhere: it has no socket" in dirtmap("track", "status", "drive0").out


def test_save_and_stop(tracker: Tracker) -> None:
    tracker.mark(0, 1)
    dirtmap("track", "save", "drive0")
    assert json_of("track", "status", "drive0")["regions"] == 0
    stopped = []
    tracker.on_stop = lambda: stopped.append(threading.Thread(target=tracker.close).start())
    dirtmap("track", "stop", "drive0")
    assert stopped
    with pytest.raises(dm.StorageError, match="closed"):
        tracker.mark(0, 1)
    assert "is not tracked" in error_of("track", "save", "drive0")


def test_it_is_closed_at_once_where_nobody_says_otherwise(tracker: Tracker) -> None:
    tracker.mark(0, 1)
    dirtmap("track", "stop", "drive0")
    assert dirty("b0") == [(0, GRANULE)]


def test_whoever_cannot_reach_the_socket_is_told_so(tracker: Tracker) -> None:
    live = json_of("track", "status", "drive0")["live"]
    os.unlink(os.path.join(live, wire.NAME))
    what = error_of("add", "drive0", "x")
    assert f"tracked by python (process {os.getpid()})" in what or f"(process {os.getpid()})" in what
    assert f"it cannot be asked from here: {live}/socket: No such file or directory" in what


def test_the_socket_is_for_this_user_and_goes_with_the_session(tmp_path: Path) -> None:
    """Its path may be longer than an address."""
    make_node(tmp_path, SIZE)
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    with dm.open("node:drive0") as image, image.track(live=folder):
        status = image.tracking()
        assert status is not None
        path = Path(status.live, wire.NAME)
        assert path.stat().st_mode & 0o777 == 0o600
        dirtmap("add", "drive0", "x")
    assert not path.exists()
    assert not path.parent.exists()


def test_what_is_no_message_ends_the_conversation_only(tracker: Tracker) -> None:
    live = json_of("track", "status", "drive0")["live"]
    for junk in (b"\xff" * 12, b"\0\0\0\2" + bytes(8) + b"[]", b"\0\0\0\2" + bytes(8) + b"{}"):
        with socket.socket(socket.AF_UNIX) as peer, wire.place(live) as path:
            peer.connect(path)
            peer.sendall(junk)
            peer.shutdown(socket.SHUT_WR)
            assert b"answer" not in peer.recv(4096)
    dirtmap("add", "drive0", "x")


def test_of_a_device_the_tracker_changes_the_device_s_bitmaps(tmp_path: Path) -> None:
    make_node(tmp_path, SIZE)
    dirtmap("device", "add", "d", "--root", "drive0")
    dirtmap("add", "d", "mine")
    with dm.open("device:d") as device, device.track() as tracker:
        tracker.mark(0, 1)
        dirtmap("clear", "d", "mine")
        assert tracker.bitmap("mine").count == 0
        assert dirty("b0") == [(0, GRANULE)]
