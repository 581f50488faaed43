"""The tracker held against a byte for each granule: marks, cuts, checkpoints, backups, saves, and what is refused."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.hostless import ALONE
from support.tracking import GRANULE, Model, damage_directory, files_in, lost, make_node, mark, model_of

import dirtmap.engine as dm
from dirtmap.engine.model import bits, changes
from dirtmap.engine.model.transaction import Transaction
from dirtmap.engine.session.intent import read_log
from dirtmap.engine.system.file import File
from dirtmap.engine.tracking.home import Home
from dirtmap.engine.tracking.tracker import Tracker
from dirtmap.fmt.directory import FLAG_AUTO, Entry
from dirtmap.fmt.identity import NO_FILE_PLACE

SIZE = 64 << 20


@pytest.fixture
def image(tmp_path: Path) -> Iterator[dm.Namespace]:
    make_node(tmp_path, SIZE)
    with dm.open("node:drive0") as opened:
        yield opened


@pytest.fixture
def tracker(image: dm.Namespace) -> Iterator[Tracker]:
    with image.track(save_interval=0) as tracker:
        yield tracker


def dirty(bitmap: dm.Bitmap) -> list[int]:
    return np.flatnonzero(model_of(bitmap)).tolist()  # type: ignore[no-any-return]


# Marks


def test_marks_are_seen_at_once_here_and_by_others_and_after_closing(image: dm.Namespace) -> None:
    with image.track() as tracker:
        tracker.mark(0, 1)
        tracker.mark(3 * GRANULE - 1, 2)
        with tracker.write(10 * GRANULE, GRANULE):
            assert dirty(tracker.bitmap("b0")) == [0, 2, 3, 10]
        tracker.mark_many([20 * GRANULE, 30 * GRANULE], np.array([1, 0]))
        assert dirty(tracker.bitmap("b0")) == dirty(image["b0"]) == [0, 2, 3, 10, 20]
    assert dirty(image["b0"]) == [0, 2, 3, 10, 20]


@pytest.mark.parametrize(
    ("offset", "length"),
    [(-1, 1), (0, -1), (SIZE, 1), (SIZE - 1, 2), (0, 2**63), (2**63, 1), (5, -1), (-GRANULE, GRANULE)],
)
@pytest.mark.parametrize("known", [False, True])
def test_a_range_outside_the_disk_is_refused_and_nothing_is_marked(
    tracker: Tracker, offset: int, length: int, known: bool
) -> None:
    expected = [5] if known else []
    if known:
        tracker.mark(5 * GRANULE, 1)
    with pytest.raises(ValueError, match="not inside a disk"):
        tracker.mark(offset, length)
    with pytest.raises(ValueError, match="not inside a disk"):
        tracker.begin(offset, length)
    with pytest.raises(ValueError, match=r"not inside a disk|2\*\*63"):
        tracker.mark_many([0, offset], [1, length])
    with pytest.raises(ValueError, match=r"not inside a disk|2\*\*63"):
        tracker.mark_many([0] * 500 + [offset], [1] * 500 + [length])
    assert dirty(tracker.bitmap("b0")) == expected


def test_a_write_lasts_as_long_as_its_block_whoever_enters_it(tracker: Tracker) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(tracker.write(0, 1))
        with contextlib.suppress(ValueError), tracker.write(GRANULE, 1):
            assert tracker._kernel.in_flight == 2
            raise ValueError
        assert tracker._kernel.in_flight == 1
    write = tracker.write(2 * GRANULE, 1)
    assert tracker._kernel.in_flight == 0
    with write:
        assert tracker._kernel.in_flight == 1
    with pytest.raises(dm.Error, match="begun once"), write:
        pass
    assert tracker._kernel.in_flight == 0
    assert dirty(tracker.bitmap("b0")) == [0, 1, 2]


def test_a_length_of_0_marks_nothing(tracker: Tracker) -> None:
    for offset in (0, 5, GRANULE, SIZE):
        tracker.mark(offset, 0)
        with tracker.write(offset, 0):
            pass
    tracker.mark_many([0, 5, SIZE] * 100, [0] * 300)
    assert dirty(tracker.bitmap("b0")) == []


@pytest.mark.parametrize("size", [SIZE, SIZE - 1, SIZE - GRANULE + 1, 1, GRANULE, 3 * GRANULE + 7])
def test_the_last_granule_can_be_cut_short(tmp_path: Path, size: int) -> None:
    make_node(tmp_path, size)
    with dm.open("node:drive0") as image, image.track() as tracker:
        for _ in range(3):
            tracker.mark(size - 1, 1)
            with pytest.raises(ValueError, match="not inside"):
                tracker.mark(size - 1, 2)
            with pytest.raises(ValueError, match="not inside"):
                tracker.mark(size, 1)
        assert dirty(tracker.bitmap("b0")) == [(size - 1) // GRANULE]


ranges = st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(0, 5 * GRANULE)), max_size=40)


@given(ranges=ranges, data=st.data())
def test_many_at_once_are_as_one_by_one(ranges: list[tuple[int, int]], data: st.DataObject) -> None:
    ranges = [(offset, min(length, SIZE - offset)) for offset, length in ranges if length]
    if not ranges:
        return
    nbits = data.draw(st.sampled_from([SIZE // 65536, SIZE // 4096]))
    unit = SIZE // nbits
    words, model = bits.zeros(nbits), np.zeros(nbits, np.uint8)
    starts = np.array([offset // unit for offset, _ in ranges])
    lasts = np.array([(offset + length - 1) // unit for offset, length in ranges])
    bits.scatter(words, starts, lasts)
    for offset, length in ranges:
        mark(model, offset, length, unit)
    assert np.unpackbits(words.view(np.uint8), count=nbits, bitorder="little").tolist() == model.tolist()


def test_a_large_batch_is_as_one_by_one(tracker: Tracker) -> None:
    rng = np.random.default_rng(1)
    offsets = rng.integers(0, SIZE - (1 << 20), 5000)
    lengths = rng.integers(0, 1 << 20, 5000)
    lengths[:4900] = rng.integers(0, 9, 4900)
    model = np.zeros(SIZE // GRANULE, np.uint8)
    for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True):
        mark(model, offset, length)
    tracker.mark_many(offsets, lengths)
    assert np.array_equal(model_of(tracker.bitmap("b0")), model)


# Cuts


def test_checkpoints(tracker: Tracker, image: dm.Namespace) -> None:
    tracker.mark(0, 1)
    for number, name in enumerate(("sunday", "monday", "tuesday"), 1):
        tracker.checkpoint(name)
        tracker.mark(number * GRANULE, 1)
        if name == "monday":
            tracker.save()
    assert tracker.checkpoints() == ["sunday", "monday", "tuesday"]
    for _ in range(2):
        assert dirty(tracker.bitmap("b0")) == [0, 1, 2, 3]
        assert dirty(tracker.changed_since("sunday")) == [1, 2, 3]
        assert dirty(tracker.changed_since("tuesday")) == [3]
        assert dirty(tracker.changed_between("sunday", "tuesday")) == [1, 2]
        assert dirty(tracker.changed_between("monday", "tuesday")) == [2]
        assert dirty(image["monday"]) == [2]
        tracker.save()
    with pytest.raises(dm.BitmapError, match="not a checkpoint after"):
        tracker.changed_between("tuesday", "sunday")
    tracker.add("off", recording=False)
    for name, said in (("b0", "bitmap 'b0': not a checkpoint$"), ("none", "bitmap 'none': there is no such bitmap$")):
        with pytest.raises(dm.BitmapError, match=said):
            tracker.changed_between(name, "sunday")
    with pytest.raises(dm.BitmapError, match="bitmap 'off': neither a checkpoint nor recording"):
        tracker.changed_since("off")
    with pytest.raises(dm.BitmapError, match="taken"):
        tracker.checkpoint("monday")
    tracker.remove("monday")
    assert dirty(tracker.changed_since("sunday")) == [1, 2, 3]
    assert dirty(tracker.bitmap("sunday")) == [1, 2]
    tracker.mark(9 * GRANULE, 1)
    tracker.remove("tuesday")  # the one before it records again
    tracker.mark(10 * GRANULE, 1)
    assert dirty(tracker.changed_since("sunday")) == [1, 2, 3, 9, 10]
    tracker.close()
    assert dirty(image["sunday"]) == [1, 2, 3, 9, 10]
    with image.track() as again:
        again.mark(11 * GRANULE, 1)
        again.checkpoint("later")
        again.mark(12 * GRANULE, 1)
        assert again.checkpoints() == ["sunday", "later"]
        assert dirty(again.changed_since("sunday")) == [1, 2, 3, 9, 10, 11, 12]


def checkpoints_from_a_to_c(image: dm.Namespace) -> None:
    """Three checkpoints, each with the granule of its number."""
    with image.track() as tracker:
        for number, name in enumerate("abc"):
            tracker.checkpoint(name)
            tracker.mark(number * GRANULE, 1)


@pytest.mark.parametrize("gone", ["a", "b", "c", "bc", "cb", "ab", "ca"])
def test_checkpoints_removed_while_nobody_tracks_are_taken_over(image: dm.Namespace, gone: str) -> None:
    checkpoints_from_a_to_c(image)
    with image.transaction() as bitmaps:
        for name in gone:
            changes.remove(bitmaps, name)
    with image.track() as tracker:
        tracker.mark(5 * GRANULE, 1)
        left = [name for name in "abc" if name not in gone]
        assert tracker.checkpoints() == left
        for name in left:
            assert dirty(tracker.changed_since(name)) == [*range("abc".index(name), 3), 5]


def clean_in_place(bitmaps: Transaction) -> None:
    bitmaps["b"].clear(0, SIZE)


def put_another(bitmaps: Transaction) -> None:
    bitmaps["b"] = dm.Bitmap(SIZE)


@pytest.mark.parametrize(
    "act",
    [
        lambda bitmaps: changes.clear(bitmaps, "b"),
        lambda bitmaps: changes.set_recording(bitmaps, "c", False),
        lambda bitmaps: changes.set_recording(bitmaps, "a", True),
        lambda bitmaps: changes.rename(bitmaps, "b", "x"),
        clean_in_place,
        put_another,
    ],
)
def test_what_others_rely_on_is_not_taken_from_a_checkpoint(
    image: dm.Namespace, act: Callable[[Transaction], None]
) -> None:
    checkpoints_from_a_to_c(image)
    with pytest.raises(dm.BitmapError, match="a checkpoint, which others rely on"), image.transaction() as bitmaps:
        act(bitmaps)
    with image.transaction() as bitmaps:  # which only adds to it
        changes.merge(bitmaps, "b", [bitmaps["b0"]])
        bitmaps["c"].mark(7 * GRANULE, 1)
    with image.track() as tracker:
        assert dirty(tracker.changed_since("b")) == [0, 1, 2, 7]


@pytest.mark.parametrize(
    ("others", "gone", "later"),
    [
        (lambda entry: None if entry.name == b"b" else entry, {"a"}, ["c", "d"]),
        (lambda entry: None if entry.name == b"c" else entry, {"a", "b"}, ["d"]),
        (lambda entry: None if entry.name == b"a" else entry, set(), ["b", "c", "d"]),
        (lambda entry: entry.with_flags(clear=FLAG_AUTO), {"a", "b", "c"}, ["d"]),
    ],
)
def test_a_chain_that_others_have_broken_stays_broken(
    image: dm.Namespace, tmp_path: Path, others: Callable[[Entry], Entry | None], gone: set[str], later: list[str]
) -> None:
    checkpoints_from_a_to_c(image)
    with Home(ALONE, str(tmp_path / "default.dmap"), b"drive0").change(None) as home:  # as others do
        home.entries = {name: new for name, entry in home.entries.items() if (new := others(entry))}
    with image.transaction() as bitmaps:
        bitmaps["unrelated"] = dm.Bitmap(SIZE)
    with image.track() as tracker:
        tracker.mark(5 * GRANULE, 1)
        tracker.checkpoint("d")
        tracker.mark(6 * GRANULE, 1)
        for name in gone & set(tracker.checkpoints()):
            with pytest.raises(dm.BitmapError, match="not all that was written since is known"):
                tracker.changed_since(name)
        for name in set("abc") - set(tracker.checkpoints()):
            tracker.add(name)  # which is no checkpoint
        for name in gone & set(tracker.checkpoints()):
            with pytest.raises(dm.BitmapError, match="not all that was written since is known"):
                tracker.changed_since(name)
        marked = {"b": [1, 2, 5, 6], "c": [2, 5, 6], "d": [6]}
        assert {name: dirty(tracker.changed_since(name)) for name in later} == {name: marked[name] for name in later}
        for name in sorted(gone & set(tracker.checkpoints())):
            tracker.remove(name)
        assert tracker.checkpoints() == later


def test_every_change_of_a_tracked_bitmap_is_a_cut(tracker: Tracker, image: dm.Namespace) -> None:
    tracker.mark(0, 1)
    tracker.add("fine", 4096)
    tracker.mark(GRANULE + 4096, 1)
    assert dirty(tracker.bitmap("b0")) == [0, 1]
    assert dirty(tracker.bitmap("fine")) == [17]
    tracker.disable("fine")
    tracker.mark(2 * GRANULE, 1)
    assert dirty(tracker.bitmap("fine")) == [17]
    tracker.enable("fine")
    tracker.mark(3 * GRANULE, 1)
    assert dirty(tracker.bitmap("fine")) == [17, 48]
    tracker.save()
    tracker.disable("fine")
    tracker.enable("fine")
    assert dirty(tracker.bitmap("fine")) == [17, 48]
    tracker.clear("b0")
    assert dirty(tracker.bitmap("b0")) == []
    tracker.mark(4 * GRANULE, 1)
    tracker.add("late", recording=False)
    tracker.mark(5 * GRANULE, 1)
    assert dirty(tracker.bitmap("late")) == []
    assert dirty(tracker.bitmap("b0")) == [4, 5]
    tracker.remove("late")
    tracker.close()
    assert dirty(image["b0"]) == [4, 5]
    assert dirty(image["fine"]) == [17, 48, 64, 80]
    assert list(image) == ["b0", "fine"]


def test_a_mark_that_was_bound_before_a_finer_bitmap_came_still_counts(tracker: Tracker) -> None:
    old = tracker.mark
    old(0, 1)
    tracker.add("fine", 4096)
    old(0, 1)
    old(4096, 1)
    assert dirty(tracker.bitmap("fine")) == [0, 1]


def test_a_cut_waits_for_the_writes_that_began_before_it(tracker: Tracker) -> None:
    ticket = tracker.begin(0, 1)
    done = threading.Event()

    def cut() -> None:
        tracker.checkpoint("monday")
        done.set()

    thread = threading.Thread(target=cut)
    thread.start()
    while tracker._kernel.interval == 0:  # the swap, not merely the beginning of the cut
        time.sleep(0)
    with tracker.write(GRANULE, 1):  # of the new interval, so nobody waits for it
        try:
            assert not done.wait(0.1)
        finally:
            tracker.end(ticket)
        assert done.wait(60)
    thread.join()
    assert dirty(tracker.changed_since("monday")) == [1]
    assert dirty(tracker.bitmap("b0")) == [0, 1]


# What falls in between


class Between:
    """Has something else happen in the middle of the next mark, where it logs its region."""

    def __init__(self, tracker: Tracker, monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
        self.act: Callable[[], None] | None = act
        real = tracker._kernel._sync

        def sync() -> None:
            act, self.act = self.act, None
            if act:
                act()
            real()

        monkeypatch.setattr(tracker._kernel, "_sync", sync)


MARKS: dict[str, Callable[[Tracker], object]] = {
    "mark": lambda tracker: tracker.mark(5 * GRANULE, 1),
    "long mark": lambda tracker: tracker.mark(5 * GRANULE, 2 * GRANULE),
    "begin": lambda tracker: tracker.end(tracker.begin(5 * GRANULE, 1)),
    "many": lambda tracker: tracker.mark_many([5 * GRANULE] * 500, [1] * 500),
}


@pytest.mark.parametrize("way", MARKS)
@pytest.mark.parametrize("cut", [False, True])
def test_a_mark_that_a_cut_and_a_save_overtake_is_not_lost(
    image: dm.Namespace, monkeypatch: pytest.MonkeyPatch, way: str, cut: bool
) -> None:
    with image.track(save_interval=0, region_size=1 << 20) as tracker:
        tracker.mark(5 * GRANULE, 1)
        tracker.clear("b0")
        tracker.save()

        def act() -> None:
            if cut:
                tracker.checkpoint("x")
            tracker.save()  # drops the writeset that the mark has already chosen
            # Another one would begin a log in the places to which the mark is about to write.
            with pytest.raises(dm.BitmapError, match="in the middle of another act of the same thread"):
                tracker.save()

        between = Between(tracker, monkeypatch, act)
        MARKS[way](tracker)
        assert between.act is None, "nothing came in between"
        assert 5 in dirty(tracker.bitmap("b0"))
        # The log that counts from now on has it, too: a power loss right here must not lose it.
        assert tracker._kernel.logged == 1
        logged = read_log(tracker._session, SIZE)
        assert logged
        assert logged.regions == {5 * GRANULE // (1 << 20)}


def test_regions_are_logged_anew_after_a_save(tracker: Tracker) -> None:
    for _ in range(3):
        for _ in range(2):  # the slow way, then the fast one
            tracker.mark(0, 1)
            assert tracker._kernel.logged == 1
        tracker.save()
        assert tracker._kernel.logged == 0


def test_a_cut_does_not_wait_for_a_write_whose_ticket_is_lost(tracker: Tracker) -> None:
    tracker.begin(0, 1)  # and nobody has the ticket
    kept = tracker.begin(GRANULE, 1)
    tracker.end(kept)
    tracker.checkpoint("monday")
    assert tracker._kernel.in_flight == 0
    assert dirty(tracker.bitmap("b0")) == [0, 1]
    assert dirty(tracker.changed_since("monday")) == [0]  # it may still be written


def test_the_interval_a_write_is_of_is_settled_before_it_begins(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cut between a write's choice of an interval and its joining it: the write moves on to the new one."""
    between = Between(tracker, monkeypatch, lambda: tracker.checkpoint("x"))
    ticket = tracker.begin(0, 1)
    assert between.act is None
    assert tracker._kernel.flying(1, False) == 0
    assert tracker._kernel.flying(2, False) == 1
    assert dirty(tracker.changed_since("x")) == [0]
    tracker.end(ticket)


