"""What a crash can leave of an image while dirtmap changes it: every such state is built, and judged.

A recording is what an operation did to the image, cut into epochs by its syncs. When the machine stops in an epoch,
all epochs before it are on disk, and of its own writes any part: each 512-byte sector of each write is there or not,
whatever was written before or after it, and the file may already be as long as it will be although the data that make
it so are missing.

    write | write | sync    write | sync    write | write | sync
    `---- epoch 0 -----'    `epoch 1---'    `---- epoch 2 -----'
                              crash here: all of epoch 0, any pieces of epoch 1, nothing of epoch 2

`Judge` says what a state must be; `mutants` are recordings that are wrong on purpose, to judge the judge.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dirtmap.engine.model.report import CheckReport
from dirtmap.engine.qcow2.check import check
from dirtmap.engine.qcow2.clusters import load
from dirtmap.engine.qcow2.layout import Layout, read_layout
from dirtmap.engine.system import file as fileio
from dirtmap.engine.system.file import File
from dirtmap.fmt import geometry
from dirtmap.fmt.errors import StorageError
from support import plain

SECTOR = 512


class Harm(AssertionError):
    """A state that must not be."""


# What was done.


class Write(NamedTuple):
    offset: int
    data: bytes


class Truncate(NamedTuple):
    """Gives the file that length, in bytes: cuts it, or appends zeros."""

    size: int


Step = Write | Truncate
Epoch = list[Step]


@dataclass
class Recording:
    """What an operation did to an image.

    Attributes:
        original: the image before.
        epochs: the steps, each list ended by a sync.
        unsynced: steps that no sync followed.
    """

    original: bytes
    epochs: list[Epoch] = field(default_factory=list)
    unsynced: Epoch = field(default_factory=list)

    def step(self, step: Step) -> None:
        self.unsynced.append(step)

    def sync(self) -> None:
        self.epochs.append(self.unsynced)
        self.unsynced = []

    @property
    def final(self) -> bytes:
        """The image with everything done."""
        image = bytearray(self.original)
        for step in itertools.chain(*self.epochs, self.unsynced):
            land(image, step)
        return bytes(image)


def land(image: bytearray, step: Step) -> None:
    """Does one step."""
    size = step.size if isinstance(step, Truncate) else step.offset
    if size > len(image):
        image.extend(bytes(size - len(image)))
    if isinstance(step, Truncate):
        del image[size:]
    else:
        image[step.offset : step.offset + len(step.data)] = step.data


class Fault(NamedTuple):
    """Something to go wrong: the write or sync of that number fails, after ``done`` bytes where it is a write."""

    action: str
    number: int
    done: int = 0


def record(
    path: Path,
    operate: Callable[[Path], object],
    *,
    growable: bool = True,
    fault: Fault | None = None,
) -> Recording:
    """Runs an operation on an image and records what it does.

    Args:
        path: the image.
        operate: gets the path.
        growable: False makes the file behave as a block device of its size.
        fault: a failure to inject.
    """
    recording = Recording(path.read_bytes())
    counts = {"write": 0, "sync": 0}

    def fails(action: str) -> bool:
        counts[action] += 1
        return fault is not None and (fault.action, fault.number) == (action, counts[action] - 1)

    class Recorder(File):
        @property
        def growable(self) -> bool:
            return growable

        def write(self, offset: int, data: bytes | memoryview) -> None:
            self._refuse_if_poisoned()
            failing = fails("write")
            data = bytes(data)[: fault.done if failing and fault else None]
            super().write(offset, data)
            if data:
                recording.step(Write(offset, data))
            if failing:
                raise StorageError(self.path, "write: injected")

        def truncate(self, size: int) -> None:
            super().truncate(size)
            recording.step(Truncate(size))

        def sync(self) -> None:
            self._refuse_if_poisoned()
            if fails("sync"):
                self._poisoned = "injected"
                raise StorageError(self.path, "sync: injected")
            super().sync()
            recording.sync()

    with fileio.using(Recorder):
        operate(path)
    return recording


# What can be left of it.


@dataclass(frozen=True)
class Effort:
    """How many states to try.

    Attributes:
        pieces: an epoch of so many is tried in all its subsets, 2 to the power of it; of so many writes, in all
            subsets of whole writes.
        most: of longer ones, so many prefixes, so many with a single piece there, so many with a single one missing.
        random: and so many at random, with a fixed seed.
        qemu: states of each operation that QEMU judges as well.
    """

    pieces: int = 10
    most: int = 64
    random: int = 250
    qemu: int = 8

    def times(self, factor: int) -> Effort:
        """So many times the effort, about."""
        more = factor.bit_length() - 1
        return Effort(self.pieces + more, self.most * factor, self.random * factor, self.qemu * factor)


def pieces(epoch: Sequence[Step], length: int) -> list[list[Step]]:
    """What can reach the disk apart, for each step; first, where a file of ``length`` bytes grows, its new length."""
    parts: list[list[Step]] = []
    end = max((step.offset + len(step.data) for step in epoch if isinstance(step, Write)), default=0)
    if end > length:
        parts.append([Truncate(end)])
    for step in epoch:
        if isinstance(step, Truncate):
            parts.append([step])
        else:
            first = step.offset // SECTOR * SECTOR
            cuts = [step.offset, *range(first + SECTOR, step.offset + len(step.data), SECTOR)]
            ends = [*cuts[1:], step.offset + len(step.data)]
            data, at = step.data, step.offset
            parts.append([Write(cut, data[cut - at : end - at]) for cut, end in zip(cuts, ends, strict=True)])
    return parts


def subsets(parts: Sequence[Sequence[object]], effort: Effort, rng: random.Random) -> Iterator[list[int]]:
    """Which of the pieces, numbered through, are there: ascending lists. The telling ones come first."""
    everything = list(range(sum(map(len, parts))))
    ends = list(itertools.accumulate(map(len, parts)))
    wholes = [everything[end - len(part) : end] for end, part in zip(ends, parts, strict=True)]
    singles = [[number] for number in everything]
    for units in (wholes, singles) if len(wholes) < len(singles) else (singles,):
        if len(units) <= effort.pieces:
            masks = sorted(
                range(1 << len(units)), key=lambda mask: min(mask.bit_count(), len(units) - mask.bit_count())
            )
            for mask in masks:
                yield [number for index, unit in enumerate(units) if mask >> index & 1 for number in unit]
            continue
        yield everything
        for unit in units if len(units) <= effort.most else rng.sample(units, effort.most):
            yield unit
            yield [number for number in everything if not unit[0] <= number <= unit[-1]]
            yield everything[: unit[0]]
    if len(everything) <= effort.pieces:
        return
    for _ in range(effort.random):
        # Some writes are not there, some whole, some torn.
        torn = [part if rng.random() < 0.5 else [n for n in part if rng.random() < 0.5] for part in wholes]
        yield [number for part in torn if rng.random() < 0.6 for number in part]


class State(NamedTuple):
    """What a crash left: a ``digest`` of the ``image``, and in words how it came about."""

    image: bytearray
    digest: bytes
    how: str


def states(recording: Recording, effort: Effort, only: Sequence[int] | None = None) -> Iterator[State]:
    """Every state, the same one possibly more than once; of those epochs only, where given."""
    rng = random.Random(0)
    base = bytearray(recording.original)
    epochs = [*recording.epochs, recording.unsynced] if recording.unsynced else recording.epochs
    touched = _touched(recording)
    for number, epoch in enumerate(epochs):
        if only is None or number in only:
            parts = pieces(epoch, len(base))
            flat = list(itertools.chain(*parts))
            for chosen in subsets(parts, effort, rng):
                image = bytearray(base)
                for index in chosen:
                    land(image, flat[index])
                yield State(image, _digest(image, touched), _story(number, flat, chosen))
        for step in epoch:
            land(base, step)


def _story(number: int, flat: list[Step], chosen: list[int]) -> str:
    there = set(chosen)
    text = f"epoch {number}:"
    for index, step in enumerate(flat):
        what = f"length {step.size}" if isinstance(step, Truncate) else f"{len(step.data)} at {step.offset:#x}"
        text += f" {'+' if index in there else '-'}[{what}]"
    return text


def _touched(recording: Recording) -> list[tuple[int, int]]:
    """The ranges that any step writes to, as whole sectors; ascending, apart."""
    sectors: set[int] = set()
    for step in itertools.chain(*recording.epochs, recording.unsynced):
        if isinstance(step, Write):
            sectors.update(range(step.offset // SECTOR, -(-(step.offset + len(step.data)) // SECTOR)))
    return runs(sectors, SECTOR)


def runs(numbers: set[int], unit: int) -> list[tuple[int, int]]:
    """Units by number as ranges of bytes, neighbours joined."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number * unit:
            found[-1] = (found[-1][0], (number + 1) * unit)
        else:
            found.append((number * unit, (number + 1) * unit))
    return found


