"""Live files: the control file and the writesets of a tracker. The tracker maps them; readers copy them."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from bitarray import bitarray

from dirtmap.engine.identity import identity_of
from dirtmap.engine.model import bits
from dirtmap.engine.system import file as fileio
from dirtmap.engine.system import livefs, memory
from dirtmap.engine.system.process import CLOCK_TOLERANCE_NS, clock_offset
from dirtmap.fmt import geometry, live
from dirtmap.fmt.errors import LockedError, StorageError
from dirtmap.fmt.identity import FilePlace
from dirtmap.fmt.parsers.live import CONTROL, WRITESET

# Writes that have begun in an interval and not ended, by their number: first byte, end, and thread.
Flights = dict[int, tuple[int, int, int | None]]

_BLOCK: Final = 16384  # words
_ATTEMPTS: Final = 20
_PAUSE_SECONDS: Final = 0.01
_NAMES: Final = re.compile(r"control|writeset-[0-9]+")


def default_folder() -> str:
    """The folder for live files: ``$DIRTMAP_LIVE``, else the tmpfs that every Linux has."""
    return os.environ.get("DIRTMAP_LIVE") or "/dev/shm"


def user_folder(folder: str) -> str:
    """The folder for the live files of this user, in a folder that all users share."""
    return os.path.join(folder, f"dirtmap-{os.geteuid()}")


class Folder:
    """The folder of a session's live files. It is made if it is missing, and no other tracker gets it until `close`.

    Its name is the namespace's UUID. In a copy of the store the namespace has the same UUID, so the same folder.

    Raises:
        LockedError: a tracker has its live files there.
        StorageError: it cannot be made.
    """

    def __init__(self, path: str) -> None:
        self._fd = -1
        for _ in range(_ATTEMPTS):  # whoever removes what a dead tracker has left holds the folder for a moment
            livefs.make_live_folder(path)
            if (fd := livefs.hold_live_folder(path)) is not None:
                self._fd = fd
                return
            time.sleep(_PAUSE_SECONDS)
        raise LockedError(path, "a tracker with another store has its live files here; end it first")

    def close(self) -> None:
        """Gives the folder up."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def remove_session(folder: str, uuid: bytes) -> None:
    """Removes the live files of a session that has ended, if the folder has those of that session."""
    with contextlib.suppress(StorageError):
        if is_of(folder, uuid) and (fd := livefs.hold_live_folder(folder)) is not None:
            try:
                if is_of(folder, uuid):
                    remove_files(folder)
            finally:
                os.close(fd)


def remove_files(folder: str, *, keep_folder: bool = False) -> None:
    """Removes the live files in a folder that the caller holds."""
    livefs.remove_live_files(folder, _NAMES, keep_folder=keep_folder)


def refuse_living(path: str, uuid: bytes) -> None:
    """Refuses a change of an image while a tracker of it lives whose session is in a store that is not known.

    Args:
        path: of the image. Copies of it have the same UUID, and are not refused.
        uuid: of the namespace, 16 bytes.

    Raises:
        LockedError: this user tracks that very file, and the live files are in the usual folder.
    """
    folder = os.path.join(user_folder(default_folder()), uuid.hex())
    control, image = _read_control(folder), identity_of(path).place
    if control is None or (control.image_filesystem, control.image_inode, control.image_birth) != image:
        return
    if (fd := livefs.hold_live_folder(folder)) is None:
        raise LockedError(path, "its tracker lives, and uses another store; end it first")
    os.close(fd)


def is_of(folder: str, uuid: bytes) -> bool:
    """True if the live files in a folder are those of that session."""
    control = _read_control(folder)
    return control is not None and control.uuid == uuid


def _read_control(folder: str) -> Any:
    """The control file in a folder, as `CONTROL` parses it; None if there is none."""
    data = livefs.read_live(_control_path(folder), lambda _: (live.PAGE, live.PAGE))
    control = CONTROL.parse(bytes(data)) if data else None
    return control if control and control.magic == live.CONTROL_MAGIC else None


def _control_path(folder: str) -> str:
    return os.path.join(folder, "control")


def _writeset_path(folder: str, number: int) -> str:
    return os.path.join(folder, f"writeset-{number}")


def _index(name: str) -> int:
    """The index of a field of the control file among the mapped u64."""
    return CONTROL.field(name).offset // 8


