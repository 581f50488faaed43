"""What is on disk of an intent log: what its writer can leave is believed, what it cannot leave is damage."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
import shutil
import signal
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from support.sessions import UUID, a_log, a_session, regions_of
from support.tracking import GRANULE, make_node, model_of

import dirtmap.engine as dm
from dirtmap.engine.session import livefile
from dirtmap.engine.session.intent import IntentLog, read_log
from dirtmap.engine.system import file as fileio
from dirtmap.engine.system.file import File
from dirtmap.engine.tracking.arena import Arena
from dirtmap.engine.tracking.kernel import Kernel
from dirtmap.fmt import live
from dirtmap.fmt.errors import StorageError
from dirtmap.fmt.identity import FilePlace
from dirtmap.fmt.structures.live import TALLY, build_log_record, record_seed

SIZE = 256 << 20  # in regions of 1 MiB: four sectors of records
REGIONS = SIZE >> 20
SECTOR = 512
RECORD = live.LOG_RECORD_SIZE
DAMAGED = None

# Logs 4 and 5 count. Where they have nothing lies what older logs have left.
LOGS = [
    [list(range(200))],
    [[9, 8, 7], list(range(100, 180))],
    [[5], [6], list(range(20, 110))],
    [[255]],
    [[3], [1, 2], [77], list(range(130, 170))],
    [[40, 41], [42], [0]],
]
COUNTING = {0, 1, 2, 3, 40, 41, 42, 77, *range(130, 170)}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    a_log(path, SIZE, LOGS)
    assert regions_of(path, SIZE, 4) == COUNTING
    return path


THERE = {4: sorted({*range(200)}), 5: sorted({0, 7, 8, 9, 40, 41, 42, 255, *range(100, 180)})}  # places with a record
OF_LOG_4 = sorted(COUNTING - {0, 40, 41, 42})


def area(number: int) -> int:
    return live.record_offset(0, number)


def with_bytes(log: Path, *changes: tuple[int, bytes]) -> set[int] | None:
    """What the log says with those bytes, (offset, bytes), in it; then it is as before."""
    before = log.read_bytes()
    data = bytearray(before)
    for offset, new in changes:
        data[offset : offset + len(new)] = new
    log.write_bytes(data)
    try:
        return regions_of(log, SIZE, 4)
    finally:
        log.write_bytes(before)


def flipped(log: Path, offset: int, bit: int) -> tuple[int, bytes]:
    """The record at that offset, with a bit flipped."""
    data = bytearray(log.read_bytes()[offset : offset + RECORD])
    data[bit // 8] ^= 1 << bit % 8
    return offset, bytes(data)


def test_a_flipped_bit_in_any_record_makes_the_log_worthless(log: Path) -> None:
    chance = random.Random(1)
    for number, places in THERE.items():  # those that older logs have left, too: it is damage all the same
        for place in places:
            for bit in chance.sample(range(64), 3):
                assert with_bytes(log, flipped(log, area(number) + place * RECORD, bit)) is DAMAGED, (number, place)
    for bit in range(64):
        assert with_bytes(log, flipped(log, area(4) + RECORD, bit)) is DAMAGED, bit


def test_flipped_bits_in_any_two_records_do_so_too(log: Path) -> None:
    chance = random.Random(2)
    for one, other in itertools.combinations(OF_LOG_4, 2):
        bits = chance.randrange(64), chance.randrange(64)
        changes = [flipped(log, area(4) + place * RECORD, bit) for place, bit in zip((one, other), bits, strict=True)]
        assert with_bytes(log, *changes) is DAMAGED, (one, other)


def test_a_record_that_is_missing_old_or_in_anothers_place_makes_the_log_worthless(log: Path) -> None:
    data, start = log.read_bytes(), area(4)
    for place in OF_LOG_4:
        others = [data[start + other * RECORD :][:RECORD] for other in (place + 1, (place + 30) % 200)]
        old = [build_log_record(record_seed(UUID, number), place) for number in (0, 2)]
        yet_to_come = build_log_record(record_seed(UUID, 6), place)
        of_the_other_parity = build_log_record(record_seed(UUID, 5), place)
        foreign = build_log_record(record_seed(b"x" * 16, 4), place)
        outside = build_log_record(record_seed(UUID, 4), REGIONS)
        wrong = [bytes(RECORD), *old, yet_to_come, of_the_other_parity, foreign, outside, b"\xff" * RECORD]
        for new in [*wrong, *others]:
            assert with_bytes(log, (start + place * RECORD, new)) is DAMAGED, (place, new)


@pytest.mark.parametrize("fill", [b"\0", b"\xff", None], ids=["zeros", "ones", "the sector before"])
def test_no_sector_of_the_log_hides_a_region(log: Path, fill: bytes | None) -> None:
    size, data = log.stat().st_size, log.read_bytes()
    verdicts = {}
    for offset in range(0, size, SECTOR):
        new = data[offset - SECTOR : offset] if fill is None else fill * SECTOR
        if new and data[offset : offset + SECTOR] != new:
            found = with_bytes(log, (offset, new))
            assert found in (DAMAGED, COUNTING), hex(offset)
            verdicts[offset] = found
    assert verdicts[area(4)] is verdicts[area(5)] is DAMAGED


def test_no_two_sectors_of_records_hide_a_region(log: Path) -> None:
    records = [area(number) + sector * SECTOR for number in (4, 5) for sector in range(4)]
    for pair in itertools.combinations(records, 2):
        assert with_bytes(log, *((offset, bytes(SECTOR)) for offset in pair)) in (DAMAGED, COUNTING), pair


@pytest.mark.parametrize("records", [1, 3, 64, 65, 200])
def test_a_log_whose_last_records_are_lost_is_noticed_by_its_tally(tmp_path: Path, records: int) -> None:
    path = tmp_path / "log"
    a_log(path, SIZE, [[[region] for region in range(records)]])
    data = bytearray(path.read_bytes())
    last = area(0) + (records - 1) * RECORD
    data[last // SECTOR * SECTOR :][:SECTOR] = bytes(SECTOR)
    path.write_bytes(
        bytes(data[: last // SECTOR * SECTOR]) + bytes(SECTOR) + bytes(data[last // SECTOR * SECTOR + SECTOR :])
    )
    assert regions_of(path, SIZE) is DAMAGED
    path.write_bytes(bytes(data[:last]) + bytes(RECORD) + bytes(data[last + RECORD :]))
    assert regions_of(path, SIZE) is DAMAGED


def test_a_log_that_has_lost_its_last_records_and_their_tally_looks_like_one_without_them(tmp_path: Path) -> None:
    """The one loss that is not noticed, as SPEC.md says: two places that were synced are as they were before."""
    path = tmp_path / "log"
    a_log(path, SIZE, [[[1], [2], [3]]])
    data = path.read_bytes().replace(build_log_record(record_seed(UUID, 0), 3), bytes(RECORD))
    tally = live.TALLIES[0]
    path.write_bytes(data[:tally] + bytes(TALLY.size) + data[tally + TALLY.size :])
    assert regions_of(path, SIZE) == {1, 2}


def test_a_tally_that_is_damaged_makes_the_log_worthless(log: Path) -> None:
    for at in live.TALLIES:
        for bit in range(8 * TALLY.size):
            byte = log.read_bytes()[at + bit // 8] ^ 1 << bit % 8
            assert with_bytes(log, (at + bit // 8, bytes([byte]))) is DAMAGED, bit


def test_a_store_that_names_an_older_log_than_there_can_be_gets_nothing(log: Path) -> None:
    assert regions_of(log, SIZE, 2) is DAMAGED  # log 4 has taken the place of log 2


def test_a_record_whose_checksum_is_0_counts(tmp_path: Path) -> None:
    uuid, number, region = bytes.fromhex("1234567890abcdef1234567890abcdef"), 982985, 1831
    assert build_log_record(record_seed(uuid, number), region)[4:] == bytes(4)
    path, size = tmp_path / "log", 2048 << 20
    a_log(path, size, [[[7, region]]], uuid, first=number)
    assert regions_of(path, size, number, uuid) == {7, region}


@pytest.mark.parametrize("number", [2**32 - 2, 2**32 - 1, 2**32, 2**40 + 5])
def test_a_log_of_any_number_is_read(tmp_path: Path, number: int) -> None:
    path = tmp_path / "log"
    a_log(path, SIZE, [[[5]], [[6]]], first=number)
    assert regions_of(path, SIZE, number) == {5, 6}


@pytest.mark.parametrize("number", [live.MAX_LOG + 1, 2**63, 2**64 - 1])
def test_a_log_of_a_number_that_cannot_be_is_not_read(log: Path, number: int) -> None:
    assert read_log(a_session(log, log=number), SIZE) is None


# What its writer can leave


class Interrupted(BaseException):
    """As Ctrl-C."""


def interrupt() -> None:
    raise Interrupted


def fail() -> None:
    raise StorageError("log", "write: injected")


Event = tuple[int, bytes] | None  # a write, or a sync


class Disk:
    """What is done to a log: its writes and syncs; ``act`` happens once, before the next write or behind it."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.act: Callable[[], object] | None = None
        self.early = False

    def files(self) -> type[File]:
        disk = self

        class Recorded(File):
            def write(self, offset: int, data: bytes | memoryview) -> None:
                act, disk.act = disk.act, None
                if act and disk.early:
                    act()
                super().write(offset, data)
                disk.events.append((offset, bytes(data)))
                if act and not disk.early:
                    act()

            def sync(self) -> None:
                disk.events.append(None)

        return Recorded


