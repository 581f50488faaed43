r"""`NewImage`: a new qcow2 image, written once, from its beginning to its end.

    | header | data ... | L2 | data ... | L2 | L1 | refcounts |

What is given comes in the order of the disk, so each L2 table is complete when what comes next needs another one. All
clusters are used, and once each. Source: QEMU's docs/interop/qcow2.txt; version 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Self

from dirtmap.fmt import qcow2
from dirtmap.fmt.errors import UnsupportedError
from dirtmap.fmt.extensions import build_chain
from dirtmap.fmt.geometry import align_up, ceil_div
from dirtmap.fmt.parsers.qcow2 import HEADER_MORE, HEADER_V2, HEADER_V3
from dirtmap.tools.backup import files

if TYPE_CHECKING:
    from collections.abc import Iterator

_REFCOUNT_BITS: Final = 16
_ZERO: Final = 1  # an L2 entry of a cluster that reads as zeros, whatever is below it


class NewImage:
    """A new qcow2 image. A context manager; a target of `dirtmap.tools.backup.copying.Writer`.

    What is neither written nor made zero is as in the image below, or else zeros.

    Args:
        path: of the file, which is made.
        size: of the disk, bytes; it is rounded up to 512.
        cluster: bytes, a power of two, 512 at least.
        backing: the name of the image that it is on, in its own folder; None for none.

    Raises:
        UnsupportedError: the disk is too large for clusters of that size.
        StorageError: it cannot be made, or written.
    """

    def __init__(self, path: str, size: int, *, cluster: int = 1 << 16, backing: str | None = None) -> None:
        import numpy as np

        self._np = np
        self._path, self._cluster = path, cluster
        self._size = align_up(size, qcow2.SECTOR)
        self._entries = cluster // qcow2.TABLE_ENTRY_SIZE  # of an L2 table
        tables = ceil_div(self._size, cluster * self._entries)
        if tables * qcow2.TABLE_ENTRY_SIZE > qcow2.MAX_L1_BYTES:
            raise UnsupportedError(
                self._path, f"{size} bytes are more than a qcow2 image of {cluster}-byte clusters has"
            )
        self._backing = b"" if backing is None else backing.encode()
        self._l1 = np.zeros(max(tables, 1), np.dtype(">u8"))
        self._l2 = np.zeros(self._entries, np.dtype(">u8"))
        self._table = 0  # of the entries in _l2
        self._next = cluster  # where the next cluster goes: the first is the header's

    def __enter__(self) -> Self:
        self._file = files.Writing(self._path, 0)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, offset: int, data: memoryview) -> int:
        """Writes bytes of the disk, at its end or of whole clusters, behind all that was given before."""
        for first, clusters, before in self._parts(offset, len(data)):
            self._file.write(self._next, data[before * self._cluster : (before + clusters) * self._cluster])
            numbers = self._np.arange(clusters, dtype=self._np.uint64) * self._np.uint64(self._cluster)
            self._l2[first : first + clusters] = numbers + self._np.uint64(self._next | qcow2.COPIED)
            self._next += clusters * self._cluster
        return 0

    def zero(self, offset: int, length: int) -> int:
        """Makes bytes of the disk zero; as `write`."""
        for first, clusters, _ in self._parts(offset, length):
            self._l2[first : first + clusters] = _ZERO
        return 0

    def wait(self, token: int) -> None:
        """Nothing is written behind."""

    def flush(self) -> None:
        """Completes the image, and makes it durable."""
        self._put_table()
        l1 = self._append(self._l1.tobytes())
        table, blocks = self._put_refcounts()
        self._file.write(0, memoryview(self._header(l1, table, blocks)))
        self._file.set_size(self._next)
        self._file.sync()

    def _parts(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Clusters of the disk by their L2 tables, one after the other.

        Yields:
            The first one's number in its table, how many there are, and how many were before them.
        """
        at, end = offset // self._cluster, ceil_div(offset + length, self._cluster)
        begun = at
        while at < end:
            table, first = divmod(at, self._entries)
            if table != self._table:
                self._put_table()
                self._table = table
            clusters = min(end - at, self._entries - first)
            yield first, clusters, at - begun
            at += clusters

    def _put_table(self) -> None:
        """Writes the L2 table, if there is anything in it."""
        if self._l2.any():
            self._l1[self._table] = self._append(self._l2.tobytes()) | qcow2.COPIED
            self._l2[:] = 0

    def _append(self, data: bytes) -> int:
        """Writes whole clusters of their own; returns where."""
        at = self._next
        self._file.write(at, memoryview(data))
        self._next += align_up(len(data), self._cluster)
        return at

    def _put_refcounts(self) -> tuple[int, int]:
        """Writes a refcount of 1 for each cluster; returns where the refcount table is, and its clusters."""
        per_block = self._cluster * 8 // _REFCOUNT_BITS
        clusters, blocks, tables = self._next // self._cluster, 1, 1
        while blocks * per_block < clusters + blocks + tables:
            blocks = ceil_div(clusters + blocks + tables, per_block)
            tables = ceil_div(blocks * qcow2.TABLE_ENTRY_SIZE, self._cluster)
        if tables * self._cluster > qcow2.MAX_REFCOUNT_TABLE_BYTES:
            raise UnsupportedError(self._path, f"a file of {self._next} bytes needs larger clusters")
        first, left = self._next, clusters + blocks + tables
        for _ in range(blocks):
            counts = self._np.zeros(per_block, self._np.uint64)
            counts[:left] = 1
            left = max(0, left - per_block)
            self._append(qcow2.refcount_block(counts, _REFCOUNT_BITS))
        where = first + self._np.arange(blocks, dtype=self._np.uint64) * self._np.uint64(self._cluster)
        return self._append(where.astype(">u8").tobytes()), tables

    def _header(self, l1: int, refcount_table: int, refcount_clusters: int) -> bytes:
        more = HEADER_MORE.build(compression_type=0, padding=bytes(7))
        length = qcow2.MORE_OFFSET + len(more)
        extensions = build_chain([(qcow2.EXTENSION_BACKING_FORMAT, b"qcow2")] if self._backing else [])
        v2 = HEADER_V2.build(
            magic=qcow2.MAGIC,
            version=3,
            backing_file_offset=length + len(extensions) if self._backing else 0,
            backing_file_size=len(self._backing),
            cluster_bits=self._cluster.bit_length() - 1,
            size=self._size,
            crypt_method=0,
            l1_size=len(self._l1),
            l1_table_offset=l1,
            refcount_table_offset=refcount_table,
            refcount_table_clusters=refcount_clusters,
            nb_snapshots=0,
            snapshots_offset=0,
        )
        v3 = HEADER_V3.build(
            incompatible_features=0,
            compatible_features=0,
            autoclear_features=0,
            refcount_order=_REFCOUNT_BITS.bit_length() - 1,
            header_length=length,
        )
        return v2 + v3 + more + extensions + self._backing
