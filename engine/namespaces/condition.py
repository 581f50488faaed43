"""A namespace's directory and bits: read, judged, and placed anew. All of it is of one commit, or of one to come."""

from __future__ import annotations

import bisect
import contextlib
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import crc32c

from dirtmap.engine.identity import disk_size, identity_now, root_elsewhere
from dirtmap.engine.model.naming import decode_name, encode_name, label
from dirtmap.engine.storefile import holds
from dirtmap.engine.storefile.file import Change, Snapshot, Store
from dirtmap.fmt import directory, geometry, store
from dirtmap.fmt.directory import Entry
from dirtmap.fmt.errors import BitmapError, Error, FormatError, StorageError, printable
from dirtmap.fmt.store import Area, Record, namespace_label
from dirtmap.fmt.structures.directory import build_directory, parse_entries
from dirtmap.fmt.structures.store import BITS_CHECKSUM

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from dirtmap.engine.model.bitmap import Bitmap
    from dirtmap.engine.session.status import Status
    from dirtmap.engine.session.view import SessionView

_PIECE = 1 << 20  # bytes read at once where the whole is not needed


def no_namespace(path: str, name: bytes) -> BitmapError:
    """The error for a namespace that is not there."""
    return BitmapError(f"{path}: {namespace_label(name)}", "there is no such namespace")


def require_free(change: Change, name: bytes) -> None:
    """Refuses a new namespace of a name that is taken.

    Raises:
        BitmapError: it is.
    """
    if change.table.get(name):
        raise BitmapError(f"{change.snapshot.file.path}: {namespace_label(name)}", "the name is taken")


@dataclass(eq=False, slots=True)
class Source:
    """Where a bitmap of a transaction has its bits while nobody has asked for them; none where it is all dirty."""

    snapshot: Snapshot
    record: Record
    entry: Entry
    doubted: bool

    def load(self) -> NDArray[np.uint64]:
        """See `load`; not once the transaction has ended."""
        if self.snapshot.file.fd < 0:
            raise Error(self.snapshot.file.path, "the transaction has ended")
        return load(self.snapshot, self.record, self.entry, self.doubted)


def load(snapshot: Snapshot, record: Record, entry: Entry, doubted: bool) -> NDArray[np.uint64]:
    """A bitmap's bits as words: uint64, shape (ceil(granules / 64),), verified, tail bits zero.

    Those of a tracked image, or of one whose tracker has died, include what the tracker has marked.

    Raises:
        FormatError: the checksum is wrong.
    """
    words = load_saved(snapshot, record, entry, doubted)
    if not doubted and (view := tracked_view(snapshot, record)):
        view.add(entry, words)
    return words


def load_saved(snapshot: Snapshot, record: Record, entry: Entry, doubted: bool) -> NDArray[np.uint64]:
    """As `load`, as far as it is in the store."""
    import numpy as np

    from dirtmap.engine.model import bits

    nbits = geometry.granules(record.size, entry.granularity)
    length = geometry.packed_bytes(record.size, entry.granularity)
    if doubted or entry.table_offset == store.ALL_ONES:
        words = np.full(geometry.ceil_div(nbits, 64), 2**64 - 1, "<u8")
        bits.mask_tail(words, nbits)
        return words
    words = np.zeros(geometry.ceil_div(nbits, 64), "<u8")
    if entry.table_offset != store.ALL_ZEROS:
        buffer = words.view(np.uint8).data[:length]
        snapshot.file.read_into(entry.table_offset, buffer)
        checksum = BITS_CHECKSUM.parse(entry.extra_data).checksum
        if crc32c.crc32c(buffer) != checksum:
            raise _wrong_bits(snapshot, record, entry)
        bits.mask_tail(words, nbits)
    return words


def verify(snapshot: Snapshot, record: Record, entry: Entry) -> None:
    """Holds a bitmap's bits against their checksum, without keeping them in memory.

    Raises:
        FormatError: the checksum is wrong.
    """
    if entry.table_offset in (store.ALL_ZEROS, store.ALL_ONES):
        return
    checksum = 0
    end = entry.table_offset + geometry.packed_bytes(record.size, entry.granularity)
    for offset in range(entry.table_offset, end, _PIECE):
        checksum = crc32c.crc32c(snapshot.file.read(offset, min(_PIECE, end - offset)), checksum)
    if checksum != BITS_CHECKSUM.parse(entry.extra_data).checksum:
        raise _wrong_bits(snapshot, record, entry)


