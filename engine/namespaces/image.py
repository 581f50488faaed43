"""`Image`: a qcow2 image as a mapping of names to bitmaps, read under QEMU's locks and changed in transactions."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dirtmap.engine.model.infos import LEFT_IN_USE, VOID, ImageInfo, Recovery
from dirtmap.engine.model.naming import decode_name, encode_name, label
from dirtmap.engine.model.transaction import Transaction
from dirtmap.engine.namespaces.held import Held
from dirtmap.engine.namespaces.place import NO_PLACE, Place, remembered
from dirtmap.engine.namespaces.ports import HostPort
from dirtmap.engine.namespaces.whereabouts import place_of
from dirtmap.engine.qcow2.clusters import Clusters, Lasting, load
from dirtmap.engine.qcow2.layout import Layout, Slot, read_layout, void_bitmaps
from dirtmap.engine.qcow2.reading import FORMAT, T, describe_layout, read_session, write_session
from dirtmap.engine.system.file import File, open_file
from dirtmap.engine.system.locks import USUAL, Locking
from dirtmap.engine.system.log import logger
from dirtmap.fmt import directory, geometry, qcow2
from dirtmap.fmt.errors import BitmapError, FormatError, LockedError, MovedError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dirtmap.engine.model.bitmap import Bitmap
    from dirtmap.engine.model.content import Content
    from dirtmap.engine.qcow2.commit import Kept, Written


@dataclass(eq=False, slots=True)
class _Source:
    """Where a bitmap of a transaction has its bits until they are read."""

    file: File
    layout: Layout
    slot: Slot

    damage: str | None = None  # what is damaged is refused

    @property
    def uniform(self) -> bool | None:
        """What all bits are: not known without reading the bitmap table."""
        return None

    def load(self) -> NDArray[np.uint64]:
        from dirtmap.engine.model.content import Packed

        nbits = geometry.granules(self.layout.header.size, self.slot.entry.granularity)
        return Packed(nbits, load(self.file, self.layout, self.slot)).words

    def open(self) -> Content:
        from dirtmap.engine.model.content import BLOCK, Whole

        there = Clusters(self.file, self.layout, self.slot)
        return Whole(there.nbits, self.load()) if there.nbits <= BLOCK else there


class Image(Held):
    """The bitmaps of a qcow2 image, read and changed under QEMU's locks.

    Args:
        path: of the image.
        host: its stores remember the place, holds and checkpoints of the image.
        force_share: reads even while another process writes to the image.

    Attributes:
        abspath: the absolute path of the image, because the process may change its working folder.
    """

    format = FORMAT

    def __init__(self, path: str, host: HostPort, *, force_share: bool = False) -> None:
        self.path, self._host = path, host
        self._force_share = force_share
        self._found_place: Place | None = None
        self._file = open_file(path)
        self.abspath = self._file.abspath
        try:
            self._read(self._remember)
        except BaseException:
            self._file.close()
            raise

    def _remember(self, layout: Layout) -> None:
        self.size, self.cluster_size = layout.header.size, layout.cluster_size
        self.name = None if layout.name is None else decode_name(layout.name)
        self.uuid = None if layout.uuid is None else str(uuid.UUID(bytes=layout.uuid))
        self._found_place = None

    @property
    def place(self) -> Place:
        """The place record of the image: what the host's stores remember of it."""
        if self._found_place is None:
            self._found_place = NO_PLACE
            if self.name is not None and self.uuid is not None:
                self._found_place = place_of(self._host, self.name, uuid.UUID(self.uuid).bytes)
        return self._found_place

    @contextlib.contextmanager
    def naming(self) -> Iterator[Naming]:
        """Locks the image as a writer does, to change its identity.

        Raises:
            As `transaction`.
        """
        with self._writing() as (file, _), self.place.changing(self.abspath):
            yield Naming(file)
        self._read(self._remember)

    def tracking(self) -> None:
        """None: as far as the image tells, it is not tracked; see `Namespace.tracking`.

        Raises:
            LockedError: it is tracked, and the tracker's store is not known.
        """
        self._read_here(Layout.require_untracked)

    def close(self) -> None:
        """Closes the image's file."""
        self._file.close()

    def info(self) -> ImageInfo:
        """Describes the image and all its bitmaps, as of one moment."""

        def read(layout: Layout) -> ImageInfo:
            slots = {decode_name(slot.entry.name): slot for slot in layout.slots}

            def content(name: str) -> Bitmap | None:
                slot = slots.get(name)
                return None if slot is None or slot.entry.in_use else _lazy(self._file, layout, slot)

            return remembered(describe_layout(self._file, layout), self.place, content)

        return self._read_here(read)

    def _load(self, name: bytes) -> Bitmap | None:
        def read(layout: Layout) -> Bitmap | None:
            for slot in layout.slots:
                if slot.entry.name == name:
                    if slot.entry.in_use:
                        layout.require_untracked()  # if tracked, it is not inconsistent but checked out
                    bitmap = bitmap_of_slot(self._file, layout, slot)
                    bitmap.busy = decode_name(name) in self.place.held()
                    return bitmap.freeze()
            return None

        return self._read_here(read)

    def _names(self) -> list[bytes]:
        return self._read_here(_names)

    def recover(self, names: Iterable[str] = ()) -> list[Recovery]:
        """Makes inconsistent bitmaps usable; see the function `recover`."""
        return recover(self.path, names, place=self.place, abspath=self.abspath, locking=self._host.locking)

    def _holding(self, where: str, names: list[str], owner: str) -> contextlib.AbstractContextManager[None]:
        return self.place.hold(where, names, owner)

    def __repr__(self) -> str:
        return f"<Image {self.path!r}>"

    def _read(self, read: Callable[[Layout], T]) -> T:
        return read_session(self._file, read, force_share=self._force_share, locking=self._host.locking)

    def _read_here(self, read: Callable[[Layout], T]) -> T:
        """Like `_read`, but only for bitmaps that are in the image.

        Raises:
            MovedError: the bitmaps are checked out into a known store.
        """
        return self._read(lambda layout: read(self._at_home(layout)))

    def _at_home(self, layout: Layout) -> Layout:
        if layout.tracked and self.place.is_checked_out(self.abspath):
            raise MovedError(self.path, "is tracked; open it again")
        return layout

    @contextlib.contextmanager
    def _writing(self) -> Iterator[tuple[File, Layout]]:
        with write_session(self.path, self.abspath, locking=self._host.locking) as (file, layout):
            if not self._file.is_current():
                raise LockedError(self.path, "was replaced since it was opened")
            yield file, layout

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Changes the bitmaps; see `Namespace.transaction`. QEMU is locked out for the time of the block."""
        with self._writing() as (file, layout):
            layout.require_sound()
            self._at_home(layout).require_untracked()
            with self.place.changing(self.abspath), _changing(file, layout, self.place) as bitmaps:
                yield bitmaps


class Naming:
    """The identity of a qcow2 image during a change of it; see `Image.naming`.

    QEMU keeps the identity when it changes the image. A converted image has none.

    Args:
        file: the image, locked.
    """

    def __init__(self, file: File) -> None:
        self._file = file

    @property
    def identity(self) -> tuple[str, bytes] | None:
        """The node's name and the UUID as 16 bytes; None if the image has no identity."""
        layout = self._sound()
        if layout.name is None or layout.uuid is None:
            return None
        return decode_name(layout.name), layout.uuid

    @property
    def size(self) -> int:
        """Size of the virtual disk, in bytes."""
        return self._sound().header.size

    def bitmaps(self) -> int:
        """Number of bitmaps in the image."""
        return len(self._sound().slots)

    def set(self, name: str, image_uuid: bytes | None = None) -> bytes:
        """Gives the image a node name, durably.

        Args:
            name: of the node.
            image_uuid: 16 bytes; None keeps the image's UUID, or makes a new one if it has none. Another UUID makes it
                known as a copy: what a tracker of the original has checked out is given up.

        Returns:
            The UUID of the image, 16 bytes.

        Raises:
            LockedError: a live tracker tracks this very file.
            BitmapError: no node can have that name.
            UnsupportedError: the first cluster has no room.
        """
        from dirtmap.engine.qcow2.commit import set_identity, set_tracked

        layout = self._sound()
        chosen = image_uuid or layout.uuid or uuid.uuid4().bytes
        if layout.tracked and chosen != layout.uuid:  # tracked is the original, of which this is a copy
            _refuse_living(self._file, layout)
            set_tracked(self._file, layout, False)
            layout = read_layout(self._file)
        layout.require_untracked()
        data = chosen + encode_name(name)
        for field, what in qcow2.namespace_extension_faults(data):
            raise BitmapError(f"{self._file.path}: {field}", what)
        set_identity(self._file, layout, data)
        return chosen

    def remove(self) -> None:
        """Removes the name and the UUID. Errors as `set`."""
        from dirtmap.engine.qcow2.commit import set_identity

        layout = self._sound()
        layout.require_untracked()
        set_identity(self._file, layout, None)

    def _sound(self) -> Layout:
        layout = read_layout(self._file)
        layout.require_sound()
        return layout