def _digest(image: bytearray, touched: Sequence[tuple[int, int]]) -> bytes:
    """Tells states of one recording apart: they differ where it wrote, and in length."""
    found = hashlib.blake2b(len(image).to_bytes(8, "big"), digest_size=16)
    for start, end in touched:
        found.update(memoryview(image)[start:end])
    return found.digest()


# What it must be.


@contextlib.contextmanager
def in_memory(image: bytearray, *, growable: bool = True) -> Iterator[str]:
    """While active, the engine takes every path for this image; it reads and writes it there."""

    class Memory(File):
        def __init__(self, path: str, **_: bool) -> None:
            self.path, self.abspath, self.fd, self._poisoned, self._left = path, path, 0, None, False
            self.status = os.stat("/")

        @property
        def growable(self) -> bool:
            return growable

        def close(self) -> None:
            self.fd = -1

        def _fork(self) -> None:
            pass  # a child has memory of its own

        def size(self) -> int:
            return len(image)

        def read(self, offset: int, length: int) -> bytes:
            return bytes(image[offset : offset + length])

        def read_into(self, offset: int, buffer: memoryview) -> None:
            buffer[:] = self.read_exactly(offset, len(buffer))

        def has_data(self, offset: int, length: int) -> bool:
            return True

        def write(self, offset: int, data: bytes | memoryview) -> None:
            land(image, Write(offset, bytes(data)))

        def truncate(self, size: int) -> None:
            land(image, Truncate(size))

        def sync(self) -> None:
            pass

        write_back = sync

        def lock(self, offset: int) -> None:
            pass

        unlock = unlock_beside = lock

        def lock_alone(self, offset: int) -> bool:
            return True

        lock_beside = lock_alone

        def lock_fault(self) -> None:
            return None

        def locked_by_other(self, offset: int, length: int = 1) -> bool:
            return False

        def is_current(self) -> bool:
            return True

    with fileio.using(Memory):
        yield "memory"