POISONED, CURRENT, HEARTBEAT, EVENT, IN_FLIGHT, BARE, WRITES, LOGGED, CLOCK = map(
    _index, ("poisoned", "current", "heartbeat", "event", "in_flight", "bare", "writes", "logged", "clock")
)


class Control:
    """The control file of a tracker, as the tracker itself has it mapped.

    Attributes:
        fields: its numbers, a memoryview of u64, to be indexed with the constants above. Each is written by one store
            instruction, so no reader sees half of it.
    """

    def __init__(self, folder: str, uuid: bytes, image: FilePlace) -> None:
        self._map = livefs.create_live(_control_path(folder), live.PAGE)
        values: dict[str, Any] = dict.fromkeys((field.name for field in CONTROL.fields), 0)
        values |= {"magic": live.CONTROL_MAGIC, "uuid": uuid}
        values |= {f"image_{name}": value for name, value in image._asdict().items()}
        values["clock"] = max(clock_offset(), 0)
        self._map[: CONTROL.size] = CONTROL.build(**values)
        self.fields = memoryview(self._map).cast("Q")

    def give_sign(self) -> None:
        """Writes a heartbeat. If the clock was set back, times from before that mean nothing any more."""
        now, clock = time.time_ns(), clock_offset()
        if clock < self.fields[CLOCK] - CLOCK_TOLERANCE_NS:
            self.fields[EVENT] = now
        self.fields[HEARTBEAT] = now
        if abs(clock - self.fields[CLOCK]) > CLOCK_TOLERANCE_NS:
            self.fields[CLOCK] = max(clock, 0)

    def close(self) -> None:
        """Unmaps it."""
        self.fields.release()
        self._map.close()


