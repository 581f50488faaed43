"""QEMU's image locks: who may read and write an image while others have it open.

QEMU takes shared open-file-description locks on single bytes of the image and tests whether others hold any:

    byte 100 + p: "I use permission p"        byte 200 + p: "I do not share permission p"
    p: 0 consistent read, 1 write, 2 write unchanged, 3 resize, 4 graph modification

    writer    takes 100 101 103 201 203   tests 200 201 203 (does anyone not share what I use?)
                                                and 101 103 (does anyone use what I do not share?)
    reader    takes 100                   tests 101
    keeper    takes 100 201 203           tests 200 101 103
    -U        takes 100                   tests nothing

A reader of ours takes less than one of QEMU's. If it took 201 and 203, a virtual machine that starts meanwhile would
fail. That is what a keeper is for: it reads for long, and nobody may write meanwhile. It is a reader as QEMU has it.
Source: QEMU block/file-posix.c, raw_apply_lock_bytes and raw_check_lock_bytes.

Byte 300 is for processes of ours. QEMU does not look at it. A writer has it alone while it holds or tries the bytes
above, so two waiting writers never mistake each other's attempts for somebody who has the image open. Byte 301 is the
queue for byte 300: everybody has to take it first, and whoever waits keeps it. So nobody overtakes the one who waits.
Readers share byte 300. So a reader waits for a writer of ours, which is done in a moment. If QEMU writes, it fails at
once.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dirtmap.engine.system import order
from dirtmap.engine.system.file import File
from dirtmap.engine.system.order import Rank
from dirtmap.fmt.errors import LockedError, UnsupportedError

_USE, _UNSHARE = 100, 200
_READ, _WRITE, _RESIZE = 0, 1, 3
_WRITER_TAKES = (_USE + _READ, _USE + _WRITE, _USE + _RESIZE, _UNSHARE + _WRITE, _UNSHARE + _RESIZE)
_WRITER_TESTS = (_UNSHARE + _READ, _UNSHARE + _WRITE, _UNSHARE + _RESIZE, _USE + _WRITE, _USE + _RESIZE)

_KEEPER_TAKES = (_USE + _READ, _UNSHARE + _WRITE, _UNSHARE + _RESIZE)
_KEEPER_TESTS = (_UNSHARE + _READ, _USE + _WRITE, _USE + _RESIZE)

_QUEUE = 300

PATIENCE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Locking:
    """How locks are taken. A host has one such value and hands it down to everything that takes a lock.

    Attributes:
        wait: seconds to wait for whoever holds an image or a store; 0 does not wait.
        lock: False does without locks on a file system on which others would not see them. Then the caller knows that
            nobody else uses the file.
    """

    wait: float = PATIENCE_SECONDS
    lock: bool = True


USUAL = Locking()
UNLOCKED = Locking(lock=False)  # for reads that may happen whatever others do


class _Line:
    """The threads of this process that wait for one file. The first of them has its turn."""

    def __init__(self) -> None:
        self._moved = threading.Condition()
        self._threads: deque[object] = deque()

    def join(self, ticket: object) -> None:
        with self._moved:
            self._threads.append(ticket)

    def is_first_by(self, ticket: object, deadline: float) -> bool:
        with self._moved:
            while self._threads[0] is not ticket:
                if (left := deadline - time.monotonic()) <= 0:
                    return False
                self._moved.wait(min(left, 0.1))
            return True

    def leave(self, ticket: object) -> None:
        with self._moved:
            self._threads.remove(ticket)
            self._moved.notify_all()


_lines: weakref.WeakValueDictionary[str, _Line] = weakref.WeakValueDictionary()
_lines_guard = threading.RLock()


def _forget_lines() -> None:
    """Empties the lines in a forked child, which does not have the threads that stand in them."""
    global _lines, _lines_guard
    _lines, _lines_guard = weakref.WeakValueDictionary(), threading.RLock()


os.register_at_fork(after_in_child=_forget_lines)


def pause() -> None:
    """Waits between two attempts at a lock: 1 to 10 ms at random, so that two processes do not try in step."""
    time.sleep(0.001 + 0.009 * os.urandom(1)[0] / 255)  # the module random takes longer to import than this sleeps


@contextlib.contextmanager
def turn(rank: Rank, path: str, locking: Locking, refusal: Callable[[], LockedError]) -> Iterator[float]:
    """Lets the threads of this process take the lock of a file one after the other.

    The block takes the lock, holds it, and gives it up.

    Args:
        rank: of the lock.
        path: of the file, absolute.
        locking: how long to wait.
        refusal: makes the error if the turn does not come in time.

    Yields:
        The deadline for waiting for other processes, as `time.monotonic` tells the time.

    Raises:
        LockedError: as ``refusal`` makes it. If this thread itself has the lock, at once.
    """
    if order.is_held_here(rank, path):
        raise refusal()
    deadline = time.monotonic() + locking.wait
    with _lines_guard:
        line = _lines.setdefault(path, _Line())
    with order.holding(rank, path):
        ticket = object()
        line.join(ticket)
        try:
            if not line.is_first_by(ticket, deadline):
                raise refusal()
            yield deadline
        finally:
            line.leave(ticket)


@contextlib.contextmanager
def reading(
    file: File, *, force_share: bool = False, locking: Locking = USUAL, briefly: bool = False, closing: bool = False
) -> Iterator[None]:
    """Holds the reader's lock for the time of a read.

    Args:
        file: the image.
        force_share: reads although somebody writes to the image.
        locking: how long to wait for another process of ours that writes to it. QEMU is not waited for.
        briefly: keeps such processes out until the read is done. For reads that take a moment.
        closing: may close the file in the end, which gives up all locks in one system call.

    Raises:
        LockedError: someone has the image open for writing, or has written to it or replaced it during the read.
    """
    if not has_locks(file, UNLOCKED if force_share else locking):
        # Without locks it is not seen that somebody has the image open for writing, but that somebody has written.
        yield from _unchanged(file) if not force_share else _as_it_is()
        return
    file.lock(_USE + _READ)
    try:
        if force_share:
            yield
            return
        alone = briefly and _join_where_nobody_is(file)
        if not alone:
            _wait_beside_readers(file, locking)
        try:
            if not briefly:
                file.unlock_beside(_QUEUE)
            if not alone:
                _refuse_if_written(file)
            yield from _unchanged(file, _refuse_if_written)
        finally:
            if briefly and not closing:
                file.unlock_beside(_QUEUE)
    finally:
        if closing:
            file.close()
        else:
            file.unlock(_USE + _READ)


@contextlib.contextmanager
def keeping(file: File, *, locking: Locking = USUAL) -> Iterator[None]:
    """Keeps everybody who asks for QEMU's locks from writing to a file or a device, until the end of the block.

    Args:
        file: the image, open for reading.
        locking: how long to wait for another process of ours that writes to it. QEMU is not waited for.

    Raises:
        LockedError: someone has it open for writing, or shares it with no reader; or it was replaced while it was being
            opened.
        UnsupportedError: nobody would see the locks; see `has_locks`.
    """
    if not has_locks(file, locking):
        _refuse_if_replaced(file)
        yield
        return
    try:
        _wait_beside_readers(file, locking)
        try:
            for byte in _KEEPER_TAKES:
                file.lock(byte)
            if any(map(file.locked_by_other, _KEEPER_TESTS)):
                raise LockedError(file.path, f"open for writing by {holders(file)}")
        finally:
            file.unlock_beside(_QUEUE)
        _refuse_if_replaced(file)
        yield
    finally:
        for byte in _KEEPER_TAKES:
            file.unlock(byte)


def _unchanged(file: File, refuse: Callable[[File], object] = lambda file: None) -> Iterator[None]:
    modified = file.modified()
    try:
        yield
    finally:
        # A writer that came during the read may have changed what was read, so that it looks damaged. The writer may be
        # gone again by now, and the clusters that had the bits may have a guest's data.
        refuse(file)
        if file.modified() != modified:
            raise LockedError(file.path, "was written to while it was being read")


def _as_it_is() -> Iterator[None]:
    yield


def has_locks(file: File, locking: Locking) -> bool:
    """True if everybody who has a file open sees the locks on it. False if not, and they are not needed.

    Raises:
        UnsupportedError: not everybody sees them, and they are needed; the error names the file system.
    """
    fault = file.lock_fault()
    if fault is None:
        return True
    if not locking.lock:
        return False
    raise UnsupportedError(file.path, f"{fault}; nobody would see our locks, and --no-lock does without")


def is_written_by_others(file: File) -> bool:
    """Like `is_written`, but also False if that is not known."""
    return has_locks(file, UNLOCKED) and is_written(file)


def _wait_beside_readers(file: File, locking: Locking) -> None:
    """Waits for its turn beside other readers. Keeps writers of ours out until `_QUEUE` is unlocked."""
    deadline = time.monotonic() + locking.wait
    while not _join(file):
        if order.is_held_here(Rank.IMAGE, file.abspath) or time.monotonic() > deadline:
            _refuse_if_written(file)
            raise LockedError(file.path, f"being written by {holders(file)}")
        pause()


def is_written(file: File) -> bool:
    """True while someone else has the file open for writing."""
    return file.locked_by_other(_USE + _WRITE)


def _refuse_if_written(file: File) -> None:
    if is_written(file):
        raise LockedError(file.path, f"open for writing by {holders(file)}; commands that take -U read it all the same")
    _refuse_if_replaced(file)


def _refuse_if_replaced(file: File) -> None:
    if not file.is_current():
        raise LockedError(file.path, "was replaced or removed while it was being opened")


def _join(file: File) -> bool:
    if not file.lock_beside(_QUEUE + 1):
        return False
    try:
        return file.lock_beside(_QUEUE)
    finally:
        file.unlock_beside(_QUEUE + 1)


def _join_where_nobody_is(file: File) -> bool:
    """Does what `_join` does, in fewer system calls; False where anybody writes, waits to write, or reads.

    Who comes between the two calls is noticed: a writer of ours has byte 300 by then, or is done; any other writer is
    seen at the end of the read, as if it had come a moment later.
    """
    first = _USE + _WRITE
    return not file.locked_by_other(first, _QUEUE + 2 - first) and file.lock_beside(_QUEUE)


def try_alone(file: File, byte: int) -> bool:
    """Tries once to take an exclusive lock on a byte.

    Everybody who tries has to take the byte after it first. If the attempt fails, the caller keeps that one until the
    next attempt, and so is the next in turn. A caller that gives up has to unlock it.
    """
    if not (file.lock_alone(byte + 1) and file.lock_alone(byte)):
        return False
    file.unlock(byte + 1)
    return True


@contextlib.contextmanager
def writing(file: File, *, locking: Locking = USUAL) -> Iterator[None]:
    """Holds the writer's locks. Meanwhile QEMU refuses to open the image.

    Args:
        file: the image, open for writing.
        locking: how long to wait for whoever has it open.

    Raises:
        LockedError: someone has the image open and does not share it, or it was replaced while it was being opened.
    """
    with _writer(file, locking) as locked:
        try:
            yield
        finally:
            if locked:
                _give_up(file)


def lend(file: File, *, locking: Locking = USUAL) -> None:
    """Takes the writer's locks for another program, which writes and takes none itself.

    They are given up when the last descriptor is closed of what was opened: the file's, and one that a process has
    inherited. Arguments and errors as `writing`; after an error the file has to be closed.
    """
    with _writer(file, locking) as locked:
        if locked:
            file.unlock(_QUEUE)  # processes of ours see at once what is the matter, and wait for nothing


@contextlib.contextmanager
def _writer(file: File, locking: Locking) -> Iterator[bool]:
    """Takes the writer's locks, which the block gives up or leaves. Yields whether there are any."""

    def refusal() -> LockedError:
        return LockedError(file.path, f"held by {holders(file)}; nothing ever writes an image in use")

    locked = has_locks(file, locking)
    with turn(Rank.IMAGE, file.abspath, locking, refusal) as deadline:
        try:
            while locked and not _take(file):
                if time.monotonic() > deadline:
                    raise refusal()
                pause()
            try:
                _refuse_if_replaced(file)
            except BaseException:
                if locked:
                    _give_up(file)
                raise
            yield locked
        finally:
            if locked:
                file.unlock(_QUEUE + 1)


