"""Verifies backups: by themselves, see `verify`, and against their disk, see `verify_disk`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from dirtmap.fmt.errors import Error, FormatError
from dirtmap.tools.backup import images, state
from dirtmap.tools.backup.chain import ChainReader, Seen
from dirtmap.tools.backup.comparing import Sample, compare, unequal
from dirtmap.tools.backup.copying import hashers
from dirtmap.tools.backup.creating import Watcher, disk_name, reading, reading_tracked, require_same_disk
from dirtmap.tools.backup.document import FULL
from dirtmap.tools.backup.nbd import ALLOCATION, DEPTH, ZERO
from dirtmap.tools.backup.raw import RawSource
from dirtmap.tools.backup.repository import WAIT_SECONDS, Repository

if TYPE_CHECKING:
    from dirtmap.engine import Disk, Handle, Host
    from dirtmap.tools.backup.copying import Source
    from dirtmap.tools.backup.document import Backup, Piece


def verify(
    repository: str | os.PathLike[str],
    *,
    disk: str | None = None,
    sample: Sample | None = None,
    wait: float = WAIT_SECONDS,
    watch: Watcher = lambda disk, done, total: None,
) -> list[Error]:
    """Reads all that backups have, once, and holds it against their documents.

    Each image has to have what its document lists, with these digests, and nothing else; it has to be on the one that
    the document says; and `qemu-img check` has to find nothing.

    Args:
        repository: the path of its folder.
        disk: the name of a disk in the repository; None for all.
        sample: which pieces are read; None for all. What it says is about all images together.
        wait: seconds to wait for a process that writes to the repository.
        watch: is told how far it is.

    Returns:
        What is wrong, one error for each document or image; empty where nothing is.

    Raises:
        ArgumentError: there is no such disk.
        LockedError: somebody writes to the repository.
        StorageError: there is no qemu-img.
    """
    images.qemu_img("--version")  # without it, no image could be called damaged or sound
    place = Repository(repository)
    with place.reading(wait):
        backups = place.backups() if disk is None else place.disk(disk)
        faults = list(place.problems)
        for backup in backups:
            try:
                place.require_sound(backup)
                with ThreadPoolExecutor(1) as pool:
                    checking = pool.submit(images.check, place.image(backup))
                    _verify_image(place, backup, sample or Sample(), watch)
                    checking.result()
            except Error as error:
                if str(error) not in map(str, faults):  # as of one that several are on
                    faults.append(error)
    return faults


def _verify_image(place: Repository, backup: Backup, sample: Sample, watch: Watcher) -> None:
    """Holds one image against its document.

    Raises:
        FormatError: it has something else.
    """
    image = place.image(backup)

    def chosen(pieces: Iterable[Piece]) -> Iterator[Seen]:
        for piece in pieces:
            if piece.digest is not None and sample.takes(piece.offset, piece.end):
                yield Seen(piece.offset, piece.end, 0, piece)
            watch(f"{backup.disk} {backup.number}", piece.end, backup.size)

    with ChainReader(place, [backup], direct=True) as reader, hashers() as pool:
        for wrong in unequal(chosen(place.pieces(backup)), reader.layer(0), pool):
            raise FormatError(image, f"damaged: at {wrong.start} of the disk it has not what was written")
        # What is written outside of the list, or is not zero where it says so, is not in what was read.
        if backup.kind == FULL:
            used = ((at, end) for at, end, flags in reader.status(0, ALLOCATION) if not flags & ZERO)
            listed = ((piece.offset, piece.end) for piece in place.pieces(backup) if piece.digest)
            fault = _outside(_merged(used), _merged(listed))
        else:
            used = ((at, end) for at, end, depth in reader.status(0, DEPTH) if depth)
            listed = ((piece.offset, piece.end) for piece in place.pieces(backup))
            fault = _different(_merged(used), _merged(listed))
    if fault is not None:
        raise FormatError(image, f"damaged: at {fault} of the disk it has not what its document lists")


def _merged(runs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Maximal runs of runs in order, each a beginning and an end."""
    begin = end = 0
    for first, last in runs:
        if first > end:
            if begin < end:
                yield begin, end
            begin = first
        end = last
    if begin < end:
        yield begin, end


