"""The directory and the bits of a namespace in a store: reads and verifies them, and places new ones for a commit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dirtmap.engine.model.naming import decode_name, encode_name, label
from dirtmap.engine.storefile import few
from dirtmap.engine.storefile.entries import (
    Tree,
    identified,
    identity_of,
    is_same_content,
    tree_of,
    with_items,
    with_root,
)
from dirtmap.engine.storefile.file import Change, Snapshot
from dirtmap.engine.storefile.session import require_known
from dirtmap.fmt import directory, geometry, store
from dirtmap.fmt.digest import crc32c
from dirtmap.fmt.directory import Entry, build_directory, parse_entries
from dirtmap.fmt.errors import BitmapError, FormatError, StorageError, UnsupportedError
from dirtmap.fmt.store import ITEM_WINDOW, Area, Record, item_faults, namespace_label, unknown_item

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dirtmap.engine.model.bitmap import Bitmap
    from dirtmap.engine.model.content import Content

_FEW = 16  # clusters that take less time one after the other than arrays of them


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


def load_saved(
    snapshot: Snapshot, record: Record, entry: Entry, doubted: bool
) -> tuple[NDArray[np.uint64], str | None]:
    """The saved bits of a bitmap, without a tracker's marks.

    Args:
        snapshot: of the store.
        record: of the namespace.
        entry: of the bitmap.
        doubted: all bits are set, whatever is stored.

    Returns:
        The bits: uint64, shape (ceil(granules / 64),), tail bits zero. What of them is damaged, and so counts as dirty:
        one line; None if nothing is.

    Raises:
        StorageError: there is no memory for so many bits.
    """
    import numpy as np

    from dirtmap.engine.storefile import chunks

    tree = tree_of(record, entry)
    where = f"{snapshot.file.path}: {record.label}: {label(decode_name(entry.name))}"
    try:
        if not doubted and (octets := few.load(snapshot, tree, _FEW)) is not None:
            return np.frombuffer(octets, np.uint64), None
        tree = tree._replace(place=store.ALL_ONES) if doubted else tree
        return chunks.load(snapshot, tree, (record.uuid, entry.name))
    except MemoryError:
        what = f"there is no memory for its {geometry.ceil_div(tree.nbits, 8)} bytes of bits"
        raise StorageError(where, what) from None


def count_saved(snapshot: Snapshot, record: Record, entry: Entry) -> tuple[int, str | None]:
    """How many granules are dirty in the saved bits; and what is damaged, as in `load_saved`. Keeps no bits."""
    from dirtmap.engine.storefile import chunks

    return chunks.count(snapshot, tree_of(record, entry))


def damage_of(snapshot: Snapshot, record: Record, entry: Entry) -> str | None:
    """What of the bits of a bitmap is damaged, and so counts as dirty: one line; None if nothing is. Keeps no bits."""
    if entry.table_offset <= store.ALL_ONES:
        return None
    from dirtmap.engine.storefile import chunks

    return chunks.verify(snapshot, tree_of(record, entry)).told()


def read_directory(snapshot: Snapshot, record: Record) -> bytes:
    """The bytes of the entries of a namespace.

    Raises:
        FormatError: the directory is damaged, or that of another namespace.
    """
    area, what = record.directory, f"directory of {record.label}"
    data = snapshot.read(area, what, "recover makes its bitmaps all dirty")
    if not store.belongs_to(data, record.name, snapshot.header.cluster_size):
        fault = "it, or a part of it, is the directory of another namespace; 'check -r all' mends the store"
        raise FormatError(f"{snapshot.file.path}: {what} at {area.offset:#x}", fault)
    return store.without_owner(data, snapshot.header.cluster_size)


def spare_directory(snapshot: Snapshot, record: Record) -> bytes:
    """The bytes of the entries of a namespace whose directory is damaged, as far as they are its own.

    Raises:
        FormatError: the area cannot be read.
    """
    snapshot.check_area(record.directory, "directory")
    data, cluster = snapshot.file.read(record.directory.offset, record.directory.length), snapshot.header.cluster_size
    sound = crc32c(data) == record.directory.checksum
    if sound and not store.belongs_to(data, record.name, cluster):
        return b""  # another namespace has these names
    return store.without_owner(data, cluster)


def place_directory(change: Change, name: bytes, entries: list[Entry]) -> Area:
    """Plans the writing of the directory of a namespace of that name.

    Raises:
        BitmapError: there are too many bitmaps.
    """
    data = store.with_owner(build_directory(entries), name, change.header.cluster_size)
    if len(entries) > directory.MAX_BITMAPS or len(data) > store.MAX_METADATA_BYTES:
        where = f"{change.snapshot.file.path}: {namespace_label(name)}"
        raise BitmapError(where, f"{len(entries)} bitmaps are more than {directory.MAX_BITMAPS}")
    return change.place(data)


def rename_record(change: Change, record: Record, name: bytes) -> Record:
    """Takes a namespace out of the table, and returns its record under another name, to be put there.

    Its directory becomes that of the new name, and generation and bits stay. One that is damaged stays so.
    """
    change.table.remove(record.name)
    area = record.directory
    if area.length and name != record.name:
        with suppress(FormatError):
            entries = read_directory(change.snapshot, record)
            area = change.place(store.with_owner(entries, name, change.header.cluster_size))
            change.release(record.directory)
    return replace(record, name=name, directory=area)


def read_entries(snapshot: Snapshot, record: Record) -> list[Entry]:
    """The directory of a namespace.

    Raises:
        UnsupportedError: the namespace has what only newer software knows.
        FormatError: the directory is damaged or another's, or an entry breaks a rule of the format.
        UnsupportedError: an entry has an item that must be known, and is not.
    """
    require_known(snapshot.file.path, record)
    where = f"{snapshot.file.path}: {record.label}"
    data = read_directory(snapshot, record)
    entries: dict[bytes, Entry] = {}
    try:
        for _, entry in parse_entries(data):
            faults = store.entry_faults(entry, record.size, snapshot.header.cluster_size, snapshot.size)
            for field, what in (*faults, *item_faults(entry)):
                raise FormatError(f"{where}: {label(decode_name(entry.name))}.{field}", what)
            if unknown := unknown_item(entry):
                what = f"an item of type {unknown:#010x}, without which a later version does not let it be used"
                raise UnsupportedError(f"{where}: {label(decode_name(entry.name))}.extra_data", what)
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


def release_bits(change: Change, record: Record, entry: Entry) -> None:
    """Gives up the clusters of a bitmap's bits, if it has any."""
    if entry.table_offset > store.ALL_ONES:
        from dirtmap.engine.storefile import chunks

        chunks.release(change, tree_of(record, entry)._replace(owner=b""))


