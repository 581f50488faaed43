"""`Layout`: what a qcow2 image's metadata says about its bitmaps, read whole and judged once.

Reading never fails for what it finds: every fault is collected with the field it lies in, so that `dump`, `check` and
`recover` see as much as can be read, while everything else calls `Layout.require_sound` first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dirtmap.engine.fileio import File
from dirtmap.fmt import directory, qcow2
from dirtmap.fmt.directory import Entry
from dirtmap.fmt.errors import FormatError
from dirtmap.fmt.extensions import Chain, Extension, parse_chain

# Enough for the header and the extensions of every image that QEMU makes; a longer chain is read in full.
_FIRST_READ = 4096
# How many entries the search for the end of a broken one may look at: a hostile directory makes it quadratic.
_RESYNC_ENTRIES = 100_000


class Fault(NamedTuple):
    """One thing wrong: the ``field`` it lies in, ``what`` is wrong, and the bitmap (index) to blame, if one is."""

    field: str
    what: str
    bitmap: int | None = None


class Region(NamedTuple):
    """A run of bytes that one structure owns; ``bitmap`` as in `Fault`."""

    offset: int
    length: int
    what: str
    bitmap: int | None = None


@dataclass(slots=True)
class Slot:
    """One bitmap as found: its directory ``entry``, ``offset`` of the entry in the file, and its raw ``table``.

    ``table`` is None where it cannot be read.
    """

    entry: Entry
    offset: int
    table: bytes | None = None

    def clusters(self) -> Iterator[int]:
        """Offsets of the data clusters that the table refers to, bytes."""
        for raw in directory.parse_table(self.table or b""):
            if raw > directory.TABLE_ALL_ONES:
                yield raw & directory.TABLE_OFFSET_MASK


@dataclass(slots=True)
class Layout:
    """An image's metadata, as read.

    Attributes:
        path: the image.
        file_size: bytes.
        header: the parsed header.
        chain: the header extensions, None where the header is too damaged to look for them.
        extension: the bitmaps extension, None where there is none.
        valid: its autoclear bit is set; otherwise the bitmaps are void.
        pointer: the parsed bitmaps extension, None where void or unreadable.
        slots: the bitmaps that could be read, in the order of the directory.
        faults: everything wrong, in reading order. An image with one is refused whole.
        first_cluster: the bytes that were read of it.
        undecided: the directory could not be followed to its end, so `slots` may lack bitmaps.
    """

    path: str
    file_size: int
    header: qcow2.Header
    chain: Chain | None = None
    extension: Extension | None = None
    valid: bool = False
    pointer: Any = None
    slots: list[Slot] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    first_cluster: bytes = b""
    undecided: bool = False

    def require_sound(self) -> None:
        """Refuses an image that QEMU would refuse, or that is unsafe.

        Raises:
            FormatError: names the file and the first field at fault.
        """
        if self.faults:
            raise FormatError(f"{self.path}: {self.faults[0].field}", self.faults[0].what)

    def blame(self, fields: Iterable[tuple[str, str]], prefix: str, bitmap: int | None = None) -> None:
        """Adds faults found by a validator of `dirtmap.fmt`."""
        self.faults += [Fault(f"{prefix}.{name}", what, bitmap) for name, what in fields]

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return self.header.cluster_size

    def regions(self) -> Iterator[Region]:
        """What is known to lie where, without following guest data: header, tables, directory, bitmaps."""
        v2 = self.header.v2
        yield Region(0, self.cluster_size, "the header")
        yield Region(v2.refcount_table_offset, v2.refcount_table_clusters * self.cluster_size, "the refcount table")
        yield Region(v2.l1_table_offset, v2.l1_size * qcow2.TABLE_ENTRY_SIZE, "the L1 table")
        if v2.nb_snapshots:
            yield Region(v2.snapshots_offset, v2.nb_snapshots * qcow2.SNAPSHOT.size, "the snapshot table")
        for extension in self.chain.extensions if self.chain else ():
            if extension.type == qcow2.EXTENSION_CRYPTO and len(extension.data) == qcow2.CRYPTO_EXTENSION.size:
                crypto = qcow2.CRYPTO_EXTENSION.parse(extension.data)
                yield Region(crypto.offset, crypto.length, "the encryption header")
        if self.pointer:
            yield Region(self.pointer.directory_offset, self.pointer.directory_size, "the bitmap directory")
        for index, slot in enumerate(self.slots):
            if slot.table is not None:
                label = bitmap_label(slot.entry.name)
                yield Region(slot.entry.table_offset, len(slot.table), f"the table of {label}", index)
                for offset in slot.clusters():
                    yield Region(offset, self.cluster_size, f"the data of {label}", index)


def bitmap_label(name: bytes) -> str:
    """How messages and dumps name a bitmap: ``bitmap 'monday'``, with odd bytes escaped."""
    return f"bitmap '{name.decode('utf-8', 'backslashreplace')}'"


def read_layout(file: File) -> Layout:
    """Reads and judges an image's metadata; a handful of small reads for an image with a few bitmaps."""
    file_size = file.size()
    head = file.read(0, _FIRST_READ)
    layout = Layout(file.path, file_size, qcow2.parse_header(head.ljust(qcow2.MORE_OFFSET + 8, b"\0")))
    layout.blame(qcow2.header_faults(layout.header), "header")
    if len(head) < qcow2.HEADER_V2.size and head.startswith(qcow2.MAGIC):
        layout.faults.insert(0, Fault("header", f"the file ends after {file_size} bytes, inside the header"))
    if layout.faults:
        return layout
    limit = layout.header.chain_limit
    chain = parse_chain(head, layout.header.length, min(limit, len(head)))
    if limit > len(head) and not chain.terminated:
        head = file.read(0, layout.cluster_size)
        chain = parse_chain(head, layout.header.length, min(limit, len(head)))
    layout.first_cluster, layout.chain = head, chain
    if chain.fault:
        layout.faults.append(Fault("header extensions", chain.fault))
        return layout
    _read_extensions(file, layout, chain)
    _find_overlaps(layout)
    return layout


