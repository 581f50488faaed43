"""`Arena`: the memory of writesets: buffers in the live file `bits`, which are used again and again.

    0       4096                              the file only grows; buffers follow one another
    | head  | page, bits ... | page, bits ... |

A buffer is *clean* when it is ready for an interval to come, in use for one interval, or *free*. A free one has bits of
an interval that is saved. It is wiped before it is used again; those that are not likely to be needed soon give their
memory back. A marker that was stopped in the middle of a mark may still touch the buffer that it knew, long after its
interval is over. It then finds that the state is another one, so at worst a bit more is set there than has to be; but
the memory of such a buffer must not be given back.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from dirtmap.engine.model import bits
from dirtmap.engine.tracking.kernel import Kernel
from dirtmap.fmt import geometry, live
from dirtmap.fmt.geometry import align_up
from dirtmap.fmt.structures.live import WRITESET

SPARES = 2  # with one, a second cut soon after another waits until one more is made


@dataclass(eq=False, slots=True)
class Buffer:
    """A part of the arena.

    Attributes:
        offset: of its bits in the file, bytes.
        room: bytes that it has, whole pages.
        clean: it has no bits.
        empty: its memory was given back.
    """

    offset: int
    room: int
    clean: bool = True
    empty: bool = False


class Writeset:
    """The bits of one interval, in a buffer.

    Attributes:
        number: of the interval.
        size: of the disk, in bytes.
        granularity_bits: log2 of the bytes of the disk that one bit stands for.
        buffer: where they are.
        words: the bits as words: a read-only view, which shows later marks as well.
    """

    def __init__(self, kernel: Kernel, number: int, size: int, granularity_bits: int, buffer: Buffer) -> None:
        self.number, self.size, self.granularity_bits, self.buffer = number, size, granularity_bits, buffer
        self.words: bits.Words = np.frombuffer(
            kernel.view(buffer.offset, octets_for(size, granularity_bits)), bits.WORD
        )


def octets_for(size: int, granularity_bits: int) -> int:
    """How many bytes the bits of a disk take, in whole words, at least one."""
    return max(geometry.ceil_div(geometry.granules(size, 1 << granularity_bits), 64), 1) * 8


class Arena:
    """The buffers of a tracker. One thread at a time.

    Args:
        kernel: of the tracker.
        uuid: of the session, 16 bytes.
    """

    def __init__(self, kernel: Kernel, uuid: bytes) -> None:
        self._kernel, self._uuid, self._end = kernel, uuid, live.PAGE
        self._free: list[Buffer] = []

    def adopt(self, oldest: int, current: int) -> dict[int, Writeset] | None:
        """Takes over the buffers of a keeper that has died: those of these intervals are in use, and others free.

        Args:
            oldest: the first interval that is not saved.
            current: the current one.

        Returns:
            The writesets by number; None if one is missing, or is not as its header says.
        """
        # A predecessor that died behind a save may have left descriptors of what the save has made free.
        for number in range(max(current - live.MAX_DESCRIPTORS + 1, 0), oldest):
            self._kernel.withdraw(number)
        found, octets = {}, os.path.getsize(os.path.join(self._kernel.folder, "bits"))
        places = {number: self._kernel.described(number) for number in range(oldest, current + 1)}
        while self._end + live.PAGE <= octets:
            head = WRITESET.parse(bytes(self._kernel.view(self._end, WRITESET.size)))
            mine = (head.magic, head.uuid) == (live.WRITESET_MAGIC, self._uuid)
            if not mine or not 0 < head.room <= octets - self._end - live.PAGE or head.room % live.PAGE:
                break  # the keeper died while it made this one
            buffer = Buffer(self._end + live.PAGE, head.room, clean=False)
            self._end += live.PAGE + head.room
            place = (buffer.offset, head.granularity_bits, octets_for(head.size, head.granularity_bits))
            if places.get(head.number) == place and place[2] <= buffer.room:
                found[head.number] = Writeset(self._kernel, head.number, head.size, head.granularity_bits, buffer)
            else:
                self._free.append(buffer)
                self._release(buffer)
        return found if len(found) == len(places) else None

    def prepare(self, size: int, granularity_bits: int, count: int = SPARES) -> None:
        """Sees to it that so many writesets of that shape can be made at once. Errors as `take`."""
        while not self.is_ready(size, granularity_bits, count):
            buffer = self._made(octets_for(size, granularity_bits))
            self._free.append(buffer)

    def is_ready(self, size: int, granularity_bits: int, count: int = SPARES) -> bool:
        """True if `prepare` has nothing to do."""
        room = align_up(octets_for(size, granularity_bits), live.PAGE)
        return sum(buffer.clean and buffer.room == room for buffer in self._free) >= count

    def take(self, number: int, size: int, granularity_bits: int) -> Writeset:
        """Makes the writeset of an interval that has yet to begin.

        Raises:
            StorageError: there is no memory for it.
        """
        octets = octets_for(size, granularity_bits)
        room = align_up(octets, live.PAGE)
        fit = [buffer for buffer in self._free if buffer.clean and buffer.room == room]
        buffer = fit[0] if fit else self._made(octets)
        if fit:
            self._free.remove(buffer)
        writeset = Writeset(self._kernel, number, size, granularity_bits, buffer)
        self._label(buffer, number, size, granularity_bits)
        buffer.clean = False
        self._kernel.describe(number, buffer.offset, granularity_bits, octets)
        return writeset

    def give_back(self, writeset: Writeset) -> None:
        """Takes back the buffer of a writeset that nobody needs any more: its descriptor is withdrawn."""
        self._free.append(writeset.buffer)
        alike = [buffer for buffer in self._free if buffer.room == writeset.buffer.room and not buffer.empty]
        alike.sort(key=lambda buffer: buffer.clean)
        for buffer in alike[:-SPARES]:
            self._release(buffer)

    def release_others(self, size: int, granularity_bits: int) -> None:
        """Gives back the memory of free buffers of another shape than the one that is now in use."""
        room = align_up(octets_for(size, granularity_bits), live.PAGE)
        for buffer in self._free:
            if buffer.room != room:
                self._release(buffer)

    def _release(self, buffer: Buffer) -> None:
        if not buffer.empty and not self._kernel.is_seen(buffer.offset):
            self._kernel.release(buffer.offset, buffer.room)
            buffer.empty, buffer.clean = True, False

    def _made(self, octets: int) -> Buffer:
        """A clean buffer of that room: one that is free, wiped; else a new one."""
        room = align_up(octets, live.PAGE)
        alike = [buffer for buffer in self._free if buffer.room == room and not buffer.clean]
        for buffer in sorted(alike, key=lambda one: one.empty):
            self._kernel.reserve(buffer.offset, room)
            self._kernel.wipe(buffer.offset, room)
            buffer.clean, buffer.empty = True, False
            self._free.remove(buffer)
            return buffer
        buffer = Buffer(self._end + live.PAGE, room)
        self._kernel.reserve(self._end, live.PAGE + room)
        self._label(buffer, live.OPEN, 0, 0)
        self._end += live.PAGE + room
        return buffer

    def _label(self, buffer: Buffer, number: int, size: int, granularity_bits: int) -> None:
        head = WRITESET.build(
            magic=live.WRITESET_MAGIC,
            uuid=self._uuid,
            number=number,
            size=size,
            granularity_bits=granularity_bits,
            room=buffer.room,
        )
        self._kernel.put(buffer.offset - live.PAGE, head)
