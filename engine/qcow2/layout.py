"""`Layout`: what the metadata of a qcow2 image says about its bitmaps. It is read whole, and validated once.

Reading never fails because of what it finds. Every fault is collected with the field it lies in, so that `dump`,
`check` and `recover` see as much as can be read. All others call `Layout.require_sound` first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, NamedTuple

from dirtmap.engine.system.file import File
from dirtmap.fmt import directory, geometry, qcow2
from dirtmap.fmt.directory import Entry, parse_entries
from dirtmap.fmt.errors import FormatError, LockedError, counted, printable
from dirtmap.fmt.extensions import Chain, Extension, parse_chain
from dirtmap.fmt.parsers.qcow2 import BITMAPS_EXTENSION, CRYPTO_EXTENSION, HEADER_V2, SNAPSHOT
from dirtmap.fmt.qcow2 import bitmaps_extension_faults, extension_faults, parse_header

# Enough for the header and extensions of every image that QEMU makes. A longer chain is read in full.
_FIRST_READ = 4096
# Limits the search for the end of a broken entry, which a hostile directory makes quadratic.
_RESYNC_ENTRIES = 100_000
# Limits what is read and compared before an image is trusted, for all bitmaps together. A hostile image with 65,535
# bitmaps could ask for 512 GiB of tables. The limits suffice for 65,535 bitmaps of a disk of 1 TiB at 64 KiB.
_MOST_TABLE_ENTRIES = 1 << 22
_MOST_REGIONS = 1 << 18


# With a fault in one of these, nothing behind the header can be found.
_UNREADABLE = frozenset(
    {"header"}
    | {f"header.{name}" for name in ("magic", "version", "incompatible_features", "cluster_bits", "header_length")}
)


class Fault(NamedTuple):
    """One fault: the ``field`` it lies in, ``what`` is wrong, and the index of the ``bitmap`` at fault, or None.

    If the name of a field begins with ``bitmap``, dropping some of the bitmaps repairs the fault.
    """

    field: str
    what: str
    bitmap: int | None = None

    @property
    def repairable(self) -> bool:
        """True if dropping bitmaps repairs the fault: the rest of the image is not affected."""
        return self.field.startswith("bitmap")


class Region(NamedTuple):
    """A run of bytes that one structure owns: ``offset`` and ``length`` in bytes, and ``what`` the structure is.

    ``field`` is the field that leads there; ``bitmap`` is as in `Fault`.
    """

    offset: int
    length: int
    what: str
    field: str
    bitmap: int | None = None


class Snapshot(NamedTuple):
    """An entry of the snapshot table: its place, and that of its L1 table, in bytes; ``l1_size`` is in entries."""

    offset: int
    length: int
    l1_table_offset: int
    l1_size: int


@dataclass(slots=True)
class Slot:
    """One bitmap as found: its directory ``entry``, the ``offset`` of that in the file (bytes), and its raw ``table``.

    ``table`` is None if it cannot be read.
    """

    entry: Entry
    offset: int
    table: bytes | None = None

    def clusters(self) -> Iterator[int]:
        """The offsets, in bytes, of the data clusters that the table refers to."""
        for raw in directory.parse_table(self.table or b""):
            if raw > directory.TABLE_ALL_ONES:
                yield raw & directory.TABLE_OFFSET_MASK

    def runs(self, cluster_size: int) -> Iterator[tuple[int, int]]:
        """Like `clusters`, with adjacent clusters joined: offset and length, in bytes."""
        start = end = 0
        for offset in self.clusters():
            if offset != end:
                if end:
                    yield start, end - start
                start = offset
            end = offset + cluster_size
        if end:
            yield start, end - start


@dataclass(slots=True)
class Layout:
    """The metadata of an image, as read.

    Attributes:
        path: the image.
        file_size: in bytes.
        header: the parsed header.
        chain: the header extensions; None if the header is too damaged to find them.
        snapshots: the snapshot table, as far as it can be read.
        extension: the bitmaps extension; None if there is none.
        identity_extension: the namespace extension; None if the image has no identity.
        valid: whether the autoclear bit of the bitmaps is set. If not, the bitmaps are void.
        pointer: the parsed bitmaps extension; None if at fault, and if void, unless void ones were asked for.
        slots: the bitmaps that could be read, in directory order.
        faults: everything that is wrong, in reading order. An image with a fault is refused as a whole.
        first_cluster: the bytes of the first cluster, as far as they were read.
        undecided: whether the directory could not be read to its end, so that `slots` may lack bitmaps.
    """

    path: str
    file_size: int
    header: qcow2.Header
    chain: Chain | None = None
    snapshots: list[Snapshot] = field(default_factory=list)
    extension: Extension | None = None
    identity_extension: Extension | None = None
    valid: bool = False
    pointer: Any = None
    slots: list[Slot] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    first_cluster: bytes = b""
    undecided: bool = False

    @property
    def uuid(self) -> bytes | None:
        """The UUID of the image's namespace, 16 bytes; None if the image has no identity."""
        return self.identity_extension.data[: qcow2.NAMESPACE_EXTENSION_SIZE] if self.identity_extension else None

    @property
    def name(self) -> bytes | None:
        """The image's node name, raw bytes; None if the image has no identity."""
        return self.identity_extension.data[qcow2.NAMESPACE_EXTENSION_SIZE :] if self.identity_extension else None

    @property
    def is_void(self) -> bool:
        """True if the image has bitmaps that are void."""
        return self.extension is not None and not self.header.autoclear & qcow2.AUTOCLEAR_BITMAPS

    @property
    def bitmaps_said(self) -> int | None:
        """The number of bitmaps according to the extension; None if it has none that is possible."""
        if self.extension is None or len(self.extension.data) != BITMAPS_EXTENSION.size:
            return None
        said = int(BITMAPS_EXTENSION.parse(self.extension.data).nb_bitmaps)
        return said if 1 <= said <= directory.MAX_BITMAPS else None

    @property
    def tracked(self) -> bool:
        """True if a tracker has the bitmaps, and no other program has opened the image for writing since."""
        return bool(self.header.autoclear & qcow2.AUTOCLEAR_TRACKED)

    def require_untracked(self) -> None:
        """Refuses to change an image whose bitmaps a tracker has in a store that is not known.

        Raises:
            LockedError: the image is tracked; the error says what can be done.
        """
        if self.tracked:
            what = (
                "tracked, with its bitmaps in another store; say which with --store, "
                "or 'dirtmap recover' gives up what that has"
            )
            raise LockedError(self.path, what)

    def require_sound(self) -> None:
        """Refuses an image that QEMU would refuse, or that is unsafe to use.

        Raises:
            FormatError: names the file and the first field at fault.
        """
        if not self.faults:
            return
        first = self.faults[0]
        hint = "; 'node add' gives a raw one a name in a store" if first.field == "header.magic" else ""
        raise FormatError(f"{self.path}: {first.field}", first.what + hint)

    def require_listable(self) -> None:
        """Like `require_sound`, but allows faults of single bitmaps, from which the others can be told apart.

        Raises:
            FormatError: more than single bitmaps are at fault.
        """
        if not all(fault.bitmap is not None for fault in self.faults):
            self.require_sound()

    def add_faults(self, fields: Iterable[tuple[str, str]], prefix: str, bitmap: int | None = None) -> None:
        """Adds the faults that a validator of `dirtmap.fmt` found; ``prefix`` comes before the name of each field."""
        self.faults += [Fault(f"{prefix}.{name}", what, bitmap) for name, what in fields]

    @property
    def cluster_size(self) -> int:
        """In bytes."""
        return 1 << self.header.v2.cluster_bits

    def structures(self) -> Iterator[Region]:
        """The structures that the header leads to, except refcount blocks, guest data and bitmaps."""
        v2, cluster = self.header.v2, self.cluster_size
        yield Region(0, cluster, "the header", "header")
        length = v2.refcount_table_clusters * cluster
        yield Region(v2.refcount_table_offset, length, "the refcount table", "header.refcount_table_offset")
        length = v2.l1_size * qcow2.TABLE_ENTRY_SIZE
        yield Region(v2.l1_table_offset, length, "the L1 table", "header.l1_table_offset")
        if v2.nb_snapshots:
            end = self.snapshots[-1].offset + self.snapshots[-1].length if self.snapshots else 0
            length = max(end - v2.snapshots_offset, v2.nb_snapshots * SNAPSHOT.size)
            yield Region(v2.snapshots_offset, length, "the snapshot table", "header.snapshots_offset")
        for extension in self.chain.extensions if self.chain else ():
            if extension.type == qcow2.EXTENSION_CRYPTO and len(extension.data) == CRYPTO_EXTENSION.size:
                crypto = CRYPTO_EXTENSION.parse(extension.data)
                yield Region(
                    crypto.offset,
                    crypto.length,
                    "the encryption header",
                    "header extensions.full disk encryption header",
                )

    def snapshot_tables(self) -> Iterator[Region]:
        """The L1 tables of snapshots, wherever the snapshot table says they are."""
        for index, snapshot in enumerate(self.snapshots):
            where = f"snapshot {index}.l1_table_offset"
            length = snapshot.l1_size * qcow2.TABLE_ENTRY_SIZE
            yield Region(snapshot.l1_table_offset, length, f"the L1 table of snapshot {index}", where)

    def regions(self) -> Iterator[Region]:
        """All regions that are known without following guest data."""
        yield from self.structures()
        # Leaves out a snapshot's L1 table that ends past the end of the file: the walk finds that; readers need not.
        yield from (region for region in self.snapshot_tables() if region.offset + region.length <= self.file_size)
        yield from self.bitmap_regions()

    def bitmap_regions(self) -> Iterator[Region]:
        """What the bitmaps have: their directory, their tables and their data."""
        if self.pointer:
            where = "bitmaps extension.directory_offset"
            pointer = self.pointer
            yield Region(pointer.directory_offset, pointer.directory_size, "the bitmap directory", where)
        cluster = self.cluster_size
        for index, slot in enumerate(self.slots):
            if slot.table is not None:
                yield Region(slot.entry.table_offset, len(slot.table), "the table", "bitmap", index)
                for offset, length in slot.runs(cluster):
                    yield Region(offset, length, "the data", "bitmap", index)