def _names(layout: Layout) -> list[bytes]:
    return [slot.entry.name for slot in layout.slots]


def _lazy(file: File, layout: Layout, slot: Slot) -> Bitmap:
    from dirtmap.engine.model.bitmap import Bitmap

    entry = slot.entry
    source = _Source(file, layout, slot)
    return Bitmap._lazy(layout.header.size, entry.granularity, entry.auto, entry.in_use, source)


def bitmap_of_slot(file: File, layout: Layout, slot: Slot) -> Bitmap:
    """A bitmap of an image as a value that lasts: its bits are read now, while nothing can change them.

    Of a large one, what is read is not kept, but looked at again when it is asked for; see `Lasting`. Errors as there.
    """
    bitmap = _lazy(file, layout, slot)
    if bitmap.inconsistent:
        return bitmap
    if bitmap._is_large:
        return bitmap._of(bitmap.size, bitmap.granularity, Lasting(file, layout, slot), bitmap.recording)
    bitmap._take(load(file, layout, slot))
    return bitmap


@contextlib.contextmanager
def _changing(file: File, layout: Layout, place: Place) -> Iterator[Transaction]:
    from dirtmap.engine.qcow2.commit import Kept, commit, require_writable

    require_writable(layout)
    bad = {fault.bitmap for fault in layout.faults}  # damaged bitmaps stay as they are
    chain = place.checkpoints({decode_name(slot.entry.name): slot.entry.auto for slot in layout.slots})
    bitmaps = Transaction(
        layout.path,
        layout.header.size,
        geometry.default_granularity(layout.cluster_size),
        {decode_name(s.entry.name): _lazy(file, layout, s) for i, s in enumerate(layout.slots) if i not in bad},
        place.held(),
        chain,
    )
    try:
        yield bitmaps
        bitmaps.validate()
        wanted = _wanted(layout, bitmaps)
        if bad:
            good = iter(wanted)
            wanted = [Kept(s.entry) if i in bad else next(good) for i, s in enumerate(layout.slots)]
        if _is_change(layout, wanted):
            if chain:  # after a crash in between, a former checkpoint must not count as one
                from dirtmap.engine.model.checkpoints import reconcile

                place.keep_checkpoints(reconcile(chain, dict.fromkeys(bitmaps.checkpoints, True)))
            void = void_bitmaps(file) if layout.is_void and not layout.slots else None
            commit(file, layout, wanted)
            if void:
                bitmaps.notes.append(f"bitmaps that were void are gone: {void}")
            if chain:
                place.keep_checkpoints(bitmaps.checkpoints)
    finally:
        bitmaps.close()