def _take(file: File) -> bool:
    """Tries to take the locks of a writer. Takes none if somebody has the image open, who must not see them."""
    if not try_alone(file, _QUEUE):
        return False
    if not any(map(file.locked_by_other, _WRITER_TESTS)):
        for byte in _WRITER_TAKES:
            file.lock(byte)
        if not any(map(file.locked_by_other, _WRITER_TESTS)):
            return True
    _give_up(file)
    return False


def _give_up(file: File) -> None:
    for byte in (*_WRITER_TAKES, _QUEUE):
        file.unlock(byte)


def holders(file: File) -> str:
    """Which other processes have the file open, as far as /proc tells. An open-file-description lock names no process.

    This process is among them if it has a lock on the file by another descriptor.
    """
    found = []
    if _locked_here(file):
        found.append("this very process")
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if int(pid) == os.getpid():
            continue
        try:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                status = os.stat(f"/proc/{pid}/fd/{fd}")
                if (status.st_dev, status.st_ino) == (file.status.st_dev, file.status.st_ino):
                    with open(f"/proc/{pid}/comm", "rb") as comm:
                        found.append(f"{comm.read().decode(errors='replace').strip()} (process {pid})")
                    break
        except OSError:
            continue  # gone, or not ours to look into
    return ", ".join(found) or "another process"


def _locked_here(file: File) -> bool:
    """True if this process has a lock on the file by another descriptor. Source: proc(5), /proc/PID/fdinfo."""
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            status = os.stat(int(fd))
            if int(fd) == file.fd or (status.st_dev, status.st_ino) != (file.status.st_dev, file.status.st_ino):
                continue
            with open(f"/proc/self/fdinfo/{fd}", "rb") as info:
                if any(line.startswith(b"lock:") for line in info):
                    return True
    return False
