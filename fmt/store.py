"""The store: our own file for the bitmaps of many images, one namespace each.

    block 0     1     2     3   |  clusters: areas of bits, directories, buckets, tables, the space map
      | A | B | A' | B' |       |  ...

    header --+-- namespace table: 2**bucket_bits pointers --> bucket: records --> directory --> bits
             +-- space map: a pointer for each leaf --> leaf: one bit a cluster, 1 = used
             +-- released: runs of clusters that the previous commit used and this one does not

Two header slots, A and B, used in turn, each held twice. Everything a header leads to is named by an *area pointer*:
offset, length in bytes, CRC32C of those bytes. Areas begin at a cluster and are never changed, only replaced.
All numbers are big-endian. Source of every rule: SPEC.md, "The store".
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from dirtmap.fmt import geometry
from dirtmap.fmt.directory import MAX_BITMAPS, MAX_DATA_BYTES, TYPE_DIRTY_TRACKING, Entry, name_fault
from dirtmap.fmt.extensions import HEAD_SIZE

MAGIC = b"DMS\xfb"
VERSION = 1
BLOCK = 4096  # bytes of one copy of a header
COPIES = ((0, 2), (1, 3))  # blocks of slot A and of slot B
RESERVED = 4 * BLOCK  # bytes at the start of the file that hold headers only
AREA_SIZE = 16  # bytes of an area pointer
BITS_CHECKSUM_SIZE = 8  # bytes that a checksum takes in a directory entry's extra data
EXTENSION_HOLD = 0x484F4C44
EXTENSION_SESSION = 0x5452414B
EXTENSION_PEER = 0x50454552
EXTENSION_CHECKPOINTS = 0x434B5054
OF_A_SESSION = (EXTENSION_SESSION, EXTENSION_PEER)  # what a record loses when a tracker's session ends

EXTENSION_NAMESPACES = 0x4E535043
EXTENSION_SPACE = 0x53504143
EXTENSION_RELEASED = 0x52454C53
EXTENSION_NAMES = {
    EXTENSION_NAMESPACES: "namespaces",
    EXTENSION_SPACE: "space map",
    EXTENSION_RELEASED: "released clusters",
}

MIN_CLUSTER_BITS = 12
MAX_CLUSTER_BITS = 21
DEFAULT_CLUSTER_BITS = 12
MAX_BUCKET_BITS = 16
MAX_NAMESPACES = 65536
MAX_PATH = 4096
MAX_RECORD_EXTENSIONS = 1 << 16  # bytes
MAX_SPACE_MAP_BYTES = 4 << 20  # of its root: enough for 32 TiB in clusters of 4 KiB, 8 PiB in those of 64 KiB
MAX_RELEASED_BYTES = 16 << 20
MAX_METADATA_BYTES = 128 << 20  # of any other area but bits: 65,535 entries with the longest names take 66 MiB
MAX_FILE_BYTES = 1 << 62
MAX_GENERATION = 1 << 62
RECORDS_PER_BUCKET = 8  # on average, before the table doubles

KIND_NODE = 1
KIND_DEVICE = 2
# Where a qcow2 image with an identity of its own is; its bitmaps are in it.
KIND_PLACE = 3
# Where any other container of the host is; only in the default store.
KIND_CONTAINER = 4
KIND_NAMES = {KIND_NODE: "node", KIND_DEVICE: "device", KIND_PLACE: "place", KIND_CONTAINER: "container"}
CONTAINER_PREFIX = b"container:"  # of such a record's name; followed by a digest of the path

# A directory entry's table_offset where a bitmap takes no space.
ALL_ZEROS = 0
ALL_ONES = 1


class Area(NamedTuple):
    """Where bytes lie and what their CRC32C is; ``length`` 0 means nothing is stored."""

    offset: int = 0
    length: int = 0
    checksum: int = 0

    def clusters(self, cluster_size: int) -> range:
        """The numbers of the clusters it takes."""
        first = self.offset // cluster_size
        return range(first, first + geometry.ceil_div(self.length, cluster_size))


NOWHERE = Area()


def leaf_clusters(cluster_size: int) -> int:
    """How many clusters a leaf of the space map shows: a bit each."""
    return cluster_size * 8


def area_faults(area: Area, cluster_size: int, file_size: int) -> Iterator[tuple[str, str]]:
    """What makes an area unusable, as (field, what); called before its bytes are read."""
    if area.length == 0:
        if area.offset or area.checksum:
            yield "length", "0, but the area has a place"
        return
    if area.offset % cluster_size or area.offset < RESERVED:
        yield "offset", f"{area.offset:#x} is not a cluster behind the headers"
    elif area.offset + area.length > file_size:
        end = area.offset + area.length
        yield "offset", f"the area ends at {end:#x}, past the end of the file ({file_size:#x})"


@dataclass(frozen=True, slots=True)
class Identity:
    """What an image looked like when its bitmaps were last known to be right: numbers from ``stat``; size in bytes."""

    device: int = 0
    inode: int = 0
    mtime_ns: int = 0
    size: int = 0

    def is_file(self, other: Identity) -> bool:
        """True where both are of one file, whatever has been written to it."""
        return (self.device, self.inode) == (other.device, other.inode)

    def with_data(self, data: Identity) -> Identity:
        """That of an image whose guest data is in another file: a digest that also tells when that is another one."""
        numbers = self.mtime_ns, data.device, data.inode, data.mtime_ns, data.size
        digest = hashlib.blake2b(b"".join(number.to_bytes(8, "big") for number in numbers), digest_size=8).digest()
        return replace(self, mtime_ns=int.from_bytes(digest, "big"))


NO_IDENTITY = Identity()


@dataclass(frozen=True, slots=True)
class Record:
    """One namespace.

    Attributes:
        name: raw bytes of the node's or device's name.
        kind: `KIND_NODE`, `KIND_DEVICE`, `KIND_PLACE` or `KIND_CONTAINER`.
        uuid: 16 bytes.
        size: of the virtual disk, bytes.
        generation: of the commit that wrote the directory.
        directory: where the directory is; no length where there are no bitmaps.
        nb_bitmaps: entries in it.
        path: of the image, raw bytes; of a device, of its root's image.
        identity: of the image.
        root_uuid: of a device's root node; zeros for a node.
        extensions: what else is known of the namespace, as (type, data); types that nobody knows are kept.
    """

    name: bytes
    kind: int
    uuid: bytes
    size: int
    generation: int = 0
    directory: Area = NOWHERE
    nb_bitmaps: int = 0
    path: bytes = b""
    identity: Identity = NO_IDENTITY
    root_uuid: bytes = bytes(16)
    extensions: tuple[tuple[int, bytes], ...] = ()

    @property
    def label(self) -> str:
        """How messages name it; a kind that nobody knows, which `dump` shows, too, is just a namespace."""
        kind = KIND_NODE if self.kind == KIND_PLACE else self.kind
        return f"{KIND_NAMES.get(kind, 'namespace')} '{_readable(self.name)}'"

    def extension(self, kind: int) -> bytes | None:
        """The data of the first extension of that type, or None."""
        return next((data for found, data in self.extensions if found == kind), None)

    @property
    def tracked(self) -> bool:
        """True where it names the session of a tracker, which may have died."""
        return self.extension(EXTENSION_SESSION) is not None

    def with_extensions(self, kinds: Collection[int], new: Iterable[tuple[int, bytes]] = ()) -> Record:
        """The same with these extensions, (type, data), and no others of those types."""
        others = (item for item in self.extensions if item[0] not in kinds)
        return replace(self, extensions=(*others, *new))


def namespace_label(name: bytes) -> str:
    """How messages name a namespace whose kind is not known, or does not matter."""
    return f"namespace '{_readable(name)}'"


def _readable(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def container_name(path: bytes) -> bytes:
    """The name of the record that remembers the container at a path: `CONTAINER_PREFIX` and 32 hexadecimal digits."""
    return CONTAINER_PREFIX + hashlib.blake2b(path, digest_size=16).hexdigest().encode()


def record_faults(record: Record) -> Iterator[tuple[str, str]]:
    """What is wrong with a record, as (field, what); called on load and on store."""
    if fault := name_fault(record.name):
        yield "name", fault
    if record.kind not in KIND_NAMES:
        yield "kind", f"{record.kind} is unknown"
    if record.size > geometry.MAX_DISK_SIZE:
        yield "size", f"{record.size} is above {geometry.MAX_DISK_SIZE}"
    if len(record.path) > MAX_PATH or b"\0" in record.path:
        yield "path", "too long, or contains a NUL byte"
    if sum(len(data) + HEAD_SIZE for _, data in record.extensions) > MAX_RECORD_EXTENSIONS:
        yield "extensions", f"more than {MAX_RECORD_EXTENSIONS} bytes"
    if record.nb_bitmaps > MAX_BITMAPS:
        yield "nb_bitmaps", f"{record.nb_bitmaps} is above {MAX_BITMAPS}"
    if bool(record.nb_bitmaps) != bool(record.directory.length):
        yield "nb_bitmaps", f"{record.nb_bitmaps}, but the directory has {record.directory.length} bytes"


def entry_faults(entry: Entry, disk_size: int, cluster_size: int, file_size: int) -> Iterator[tuple[str, str]]:
    """What is wrong with a directory entry in a store, as (field, what). Flags we do not know are kept, not judged."""
    if entry.type != TYPE_DIRTY_TRACKING:
        yield "type", f"{entry.type} is not 1 (dirty tracking bitmap)"
    if fault := name_fault(entry.name):
        yield "name", fault
    if not geometry.is_granularity(1 << min(entry.granularity_bits, 63)):
        yield "granularity_bits", f"{entry.granularity_bits} is outside 9..31"
        return
    length = geometry.packed_bytes(disk_size, entry.granularity)
    if length > MAX_DATA_BYTES:
        yield "granularity_bits", f"{length} bytes of bits are more than {MAX_DATA_BYTES}"
    if entry.table_offset in (ALL_ZEROS, ALL_ONES):
        if entry.table_size:
            yield "table_size", f"{entry.table_size}, but the bitmap takes no space"
        return
    if entry.table_size != geometry.ceil_div(length, cluster_size):
        yield "table_size", f"{entry.table_size} clusters, but the disk's size needs another number"
    if len(entry.extra_data) < BITS_CHECKSUM_SIZE:
        yield "extra_data_size", f"{len(entry.extra_data)} bytes are too few for a checksum"
    yield from area_faults(Area(entry.table_offset, length, 0), cluster_size, file_size)