def _read_extensions(file: File, layout: Layout, chain: Chain) -> None:
    seen = set()
    for extension in chain.extensions:
        if extension.type in seen:
            name = qcow2.EXTENSION_NAMES[extension.type]
            layout.faults.append(Fault("header extensions", f"'{name}' ({extension.type:#010x}) appears twice"))
        if extension.type in qcow2.SINGLE_EXTENSIONS:
            seen.add(extension.type)
        if extension.type == qcow2.EXTENSION_BITMAPS:
            layout.extension = extension
    valid = bool(layout.header.autoclear & qcow2.AUTOCLEAR_BITMAPS)
    if layout.extension is None:
        if valid:
            layout.faults.append(
                Fault("header.autoclear_features", "bit 0 (bitmaps) is set, but there is no bitmaps extension")
            )
        return
    faults = list(qcow2.bitmaps_extension_faults(layout.extension.data, layout.cluster_size, layout.file_size))
    if not valid:
        # Void bitmaps: QEMU looks at nothing but the length.
        layout.blame([fault for fault in faults if fault[0] == "length"], "bitmaps extension")
        return
    layout.valid = True
    layout.blame(faults, "bitmaps extension")
    if not faults:
        layout.pointer = qcow2.BITMAPS_EXTENSION.parse(layout.extension.data)
        _read_directory(file, layout)


def _read_directory(file: File, layout: Layout) -> None:
    pointer = layout.pointer
    data = file.read_exactly(pointer.directory_offset, pointer.directory_size)
    names: dict[bytes, int] = {}
    for offset, entry in _followed(layout, data):
        index = len(layout.slots)
        slot = Slot(entry, pointer.directory_offset + offset)
        layout.slots.append(slot)
        label = bitmap_label(entry.name)
        faults = list(directory.entry_faults(entry, layout.header.size, layout.cluster_size))
        layout.blame(faults, label, index)
        if entry.name in names:
            layout.faults.append(Fault(f"{label}.name", f"entries {names[entry.name]} and {index} share it", index))
        names.setdefault(entry.name, index)
        if not any(name.startswith("table") for name, _ in faults):
            _read_table(file, layout, slot, index)


