"""What a disk remembers of its backups: a checkpoint of its node each, or a bitmap each in a qcow2 image.

Every backup begins one, of a name of its own, and what was written until the next one begins is in it:

    backup        1            2            (failed)     3
    bitmap 1      [===========|                                    what backup 2 copies
    bitmap 2                   [===========|
    bitmap F                                [===========|          goes into bitmap 2, which backup 3 copies
    bitmap 3                                             [====>    recording

A bitmap whose backup is not in the repository is either of one that has failed, and then it records, or of one that was
pruned. In both cases the next backup removes it; only the content of the first is still needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from dirtmap.fmt.errors import BitmapError, LockedError, UnsupportedError, printable

if TYPE_CHECKING:
    from dirtmap.engine import Bitmap, Handle, Transaction

MISSING, UNUSABLE, ALL_DIRTY = "bitmap-missing", "bitmap-unusable", "all-dirty"


class Since(NamedTuple):
    """What was written since the last backup.

    Attributes:
        bitmap: which granules; None where that is not known.
        reason: why a full backup is needed, one word; None where it is not.
        why: the same as a sentence; where none is needed, why more counts as written than was, or None.
    """

    bitmap: Bitmap | None
    reason: str | None
    why: str | None


class Names(NamedTuple):
    """The names of bitmaps of a repository, in any disk.

    Attributes:
        prefix: how all of them begin.
        known: those whose backups are there.
        new: of the backup that begins.
        last: of the last backup of the disk; None where there is none that can be gone on from.
    """

    prefix: str
    known: set[str]
    new: str
    last: str | None


def begin_stored(image: Handle, names: Names) -> Since:
    """Begins a checkpoint of a node in a store. The disk is kept offline meanwhile.

    Raises:
        LockedError: a program tracks the disk.
    """
    doubt = image.doubt()
    with image.track(save_interval=0) as tracker:
        for name in tracker.checkpoints():
            if name.startswith(names.prefix) and name not in names.known:
                tracker.remove(name)  # the one before it takes over its content
        tracker.checkpoint(names.new)
        if names.last is None:
            return Since(None, None, None)
        if names.last not in tracker.checkpoints():
            return Since(None, MISSING, f"the checkpoint of the last backup, {names.last}, is not there any more")
        try:
            bitmap = tracker.changed_between(names.last, names.new)
        except BitmapError as error:
            return Since(None, UNUSABLE, error.what)
    return _unless_all(bitmap, doubt)


def forget_failed(image: Handle, names: Names) -> None:
    """Removes the checkpoints of failed and of pruned backups from a tracked disk; those before them take over."""
    gone = [name for name in image.info().checkpoints if name.startswith(names.prefix) and name not in names.known]
    if gone:
        image.change_tracked([("remove", name) for name in gone])


def since_tracked(image: Handle, names: Names) -> Since:
    """What was written to a tracked disk after the last backup, and before the new one's checkpoint, which has begun.

    Where a snapshot is read that was there before that checkpoint, this has all by which it may differ from the last
    backup. It may have some more.
    """
    if names.last is None:
        return Since(None, None, None)
    doubt, found = image.doubt(), _read_tracked(image, names.last, names.new)
    return found if found.bitmap is None else _unless_all(found.bitmap, doubt)


def _read_tracked(image: Handle, last: str, new: str | None) -> Since:
    """What was written to a tracked disk after a checkpoint began, and before a newer one; None: until now."""
    info = image.info()
    if last not in info.checkpoints:
        return Since(None, MISSING, f"the checkpoint of the last backup, {last}, is not there any more")
    if last in info.incomplete:
        what = "not all that was written since is known: a checkpoint was removed or disabled"
        return Since(None, UNUSABLE, what)
    end = None if new is None else info.checkpoints.index(new)
    found: Bitmap | None = None
    for name in info.checkpoints[info.checkpoints.index(last) : end]:
        bitmap = image[name].required(f"{image.where}: {name}")
        found = bitmap if found is None else found | bitmap
    assert found is not None
    return Since(found, None, None)


def base_of_snapshot(image: Handle, last: str | None) -> str:
    """The checkpoint from which the backup after one goes on that reads a snapshot which is there already.

    When that was made is not known, but that it was after the last backup. So what was written since that one began is
    copied once more.

    Args:
        image: the disk's bitmaps.
        last: the checkpoint that began with the last backup.

    Raises:
        BitmapError: there is none.
    """
    if last is None or last not in image.info().checkpoints:
        what = "no checkpoint is known to be older than the snapshot; --snapshot COMMAND makes it at the right moment"
        raise BitmapError(image.where, what)
    return last


def begin_qcow2(image: Handle, names: Names) -> Since:
    """Begins a bitmap in a qcow2 image, and ends the last one, in one transaction.

    What `changed_qcow2` tells afterwards, once the disk is kept offline, has what was written in between.

    Raises:
        LockedError: somebody has the image open.
    """
    if (status := image.tracking()) is not None and status.alive:
        raise LockedError(image.path, f"tracked by {status.tracker}; end it first")
    with image.transaction() as bitmaps:
        refusal = _merge_failed(bitmaps, names)
        from dirtmap.engine import changes

        # What cannot be gone on from is removed: should this backup fail, the next one could not tell that the bitmap,
        # disabled by then, has missed something.
        anew = names.last is None or refusal.reason is not None
        for name in [name for name in bitmaps if name.startswith(names.prefix)]:
            if anew or name not in names.known:
                changes.remove(bitmaps, name)
            elif bitmaps[name].recording and not bitmaps[name].inconsistent:
                changes.set_recording(bitmaps, name, False)
        changes.add(bitmaps, names.new)
    return refusal


def _merge_failed(bitmaps: Transaction, names: Names) -> Since:
    """Puts what a failed backup's bitmap has into that of the last backup; says why that is of no use, if so."""
    from dirtmap.engine import changes

    refusal, failed = _judged(bitmaps, names)
    if failed is not None and names.last is not None:
        changes.merge(bitmaps, names.last, [bitmaps[failed]])
    return refusal