# Backups


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("success", [False, True])
def test_a_backup_takes_a_bitmap_and_gives_it_back_or_drops_it(
    tracker: Tracker, image: dm.Namespace, save: bool, success: bool
) -> None:
    tracker.mark(0, 1)
    tracker.save()
    tracker.mark(GRANULE, 1)
    taken = tracker.take("b0")
    assert dirty(taken) == [0, 1]
    assert image.info().bitmaps[0].busy
    assert image["b0"].busy
    for act in (tracker.take, tracker.clear, tracker.disable, tracker.remove):
        with pytest.raises(dm.BitmapError, match="busy"):
            act("b0")
    tracker.mark(2 * GRANULE, 1)
    tracker.checkpoint("between")
    tracker.mark(3 * GRANULE, 1)
    if save:
        tracker.save()
        tracker.checkpoint("later")
        tracker.save()
    (tracker.drop if success else tracker.give_back)("b0")
    tracker.mark(4 * GRANULE, 1)
    expected = [2, 3, 4] if success else [0, 1, 2, 3, 4]
    assert dirty(tracker.bitmap("b0")) == dirty(image["b0"]) == expected
    assert not image.info().bitmaps[0].busy
    assert not image["b0"].busy
    tracker.close()
    assert dirty(image["b0"]) == expected