class Writer:
    """A session whose regions are logged: what was asked for, and what had returned when."""

    def __init__(self, folder: Path, disk: Disk) -> None:
        self.disk, log, files = disk, folder / "log", folder / "live"
        shutil.rmtree(files, ignore_errors=True)
        files.mkdir()
        self.log = IntentLog(str(log), UUID, live.INTENT_REGION, 20, SIZE)
        place = FilePlace(bytes(16), 0, 0)
        path = os.fsencode(log)
        livefile.make(str(files), UUID, place, intent=live.INTENT_REGION, region_bits=20, size=SIZE, log_path=path)
        self.kernel = Kernel("test", str(files), self.log)
        self.kernel.keep()
        Arena(self.kernel, UUID).take(0, SIZE, 16)
        self.begun = len(disk.events)
        self.asked: set[int] = set()
        self.durable: list[tuple[int, set[int]]] = []  # behind how many events

    def append(self, regions: list[int]) -> None:
        number = self.kernel.log
        self.asked.update(regions)
        self.kernel.mark_many([region << 20 for region in regions], [1] * len(regions))
        if number == self.kernel.log:  # else they are in the next log
            self.durable.append((len(self.disk.events), set(regions)))

    def close(self) -> None:
        self.kernel.leave(at_once=True)
        self.log.close(remove=False)