def seen_by_engine(image: bytearray) -> tuple[Layout, tuple[plain.Bitmap, ...]]:
    """What dirtmap reads: the layout, and all bitmaps that have a table."""
    with in_memory(image) as path, fileio.open_file(path) as file:
        layout = read_layout(file)
        bitmaps = []
        for slot in layout.slots:
            entry = slot.entry
            size = geometry.packed_bytes(layout.header.size, entry.granularity)
            packed = bytes(load(file, layout, slot))[:size] if slot.table else b""
            bitmaps.append(plain.Bitmap(entry.name, entry.granularity_bits, entry.flags, packed))
        return layout, tuple(bitmaps)


class Judge:
    """Says whether a state that a crash left is as good as the original or as what was asked for.

    Args:
        recording: of an operation on a sound image.
        may_void: the bitmaps may be void, which readers see as none, in the one window where nothing else is possible.
    """

    def __init__(self, recording: Recording, *, may_void: bool = False) -> None:
        self.original, self.final = recording.original, recording.final
        self.may_void = may_void
        reader = plain.Reader(self.original)
        self.header = reader.header
        self.backing = plain.backing_name(self.original, self.header)
        self.guest = reader.guest()
        self.old = reader.bitmaps()
        self.counts = reader.counts()
        self.guests = np.array(sorted(self.guest))
        finished = plain.Reader(self.final)
        self.new = finished.bitmaps()
        self.finished = finished.header
        self.protected = protected(recording)

    def __call__(self, image: bytearray) -> None:
        """Judges a state.

        Raises:
            Harm: it must not be.
        """
        _require_untouched(image, self.original, self.protected)
        try:
            reader = plain.Reader(image)
            self.header_as_before(reader)
            found = reader.bitmaps()
            if found not in (self.old, self.new):
                void = not found and self.may_void and reader.header.find(plain.BITMAPS)
                if not void:
                    raise Harm(f"the bitmaps are neither old nor new: {[b.name for b in found]}")
                # While they are void, nothing but the extension may be left to write.
                whole = plain.Reader(completed(image, self.final))
                if whole.bitmaps() != self.new:
                    raise Harm("void before the new bitmaps were complete")
                self.counted(whole)
            self.counted(reader)
        except (plain.Broken, struct.error) as broken:
            raise Harm(f"broken: {broken}") from broken
        self.engine_agrees(image, found)

    def header_as_before(self, reader: plain.Reader) -> None:
        """Name of the backing file, foreign extensions, feature bits."""
        header, image = reader.header, reader.image
        if plain.backing_name(image, header) != self.backing:
            raise Harm(f"the backing file is now {plain.backing_name(image, header)!r}")
        if (header.autoclear ^ self.header.autoclear) & 2:
            raise Harm("autoclear bit 1 has changed")
        unknown = header.autoclear & ~3
        if unknown:
            restored = bytearray(image)
            restored[88:96] = self.original[88:96]
            if unknown != self.header.autoclear & ~3 or restored != self.original:
                raise Harm("autoclear bits that dirtmap does not know are on although the image was changed")
        chains = ([(e.kind, e.data) for e in h.chain if e.kind not in plain.OURS] for h in (header, self.header))
        if next(chains) != next(chains):
            raise Harm("other extensions have changed")
        bitmaps, identity = ([e for e in header.chain if e.kind == kind] for kind in (plain.BITMAPS, plain.NAMESPACE))
        if bitmaps and not self.header.find(plain.BITMAPS) and bitmaps != [self.finished.find(plain.BITMAPS)]:
            raise Harm("a bitmaps extension appears that is not whole")
        # While an image gets another identity, it may be without.
        old, new = (h.find(plain.NAMESPACE) for h in (self.header, self.finished))
        if identity not in ([old], [new]) and (identity or old == new) and (identity or old):
            raise Harm("an identity that is neither old nor new")

    def counted(self, reader: plain.Reader) -> None:
        """No refcount is too low, nothing shares a cluster, and guest clusters are counted as before."""
        counts = reader.counts()
        if len(counts) < len(self.counts):
            counts = np.pad(counts, (0, len(self.counts) - len(counts)))
        if (counts[self.guests] != self.counts[self.guests]).any():
            raise Harm("refcounts of guest data have changed")
        for number, times in reader.references.items():
            if times != 1 or number in self.guest:
                raise Harm(f"cluster {number} is used twice")
            if number >= len(counts) or not counts[number]:
                raise Harm(f"cluster {number} is used and not counted")

    def engine_agrees(self, image: bytearray, found: tuple[plain.Bitmap, ...]) -> None:
        """Dirtmap reads the same, checks it, and frees what leaked."""
        layout, bitmaps = seen_by_engine(image)
        if layout.faults:
            raise Harm(f"dirtmap refuses it: {layout.faults[0]}")
        if [b for b in bitmaps if not b.flags & 1] != [b for b in found if not b.flags & 1]:
            raise Harm("dirtmap reads other bitmaps")
        report = checked(image)
        if report.corruptions or report.check_errors:
            raise Harm(f"dirtmap finds {report.findings}")

    def finish(self, image: bytearray) -> None:
        """Judges what is durable when the operation has returned: what was asked for, and nothing leaked."""
        self(image)
        reader = plain.Reader(image)
        if reader.bitmaps() != self.new or reader.header.chain != self.finished.chain:
            raise Harm("what was asked for is not there")
        if checked(image).leaks > checked(bytearray(self.original)).leaks:
            raise Harm("clusters have leaked")