def _judged(bitmaps: Mapping[str, Bitmap], names: Names) -> tuple[Since, str | None]:
    """Why the last backup's bitmap in an image is of no use; and the name of a failed one's that goes on from it."""
    last = names.last
    if last is None:
        return Since(None, None, None), None
    if last not in bitmaps:
        what = f"the bitmap of the last backup, {last}, is not in the image any more"
        return Since(None, MISSING, what), None
    ours = [name for name in bitmaps if name.startswith(names.prefix) and name not in names.known]
    failed = [name for name in ours if bitmaps[name].recording]
    if any(bitmaps[name].inconsistent for name in (last, *failed)):
        what = "a program that wrote to the image did not finish, so its bitmap is inconsistent"
        return Since(None, UNUSABLE, what), None
    if bitmaps[last].recording and not failed:
        return Since(None, None, None), None
    if bitmaps[last].recording or len(failed) != 1:
        what = f"the bitmap of the last backup, {last}, was disabled or enabled meanwhile"
        return Since(None, UNUSABLE, what), None
    return Since(None, None, None), failed[0]


def since_now(image: Handle, names: Names, *, stored: bool) -> Bitmap:
    """What was written since the last backup, until now, without beginning anything.

    The disk is kept offline meanwhile; or it is tracked, and then this has all that was marked before.

    Args:
        image: the disk's bitmaps.
        names: ``new`` is not used.
        stored: they are in a store.

    Raises:
        BitmapError: that is not known.
    """
    last = names.last
    assert last is not None
    if stored and is_written(image):
        since = _read_tracked(image, last, None)
    elif stored:
        with image.track(save_interval=0) as tracker:
            return tracker.changed_since(last)
    else:
        since, failed = _judged(image, names)
        if since.reason is None:
            return image[last] if failed is None else image[last] | image[failed]
    if since.bitmap is None:
        raise BitmapError(image.where, since.why or "")
    return since.bitmap


