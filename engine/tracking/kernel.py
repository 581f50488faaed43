"""The kernel: how a process marks; how a tracker begins intervals and logs, and ends.

`marking.h` has the protocol, which SPEC.md, "Marking", describes and argues for; `_marking` is its face in Python. Here
is what they leave to Python: where records go, how acts wait, and what errors say.

Within one thread. A signal handler or a finalizer may mark between any two operations of Python. Of a mark only the
writing of records is Python; a mark that comes in the middle of it logs for itself, and the outer one looks at the
state again. Acts that take windows apart are not begun in the middle of another act of the same thread: see `Recorder`.
"""

from __future__ import annotations

import contextlib
import errno
import operator
import os
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Final, NoReturn, Protocol, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from dirtmap.engine.model import bits as kernels
from dirtmap.engine.model.bitmap import as_int64
from dirtmap.engine.session.intent import IntentLog
from dirtmap.engine.system.process import clock_offset
from dirtmap.engine.tracking import _marking
from dirtmap.engine.tracking._marking import Marks, Ticket, Write
from dirtmap.fmt import live
from dirtmap.fmt.errors import (
    BitmapError,
    Error,
    GoneError,
    LockedError,
    RangeError,
    StorageError,
    SyncError,
    UnsupportedError,
    counted,
)
from dirtmap.fmt.parsers.live import CONTROL

__all__ = ["Kernel", "Marking", "Ticket", "Write"]

# How long what waits for other processes sleeps between two looks, at first and at most.
_PAUSES: Final = 20e-6, 500e-6
_PROBE_SECONDS: Final = 0.001  # after so long it looks whether who is waited for is dead
_MOST_LOGS: Final = (1 << 31) - 2  # of a session: the state has 31 bits for the number
_FEW: Final = 128  # ranges; fewer are marked one by one
_DENSE: Final = 8  # times that ranges cover the disk on average, from which on they are joined first


def _index(name: str) -> int:
    return CONTROL.field(name).offset // 8


HEARTBEAT, EVENT, CLOCK = map(_index, ("heartbeat", "event", "clock"))
_WHYS: Final = {
    _marking.DAMAGED: "the live files are not as described",
    _marking.NO_SLOT: f"more threads mark, or more writes are in flight, than the live files have room for: "
    f"{live.MAX_SLOTS} threads, or writes of {live.MAX_FLIGHTS} for each of them",
    _marking.FOREIGN: "no live files of this version and machine",
}


class Pause:
    """Waits between looks at what other threads and processes do, longer and longer."""

    def __init__(self) -> None:
        self._next, self._begun = _PAUSES[0], time.monotonic()
        self._probe = self._begun + _PROBE_SECONDS

    def __call__(self) -> bool:
        """Sleeps. Returns whether the next look should see who is dead, which takes system calls."""
        time.sleep(self._next)
        self._next = min(2 * self._next, _PAUSES[1])
        now = time.monotonic()
        if now < self._probe:
            return False
        self._probe = now + 10 * _PROBE_SECONDS
        return True


class Log(Protocol):
    """Where records of regions go: an intent log, or its file."""

    def write(self, offset: int, data: bytes) -> object:
        """Writes there. Errors as `File.write`."""

    def sync(self) -> object:
        """Makes durable what was written. Errors as `File.sync`."""