class RepairJudge:
    """As `Judge`, of the mending of a damaged image: a state is as damaged as the original, or mended.

    What dirtmap reads of the bitmaps and their faults tells which.
    """

    def __init__(self, recording: Recording, *, may_void: bool = False) -> None:
        self.original, self.final, self.may_void = recording.original, recording.final, may_void
        self.old, self.new = seen_damaged(recording.original), seen_damaged(recording.final)
        self.corruptions = checked(bytearray(recording.original)).corruptions
        self.protected = protected(recording)

    def __call__(self, image: bytearray) -> None:
        _require_untouched(image, self.original, self.protected)
        found = seen_damaged(image)
        if found == ([], ()) and self.may_void:
            found = seen_damaged(completed(image, self.final))
        if found not in (self.old, self.new):
            raise Harm("neither as damaged as before nor mended")
        report = checked(image)
        if report.corruptions > self.corruptions or report.check_errors:
            raise Harm(f"it got worse: {report.findings}")

    def finish(self, image: bytearray) -> None:
        self(image)
        report = checked(image)
        if seen_damaged(image) != self.new or report.corruptions or report.leaks:
            raise Harm(f"not mended: {report.findings}")


def completed(image: bytes | bytearray, final: bytes) -> bytearray:
    """The image with the payload of its bitmaps extension and its autoclear bits as they are in the end."""
    extension = plain.read_header(final).find(plain.BITMAPS)
    assert extension
    whole = bytearray(image)
    land(whole, Write(extension.offset + 8, extension.data))
    land(whole, Write(plain.AUTOCLEAR_AT, final[plain.AUTOCLEAR_AT : plain.AUTOCLEAR_AT + 8]))
    return whole


