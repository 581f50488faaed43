"""Bits in a store: what they cost, which bitmap they are of, and that a reader gets an answer while others write."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.child import in_child
from support.hostless import stored
from support.large import TIB, Disks

import dirtmap.engine as dm
from dirtmap.engine.host.kind import Address
from dirtmap.engine.model import bits
from dirtmap.engine.model.content import Whole
from dirtmap.engine.namespaces.compact import compact
from dirtmap.engine.namespaces.nodes import add_node
from dirtmap.engine.storefile import chunks
from dirtmap.engine.storefile.directory import load_saved, merge_bits, read_entries, replace_directory
from dirtmap.engine.storefile.entries import with_items
from dirtmap.engine.storefile.file import Snapshot, Store, create
from dirtmap.engine.system import file as fileio
from dirtmap.fmt import store
from dirtmap.fmt.store import parse_items


@pytest.fixture
def disks(tmp_path: Path) -> Disks:
    return Disks(tmp_path)


@pytest.fixture
def written() -> Iterator[list[int]]:
    """The lengths of all that is written."""
    lengths: list[int] = []

    class Counting(fileio.File):
        def write(self, offset: int, data: bytes | memoryview) -> None:
            lengths.append(memoryview(data).nbytes)
            super().write(offset, data)

    with fileio.using(Counting):
        yield lengths


def random_bits(size: int, granularity: int, share: float) -> dm.Bitmap:
    granules = -(-size // granularity)
    random = np.random.default_rng(granules)
    flags = random.random(granules, np.float32) < share
    return dm.Bitmap.from_packed(size, granularity, np.packbits(flags, bitorder="little").tobytes())


# What they cost.


def test_checkpoints_of_a_large_disk_are_small(disks: Disks, written: list[int]) -> None:
    disks.add("a", 15 * TIB)
    before = os.path.getsize(disks.path)
    with Store(disks.path) as target:
        image = stored(target, "a")
        with image.transaction() as bitmaps:
            for number in range(8):
                bitmaps[f"{number}"] = dm.Bitmap.from_extents(image.size, [number * TIB], [1], 65536)
        assert os.path.getsize(disks.path) - before < 1 << 20
        written.clear()
        with image.transaction() as bitmaps:
            bitmaps["3"].mark(12 * TIB, 1)
        assert sum(written) < 300 << 10
        assert image["3"].extents()[0].tolist() == [3 * TIB, 12 * TIB]


def test_one_more_bit_of_a_full_bitmap_writes_little(disks: Disks, written: list[int]) -> None:
    disks.add("a", TIB)
    with Store(disks.path) as target:
        image = stored(target, "a")
        bitmap = random_bits(TIB, 65536, 0.1)
        with image.transaction() as bitmaps:
            bitmaps["b"] = bitmap
        written.clear()
        at = int(np.flatnonzero(np.unpackbits(bitmap.packed(), bitorder="little") == 0)[1000]) * 65536
        with image.transaction() as bitmaps:
            bitmaps["b"].mark(at, 1)
        assert sum(written) < 100 << 10
        bitmap.mark(at, 1)
        assert image["b"] == bitmap
        written.clear()
        with image.transaction() as bitmaps:
            bitmaps["b"].mark(at, 1)
        assert not written, "nothing has changed"
    assert not [finding for finding in dm.check(disks.path).findings if finding.severity != "note"]


def test_the_nodes_of_a_large_bitmap_are_read_together(disks: Disks) -> None:
    """There are 30 of them, and the root."""
    disks.add("a", 15 * TIB)
    words = np.ones(15 * TIB // 65536 // 64, "<u8")
    with Store(disks.path) as target, stored(target, "a").transaction() as bitmaps:
        bitmaps["b"] = dm.Bitmap.from_packed(15 * TIB, 65536, words.tobytes())
    reads = 0

    class Counting(fileio.File):
        def read(self, offset: int, length: int) -> bytes:
            nonlocal reads
            reads += offset >= store.RESERVED
            return super().read(offset, length)

    with fileio.using(Counting), Store(disks.path) as target:
        assert np.array_equal(stored(target, "a")["b"].words, words)
    assert reads < 20


def test_marks_of_a_tracker_are_merged_where_they_are(disks: Disks, written: list[int]) -> None:
    disks.add("a", TIB)
    expected = random_bits(TIB, 65536, 0.1)
    more = dm.Bitmap.from_extents(TIB, [0, TIB // 2, TIB - 1], [1, 1, 1], 65536)
    with Store(disks.path) as target:
        image = stored(target, "a")
        with image.transaction() as bitmaps:
            bitmaps["b"] = expected
        reads = 0
        for again in (False, True):
            written.clear()
            with target.change() as change:
                record = change.table.get(b"a")
                assert record is not None
                (entry,) = read_entries(change.snapshot, record)
                plain = change.snapshot.file.read_into

                def counted(offset: int, buffer: memoryview, plain: Callable[..., None] = plain) -> None:
                    nonlocal reads
                    reads += len(buffer)
                    plain(offset, buffer)

                change.snapshot.file.read_into = counted  # type: ignore[method-assign]
                new = merge_bits(change, record, entry, Whole(TIB // 65536, more.words))
                assert (new == entry) == again
                if not again:
                    place = replace_directory(change, record, [entry], [new])
                    change.table.put(replace(record, directory=place, generation=change.generation))
            assert sum(written) < (0 if again else 100 << 10) + 1
        assert reads < 100 << 10
        assert image["b"] == expected | more
    assert not [finding for finding in dm.check(disks.path).findings if finding.severity != "note"]


@pytest.mark.parametrize("dirty", ["some", "all"])
def test_a_bitmap_of_512_mib_takes_little_memory(disks: Disks, dirty: str) -> None:
    """Of which 100 granules anywhere are dirty, or all: opened, listed, mapped, changed, checked."""
    size = 16 * TIB
    disks.add("a", size)
    starts = np.sort(np.random.default_rng(1).choice(size // 4096, 100, replace=False)) * 4096

    def work() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with Store(disks.path) as target:
            image = stored(target, "a")
            with image.transaction() as bitmaps:
                bitmaps["b"] = dm.Bitmap(size, 4096).recovered() if dirty == "all" else dm.Bitmap(size, 4096)
            if dirty == "some":
                with target.change() as change:  # as a tracker saves
                    record = change.table.get(b"a")
                    assert record is not None
                    (entry,) = read_entries(change.snapshot, record)
                    words = chunks._zeros(size // 4096, sparse=True)
                    bits.scatter(words, starts // 4096, starts // 4096)
                    new = merge_bits(change, record, entry, Whole(size // 4096, words))
                    place = replace_directory(change, record, [entry], [new])
                    change.table.put(replace(record, directory=place, generation=change.generation))
                del words
            count = size if dirty == "all" else 100 * 4096
            assert [info.count for info in image.info().bitmaps] == [count]
            offsets, lengths = image["b"].extents()
            assert (len(offsets), int(lengths.sum())) == (1 if dirty == "all" else 100, count)
            assert not dm.check(disks.path).corruptions
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

    used = in_child(work)
    print(f"{used >> 10} MiB more")
    assert used < 128 << 10


# Which bitmap they are of.


def identities(image: dm.Namespace) -> dict[str, tuple[str | None, int | None]]:
    return {info.name: (info.uuid, info.generation) for info in image.info().bitmaps}


def test_a_bitmap_keeps_its_uuid_until_it_is_removed(disks: Disks) -> None:
    disks.add("a", 1 << 20)
    with Store(disks.path) as target:
        image = stored(target, "a")
        with image.transaction() as bitmaps:
            bitmaps["monday"] = dm.Bitmap(1 << 20)
            bitmaps["other"] = dm.Bitmap.from_extents(1 << 20, [0], [1])
        first = identities(image)
        assert len({own for own, _ in first.values()}) == 2

        def changed(act: Callable[[dm.Transaction], object]) -> dict[str, tuple[str | None, int | None]]:
            with image.transaction() as bitmaps:
                act(bitmaps)
            return identities(image)

        def generation() -> int:
            return target.read(lambda snapshot: snapshot.header.generation)

        second = changed(lambda bitmaps: bitmaps["monday"].mark(0, 1))
        assert second == {"monday": (first["monday"][0], generation()), "other": first["other"]}
        third = changed(lambda bitmaps: bitmaps.rename("monday", "tuesday"))
        assert third == {"tuesday": second["monday"], "other": first["other"]}

        def rename_and_mark(bitmaps: dm.Transaction) -> None:
            bitmaps.rename("tuesday", "monday")
            bitmaps["monday"].mark(1 << 19, 1)

        fourth = changed(rename_and_mark)
        assert fourth["monday"] == (first["monday"][0], generation())

        def add_again(bitmaps: dm.Transaction) -> None:
            kept = bitmaps["monday"].copy()
            del bitmaps["monday"]
            bitmaps["monday"] = kept

        fifth = changed(add_again)
        assert fifth["monday"][0] not in {own for own, _ in fourth.values()}
        assert fifth["other"] == first["other"]

        def copy(bitmaps: dm.Transaction) -> None:
            bitmaps["copy"] = bitmaps["monday"]

        sixth = changed(copy)
        assert sixth["copy"][0] not in {own for own, _ in fifth.values()}
        assert {name: sixth[name] for name in fifth} == fifth
        seventh = changed(lambda bitmaps: bitmaps.__setitem__("other", bitmaps["other"] | bitmaps["monday"]))
        assert seventh["other"] == (first["other"][0], generation())
        eighth = changed(lambda bitmaps: bitmaps.__setitem__("other", bitmaps["other"].replace(recording=False)))
        assert eighth["other"] == (first["other"][0], generation())
    compact(disks.path)
    with Store(disks.path) as target:
        assert identities(stored(target, "a")) == eighth
    assert not [finding for finding in dm.check(disks.path).findings if finding.severity != "note"]


@pytest.mark.parametrize("resized", [False, True])
def test_a_bitmap_keeps_its_uuid_where_it_takes_over_the_bits_of_another(tmp_path: Path, resized: bool) -> None:
    path, disk = str(tmp_path / "store"), tmp_path / "disk"
    create(path)
    disk.write_bytes(bytes(1 << 20))
    with Store(path) as target:
        add_node(target, "a", str(disk))
        image = stored(target, "a")
        with image.transaction() as bitmaps:
            for number, name in enumerate(("first", "second", "third")):
                bitmaps[name] = dm.Bitmap.from_extents(1 << 20, [number << 16], [1])
            bitmaps["dirty"] = dm.Bitmap.from_extents(1 << 20, [0], [1 << 20])
        own = {name: known for name, (known, _) in identities(image).items()}
        if resized:
            os.truncate(disk, 2 << 20)
        with image.transaction() as bitmaps:
            bitmaps["first"], bitmaps["second"] = bitmaps["second"].copy(), bitmaps["first"].copy()
            bitmaps["third"] = bitmaps["dirty"]
        assert {name: known for name, (known, _) in identities(image).items()} == own
        with image.transaction() as bitmaps:
            bitmaps["first"] = bitmaps["second"]
            bitmaps["new"] = bitmaps["dirty"]
            del bitmaps["second"], bitmaps["dirty"]
        left = {name: known for name, (known, _) in identities(image).items()}
        assert left.pop("new") not in own.values()
        assert left == {name: own[name] for name in ("first", "third")}
        if not resized:
            assert image["first"] == dm.Bitmap.from_extents(1 << 20, [0], [1])
    assert not [finding for finding in dm.check(path).findings if finding.severity != "note"]


def test_bits_that_were_read_are_known_under_a_new_name(tmp_path: Path, written: list[int]) -> None:
    """A store that has little but one bitmap: read, and changed under another name, it is still the same tree."""
    path, disk = str(tmp_path / "store"), tmp_path / "disk"
    create(path)
    size = 64 * 32768 * 512
    disk.touch()
    os.truncate(disk, size)
    with Store(path) as target:
        add_node(target, "a", str(disk))
        image = stored(target, "a")
        with image.transaction() as bitmaps:
            bitmaps["monday"] = dm.Bitmap.from_extents(size, range(0, size, size // 64), [1] * 64, 512)
        written.clear()
        with image.transaction() as bitmaps:
            bitmaps["monday"].mark(size // 2 + 512, 1)
            bitmaps.rename("monday", "tuesday")
        assert sum(written) < 20 * 4096 + 3 * 4096
        assert image["tuesday"].count == 65 * 512
    assert not [finding for finding in dm.check(path).findings if finding.severity != "note"]


def test_bits_that_move_to_another_name_are_not_shared(disks: Disks) -> None:
    """One takes over the clusters of the other, which gets new content: each has its own then."""
    disks.add("a", 1 << 20)
    one, other = (dm.Bitmap.from_extents(1 << 20, [start], [1], 512) for start in (0, 1 << 19))
    with Store(disks.path) as target:
        image = stored(target, "a")
        with image.transaction() as bitmaps:
            bitmaps["first"], bitmaps["second"] = dm.Bitmap(1 << 20), one
        with image.transaction() as bitmaps:
            bitmaps["first"] = bitmaps["second"]
            bitmaps["second"] = other
        assert (image["first"], image["second"]) == (one, other)
        with image.transaction() as bitmaps:
            bitmaps["second"] = bitmaps["first"]
        assert (image["first"], image["second"]) == (one, one)
    assert not [finding for finding in dm.check(disks.path).findings if finding.severity != "note"]


def with_item(path: str, kind: int, data: bytes) -> None:
    with Store(path) as target, target.change() as change:
        record = change.table.get(b"a")
        assert record is not None
        entries = read_entries(change.snapshot, record)
        new = [with_items(entry, {kind: data}) for entry in entries]
        place = replace_directory(change, record, entries, new)
        change.table.put(replace(record, directory=place, generation=change.generation))


def test_items_that_are_not_known_are_kept_and_critical_ones_refused(disks: Disks) -> None:
    disks.add("a", 1 << 20)
    with Store(disks.path) as target:
        image = stored(target, "a")
        with image.transaction() as bitmaps:
            bitmaps["monday"] = dm.Bitmap.from_extents(1 << 20, [0], [1])
        with_item(disks.path, 0x58595A57, b"what for?")
        with image.transaction() as bitmaps:
            bitmaps["monday"].mark(1 << 19, 1)
            bitmaps.rename("monday", "tuesday")
        record = target.record(b"a")
        assert record is not None
        (entry,) = target.read(lambda snapshot: read_entries(snapshot, record))
        assert (0x58595A57, b"what for?") in parse_items(entry.extra_data)
        with_item(disks.path, store.CRITICAL_ITEM | 0x58595A57, b"")
        before = Path(disks.path).read_bytes()
        for act in (
            lambda: image["tuesday"],
            lambda: image.transaction().__enter__(),
            image.recover,
            lambda: dm.check(disks.path, repair="all"),
        ):
            with pytest.raises(dm.Error, match=r"device 'a': bitmap 'tuesday'.extra_data: an item of type 0xd8595a57"):
                act()
        assert any("0xd8595a57" in error for error in image.info().errors)
        assert dm.check(disks.path).corruptions == 1
        assert Path(disks.path).read_bytes() == before


# A reader gets an answer.


def busy(
    path: str, name: str, ended: threading.Event, act: Callable[[dm.Transaction, int], object]
) -> threading.Thread:
    """Commits as fast as it can."""

    def work() -> None:
        number = 0
        with Store(path) as target:
            while not ended.is_set():
                number += 1
                with stored(target, name).transaction() as bitmaps:
                    act(bitmaps, number)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.parametrize("where", ["another namespace", "the same namespace", "the same bitmap"])
def test_a_reader_gets_an_answer_while_others_commit(
    disks: Disks, where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = 2 * TIB
    for name in ("a", "b"):
        disks.add(name, size)
    monkeypatch.setattr(fileio.File, "sync", lambda self: time.sleep(0.002))  # as fast as a quick disk, on any
    with Store(disks.path) as target:
        image = stored(target, "a")
        expected = random_bits(size, 8192, 0.1)
        with image.transaction() as bitmaps:
            bitmaps["large"] = expected
            bitmaps["small"] = dm.Bitmap(size)
        with stored(target, "b").transaction() as bitmaps:
            bitmaps["small"] = dm.Bitmap(size)
        bitmap = "large" if where == "the same bitmap" else "small"
        ended = threading.Event()
        thread = busy(
            disks.path,
            "b" if where == "another namespace" else "a",
            ended,
            lambda bitmaps, number: bitmaps[bitmap].mark((number * 7919 * 65536) % size, 1),
        )
        try:
            first = target.read(lambda snapshot: snapshot.header.generation)
            began, taken = time.monotonic(), []
            while len(taken) < 5:
                start = time.monotonic()
                found = image["large"]
                taken.append(time.monotonic() - start)
                assert found.damage is None
                assert not (expected.words & ~found.words).any()
                assert found == expected or where == "the same bitmap"
            rate = (target.read(lambda snapshot: snapshot.header.generation) - first) / (time.monotonic() - began)
        finally:
            ended.set()
            thread.join()
    with capsys.disabled():
        print(f"\n{where}: {rate:.0f} commits a second; answers after {', '.join(f'{t:.2f}' for t in taken)} s")


def test_what_was_written_over_is_read_again_and_the_rest_is_not(disks: Disks) -> None:
    """A reader that is held up for some commits, which write over one of the chunks that it is about to read."""
    size = 1 << 40
    disks.add("a", size)
    expected = random_bits(size, 65536, 0.1)
    with Store(disks.path) as target:
        image = stored(target, "a")
        with image.transaction() as bitmaps:
            bitmaps["b"] = expected

        def commit(number: int) -> None:
            with Store(disks.path) as other, stored(other, "a").transaction() as bitmaps:
                bitmaps["b"].mark(size - 1 - (number << 16), 1)
                bitmaps["more"] = dm.Bitmap.from_extents(size, [number << 30], [1])
            expected.mark(size - 1 - (number << 16), 1)

        reads: list[int] = []

        def read(snapshot: Snapshot) -> dm.Bitmap:
            record = snapshot.record(b"a")
            assert record is not None
            entry = next(entry for entry in read_entries(snapshot, record) if entry.name == b"b")
            plain, count = snapshot.file.read_into, 0

            def slow(offset: int, buffer: memoryview) -> None:
                nonlocal count
                count += len(buffer)
                if not reads and count == len(buffer):
                    for number in range(6):
                        commit(number)
                plain(offset, buffer)

            snapshot.file.read_into = slow  # type: ignore[method-assign]
            try:
                words, damage = load_saved(snapshot, record, entry, False)
            finally:
                del snapshot.file.read_into
                reads.append(count)
            found = dm.Bitmap.from_words(size, 65536, words, True)
            found.damage = damage
            return found

        found = target.read(read)
        assert found == expected
        assert found.damage is None
        assert len(reads) == 2
        assert reads[1] < 64 << 10 < reads[0]


@pytest.mark.parametrize("others", [1, 2])
def test_what_was_written_over_is_never_taken_for_damage(disks: Disks, others: int) -> None:
    """Not even for a moment, to be logged: two commits on, a wrong checksum says nothing."""
    size = 1 << 30
    disks.add("a", size)
    with Store(disks.path) as target:
        image = stored(target, "a")
        with image.transaction() as bitmaps:
            bitmaps["b"] = dm.Bitmap.from_extents(size, [0], [1])
        calls = 0

        def read(snapshot: Snapshot) -> str | None:
            nonlocal calls
            calls += 1
            record = snapshot.record(b"a")
            assert record is not None
            (entry,) = read_entries(snapshot, record)
            if calls == 1:
                for number in range(others):
                    with Store(disks.path) as other, stored(other, "a").transaction() as bitmaps:
                        bitmaps["b"].mark((number + 1) << 20, 1)
                with open(disks.path, "r+b") as file:  # as what comes next may
                    file.seek(entry.table_offset)
                    file.write(b"\x77" * 4096)
            return load_saved(snapshot, record, entry, False)[1]

        told = target.read(read)
        assert (calls, told is None) == ((1, False) if others == 1 else (2, True))


def test_damage_is_told_at_once_though_others_commit(disks: Disks) -> None:
    disks.add("a", 1 << 20)
    disks.add("b", 1 << 20)
    with Store(disks.path) as target:
        image = stored(target, "a")
        for name in ("a", "b"):
            with stored(target, name).transaction() as bitmaps:
                bitmaps["b"] = dm.Bitmap.from_extents(1 << 20, [0], [1])
        record = target.record(b"a")
        assert record is not None
        (entry,) = target.read(lambda snapshot: read_entries(snapshot, record))
        with open(disks.path, "r+b") as file:
            file.seek(entry.table_offset)
            file.write(b"\xff")
        ended = threading.Event()
        thread = busy(disks.path, "b", ended, lambda bitmaps, number: bitmaps["b"].mark((number % 16) << 16, 1))
        try:
            assert image["b"].damage
            assert image["b"].count == 1 << 20
        finally:
            ended.set()
            thread.join()
    with dm.open(Address(disks.path, "a")) as image:
        assert image["b"].damage
