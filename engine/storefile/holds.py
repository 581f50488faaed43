"""Holds: who is reading a bitmap for a backup, so that nobody changes it meanwhile.

A hold is two things. Its entry in the namespace's record of a store tells every process that it is there, and for whom.
A lock on one byte of the store file tells whether it still counts. The kernel drops that lock when the holder ends,
however it ends, and shows it to every process on the machine: in another container, or where ``/proc`` hides the
holder. A process number could do neither. What cannot be known counts as alive, as on a file system without locks that
others see; there whoever says that nobody else uses the store, with ``--no-lock``, says that it has ended.

The byte lies far behind any data. Which one it is follows from the hold's token: see SPEC.md, "hold". The lock is on
the file, not on its path, so no other file may take the store's place while anything in it is held.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from dirtmap.engine.model.naming import decode_name
from dirtmap.engine.storefile import holds
from dirtmap.engine.system.file import File, open_file
from dirtmap.engine.system.process import Process, this_process
from dirtmap.fmt.errors import GoneError, LockedError, StorageError, printable
from dirtmap.fmt.store import EXTENSION_HOLD, Record
from dirtmap.fmt.structures.store import HOLD

_FIRST = 1 << 62  # the first byte that a hold may lock; the last is the last that a file can have
_COUNT = 1 << 62


@dataclass(frozen=True, slots=True)
class Hold:
    """One hold on a bitmap.

    Attributes:
        bitmap: its raw name.
        owner: who says to have it.
        process: which has it.
        token: tells it from others of that process.
        unsure: why nobody can tell whether the holder has ended, if so.
    """

    bitmap: bytes
    owner: str
    process: Process
    token: bytes
    unsure: str | None = None

    def __str__(self) -> str:
        held = f"'{printable(self.owner)}' ({self.process.address})"
        if self.unsure is None:
            return held
        return f"{held}, and nobody can tell whether that has ended ({self.unsure}); --no-lock takes it for ended"

    @property
    def byte(self) -> int:
        """The offset of the byte of the store file that its holder locks."""
        return _FIRST | int.from_bytes(self.token[:8]) % _COUNT

    def as_told(self, file: File) -> Hold | None:
        """The hold, as far as the store's file system tells of it; None where the holder is known to have ended.

        Args:
            file: the store that has the hold's record, opened by whoever asks.
        """
        try:
            if file.locked_by_other(self.byte):
                return self
            unsure = file.lock_fault()
        except StorageError as error:
            unsure = error.what
        return None if unsure is None or file.unshared else replace(self, unsure=unsure)


def hold(bitmap: bytes, owner: str) -> Hold:
    """A new hold of this process."""
    return Hold(bitmap, owner, this_process(), uuid.uuid4().bytes)


def all_holds(record: Record) -> Iterator[Hold]:
    """The holds in a namespace's record, stale ones included; what cannot be read is skipped."""
    for kind, data in record.extensions:
        if kind != EXTENSION_HOLD or len(data) < HOLD.size:
            continue
        raw = HOLD.parse(data)
        middle = HOLD.size + raw.name_size
        if len(data) != middle + raw.owner_size:
            continue
        yield Hold(
            bitmap=data[HOLD.size : middle],
            owner=data[middle:].decode("utf-8", "backslashreplace"),
            process=Process(raw.process, raw.start, raw.boot_id),
            token=raw.token,
        )


def living(file: File, record: Record) -> list[Hold]:
    """The holds in a namespace's record that count.

    Args:
        file: the store that has the record, opened by whoever asks.
        record: of the namespace.
    """
    return [found for held in all_holds(record) if (found := held.as_told(file)) is not None]


def is_any_alive(file: File) -> bool:
    """True where anybody holds a bitmap of a store, also one whose record cannot be read.

    Args:
        file: the store, opened by whoever asks.

    Raises:
        StorageError: the file system cannot tell.
    """
    return file.locked_by_other(_FIRST, _COUNT)


def with_holds(record: Record, holds: list[Hold]) -> Record:
    """The record with these holds and no others."""
    return record.with_extensions([EXTENSION_HOLD], ((EXTENSION_HOLD, _build(found)) for found in holds))


def _build(found: Hold) -> bytes:
    owner = found.owner.encode("utf-8", "backslashreplace")
    fixed = HOLD.build(
        process=found.process.number,
        name_size=len(found.bitmap),
        owner_size=len(owner),
        start=found.process.start,
        boot_id=found.process.boot_id,
        token=found.token,
    )
    return fixed + found.bitmap + owner


def held_by(file: File, record: Record) -> dict[str, str]:
    """Which bitmaps of a namespace are held, and by whom. Arguments as `living`."""
    return {decode_name(found.bitmap): str(found) for found in holds.living(file, record)}


def lock(taken: Iterable[Hold], store: File) -> File:
    """Has the kernel tell everybody that holds are alive, until the file that is returned is closed.

    A forked child has that file closed, see `File`: the holds are its parent's, and end with it. A program that is
    started does not get it at all.

    Args:
        taken: by this process.
        store: that is to have their record, as its writer has it open.

    Raises:
        GoneError: another file is in the store's place.
        LockedError: a byte is locked by someone else.
        StorageError: the file system has no such locks.
    """
    file = open_file(store.path, writable=True, abspath=store.abspath)
    try:
        if (file.status.st_dev, file.status.st_ino) != (store.status.st_dev, store.status.st_ino):
            raise GoneError(store.path, "was replaced since it was opened")
        if not all(file.lock_alone(held.byte) for held in taken):
            raise LockedError(store.path, "another program locks the bytes that are for holds")
    except BaseException:
        file.close()
        raise
    return file