class Writeset:
    """The bits of one interval, mapped. It is made before the interval begins, and all clean at first.

    Attributes:
        number: of the interval.
        size: of the disk, in bytes.
        granularity_bits: log2 of the bytes of the disk that one bit stands for.
        path: of the file.
        flights: the writes that have begun in this interval and not ended.
    """

    def __init__(self, folder: str, uuid: bytes, number: int, size: int, granularity_bits: int) -> None:
        self.number, self.size, self.granularity_bits = number, size, granularity_bits
        self.path = _writeset_path(folder, number)
        nbits = geometry.granules(size, 1 << granularity_bits)
        self._octets = geometry.ceil_div(nbits, 64) * 8
        fileio.remove_file(self.path)  # an attempt that was interrupted may have left one; the folder is ours alone
        self._map = livefs.create_live(self.path, live.PAGE + max(self._octets, 8))
        try:
            self._map[: WRITESET.size] = WRITESET.build(
                magic=live.WRITESET_MAGIC, uuid=uuid, number=number, size=size, granularity_bits=granularity_bits
            )
            # Reading a word of each page maps all pages now, not one by one with the marks. numpy lets other threads
            # run meanwhile; mmap's MAP_POPULATE would not.
            self.words[:: live.PAGE // 8].max(initial=0)
        except BaseException:
            self.forget()
            raise
        self.flights: Flights = {}

    def view(self) -> bitarray:
        """A new bitarray over the same bits."""
        return bitarray(buffer=memoryview(self._map)[live.PAGE :], endian="little")

    @property
    def words(self) -> bits.Words:
        """The bits as words: a read-only view, which shows later marks as well."""
        words = np.frombuffer(self._map, bits.WORD, self._octets // 8, live.PAGE)
        words.flags.writeable = False
        return words

    def forget(self) -> None:
        """Removes the file. Its memory is freed with the last view of it."""
        fileio.remove_file(self.path)


@dataclass(frozen=True, slots=True)
class Words:
    """The bits of one or several intervals, at one granularity (bytes), for a disk of ``size`` bytes."""

    words: bits.Words
    size: int
    granularity: int

    def at(self, granularity: int) -> bits.Words:
        """The words at another granularity, in bytes, rounded outward. They must not be written to."""
        return bits.rescaled(self.words, self.size, self.granularity, granularity)

    def sized(self, size: int) -> Words:
        """The bits as those of a disk of ``size`` bytes: cut off, or with clean bits behind them."""
        if size == self.size:
            return self
        nbits = geometry.granules(size, self.granularity)
        words = bits.zeros(nbits)
        common = min(len(words), len(self.words))
        words[:common] = self.words[:common]
        bits.mask_tail(words, nbits)
        return Words(words, size, self.granularity)


def union(parts: Iterable[Words], size: int, granularity: int) -> bits.Words:
    """What any of them has, at that granularity: new words. A block at a time, which stays in the cache.

    Blocks without a bit take no memory.
    """
    length = geometry.ceil_div(geometry.granules(size, granularity), 64)
    result = np.frombuffer(memory.sparse(max(length, 1) * 8), bits.WORD)[:length]
    every = [part.at(granularity) for part in parts]
    scratch = np.empty(min(_BLOCK, length), bits.WORD)
    for at in range(0, length if every else 0, _BLOCK):
        first, *others = [words[at : at + _BLOCK] for words in every]
        block = scratch[: len(first)]
        for other in others:
            first = np.bitwise_or(first, other, out=block)
        if first.any():
            result[at : at + _BLOCK] = first
    return result


@dataclass(frozen=True, slots=True)
class Found:
    """The live files of a session, as a reader has copied them.

    Attributes:
        poisoned, current, heartbeat, event, in_flight, bare, writes, logged, clock: see `fmt.live.CONTROL`.
        writesets: the intervals from the oldest one asked for to the current one, by number.
    """

    poisoned: int
    current: int
    heartbeat: int
    event: int
    in_flight: int
    bare: int
    writes: int
    logged: int
    clock: int
    writesets: dict[int, Words]


def find(folder: str, uuid: bytes, oldest: int, size: int) -> Found | None:
    """Reads a session's live files.

    Args:
        folder: of the live files.
        uuid: of the session, 16 bytes.
        oldest: the first interval that is needed.
        size: of the disk, bytes.

    Returns:
        None if one that is needed is missing, belongs to another session, or is not as a tracker makes it.
    """
    control = _read_control(folder)
    if control is None or control.uuid != uuid or not 0 <= control.current - oldest < live.MAX_INTERVALS:
        return None
    writesets = {}
    for number in range(oldest, control.current + 1):
        words = _read_writeset(folder, uuid, number, size)
        if words is None:
            return None
        writesets[number] = words
    numbers = ("poisoned", "current", "heartbeat", "event", "in_flight", "bare", "writes", "logged", "clock")
    return Found(**{name: getattr(control, name) for name in numbers}, writesets=writesets)


def is_outdated(folder: str, uuid: bytes, current: int, size: int) -> bool:
    """True if a dead tracker has marked in a later interval than the one that its control file has as current.

    A tracker writes the number of an interval into the control file before it marks anything in that interval. And it
    makes no writeset beforehand but that of the next interval. So a later mark shows that the control file is an old
    one.
    """
    spare = _read_writeset(folder, uuid, current + 1, size)
    marked = spare is not None and bool(spare.words.any())
    return marked or os.path.lexists(_writeset_path(folder, current + 2))


def _read_writeset(folder: str, uuid: bytes, number: int, size: int) -> Words | None:
    data = livefs.read_live(_writeset_path(folder, number), lambda head: _writeset_sizes(head, uuid, number, size))
    if data is None:
        return None
    granularity = 1 << WRITESET.parse(bytes(data[: WRITESET.size])).granularity_bits
    nbits = geometry.granules(size, granularity)
    words = np.frombuffer(data, bits.WORD, geometry.ceil_div(nbits, 64), live.PAGE).copy()
    bits.mask_tail(words, nbits)
    return Words(words, size, granularity)


def _writeset_sizes(head: bytes, uuid: bytes, number: int, size: int) -> tuple[int, int] | None:
    """How long a writeset with that header is, and how much of it is about a disk of ``size`` bytes.

    It may be a larger disk's: the store has yet to be told of the new size.

    Returns:
        None where it is not that interval's.
    """
    if len(head) < WRITESET.size:
        return None
    found = WRITESET.parse(head)
    if (found.magic, found.uuid, found.number) != (live.WRITESET_MAGIC, uuid, number) or found.size < size:
        return None
    granularity = 1 << min(found.granularity_bits, 63)
    if not geometry.is_granularity(granularity):
        return None
    return _bytes_for(found.size, granularity), _bytes_for(size, granularity)


def _bytes_for(size: int, granularity: int) -> int:
    return live.PAGE + max(geometry.ceil_div(geometry.granules(size, granularity), 64) * 8, 8)
