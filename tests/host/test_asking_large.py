"""A tracker is asked for large bitmaps part by part: the same comes of it as of small ones."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.child import in_child
from support.tracking import make_node

import dirtmap.engine as dm
from dirtmap.engine.control import client
from dirtmap.engine.model import content
from dirtmap.engine.tracking import asked, gathered
from dirtmap.engine.tracking.tracker import Tracker

FINE, COARSE = 4096, 65536
SIZE = 5000 * FINE + 7  # parts of 512 bits, and the last one is shorter


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "LARGE", 256)
    monkeypatch.setattr(content, "BLOCK", 512)


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[Tracker]:
    make_node(tmp_path, SIZE, "disk")
    with dm.open("disk") as image:
        with image.transaction() as bitmaps:
            bitmaps["fine"] = some(1, FINE)
            bitmaps["coarse"] = some(2, COARSE)
            bitmaps["apart"] = dm.Bitmap(SIZE, FINE, recording=False)
        with image.track(save_interval=0) as tracker:
            yield tracker


def some(seed: int, granularity: int) -> dm.Bitmap:
    """A bitmap with clean, dirty and mixed parts."""
    chooser, bitmap = random.Random(seed), dm.Bitmap(SIZE, granularity)
    bitmap.mark(1024 * FINE, 1024 * FINE)
    for _ in range(40):
        bitmap.mark(chooser.randrange(2500 * FINE, SIZE), 1)
    bitmap.mark(SIZE - 1, 1)
    return bitmap


def now(name: str) -> dm.Bitmap:
    with dm.open("disk") as image:
        return image[name]


def test_bits_that_are_changed_and_marked_at_once(tracker: Tracker) -> None:
    expected = {"fine": some(1, FINE), "coarse": some(2, COARSE), "apart": some(3, FINE)}
    with dm.open("disk") as image, image.transaction() as bitmaps:
        tracker.mark(5 * FINE, 1)
        bitmaps["apart"] |= some(3, FINE)  # put
        bitmaps["fine"].mark_many([0, 3000 * FINE], [1, 9 * FINE])  # merged
        bitmaps["coarse"] = bitmaps["coarse"] - some(2, COARSE)  # put, and nothing of it is dirty
        bitmaps["new"] = bitmaps["fine"].at(COARSE)
    expected["fine"].mark_many([0, 5 * FINE, 3000 * FINE], [1, 1, 9 * FINE])
    expected["coarse"] = dm.Bitmap.from_extents(SIZE, [5 * FINE], [1], COARSE)
    before = some(1, FINE)
    before.mark_many([0, 5 * FINE, 3000 * FINE], [1, 1, 9 * FINE])
    expected["new"] = before.at(COARSE)
    for name, bitmap in expected.items():
        assert now(name) == bitmap
        assert tracker.bitmap(name) == bitmap
    tracker.save()
    for name, bitmap in expected.items():
        assert now(name) == bitmap


def test_what_is_held_stays_as_it_is(tracker: Tracker, tmp_path: Path) -> None:
    make_node(tmp_path, SIZE, "other")
    tracker.mark(0, 1)
    expected = some(1, FINE)
    expected.mark(0, 1)
    with dm.open("disk") as image, image.hold("fine") as held:
        tracker.mark(7 * FINE, 1)
        assert held == expected
        assert (held.recording, held.granularity, held.count) == (True, FINE, expected.count)
        with dm.open("other") as other:
            with other.transaction() as bitmaps:
                bitmaps["copy"] = held  # which is looked at in larger parts
            assert other["copy"] == expected


def test_threads_share_what_is_held(tracker: Tracker) -> None:
    expected, wrong = some(1, FINE), []
    with dm.open("disk") as image, image.hold_all(["fine", "coarse"]) as held:
        bitmap = held["fine"]

        def look() -> None:
            try:
                wrong.extend(turn for turn in range(20) if bitmap != expected)
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=look) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_what_is_held_is_the_first_and_only_in_its_block(tracker: Tracker) -> None:
    tracker.mark(0, 1)
    with dm.open("disk") as image, image.hold_all(["fine"]) as held:
        assert isinstance(held["fine"], dm.Bitmap)
        bitmap, expected = held["fine"], some(1, FINE)
        expected.mark(0, 1)

        def child() -> str:
            with pytest.raises(dm.Error, match="the process that this one was forked from") as caught:
                _ = bitmap.count
            return str(caught.value)

        assert "node 'disk': " in in_child(child)
        assert bitmap == expected
    for look in (lambda: bitmap.count, lambda: held["fine"]):
        with pytest.raises(dm.Error, match="the hold has ended"):
            look()


def test_who_looks_whether_a_bitmap_is_held_asks_for_none(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    asks: list[str] = []
    with dm.open("disk") as image, image.hold_all(["fine"]) as held:
        kept = held["fine"]
        with monkeypatch.context() as patch:
            patch.setattr(client.Conversation, "_answer", lambda _: asks.append("asked"))
            assert "fine" in held
            assert "coarse" not in held
        assert asks == []
        monkeypatch.setattr(Tracker, "held", lambda *_: pytest.fail("it has it"))
        assert held["fine"] == kept


def test_an_answer_that_nobody_waited_for_is_that_to_no_other_question(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    with dm.open("disk") as image, image.hold("fine") as held:
        with monkeypatch.context() as patch:
            patch.setattr(client.Conversation, "_answer", interrupted)
            with pytest.raises(KeyboardInterrupt):
                held.extents()
        with pytest.raises(dm.StorageError, match="hung up"):
            held.extents()


def test_a_value_is_not_changed_by_what_is_marked_later(tracker: Tracker) -> None:
    tracker.mark(0, 1)
    value = tracker.bitmap("fine")
    other = now("fine")
    count = value.count
    for turn in range(1, 4):
        tracker.mark(turn * FINE, 1)
        tracker.checkpoint(f"c{turn}", FINE)
        tracker.save()
    assert (value.count, sum(value.extents()[1]) > 0, other == value) == (count, True, True)


def test_a_save_while_marks_come_has_all_that_came_before(tracker: Tracker) -> None:
    expected = some(1, FINE)
    for number in range(300):
        at = number * 17 % 5000 * FINE
        tracker.mark(at, 1)
        expected.mark(at, 1)
        if number % 60 == 0:
            tracker.save()
    assert now("fine") == expected
    tracker.close()
    assert now("fine") == expected


def test_bits_are_refused_that_cannot_be_those_of_the_disk(tracker: Tracker) -> None:
    with dm.open("disk") as image:
        uuid = image.uuid
    with asked.Asked(tracker) as ask:

        def tell(first: int, end: int, data: bytes, number: int = 0, granularity: int = FINE) -> None:
            said = {"number": number, "granularity": granularity, "first": first, "end": end}
            ask({"act": "bits", "namespace": uuid, **said}, data)

        for first, end, data in (
            (-64, 64, b""),
            (0, 0, b""),
            (64, 5002, b""),
            (1, 64, b""),
            (0, 65, b""),
            (0, 576, b""),
            (0, 64, b"1234567"),
            (0, 64, bytes(16)),
        ):
            with pytest.raises(dm.RangeError):
                tell(first, end, data)
        with pytest.raises(dm.BitmapError):
            tell(0, 64, b"", number=1, granularity=7)
        with pytest.raises(dm.BitmapError, match="not told"):
            ask({"act": "change", "namespace": uuid, "changes": [["put", "fine", FINE, True]]}, b"")
        tell(0, 64, b"")
        with pytest.raises(dm.BitmapError, match="cannot be those of one at 4096"):
            tell(0, 64, bytes(8), granularity=COARSE)
        tell(0, 64, b"")
        with pytest.raises(dm.BitmapError, match="were told"):
            ask({"act": "change", "namespace": uuid, "changes": [["merge", "fine", COARSE]]}, b"")
        with pytest.raises(dm.BitmapError, match="'fine' was not asked for"):
            ask({"act": "held part", "namespace": uuid, "name": "fine", "first": 0, "end": 64}, b"")
    assert now("fine") == some(1, FINE)


def test_bits_that_are_not_taken_are_refused(tracker: Tracker) -> None:
    """No change takes them for clean, whoever sends them where they do not belong, or not at all."""
    with dm.open("disk") as image:
        for change in ("put", "coarse", COARSE, True), ("merge", "fine", FINE):
            with pytest.raises(dm.BitmapError, match=f"the bits of '{change[1]}' were not told"):
                image.change_tracked([change])
        with asked.Asked(tracker) as ask:
            said = {"number": 0, "granularity": FINE, "first": 0, "end": 64}
            ask({"act": "bits", "namespace": image.uuid, **said}, b"")
            change = {"act": "change", "namespace": image.uuid, "changes": [["put", "fine", FINE, True]]}
            with pytest.raises(dm.UnsupportedError, match="'change' takes no bytes"):
                ask(change, bytes(8))
            with pytest.raises(dm.BitmapError, match="were not told"):
                ask(change, b"")
        with pytest.raises(dm.BitmapError, match="not told"):
            image.change_tracked([("clear", "coarse"), ("put", "new", COARSE, True)])
    assert (now("fine"), now("coarse")) == (some(1, FINE), some(2, COARSE))


@pytest.mark.parametrize("size", [SIZE - COARSE, SIZE + 1])
def test_bits_of_another_disk_change_nothing(tracker: Tracker, size: int) -> None:
    other = dm.Bitmap(size, FINE)
    changes = ("put", "apart", FINE, False, other), ("put", "new", FINE, True, other), ("merge", "fine", other)
    for change in changes:
        with pytest.raises(dm.BitmapError, match="the bitmap is for a disk of"):
            tracker.change([change])
    assert now("fine") == some(1, FINE)


def test_what_was_told_is_gone_with_its_conversation(tmp_path: Path) -> None:
    one = gathered.Gathered(str(tmp_path), SIZE, FINE)
    one.take(512, 1024, bytes(range(64)))
    one.take(0, 64, b"")
    bitmap = one.bitmap()
    assert bitmap.count == FINE * (64 + sum(value.bit_count() for value in range(64)))
    assert list(tmp_path.iterdir()) == []
    one.close()
    with pytest.raises(dm.StorageError, match="closed"):
        _ = bitmap.extents()


def test_without_room_for_what_is_told_nothing_changes(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with dm.open("disk") as image:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(dm.StorageError, match="temporary file: No space left"), image.transaction() as bitmaps:
                bitmaps["apart"] |= some(3, FINE)
        assert image["apart"].count == 0
        with image.transaction() as bitmaps:
            bitmaps["apart"] |= some(3, FINE)
        assert image["apart"] == some(3, FINE)
    with pytest.raises(dm.StorageError, match="temporary file: No such file"):
        gathered.Gathered("/nosuch", SIZE, FINE)
