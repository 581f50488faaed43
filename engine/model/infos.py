"""Frozen values that describe bitmaps, images, recoveries and trackers, without bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# What is said of a tracker that is in the way: how a living one is ended, and who follows one that has died.
STOP: Final = "'dirtmap track stop TARGET' ends it"
_DIED: Final = (
    "its tracker has died, and others mark; 'dirtmap serve --adopt TARGET' takes it over where nbdkit marks, "
    "else Handle.track does"
)


def refused(tracker: object, *, kept: bool, remedy: str = STOP) -> str:
    """Why somebody else cannot do what only that tracker may, and what to do, for an error.

    Args:
        tracker: describes the tracking process.
        kept: whether the process is alive, as far as is known.
        remedy: what to do where it is.
    """
    return f"tracked by {tracker}; {remedy}" if kept else _DIED


@dataclass(frozen=True, slots=True)
class BitmapInfo:
    """A bitmap without its bits.

    Attributes:
        name: unique in its namespace.
        granularity: bytes of the disk for each bit.
        recording: QEMU goes on marking writes in it.
        inconsistent: a writer left it in use and did not finish; its bits cannot be trusted until `recover`.
        busy: an operation holds it.
        count: dirty bytes in whole granules, as QEMU counts; None where inconsistent, or damaged.
        namespace: in a store, the namespace's UUID as text; else None.
        node: in a store, the node's name; None for a device's bitmap.
        device: in a store, the device's name; None for a node's bitmap.
        checkpoint: a tracker's checkpoint, which other checkpoints rely on; the newest of them is recording.
        uuid: in a store, the bitmap's UUID as text, which it has from when it is added until it is removed; else None.
        generation: in a store, the number of the commit that last changed its bits or its flags; else None.
        began: of a checkpoint, when it began, in seconds since 1970; None where that is not known.
        since: of a checkpoint, how much was written since it began: bytes, in whole granules, of it and of all later
            ones; None where that is not known.
    """

    name: str
    granularity: int
    recording: bool
    inconsistent: bool
    busy: bool
    count: int | None
    namespace: str | None = None
    node: str | None = None
    device: str | None = None
    checkpoint: bool = False
    uuid: str | None = None
    generation: int | None = None
    began: float | None = None
    since: int | None = None

    @property
    def damaged(self) -> bool:
        """True if its bits are damaged. The `errors` of its `ImageInfo` say what is wrong."""
        return self.count is None and not self.inconsistent


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """An image and its bitmaps as of one moment.

    Attributes:
        path: as the caller opened it.
        format: ``qcow2`` or ``dirtmap``.
        size: of the virtual disk, bytes; None for a store as a whole.
        cluster_size: of the container, bytes.
        bitmaps: in the order of the directory.
        notes: what a user should know although nothing is wrong with the image, one line each.
        node: the node's name; None if it has none, and for a device.
        device: the device's name; None for a node.
        uuid: of its namespace, as text, or None.
        doubt: why all bitmaps count as dirty all over, or None; for a store as a whole, one such reason.
        errors: what is damaged, one line each; a damaged bitmap is left out, or has no ``count``.
        checkpoints: names of the bitmaps that are checkpoints, oldest first; also of those that are left out. What was
            written since one is in it and in all later ones; where that is not known any more, ``notes`` say so. For a
            store as a whole, those of one namespace after the other.
        incomplete: names of the checkpoints since which not all that was written is known any more, oldest first.
    """

    path: str
    format: str
    size: int | None
    cluster_size: int
    bitmaps: tuple[BitmapInfo, ...]
    notes: tuple[str, ...] = ()
    node: str | None = None
    device: str | None = None
    uuid: str | None = None
    doubt: str | None = None
    errors: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()
    incomplete: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Disk:
    """Where a disk is that has bitmaps, wherever those are.

    Attributes:
        path: of the image or block device, absolute; of a device's root.
        format: ``qcow2`` or ``raw``, by what it was made a node as, never by what a guest may have written into it.
    """

    path: str
    format: str


# Why a recovered bitmap is dirty all over. Recovery locks writers out, so the writer that left it is gone.
LEFT_IN_USE = "left in use by a writer that did not finish"
# And one that was void.
VOID = "void: software that does not know bitmaps has changed the image"


@dataclass(frozen=True, slots=True)
class Recovery:
    """What `Namespace.recover` did to one bitmap: its ``name``, and ``how``, such as ``all dirty: `` and the reason."""

    name: str
    how: str


@dataclass(frozen=True, slots=True)
class Status:
    """The state of a tracking session as of one moment.

    Attributes:
        session: the session's UUID, as text.
        tracker: describes the tracking process.
        pid: process ID.
        alive: whether the image is tracked: the process is alive, or others mark in its session.
        kept: whether the process is alive. If it is not, but others mark, `Handle.track` takes the session over.
        how: what recovery will do once the tracker is dead.
        started: when the session began, in seconds since 1970.
        seen: time of the tracker's last heartbeat, in seconds since 1970; None if its live files are gone.
        writes: number of writes begun with `Tracker.begin` or `write`; `Tracker.mark` alone is too quick to count.
        in_flight: number of writes that have begun and not ended.
        dirty: bytes in whole granules, marked since the last cut, or before it and not saved yet.
        intervals: number of intervals that are not saved completely.
        intent: ``region`` or ``off``.
        region_size: bytes of the disk per region of the intent log.
        regions: number of regions logged since the last save.
        regions_in_all: number of regions of the disk.
        poisoned: whether a sync has failed.
        live: the folder of the live files.
        socket: the path of the socket at which the tracker is asked; None where it is not there.
        log: the path of the intent log.
    """

    session: str
    tracker: str
    pid: int
    alive: bool
    kept: bool
    how: str
    started: float
    seen: float | None
    writes: int
    in_flight: int
    dirty: int
    intervals: int
    intent: str
    region_size: int
    regions: int
    regions_in_all: int
    poisoned: bool
    live: str
    socket: str | None
    log: str

    @property
    def refusal(self) -> str:
        """Why somebody else cannot do what only the tracker may, and what to do, for an error."""
        return refused(self.tracker, kept=self.kept)