def _different(one: Iterator[tuple[int, int]], other: Iterator[tuple[int, int]]) -> int | None:
    """Where the runs differ; None where they do not."""
    while True:
        first, second = next(one, None), next(other, None)
        if first is None or second is None or first != second:
            found = [run[0] for run in (first, second) if run is not None]
            return min(found) if found else None


def _outside(inner: Iterator[tuple[int, int]], outer: Iterator[tuple[int, int]]) -> int | None:
    """Where a run is not inside one of the others; None where all are."""
    here = next(outer, None)
    for begin, end in inner:
        while here is not None and here[1] <= begin:
            here = next(outer, None)
        if here is None or begin < here[0]:
            return begin
        if end > here[1]:
            return here[1]
    return None


def verify_disk(
    host: Host,
    repository: str | os.PathLike[str],
    target: str,
    *,
    sample: Sample | None = None,
    wait: float = WAIT_SECONDS,
    watch: Watcher = lambda disk, done, total: None,
) -> tuple[Backup, list[tuple[int, int]]]:
    """Compares a disk with its newest backup, where its bitmap says that nothing was written since.

    A difference there is a write that the bitmap has missed. What the disk has is held against digests, so that of the
    images no more is read than `compare` needs.

    A disk that nobody tracks is kept offline meanwhile. A raw disk that is tracked may be written to. A clone of it is
    read, and its bits after that was made. Where it cannot be cloned, the disk itself is read, and its bits after that.
    The bits have all writes that were read, since each is marked before it is made. A write that was missed is not
    found where a later one has marked the same granule before the bits were read. The next backup has that granule.

    Args:
        host: knows the disk.
        repository: the path of its folder.
        target: the path of a qcow2 image, or the name of a node.
        sample: which pieces of the disk are compared; None for all.
        wait: seconds to wait for a process that writes to the repository.
        watch: is told how far it is.

    Returns:
        The backup; and the differences, (offset, length) in bytes, in whole granules.

    Raises:
        ArgumentError: the repository has no backup of the disk.
        BitmapError: it is not known what was written since; or the disk has another size than it had.
        LockedError: the disk is in use, or was written to meanwhile; or its tracker cannot be asked.
        FormatError: the backup is damaged.
    """
    import dirtmap.engine as dm

    place = Repository(repository)
    with place.reading(wait), host.open(target) as image:
        state.refuse_unknown(image, is_device=host.locate(target).is_device)
        disk = image.disk()
        backup = place.at(disk_name(image, disk), None)
        require_same_disk(place, image, disk, backup)
        if backup.size != image.size:
            raise dm.BitmapError(image.where, f"has {image.size} bytes, and had {backup.size} at its last backup")
        known = place.bitmaps(place.backups())
        names = state.Names(place.bitmap_prefix, known, "", backup.bitmap)
        with ChainReader(place, place.chain(backup), direct=True) as reader, contextlib.ExitStack() as stack:
            source, is_live = _kept(host, stack, image, disk)
            since = state.since_now(image, names, stored=disk.format == "raw")
            differing, chosen = dm.Bitmap(image.size, since.granularity), sample or Sample()
            compare(reader, source, differing, chosen, lambda done: watch(backup.disk, done, backup.size))
            if is_live:  # what was written while it was being read is among them by now
                since = state.since_now(image, names, stored=True)
    missed = differing - since
    return backup, [
        (offset, length) for offset, length in zip(*(part.tolist() for part in missed.extents()), strict=True)
    ]


def _kept(host: Host, stack: contextlib.ExitStack, image: Handle, disk: Disk) -> tuple[Source, bool]:
    """What is read, until the stack is closed: the disk, or a clone; and whether it goes on being written.

    That is so of a tracked disk that cannot be cloned. It is the one that its tracker tracks.
    """
    import dirtmap.engine as dm

    if not (disk.format == "raw" and state.is_written(image)):
        stack.enter_context(host.offline(disk))
        return stack.enter_context(reading(host, disk, image.size)), False
    with contextlib.suppress(dm.UnsupportedError, dm.StorageError):
        with contextlib.ExitStack() as trying:
            clone = trying.enter_context(dm.Clone(disk.path))
            with host.instant([image]) as instant:
                instant.clone(image, clone)
            stack.push(trying.pop_all())
        return stack.enter_context(RawSource(clone.path, image.size)), False
    return stack.enter_context(reading_tracked(host, image, disk)), True
