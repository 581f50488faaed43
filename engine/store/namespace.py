"""`StoredImage`: one namespace of a store as a mapping of names to bitmaps: the same face as a qcow2 image."""

from __future__ import annotations

import contextlib
import os
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import crc32c

from dirtmap.engine.namespace import (
    BitmapInfo,
    ImageInfo,
    Namespace,
    Recovery,
    Transaction,
    decode_name,
    encode_name,
    label,
)
from dirtmap.engine.store.store import FORMAT, Change, Snapshot, Store
from dirtmap.fmt import directory, geometry, store
from dirtmap.fmt.directory import Entry
from dirtmap.fmt.errors import BitmapError, Error, FormatError, StorageError
from dirtmap.fmt.store import Area, Identity, Record

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dirtmap.engine.bitmap import Bitmap

T = TypeVar("T")

_PIECE = 1 << 20  # bytes read at once where the whole is not needed


def identity_of(path: str) -> Identity:
    """What an image looks like now: a file by inode, size and mtime; a block device by number and size.

    Raises:
        StorageError: it cannot be looked at, or is neither.
    """
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode):
            # Before 1970 the time is negative; it is only ever compared.
            return Identity(status.st_dev, status.st_ino, status.st_mtime_ns % 2**64, status.st_size)
        if stat.S_ISBLK(status.st_mode):
            from dirtmap.engine.fileio import open_file

            with open_file(path) as file:
                return Identity(status.st_rdev, 0, 0, file.size())
    except OSError as error:
        raise StorageError(path, error.strerror or str(error)) from error
    raise StorageError(path, "neither a regular file nor a block device")


def add_node(target: Store, name: str, image: str) -> None:
    """Gives an image a namespace of its own.

    Args:
        target: the store that will hold its bitmaps.
        name: of the node; unique among the nodes and devices of the store.
        image: its path; remembered as an absolute one.

    Raises:
        BitmapError: the name is taken.
        StorageError: the image cannot be looked at.
    """
    path = os.path.abspath(image)
    identity = identity_of(path)
    raw_name = encode_name(name)
    with target.change() as change:
        if change.table.get(raw_name):
            raise BitmapError(f"{target.path}: {namespace_label(raw_name)}", "the name is taken")
        change.table.put(
            Record(
                name=raw_name,
                kind=store.KIND_NODE,
                uuid=uuid.uuid4().bytes,
                size=identity.size,
                generation=change.generation,
                path=os.fsencode(path),
                identity=identity,
            )
        )


def no_namespace(path: str, name: bytes) -> BitmapError:
    """The error for a namespace that is not there."""
    return BitmapError(f"{path}: {namespace_label(name)}", "there is no such namespace")


def namespace_label(name: bytes) -> str:
    """How messages name a namespace."""
    return f"node '{name.decode('utf-8', 'backslashreplace')}'"


@dataclass(eq=False, slots=True)
class _Source:
    """Where a bitmap of a transaction has its bits while nobody has asked for them; none where it is all dirty."""

    snapshot: Snapshot
    record: Record
    entry: Entry
    doubted: bool

    def load(self) -> NDArray[np.uint64]:
        if self.snapshot.file.fd < 0:
            raise Error(self.snapshot.file.path, "the transaction has ended")
        return load(self.snapshot, self.record, self.entry, self.doubted)


def load(snapshot: Snapshot, record: Record, entry: Entry, doubted: bool) -> NDArray[np.uint64]:
    """A bitmap's bits as words: uint64, shape (ceil(granules / 64),), verified, tail bits zero.

    Raises:
        FormatError: the checksum is wrong.
    """
    import numpy as np

    from dirtmap.engine import bits

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
        checksum = store.BITS_CHECKSUM.parse(entry.extra_data).checksum
        if crc32c.crc32c(buffer) != checksum:
            raise _wrong_bits(snapshot, entry)
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
    if checksum != store.BITS_CHECKSUM.parse(entry.extra_data).checksum:
        raise _wrong_bits(snapshot, entry)


