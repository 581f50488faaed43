"""What a tracker does, recorded, and what a power loss at any moment of it can leave on disk.

Every write and sync is an event, to the store and to the log, and beside them each mark and cut as it returns. A crash
may come between any two events: each file then has what was synced, and of its later writes any sectors.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dirtmap.engine.system.file import File
from dirtmap.engine.tracking.tracker import Tracker
from dirtmap.fmt.errors import StorageError
from support.tracking import GRANULE, Model, mark

SIZE = 64 << 20
REGION = 4 << 20
SECTOR = 512


class Written(NamedTuple):
    """A write to a file, or, without data, a sync of it."""

    path: str
    offset: int = 0
    data: bytes | None = None


class Marked(NamedTuple):
    """A mark that was asked for, or has returned."""

    granules: tuple[int, ...]
    returned: bool


class Cut(NamedTuple):
    """A checkpoint that has returned."""

    name: str


class Saved(NamedTuple):
    """A save that has returned."""


@dataclass
class Recording:
    """What happened, in order; and what the files held before."""

    events: list[object] = field(default_factory=list)
    originals: dict[str, bytes] = field(default_factory=dict)

    def files(self) -> type[File]:
        recording = self

        class Recorder(File):
            def __init__(self, path: str, **options: bool) -> None:
                existed = os.path.exists(path)
                super().__init__(path, **options)
                if path not in recording.originals:
                    recording.originals[path] = Path(path).read_bytes() if existed else b""

            def write(self, offset: int, data: bytes | memoryview) -> None:
                super().write(offset, data)
                recording.events.append(Written(self.path, offset, bytes(data)))

            def sync(self) -> None:
                super().sync()
                recording.events.append(Written(self.path))

        return Recorder

    def states(self, rng: random.Random, count: int) -> Iterator[tuple[int, dict[str, bytearray]]]:
        """So many crashes: how many events had happened, and what is on disk of the files that were written to."""
        written = {event.path for event in self.events if isinstance(event, Written)}
        for _ in range(count):
            at = rng.randrange(len(self.events) + 1)
            disks = {path: bytearray(data) for path, data in self.originals.items() if path in written}
            pending: dict[str, list[Written]] = {path: [] for path in disks}
            for event in self.events[:at]:
                if isinstance(event, Written):
                    if event.data is None:
                        for write in pending[event.path]:
                            land(disks[event.path], write.offset, write.data or b"")
                        pending[event.path] = []
                    else:
                        pending[event.path].append(event)
            how_many = rng.choice((0.0, 0.2, 0.5, 0.9, 1.0))
            for path, writes in pending.items():
                for write in writes:
                    data = write.data or b""
                    for start in range(0, len(data), SECTOR):
                        if rng.random() < how_many:
                            land(disks[path], write.offset + start, data[start : start + SECTOR])
            yield at, disks


def land(disk: bytearray, offset: int, data: bytes) -> None:
    if len(disk) < offset:
        disk.extend(bytes(offset - len(disk)))
    disk[offset : offset + len(data)] = data


def use(
    recording: Recording, tracker: Tracker, rng: random.Random, acts: int, namespaces: Sequence[str | None] = (None,)
) -> None:
    """Marks, cuts and saves at random; checkpoints of these namespaces in turn, the second one first."""
    cuts = 0
    for _ in range(acts):
        way = rng.random()
        if way < 0.75:
            offset, length = rng.randrange(SIZE - (1 << 18)), rng.choice((512, 4096, 1 << 18))
            granules = tuple(range(offset // GRANULE, (offset + length - 1) // GRANULE + 1))
            recording.events.append(Marked(granules, False))
            if way < 0.3:
                tracker.mark(offset, length)
            elif way < 0.6:
                tracker.end(tracker.begin(offset, length))
            else:
                tracker.mark_many(np.array([offset] * 200), np.array([length] * 200))
            recording.events.append(Marked(granules, True))
        elif way < 0.88:
            cuts += 1
            tracker.checkpoint(f"c{cuts}", namespace=namespaces[cuts % len(namespaces)])
            recording.events.append(Cut(f"c{cuts}"))
        elif way < 0.95:
            tracker.save()
            recording.events.append(Saved())
        else:
            tracker.clear("b1")
            recording.events.append("b1 cleared")


def expected(events: list[object]) -> tuple[Model, Model, dict[str, Model]]:
    """What had returned, what may be there at most, and what each checkpoint has at least, with those after it."""
    least, most = np.zeros(SIZE // GRANULE, np.uint8), np.zeros(SIZE // GRANULE, np.uint8)
    since: dict[str, Model] = {}
    regions: set[int] = set()
    for event in events:
        if isinstance(event, Marked):
            most[list(event.granules)] = 1
            regions.update(granule * GRANULE // REGION for granule in event.granules)
            if event.returned:
                for model in (least, *since.values()):
                    model[list(event.granules)] = 1
        elif isinstance(event, Saved):
            regions = set()
        elif isinstance(event, Cut):
            since[event.name] = np.zeros(SIZE // GRANULE, np.uint8)
    for region in regions:
        mark(most, region * REGION, REGION)
    return least, most, since


def lose(tracker: Tracker) -> None:
    """The machine has stopped: nothing is closed, and this process forgets."""
    tracker._kernel.fail(StorageError("tracker", "the machine has stopped"))
    tracker._closed = True
    tracker._ended.set()
    for thread in tracker._threads:
        thread.join()
    tracker._kernel.leave(at_once=True)
    tracker._log.close(remove=False)
    for home in tracker._homes:
        home.close()
