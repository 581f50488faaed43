"""The one way a qcow2 image's bitmaps change: a plan, checked whole before the first byte, then one commit.

A `Plan` is a list of epochs. Everything in one epoch may reach the disk in any order; a sync ends it.

    0  autoclear bits that we do not know: off
    1  new data, tables, directory; refcounts of new clusters       new clusters only: nothing refers to them yet
    2  pointers to new refcount blocks, or to a longer table;
       a backing file name that stands in the way: its copy
    3  the bitmaps extension: the switch to the new directory       <- the commit
    4  refcounts of what only the old directory used                a crash before this leaks clusters, no more

Every sync is needed, and there is no more: the tests take each away in turn and find a crash that does harm.

Source: "Layout" and "Validity" of docs/interop/qcow2.txt; the order is argued in SPEC.md, "Changing a qcow2 image".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dirtmap.engine.fileio import File
from dirtmap.engine.qcow2.layout import Layout, Slot, bitmap_label
from dirtmap.engine.qcow2.refcounts import Allocator, Refcounts
from dirtmap.engine.qcow2.references import References, walk
from dirtmap.fmt import directory, geometry, qcow2
from dirtmap.fmt.directory import Entry
from dirtmap.fmt.errors import BitmapError, Error, FormatError, UnsupportedError
from dirtmap.fmt.extensions import END_MARKER, EXTENSION_HEAD

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Proving clusters free means reading all L2 tables: cheap below this (128 GiB of guest data at 64 KiB clusters). Above,
# new clusters are taken past the end, where no proof is needed.
_PROOF_BUDGET = 16 << 20
_SECTOR = 512  # the most that a disk writes whole

Write = tuple[int, bytes | memoryview]


@dataclass(frozen=True, slots=True)
class Kept:
    """A bitmap whose bits stay where they are; its entry's name and flags may differ from those found."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class Written:
    """A bitmap to be written anew.

    Attributes:
        name: raw bytes.
        flags: directory entry flags.
        granularity_bits: log2 of bytes.
        packed: its bits, exactly `geometry.packed_bytes` bytes, least significant first.
        base: the slot it was made from, if any: clusters that did not change are taken over.
    """

    name: bytes
    flags: int
    granularity_bits: int
    packed: memoryview
    base: Slot | None = None


@dataclass(slots=True)
class Plan:
    """What a commit will write, as epochs of (offset, bytes).

    Attributes:
        epochs: in their order.
        harmless: how many of the first epochs can be undone by cutting the file to its old length.
    """

    epochs: list[list[Write]] = field(default_factory=list)
    harmless: int = 0

    def add(self, *writes: Write) -> None:
        """One more epoch, unless it is empty."""
        if writes:
            self.epochs.append(list(writes))


def require_writable(layout: Layout) -> None:
    """Refuses what must not be written to, whoever asks.

    Raises:
        UnsupportedError: version 2, or marked dirty or corrupt.
    """
    header = layout.header
    if header.version < 3:
        what = "2: such images cannot hold bitmaps; qemu-img amend -o compat=1.1 makes it version 3"
        raise UnsupportedError(f"{layout.path}: header.version", what)
    for bit in (qcow2.INCOMPATIBLE_DIRTY, qcow2.INCOMPATIBLE_CORRUPT):
        if header.incompatible & bit:
            what = f"marked {qcow2.INCOMPATIBLE_NAMES[bit]}; mend it with qemu-img check -r all first"
            raise UnsupportedError(f"{layout.path}: header.incompatible_features", what)


def commit(
    file: File, layout: Layout, wanted: Sequence[Kept | Written], *, references: References | None = None
) -> None:
    """Makes the image's bitmaps exactly ``wanted``: afterwards all of it is durable, or nothing has changed.

    Args:
        file: open for writing and locked for it by the caller.
        layout: as read under that lock.
        wanted: the complete new directory, in order.
        references: the result of a walk under that lock, where the caller has one.

    Raises:
        FormatError: the image is not sound enough to do it.
        UnsupportedError: it may not be written to, or its first cluster has no room.
        BitmapError: what is wanted breaks a limit.
        StorageError: the operating system failed. Before the switch the old bitmaps stand; where it failed
            during or after, they or the new ones do, whole.
    """
    require_writable(layout)
    plan = make_plan(file, layout, wanted, references)
    size = file.size()
    for number, epoch in enumerate(plan.epochs):
        try:
            for offset, data in epoch:
                file.write(offset, data)
        except Error:
            if number < plan.harmless and file.growable and file.size() > size:
                file.truncate(size)  # a full disk: nothing refers to what did get written
            raise
        file.sync()


