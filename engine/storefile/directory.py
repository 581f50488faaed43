"""The directory and the bits of a namespace in a store: reads and verifies them, and places new ones for a commit."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

import crc32c

from dirtmap.engine.model.naming import decode_name, encode_name, label
from dirtmap.engine.storefile.file import Change, Snapshot
from dirtmap.engine.storefile.session import require_known
from dirtmap.fmt import directory, geometry, store
from dirtmap.fmt.directory import Entry
from dirtmap.fmt.errors import BitmapError, FormatError
from dirtmap.fmt.store import Area, Record, namespace_label
from dirtmap.fmt.structures.directory import build_directory, parse_entries
from dirtmap.fmt.structures.store import BITS_CHECKSUM

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dirtmap.engine.model.bitmap import Bitmap


_PIECE = 1 << 20  # bytes that `verify` reads at a time


def no_namespace(path: str, name: bytes) -> BitmapError:
    """The error for a namespace that does not exist."""
    return BitmapError(f"{path}: {namespace_label(name)}", "there is no such namespace")


def require_free(change: Change, name: bytes) -> None:
    """Refuses a name for a new namespace that is taken.

    Raises:
        BitmapError: the name is taken.
    """
    if change.table.get(name):
        raise BitmapError(f"{change.snapshot.file.path}: {namespace_label(name)}", "the name is taken")


def load_saved(snapshot: Snapshot, record: Record, entry: Entry, doubted: bool) -> NDArray[np.uint64]:
    """The saved bits of a bitmap, without a tracker's marks: uint64, shape (ceil(granules / 64),), tail bits zero.

    All are set if ``doubted``.

    Raises:
        FormatError: the checksum is wrong.
    """
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
    """Compares the bits of a bitmap with their checksum, without keeping them in memory.

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
    """Refuses a directory that overlaps another namespace's. Else a small store could claim any number of bitmaps.

    Raises:
        FormatError: the two overlap; the error names both.
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
    """The directory of a namespace.

    Raises:
        UnsupportedError: the namespace has what only newer software knows.
        FormatError: the directory is damaged, or an entry breaks a rule of the format.
    """
    require_known(snapshot.file.path, record)
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


def header_doubts(snapshot: Snapshot, record: Record) -> str | None:
    """Why the store itself says that the bits of a namespace cannot be relied on; None if it does not.

    `Condition.doubt` adds what the image and its tracker say.
    """
    if snapshot.chosen.in_doubt:
        return "copies of the header are damaged, perhaps those of the newest"
    if record.generation <= snapshot.header.doubt_generation:
        return "the store lost a commit"
    return None


def is_readable(snapshot: Snapshot, record: Record, entry: Entry) -> bool:
    """False if the checksum of the bits is wrong."""
    try:
        verify(snapshot, record, entry)
    except FormatError:
        return False
    return True


def release_bits(change: Change, record: Record, entry: Entry) -> None:
    """Gives up the clusters of a bitmap's bits, if it has any."""
    if entry.table_offset > store.ALL_ONES:
        change.release(Area(entry.table_offset, geometry.packed_bytes(record.size, entry.granularity)))


def replace_directory(change: Change, record: Record, old: list[Entry], wanted: list[Entry]) -> Area:
    """Writes the directory of a namespace anew, and gives up the bits that only the old one leads to.

    Args:
        change: plans the writing.
        record: of the namespace, as it was.
        old: the old entries.
        wanted: the new entries. An entry that keeps its bits has the same offset as before.

    Raises:
        BitmapError: there are too many bitmaps.
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
    """Plans the writing of a bitmap's bits, and makes the entry that leads to them.

    Raises:
        BitmapError: the bitmap is inconsistent, or too fine for the size of the disk.
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
