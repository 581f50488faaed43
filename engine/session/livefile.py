"""Live files: they are made here, read by copying what is needed of them, and removed.

Whoever marks has them mapped; see `dirtmap.engine.tracking.kernel`.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dirtmap.engine.identity import identity_of
from dirtmap.engine.model import bits, content
from dirtmap.engine.model.content import Combined, Uniform, Whole, kept, rescaled
from dirtmap.engine.system import livefs, memory
from dirtmap.engine.system.process import clock_offset
from dirtmap.fmt import geometry, live
from dirtmap.fmt.errors import LockedError, StorageError, UnsupportedError
from dirtmap.fmt.identity import FilePlace
from dirtmap.fmt.live import SLOT_SIZE
from dirtmap.fmt.parsers.live import ARENA, CONTROL, DESCRIPTOR, FLIGHT, SLOT, WRITESET

if TYPE_CHECKING:
    from dirtmap.engine.model.content import Content, Part

_PIECE: Final = 1 << 20  # bytes that are read at a time
_ATTEMPTS: Final = 20
_PAUSE_SECONDS: Final = 0.01
_NAMES: Final = re.compile(r"control|bits|markers|socket")
_LOOKS: Final = 100  # a save that recycles buffers makes a reader begin again


def default_folder() -> str:
    """The folder for live files: ``$DIRTMAP_LIVE``, else the tmpfs that every Linux has."""
    return os.environ.get("DIRTMAP_LIVE") or "/dev/shm"


def user_folder(folder: str) -> str:
    """The folder for the live files of this user, in a folder that all users share."""
    return os.path.join(folder, f"dirtmap-{os.geteuid()}")


class Folder:
    """The folder of a session's live files. It is made if it is missing, and no other tracker gets it until `close`.

    Its name is the namespace's UUID. In a copy of the store the namespace has the same UUID, so the same folder.

    Args:
        path: of the folder.
        adopt: others may mark there, in the session that the tracker takes over.

    Raises:
        LockedError: a tracker, or somebody who marks, has live files there.
        StorageError: it cannot be made.
    """

    def __init__(self, path: str, *, adopt: bool = False) -> None:
        self._fd = -1
        for _ in range(_ATTEMPTS):  # whoever removes what a dead tracker has left holds the folder for a moment
            livefs.make_live_folder(path)
            if (fd := livefs.hold_live_folder(path) if adopt else _hold(path)) is not None:
                self._fd = fd
                return
            time.sleep(_PAUSE_SECONDS)
        raise LockedError(path, "a tracker with another store has its live files here; end it first")

    def close(self) -> None:
        """Gives the folder up."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _hold(path: str) -> int | None:
    """As `hold_live_folder`, but None also where anybody marks in the live files that are there."""
    fd = livefs.hold_live_folder(path)
    if fd is not None and livefs.is_locked(_path(path, "markers"), live.GATE + 1):
        os.close(fd)
        return None
    return fd


def remove_session(folder: str, uuid: bytes) -> None:
    """Removes the live files of a session that has ended, if the folder has those of that session."""
    with contextlib.suppress(StorageError):
        if is_of(folder, uuid) and (fd := _hold(folder)) is not None:
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
    if (fd := _hold(folder)) is None:
        raise LockedError(path, "its tracker lives, and uses another store; end it first")
    os.close(fd)


def is_of(folder: str, uuid: bytes) -> bool:
    """True if the live files in a folder are those of that session."""
    control = _read_control(folder)
    return control is not None and control.uuid == uuid


def heartbeat(folder: str) -> int | None:
    """When the tracker of the live files in a folder last gave a sign of life, in ns since 1970; None without any."""
    control = _read_control(folder)
    return None if control is None else int(control.heartbeat)


def _read_control(folder: str) -> Any:
    """The head of the control file in a folder, as `CONTROL` parses it; None if there is none."""
    with livefs.LiveReader(_path(folder, "control")) as file:
        return _head_of(file)


def log_path(folder: str) -> str:
    """The path of the intent log of the session whose live files are in that folder.

    Raises:
        StorageError: there are none.
    """
    with livefs.LiveReader(_path(folder, "control")) as file:
        path = file.read(live.LOG_PATH, live.PAGE) if _head_of(file) else None
    if path is None:
        raise StorageError(folder, "no live files of a tracker")
    return os.fsdecode(bytes(path).partition(b"\0")[0])


def _head_of(control: livefs.LiveReader) -> Any:
    data = control.read(0, live.LOG_PATH)
    if data is None or control.size > live.CONTROL_BYTES:
        return None
    head = CONTROL.parse(data)
    good = head.magic == live.CONTROL_MAGIC and head.order == live.CONTROL_ORDER
    return head if good and head.version == live.CONTROL_VERSION else None


def _path(folder: str, name: str) -> str:
    return os.path.join(folder, name)