def bitmap_label(name: bytes) -> str:
    """How messages and dumps name a bitmap: ``bitmap 'monday'``, with undecodable bytes escaped."""
    return f"bitmap '{printable(name.decode('utf-8', 'backslashreplace'))}'"


def read_head(file: File) -> Layout:
    """Reads and validates the header, and its extensions as a chain, but not what the extensions mean."""
    file_size = file.size()
    head = file.read(0, _FIRST_READ)
    layout = Layout(file.path, file_size, parse_header(head.ljust(qcow2.MORE_OFFSET + 8, b"\0")))
    layout.add_faults(qcow2.header_faults(layout.header), "header")
    least = qcow2.MORE_OFFSET if layout.header.v2.version == 3 else HEADER_V2.size
    if len(head) < least and head.startswith(qcow2.MAGIC):
        layout.faults.insert(0, Fault("header", f"the file ends after {file_size} bytes, inside the header"))
    if layout.faults and not _UNREADABLE.isdisjoint(fault.field for fault in layout.faults):
        return layout
    limit = layout.header.chain_limit
    chain = parse_chain(head, layout.header.length, min(limit, len(head)))
    if limit > len(head) and not chain.terminated:
        head = file.read(0, layout.cluster_size)
        chain = parse_chain(head, layout.header.length, min(limit, len(head)))
    layout.first_cluster, layout.chain = head, chain
    if chain.fault:
        layout.faults.append(Fault("header extensions", chain.fault))
    for extension in chain.extensions:
        if extension.type == qcow2.EXTENSION_NAMESPACE:
            layout.identity_extension = extension
    return layout


