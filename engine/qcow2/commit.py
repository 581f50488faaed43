"""Changes the bitmaps of a qcow2 image: makes a plan, checks all of it before the first byte, then commits it.

A `Plan` is a list of epochs. The writes of one epoch may reach the disk in any order; a sync ends the epoch.

    0  autoclear bits that we do not know: off
    1  new data, tables, directory; refcounts of new clusters       new clusters only: nothing refers to them yet
    2  the pointer to a new refcount block, or to a longer table;   without the switch they lead to nothing but leaks
       the head of a new extension (see `_Pointer`)
    3  the bitmaps extension: the switch to the new directory       <- the commit
    4  refcounts of what only the old directory used                a crash before this leaks clusters, no more

Every sync is needed: the tests remove each in turn, and find a crash that does harm.

Source: "Layout" and "Validity" of docs/interop/qcow2.txt; the order is argued in SPEC.md, "Changing a qcow2 image".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING

from dirtmap.engine.model.bits import all_one, all_zero, filled
from dirtmap.engine.model.content import PAGE, Changed
from dirtmap.engine.model.later import later
from dirtmap.engine.qcow2.clusters import Clusters
from dirtmap.engine.qcow2.extension import NewExtension, Write
from dirtmap.engine.qcow2.few import Few, count_few
from dirtmap.engine.qcow2.layout import Layout, Slot, bitmap_label
from dirtmap.engine.qcow2.refcounts import Allocator, Refcounts
from dirtmap.engine.system.file import File
from dirtmap.fmt import directory, geometry, qcow2
from dirtmap.fmt.directory import Entry, build_directory
from dirtmap.fmt.errors import BitmapError, Error, FormatError, UnsupportedError
from dirtmap.fmt.extensions import END_MARKER, Extension
from dirtmap.fmt.parsers.extensions import EXTENSION_HEAD
from dirtmap.fmt.parsers.qcow2 import BITMAPS_EXTENSION, POINTER, REFCOUNT_TABLE_POINTER

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dirtmap.engine.model.content import Content
    from dirtmap.engine.qcow2 import references as many
    from dirtmap.engine.qcow2.references import References
else:  # an image with few references is changed without them
    later(globals(), np="numpy", many="dirtmap.engine.qcow2.references")

# Proving that clusters are free means reading all L2 tables. Up to this many bytes of them (128 GiB of guest data at
# 64 KiB clusters), all that they refer to is kept in memory.
_PROOF_BUDGET = 16 << 20
# Above that, they are streamed past the clusters that have a count of 0. Above this (4 TiB of guest data) they are not
# read, because that would take seconds: new clusters are taken past the end, where no proof is needed. SPEC.md has the
# figures; `growth` says so.
_MOST_FOLLOWED = 512 << 20
_SECTOR = 512  # the most bytes that a disk writes atomically
_PART = 1 << 20  # bytes of bits that are looked at, and written, at a time; or one cluster
_ZEROS = memoryview(bytes(1 << geometry.MAX_CLUSTER_BITS))


@dataclass(frozen=True, slots=True)
class Kept:
    """A bitmap whose bits stay in place. The name and the flags of its entry may differ from those found."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class Written:
    """A bitmap to be written anew.

    Attributes:
        name: raw bytes.
        flags: of the directory entry.
        granularity_bits: log2 of the granularity in bytes.
        content: its bits, as many as the disk has granules. They are asked for twice: they must not change meanwhile.
        base: the slot that it was made from, if any. Clusters that have not changed are reused.
    """

    name: bytes
    flags: int
    granularity_bits: int
    content: Content
    base: Slot | None = None


