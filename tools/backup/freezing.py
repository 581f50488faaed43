"""How disks are read that are being written: see `freeze`.

    time        -----|=== instant ===|----------------------------->
    checkpoint       | begins here   |
    reflink          | clone         |  is copied
    snapshot         | COMMAND       |  what it has made is copied

What a copy lacks of what was written before it was frozen must be in the next one. So that begins with a checkpoint
which is not younger than the copy: see `state`.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dirtmap.fmt import live
from dirtmap.fmt.errors import ArgumentError, BitmapError, Error, StorageError
from dirtmap.tools.backup import files
from dirtmap.tools.backup.document import LIVE, REFLINK, SOURCE
from dirtmap.tools.frozen import frozen_copy, prepared_clone
from dirtmap.tools.surroundings import given

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dirtmap.engine import Clone, Disk, Handle, Host, Instant

_REMEDY = "--source reads a snapshot, --live insists"
_SECTOR = 512


@dataclass
class Written:
    """A raw disk that is being written, and that a tracker tracks.

    Attributes:
        image: its bitmaps.
        checkpoint: the name of the one that is to begin.
        how: `REFLINK`, `SOURCE` or `LIVE`.
        disk: what is to be read; of `REFLINK` a clone, once there is one.
        stack: keeps that until it is closed.
    """

    image: Handle
    checkpoint: str
    how: str
    disk: Disk
    stack: contextlib.ExitStack
    _clone: Clone | None = None

    def prepare(self, snapshot: str | None) -> None:
        """Does what can be done before the instant."""
        if self.how == REFLINK:
            self._clone = prepared_clone(self.stack, self.image, _REMEDY)
        elif self.how == LIVE and self.disk.format == "raw":
            # What is checked in the instant has to be what is read later, wherever the path leads by then.
            opened = self.stack.enter_context(contextlib.closing(files.Reading(self.disk.path)))
            self.disk = type(self.disk)(opened.opened, self.disk.format)
        elif self.how == SOURCE and snapshot is not None and os.path.lexists(self.disk.path):
            what = "is there already, and may be older than the backup; the command of --snapshot has to make it"
            raise ArgumentError(self.disk.path, what)

    def freeze(self, instant: Instant) -> None:
        """Does what has to be done in it."""
        instant.checkpoint(self.image, self.checkpoint)
        if self.how == LIVE:
            instant.require_file(self.image, self.disk.path)
        elif self._clone is not None:
            instant.clone(self.image, self._clone)
            self.disk = type(self.disk)(self._clone.path, self.disk.format)

    def open(self, host: Host) -> None:
        """Keeps a snapshot as it is."""
        if self.how != SOURCE:
            return
        self.disk = frozen_copy(self.disk.path, self.image.disk())
        self.stack.enter_context(host.offline(self.disk))
        size = _size(self.disk.path)
        if not self.image.size <= size < self.image.size + _SECTOR:
            raise BitmapError(self.disk.path, f"has {size} bytes, and the disk {self.image.size}: it is no copy of it")


def freeze(host: Host, disks: Sequence[Written], snapshot: str | None) -> None:
    """Begins the checkpoints of disks at one instant, at which they are frozen, too.

    Args:
        host: knows the disks.
        disks: all that are being written.
        snapshot: a command of the shell that makes the snapshots, at that instant; None where they are there already.

    Raises:
        Error: a disk cannot be frozen; then no checkpoint has begun.
        StorageError: the instant was none, as by a command that takes longer than writes wait, ten seconds.
        As `Host.instant`.
    """
    for disk in disks:
        disk.prepare(snapshot)
        if snapshot is None:
            disk.open(host)
    if not disks:
        return
    if snapshot is not None:
        _write_back(disks)  # so that little is left to be done in the instant
    with host.instant([disk.image for disk in disks]) as instant:
        for disk in disks:
            disk.freeze(instant)
        if snapshot is not None:
            _write_back(disks)
            _run(snapshot)
    if snapshot is not None:
        for disk in disks:
            disk.open(host)


def _write_back(disks: Sequence[Written]) -> None:
    """Has the medium have what was written: a snapshot may be made below the kernel's cache."""
    for disk in disks:
        if disk.how == SOURCE:
            files.sync(disk.image.disk().path)


def _run(command: str) -> None:
    """Runs a command; what it prints goes to standard error. It is not killed: it may have suspended a device."""
    seconds = live.PATIENCE_NS / 1e9  # for which writes wait
    process = subprocess.Popen(["/bin/sh", "-c", command], stdin=subprocess.DEVNULL, stdout=2, env=given())
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired as error:
        what = f"still runs after {seconds:g} seconds; writes go on, so that what it makes is of no instant"
        raise StorageError(command, what) from error
    if status:
        raise Error(command, f"was killed by signal {-status}" if status < 0 else f"ended with status {status}")


def _size(path: str) -> int:
    try:
        with open(path, "rb") as file:
            return file.seek(0, os.SEEK_END)
    except OSError as error:
        raise StorageError(path, error.strerror or str(error), error.errno) from error