def read_layout(file: File, *, void: bool = False) -> Layout:
    """Reads and validates the metadata of an image; a few small reads for an image with a few bitmaps.

    Args:
        file: the image, locked by the caller.
        void: whether to read void bitmaps as well, and validate them as if they were valid.
    """
    layout = read_head(file)
    file_size, chain = layout.file_size, layout.chain
    if chain is None or chain.fault:
        return layout
    _read_snapshots(file, layout)
    structures = list(layout.structures())
    for region in structures:
        end = region.offset + region.length
        if end > file_size and region.field != "header":
            what = f"{region.what} ends at {end:#x}, past the end of the file ({file_size:#x})"
            layout.faults.append(Fault(region.field, what))
    _read_extensions(file, layout, chain, void=void)
    _find_overlaps(layout, structures)
    return layout


def _read_snapshots(file: File, layout: Layout) -> None:
    at = start = layout.header.v2.snapshots_offset
    for index in range(min(layout.header.v2.nb_snapshots, qcow2.MAX_SNAPSHOTS)):
        raw = file.read(at, SNAPSHOT.size)
        if len(raw) < SNAPSHOT.size:
            return  # `read_layout` reports that the table ends past the end of the file
        snapshot = SNAPSHOT.parse(raw)
        if snapshot.extra_data_size > qcow2.MAX_SNAPSHOT_EXTRA_DATA:
            what = f"{snapshot.extra_data_size} is above {qcow2.MAX_SNAPSHOT_EXTRA_DATA}"
            layout.faults.append(Fault(f"snapshot {index}.extra_data_size", what))
            return
        size = SNAPSHOT.size + snapshot.extra_data_size + snapshot.id_size + snapshot.name_size
        layout.snapshots.append(Snapshot(at, size, int(snapshot.l1_table_offset), int(snapshot.l1_size)))
        at = geometry.align_up(at + size, 8)
        if at - start > qcow2.MAX_SNAPSHOT_TABLE_BYTES:
            what = f"the snapshot table is longer than {qcow2.MAX_SNAPSHOT_TABLE_BYTES} bytes"
            layout.faults.append(Fault("header.nb_snapshots", what))
            return