def test_a_backup_that_died_has_failed(image: dm.Namespace) -> None:
    child = os.fork()
    if child == 0:
        try:
            tracker = image.track(save_interval=0)
            tracker.mark(0, 1)
            assert tracker.take("b0").count == GRANULE
            tracker.mark(GRANULE, 1)
            tracker.save()
            tracker.mark(2 * GRANULE, 1)
        finally:
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    for _ in range(2):
        assert not image.info().bitmaps[0].busy
        assert dirty(image["b0"]) == [0, 1, 2]
        image.recover()


def test_saves_happen_by_themselves(image: dm.Namespace) -> None:
    with image.track(save_interval=0.01) as tracker:
        tracker.mark(0, 1)
        tracker.checkpoint("x")
        while tracker._kernel.logged or tracker._frozen:
            time.sleep(0.01)
        assert tracker.last_error is None
        assert tracker._session.log >= 1
        assert dirty(image["b0"]) == dirty(tracker.bitmap("b0")) == [0]


def test_processes_track_different_nodes_of_one_store(tmp_path: Path) -> None:
    names = ["one", "two", "three"]
    for name in names:
        make_node(tmp_path, SIZE, name)
    children = []
    for number, name in enumerate(names):
        child = os.fork()
        if child == 0:
            try:
                with dm.open(f"node:{name}") as image, image.track(save_interval=0) as tracker:
                    for at in range(number, SIZE // GRANULE, 7):
                        tracker.mark(at * GRANULE, 1)
                        if at % 5 == 0:
                            tracker.save()
                        if at % 50 == 0:
                            tracker.checkpoint(f"c{at}")
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        children.append(child)
    for child in children:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for number, name in enumerate(names):
        with dm.open(f"node:{name}") as image:
            assert dirty(image["b0"]) == list(range(number, SIZE // GRANULE, 7))
    assert dm.check(str(tmp_path / "default.dmap")).corruptions == 0


# What is refused


def test_one_tracker_a_node_and_no_change_behind_its_back(tracker: Tracker, image: dm.Namespace) -> None:
    who = rf"tracked by .* \(process {os.getpid()}\)"
    with pytest.raises(dm.LockedError, match=who):
        image.track()
    with pytest.raises(dm.LockedError, match=who):
        image.recover()


def test_holds_and_trackers_keep_apart(image: dm.Namespace) -> None:
    with image.hold("b0", "a backup"), pytest.raises(dm.LockedError, match="held by 'a backup'"):
        image.track()
    with image.track() as tracker, image.hold("b0", "us"), pytest.raises(dm.BitmapError, match="busy: held by 'us'"):
        tracker.clear("b0")  # its tracker holds it
    with image.hold("b0") as held:
        assert held.count == 0


def test_a_closed_tracker_refuses_everything(image: dm.Namespace) -> None:
    tracker = image.track()
    tracker.mark(0, 1)
    tracker.close()
    for act in (
        lambda: tracker.mark(0, 1),
        lambda: tracker.begin(0, 1),
        lambda: tracker.mark_many([0], [1]),
        lambda: tracker.mark_many([0] * 1000, [1] * 1000),
        lambda: tracker.checkpoint("x"),
        lambda: tracker.save(),
        lambda: tracker.bitmap("b0"),
    ):
        with pytest.raises(dm.Error, match="closed"):
            act()
    tracker.close()


def test_a_forked_child_cannot_use_its_parents_tracker(tracker: Tracker) -> None:
    tracker.mark(0, 1)
    child = os.fork()
    if child == 0:
        try:
            tracker.mark(GRANULE, 1)
        except dm.Error:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    tracker.mark(2 * GRANULE, 1)
    assert dirty(tracker.bitmap("b0")) == [0, 2]


def test_nothing_is_left_behind(image: dm.Namespace, tmp_path: Path) -> None:
    live = tmp_path / "live"
    live.mkdir()
    with image.track(live=str(live)) as tracker:
        tracker.checkpoint("x")
        assert sorted(file.name for file in live.glob("*/*/*")) == ["bits", "control", "markers", "socket"]
    assert list(live.glob("*/*")) == []
    assert files_in(tmp_path) == ["default.dmap", "drive0.raw", "live"]


# Threads


def work_beside_cuts(folder: Path, seconds_of_marks: int, threads: int, batch: int) -> int:
    """Threads that mark at full speed beside cuts, saves and readers; returns how many marks there were."""
    size = 1 << 30
    make_node(folder, size)
    count = size // GRANULE
    cuts = 0  # checkpoints that have returned
    marks = [0] * threads
    # models[thread][cut]: what that thread marked after so many cuts had returned.
    models: list[list[Model]] = [[np.zeros(count, np.uint8) for _ in range(200)] for _ in range(threads)]
    every = [np.zeros(count, np.uint8) for _ in range(threads)]
    stop, faults = threading.Event(), []

    with dm.open("node:drive0") as image, image.track(save_interval=0, region_size=1 << 20) as tracker:

        def one(number: int) -> None:
            rng = random.Random(number)
            many = np.random.default_rng(number)
            try:
                while marks[number] < seconds_of_marks:
                    after = cuts
                    model, all_of_it = models[number][after], every[number]
                    way = rng.random()
                    if way < 0.02:
                        offsets = many.integers(0, size - GRANULE, batch)
                        tracker.mark_many(offsets, np.full(batch, GRANULE))
                        for at in (offsets // GRANULE, (offsets + GRANULE - 1) // GRANULE):
                            model[at] = all_of_it[at] = 1
                        marks[number] += batch
                        continue
                    for _ in range(50):
                        offset, length = rng.randrange(size - (1 << 20)), rng.choice((512, 4096, 4096, 1 << 20))
                        if way < 0.5:
                            tracker.mark(offset, length)
                        else:
                            with tracker.write(offset, length):
                                pass
                        mark(model, offset, length)
                        mark(all_of_it, offset, length)
                    marks[number] += 50
            except BaseException as error:
                faults.append(error)

        def read() -> None:
            try:
                while not stop.is_set():
                    expected = np.bitwise_or.reduce([model.copy() for model in every])
                    assert not lost(expected, image["b0"])
            except BaseException as error:
                faults.append(error)

        workers = [threading.Thread(target=one, args=(number,)) for number in range(threads)]
        reader = threading.Thread(target=read)
        for thread in (*workers, reader):
            thread.start()
        rng = random.Random(5)
        while any(worker.is_alive() for worker in workers) and cuts < 199:
            if rng.random() < 0.5:
                tracker.save()
            else:
                tracker.checkpoint(f"c{cuts + 1}")
                cuts += 1
        for worker in workers:
            worker.join()
        stop.set()
        reader.join()
        assert not faults, faults
        expected = np.bitwise_or.reduce(every)
        for where in (tracker, image):
            found = tracker.bitmap("b0") if where is tracker else image["b0"]
            assert np.array_equal(model_of(found), expected)
        for cut in range(1, cuts + 1):
            since = np.bitwise_or.reduce(
                [models[number][after] for number in range(threads) for after in range(cut, cuts + 1)]
            )
            assert not lost(since, tracker.changed_since(f"c{cut}"))
    with dm.open("node:drive0") as image:
        assert np.array_equal(model_of(image["b0"]), expected)
        since = np.bitwise_or.reduce(
            [models[number][after] for number in range(threads) for after in range(1, cuts + 1)]
        )
        found = dm.Bitmap(size)
        for cut in range(1, cuts + 1):
            found |= image[f"c{cut}"]
        assert not lost(since, found)
    return sum(marks)


@pytest.fixture(autouse=True)
def switching_often() -> Iterator[None]:
    """Threads take turns a thousand times as often as usual."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(interval)


def test_threads_lose_no_mark_beside_cuts_saves_and_readers(tmp_path: Path) -> None:
    print(work_beside_cuts(tmp_path, 20_000, 4, 500), "marks")


@pytest.mark.long
def test_threads_lose_no_mark_of_tens_of_millions(tmp_path: Path) -> None:
    print(work_beside_cuts(tmp_path, 5_000_000, 4, 20_000), "marks")


# Options


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"save_interval": None}, TypeError),
        ({"save_interval": "5"}, TypeError),
        ({"save_interval": -1}, dm.BitmapError),
        ({"save_interval": float("nan")}, dm.BitmapError),
        ({"save_interval": float("inf")}, dm.BitmapError),
        ({"region_size": 1 << 70}, dm.BitmapError),
        ({"region_size": 1 << 64}, dm.BitmapError),
        ({"region_size": 1 << 19}, dm.BitmapError),
        ({"region_size": 3 << 20}, dm.BitmapError),
        ({"region_size": 0}, dm.BitmapError),
        ({"region_size": -(1 << 20)}, dm.BitmapError),
        ({"region_size": 1.5}, TypeError),
        ({"region_size": "1M"}, TypeError),
        ({"live": 5}, TypeError),
        ({"intent": "all"}, dm.BitmapError),
        ({"interval": 5}, TypeError),
    ],
)
def test_options_that_cannot_be_are_refused(
    image: dm.Namespace, tmp_path: Path, options: dict[str, object], error: type[Exception]
) -> None:
    before = files_in(tmp_path)
    with pytest.raises(error):
        image.track(**options)
    assert image.tracking() is None
    assert files_in(tmp_path) == before


def test_numbers_of_numpy_are_taken(image: dm.Namespace) -> None:
    with image.track(region_size=np.int64(1 << 62), save_interval=np.float32(0)) as tracker:
        tracker.mark(5 * GRANULE, 1)
    with image.track(region_size=np.int64(1 << 20), save_interval=np.int64(7)) as tracker:
        tracker.add("g", np.int64(GRANULE))
        tracker.checkpoint("c", np.uint16(4096))
        tracker.mark(6 * GRANULE, 1)
        assert tracker.bitmap("c").granularity == 4096
        assert image.tracking().region_size == 1 << 20
    assert [dirty(image[name]) for name in ("b0", "g")] == [[5, 6], [6]]


def test_a_finer_bitmap_that_is_refused_leaves_writesets_as_they_are(tracker: Tracker) -> None:
    tracker.add("taken", GRANULE)
    before = tracker._current.number, tracker._current.granularity_bits
    for name in ("taken", "", "x" * 1024):
        for ask in (tracker.add, tracker.checkpoint):
            with pytest.raises(dm.BitmapError):
                ask(name, 512)
    assert (tracker._current.number, tracker._current.granularity_bits) == before


# Live files


def test_a_relative_folder_of_live_files_stays_where_it_is(
    image: dm.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("live", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    with image.track(live="live", save_interval=0) as tracker:
        monkeypatch.chdir("elsewhere")
        tracker.mark(5 * GRANULE, 1)
        tracker.checkpoint("c")
        assert dirty(image["b0"]) == [5]
        assert Path(image.tracking().live).parent.parent == tmp_path / "live"
    assert [path for path in (tmp_path / "live").rglob("*") if path.is_file()] == []
    assert dirty(image["b0"]) == [5]


@pytest.mark.parametrize("dead", [False, True])
def test_a_copy_of_the_store_takes_no_live_files_from_a_tracker(
    image: dm.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead: bool
) -> None:
    monkeypatch.setattr(File, "place", lambda file: NO_FILE_PLACE)  # so nobody can tell that it is a copy
    elsewhere = tmp_path / "elsewhere"  # of another host, as far as anything there tells
    elsewhere.mkdir()
    shutil.copy(tmp_path / "default.dmap", elsewhere / "copy.dmap")

    def other() -> dm.Namespace:
        monkeypatch.setenv("DIRTMAP_STORE", str(elsewhere / "copy.dmap"))
        monkeypatch.setenv("DIRTMAP_INDEX", str(elsewhere / "copy-index"))
        return dm.open("node:drive0")

    if dead:
        pid = os.fork()
        if pid == 0:
            try:
                image.track().mark(5 * GRANULE, 1)
            finally:
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(pid, 0)
        with other() as twin, twin.track() as tracker:
            tracker.mark(6 * GRANULE, 1)
        assert {5} <= set(dirty(image["b0"]))
        return
    with image.track(save_interval=0) as tracker:
        tracker.mark(5 * GRANULE, 1)
        files = sorted(Path(image.tracking().live).iterdir())
        with other() as twin:
            with pytest.raises(dm.LockedError, match="another store has its live files here"):
                twin.track()
            assert twin.tracking() is None
        assert sorted(Path(image.tracking().live).iterdir()) == files
        tracker.checkpoint("c")
        tracker.mark(6 * GRANULE, 1)
        assert dirty(image["b0"]) == [5, 6]
    with other() as twin, twin.track():
        pass


def test_mending_a_damaged_directory_ends_the_session_of_a_tracker_that_has_ended(
    image: dm.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = image.track(save_interval=0)
    tracker.checkpoint("c1")
    tracker.checkpoint("c2")
    damage_directory(tmp_path / "default.dmap")  # the older header slot leads to a directory without 'c2'
    monkeypatch.setattr(Home, "_left_at", lambda home, snapshot: None)  # else it is written anew, and nothing is lost
    with pytest.raises(dm.LockedError, match="tracked by"):
        image.recover()
    tracker.mark(0, 1)
    for act in (
        tracker.save,
        lambda: tracker.checkpoint("c3"),
        lambda: tracker.changed_since("c1"),
        lambda: tracker.take("b0"),
    ):
        with pytest.raises(dm.FormatError, match="directory of node 'drive0'"):
            act()
    with pytest.raises(dm.LockedError, match="tracked by"):
        dm.check(tmp_path / "default.dmap", repair="all")
    with pytest.raises(dm.FormatError, match="directory of node 'drive0'"):
        tracker.close()
    assert len(dm.check(tmp_path / "default.dmap", repair="all").dropped) == 1
    assert (image.tracking(), list(image)) == (None, ["b0", "c1"])
    assert all(image[name].count == SIZE for name in image)
    with image.transaction() as bitmaps:
        bitmaps["b0"].clear(0, SIZE)
    assert files_in(tmp_path) == ["default.dmap", "drive0.raw"]


@pytest.mark.parametrize("end", ["other bits", "all dirty", "removed"])
def test_bits_that_are_replaced_again_in_one_change_leave_no_leak(tmp_path: Path, end: str) -> None:
    make_node(tmp_path, SIZE)
    path = str(tmp_path / "default.dmap")
    old, first, second = (dm.Bitmap.from_extents(SIZE, [at << 20], [GRANULE], 512) for at in (1, 2, 3))
    with dm.open("node:drive0") as image, image.transaction() as bitmaps:
        bitmaps["b"] = old
    with Home(ALONE, path, b"drive0").change(None) as home:
        home.put("other", first, None)
        home.put("b", first, None)
        home.put("b", second if end == "other bits" else second.recovered(), None)
        if end == "removed":
            home.put("b", first, None)
            del home.entries["b"]
    with dm.open("node:drive0") as image:
        assert image["other"] == first
        if end == "removed":
            assert "b" not in image
        else:
            assert image["b"].extents()[0].tolist() == ([3 << 20] if end == "other bits" else [0])
    assert not dm.check(path).findings