def _wrong_bits(snapshot: Snapshot, record: Record, entry: Entry) -> FormatError:
    bitmap = f"{label(decode_name(entry.name))} at {entry.table_offset:#x}"
    where = f"{snapshot.file.path}: {record.label}: {bitmap}"
    return FormatError(where, "its checksum is wrong; recover makes it all dirty")


def _require_own_directory(snapshot: Snapshot, record: Record) -> None:
    """Refuses a directory of which another namespace has a part: a small store could claim any number of bitmaps.

    Raises:
        FormatError: names both.
    """
    area, known = record.directory, snapshot.directories
    mine = area.offset, area.offset + area.length, record.name
    at = bisect.bisect_left(known, mine)
    for first, end, name in known[max(0, at - 1) : at + 1]:  # none of which overlap
        if name != record.name and first < mine[1] and mine[0] < end:
            what = f"overlaps that of {namespace_label(name)}; 'check -r all' mends the store"
            raise FormatError(f"{snapshot.file.path}: directory of {record.label} at {area.offset:#x}", what)
    if area.length and known[at : at + 1] != [mine]:
        known.insert(at, mine)


def read_entries(snapshot: Snapshot, record: Record) -> list[Entry]:
    """A namespace's directory.

    Raises:
        FormatError: damaged, or an entry makes no sense.
    """
    _require_own_directory(snapshot, record)
    where = f"{snapshot.file.path}: {record.label}"
    what, remedy = f"directory of {record.label}", "recover makes its bitmaps all dirty"
    data = snapshot.read(record.directory, what, remedy)
    entries: dict[bytes, Entry] = {}
    try:
        for _, entry in parse_entries(data):
            faults = store.entry_faults(entry, record.size, snapshot.header.cluster_size, snapshot.size)
            for field, what in faults:
                raise FormatError(f"{where}: {label(decode_name(entry.name))}.{field}", what)
            if entry.name in entries:
                raise FormatError(f"{where}: directory", f"two entries for {label(decode_name(entry.name))}")
            entries[entry.name] = entry
            if len(entries) > record.nb_bitmaps:
                break
    except directory.BrokenEntryError as error:
        raise FormatError(f"{where}: directory", str(error)) from None
    if len(entries) != record.nb_bitmaps:
        raise FormatError(f"{where}.nb_bitmaps", f"{record.nb_bitmaps}, but the directory has another number")
    return list(entries.values())


def refuse_tracked(path: str, record: Record) -> None:
    """Refuses to change a namespace behind the back of the process that tracks it.

    Raises:
        LockedError: names the process.
    """
    if record.tracked:
        from dirtmap.engine.session import view as recovery

        where = f"{path}: {record.label}"
        recovery.refuse_tracked(where, recovery.session_of(record))


def refuse_session(path: str, record: Record) -> None:
    """As `refuse_tracked`; a session whose tracker has died is to be recovered first, too.

    Raises:
        LockedError: names the process.
        BitmapError: names the command that recovers.
    """
    refuse_tracked(path, record)
    if record.tracked:
        what = "its tracker has died; 'dirtmap recover' first"
        raise BitmapError(f"{path}: {record.label}", what)


def refuse_unsettled(snapshot: Snapshot, record: Record) -> None:
    """Refuses to end a node's session while a device that was tracked with it has yet to be recovered.

    Raises:
        BitmapError: names the device, and the command that recovers.
    """
    if record.tracked:
        from dirtmap.engine.session import peers

        if peer := peers.unsettled(snapshot.file.place, record):
            what = f"tracked with device '{printable(decode_name(peer.name))}' until that died; 'dirtmap recover' first"
            raise BitmapError(f"{snapshot.file.path}: {record.label}", what)


def settle_device(target: Store, name: bytes) -> None:
    """Recovers the device that was tracked with a node; see `dirtmap.engine.session.peers.settle`."""
    record = target.record(name)
    if record is not None and record.tracked:
        from dirtmap.engine.session import peers

        peers.settle(target, name)


def other_size(snapshot: Snapshot, record: Record) -> BitmapError:
    """The error for bits that are for a disk of another size: they say nothing about the new space."""
    verb = "node resize" if record.kind == store.KIND_NODE else "device set-root"
    what = f"its image has {size_now(record)} bytes now, and had {record.size}; '{verb}' adopts the new size"
    return BitmapError(f"{snapshot.file.path}: {record.label}", what)