def void_bitmaps(file: File) -> str:
    """Which bitmaps of an image are void, for a message: their names, or as much as can be told."""
    layout = read_layout(file, void=True)
    if layout.slots and not layout.faults:
        return ", ".join(bitmap_label(slot.entry.name) for slot in layout.slots)
    count = layout.bitmaps_said
    return f"{'all' if count is None else count} bitmaps, whose names cannot be relied on"


def _read_extensions(file: File, layout: Layout, chain: Chain, *, void: bool) -> None:
    seen = set()
    for extension in chain.extensions:
        if extension.type in seen:
            name = qcow2.EXTENSION_NAMES[extension.type]
            layout.faults.append(Fault("header extensions", f"'{name}' ({extension.type:#010x}) appears twice"))
        if extension.type in qcow2.SINGLE_EXTENSIONS:
            seen.add(extension.type)
        if extension.type == qcow2.EXTENSION_BITMAPS:
            layout.extension = extension
        elif extension.type == qcow2.EXTENSION_NAMESPACE:
            layout.add_faults(qcow2.namespace_extension_faults(extension.data), "namespace extension")
    faults = list(extension_faults(layout.header, chain.extensions))
    for extension in chain.extensions if not faults else ():
        if extension.type == qcow2.EXTENSION_CRYPTO:
            crypto = CRYPTO_EXTENSION.parse(extension.data)
            faults += qcow2.luks_faults(file.read(crypto.offset, len(qcow2.LUKS_MAGIC + qcow2.LUKS_VERSION)))
    if faults:
        layout.faults += [Fault(*fault) for fault in faults]
    valid = bool(layout.header.autoclear & qcow2.AUTOCLEAR_BITMAPS)
    if layout.extension is None:
        if valid:
            what = "there is none, but autoclear feature bit 0 (bitmaps) is set"
            layout.faults.append(Fault("bitmaps extension", what))
        return
    faults = list(bitmaps_extension_faults(layout.extension.data, layout.cluster_size, layout.file_size))
    if not valid and not void:
        # The bitmaps are void: QEMU looks at nothing but the length.
        layout.add_faults([fault for fault in faults if fault[0] == "length"], "bitmaps extension")
        return
    layout.valid = valid
    if faults:
        layout.add_faults(faults, "bitmaps extension")
    _read_directory(file, layout, {name for name, _ in faults})


