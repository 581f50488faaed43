"""`Image`: a qcow2 image as a mapping of names to bitmaps, read under QEMU's locks, changed in transactions."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from dirtmap.engine.model.namespace import LEFT_IN_USE, BitmapInfo, ImageInfo, Namespace, Recovery, Transaction
from dirtmap.engine.model.naming import decode_name, encode_name, label
from dirtmap.engine.qcow2.layout import Layout, Slot, read_head, read_layout
from dirtmap.engine.system import locks
from dirtmap.engine.system.file import File, open_file
from dirtmap.fmt import directory, geometry, qcow2
from dirtmap.fmt.errors import BitmapError, Error, FormatError, LockedError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dirtmap.engine.model.bitmap import Bitmap
    from dirtmap.engine.qcow2.commit import Kept, Written
    from dirtmap.engine.storefile.file import Store
    from dirtmap.engine.tracking.home import Home
    from dirtmap.engine.tracking.tracker import Tracker

T = TypeVar("T")

FORMAT = "qcow2"
# With -U the image may change while it is read; a second look tells a torn read from damage.
_SHARED_ATTEMPTS = 5


def read_session(file: File, read: Callable[[Layout], T], *, force_share: bool = False) -> T:
    """Runs ``read`` on the image's metadata, under the reader's lock, once it was found sound.

    Raises:
        LockedError: open for writing elsewhere, and not ``force_share``.
        FormatError: QEMU would refuse the image, or it is unsafe to use.
    """
    for attempt in range(_SHARED_ATTEMPTS):
        try:
            with locks.reading(file, force_share=force_share):
                layout = read_layout(file)
                layout.require_sound()
                return read(layout)
        except FormatError:
            if not force_share or attempt + 1 == _SHARED_ATTEMPTS:
                raise
    raise AssertionError("unreachable")


def describe(file: File, *, force_share: bool = False) -> ImageInfo:
    """The image and all its bitmaps, in one session; without numpy. Errors as `read_session`."""
    return read_session(file, lambda layout: _describe(file, layout), force_share=force_share)


def _describe(file: File, layout: Layout) -> ImageInfo:
    notes = []
    if layout.extension and not layout.valid:
        notes.append("its bitmaps are void: software that does not know them has changed the image")
    if layout.tracked:
        notes.append("tracked, with its bitmaps in another store; say which with --store")
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
                count=None if slot.entry.in_use else count_dirty(file, layout, slot) * slot.entry.granularity,
            )
            for slot in layout.slots
        ),
        notes=tuple(notes),
        node=None if layout.name is None else decode_name(layout.name),
        uuid=None if layout.uuid is None else str(uuid.UUID(bytes=layout.uuid)),
    )


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


def load(file: File, layout: Layout, slot: Slot) -> NDArray[np.uint64]:
    """A bitmap's bits as words: uint64, shape (ceil(granules / 64),), tail bits zero.

    table      |  0  |  A  | A+1 | A+2 |  1  |  B  |
    buffer     | 00  |   one read      | ff  | read|      neighbouring clusters are read together
    """
    import numpy as np

    from dirtmap.engine.model import bits

    cluster = layout.cluster_size
    nbits = geometry.granules(layout.header.size, slot.entry.granularity)
    size = geometry.ceil_div(nbits, 8)
    words = np.zeros(geometry.ceil_div(nbits, 64), "<u8")
    octets = words.view(np.uint8)
    buffer = octets.data[:size]
    run: tuple[int, int, int] | None = None  # from byte, to byte of the buffer; offset in the file

    def read_run() -> None:
        if run:
            file.read_into(run[2], buffer[run[0] : run[1]])

    for index, raw in enumerate(directory.parse_table(slot.table or b"")):
        first, last = index * cluster, min((index + 1) * cluster, size)
        if raw == directory.TABLE_ALL_ONES:
            octets[first:last] = 0xFF
        elif raw and run and run[1] == first and run[2] + run[1] - run[0] == raw:
            run = (run[0], last, run[2])
        elif raw:
            read_run()
            run = (first, last, raw)
    read_run()
    bits.mask_tail(words, nbits)
    return words


@dataclass(eq=False, slots=True)
class _Source:
    """Where a bitmap of a transaction has its bits while nobody has asked for them."""

    file: File
    layout: Layout
    slot: Slot

    def load(self) -> NDArray[np.uint64]:
        if self.file.fd < 0:
            raise Error(self.layout.path, "the transaction has ended")
        return load(self.file, self.layout, self.slot)


class Keeper:
    """What a host keeps about an image outside of it. This one keeps nothing.

    Attributes:
        store: the path of the store that remembers the image's place; None where none is known to.
    """

    store: str | None = None

    def held(self) -> dict[str, str]:
        """Which bitmaps are held, and by whom."""
        return {}

    def checkpoints(self, recording: Mapping[str, bool]) -> list[str]:
        """The chain of its checkpoints; see `dirtmap.engine.namespaces.condition.checkpoints_of`."""
        return []

    def keep_checkpoints(self, chain: list[str]) -> None:
        """Remembers another chain."""

    def look_after(self, target: Store) -> None:
        """Has commits of a store remembered; see `dirtmap.engine.host.stores.Stores.look_after`."""

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Around a change of the image's metadata, which leaves the guest's data alone."""
        yield

    def hold(self, where: str, name: str, owner: str) -> contextlib.AbstractContextManager[None]:
        """Holds a bitmap for the time of the block.

        Args:
            where: how messages name the bitmap.
            name: of the bitmap.
            owner: what others are told who ask.

        Raises:
            BitmapError: there is no place to remember that.
        """
        raise BitmapError(where, "only bitmaps of an image with a name can be held; 'node add' gives it one")