@dataclass(frozen=True, slots=True)
class _Bits:
    """The bits of a bitmap in clusters of their own, most of which may be there already.

    Attributes:
        content: all bits. Those of a new cluster are asked for again when they are written, so that they need not be
            in memory, all of them, at any time.
        table: the entries of the new table.
        old: those of the table that it was made from; empty where there is none.
        cluster: in bytes.
    """

    content: Content
    table: Sequence[int]
    old: Sequence[int]
    cluster: int

    def new(self) -> Iterator[int]:
        """The indexes of the new clusters, ascending."""
        old = self.old or repeat(0)
        pairs = enumerate(zip(self.table, old, strict=False))
        return (index for index, (raw, was) in pairs if raw > directory.TABLE_ALL_ONES and raw != was)

    def reused(self) -> Iterator[int]:
        """The offsets, in bytes, of the clusters that stay."""
        pairs = zip(self.table, self.old, strict=False)
        return (raw for raw, was in pairs if raw > directory.TABLE_ALL_ONES and raw == was)

    def writes(self) -> Iterator[Write]:
        """The writes of the new clusters."""
        cluster = self.cluster
        for first, end in _runs(self.new(), cluster):
            octets = _octets(self.content, cluster, first, end)
            for index in range(first, end):
                chunk = octets[(index - first) * cluster : (index - first + 1) * cluster]
                yield self.table[index], chunk
                if len(chunk) < cluster:  # shared zeros: a copy for each of thousands of short bitmaps takes gigabytes
                    yield self.table[index] + len(chunk), _ZEROS[: cluster - len(chunk)]


@dataclass(slots=True)
class Plan:
    """What a commit will write, as epochs of (offset in bytes, bytes), and of bits that are asked for meanwhile.

    Attributes:
        epochs: in order.
        harmless: number of the first epochs that can be undone by truncating the file to its old length.
    """

    epochs: list[list[Write | _Bits]] = field(default_factory=list)
    harmless: int = 0

    def add(self, *writes: Write | _Bits) -> None:
        """Adds one more epoch, unless it is empty."""
        if writes:
            self.epochs.append(list(writes))


def require_writable(layout: Layout) -> None:
    """Refuses an image that no program may write to.

    Raises:
        UnsupportedError: the image has version 2, or is marked dirty or corrupt.
    """
    header = layout.header
    if header.version < 3:
        what = "2: such images cannot hold bitmaps; qemu-img amend -o compat=1.1 makes it version 3"
        raise UnsupportedError(f"{layout.path}: header.version", what)
    for what in marks(layout):
        raise UnsupportedError(f"{layout.path}: header.incompatible_features", what)


def marks(layout: Layout) -> Iterator[str]:
    """The marks in the header that forbid all writing, even if nothing else is wrong with the image."""
    for bit in (qcow2.INCOMPATIBLE_DIRTY, qcow2.INCOMPATIBLE_CORRUPT):
        if layout.header.incompatible & bit:
            what = f"marked {qcow2.INCOMPATIBLE_NAMES[bit]}; mend it with qemu-img check -r all first"
            if layout.valid and layout.header.v2.nb_snapshots:  # seen with QEMU 7.2: its header then has none
                what += ", on a copy: QEMU loses the snapshots of an image with bitmaps in that"
            yield what


def commit(
    file: File, layout: Layout, wanted: Sequence[Kept | Written], *, references: References | None = None
) -> None:
    """Makes the bitmaps of the image exactly ``wanted``. Afterwards all changes are durable, or none is made.

    Args:
        file: open for writing, and locked for it by the caller.
        layout: as read under that lock.
        wanted: the complete new directory, in order.
        references: the result of a walk under that lock, if the caller has one.

    Raises:
        FormatError: the image is too damaged to be changed.
        UnsupportedError: the image may not be written to, or its first cluster has no room.
        BitmapError: ``wanted`` breaks a limit of the format.
        StorageError: the operating system failed. Before the switch the old bitmaps stand; during or after it, either
            the old ones or the new ones do, whole.
    """
    require_writable(layout)
    _carry_out(file, make_plan(file, layout, wanted, references))


def set_identity(file: File, layout: Layout, data: bytes | None) -> None:
    """Replaces the namespace extension by one with ``data``; None removes it.

    A crash leaves the old one, the new one, or none. Other arguments and errors as `commit`.
    """
    require_writable(layout)
    old = layout.identity_extension
    new = None if data is None else NewExtension(layout, qcow2.EXTENSION_NAMESPACE, len(data))
    plan = Plan()
    plan.add(*_known_autoclear_only(layout.header))
    vacated = [] if old is None else [_vacated(old)]  # not by an end marker: the new extension may lie behind it
    plan.add(*(new.unreferenced(data) if new and data else []), *vacated)
    if new and data:
        plan.add(*new.references())
        for epoch in new.rest(data):
            plan.add(*epoch)
    _carry_out(file, plan)