def _is_change(layout: Layout, wanted: list[Kept | Written]) -> bool:
    from dirtmap.engine.qcow2.commit import Kept

    return [item.entry if isinstance(item, Kept) else None for item in wanted] != [s.entry for s in layout.slots]


def _wanted(layout: Layout, bitmaps: Transaction) -> list[Kept | Written]:
    """What to commit.

    A bitmap whose bits nobody touched keeps its place on disk, but no two bitmaps share a place. Of the others, one
    that keeps its name is compared with what that name had, so that unchanged clusters are kept.
    """
    from dirtmap.engine.qcow2.commit import Kept, Written

    kept: dict[str, Kept] = {}
    places = {slot.entry.name: slot for slot in layout.slots}
    for name, bitmap in bitmaps.items():
        source = bitmap._source
        if isinstance(source, _Source) and places.get(source.slot.entry.name) is source.slot:
            del places[source.slot.entry.name]
            flags = {"set": directory.FLAG_AUTO} if bitmap.recording else {"clear": directory.FLAG_AUTO}
            entry = source.slot.entry.with_flags(**flags)
            raw = encode_name(name)
            kept[name] = Kept(entry if entry.name == raw else replace(entry, name=raw))
        elif bitmap.inconsistent:
            raise BitmapError(f"{bitmaps.where}: {label(name)}", "an inconsistent bitmap cannot be copied")
    return [
        kept.get(name)
        or Written(
            name=encode_name(name),
            flags=directory.FLAG_AUTO if bitmap.recording else 0,
            granularity_bits=bitmap.granularity.bit_length() - 1,
            content=bitmap._parts(lasting=True),
            base=places.get(encode_name(name)),
        )
        for name, bitmap in bitmaps.items()
    ]


