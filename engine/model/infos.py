"""What is said about bitmaps, images, recoveries and trackers: frozen values without bits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BitmapInfo:
    """A bitmap without its bits.

    Attributes:
        name: unique in its namespace.
        granularity: bytes of the disk for each bit.
        recording: QEMU goes on tracking into it.
        inconsistent: left in use by a writer that did not finish; its bits mean nothing until `recover`.
        busy: held by an operation.
        count: dirty bytes in whole granules, as QEMU counts; None where inconsistent, or damaged.
        namespace: in a store, the namespace's UUID as text.
        node: in a store, the node's name; None of a device's bitmap.
        device: in a store, the device's name; None of a node's bitmap.
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

    @property
    def damaged(self) -> bool:
        """True where its bits are not what was written; what is wrong is among the errors of its `ImageInfo`."""
        return self.count is None and not self.inconsistent


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """An image and its bitmaps as of one moment.

    Attributes:
        path: as it was opened.
        format: ``qcow2`` or ``dirtmap``.
        size: of the virtual disk, bytes; None for a store as a whole.
        cluster_size: bytes.
        bitmaps: in the order of the directory.
        notes: what a user should know although nothing is wrong with the image, a line each.
        node: the node's name; None where it has none, and of a device.
        device: the device's name; None of a node.
        uuid: of its namespace, as text, or None.
        doubt: why all bitmaps count as all dirty, or None; of a store, one such reason.
        errors: what is damaged, a line each; such a bitmap is left out, or has no ``count``.
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


# Why a bitmap is all dirty that was inconsistent: whoever recovers it keeps writers out.
LEFT_IN_USE = "left in use by a writer that did not finish"
# And one that was void.
VOID = "void: software that does not know bitmaps has changed the image"


@dataclass(frozen=True, slots=True)
class Recovery:
    """What `Namespace.recover` did for one bitmap: its ``name``, and ``how``: ``all dirty: ``, say, and why it is."""

    name: str
    how: str


@dataclass(frozen=True, slots=True)
class Status:
    """A session as it is now.

    Attributes:
        tracker: the process, in words.
        pid: its number.
        alive: it lives, and tracks.
        how: what recovery will do, once it does not.
        started: when the session began, seconds since 1970.
        seen: when the tracker last showed a sign of life, seconds since 1970; None where its live files are gone.
        writes: how many were begun with `Tracker.begin` or `write`; a bare `Tracker.mark` is too quick to be counted.
        dirty: bytes, in whole granules, marked since the last cut, and before it as far as not saved.
        intervals: how many there are that are not saved whole.
        intent: ``region`` or ``off``.
        region_size: bytes.
        regions: how many regions are logged since the last save.
        regions_in_all: how many the disk has.
        poisoned: a sync failed.
        live: the folder of the live files.
        log: the path of the intent log.
    """

    tracker: str
    pid: int
    alive: bool
    how: str
    started: float
    seen: float | None
    writes: int
    dirty: int
    intervals: int
    intent: str
    region_size: int
    regions: int
    regions_in_all: int
    poisoned: bool
    live: str
    log: str