def make(
    folder: str, uuid: bytes, image: FilePlace, *, intent: int, region_bits: int, size: int, log_path: bytes
) -> None:
    """Makes the live files of a session, with no buffers yet, in a folder that the caller holds.

    Args:
        folder: where.
        uuid: of the session, 16 bytes.
        image: the image itself.
        intent: as in the session.
        region_bits: as in the session.
        size: of the disk, bytes.
        log_path: of the intent log, raw bytes.

    Raises:
        StorageError: they cannot be made, or there is not enough memory.
        UnsupportedError: marks are not known to be atomic on this machine.
    """
    machine = os.uname().machine
    if machine not in live.MACHINES:
        raise UnsupportedError(folder, f"marks need atomic words of a kind that is not known of {machine}")
    now = time.time_ns()
    values: dict[str, Any] = dict.fromkeys((field.name for field in CONTROL.fields), 0)
    values |= {name: bytes(CONTROL.field(name).size) for name in ("reserved1", "reserved2")}
    values |= {"magic": live.CONTROL_MAGIC, "order": live.CONTROL_ORDER, "machine": live.MACHINES[machine]}
    values |= {"version": live.CONTROL_VERSION, "uuid": uuid, "region_bits": region_bits, "intent": intent}
    values |= {f"image_{name}": value for name, value in image._asdict().items()}
    values |= {"size": size, "heartbeat": now, "event": now, "clock": max(clock_offset(), 0)}
    values |= {"patience": live.PATIENCE_NS}
    head = CONTROL.build(**values).ljust(live.LOG_PATH, b"\0")
    logged = geometry.ceil_div(geometry.granules(size, 1 << region_bits), 64) * 8
    areas = [(live.LOGGED, logged), (live.LOGGED + live.MAX_REGIONS // 8, logged)]
    whole = head + log_path.ljust(live.SLOTS - live.LOG_PATH, b"\0")
    livefs.create_live(_path(folder, "bits"), ARENA.build(magic=live.ARENA_MAGIC, uuid=uuid), live.PAGE)
    livefs.create_live(_path(folder, "markers"), ARENA.build(magic=live.MARKERS_MAGIC, uuid=uuid), live.PAGE)
    livefs.create_live(_path(folder, "control"), whole, live.CONTROL_BYTES, areas)


class _Changing:
    """Bits that others may set meanwhile: each part is a copy, so that it stays as it was looked at."""

    def __init__(self, nbits: int, words: bits.Words) -> None:
        self.nbits, self._words = nbits, words

    def part(self, first: int, end: int) -> Part:
        """See `Content.part`."""
        part = self._words[first // 64 : geometry.ceil_div(end, 64)]
        return part.copy() if part.any() else False


@dataclass(frozen=True, slots=True)
class Words:
    """The bits of one or several intervals, at one granularity (bytes), for a disk of ``size`` bytes."""

    words: bits.Words
    size: int
    granularity: int

    @property
    def content(self) -> Content:
        """The bits, of which parts are looked at when they are asked for."""
        return _Changing(geometry.granules(self.size, self.granularity), self.words)

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


@dataclass(frozen=True, slots=True)
class Many:
    """Like `Words`, of more bits than are in memory at once."""

    content: Content
    size: int
    granularity: int


def united(parts: Iterable[Words | Many], size: int, granularity: int) -> Content:
    """What any of them has, at that granularity: as it is now, where none of them is large.

    Else whoever looks at a part of it looks at the same part of each of them then.
    """
    nbits, every = geometry.granules(size, granularity), list(parts)
    small = [part for part in every if isinstance(part, Words) and len(part.words) * 64 <= content.LARGE]
    if len(small) == len(every) and nbits <= content.LARGE:
        return Whole(nbits, union(small, size, granularity))
    found: Content = Uniform(nbits, False)
    for part in every:
        found = Combined(found, rescaled(part.content, part.size, part.granularity, granularity), bits.OR)
    return found


def union(parts: Iterable[Words], size: int, granularity: int) -> bits.Words:
    """What any of them has, at that granularity: new words, of which parts without a bit take no memory."""
    length = geometry.ceil_div(geometry.granules(size, granularity), 64)
    result = np.frombuffer(memory.sparse(max(length, 1) * 8), bits.WORD)[:length]
    # Of a disk of no bytes a writeset has a word all the same.
    bits.union([part.at(granularity)[:length] for part in parts], result)
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
    writesets: dict[int, Words | Many]


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
    with livefs.LiveReader(_path(folder, "control")) as control, livefs.LiveReader(_path(folder, "bits")) as arena:
        for _ in range(_LOOKS):
            head = _head_of(control)
            begins = arena.read(0, ARENA.size)
            if head is None or begins is None or head.uuid != uuid:
                return None
            if bytes(begins) != ARENA.build(magic=live.ARENA_MAGIC, uuid=uuid):
                return None
            current = head.state >> 32
            if not 0 <= current - oldest < live.MAX_INTERVALS:
                return None
            writesets: dict[int, Words | Many] = {}
            for number in range(oldest, current + 1):
                if (words := _read_writeset(control, arena, uuid, number, size)) is not None:
                    writesets[number] = words
            again = _head_of(control)
            # A buffer is recycled only after `recycled` was raised, which is after its descriptor is gone.
            if again is not None and again.recycled == head.recycled:
                return _found(control, head, writesets) if len(writesets) == current - oldest + 1 else None
    return None


def _found(control: livefs.LiveReader, head: Any, writesets: dict[int, Words | Many]) -> Found:
    slots = control.read(live.SLOTS, min(head.high, live.MAX_SLOTS) * SLOT_SIZE, short=True) or b""
    parsed = [SLOT.parse(slots, at) for at in range(0, len(slots), SLOT_SIZE)]
    flights = [
        FLIGHT.parse(slots, at + place)
        for at in range(0, len(slots), SLOT_SIZE)
        for place in range(SLOT.size, SLOT_SIZE, FLIGHT.size)
    ]
    log = (head.state & 0xFFFFFFFF) >> 1
    logged = control.read(live.LOGGED + log % 2 * (live.MAX_REGIONS // 8), live.MAX_REGIONS // 8, short=True)
    return Found(
        poisoned=head.reason if head.reason != live.ENDED else 0,
        current=head.state >> 32,
        heartbeat=head.heartbeat,
        event=max([head.event, *(slot.event for slot in parsed)]),
        in_flight=sum(flight.interval != 0 for flight in flights),
        bare=max((slot.bare for slot in parsed), default=0),
        writes=sum(slot.writes for slot in parsed),
        logged=bits.count(logged) if logged else 0,
        clock=head.clock,
        writesets=writesets,
    )


def is_outdated(folder: str, uuid: bytes, current: int) -> bool:
    """True if a dead tracker has marked in a later interval than the one that its control file has as current.

    A tracker writes the number of an interval into the head of its buffer before it begins. So a mark in such a buffer
    shows that the control file is an old one.
    """
    with livefs.LiveReader(_path(folder, "bits")) as arena:
        at = live.PAGE
        while at + live.PAGE <= arena.size and (head := arena.read(at, WRITESET.size)) is not None:
            found = WRITESET.parse(head)
            if (found.magic, found.uuid) != (live.WRITESET_MAGIC, uuid) or not 0 < found.room <= arena.size:
                return False
            if found.number != live.OPEN and found.number > current:
                begin, end = at + live.PAGE, min(at + live.PAGE + found.room, arena.size)
                while (begin := arena.data_from(begin, end)) < end:  # a hole may be as long as a file can be
                    data = arena.read(begin, min(_PIECE, end - begin), short=True)
                    if data and not bits.all_zero(data):
                        return True
                    begin += _PIECE
            at += live.PAGE + found.room
    return False


def _read_writeset(
    control: livefs.LiveReader, arena: livefs.LiveReader, uuid: bytes, number: int, size: int
) -> Words | Many | None:
    """The bits of an interval, as those of a disk of ``size`` bytes; None if they are not where the descriptor says.

    They may be a larger disk's: the store has yet to be told of the new size.
    """
    data = control.read(live.DESCRIPTORS + number % live.MAX_DESCRIPTORS * DESCRIPTOR.size, DESCRIPTOR.size)
    if data is None:
        return None
    place = DESCRIPTOR.parse(data)
    head = arena.read(place.offset - live.PAGE, WRITESET.size) if place.offset >= live.PAGE else None
    if head is None or place.interval != number + 1:
        return None
    found = WRITESET.parse(head)
    granularity = 1 << min(found.granularity_bits, 63)
    same = (found.magic, found.uuid, found.number) == (live.WRITESET_MAGIC, uuid, number)
    if not same or found.size < size or not geometry.is_granularity(granularity):
        return None
    length = _words_for(found.size, granularity) * 8
    if (place.granularity_bits, place.bytes) != (found.granularity_bits, length) or found.room < length:
        return None
    if place.offset + length > arena.size:
        return None
    nbits = geometry.granules(size, granularity)
    if nbits > content.LARGE:
        try:
            return Many(kept(_InFile(arena, place.offset, nbits)), size, granularity)
        except EOFError:
            return None
    octets = arena.read(place.offset, _words_for(size, granularity) * 8)
    if octets is None:
        return None
    words = np.frombuffer(octets, bits.WORD) if octets else bits.zeros(0)
    bits.mask_tail(words, nbits)
    return Words(words, size, granularity)


class _InFile:
    """The bits of a writeset in a live file, read when they are asked for. An `EOFError` where that has ended."""

    def __init__(self, arena: livefs.LiveReader, offset: int, nbits: int) -> None:
        self.nbits, self._arena, self._offset = nbits, arena, offset

    def part(self, first: int, end: int) -> Part:
        """See `Content.part`."""
        octets = self._arena.read(self._offset + first // 8, geometry.ceil_div(end - first, 64) * 8)
        if octets is None:
            raise EOFError
        words = np.frombuffer(octets, bits.WORD)
        bits.mask_tail(words, end - first)
        return words if words.any() else False


def _words_for(size: int, granularity: int) -> int:
    return geometry.ceil_div(geometry.granules(size, granularity), 64)
