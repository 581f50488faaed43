"""Removes old backups without breaking what is on them; see `prune`."""

from __future__ import annotations

import os
from dataclasses import replace

from dirtmap.fmt.errors import ArgumentError
from dirtmap.tools.backup import files
from dirtmap.tools.backup.chain import ChainReader
from dirtmap.tools.backup.copying import Writer, copy
from dirtmap.tools.backup.creating import PieceFile, Watcher
from dirtmap.tools.backup.document import FULL, Backup, parts
from dirtmap.tools.backup.making import new_image
from dirtmap.tools.backup.repository import DOCUMENT, IMAGE, NEW, WAIT_SECONDS, Repository

PRUNED = "pruned"


def prune(
    repository: str | os.PathLike[str],
    keep: int,
    *,
    disk: str | None = None,
    wait: float = WAIT_SECONDS,
    watch: Watcher = lambda disk, done, total: None,
) -> list[Backup]:
    """Removes all but the newest backups of each disk.

    The oldest one that stays gets a new, full image first, if it is on one that goes. It has its name, so that what is
    on it reads the same at any moment. What is read for it is held against its digests. The disks are not needed:
    their next backups remove the bitmaps.

    Args:
        repository: the path of its folder.
        keep: how many of each disk stay, at least 1.
        disk: the name of a disk in the repository; None for all.
        wait: seconds to wait for another process that uses the repository.
        watch: is told how far it is with a new image.

    Returns:
        The backups that were removed.

    Raises:
        ArgumentError: there is no such disk, or nothing would be kept.
        FormatError: a document cannot be read, or a backup that something is made from is damaged; none was removed.
        LockedError: somebody uses the repository.
    """
    if keep < 1:
        raise ArgumentError("keep", f"{keep} is no number of backups, 1 or more")
    place = Repository(repository)
    with place.writing(wait):
        backups = place.backups() if disk is None else place.disk(disk)
        for problem in place.problems:  # it may need any of them
            raise problem
        removed: list[Backup] = []
        for name in sorted({backup.disk for backup in backups}):
            mine = [backup for backup in backups if backup.disk == name]
            kept = {backup.id for backup in mine[-keep:]}
            for backup in mine[-keep:]:
                if backup.parent is not None and backup.parent not in kept:
                    _make_full(place, backup, watch)
            removed += [backup for backup in mine if backup.id not in kept]
        for backup in reversed(removed):  # none is without what it is on at any moment
            files.remove(place.document(backup))
            files.remove(place.image(backup))
    return removed


def _make_full(place: Repository, backup: Backup, watch: Watcher) -> None:
    """Gives a backup an image that is on no other; see `dirtmap.tools.backup.repository` for the order."""
    chain = place.require_sound(backup)
    base = os.path.join(place.path, backup.id)
    image = base + IMAGE + NEW
    temporary, spool = image + files.TEMPORARY, PieceFile(base + ".pieces")
    try:
        cluster = min(each.cluster_size for each in chain)  # what can be seen of each begins and ends at its own
        new = new_image(temporary, backup.size, cluster=cluster, compression=backup.compression)
        with spool, ChainReader(place, chain, direct=True) as reader, new as target:
            writer = Writer(target, cluster)
            done = 0

            def progress(length: int) -> None:
                nonlocal done
                done += length
                watch(backup.disk, done, backup.size)

            copy(reader.read(), writer, spool.keep, progress)
        made = replace(
            backup,
            kind=FULL,
            parent=None,
            reason=PRUNED,
            why="the backups that it was on were pruned",
            cluster_size=cluster,
            image_size=os.path.getsize(temporary),
            copied=writer.copied,
            zeros=done - writer.copied,
            pieces=spool.digest.count,
            pieces_digest=spool.digest.hex(),
        )
        files.rename(temporary, image)
        files.write(base + DOCUMENT + NEW, parts(made, spool.lines()))
        files.rename(image, base + IMAGE)
        files.rename(base + DOCUMENT + NEW, base + DOCUMENT)
    finally:
        files.discard(temporary)
        files.discard(base + ".pieces")
