"""Rebuilds a bitmap that was lost, by a comparison with the backup at which it began; see `rebuild`."""

from __future__ import annotations

import contextlib
import gc
import os
import secrets
import time
from typing import TYPE_CHECKING, NamedTuple

from dirtmap.fmt.errors import ArgumentError, BitmapError, printable
from dirtmap.tools.backup import state
from dirtmap.tools.backup.chain import ChainReader
from dirtmap.tools.backup.comparing import Sample, compare
from dirtmap.tools.backup.creating import Watcher, disk_name, reading, reading_tracked, require_same_disk
from dirtmap.tools.backup.repository import WAIT_SECONDS, Repository

if TYPE_CHECKING:
    from dirtmap.engine import Disk, Handle, Host
    from dirtmap.tools.backup.document import Backup


class Rebuilt(NamedTuple):
    """What `rebuild` has done; sizes in bytes.

    Attributes:
        backup: the one that the disk was compared with.
        differing: what differs, in whole granules.
        compared: what was compared: all that the disk or the backup has.
        tracked: whether a program tracked the disk, and may have written to it meanwhile.
        seconds: that it took.
    """

    backup: Backup
    differing: int
    compared: int
    tracked: bool
    seconds: float


def rebuild(
    host: Host,
    target: str,
    bitmap: str,
    repository: str | os.PathLike[str],
    *,
    at: str | None = None,
    wait: float = WAIT_SECONDS,
    watch: Watcher = lambda disk, done, total: None,
) -> Rebuilt:
    """Gives the bitmap of a disk's newest backup its bits anew, so that the next backup is an increment again.

    A granule is dirty in it if it has changed since the backup, or was written to while this ran. The bitmap records
    from then on, at the granularity that it had. It may be inconsistent, all dirty, disabled, or removed. An end at any
    point before the last commit leaves it as it was, or is to the next backup as a failed one.

    A disk that a program tracks may be written to meanwhile. Any other is kept offline.

    Args:
        host: knows the disk.
        target: the path of a qcow2 image, or the name of a node.
        bitmap: the name of the bitmap, or checkpoint.
        repository: the path of its folder.
        at: the number of the backup, or a time, see `Repository.at`: refused if the bitmap did not begin with it.
        wait: seconds to wait for a process that writes to the repository.
        watch: is told how far it is.

    Raises:
        ArgumentError: the bitmap did not begin with the newest backup of the disk.
        BitmapError: the disk has another size; or a later checkpoint calls all of it dirty.
        LockedError: the disk is in use, or was written to meanwhile; its bitmap is as it was.
        FormatError: the backup is damaged.
    """
    import dirtmap.engine as dm

    begun = time.monotonic()
    place = Repository(repository)
    with place.reading(wait), host.open(target, force_share=True) as image:
        state.refuse_unknown(image, is_device=host.locate(target).is_device)
        disk = image.disk()
        backup = _beginning(place, image, disk, bitmap, at)
        chain = place.chain(backup)
        granularity = image[bitmap].granularity if bitmap in image else backup.granularity
        known = place.bitmaps(place.backups())
        names = state.Names(place.bitmap_prefix, known, place.bitmap_name(secrets.token_hex(8)), bitmap)
        stored = disk.format == "raw"
        differing, sample = dm.Bitmap(image.size, granularity), Sample()
        with ChainReader(place, chain, direct=True) as reader:  # before anything is changed: it may be damaged
            tracked = state.begin_rebuilding(image, names, granularity, stored=stored)
            gc.collect()  # a tracker that has ended is in a circle, and what it has mapped goes with it, not before
            with contextlib.ExitStack() as stack:
                if tracked:
                    source = stack.enter_context(reading_tracked(host, image, disk))
                else:
                    stack.enter_context(host.offline(disk))
                    source = stack.enter_context(reading(host, disk, image.size))
                compare(reader, source, differing, sample, lambda done: watch(backup.disk, done, backup.size))
        state.end_rebuilding(image, names, differing, stored=stored)
    seconds = round(time.monotonic() - begun, 3)
    return Rebuilt(backup, differing.count, sample.chosen, tracked, seconds)


def _beginning(place: Repository, image: Handle, disk: Disk, bitmap: str, at: str | None) -> Backup:
    """The backup at which a bitmap began."""
    name = disk_name(image, disk)
    backups = place.disk(name)
    newest = backups[-1]
    require_same_disk(place, image, disk, newest)
    # Of two it is the later one, after a snapshot that was there already: see `state.base_of_snapshot`.
    found = next((each for each in reversed(backups) if each.bitmap == bitmap), None)
    quoted = f"bitmap '{printable(bitmap)}'"
    if found is None:
        what = f"has no backup of '{printable(name)}' at which {quoted} began; that of backup {newest.number} is"
        raise ArgumentError(place.path, f"{what} '{printable(newest.bitmap)}'")
    if at is not None and (other := place.at(name, at)) != found:
        what = (
            f"{quoted} began at backup {found.number}; against backup {other.number}, what changed in between is lost"
        )
        raise ArgumentError(place.path, what)
    if found != newest:
        what = f"{quoted} began at backup {found.number}, and ended when backup {newest.number} was made"
        raise ArgumentError(place.path, f"{what}; that of the newest one can be rebuilt, '{printable(newest.bitmap)}'")
    if found.size != image.size:
        raise BitmapError(image.where, f"has {image.size} bytes, and had {found.size} at backup {found.number}")
    return found