def test_whatever_a_crash_leaves_is_believed_and_bounded(tmp_path: Path) -> None:
    """Appends of all sizes that are interrupted, fail, or have others within; then a crash at any event."""
    chance, path = random.Random(3), tmp_path / "log"

    def some(*counts: int) -> list[int]:
        return chance.sample(range(REGIONS), chance.choice(counts))

    for _ in range(40):
        disk = Disk()
        with fileio.using(disk.files()):
            writer = Writer(tmp_path, disk)
            for _ in range(chance.randrange(1, 14)):
                within = functools.partial(writer.append, some(1, 3, 90))
                disk.act, disk.early = chance.choice((None, None, interrupt, fail, within)), chance.random() < 0.5
                if chance.random() < 0.1 and writer.kernel.log == 0:
                    disk.act = writer.kernel.rotate
                with contextlib.suppress(Interrupted, StorageError):
                    writer.append(some(1, 1, 1, 2, 5, 70, 150))
                disk.act = None
            writer.close()
        for _ in range(25):
            at = chance.randrange(writer.begun, len(disk.events) + 1)
            path.write_bytes(crashed(disk.events[:at], chance))
            found = regions_of(path, SIZE)
            least = [regions for event, regions in writer.durable if event <= at]
            assert found is not DAMAGED
            assert set().union(*least) <= found <= writer.asked