def seen_damaged(image: bytes | bytearray) -> tuple[object, ...]:
    """What dirtmap reads of a damaged image."""
    layout, bitmaps = seen_by_engine(bytearray(image))
    return [fault[:2] for fault in layout.faults], bitmaps


def checked(image: bytearray) -> CheckReport:
    """What `dirtmap check` finds."""
    with in_memory(image) as path:
        return check(path)


def protected(recording: Recording) -> list[tuple[int, int]]:
    """Ranges that are written to and must stay as they were: whatever is counted or in use, but for a few fields."""
    reader = plain.Reader(recording.original)
    header, cluster, finished = reader.header, reader.cluster, plain.read_header(recording.final)
    used = {*reader.guest(), *np.flatnonzero(reader.counts()).tolist()} - set(reader.refcounts()) - {0}
    free = {*range(48, 60), *range(88, 96)}
    for extension in header.chain:
        if extension.kind in plain.OURS:
            whole = extension.kind != plain.NAMESPACE
            free.update(range(extension.offset, extension.offset + 8 + (len(extension.data) if whole else 0)))
    if finished.chain_end > header.chain_end:
        free.update(range(header.chain_end, finished.chain_end + 8))
    if finished.backing != header.backing:
        free.update(range(8, 16), range(finished.backing[0], sum(finished.backing)))
    return [
        (max(start, first), min(end, last))
        for start, end in runs(used, cluster) + runs(set(range(cluster)) - free, 1)
        for first, last in _touched(recording)
        if max(start, first) < min(end, last)
    ]


def _require_untouched(image: bytearray, original: bytes, ranges: Sequence[tuple[int, int]]) -> None:
    for start, end in ranges:
        if image[start:end] != original[start:end]:
            raise Harm(f"bytes {start:#x}..{end:#x} have changed")


@dataclass
class Tally:
    """States built, distinct ones among them, and how many of those QEMU judged."""

    built: int = 0
    distinct: int = 0
    qemu: int = 0
    sample: dict[bytes, State] = field(default_factory=dict)

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.built + other.built, self.distinct + other.distinct, self.qemu + other.qemu)


def explore(
    recording: Recording,
    judge: Callable[[bytearray], None],
    effort: Effort,
    only: Sequence[int] | None = None,
) -> Tally:
    """Judges every distinct state; those with the lowest digests are kept as a sample for QEMU.

    Raises:
        Harm: the first that must not be, and how it came about.
    """
    tally = Tally()
    seen = set()
    for state in states(recording, effort, only):
        tally.built += 1
        if state.digest in seen:
            continue
        seen.add(state.digest)
        try:
            judge(state.image)
        except Harm as harm:
            raise Harm(f"{harm}; {state.how}") from harm
        tally.distinct += 1
        tally.sample[state.digest] = state
        if len(tally.sample) > effort.qemu:
            del tally.sample[max(tally.sample)]
    return tally


def require_durable(recording: Recording) -> None:
    """When an operation has returned, all it wrote is durable."""
    if recording.unsynced:
        raise Harm(f"{len(recording.unsynced)} writes are not synced at the end")


# What would be wrong.


class Mutant(NamedTuple):
    """A recording that is wrong on purpose, in those epochs."""

    what: str
    recording: Recording
    epochs: tuple[int, ...]


def mutants(recording: Recording) -> Iterator[Mutant]:
    """For each sync, the recording without it, and with the two steps next to it swapped."""
    epochs = recording.epochs
    for number in range(len(epochs)):
        left, right = epochs[:number], epochs[number + 1 :]
        if right:
            merged = [*left, epochs[number] + right[0], *right[1:]]
            yield Mutant(f"no sync {number}", replace(recording, epochs=merged), (number,))
            swapped = [
                *left,
                [*epochs[number][:-1], right[0][0]],
                [epochs[number][-1], *right[0][1:]],
                *right[1:],
            ]
            yield Mutant(f"swapped at sync {number}", replace(recording, epochs=swapped), (number, number + 1))
        else:
            yield Mutant(f"no sync {number}", replace(recording, epochs=left, unsynced=epochs[number]), (number,))


def caught(mutant: Mutant, judge: Judge | RepairJudge, effort: Effort) -> str | None:
    """Why the mutant is harmful, or None where no state of it is."""
    try:
        require_durable(mutant.recording)
        explore(mutant.recording, judge, effort, mutant.epochs)
        judge.finish(bytearray(mutant.recording.final))
    except Harm as harm:
        return str(harm)
    return None