def is_written(image: Handle) -> bool:
    """Whether those who mark what they write may write to a disk at any moment."""
    return (status := image.tracking()) is not None and status.alive


def changed_qcow2(image: Handle, names: Names, begun: Since) -> Since:
    """What was written since the last backup, until now; see `begin_qcow2`. The disk is kept offline meanwhile.

    Raises:
        BitmapError: a program has written to the image just now, and did not finish.
    """
    fresh = image[names.new].required(f"{image.path}: {names.new}")
    if begun.reason is not None or names.last is None:
        return begun
    return _unless_all(image[names.last].required(f"{image.path}: {names.last}") | fresh, None)


def _unless_all(bitmap: Bitmap, doubt: str | None) -> Since:
    granules = -(-bitmap.size // bitmap.granularity)
    damage = f"its {bitmap.damage}" if bitmap.damage else None
    if bitmap.count < granules * bitmap.granularity:
        return Since(bitmap, None, f"some of the disk counts as written: {damage}" if damage else None)
    cause = doubt or damage
    return Since(bitmap, ALL_DIRTY, f"all of the disk counts as written{f': {cause}' if cause else ''}")


def refuse_unknown(image: Handle, *, is_device: bool) -> None:
    """Refuses what cannot be backed up.

    Raises:
        UnsupportedError: a device.
    """
    if is_device:
        raise UnsupportedError(image.where, "a device has no disk of its own: name its root node")


def begin_rebuilding(image: Handle, names: Names, granularity: int, *, stored: bool) -> bool:
    """Begins the bitmap that has what is written while the last one is rebuilt. An end after it is as a failed backup.

    Args:
        image: the disk's bitmaps.
        names: ``last`` is to be rebuilt.
        granularity: that it will have, in bytes.
        stored: they are in a store.

    Returns:
        Whether a program tracks the disk, so that it may be written to from now on.

    Raises:
        BitmapError: what it is rebuilt for cannot be reached: a later checkpoint calls all of the disk dirty.
        LockedError: somebody has a qcow2 image open, or tracks it.
    """
    if not stored:
        begin_qcow2(image, names)
        return False
    status = image.tracking()
    with image.transaction() as bitmaps:
        for name in list(bitmaps.checkpoints):
            if name.startswith(names.prefix) and name not in names.known:
                del bitmaps[name]
    for name in _later(image, names):
        if image[name].count >= image.size > 0:
            what = "calls all of the disk dirty, and is later than what is to be rebuilt: rebuild or remove it first"
            raise BitmapError(f"{image.where}: '{printable(name)}'", what)
    if status is not None and status.kept:
        image.checkpoint(names.new, granularity)
        return True
    with image.track(save_interval=0) as tracker:
        tracker.checkpoint(names.new, granularity)
    return False


def end_rebuilding(image: Handle, names: Names, differing: Bitmap, *, stored: bool) -> None:
    """Gives the last bitmap what differs and what was written meanwhile, and lets it record, in one commit.

    Raises:
        BitmapError: a program has written to a qcow2 image meanwhile, and did not finish.
    """
    assert names.last is not None
    if stored:
        for name in _later(image, names):
            if name != names.new:  # what has changed back since that began is different at its beginning
                differing = differing | image[name].at(differing.granularity)
        image.rebuild(names.last, names.new, differing)
        return
    with image.transaction() as bitmaps:
        fresh = bitmaps[names.new].required(f"{image.path}: {printable(names.new)}")
        bitmaps[names.last] = (differing | fresh.at(differing.granularity)).replace(recording=True)
        del bitmaps[names.new]


def _later(image: Handle, names: Names) -> list[str]:
    """The checkpoints that began after the last backup's."""
    chain = list(image.info().checkpoints)
    return chain[chain.index(names.last) + 1 :] if names.last in chain else []
