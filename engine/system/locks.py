"""QEMU's image locks: who may read and write an image while others have it open.

QEMU takes shared open-file-description locks on single bytes of the image and tests whether others hold any:

    byte 100 + p: "I use permission p"        byte 200 + p: "I do not share permission p"
    p: 0 consistent read, 1 write, 2 write unchanged, 3 resize, 4 graph modification

    writer    takes 100 101 103 201 203   tests 200 201 203 (does everyone share what I use?)
                                                and 101 103 (does anyone use what I do not share?)
    reader    takes 100                   tests 101
    -U        takes 100                   tests nothing

A reader takes less than QEMU's own would: 201 and 203 would make a virtual machine fail that starts just then.
Source: QEMU block/file-posix.c, raw_apply_lock_bytes and raw_check_lock_bytes.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterator

from dirtmap.engine.system import order
from dirtmap.engine.system.file import File
from dirtmap.engine.system.order import Rank
from dirtmap.fmt.errors import LockedError

_USE, _UNSHARE = 100, 200
_READ, _WRITE, _RESIZE = 0, 1, 3
_WRITER_TAKES = (_USE + _READ, _USE + _WRITE, _USE + _RESIZE, _UNSHARE + _WRITE, _UNSHARE + _RESIZE)
_WRITER_TESTS = (_UNSHARE + _READ, _UNSHARE + _WRITE, _UNSHARE + _RESIZE, _USE + _WRITE, _USE + _RESIZE)

# Two writers that start together see each other and both back off; a command holds an image for milliseconds.
_PATIENCE_SECONDS = 0.4


@contextlib.contextmanager
def reading(file: File, *, force_share: bool = False) -> Iterator[None]:
    """Holds the reader's lock for the time of a read.

    Raises:
        LockedError: someone has the image open for writing, or wrote to it or replaced it meanwhile.
    """
    file.lock(_USE + _READ)
    try:
        if force_share:
            yield
            return
        _refuse_if_written(file)
        modified = file.modified()
        try:
            yield
        finally:
            # A writer that came while we read may have changed what we read, and have made it look broken. It may
            # be gone again, and what lay where the bits were be a guest's.
            _refuse_if_written(file)
            if file.modified() != modified:
                raise LockedError(file.path, "was written to while it was being read")
    finally:
        file.unlock(_USE + _READ)


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


@contextlib.contextmanager
def writing(file: File) -> Iterator[None]:
    """Holds the writer's locks; QEMU refuses to open the image meanwhile.

    Raises:
        LockedError: someone has the image open and does not share it, or it was replaced meanwhile.
    """
    with order.holding(Rank.IMAGE, file.abspath):
        yield from _writing(file)


def _writing(file: File) -> Iterator[None]:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    try:
        while True:
            for byte in _WRITER_TAKES:
                file.lock(byte)
            if not any(map(file.locked_by_other, _WRITER_TESTS)):
                break
            for byte in _WRITER_TAKES:
                file.unlock(byte)
            if time.monotonic() > deadline:
                raise LockedError(file.path, f"held by {holders(file)}; nothing ever writes an image in use")
            time.sleep(random.uniform(0.005, 0.05))
        _refuse_if_replaced(file)
        yield
    finally:
        for byte in _WRITER_TAKES:
            file.unlock(byte)


def holders(file: File) -> str:
    """Which other processes have the file open, as far as /proc tells; open-file-description locks name none.

    This process is one where it has a lock on the file by another descriptor.
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
    """True where this process has a lock on the file by another descriptor. Source: proc(5), /proc/PID/fdinfo."""
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            status = os.stat(int(fd))
            if int(fd) == file.fd or (status.st_dev, status.st_ino) != (file.status.st_dev, file.status.st_ino):
                continue
            with open(f"/proc/self/fdinfo/{fd}", "rb") as info:
                if any(line.startswith(b"lock:") for line in info):
                    return True
    return False