def make_plan(
    file: File, layout: Layout, wanted: Sequence[Kept | Written], references: References | None = None
) -> Plan:
    """Plans a commit; reads, but writes nothing. Arguments and errors as `commit`."""
    if not wanted and layout.extension is None and not layout.header.autoclear & qcow2.AUTOCLEAR_BITMAPS:
        return Plan()
    _check_names(layout, wanted)
    pointer = _Pointer(layout)
    if wanted:
        pointer.make_room()
    refcounts = Refcounts(file, layout.header)
    if references is None:
        references = walk(file, layout, budget=_PROOF_BUDGET if file.growable else None)
    allocator = _allocator(file, layout, refcounts, references)
    contents: list[Write] = []
    entries = [
        item.entry if isinstance(item, Kept) else _place(file, layout, item, allocator, contents) for item in wanted
    ]
    new_directory = directory.build_directory(entries)
    if wanted:
        clusters = geometry.ceil_div(len(new_directory), layout.cluster_size)
        directory_offset = allocator.take(clusters) * layout.cluster_size
        contents.append((directory_offset, new_directory))
        pointer.lead_to(len(entries), len(new_directory), directory_offset)
    old_table = refcounts.table_offset // layout.cluster_size
    old_table_clusters = allocator.cover()
    contents += refcounts.changes()

    abandoned = list(_abandoned(layout, entries, contents))
    _refuse_shared(layout, references, abandoned)
    for cluster in abandoned:
        refcounts.release(cluster)
    for cluster in range(old_table, old_table + (old_table_clusters or 0)):
        refcounts.release(cluster)

    plan = Plan()
    plan.add(*pointer.autoclear_known_only())
    plan.add(*contents, *pointer.before())
    plan.harmless = len(plan.epochs)
    plan.add(*_refcount_pointers(refcounts), *pointer.name_switch())
    for epoch in pointer.switch():
        plan.add(*epoch)
    plan.add(*pointer.after(), *refcounts.changes())
    return plan


def _check_names(layout: Layout, wanted: Sequence[Kept | Written]) -> None:
    if len(wanted) > directory.MAX_BITMAPS:
        raise BitmapError(layout.path, f"{len(wanted)} bitmaps are more than {directory.MAX_BITMAPS}")
    known = {slot.entry.name for slot in layout.slots}  # a damaged one that is kept stays as found
    seen = set()
    for item in wanted:
        name = item.entry.name if isinstance(item, Kept) else item.name
        if name not in known and (fault := directory.name_fault(name)):
            raise BitmapError(f"{layout.path}: {bitmap_label(name)}", fault)
        if name in seen:
            raise BitmapError(f"{layout.path}: {bitmap_label(name)}", "the name is taken")
        seen.add(name)


def _allocator(file: File, layout: Layout, refcounts: Refcounts, references: References | None) -> Allocator:
    size = file.size()
    end = max(refcounts.end(), references.end if references else 0)
    if file.growable:
        end = max(end, geometry.ceil_div(size, layout.cluster_size))
    proven: NDArray[np.int64] = np.empty(0, np.int64)
    if references is not None and not references.faults:
        free = refcounts.uncounted(0, end)
        proven = free[references.of(free) == 0]
    capacity = None if file.growable else size // layout.cluster_size
    return Allocator(layout.path, refcounts, end, proven, capacity)


def _refuse_shared(layout: Layout, references: References | None, abandoned: Sequence[int]) -> None:
    """A cluster that a bitmap shares with guest data must not be freed: QEMU would hand it out again."""
    if references is None:
        return
    clusters = np.array(abandoned, np.int64)
    shared = clusters[references.of(clusters) > 1]
    if len(shared):
        where = f"{layout.path}: cluster {int(shared[0]) * layout.cluster_size:#x}"
        raise FormatError(where, "used by a bitmap and by something else; run check")


def _place(file: File, layout: Layout, item: Written, allocator: Allocator, contents: list[Write]) -> Entry:
    """Gives a bitmap's table and changed clusters a place; adds what to write there to ``contents``."""
    cluster = layout.cluster_size
    granularity = 1 << item.granularity_bits
    entries = geometry.table_entries(layout.header.size, granularity, cluster)
    where = f"{layout.path}: {bitmap_label(item.name)}"
    if entries == 0:
        raise BitmapError(where, "the disk is empty: QEMU refuses a bitmap without a single bit")
    if entries > directory.MAX_TABLE_ENTRIES or entries * cluster > directory.MAX_DATA_BYTES:
        limit = directory.MAX_DATA_BYTES
        what = f"granularity {granularity} needs {entries * cluster} bytes of bits, and QEMU accepts {limit}"
        raise BitmapError(where, what)
    table = [
        kind if kind is not None else _place_cluster(chunk, cluster, allocator, contents)
        for chunk, kind in _chunks(file, layout, item, entries)
    ]
    table_bytes = directory.build_table(table)
    offset = allocator.take(geometry.ceil_div(len(table_bytes), cluster)) * cluster
    contents.append((offset, table_bytes))
    entry = Entry(item.name, offset, entries, item.flags, item.granularity_bits)
    for name, what in directory.entry_faults(entry, layout.header.size, cluster):
        raise BitmapError(f"{where}.{name}", what)
    return entry