def size_now(record: Record) -> int:
    """The size in bytes of a namespace's disk as its image has it now; as recorded where that cannot be looked at."""
    if record.kind in (store.KIND_NODE, store.KIND_DEVICE):
        with contextlib.suppress(StorageError):
            now = identity_now(record)
            if record.kind == store.KIND_NODE:
                return now.size
            if root_elsewhere(record):
                return record.size
            if now != record.identity or not record.nb_bitmaps:
                return disk_size(os.fsdecode(record.path))
    return record.size


def refuse_held(path: str, record: Record) -> None:
    """Refuses a change of all of a namespace's bitmaps, or of their addresses, while one of them is held.

    Raises:
        BitmapError: names the bitmap and who holds it.
    """
    for held in holds.living(record):
        where = f"{path}: {record.label}: {label(decode_name(held.bitmap))}"
        raise BitmapError(where, f"busy: held by {held}")


def refuse_without_root(snapshot: Snapshot, record: Record) -> None:
    """Refuses to change a device's bitmaps by the look of another image than its root's.

    Raises:
        BitmapError: there is one in its place.
    """
    if record.kind != store.KIND_DEVICE:
        return
    with contextlib.suppress(StorageError):
        if identity_now(record) == record.identity:
            return
    if reason := root_elsewhere(record):
        raise BitmapError(f"{snapshot.file.path}: {record.label}", reason)


def tracked_view(snapshot: Snapshot, record: Record) -> SessionView | None:
    """What a tracker, alive or dead, says about a namespace; None where none was there since it was last whole."""
    if not record.tracked:
        return None
    from dirtmap.engine.session.view import view_of

    return view_of(snapshot, record)


def tracking_status(snapshot: Snapshot, record: Record) -> Status | None:
    """Who tracks a namespace's image; None where nobody does, or did."""
    if not record.tracked:
        return None
    from dirtmap.engine.session.status import status_of

    return status_of(snapshot, record)


def checkpoints_of(where: str, record: Record, recording: Mapping[str, bool]) -> list[str]:
    """The chain of checkpoints of a namespace with these bitmaps; see `dirtmap.engine.model.checkpoints`.

    Args:
        where: names the namespace.
        record: of the namespace.
        recording: the bitmaps that there are, and whether they record.

    Raises:
        FormatError: it makes no sense.
    """
    if record.extension(store.EXTENSION_CHECKPOINTS) is None:
        return []
    from dirtmap.engine.model import checkpoints

    return checkpoints.settle(checkpoints.read_chain(where, record), recording)


def with_checkpoints(record: Record, chain: list[str]) -> Record:
    """The record with this chain of checkpoints and no other."""
    if not chain and record.extension(store.EXTENSION_CHECKPOINTS) is None:
        return record
    from dirtmap.engine.model import checkpoints

    return checkpoints.with_chain(record, chain)


def end_session(change: Change, record: Record, source: Snapshot | None = None) -> Record:
    """The record without the session of a tracker that has died, whose files go once the change is durable.

    Args:
        change: that is to end it.
        record: with the session.
        source: has the record; what is changed, where None.
    """
    if view := tracked_view(source or change.snapshot, record):
        change.afterwards.append(view.clean_up)
    return record.with_extensions(store.OF_A_SESSION)


def doubts(snapshot: Snapshot, record: Record) -> str | None:
    """Why a namespace's bits cannot be relied on, so that all of them count as dirty; None where they can."""
    if not record.nb_bitmaps:
        return None
    if doubt := header_doubts(snapshot, record):
        return doubt
    if view := tracked_view(snapshot, record):
        return view.doubt
    if record.kind in (store.KIND_NODE, store.KIND_DEVICE):
        try:
            now = identity_now(record)
        except StorageError as error:
            return f"the image cannot be looked at ({error.what})"
        if now != record.identity:
            return root_elsewhere(record) or "the image has changed while nobody tracked it"
    return None


def header_doubts(snapshot: Snapshot, record: Record) -> str | None:
    """As `doubts`, as far as the store itself tells."""
    if snapshot.chosen.in_doubt:
        return "both copies of a header are damaged, perhaps those of the newest"
    if record.generation <= snapshot.header.doubt_generation:
        return "the store lost a commit"
    return None


def is_readable(snapshot: Snapshot, record: Record, entry: Entry) -> bool:
    """False where the bits have a wrong checksum."""
    try:
        verify(snapshot, record, entry)
    except FormatError:
        return False
    return True


def bitmap_of(snapshot: Snapshot, record: Record, entry: Entry, doubted: bool) -> Bitmap:
    """A bitmap of a directory, its bits still unread; all dirty where ``doubted``."""
    from dirtmap.engine.model.bitmap import Bitmap

    source = Source(snapshot, record, entry, doubted)
    return Bitmap._lazy(record.size, entry.granularity, entry.auto, entry.in_use, source)