def _wrong_bits(snapshot: Snapshot, entry: Entry) -> FormatError:
    where = f"{snapshot.file.path}: {label(decode_name(entry.name))} at {entry.table_offset:#x}"
    return FormatError(where, "its checksum is wrong; recover makes it all dirty")


def read_entries(snapshot: Snapshot, record: Record) -> list[Entry]:
    """A namespace's directory.

    Raises:
        FormatError: damaged, or an entry makes no sense.
    """
    where = f"{snapshot.file.path}: {namespace_label(record.name)}"
    data = snapshot.read(record.directory, f"directory of {namespace_label(record.name)}")
    entries: dict[bytes, Entry] = {}
    try:
        for _, entry in directory.parse_entries(data):
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


def require_same_size(snapshot: Snapshot, record: Record) -> None:
    """Refuses bitmaps whose image has grown or shrunk: they say nothing about the new space.

    Raises:
        BitmapError: names both sizes and the command that adopts the new one.
    """
    if record.kind == store.KIND_NODE and record.nb_bitmaps:
        with contextlib.suppress(StorageError):
            now = identity_of(os.fsdecode(record.path)).size
            if now != record.identity.size:
                where = f"{snapshot.file.path}: {namespace_label(record.name)}"
                what = (
                    f"its image has {now} bytes now, and had {record.identity.size}; 'node resize' adopts the new size"
                )
                raise BitmapError(where, what)


def doubts(snapshot: Snapshot, record: Record) -> str | None:
    """Why a namespace's bits cannot be relied on, so that all of them count as dirty; None where they can."""
    if not record.nb_bitmaps:
        return None
    if snapshot.chosen.in_doubt:
        return "both copies of a header are damaged, perhaps those of the newest"
    if record.generation <= snapshot.header.doubt_generation:
        return "the store lost a commit"
    if record.kind == store.KIND_NODE:
        try:
            now = identity_of(os.fsdecode(record.path))
        except StorageError as error:
            return f"the image cannot be looked at ({error.what})"
        if now != record.identity:
            return "the image has changed while nobody tracked it"
    return None