def _read_directory(file: File, layout: Layout, bad: set[str]) -> None:
    """Reads what the bitmaps extension leads to, even if some of its fields are ``bad``."""
    assert layout.extension is not None
    if bad & {"length", "directory_offset"} or bad >= {"nb_bitmaps", "directory_size"}:
        return
    pointer = BITMAPS_EXTENSION.parse(layout.extension.data)
    if not bad:
        layout.pointer = pointer
    size = directory.MAX_DIRECTORY_SIZE if "directory_size" in bad else pointer.directory_size
    data = file.read(pointer.directory_offset, size)
    size, cluster = layout.header.size, layout.cluster_size
    names: dict[bytes, int] = {}
    left = _MOST_TABLE_ENTRIES
    for offset, entry in _entries(layout, data, pointer):
        index = len(layout.slots)
        slot = Slot(entry, pointer.directory_offset + offset)
        layout.slots.append(slot)
        faults = list(directory.entry_faults(entry, size, cluster))
        if names.setdefault(entry.name, index) != index:
            faults.append(("name", f"entries {names[entry.name]} and {index} share it"))
        if faults:
            layout.add_faults(faults, bitmap_label(entry.name), index)
        if not faults or not any(name.startswith("table") or name == "granularity_bits" for name, _ in faults):
            left -= entry.table_size
            if left >= 0:
                _read_table(file, layout, slot, index)
    if left < 0:
        what = f"they have {_MOST_TABLE_ENTRIES - left} entries, and dirtmap reads {_MOST_TABLE_ENTRIES}"
        layout.faults.append(Fault("tables of all bitmaps", what))


def _entries(layout: Layout, data: bytes, pointer: Any) -> list[tuple[int, Entry]]:
    """The entries of the directory with their offsets. If lengths are broken, as many entries as can be told.

    | good | good | bad or broken ??????? | good | good |      `_resynchronised` finds the last ones
    """
    wanted = int(pointer.nb_bitmaps)
    found: list[tuple[int, Entry]] = []
    broken = None
    try:
        found.extend(itertools.islice(parse_entries(data), directory.MAX_BITMAPS + 1))
    except directory.BrokenEntryError as error:
        broken = error.offset
        what = f"at {pointer.directory_offset + broken:#x}: {error}"
        layout.faults.append(Fault(f"bitmap directory entry {len(found)}", what))
    else:
        if len(found) == wanted:
            return found
        what = f"{wanted}, but the directory of {len(data)} bytes holds {counted(len(found), 'entry', 'entries')}"
        layout.faults.append(Fault("bitmaps extension.nb_bitmaps", what))
    good = next((index for index, (_, entry) in enumerate(found) if _is_bad(layout, entry)), len(found))
    if good >= wanted or (good == len(found) and broken is None):
        return found[:good]
    if len(found) > directory.MAX_BITMAPS:
        layout.undecided = True
        return found[:good]
    at = found[good][0] if good < len(found) else broken
    rest = _resynchronised(layout, data, at or 0, wanted - good - 1)
    layout.undecided = rest is None
    return found if rest is None else [*found[: good + 1], *rest]