class Marking(Marks):
    """The marks of a session, in this process.

    Args:
        where: names the tracker in errors.
        folder: of the live files.
        log: where records go; None for one that is set before the first mark.

    Attributes:
        failure: why every further call is refused, or None.
        fields: the numbers in the control file's head, to be indexed with `HEARTBEAT` and its like.
        guard: lock around the log.

    Raises:
        StorageError: the live files cannot be used.
    """

    def __init__(self, where: str, folder: str, log: Log | None) -> None:
        self.where, self.folder, self.log_file = where, folder, log
        self.failure: Error | None = None
        self.guard = threading.RLock()
        self.attach(os.fsencode(folder), self.guard)
        self.fields = memoryview(self.head()).cast("Q")

    # What marking.h leaves to Python.

    def _write(self, offset: int, data: bytes) -> None:
        assert self.log_file
        self.log_file.write(offset, data)

    def _sync(self) -> None:
        assert self.log_file
        try:
            self.log_file.sync()
        except SyncError as error:
            self.poison(error)
            raise

    def _pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def _fail_to_attach(self, code: int) -> NoReturn:
        if code in (_marking.DEAD, _marking.REFUSED):
            what = "nobody marks in this session any more; it has ended, or is to be recovered"
            raise GoneError(self.folder, what)
        if code == _marking.HELD:
            raise LockedError(self.folder, "this session is being ended")
        self._fail(code, 0, 0)

    def _fail(self, code: int, offset: SupportsIndex, length: SupportsIndex) -> NoReturn:
        """Raises the error for what marking.h has returned; 0 where a write is begun twice."""
        if code == 0:
            raise BitmapError(self.where, "a write can be begun once; ask for another")
        if code in (_marking.RANGE, _marking.REFUSED):
            self.require_usable()
            self._range(offset, length)
            raise RangeError(self.where, "a write begins or ends where no disk can")
        if code == _marking.FORKED:
            raise StorageError(self.where, "a tracker cannot be used in a forked process")
        if code == _marking.HELD:
            raise LockedError(self.folder, "another process keeps this session, or has closed its gate")
        if code == _marking.OWN:
            what = "asked for in the middle of another act of the same thread, as in a signal's handler"
            raise BitmapError(self.where, what)
        if code in _WHYS:
            error = UnsupportedError if code == _marking.FOREIGN else StorageError
            raise error(self.folder, _WHYS[code])
        raise StorageError(self.folder, f"live file: {os.strerror(code)}")

    def _range(self, offset: SupportsIndex, length: SupportsIndex) -> None:
        offset, length, size = operator.index(offset), operator.index(length), self.size
        if offset < 0 or length < 0 or offset + length > size:
            are = "is" if length == 1 else "are"
            what = f"{counted(length, 'byte')} at {offset} {are} not inside a disk of {counted(size, 'byte')}"
            raise RangeError(self.where, what)

    # For the tool, beside what `Marks` has.

    def mark_many(self, offsets: Iterable[SupportsIndex], lengths: Iterable[SupportsIndex]) -> None:
        """Like `mark` for each offset and its length, in bytes, all or none. Errors as `begin`."""
        offset, length = as_int64(offsets), as_int64(lengths)
        if offset.shape != length.shape:
            raise RangeError(self.where, f"{counted(len(offset), 'offset')} and {counted(len(length), 'length')}")
        self.require_usable()
        size = self.size
        if len(offset) > _FEW and int(length.max()) > 1 << 20 and float(length.sum(dtype=np.float64)) > _DENSE * size:
            if (bad := kernels.first_outside(offset, length, size)) is not None:
                self._range(offset[bad], length[bad])
            # Each granule would be marked many times.
            offset, length = _joined(offset, length)
        self.mark_arrays(np.ascontiguousarray(offset), np.ascontiguousarray(length))

    def leave(self, at_once: bool) -> None:
        """Gives up all locks; see `Marks.leave`."""
        super().leave(at_once)
        self.fields = memoryview(bytearray(self.fields)).cast("Q")  # a view of the mapping is a circle: it would stay

    def require_usable(self) -> None:
        """Refuses a call once there is a failure.

        Raises:
            Error: a copy of the failure; raising the same object again would gather all tracebacks in it.
        """
        if self.failure is None and (why := self.refused) is not None:
            if why == live.ENDED or why == 0:
                self.failure = StorageError(self.where, "the tracker has ended")
            else:
                what = f"not used any more after a failed sync of another process ({os.strerror(why)})"
                self.failure = SyncError(self.where, what)
        if failure := self.failure:
            raise type(failure)(failure.where, failure.what)

    def poison(self, error: SyncError) -> None:
        """Ends the session after a failed sync, even if it is about to end; recovery then distrusts the live files."""
        if not isinstance(self.failure, SyncError):
            self.failure = SyncError(self.where, f"not used any more after a failed sync ({error})")
        self.refuse(errno.EIO)

    def give_sign(self) -> None:
        """Writes a heartbeat. If the clock was set back, times from before that mean nothing any more."""
        self.sign(time.time_ns(), max(clock_offset(), 0))


class Kernel(Marking):
    """The marks of a tracker, which keeps the session."""

    intent_log: IntentLog

    def keep_with(self, log: IntentLog) -> None:
        """Becomes the session's keeper, whose records and heartbeats go to that log.

        Raises:
            LockedError: it has another one.
        """
        self.keep()
        self.log_file = self.intent_log = log

    def rotate(self) -> None:
        """Begins the next log, which is empty. The caller has seen to it that the one before this counts no more."""
        number, pause, probe = self.log, Pause(), False
        if number >= _MOST_LOGS:
            raise StorageError(self.where, "has saved as often as one session can; end the tracker, and begin anew")
        while number and self.logging(number - 1, probe):
            probe = pause()
            self.require_usable()
        self.clear_logged(number + 1)
        self.swap(2)

    def drain(self, before: int) -> None:
        """Waits for the end of the writes that began in earlier intervals than that one, which is the current one.

        Nobody will end a write whose ticket is lost, say by Ctrl-C, or whose process is dead. It is not waited for, but
        marked again in the current interval: so it is in either interval to which it may belong.

        Raises:
            Error: the tracker's failure, if it ends meanwhile; or the mark failed.
        """
        pause, probe = Pause(), False
        while self.flying(before, probe):
            probe = pause()
            self.require_usable()

    def refuse_own(self) -> None:
        """Refuses to wait for a write that cannot end while this thread waits.

        Raises:
            BitmapError: one of the writes in flight is this thread's own.
        """
        if self.has_own():
            raise BitmapError(self.where, "a cut inside a write of the same thread would wait for itself")

    @contextlib.contextmanager
    def touching(self) -> Iterator[None]:
        """Around a change to the image by the tracker itself, which recovery then takes for a write of its own."""
        with self.write(0, 0):
            yield

    def fail(self, failure: Error) -> None:
        """Makes every further call fail, in any process; here with this error, or with that of an earlier failure."""
        self.failure = self.failure or failure
        self.refuse(live.ENDED)

    def abandon(self, failure: Error) -> None:
        """Makes every call fail in a forked child, without the parent's locks. Marks fail there by themselves."""
        self.guard, self.failure = threading.RLock(), failure

    def beat(self, time: int) -> None:
        """Writes a heartbeat to the log. Errors as `IntentLog.beat`; a failed sync poisons the tracker.

        Takes the guard, because the kernel reports a failed write only once, to the first sync of that file. What a
        mark has written must be reported to that mark's own sync.
        """
        with self.guard:
            self.require_usable()
            try:
                self.intent_log.beat(time)
            except SyncError as error:
                self.poison(error)
                raise


def _joined(offset: NDArray[np.int64], length: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The same bytes, as ranges that neither overlap nor touch."""
    some = length > 0
    offset, length = offset[some], length[some]
    order = np.argsort(offset)
    starts, ends = offset[order], np.maximum.accumulate((offset + length)[order])
    apart = starts[1:] > ends[:-1]
    starts, ends = starts[np.append(True, apart)], ends[np.append(apart, True)]
    return starts, ends - starts