class StoredImage(Namespace):
    """One namespace of a store; see `Namespace`."""

    format = FORMAT

    def __init__(self, target: Store, name: str) -> None:
        self._store = target
        self.path, self.name = target.path, name
        self._raw_name = encode_name(name)
        record, self.cluster_size = self._read(lambda snapshot, record: (record, snapshot.header.cluster_size))
        self.size, self.uuid = record.size, str(uuid.UUID(bytes=record.uuid))

    def close(self) -> None:
        """Closes the store."""
        self._store.close()

    def _record(self, snapshot: Snapshot) -> Record:
        record = snapshot.table().get(self._raw_name)
        if record is None:
            raise no_namespace(self.path, self._raw_name)
        return record

    def _read(self, read: Callable[[Snapshot, Record], T]) -> T:
        return self._store.read(lambda snapshot: read(snapshot, self._record(snapshot)))

    def info(self) -> ImageInfo:
        """The namespace and all its bitmaps as of one commit."""
        return self._read(_describe)

    def _load(self, name: bytes) -> Bitmap | None:
        def read(snapshot: Snapshot, record: Record) -> Bitmap | None:
            for entry in read_entries(snapshot, record):
                if entry.name == name:
                    require_same_size(snapshot, record)
                    bitmap = bitmap_of(snapshot, record, entry, doubts(snapshot, record) is not None)
                    if not bitmap.inconsistent:
                        _ = bitmap.words  # now, while it is known to be whole
                    return bitmap.freeze()
            return None

        return self._read(read)

    def _names(self) -> list[bytes]:
        return self._read(lambda snapshot, record: [entry.name for entry in read_entries(snapshot, record)])

    def recover(self, names: Iterable[str] = ()) -> list[Recovery]:
        """Makes all dirty what is inconsistent, in doubt or damaged; see `Namespace.recover`."""
        recovered = []
        with self._store.change() as change:
            record = self._record(change.snapshot)
            doubted = doubts(change.snapshot, record) is not None
            entries = {decode_name(entry.name): entry for entry in read_entries(change.snapshot, record)}
            with changing(change, record) as bitmaps:
                for name in list(names) or list(bitmaps):
                    bitmap = bitmaps[name]
                    if doubted or bitmap.inconsistent or not _is_readable(change.snapshot, record, entries[name]):
                        bitmaps[name] = bitmap.recovered()
                        recovered.append(Recovery(name, "all dirty"))
        return recovered

    def __repr__(self) -> str:
        return f"<StoredImage {self.name!r} in {self.path!r}>"

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Changes the bitmaps, in one commit of the store; see `Namespace.transaction`."""
        with self._store.change() as change, changing(change, self._record(change.snapshot)) as bitmaps:
            yield bitmaps


def _describe(snapshot: Snapshot, record: Record) -> ImageInfo:
    doubt = doubts(snapshot, record)
    return ImageInfo(
        path=snapshot.file.path,
        format=FORMAT,
        size=record.size,
        cluster_size=snapshot.header.cluster_size,
        bitmaps=tuple(
            BitmapInfo(
                name=decode_name(entry.name),
                granularity=entry.granularity,
                recording=entry.auto,
                inconsistent=entry.in_use,
                busy=False,
                count=None if entry.in_use else _count(snapshot, record, entry, doubt is not None),
                namespace=str(uuid.UUID(bytes=record.uuid)),
                node=decode_name(record.name),
            )
            for entry in read_entries(snapshot, record)
        ),
        notes=(f"{namespace_label(record.name)} counts as all dirty: {doubt}",) if doubt else (),
    )


def _count(snapshot: Snapshot, record: Record, entry: Entry, doubted: bool) -> int:
    """A bitmap's dirty bytes in whole granules; reads nothing where it takes no space."""
    if doubted or entry.table_offset == store.ALL_ONES:
        return geometry.granules(record.size, entry.granularity) * entry.granularity
    return 0 if entry.table_offset == store.ALL_ZEROS else bitmap_of(snapshot, record, entry, False).count


def describe_store(path: str) -> ImageInfo:
    """All bitmaps of all namespaces of a store, as of one commit; ``size`` is None: each disk has its own.

    Raises:
        FormatError: damaged.
        StorageError: cannot be opened or read.
    """

    def read(snapshot: Snapshot) -> ImageInfo:
        parts = [_describe(snapshot, record) for record in snapshot.table()]
        return ImageInfo(
            path=path,
            format=FORMAT,
            size=None,
            cluster_size=snapshot.header.cluster_size,
            bitmaps=tuple(bitmap for part in parts for bitmap in part.bitmaps),
            notes=tuple(note for part in parts for note in part.notes),
        )

    with Store(path) as target:
        return target.read(read)


def _is_readable(snapshot: Snapshot, record: Record, entry: Entry) -> bool:
    try:
        verify(snapshot, record, entry)
    except FormatError:
        return False
    return True


def bitmap_of(snapshot: Snapshot, record: Record, entry: Entry, doubted: bool) -> Bitmap:
    """A bitmap of a directory, its bits still unread; all dirty where ``doubted``."""
    from dirtmap.engine.bitmap import Bitmap

    source = _Source(snapshot, record, entry, doubted)
    return Bitmap._lazy(record.size, entry.granularity, entry.auto, entry.in_use, source)


@contextlib.contextmanager
def changing(change: Change, record: Record) -> Iterator[Transaction]:
    """One namespace's part of a change: a transaction whose end puts the new directory into ``change``."""
    snapshot = change.snapshot
    require_same_size(snapshot, record)
    doubted = doubts(snapshot, record) is not None
    entries = read_entries(snapshot, record)
    bitmaps = Transaction(
        f"{snapshot.file.path}: {namespace_label(record.name)}",
        record.size,
        geometry.MAX_DEFAULT_GRANULARITY,
        {decode_name(entry.name): bitmap_of(snapshot, record, entry, doubted) for entry in entries},
    )
    try:
        yield bitmaps
        _put(change, record, entries, bitmaps, doubted)
    finally:
        bitmaps.close()