def _place_cluster(chunk: memoryview, cluster: int, allocator: Allocator, contents: list[Write]) -> int:
    offset = allocator.take(1) * cluster
    contents.append((offset, chunk if len(chunk) == cluster else bytes(chunk).ljust(cluster, b"\0")))
    return offset


def _chunks(file: File, layout: Layout, item: Written, entries: int) -> Iterator[tuple[memoryview, int | None]]:
    """Each cluster of bits, with its table entry where it needs no writing: all zeros, all ones, or unchanged."""
    cluster = layout.cluster_size
    old: Sequence[int] = ()
    base = item.base
    if base and base.table and base.entry.granularity_bits == item.granularity_bits and not base.entry.in_use:
        old = directory.parse_table(base.table)
    bits_in_last_byte = geometry.granules(layout.header.size, 1 << item.granularity_bits) % 8
    full = np.frombuffer(item.packed, np.uint8)
    for index in range(entries):
        octets = full[index * cluster : (index + 1) * cluster]
        chunk = item.packed[index * cluster : (index + 1) * cluster]
        tail = index == entries - 1 and bits_in_last_byte
        if not octets.any():
            yield chunk, 0
        elif (octets[: -1 if tail else None] == 0xFF).all() and (
            not tail or octets[-1] == (1 << bits_in_last_byte) - 1
        ):
            yield chunk, directory.TABLE_ALL_ONES
        elif (
            old
            and old[index] > directory.TABLE_ALL_ONES
            and file.read(old[index], cluster) == bytes(chunk).ljust(cluster, b"\0")
        ):
            yield chunk, old[index]
        else:
            yield chunk, None