def _resynchronised(layout: Layout, data: bytes, bad: int, count: int) -> list[tuple[int, Entry]] | None:
    """The entries behind a bad one, if exactly one reading of the bytes makes sense; else None.

    bad ??????? | ok | ok |
    ^ + 8, + 16, ... until `count` faultless entries fill the rest exactly
    """
    budget = _RESYNC_ENTRIES
    found = None
    for start in range(bad + 8, len(data) + 1, 8):
        rest: list[tuple[int, Entry]] = []
        try:
            for offset, entry in parse_entries(data, start):
                budget -= 1
                if _is_bad(layout, entry) or budget < 0:
                    break
                rest.append((offset, entry))
            else:
                if len(rest) == count:
                    if found is not None:
                        return None
                    found = rest
        except directory.BrokenEntryError:
            budget -= 1
        if budget < 0:
            return None
    return found


def _is_bad(layout: Layout, entry: Entry) -> bool:
    return any(True for _ in directory.entry_faults(entry, layout.header.size, layout.cluster_size))


def _read_table(file: File, layout: Layout, slot: Slot, index: int) -> None:
    entry = slot.entry
    length = entry.table_size * directory.TABLE_ENTRY_SIZE
    end = entry.table_offset + length
    if end > layout.file_size:
        faults = iter(
            [("table_offset", f"the table ends at {end:#x}, past the end of the file ({layout.file_size:#x})")]
        )
    else:
        table = file.read_exactly(entry.table_offset, length)
        found = directory.table_faults(directory.parse_table(table), layout.cluster_size, layout.file_size)
        faults = ((f"table[{position}]", what) for position, what in found)
    # One fault per table is enough; a hostile table could have a million.
    fault = next(faults, None)
    if fault is None:
        slot.table = table
    else:
        layout.add_faults([fault], bitmap_label(entry.name), index)


def _find_overlaps(layout: Layout, structures: list[Region]) -> None:
    """Adds faults for structures that share a cluster: freeing or rewriting one would destroy the other."""
    cluster = layout.cluster_size
    end = layout.file_size
    regions = [region for region in structures if region.length]
    if layout.snapshots:
        # Also tables that go on past the end: QEMU does not write over what a snapshot's L1 table claims.
        tables = (region for region in layout.snapshot_tables() if region.length and region.offset < end)
        regions += (table._replace(length=min(table.length, end - table.offset)) for table in tables)
    regions += itertools.islice(layout.bitmap_regions(), _MOST_REGIONS + 1 - len(regions))
    if len(regions) > _MOST_REGIONS:
        what = f"their tables and bits lie in more than {_MOST_REGIONS} pieces"
        layout.faults.append(Fault("tables of all bitmaps", what))
        for slot in layout.slots:
            slot.table = None  # no later step is to read them
        return
    regions.sort(key=itemgetter(0))
    reach, holder = regions[0].length, regions[0]
    reported: set[int] = set()
    for region in regions[1:]:
        if region.offset // cluster * cluster < reach:
            _add_overlap(layout, region, holder, reported)
        if region.offset + region.length > reach:
            reach, holder = region.offset + region.length, region


def _add_overlap(layout: Layout, region: Region, other: Region, reported: set[int]) -> None:
    def label(region: Region) -> str:
        return "" if region.bitmap is None else bitmap_label(layout.slots[region.bitmap].entry.name)

    def text(region: Region) -> str:
        return region.what if region.bitmap is None else f"{region.what} of {label(region)}"

    bitmaps = {region.bitmap, other.bitmap} - {None}
    if not bitmaps:  # a directory can be given up, so the fault is put on it
        region, other = (other, region) if other.field.startswith("bitmap") else (region, other)
        layout.faults.append(Fault(region.field, f"{text(region)} at {region.offset:#x} overlaps {text(other)}"))
    for one, another in ((region, other), (other, region)):
        if one.bitmap is not None and one.bitmap not in reported:
            reported.add(one.bitmap)
            what = f"{one.what} at {one.offset:#x} overlaps {text(another)}"
            layout.faults.append(Fault(label(one), what, one.bitmap))
