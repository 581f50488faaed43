"""Holds: who is reading a bitmap for a backup, so that nobody changes it meanwhile.

A hold lives in the namespace's record of a store, so that every process sees it, and names the process that took it:
its number, its start and the boot. One whose process is gone is stale: the backup has failed, and the hold counts no
more.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from dirtmap.engine.model.naming import decode_name
from dirtmap.engine.storefile import holds
from dirtmap.engine.system.process import Process, this_process
from dirtmap.fmt.errors import printable
from dirtmap.fmt.store import EXTENSION_HOLD, Record
from dirtmap.fmt.structures.store import HOLD


@dataclass(frozen=True, slots=True)
class Hold:
    """One hold on a bitmap: raw name, who says to have it, which process, and what tells it from others of that."""

    bitmap: bytes
    owner: str
    process: Process
    token: bytes

    def __str__(self) -> str:
        return f"'{printable(self.owner)}' (process {self.process.number})"


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


def living(record: Record) -> list[Hold]:
    """The holds that count."""
    return [found for found in all_holds(record) if found.process.lives()]


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


def held_by(record: Record) -> dict[str, str]:
    """Which bitmaps of a namespace are held, and by whom."""
    return {decode_name(found.bitmap): str(found) for found in holds.living(record)}