class Image(Namespace):
    """A qcow2 image's bitmaps, read and changed under QEMU's locks.

    Attributes:
        place: its path, absolute: the process may change its folder.
    """

    format = FORMAT

    def __init__(self, path: str, *, force_share: bool = False) -> None:
        self.path = path
        self.keeper = Keeper()
        self._force_share = force_share
        self._file = open_file(path)
        self.place = self._file.place
        try:
            self._read(self._remember)
        except BaseException:
            self._file.close()
            raise

    def _remember(self, layout: Layout) -> None:
        self.size, self.cluster_size = layout.header.size, layout.cluster_size
        self.name = None if layout.name is None else decode_name(layout.name)
        self.uuid = None if layout.uuid is None else str(uuid.UUID(bytes=layout.uuid))

    def set_identity(self, name: str | None, *, new_uuid: bool = False, image_uuid: bytes | None = None) -> None:
        """Gives the image a node name, and a UUID where it has none or is to have another; None takes both away.

        QEMU keeps both through its own changes; a converted image has neither.

        Raises:
            As `transaction`; UnsupportedError also where the first cluster has no room.
        """
        from dirtmap.engine.qcow2.commit import set_identity, set_tracked

        with self._writing() as (file, layout), self.keeper.changing():
            layout.require_sound()
            if new_uuid and layout.tracked:  # of the image that this is a copy of
                _refuse_living(file, layout)
                set_tracked(file, layout, False)
                layout = read_layout(file)
            layout.require_untracked()
            data = None
            if name is not None:
                identity = uuid.uuid4().bytes if new_uuid or layout.uuid is None else layout.uuid
                identity = image_uuid or identity
                data = identity + encode_name(name)
                for field, what in qcow2.namespace_extension_faults(data):
                    raise BitmapError(f"{self.path}: {field}", what)
            set_identity(file, layout, data)
        self._read(self._remember)

    def tracking(self) -> None:
        """None: nobody tracks it, as far as the image tells; see `Namespace.tracking`.

        Raises:
            LockedError: the tracker's store is not known.
        """
        self._read(Layout.require_untracked)

    def track(self, **options: Any) -> Tracker:
        """Begins to track writes to the image; see `Namespace.track`."""
        from dirtmap.engine.namespaces.checked_out import track_image

        return track_image(self, options)

    def _track_with(self, device: Home, options: dict[str, Any], make: Callable[..., Tracker]) -> Tracker:
        from dirtmap.engine.namespaces.checked_out import track_image

        return track_image(self, options, device, make)

    def close(self) -> None:
        """Closes the image's file."""
        self._file.close()

    def info(self) -> ImageInfo:
        """The image and all its bitmaps as of one moment."""
        found = describe(self._file, force_share=self._force_share)
        if not (held := self.keeper.held()):
            return found
        return replace(found, bitmaps=tuple(replace(bitmap, busy=bitmap.name in held) for bitmap in found.bitmaps))

    def _load(self, name: bytes) -> Bitmap | None:
        def read(layout: Layout) -> Bitmap | None:
            for slot in layout.slots:
                if slot.entry.name == name:
                    if slot.entry.in_use:
                        layout.require_untracked()  # it is not inconsistent, but elsewhere
                    bitmap = _lazy(self._file, layout, slot)
                    bitmap.busy = decode_name(name) in self.keeper.held()
                    if not bitmap.inconsistent:
                        _ = bitmap.words  # now, while nothing can change it
                    return bitmap.freeze()
            return None

        return self._read(read)

    def _names(self) -> list[bytes]:
        return self._read(_names)

    def recover(self, names: Iterable[str] = ()) -> list[Recovery]:
        """Makes inconsistent bitmaps usable; see `recover`."""
        return recover(self.path, names, keeper=self.keeper, place=self.place)

    @contextlib.contextmanager
    def hold(self, name: str, owner: str = "dirtmap") -> Iterator[Bitmap]:
        """Holds a bitmap for a backup; see `Namespace.hold`."""
        where = f"{self.where}: {label(name)}"
        self[name].required(where)
        with self.keeper.hold(where, name, owner):
            yield self[name].required(where)

    def __repr__(self) -> str:
        return f"<Image {self.path!r}>"

    def _read(self, read: Callable[[Layout], T]) -> T:
        return read_session(self._file, read, force_share=self._force_share)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[tuple[File, Layout]]:
        with _write_session(self.path, self.place) as (file, layout):
            if not self._file.is_current():
                raise LockedError(self.path, "was replaced since it was opened")
            yield file, layout

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Changes the bitmaps; see `Namespace.transaction`. QEMU is kept out from the beginning to the end."""
        with self._writing() as (file, layout):
            layout.require_sound()
            layout.require_untracked()
            with self.keeper.changing(), _changing(file, layout, self.keeper) as bitmaps:
                yield bitmaps


def _names(layout: Layout) -> list[bytes]:
    return [slot.entry.name for slot in layout.slots]


@contextlib.contextmanager
def _write_session(path: str, place: str | None = None) -> Iterator[tuple[File, Layout]]:
    with open_file(path, writable=True, place=place) as file, locks.writing(file):
        yield file, read_layout(file)


def _lazy(file: File, layout: Layout, slot: Slot) -> Bitmap:
    from dirtmap.engine.model.bitmap import Bitmap

    entry = slot.entry
    source = _Source(file, layout, slot)
    return Bitmap._lazy(layout.header.size, entry.granularity, entry.auto, entry.in_use, source)


@contextlib.contextmanager
def _changing(file: File, layout: Layout, keeper: Keeper) -> Iterator[Transaction]:
    from dirtmap.engine.qcow2.commit import Kept, commit, require_writable

    require_writable(layout)
    bad = {fault.bitmap for fault in layout.faults}  # those stay as they are
    chain = keeper.checkpoints({decode_name(slot.entry.name): slot.entry.auto for slot in layout.slots})
    bitmaps = Transaction(
        layout.path,
        layout.header.size,
        geometry.default_granularity(layout.cluster_size),
        {decode_name(s.entry.name): _lazy(file, layout, s) for i, s in enumerate(layout.slots) if i not in bad},
        keeper.held(),
        chain,
    )
    try:
        yield bitmaps
        bitmaps.judge()
        wanted = _wanted(layout, bitmaps)
        if bad:
            good = iter(wanted)
            wanted = [Kept(s.entry) if i in bad else next(good) for i, s in enumerate(layout.slots)]
        if _is_change(layout, wanted):
            if chain:  # what is not a checkpoint any more must not be taken for one if this ends in between
                from dirtmap.engine.model.checkpoints import settle

                keeper.keep_checkpoints(settle(chain, dict.fromkeys(bitmaps.checkpoints, True)))
            commit(file, layout, wanted)
            if chain:
                keeper.keep_checkpoints(bitmaps.checkpoints)
    finally:
        bitmaps.close()


def _is_change(layout: Layout, wanted: list[Kept | Written]) -> bool:
    from dirtmap.engine.qcow2.commit import Kept

    return [item.entry if isinstance(item, Kept) else None for item in wanted] != [s.entry for s in layout.slots]


def _wanted(layout: Layout, bitmaps: Transaction) -> list[Kept | Written]:
    """What to commit.

    Bitmaps whose bits nobody touched keep their place on disk, at most one bitmap a place. Of the others, those that
    keep their name are compared with what that name had, so that clusters which did not change are taken over.
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
            packed=memoryview(bitmap.packed()),
            base=places.get(encode_name(name)),
        )
        for name, bitmap in bitmaps.items()
    ]


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