def _followed(layout: Layout, data: bytes) -> Iterator[tuple[int, Entry]]:
    """The directory's entries; past one whose lengths are broken, those that fit exactly between it and the end."""
    wanted = layout.pointer.nb_bitmaps
    count = 0
    try:
        for offset, entry in directory.parse_entries(data):
            count += 1
            if count <= wanted:
                yield offset, entry
    except directory.BrokenEntryError as broken:
        where = f"bitmap directory entry {count}"
        layout.faults.append(Fault(where, f"at {layout.pointer.directory_offset + broken.offset:#x}: {broken}"))
        rest = _resynchronised(layout, data, broken.offset, wanted - count - 1)
        layout.undecided = rest is None
        yield from rest or ()
        return
    if count != wanted:
        what = f"{wanted}, but the directory of {len(data)} bytes holds {count} entries"
        layout.faults.append(Fault("bitmaps extension.nb_bitmaps", what))


def _resynchronised(layout: Layout, data: bytes, broken: int, count: int) -> list[tuple[int, Entry]] | None:
    """The entries behind a broken one, where exactly one reading makes sense, else None.

    | ok | ok | broken ??????? | ok | ok |
                ^ start + 8, + 16, ... until `count` faultless entries fill the rest exactly
    """
    budget = _RESYNC_ENTRIES
    found = None
    for start in range(broken + 8, len(data) + 1, 8):
        rest: list[tuple[int, Entry]] = []
        with contextlib.suppress(directory.BrokenEntryError):
            for offset, entry in directory.parse_entries(data, start) if start < len(data) else ():
                budget -= 1
                if budget < 0:
                    return None
                if any(directory.entry_faults(entry, layout.header.size, layout.cluster_size)):
                    break
                rest.append((offset, entry))
            else:
                if len(rest) == count:
                    if found is not None:
                        return None
                    found = rest
    return found


def _read_table(file: File, layout: Layout, slot: Slot, index: int) -> None:
    entry = slot.entry
    label = bitmap_label(entry.name)
    length = entry.table_size * directory.TABLE_ENTRY_SIZE
    if entry.table_offset + length > layout.file_size:
        end = entry.table_offset + length
        what = f"the table ends at {end:#x}, past the end of the file ({layout.file_size:#x})"
        layout.faults.append(Fault(f"{label}.table_offset", what, index))
        return
    table = file.read_exactly(entry.table_offset, length)
    faults = directory.table_faults(directory.parse_table(table), layout.cluster_size, layout.file_size)
    # The first fault of a table says enough; a hostile one could have a million.
    fault = next(faults, None)
    if fault is None:
        slot.table = table
    else:
        layout.faults.append(Fault(f"{label}.table[{fault[0]}]", fault[1], index))


def _find_overlaps(layout: Layout) -> None:
    """No two structures may share a cluster: freeing or rewriting one would destroy the other."""
    owners: dict[int, Region] = {}
    fixed: list[Region] = []
    cluster = layout.cluster_size
    for region in layout.regions():
        if region.bitmap is None and not region.what.endswith("directory"):
            fixed.append(region)  # may be long, and there are few
            continue
        first, last = region.offset // cluster, (region.offset + max(region.length, 1) - 1) // cluster
        for other in fixed:
            if region.offset < other.offset + other.length and other.offset < (last + 1) * cluster:
                _blame_overlap(layout, region, other)
                break
        for number in range(first, last + 1):
            other_owner = owners.setdefault(number, region)
            if other_owner is not region:
                _blame_overlap(layout, region, other_owner)
                break


def _blame_overlap(layout: Layout, region: Region, other: Region) -> None:
    what = f"{region.what} at {region.offset:#x} overlaps {other.what}"
    for bitmap in {region.bitmap, other.bitmap} - {None} or {None}:
        slot = layout.slots[bitmap] if bitmap is not None else None
        field = bitmap_label(slot.entry.name) if slot else "bitmaps extension.directory_offset"
        layout.faults.append(Fault(field, what, bitmap))