def _refuse_living(file: File, layout: Layout) -> None:
    """Refuses to give up the bitmaps that a live tracker has checked out into a store that is not known."""
    if layout.tracked and layout.uuid:
        from dirtmap.engine.session.livefile import refuse_living

        refuse_living(file.abspath, layout.uuid)


def recover(
    path: str,
    names: Iterable[str] = (),
    *,
    place: Place = NO_PLACE,
    abspath: str | None = None,
    locking: Locking = USUAL,
) -> list[Recovery]:
    """Makes inconsistent bitmaps usable. Leaves all others alone, damaged ones included.

    For a tracked image whose tracker's store is not known, gives up what that store has: all bitmaps become dirty all
    over, whichever are named. So do void bitmaps, if the directory and all that it leads to is sound and no other
    structure has taken its clusters.

    Args:
        path: the image.
        names: which bitmaps; if empty, all inconsistent ones.
        place: the place record of the image.
        abspath: see `open_file`.
        locking: how to take the locks.

    Raises:
        BitmapError: a name does not exist.
        FormatError: the entry of a named bitmap, the header, or the directory as a whole is damaged; or void bitmaps
            cannot be told any more.
        LockedError: the tracker of the image is alive.
        LockedError, UnsupportedError, StorageError: as `Image.transaction`.
    """
    from dirtmap.engine.model import changes
    from dirtmap.engine.qcow2.commit import set_tracked

    recovered = []
    with write_session(path, abspath, locking=locking) as (file, layout):
        _refuse_living(file, layout)
        why = LEFT_IN_USE
        if layout.is_void:
            found = read_layout(file, void=True)
            if not layout.tracked:  # else it has to be given up in any case
                found.require_sound()
            if not found.faults:
                why, layout = VOID, found
        elif layout.tracked:
            why = "what its tracker had in another store is given up"
        by_bitmap = all(fault.bitmap is not None for fault in layout.faults)
        if not by_bitmap or len(set(_names(layout))) < len(layout.slots):
            layout.require_sound()
        bad = {decode_name(layout.slots[fault.bitmap or 0].entry.name): fault for fault in layout.faults}
        with place.changing(file.abspath), _changing(file, layout, place) as bitmaps:
            chosen = list(names) or [name for name, bitmap in bitmaps.items() if bitmap.inconsistent]
            every = layout.tracked or layout.is_void
            for name in chosen if every else ():
                if name not in bad:
                    _ = bitmaps[name]  # it is there
            for name in [*bitmaps, *bad] if every else chosen:
                if fault := bad.get(name):
                    raise FormatError(f"{path}: {fault.field}", fault.what)
                if bitmaps[name].inconsistent or every:
                    changes.recover(bitmaps, name)
                    recovered.append(Recovery(name, f"all dirty: {why}"))
        if layout.tracked:  # only after the commit that makes them all dirty
            set_tracked(file, read_layout(file), False)
    for item in recovered:
        logger(__name__).info("%s: %s recovered: %s", path, label(item.name), item.how)
    return recovered