def replace_directory(change: Change, record: Record, old: list[Entry], wanted: list[Entry]) -> Area:
    """Writes the directory of a namespace anew, and gives up the bits that only the old one leads to.

    Args:
        change: plans the writing.
        record: of the namespace, as it was.
        old: the old entries.
        wanted: the new entries. An entry that keeps its bits has the same root as before.

    Raises:
        BitmapError: there are too many bitmaps.
    """
    new = place_directory(change, record.name, wanted)
    kept = {entry.table_offset for entry in wanted} | change.superseded
    for entry in old:
        if entry.table_offset not in kept:
            release_bits(change, record, entry)
    change.release(record.directory)
    return new


def place_bitmap(change: Change, record: Record, name: str, bitmap: Bitmap, base: Entry | None = None) -> Entry:
    """Plans the writing of a bitmap's bits, and makes the entry that leads to them. It has no window.

    Args:
        change: plans the writing.
        record: of the namespace.
        name: of the bitmap.
        bitmap: its content and flags. Its bits must not change until the commit, but as `chunks.write` lets them.
        base: the entry in the old directory of the bitmap that this one takes the place of; None for a new bitmap.
            Only what differs from its bits is written, and what is replaced is given up; no other entry may keep them.

    Raises:
        BitmapError: the bitmap is inconsistent, or too fine for the size of the disk.
    """
    where = f"{change.snapshot.file.path}: {record.label}: {label(name)}"
    if bitmap.inconsistent:
        raise BitmapError(where, "an inconsistent bitmap cannot be copied")
    flags = directory.FLAG_AUTO if bitmap.recording else 0
    clean = Entry(encode_name(name), store.ALL_ZEROS, 0, flags, bitmap.granularity.bit_length() - 1)
    for _, what in store.entry_faults(clean, record.size, change.header.cluster_size, 0):
        raise BitmapError(where, f"granularity {bitmap.granularity} is too fine for the disk: {what}")
    entry = clean if base is None else replace(with_items(base, {ITEM_WINDOW: None}), name=clean.name)
    entry = entry.with_flags(set=flags, clear=(directory.FLAG_AUTO | directory.FLAG_IN_USE) & ~flags)
    if base is not None and base.granularity_bits != clean.granularity_bits:
        entry = replace(with_root(entry, store.ALL_ZEROS, 0, 0), granularity_bits=clean.granularity_bits)
    fill, found = bitmap._uniform(), bitmap._parts(lasting=True)
    if fill is not None or not record.size:
        entry = with_root(entry, store.ALL_ONES if fill and record.size else store.ALL_ZEROS, 0, 0)
    else:
        entry = _write(change, record, entry, lambda chunks, tree: chunks.write(change, found, tree))
    return _renewed(change, base, entry)


def merge_bits(change: Change, record: Record, entry: Entry, added: Content) -> Entry:
    """Plans the writing of a bitmap's bits together with those of ``added``, and makes the entry that leads to them.

    Args:
        change: plans the writing.
        record: of the namespace.
        entry: as it is in the old directory, but for its window.
        added: as many bits.
    """
    if entry.table_offset == store.ALL_ONES:
        return entry
    return _renewed(
        change, entry, _write(change, record, entry, lambda chunks, tree: chunks.merge(change, added, tree))
    )


def _write(change: Change, record: Record, entry: Entry, write: Callable[[Any, Tree], tuple[int, int]]) -> Entry:
    from dirtmap.engine.storefile import chunks

    tree = tree_of(record, entry)._replace(owner=b"")
    if tree.place in change.superseded:
        tree = tree._replace(place=store.ALL_ZEROS, checksum=0)
    elif tree.place > store.ALL_ONES:
        change.superseded.add(tree.place)
    place, checksum = write(chunks, tree)
    return with_root(
        entry, place, checksum, geometry.table_entries(record.size, entry.granularity, change.header.cluster_size)
    )


def _renewed(change: Change, base: Entry | None, entry: Entry) -> Entry:
    """The entry with its identity: another generation if its content is not that of ``base``."""
    if base is not None and is_same_content(base, entry) and identity_of(entry):
        return entry
    return identified(entry, change.generation, new=base is None)
