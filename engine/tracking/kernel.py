"""The kernel: how a mark gets into the bits, beside other marks, cuts and saves, and why no mark is lost.

State. All that a mark needs is in one `_State`: the bits of the current writeset, the regions that the current log has,
and the writes in flight. A *swap* replaces the state as a whole. A cut swaps in another writeset, a rotation another
log, growth of the disk both, and the end of the tracker a state that refuses marks. The swapping thread reads the old
bits only after the swap.

    mark   1  read the state            swap   1  replace the state
           2  region not in its log?           2  a cut: wait for the old state's flights to end
              log it, durably                  3  read the old bits
           3  set the bit
           4  the same state still? done.
              no: begin again

Between threads. Step 3 is one assignment to items of a bitarray. That is one call into C, which holds the interpreter's
lock from the first byte read to the last byte written. So when two threads set bits of the same byte, neither undoes
the other's bit, as ``a[i] |= m`` would. While a writeset is current, bits in it are only ever set. On a Python without
that lock (a free-threaded build) the kernel refuses to work.

Between a mark and a swap. If step 4 finds the same state, steps 2 and 3 came before the swap's step 1, and so before
its step 3: the bit is in what the cut ends or the save writes, and its region was in the log before that. If step 4
finds another state, the mark is done again in that one. The bit is then in the older interval, too, which can make a
clean granule dirty, but never a dirty one clean. So when a mark returns, its bit is in a writeset that was current
after the call, and is durable: in a save, or by its region in a log that is newer than that save.
No mark may skip step 2 because its bit is set already. The bit may be another thread's, which set it just after the
snapshot of a save, and is only about to log its region in the new log.

Between a write and a cut. `begin` adds the write to the state's flights, then looks whether the state is still the
same; if not, it moves the write to the new one. So either a write is in the flights before a cut swaps, and the cut
waits for it; or both its bit and its flight are of the new interval. A write marked by `mark` alone has no known end,
so no cut can wait for it.

Between a mark and the end. The end sets the failure, then swaps, then reads the bits to save them. A mark looks for a
failure after its step 1. So either it finds the failure, or its state is the old one: then a mark that is too late for
the save finds another state at step 4.

Within one thread. A signal handler or a finalizer may mark between any two operations of a mark, a swap or a save.
Steps 1 to 4 keep only what they have read of the state, and step 4 sees every swap. A log hands out each place once,
and is replaced as a whole. So a record goes to the old log or to the new one, and never overwrites another. Acts that
take windows apart are not begun in the middle of another act of the same thread: see `Recorder`.

Killed anywhere. The bits are in the shared memory of a tmpfs: what step 3 has set stays set, and needs no second step
to count.

The fast path. The `mark` that users call is a closure, with cells of its own for what steps 1 to 4 use. It serves
writes inside one granule whose region is known to be logged; all others take the slow path, described above. A swap
replaces the cell of the regions first and the cell of the bits last. A mark that has read the old bits, and finds them
unchanged at the end, has set its bit before the swap was over, and its region was in the old log or the new one. A mark
that has read the new bits sees the new regions. Each swap makes a new bitarray over the same memory, so that the cell
of the bits alone tells whether there was a swap.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, SupportsIndex

import numpy as np
from bitarray import bitarray
from numpy.typing import NDArray

from dirtmap.engine.model import bits as kernels
from dirtmap.engine.model.bitmap import as_int64
from dirtmap.engine.session.intent import IntentLog
from dirtmap.engine.session.livefile import BARE, EVENT, IN_FLIGHT, LOGGED, POISONED, WRITES, Control, Flights, Writeset
from dirtmap.fmt.errors import BitmapError, Error, RangeError, SyncError, UnsupportedError, counted

Mark = Callable[[int, int], None]
_Swap = Callable[[bitarray | None, set[int]], None]
# Below that many ranges, marking them one by one is cheaper.
_FEW: Final = 128
_PATIENCE_SECONDS: Final = 0.05  # a waiting cut looks again so often, even if nobody wakes it


class Ticket:
    """A write that has begun; see `Kernel.begin`. A ticket that is destroyed before its write has ended is lost."""

    __slots__ = ("_kernel", "flights", "number", "thread")

    def __init__(self, kernel: Kernel, thread: int | None = None) -> None:
        self._kernel = kernel
        self.number = next(kernel.numbers)
        self.thread = thread  # the thread that will end the write, if it is known
        self.flights: Flights = {}

    def end(self) -> None:
        """See `Kernel.end`."""
        self._kernel.end(self)

    def __del__(self) -> None:
        # Does no more than that, because it may run at any time, in the middle of anything.
        if self.number in self.flights:
            self._kernel.lost.append((self.flights, self.number))


class _State:
    """What marks use until the next swap. Nothing changes but ``logged``, which grows, and ``flights``.

    Attributes:
        writeset: the current writeset.
        bits: a view of its bits.
        flights: the writes that have begun in it and have not ended.
        logged: numbers of the regions that are in the current log.
        region_bits: log2 of the region size in bytes.
    """

    __slots__ = ("bits", "flights", "logged", "region_bits", "writeset")

    def __init__(self, writeset: Writeset, logged: set[int], region_bits: int) -> None:
        self.writeset, self.logged, self.region_bits = writeset, logged, region_bits
        self.bits, self.flights = writeset.view(), writeset.flights


class Kernel:
    """Marks writes to a disk of ``size`` bytes.

    Args:
        where: names the tracker in errors.
        size: of the disk, in bytes.
        writeset: the first one.
        region_bits: log2 of the region size in bytes; a region is no smaller than a granule.
        log: the intent log; None if nothing is to be logged.
        control: the tracker's control file.

    Attributes:
        mark: see `Tracker.mark`.
        failure: why every further call is refused, or None.
        numbers: counts the tickets.
        lost: lost tickets, each as its flights and its number in them.
        guard: lock to change the log or the state. A mark whose region is logged never takes it.

    Raises:
        UnsupportedError: this Python has no interpreter lock.
    """

    mark: Mark

    def __init__(
        self, where: str, size: int, writeset: Writeset, region_bits: int, log: IntentLog | None, control: Control
    ) -> None:
        if not getattr(sys, "_is_gil_enabled", lambda: True)():
            raise UnsupportedError(where, "this Python has no interpreter lock, which marks rely on")
        self.where, self.size = where, size
        self.failure: Error | None = None
        self._log, self._control = log, control.fields
        self._next: tuple[IntentLog, int] | None = None  # see `branch`
        self.guard = threading.RLock()
        self._state = _State(writeset, set(), region_bits)
        self.numbers = itertools.count()
        self.lost: list[tuple[Flights, int]] = []
        self._flying: set[int] = set()
        self._landed = threading.Condition()
        self._waiting = 0
        self._swap_fast: _Swap
        self._known: set[int] = set()
        self._install()

    # For the tool.

    def begin(self, offset: SupportsIndex, length: SupportsIndex, ticket: Ticket | None = None) -> Ticket:
        """Marks a write that is about to begin. Every later cut waits for its `end`.

        Args:
            offset: in bytes from the start of the disk.
            length: in bytes.
            ticket: a new one made by the caller, who can end it even if this call is interrupted.

        Raises:
            RangeError: the range is not inside the disk; nothing is marked.
            StorageError: its region could not be logged; the write must not be made.
        """
        offset, end = self._range(offset, length)
        ticket, control = ticket or Ticket(self), self._control
        number, flight = ticket.number, (offset, end, ticket.thread)
        try:
            self._flying.add(number)
            while True:
                state = self._state
                ticket.flights = state.flights  # first: whatever happens in between, `end` finds it there
                state.flights[number] = flight
                if state is self._state:
                    break
                state.flights.pop(number, None)
            self._set(offset, end)
        except BaseException:
            self.end(ticket)
            raise
        control[IN_FLIGHT] = len(self._flying)
        control[EVENT] = time.time_ns()
        control[WRITES] += 1  # not atomic: two threads may count one write; it is only shown to users
        return ticket

    def end(self, ticket: Ticket) -> None:
        """Says that the write has ended, successfully or not. A second call does no harm."""
        control = self._control
        ticket.flights.pop(ticket.number, None)
        self._flying.discard(ticket.number)
        control[EVENT] = time.time_ns()
        control[IN_FLIGHT] = len(self._flying)
        if self._waiting:
            with self._landed:
                self._landed.notify_all()

    def mark_many(self, offsets: Iterable[SupportsIndex], lengths: Iterable[SupportsIndex]) -> None:
        """Like `mark` for each offset and its length, in bytes, all or none. Errors as `begin`."""
        offset, length = as_int64(offsets), as_int64(lengths)
        if offset.shape != length.shape:
            raise RangeError(self.where, f"{counted(len(offset), 'offset')} and {counted(len(length), 'length')}")
        if offset.size and (
            int(offset.min()) < 0 or int(length.min()) < 0 or bool(np.any(offset > self.size - length))
        ):
            bad = int(np.flatnonzero((offset < 0) | (length < 0) | (offset > self.size - length))[0])
            self._range(offset[bad], length[bad])  # raises
        self.require_usable()
        self._control[BARE] = 1
        if len(offset) < _FEW:
            for one, size in zip(offset.tolist(), length.tolist(), strict=True):
                self._set(one, one + size)
            return
        if int(length.min()) == 0:
            offset, length = offset[length > 0], length[length > 0]
        last = offset + length
        last -= 1
        while True:
            state = self._state
            self.require_usable()  # behind the read of the state: see the module's head, "Between a mark and the end"
            if not self._log_many(state, offset, last):
                continue
            self._set_many(state, offset, last)
            if state is self._state:
                return

    # For the tracker; called by one thread at a time.

    def swap(self, writeset: Writeset | None = None, *, rotate: bool = False) -> Writeset:
        """Replaces the state: with another writeset, another log, or both; see the head of the module.

        Returns:
            The writeset that was current.
        """
        with self.guard:
            return self._swap(writeset, rotate)

    # While the disk grows. The writeset that marks go to is the larger disk's already, and as the store's records are
    # told of the new size one after the other, those that are not have the old log, and those that are the new one.

    def branch(self, writeset: Writeset, log: IntentLog, region_bits: int) -> Writeset:
        """Has marks go to another writeset, and their regions to another log as well as to the current one.

        Args:
            writeset: of a larger disk.
            log: of the larger disk, with no records.
            region_bits: log2 of its region size, which is not below the current one.

        Returns:
            The writeset that was current.
        """
        with self.guard:
            if self._log:
                self._next = log, region_bits - self._state.region_bits
            return self._swap(writeset, False, logged=set())

    def unbranch(self) -> None:
        """Undoes `branch`, but for the writeset: the disk has not grown."""
        with self.guard:
            self._next = None

    def settle(self, size: int, region_bits: int) -> None:
        """Ends what `branch` began: the disk has ``size`` bytes, and only the new log counts."""
        with self.guard:
            logged = {region >> region_bits - self._state.region_bits for region in self._state.logged}
            if self._next:
                self._log, self._next = self._next[0], None
            self.size = size
            self._control[LOGGED] = len(logged)
            self._swap(None, False, logged=logged, region_bits=region_bits)

    @contextlib.contextmanager
    def touching(self) -> Iterator[None]:
        """Around a change to the image by the tracker itself, which recovery then takes for a write of its own."""
        number, control = next(self.numbers), self._control
        self._flying.add(number)
        control[IN_FLIGHT] = len(self._flying)
        control[EVENT] = time.time_ns()
        try:
            yield
        finally:
            self._flying.discard(number)
            control[EVENT] = time.time_ns()
            control[IN_FLIGHT] = len(self._flying)

    def refuse_own(self, writesets: Iterable[Writeset]) -> None:
        """Refuses to wait for a write that cannot end while this thread waits.

        Raises:
            BitmapError: one of the writes in flight is this thread's own.
        """
        me = threading.get_ident()
        for writeset in writesets:
            if any(thread == me for _, _, thread in list(writeset.flights.values())):
                raise BitmapError(self.where, "a cut inside a write of the same thread would wait for itself")

    def drain(self, writesets: Iterable[Writeset]) -> None:
        """Waits for the end of the writes that began in these writesets, none of which is current any more.

        Nobody can end a write whose ticket is lost, say by Ctrl-C. It is not waited for, but marked again in the new
        interval: so it is in either interval to which it may belong.

        Raises:
            Error: the tracker's failure, if it ends meanwhile.
        """
        with self._landed:
            self._waiting += 1
            try:
                while any(writeset.flights for writeset in writesets):
                    while self.lost:
                        flights, number = self.lost[0]
                        if flight := flights.get(number):
                            self._set(flight[0], flight[1])
                        flights.pop(number, None)
                        self._flying.discard(number)
                        self._control[IN_FLIGHT] = len(self._flying)
                        del self.lost[0]
                    self._landed.wait(_PATIENCE_SECONDS)
                    self.require_usable()
            finally:
                self._waiting -= 1

    def refuse(self, failure: Error) -> None:
        """Makes every further call fail with this error, or with that of an earlier failure."""
        with self.guard:
            self.failure = self.failure or failure
            self._swap(None, False)

    def abandon(self, failure: Error) -> None:
        """Like `refuse`, but in a forked child, and without the parent's locks and control file.

        Another thread of the parent may have held the locks, which nobody gives back here. The control file says what
        the parent does, so the child must not write to it.
        """
        self.guard, self._landed, self.failure = threading.RLock(), threading.Condition(), failure
        self._control = memoryview(bytearray(len(self._control) * 8)).cast("Q")
        self._swap(None, False)

    def require_usable(self) -> None:
        """Refuses a call once there is a failure.

        Raises:
            Error: a copy of the failure; raising the same object again would gather all tracebacks in it.
        """
        if failure := self.failure:
            raise type(failure)(failure.where, failure.what)

    @property
    def logged(self) -> int:
        """Number of regions in the current log."""
        return len(self._state.logged)

    @property
    def in_flight(self) -> int:
        """Number of writes that have begun and not ended, without those whose tickets are lost."""
        return len(self._flying) - len(self.lost)

    @property
    def bare(self) -> bool:
        """True once a write was marked without `begin`, so that its end is not known."""
        return bool(self._control[BARE])

    # How.

    def _swap(
        self,
        writeset: Writeset | None,
        rotate: bool,
        *,
        logged: set[int] | None = None,
        region_bits: int | None = None,
    ) -> Writeset:
        old = self._state
        if rotate and self._log:
            self._log.rotate()
            self._control[LOGGED] = 0
        state = _State(
            writeset or old.writeset,
            set() if rotate else old.logged if logged is None else logged,
            old.region_bits if region_bits is None else region_bits,
        )
        if rotate or self.failure or logged is not None:
            self._known = set()
        if (state.writeset.granularity_bits, state.region_bits) != (old.writeset.granularity_bits, old.region_bits):
            self._swap_fast(bitarray(), set())  # a `mark` bound earlier takes the slow path from now on
            self._state = state
            self._install()
        else:
            self._swap_fast(None, self._known)
            self._state = state
            self._swap_fast(state.bits, self._known)
        return old.writeset

    def _install(self) -> None:
        """Makes the fast path, `mark`, for the current state."""
        state = self._state
        shift = state.writeset.granularity_bits
        self._known = set()
        self.mark, self._swap_fast = _make_mark(
            state.bits, self._known, shift, state.region_bits - shift, self._mark_slowly
        )

    def _mark_slowly(self, offset: SupportsIndex, length: SupportsIndex) -> None:
        offset, end = self._range(offset, length)
        self._control[BARE] = 1
        known = self._known
        self._set(offset, end)
        # The fast path does not look at the size of the disk. So a region that ends with a granule cut short must
        # never become known to it.
        state = self._state  # where it was replaced by one of other regions, so was what is known
        whole = self.size >> state.writeset.granularity_bits
        region, per_region = offset >> state.region_bits, state.region_bits - state.writeset.granularity_bits
        if end > offset and self.failure is None and (region + 1) << per_region <= whole:
            with self.guard:
                if known is self._known and region in self._state.logged:
                    known.add(region)

    def _set(self, offset: int, end: int) -> None:
        """Steps 1 to 4 of the module's head."""
        if offset == end:
            self.require_usable()
            return
        while True:
            state = self._state
            if self.failure:
                self.require_usable()
            first_region, last_region = offset >> state.region_bits, (end - 1) >> state.region_bits
            for region in range(first_region, last_region + 1):
                if region not in state.logged and not self._log_regions(state, range(region, last_region + 1)):
                    break
            else:
                shift = state.writeset.granularity_bits
                state.bits[offset >> shift : ((end - 1) >> shift) + 1] = 1
                if state is self._state:
                    return

    def _log_regions(self, state: _State, regions: Iterable[int]) -> bool:
        """Makes regions durable in the log of that state. False if the state has been replaced."""
        with self.guard:
            self.require_usable()
            if state is not self._state:
                return False
            missing = [region for region in regions if region not in state.logged]
            if missing and self._log:
                try:
                    self._log.append(missing)
                    if self._next:
                        log, shift = self._next
                        log.append([region >> shift for region in missing])
                except SyncError as error:
                    self._fail(error)
                    raise
            state.logged.update(missing)
            self._control[LOGGED] = len(state.logged)
            return True

    def _fail(self, error: SyncError) -> None:
        """Makes every further call fail, and recovery distrust the live files and the process. Needs the guard."""
        self._control[POISONED] = 1
        self.failure = SyncError(self.where, f"not used any more after a failed sync ({error})")
        self._swap(None, False)

    def poison(self, error: SyncError) -> None:
        """Ends the tracker after a failed sync of the store, as after one of the log, even if it is about to end."""
        with self.guard:
            if not isinstance(self.failure, SyncError):
                self._fail(error)

    def beat(self, log: IntentLog, time: int) -> None:
        """Writes a heartbeat to the log. Errors as `IntentLog.beat`; a failed sync poisons the tracker.

        Takes the guard, because the kernel reports a failed write only once, to the first sync of that file. What a
        mark has written must be reported to that mark's own sync.
        """
        with self.guard:
            self.require_usable()
            try:
                log.beat(time)
            except SyncError as error:
                self._fail(error)
                raise

    def _log_many(self, state: _State, offset: NDArray[np.int64], last: NDArray[np.int64]) -> bool:
        words = kernels.zeros((self.size >> state.region_bits) + 1)
        kernels.scatter(words, offset >> state.region_bits, last >> state.region_bits)
        touched = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
        missing = [region for region in touched if region not in state.logged]
        return not missing or self._log_regions(state, missing)

    def _set_many(self, state: _State, offset: NDArray[np.int64], last: NDArray[np.int64]) -> None:
        """Sets the bits in memory of its own, and ORs that memory into the writeset.

        The OR is bitarray's: one call under the interpreter's lock. numpy gives the lock up in long loops; bits that
        other threads set meanwhile, in a word that it has read, would be lost.
        """
        shift = state.writeset.granularity_bits
        # As long as the writeset's bits, which come in whole words.
        words = kernels.zeros(len(state.bits))
        kernels.scatter(words, offset >> shift, last >> shift)
        own = bitarray(buffer=words.data, endian="little")
        into = state.bits
        into |= own

    def _range(self, offset: SupportsIndex, length: SupportsIndex) -> tuple[int, int]:
        offset, length = operator.index(offset), operator.index(length)
        if offset < 0 or length < 0 or offset + length > self.size:
            are = "is" if length == 1 else "are"
            what = f"{counted(length, 'byte')} at {offset} {are} not inside a disk of {counted(self.size, 'byte')}"
            raise RangeError(self.where, what)
        return offset, offset + length


def _make_mark(
    bits: bitarray, known: set[int], shift: int, per_region: int, slowly: Callable[[SupportsIndex, SupportsIndex], None]
) -> tuple[Mark, _Swap]:
    """Makes the fast path, and the function that swaps its cells; that one keeps the bits if it is given None.

    It is a closure because its cells take half the time of an object's attributes.
    """
    granularity = 1 << shift
    inside = granularity - 1

    def mark(offset: int, length: int) -> None:
        """Makes every granule dirty that has a byte in the range; see `Tracker.mark`."""
        into = bits
        try:
            first = offset >> shift
            # No sum: numpy's integers would wrap.
            if 0 < length <= granularity - (offset & inside) and first >> per_region in known:
                into[first] = 1
                if into is bits:
                    return
        except OverflowError:
            pass  # a numpy integer that is too short
        slowly(offset, length)

    def swap(new_bits: bitarray | None, new_known: set[int]) -> None:
        nonlocal bits, known
        known = new_known
        if new_bits is not None:
            bits = new_bits

    return mark, swap
