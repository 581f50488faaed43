"""Reads a qcow2 image under QEMU's locks: what it says about itself and its bitmaps."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from typing import TypeVar

from dirtmap.engine.model.infos import BitmapInfo, ImageInfo
from dirtmap.engine.model.naming import decode_name
from dirtmap.engine.qcow2.datafile import misfit
from dirtmap.engine.qcow2.layout import Layout, Slot, read_head, read_layout, void_bitmaps
from dirtmap.engine.system import locks
from dirtmap.engine.system.file import File, open_file
from dirtmap.engine.system.locks import USUAL, Locking
from dirtmap.fmt import directory, geometry, qcow2
from dirtmap.fmt.errors import FormatError

T = TypeVar("T")


FORMAT = "qcow2"


# With -U the image may change while it is read; a second look tells a torn read from damage.
_SHARED_ATTEMPTS = 5


def read_session(
    file: File,
    read: Callable[[Layout], T],
    *,
    force_share: bool = False,
    require: Callable[[Layout], None] = Layout.require_sound,
    locking: Locking = USUAL,
    closing: bool = False,
) -> T:
    """Runs ``read`` on the image's metadata, under the reader's lock, once it was found sound.

    Args:
        file: the image.
        read: gets what was read.
        force_share: read although another process writes to it.
        require: refuses what ``read`` cannot do with; what may be a torn read is read again before that.
        locking: how to take the reader's lock.
        closing: may close the file, which the caller does right afterwards.

    Raises:
        LockedError: open for writing elsewhere, and not ``force_share``.
        FormatError: QEMU would refuse the image, or it is unsafe to use.
    """
    for attempt in range(_SHARED_ATTEMPTS):
        last = not force_share or attempt + 1 == _SHARED_ATTEMPTS
        try:
            with locks.reading(
                file, force_share=force_share, locking=locking, briefly=True, closing=closing and not force_share
            ):
                layout = read_layout(file)
                (require if last else Layout.require_sound)(layout)
                return read(layout)
        except FormatError:
            if last:
                raise
    raise AssertionError("unreachable")


def describe(file: File, *, force_share: bool = False, locking: Locking = USUAL) -> tuple[ImageInfo, bool]:
    """The image and all its bitmaps, in one session; without numpy. It may close the file.

    Where single bitmaps are at fault, they have no count, and the faults are among the errors: nothing but that is
    shown of them, and everything else refuses the image. Errors as `read_session`.

    Returns:
        The description, and whether the image says that a tracker has its bitmaps.
    """
    return read_session(
        file,
        lambda layout: (describe_layout(file, layout), layout.tracked),
        force_share=force_share,
        require=Layout.require_listable,
        locking=locking,
        closing=True,
    )


def describe_layout(file: File, layout: Layout) -> ImageInfo:
    """As `describe`, of metadata that was read already."""
    notes = []
    if layout.is_void:
        which = f"{void_bitmaps(file)}; 'recover' brings back what it can, all dirty"
        notes.append(f"its bitmaps are void: software that does not know them has changed the image: {which}")
    if layout.tracked:
        notes.append("tracked, with its bitmaps in another store; say which with --store")
    if resized := misfit(layout):
        notes.append(resized)
    bad = {fault.bitmap for fault in layout.faults}
    return ImageInfo(
        path=file.path,
        format=FORMAT,
        size=layout.header.size,
        cluster_size=layout.cluster_size,
        bitmaps=tuple(
            BitmapInfo(
                name=decode_name(slot.entry.name),
                granularity=slot.entry.granularity,
                recording=slot.entry.auto,
                inconsistent=slot.entry.in_use,
                busy=False,
                count=None if slot.entry.in_use or index in bad else _dirty_bytes(file, layout, slot),
            )
            for index, slot in enumerate(layout.slots)
        ),
        notes=tuple(notes),
        node=None if layout.name is None else decode_name(layout.name),
        uuid=None if layout.uuid is None else str(uuid.UUID(bytes=layout.uuid)),
        errors=tuple(f"{file.path}: {fault.field}: {fault.what}" for fault in layout.faults),
    )


def _dirty_bytes(file: File, layout: Layout, slot: Slot) -> int:
    return count_dirty(file, layout, slot) * slot.entry.granularity


def count_dirty(file: File, layout: Layout, slot: Slot) -> int:
    """How many bits of a bitmap are set, read cluster by cluster.

    Counted with plain integers: importing numpy would take longer than `list` needs for all else together.
    """
    cluster = layout.cluster_size
    left = geometry.granules(layout.header.size, slot.entry.granularity)
    count = 0
    for raw in directory.parse_table(slot.table or b""):
        bits = min(left, cluster * 8)
        left -= bits
        if raw == directory.TABLE_ALL_ONES:
            count += bits
        elif raw:
            data = file.read_exactly(raw, geometry.ceil_div(bits, 8))
            value = int.from_bytes(data, "little")
            count += (value & ((1 << bits) - 1) if bits % 8 else value).bit_count()
    return count


@contextlib.contextmanager
def write_session(path: str, abspath: str | None = None, *, locking: Locking = USUAL) -> Iterator[tuple[File, Layout]]:
    """Opens an image for writing, under QEMU's locks for a writer until the block ends.

    Args:
        path: of the image, for messages.
        abspath: its absolute path, where the process may have changed its folder since; see `open_file`.
        locking: how to take the locks.

    Yields:
        The file, and its metadata as read under the locks; faults in it are for the caller to judge.

    Raises:
        LockedError: another process, or another thread, has the image open.
        StorageError, UnsupportedError: it cannot be opened or written to.
    """
    with open_file(path, writable=True, abspath=abspath) as file, locks.writing(file, locking=locking):
        yield file, read_layout(file)


def read_identity(path: str) -> tuple[str, str] | None:
    """An image's node name and UUID, damaged as it may be otherwise; None where it has no identity.

    Raises:
        LockedError, StorageError: as for any reading.
    """
    with open_file(path) as file, locks.reading(file, force_share=True):
        layout = read_head(file)
        if layout.name is None or layout.uuid is None or len(layout.uuid) < qcow2.NAMESPACE_EXTENSION_SIZE:
            return None
        return decode_name(layout.name), str(uuid.UUID(bytes=layout.uuid))


def require_header(path: str) -> None:
    """Refuses what has no qcow2 header that can be relied on.

    Raises:
        FormatError: names the field.
        StorageError: as for any reading.
    """
    with open_file(path) as file, locks.reading(file, force_share=True):
        read_head(file).require_sound()