class StoreTransaction(Mapping[str, Transaction]):
    """All namespaces of a store while they are being changed: names to transactions, which one commit ends together."""

    def __init__(self, change: Change, stack: contextlib.ExitStack) -> None:
        self._change, self._stack = change, stack
        self._begun: dict[str, Transaction] = {}

    def __getitem__(self, name: str) -> Transaction:
        if name not in self._begun:
            record = self._change.table.get(encode_name(name))
            if record is None:
                raise no_namespace(self._change.snapshot.file.path, encode_name(name))
            self._begun[name] = self._stack.enter_context(changing(self._change, record))
        return self._begun[name]

    def __iter__(self) -> Iterator[str]:
        return (decode_name(record.name) for record in self._change.table)

    def __len__(self) -> int:
        return self._change.table.count


@contextlib.contextmanager
def transaction(target: Store) -> Iterator[StoreTransaction]:
    """Changes any number of namespaces: at the end of the block all of it is durable, or, after an exception, nothing.

    Errors as `Namespace.transaction`.
    """
    with target.change() as change, contextlib.ExitStack() as stack:
        yield StoreTransaction(change, stack)


def _put(change: Change, record: Record, old: list[Entry], bitmaps: Transaction, doubted: bool) -> None:
    wanted: list[Entry] = []
    kept: set[int] = set()
    for name, bitmap in bitmaps.items():
        source = bitmap._source
        # Bits of another namespace or store are copied. Those in doubt are written as they are shown, all dirty; those
        # of an inconsistent bitmap are not shown at all.
        if (
            isinstance(source, _Source)
            and source.record is record
            and (not source.doubted or bitmap.inconsistent)
            and source.entry.table_offset not in kept
        ):
            if source.entry.table_offset > store.ALL_ONES:
                kept.add(source.entry.table_offset)
            flags = {"set": directory.FLAG_AUTO} if bitmap.recording else {"clear": directory.FLAG_AUTO}
            wanted.append(replace(source.entry.with_flags(**flags), name=encode_name(name)))
        else:
            wanted.append(place_bitmap(change, record, name, bitmap))
    if wanted == old and not doubted:
        return
    packed = directory.build_directory(wanted)
    if len(wanted) > directory.MAX_BITMAPS or len(packed) > store.MAX_METADATA_BYTES:
        raise BitmapError(bitmaps.where, f"{len(wanted)} bitmaps are more than {directory.MAX_BITMAPS}")
    for entry in old:
        if entry.table_offset not in kept:
            release_bits(change, record, entry)
    change.release(record.directory)
    identity = record.identity
    if record.kind == store.KIND_NODE and (doubted or not record.nb_bitmaps):
        # All that was in doubt is dirty now, on disk, or the first bitmap begins: from here on changes count.
        with contextlib.suppress(StorageError):
            identity = identity_of(os.fsdecode(record.path))
    change.table.put(
        replace(
            record,
            generation=change.generation,
            directory=change.place(packed),
            nb_bitmaps=len(wanted),
            identity=identity,
        )
    )


def release_bits(change: Change, record: Record, entry: Entry) -> None:
    """Gives up the clusters of a bitmap's bits, if it has any."""
    if entry.table_offset > store.ALL_ONES:
        change.release(Area(entry.table_offset, geometry.packed_bytes(record.size, entry.granularity)))


def place_bitmap(change: Change, record: Record, name: str, bitmap: Bitmap) -> Entry:
    """Has a bitmap's bits written, and makes the entry that leads to them.

    Raises:
        BitmapError: inconsistent, or too fine for the disk's size.
    """
    where = f"{change.snapshot.file.path}: {label(name)}"
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
    extra = store.BITS_CHECKSUM.build(checksum=area.checksum, reserved=0)
    return Entry(encode_name(name), area.offset, clusters, flags, bits, extra_data=extra)