def busy_of(snapshot: Snapshot, record: Record, entries: list[Entry]) -> set[bytes]:
    """The raw names of those bitmaps of a namespace that are held, or that its tracker has taken for a backup."""
    view = tracked_view(snapshot, record)
    taken = {entry.name for entry in entries if view.is_busy(entry)} if view else set()
    return taken | {held.bitmap for held in holds.living(record)}


def release_bits(change: Change, record: Record, entry: Entry) -> None:
    """Gives up the clusters of a bitmap's bits, if it has any."""
    if entry.table_offset > store.ALL_ONES:
        change.release(Area(entry.table_offset, geometry.packed_bytes(record.size, entry.granularity)))


def replace_directory(change: Change, record: Record, old: list[Entry], wanted: list[Entry]) -> Area:
    """Has a namespace's directory written anew, and gives up the bits that only the old one leads to.

    Args:
        change: plans all of it.
        record: of the namespace, as it was.
        old: its entries so far.
        wanted: those from now on; those that keep their bits lead to the same place.

    Raises:
        BitmapError: there are too many.
    """
    packed = build_directory(wanted)
    if len(wanted) > directory.MAX_BITMAPS or len(packed) > store.MAX_METADATA_BYTES:
        where = f"{change.snapshot.file.path}: {record.label}"
        raise BitmapError(where, f"{len(wanted)} bitmaps are more than {directory.MAX_BITMAPS}")
    kept = {entry.table_offset for entry in wanted}
    for entry in old:
        if entry.table_offset not in kept:
            release_bits(change, record, entry)
    change.release(record.directory)
    return change.place(packed)


def place_bitmap(change: Change, record: Record, name: str, bitmap: Bitmap) -> Entry:
    """Has a bitmap's bits written, and makes the entry that leads to them.

    Raises:
        BitmapError: inconsistent, or too fine for the disk's size.
    """
    where = f"{change.snapshot.file.path}: {record.label}: {label(name)}"
    if bitmap.inconsistent:
        raise BitmapError(where, "an inconsistent bitmap cannot be copied")
    length = geometry.packed_bytes(record.size, bitmap.granularity)
    if length > directory.MAX_DATA_BYTES:
        what = f"granularity {bitmap.granularity} needs {length} bytes of bits, more than {directory.MAX_DATA_BYTES}"
        raise BitmapError(where, what)
    packed = bitmap.packed()
    flags = directory.FLAG_AUTO if bitmap.recording else 0
    bits = bitmap.granularity.bit_length() - 1
    dirty = bitmap.count // bitmap.granularity
    if dirty == 0:
        return Entry(encode_name(name), store.ALL_ZEROS, 0, flags, bits)
    if dirty == geometry.granules(record.size, bitmap.granularity):
        return Entry(encode_name(name), store.ALL_ONES, 0, flags, bits)
    area = change.place(packed)
    clusters = len(area.clusters(change.header.cluster_size))
    extra = BITS_CHECKSUM.build(checksum=area.checksum, reserved=0)
    return Entry(encode_name(name), area.offset, clusters, flags, bits, extra_data=extra)


def rewrite(change: Change, record: Record, new: Record, *, doubted: bool) -> None:
    """Has all bitmaps of a namespace written anew, for the disk and the image that its new record tells of.

    Old bits stay and new space is dirty; an inconsistent bitmap becomes all dirty. The session of a tracker that has
    died ends with it: what that marked is among the old bits.

    Args:
        change: plans all of it.
        record: of the namespace, as it was.
        new: as it will be, but for its directory.
        doubted: nothing is known of the disk's content: all bits are dirty.

    Raises:
        BitmapError: a bitmap is too fine for the new size.
        FormatError: damaged bits, unless ``doubted``.
    """
    end_session(change, record)
    new = new.with_extensions(store.OF_A_SESSION)
    entries = read_entries(change.snapshot, record)
    placed = []
    for entry in entries:
        bitmap = bitmap_of(change.snapshot, record, entry, doubted)
        if doubted or bitmap.inconsistent:
            bitmap = type(bitmap)(new.size, entry.granularity, entry.auto).recovered()
        elif new.size != record.size:
            bitmap = bitmap.resized(new.size)
        placed.append(place_bitmap(change, new, decode_name(entry.name), bitmap))
    area = replace_directory(change, record, entries, placed)
    change.table.put(replace(new, generation=change.generation, directory=area))