def _refuse_living(file: File, layout: Layout) -> None:
    """Refuses to give up what a tracker has, whose session is in a store that is not known, as long as it lives."""
    if layout.tracked and layout.uuid:
        from dirtmap.engine.session.livefile import refuse_living

        refuse_living(file.place, layout.uuid)


def recover(
    path: str, names: Iterable[str] = (), *, keeper: Keeper | None = None, place: str | None = None
) -> list[Recovery]:
    """Makes inconsistent bitmaps usable; others are left alone, damaged ones included.

    Of an image that is tracked gives up what its tracker's store has, which the caller does not know: all bitmaps
    become all dirty, whichever are named.

    Args:
        path: the image.
        names: which; none for all that are inconsistent.
        keeper: what the host keeps about the image.
        place: see `open_file`.

    Raises:
        BitmapError: a name is not there, or its entry is damaged.
        FormatError: the header or the directory as a whole cannot be relied on.
        LockedError: its tracker lives.
        LockedError, UnsupportedError, StorageError: as `Image.transaction`.
    """
    from dirtmap.engine.model import changes
    from dirtmap.engine.qcow2.commit import set_tracked

    recovered = []
    with _write_session(path, place) as (file, layout):
        _refuse_living(file, layout)
        by_bitmap = all(fault.bitmap is not None for fault in layout.faults)
        if not by_bitmap or len(set(_names(layout))) < len(layout.slots):
            layout.require_sound()
        bad = {decode_name(layout.slots[fault.bitmap or 0].entry.name): fault for fault in layout.faults}
        keeper = keeper or Keeper()
        with keeper.changing(), _changing(file, layout, keeper) as bitmaps:
            chosen = list(names) or [name for name, bitmap in bitmaps.items() if bitmap.inconsistent]
            for name in [*bitmaps, *bad] if layout.tracked else chosen:
                if fault := bad.get(name):
                    raise FormatError(f"{path}: {fault.field}", fault.what)
                if bitmaps[name].inconsistent or layout.tracked:
                    changes.recover(bitmaps, name)
                    why = "what its tracker had in another store is given up" if layout.tracked else LEFT_IN_USE
                    recovered.append(Recovery(name, f"all dirty: {why}"))
        if layout.tracked:  # once they are all dirty
            set_tracked(file, read_layout(file), False)
    return recovered