def _abandoned(layout: Layout, entries: Sequence[Entry], contents: Sequence[Write]) -> Iterator[int]:
    """The numbers of the clusters that only the old directory used.

    Bitmaps with a fault are left alone: what they say about their clusters is not to be believed; check finds
    the leaks.
    """
    if not layout.valid or layout.pointer is None:
        return
    cluster = layout.cluster_size
    kept_tables = {entry.table_offset for entry in entries}
    taken_over = {
        raw
        for offset, data in contents
        if offset in kept_tables
        for raw in directory.parse_table(bytes(data))
        if raw > directory.TABLE_ALL_ONES
    }
    at_fault = {fault.bitmap for fault in layout.faults}
    first = layout.pointer.directory_offset
    yield from range(first // cluster, geometry.ceil_div(first + layout.pointer.directory_size, cluster))
    for index, slot in enumerate(layout.slots):
        if slot.table is None or index in at_fault or slot.entry.table_offset in kept_tables:
            continue
        table = slot.entry.table_offset
        yield from range(table // cluster, geometry.ceil_div(table + len(slot.table), cluster))
        yield from (offset // cluster for offset in slot.clusters() if offset not in taken_over)


def _refcount_pointers(refcounts: Refcounts) -> list[Write]:
    if refcounts.moved_table:
        pointer = qcow2.REFCOUNT_TABLE_POINTER.build(
            offset=refcounts.table_offset,
            clusters=len(refcounts.table) * qcow2.TABLE_ENTRY_SIZE // refcounts.cluster_size,
        )
        return [(qcow2.REFCOUNT_TABLE_OFFSET, pointer)]
    return [
        (
            refcounts.table_offset + index * qcow2.TABLE_ENTRY_SIZE,
            qcow2.POINTER.build(offset=int(refcounts.table[index])),
        )
        for index in sorted(refcounts.new_blocks)
    ]


class _Pointer:
    """The bitmaps extension and its autoclear bit: how the header comes to lead to the new directory, step by step.

    present, valid   payload over payload                                    (the switch)
    present, void    payload; autoclear bit on                               (the switch)
    vacant room      payload; type over type; bit on                         (the switch)
    absent           payload and a new end marker behind the old end marker; type and length over the old end marker;
                     bit on                                                  (the switch)
    no bitmaps left  bit off (the switch); end marker, or "vacant" in the middle of the chain, over type and length
    """

    def __init__(self, layout: Layout) -> None:
        assert layout.chain is not None  # a layout without one has a fault, and no plan is made
        self._layout = layout
        self._chain = layout.chain
        self._autoclear = layout.header.autoclear & qcow2.KNOWN_AUTOCLEAR
        self._payload: bytes | None = None
        self._name: tuple[int, bytes] | None = None
        vacant = (
            e
            for e in layout.chain.extensions
            if e.type == qcow2.EXTENSION_VACANT and len(e.data) == qcow2.BITMAPS_EXTENSION.size
        )
        self._extension = layout.extension or next(vacant, None)
        self._appended = self._extension is None

    def make_room(self) -> None:
        """Finds room for a new extension; moves the backing file's name out of its way if need be.

        Raises:
            UnsupportedError: the first cluster has none.
        """
        if not self._appended:
            return
        layout, chain = self._layout, self._chain
        needed = EXTENSION_HEAD.size + qcow2.BITMAPS_EXTENSION.size + EXTENSION_HEAD.size
        end = chain.end + needed
        name, name_size = layout.header.v2.backing_file_offset, layout.header.v2.backing_file_size
        if chain.terminated and name and name < end:
            moved = geometry.align_up(max(end, name + name_size), 8)
            self._name = (moved, layout.first_cluster[name : name + name_size])
            if len(self._name[1]) < name_size:
                raise FormatError(f"{layout.path}: header.backing_file_size", "the name ends past the end of the file")
            end = moved + name_size
        if end > layout.cluster_size or not chain.terminated:
            what = "the first cluster has no room for a bitmaps extension"
            raise UnsupportedError(f"{layout.path}: header extensions", what)

    def lead_to(self, bitmaps: int, size: int, offset: int) -> None:
        """What the extension is to say."""
        self._payload = qcow2.BITMAPS_EXTENSION.build(
            nb_bitmaps=bitmaps, reserved=0, directory_size=size, directory_offset=offset
        )

    def autoclear_known_only(self) -> list[Write]:
        """Before anything else: bits we do not know stand for structures that our writes may make stale."""
        return [self._bits(self._autoclear)] if self._autoclear != self._layout.header.autoclear else []

    def before(self) -> list[Write]:
        """What may be written before the switch, because nothing refers to it yet."""
        if self._name:
            return [self._name]
        return self._unreferenced()

    def name_switch(self) -> list[Write]:
        """The pointer to the copy of the backing file's name."""
        return [(qcow2.BACKING_FILE_OFFSET, qcow2.POINTER.build(offset=self._name[0]))] if self._name else []

    def switch(self) -> Iterator[list[Write]]:
        """The epochs of the switch itself."""
        if self._payload is None:
            if self._layout.header.autoclear & qcow2.AUTOCLEAR_BITMAPS:
                yield [self._bits(self._autoclear & ~qcow2.AUTOCLEAR_BITMAPS)]
            return
        if self._name:
            yield self._unreferenced()
        on = self._bits(self._autoclear | qcow2.AUTOCLEAR_BITMAPS)
        off = self._bits(self._autoclear & ~qcow2.AUTOCLEAR_BITMAPS)
        if self._layout.extension is None:
            at = self._extension.offset if self._extension else self._chain.end
            head = EXTENSION_HEAD.build(type=qcow2.EXTENSION_BITMAPS, length=len(self._payload))
            yield [(at, head)]
            yield [on]
            return
        if not self._layout.valid:
            yield [on]
            return
        at = self._layout.extension.data_offset
        torn = at // _SECTOR != (at + len(self._payload) - 1) // _SECTOR
        if torn:
            yield [off]
        yield [(at, self._payload)]
        if torn:
            yield [on]

    def after(self) -> list[Write]:
        """What is left to write once the switch is durable: the head of an extension that is no longer wanted."""
        extension = self._layout.extension
        if extension is None or self._payload is not None:
            return []
        last = extension is self._chain.extensions[-1] and self._chain.terminated
        head = END_MARKER if last else EXTENSION_HEAD.build(type=qcow2.EXTENSION_VACANT, length=len(extension.data))
        return [(extension.offset, head)]

    def _unreferenced(self) -> list[Write]:
        """The payload of an extension that is void or has no head yet; behind an appended one the chain's new end."""
        if self._payload is None or self._layout.valid:
            return []
        if self._extension is not None:
            return [(self._extension.data_offset, self._payload)]
        return [(self._chain.end + EXTENSION_HEAD.size, self._payload + END_MARKER)]

    @staticmethod
    def _bits(bits: int) -> Write:
        return qcow2.AUTOCLEAR_OFFSET, qcow2.POINTER.build(offset=bits)