def crashed(events: list[Event], chance: random.Random) -> bytes:
    """What is on disk: all that was synced, and of later writes any sectors."""
    disk = bytearray(live.log_bytes(REGIONS))
    synced = max((at for at, event in enumerate(events) if event is None), default=-1)
    how_many = chance.choice((0.0, 0.5, 1.0))
    for at, event in enumerate(events):
        if event is None:
            continue
        offset, data = event
        cuts = [offset, *range((offset // SECTOR + 1) * SECTOR, offset + len(data), SECTOR), offset + len(data)]
        for first, end in itertools.pairwise(cuts):
            if at < synced or chance.random() < how_many:
                disk[first:end] = data[first - offset : end - offset]
    return bytes(disk)


def test_a_region_that_could_not_be_written_is_written_when_it_is_marked_again(tmp_path: Path) -> None:
    disk = Disk()
    with fileio.using(disk.files()):
        writer = Writer(tmp_path, disk)
        for act in (fail, interrupt):
            disk.act, disk.early = act, True
            with pytest.raises((Interrupted, StorageError)):
                writer.append([3, 4])
            assert writer.kernel.logged == 0
        writer.append([9])
        writer.append([3])
        writer.close()
    assert regions_of(tmp_path / "log", SIZE) == {3, 9}


def test_a_log_of_a_million_regions_is_read_in_little_time_and_memory(tmp_path: Path) -> None:
    path, regions = tmp_path / "log", live.MAX_REGIONS
    size = regions << 20
    a_log(path, size, [])
    seed = record_seed(UUID, 0)
    with path.open("r+b") as file:
        for first in range(0, regions, live.PER_PAGE):
            file.seek(live.record_offset(first, 0))
            file.write(b"".join(build_log_record(seed, first + at) for at in range(live.PER_PAGE)))
        file.truncate(1 << 40)  # grown since
    session = a_session(path)
    began = time.monotonic()
    found = read_log(session, size)
    assert time.monotonic() - began < 2
    assert found is not None
    assert found.regions == frozenset(range(regions))
    del found
    tracemalloc.start()
    try:
        read_log(session, size)
        assert tracemalloc.get_traced_memory()[1] < 256 << 20
    finally:
        tracemalloc.stop()


# All the way through


def dead_without_live_files(folder: Path) -> Path:
    """A tracker that has marked and died, its live files gone; returns the path of its log."""
    make_node(folder, SIZE)
    pid = os.fork()
    if pid == 0:
        try:
            tracker = dm.open("node:drive0").track(save_interval=0, region_size=1 << 20)
            for region in (3, 1, 9, 200):
                tracker.mark(region << 20, 1)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    with dm.open("node:drive0") as image:
        tracking = image.tracking()
        shutil.rmtree(tracking.live)
        return Path(tracking.log)


def test_a_flipped_bit_in_the_log_makes_all_dirty(tmp_path: Path) -> None:
    log = dead_without_live_files(tmp_path)
    whole = log.read_bytes()
    with dm.open("node:drive0") as image:
        assert image.tracking().how.startswith("logged regions")
        assert model_of(image["b0"]).sum() == 4 * (1 << 20) // GRANULE
        for place in (1, 3, 9, 200):
            data = bytearray(whole)
            data[area(0) + place * RECORD + 3] ^= 1
            log.write_bytes(data)
            assert image.tracking().how.startswith("all dirty")
            assert model_of(image["b0"]).all()
        assert [item.how.partition(":")[0] for item in image.recover()] == ["all dirty"]
        assert model_of(image["b0"]).all()