def set_tracked(file: File, layout: Layout, tracked: bool) -> None:
    """Sets or clears the autoclear bit "tracked". Other arguments and errors as `commit`."""
    require_writable(layout)
    known = layout.header.autoclear & qcow2.KNOWN_AUTOCLEAR
    bits = known | qcow2.AUTOCLEAR_TRACKED if tracked else known & ~qcow2.AUTOCLEAR_TRACKED
    plan = Plan()
    if bits != layout.header.autoclear:
        plan.add(_autoclear(bits))
    _carry_out(file, plan)


def set_refcounts(file: File, layout: Layout, counts: Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> bool:
    """Sets the refcounts of clusters, given as numbers and counts, both int64 and 1-D, one refcount block at a time.

    Each must be right on its own, because they reach the disk in any order. Counts that do not fit, or have no refcount
    block, are left out; returns False if none is left. Other arguments and errors as `commit`.
    """
    require_writable(layout)
    refcounts = Refcounts(file, layout.header)
    for numbers, right in counts:
        refcounts.set_some(numbers, right)
    changes = refcounts.changes()
    plan = Plan()
    if changes:
        plan.add(*_known_autoclear_only(layout.header))
        plan.add(*changes)
    _carry_out(file, plan)
    return bool(changes)


def _carry_out(file: File, plan: Plan) -> None:
    size = file.size()
    for number, epoch in enumerate(plan.epochs):
        try:
            for offset, data in _writes(epoch):
                file.write(offset, data)
        except Error:
            if number < plan.harmless and file.growable and file.size() > size:
                file.truncate(size)  # a full disk: nothing refers to what did get written
            raise
        file.sync()


def make_plan(
    file: File, layout: Layout, wanted: Sequence[Kept | Written], references: References | None = None
) -> Plan:
    """Plans a commit. Reads, but writes nothing. Arguments and errors as `commit`."""
    if not wanted and layout.extension is None and not layout.header.autoclear & qcow2.AUTOCLEAR_BITMAPS:
        return Plan()
    _check_names(layout, wanted)
    pointer = _Pointer(layout)
    if wanted:
        pointer.make_room()
    refcounts = Refcounts(file, layout.header)
    found = references or count_few(file, layout, _PROOF_BUDGET) or many.walk(file, layout, budget=_PROOF_BUDGET)
    found, allocator = _allocator(file, layout, refcounts, found)
    contents: list[Write | _Bits] = []
    entries = [
        item.entry if isinstance(item, Kept) else _place(file, layout, item, allocator, contents) for item in wanted
    ]
    new_directory = build_directory(entries)
    if wanted:
        clusters = geometry.ceil_div(len(new_directory), layout.cluster_size)
        directory_offset = allocator.take(clusters) * layout.cluster_size
        contents.append((directory_offset, new_directory))
        pointer.lead_to(len(entries), len(new_directory), directory_offset)
    old_table = refcounts.table_offset // layout.cluster_size
    old_table_clusters = allocator.cover()
    written = refcounts.touched()
    contents += refcounts.changes()
    if refcounts.moved_table:
        contents.append((refcounts.table_offset, refcounts.table_bytes()))

    abandoned = list(_abandoned(layout, entries, contents))
    for cluster in range(old_table, old_table + (old_table_clusters or 0)):
        refcounts.release(cluster)
    for cluster in () if layout.valid else abandoned:  # by then nothing leads there, and they may be free already
        if refcounts.get(cluster):
            refcounts.release(cluster)
    written += refcounts.touched()
    with_switch = refcounts.changes()
    for cluster in abandoned if layout.valid else ():
        refcounts.release(cluster)
    written += refcounts.touched()
    written += [offset // layout.cluster_size for offset, _ in _refcount_pointers(refcounts)]
    _refuse_shared(layout, found, [*abandoned, *written])
    _refuse_astray(layout, found, [*written, *_clusters_of(contents, layout.cluster_size)])

    plan = Plan()
    if wanted or not layout.header.autoclear & qcow2.AUTOCLEAR_BITMAPS:
        plan.add(*_known_autoclear_only(layout.header))  # otherwise the switch is the first write, and clears them, too
    plan.add(*contents, *pointer.unreferenced())
    plan.harmless = len(plan.epochs)
    plan.add(*_refcount_pointers(refcounts), *pointer.references())
    for epoch in pointer.switch():
        plan.add(*with_switch, *epoch)
        with_switch = []
    plan.add(*pointer.after(), *refcounts.changes())
    return plan


def _check_names(layout: Layout, wanted: Sequence[Kept | Written]) -> None:
    if len(wanted) > directory.MAX_BITMAPS:
        raise BitmapError(layout.path, f"{len(wanted)} bitmaps are more than {directory.MAX_BITMAPS}")
    known = {slot.entry.name for slot in layout.slots}  # a damaged name that is kept stays as found
    seen = set()
    for item in wanted:
        name = item.entry.name if isinstance(item, Kept) else item.name
        if name not in known and (fault := directory.name_fault(name)):
            raise BitmapError(f"{layout.path}: {bitmap_label(name)}", fault)
        if name in seen:
            raise BitmapError(f"{layout.path}: {bitmap_label(name)}", "the name is taken")
        seen.add(name)


def _allocator(
    file: File, layout: Layout, refcounts: Refcounts, references: Few | References
) -> tuple[Few | References, Allocator]:
    """An allocator of new clusters, and the references, followed as far as it needs them."""
    size = file.size()
    end = references.end
    if file.growable:
        end = max(end, geometry.ceil_div(size, layout.cluster_size))
    end = refcounts.end(end)
    capacity = None if file.growable else size // layout.cluster_size
    if isinstance(references, Few):
        free = references.unused(refcounts.uncounted(end))
        return references, Allocator(layout.path, refcounts, end, free, capacity)
    free = references.unused(refcounts.uncounted(end)) if not references.faults else []
    if references.faults and _are_void_read(layout):
        fault = references.faults[0]
        what = f"{fault.what}; so nobody knows whether there is something else now where void bitmaps were"
        raise FormatError(f"{layout.path}: {fault.field}", what)
    if len(references.unfollowed):
        references = _followed(file, layout, references, free)
        free = references.unused(free) if not len(references.unfollowed) else []
        end = max(end, references.end)
    return references, Allocator(layout.path, refcounts, end, free, capacity)


def growth(file: File, layout: Layout, references: References) -> str | None:
    """Why every change makes the image longer, although it has freed clusters; None where one uses those again.

    Args:
        file: the image.
        layout: as read from it.
        references: of a walk.
    """
    l1_sizes = [int(layout.header.v2.l1_size), *(int(snapshot.l1_size) for snapshot in layout.snapshots)]
    bounded = references.cost <= _MOST_FOLLOWED and sum(l1_sizes) * qcow2.TABLE_ENTRY_SIZE <= qcow2.MAX_L1_BYTES
    if bounded or not file.growable:
        return None
    return (
        "more than a change reads to prove freed clusters free; so each makes the file longer by what it writes, and "
        "leaves as much for QEMU to use again"
    )


def _are_void_read(layout: Layout) -> bool:
    return layout.pointer is not None and not layout.valid


def _followed(file: File, layout: Layout, references: References, free: list[int]) -> References:
    """The references, followed if that may prove some of these clusters free; else unchanged.

    Raises:
        FormatError: they must be followed, and cannot be.
    """
    # A block device cannot grow, so free clusters must be found inside, or behind all guest data. And guest data may
    # have taken the clusters of void bitmaps.
    needed = not file.growable or _are_void_read(layout)
    followed = None
    if needed or (len(free) and references.cost <= _MOST_FOLLOWED):
        followed = many.follow(file, layout, references, np.array(free, np.int64))
    if needed and followed is None:
        what = "one leads nowhere sensible, so that nothing is known to be free; run check"
        raise FormatError(f"{layout.path}: L2 tables", what)
    return followed or references


def _refuse_shared(layout: Layout, references: Few | References, clusters: Sequence[int]) -> None:
    """Refuses to free or write a cluster that two structures share, because the other one would lose it.

    Raises:
        FormatError: a cluster is shared.
    """
    if shared := references.shared(clusters):
        where = f"{layout.path}: cluster {shared[0] * layout.cluster_size:#x}"
        raise FormatError(where, "used twice; run check")


def _refuse_astray(layout: Layout, references: Few | References, clusters: Sequence[int]) -> None:
    """Refuses to write where a broken reference past the end of the file leads, because it would become part of that.

    Raises:
        FormatError: a broken reference leads to a cluster that is to be written.
    """
    if claimed := references.claimed(clusters):
        where = f"{layout.path}: cluster {claimed[0] * layout.cluster_size:#x}"
        raise FormatError(where, "to be written, but a reference that makes no sense leads there; run check")


def _writes(contents: Iterable[Write | _Bits]) -> Iterator[Write]:
    for each in contents:
        if isinstance(each, _Bits):
            yield from each.writes()
        else:
            yield each


def _clusters_of(contents: Sequence[Write | _Bits], cluster_size: int) -> Iterator[int]:
    for each in contents:
        if isinstance(each, _Bits):
            yield from (each.table[index] // cluster_size for index in each.new())
        else:
            offset, data = each
            yield from range(offset // cluster_size, geometry.ceil_div(offset + len(data), cluster_size))


def _place(file: File, layout: Layout, item: Written, allocator: Allocator, contents: list[Write | _Bits]) -> Entry:
    """Places the table and the changed clusters of a bitmap, and adds what to write there to ``contents``."""
    cluster = layout.cluster_size
    entries = geometry.table_entries(layout.header.size, 1 << item.granularity_bits, cluster)
    where = f"{layout.path}: {bitmap_label(item.name)}"
    if entries == 0:
        raise BitmapError(where, "the disk is empty: QEMU refuses a bitmap without a single bit")
    old: Sequence[int] = ()
    base = item.base if layout.valid else None
    if base and base.table and base.entry.granularity_bits == item.granularity_bits and not base.entry.in_use:
        old = directory.parse_table(base.table)
    table = list(old) or [0] * entries
    for index, kind in _kinds(file, item, old, entries, cluster):
        table[index] = allocator.take(1) * cluster if kind is None else kind
    contents.append(_Bits(item.content, table, old, cluster))
    table_bytes = directory.build_table(table)
    offset = allocator.take(geometry.ceil_div(len(table_bytes), cluster)) * cluster
    contents.append((offset, table_bytes))
    entry = Entry(item.name, offset, entries, item.flags, item.granularity_bits)
    for name, what in directory.entry_faults(entry, layout.header.size, cluster):
        raise BitmapError(f"{where}.{name}", what)
    return entry


def _kinds(
    file: File, item: Written, old: Sequence[int], entries: int, cluster: int
) -> Iterator[tuple[int, int | None]]:
    """The index of each cluster of bits that can differ from those of the old table, and its entry in the new one.

    That is None for what needs a new cluster: it is neither all zeros nor all ones, nor in the file already.
    """
    # QEMU expands an all-ones entry to whole 64-bit words. Bits behind the last granule would be dirty, too, and become
    # visible once the disk grows. Source: util/hbitmap.c, hbitmap_deserialize_ones.
    cut = entries - 1 if item.content.nbits % 64 else None
    for first, end in _runs(_to_look_at(item, old, entries, cluster), cluster):
        octets = _octets(item.content, cluster, first, end)
        for index in range(first, end):
            chunk = octets[(index - first) * cluster : (index - first + 1) * cluster]
            if all_zero(chunk):
                yield index, directory.TABLE_ALL_ZEROS
            elif index != cut and all_one(chunk):
                yield index, directory.TABLE_ALL_ONES
            elif (
                old
                and old[index] > directory.TABLE_ALL_ONES
                and file.read(old[index], cluster) == bytes(chunk).ljust(cluster, b"\0")
            ):
                yield index, old[index]
            else:
                yield index, None


def _to_look_at(item: Written, old: Sequence[int], entries: int, cluster: int) -> Iterable[int]:
    """The indexes of the clusters of bits that can differ from those of the old table; ascending."""
    changed = item.content
    if old and isinstance(changed, Changed) and isinstance(changed.base, Clusters) and changed.base.slot is item.base:
        low = changed.pages() * (PAGE // 8)  # bytes
        pages = zip((low // cluster).tolist(), (-(-(low + PAGE // 8) // cluster)).tolist(), strict=True)
        return sorted({index for first, end in pages for index in range(first, min(end, entries))})
    return range(entries)


def _runs(indexes: Iterable[int], cluster: int) -> Iterator[tuple[int, int]]:
    """Ascending indexes of clusters as runs, first and end, of no more than are in memory at a time."""
    most = max(_PART // cluster, 1)
    first = end = 0
    for index in indexes:
        if first == end:
            first = index
        elif index != end or index - first == most:
            yield first, end
            first = index
        end = index + 1
    if first < end:
        yield first, end


def _octets(content: Content, cluster: int, first: int, end: int) -> memoryview:
    """The bits of the clusters from ``first`` up to ``end``, least significant first; nothing behind the last bit."""
    low, high = first * cluster * 8, min(end * cluster * 8, content.nbits)
    part = content.part(low, high)
    size = geometry.ceil_div(high - low, 8)
    if part is False:
        return _ZEROS[:size]
    words = filled(high - low, True) if part is True else part
    return words.view("u1").data[:size]


def _abandoned(layout: Layout, entries: Sequence[Entry], contents: Sequence[Write | _Bits]) -> Iterator[int]:
    """The numbers of the clusters that only the old directory used.

    Bitmaps with a fault are left out, because what they say about their clusters cannot be trusted. Their clusters
    leak, which a check finds.
    """
    if layout.pointer is None:
        return
    cluster = layout.cluster_size
    kept_tables = {entry.table_offset for entry in entries}
    taken_over = {offset for each in contents if isinstance(each, _Bits) for offset in each.reused()}
    at_fault = {fault.bitmap for fault in layout.faults}
    first = layout.pointer.directory_offset
    yield from range(first // cluster, geometry.ceil_div(first + layout.pointer.directory_size, cluster))
    for index, slot in enumerate(layout.slots):
        if slot.table is None or index in at_fault or slot.entry.table_offset in kept_tables:
            continue
        table = slot.entry.table_offset
        yield from range(table // cluster, geometry.ceil_div(table + len(slot.table), cluster))
        yield from (offset // cluster for offset in slot.clusters() if offset not in taken_over)


def _autoclear(bits: int) -> Write:
    return qcow2.AUTOCLEAR_OFFSET, POINTER.build(offset=bits)


def _known_autoclear_only(header: qcow2.Header) -> list[Write]:
    """Clears unknown autoclear bits before any other write: they stand for structures that our writes may outdate."""
    known = header.autoclear & qcow2.KNOWN_AUTOCLEAR
    return [_autoclear(known)] if known != header.autoclear else []


def _refcount_pointers(refcounts: Refcounts) -> list[Write]:
    if refcounts.moved_table:
        pointer = REFCOUNT_TABLE_POINTER.build(
            offset=refcounts.table_offset,
            clusters=len(refcounts.table) * qcow2.TABLE_ENTRY_SIZE // refcounts.cluster_size,
        )
        return [(qcow2.REFCOUNT_TABLE_OFFSET, pointer)]
    return [
        (
            refcounts.table_offset + index * qcow2.TABLE_ENTRY_SIZE,
            POINTER.build(offset=int(refcounts.table[index])),
        )
        for index in sorted(refcounts.new_blocks)
    ]


class _Pointer:
    """The bitmaps extension and its autoclear bit: the steps by which the header comes to lead to the new directory.

    Each step but the last is one epoch, and ``|`` is the sync after it. Writes in [...] share the epoch of their step.

    present, valid   payload over payload                                               (the switch)
      across sectors bit off | payload | bit on [refcounts lowered]                     (the switch)
    present, void    payload [contents] | bit on                                        (the switch)
      to come back   payload [refcount pointers] | bit on [refcounts lowered]           (the switch)
    absent           the steps of a `NewExtension` [contents | refcount pointers] | bit on    (the switch)
    no bitmaps left  bit off (the switch) | end marker, or "vacant" in the middle of the chain, over type and length
                     [refcounts lowered]
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._known = layout.header.autoclear & qcow2.KNOWN_AUTOCLEAR
        self._payload: bytes | None = None
        self._new: NewExtension | None = None

    def make_room(self) -> None:
        """Finds room for a new extension, if one is needed.

        Raises:
            UnsupportedError: the first cluster has no room.
        """
        if self._layout.extension is None:
            self._new = NewExtension(self._layout, qcow2.EXTENSION_BITMAPS, BITMAPS_EXTENSION.size)

    def lead_to(self, bitmaps: int, size: int, offset: int) -> None:
        """Sets what the extension is to say; ``size`` and ``offset`` of the directory are in bytes."""
        self._payload = BITMAPS_EXTENSION.build(
            nb_bitmaps=bitmaps, reserved=0, directory_size=size, directory_offset=offset
        )

    def unreferenced(self) -> list[Write]:
        """The writes that may share the epoch of the contents, because nothing refers to them yet."""
        if self._payload is None or self._layout.valid or _are_void_read(self._layout):
            return []
        return self._new.unreferenced(self._payload) if self._new else [self._void_payload()]

    def references(self) -> list[Write]:
        """The writes that refer to those of the first epoch: the contents, and `unreferenced`."""
        if self._payload is not None and _are_void_read(self._layout):
            return [self._void_payload()]  # not before the new directory is there: void ones can be brought back
        return self._new.references() if self._new else []

    def switch(self) -> Iterator[list[Write]]:
        """The epochs of the switch, and those that must come right before it."""
        overwritten = self._overwritten()
        if self._payload is None:
            if self._layout.header.autoclear & qcow2.AUTOCLEAR_BITMAPS:
                yield [self._bit_off()]
        elif overwritten is not None:
            if _crosses_sectors(overwritten):
                yield [self._bit_off()]
            yield [overwritten]
        else:
            if self._new:
                yield from self._new.rest(self._payload)
            yield [self._bit_on()]

    def after(self) -> list[Write]:
        """The writes that share the epoch of the lowered refcounts: nothing leads to the old directory any more."""
        extension = self._layout.extension
        if extension is None:
            return []
        if self._payload is not None:
            overwritten = self._overwritten()
            return [self._bit_on()] if overwritten and _crosses_sectors(overwritten) else []
        chain = self._layout.chain
        if chain and chain.terminated and extension is chain.extensions[-1]:
            return [(extension.offset, END_MARKER)]
        return [_vacated(extension)]

    def _void_payload(self) -> Write:
        assert self._layout.extension is not None
        assert self._payload is not None
        return self._layout.extension.data_offset, self._payload

    def _bit_on(self) -> Write:
        return _autoclear(self._known | qcow2.AUTOCLEAR_BITMAPS)

    def _bit_off(self) -> Write:
        return _autoclear(self._known & ~qcow2.AUTOCLEAR_BITMAPS)

    def _overwritten(self) -> Write | None:
        """The new payload over a valid extension's, from the first to the last changed field; None if there is none."""
        extension = self._layout.extension
        if self._payload is None or extension is None or not self._layout.valid:
            return None
        old, new = extension.data, self._payload
        changed = [at for at in range(0, len(new), 8) if old[at : at + 8] != new[at : at + 8]]
        return extension.data_offset + changed[0], new[changed[0] : changed[-1] + 8]


def _vacated(extension: Extension) -> Write:
    """The write of a head that turns an extension into vacant room."""
    return extension.offset, EXTENSION_HEAD.build(type=qcow2.EXTENSION_VACANT, length=len(extension.data))


def _crosses_sectors(write: Write) -> bool:
    """True if a write touches two sectors, so that a crash may leave only half of it."""
    offset, data = write
    return offset // _SECTOR != (offset + len(data) - 1) // _SECTOR
