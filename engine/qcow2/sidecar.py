"""Makes a qcow2 *sidecar* for a raw disk: an image whose data is the raw file, so that QEMU can keep bitmaps for it.

    raw file   |  guest data, byte for byte, as it was       |   <- opened by QEMU through the sidecar from now on
    sidecar    | header | refcounts | L1 | L2 tables | bitmaps |   every L2 entry maps an offset to itself

Source: docs/interop/qcow2.txt, incompatible bit 2 and autoclear bit 1: with raw external data, guest offsets are file
offsets. QEMU maps everything when it makes such an image (``data_file_raw``), since what is unmapped reads as zeros.
"""

from __future__ import annotations

import os

import numpy as np

from dirtmap.engine.system.file import open_file, remove_file, room_at, sync_folder
from dirtmap.engine.system.foreign import require_raw
from dirtmap.fmt import geometry, qcow2
from dirtmap.fmt.errors import StorageError, UnsupportedError
from dirtmap.fmt.extensions import build_chain
from dirtmap.fmt.geometry import ceil_div
from dirtmap.fmt.parsers.qcow2 import HEADER_MORE, HEADER_V2, HEADER_V3

_COPIED = 1 << 63  # of an L1 or L2 entry: referenced once. With an external data file it also means "mapped".
_REFCOUNT_BITS = 16
_SECTOR = 512
# An L2 table of 64 KiB clusters maps 512 MiB; larger disks get larger clusters, so that the sidecar stays small.
_CLUSTER_BITS = ((64 << 30, 16), (1 << 40, 18), (geometry.MAX_DISK_SIZE, 21))


def make_sidecar(disk: str, path: str, *, raw: bool = False) -> None:
    """Writes a new qcow2 file that has ``disk`` as raw external data. The raw file itself is only looked at.

    Args:
        disk: a file or block device whose size is a multiple of 512 bytes. Its path is stored as an absolute one: QEMU
            takes a relative one as relative to the folder that it runs in (tried with 7.2).
        path: must not exist.
        raw: it is a raw disk, although it looks like an image of another format.

    Raises:
        FormatError: ``disk`` is an image of another format than raw.
        UnsupportedError: the raw file's size, or the length of its name, does not fit.
        StorageError: ``path`` exists, there is no room for it, or something cannot be read or written.
    """
    if not raw:
        require_raw(disk)
    with open_file(disk) as file:
        size = file.size()
    if size % _SECTOR:
        raise UnsupportedError(disk, f"its size of {size} bytes is not a multiple of {_SECTOR}, which QEMU needs")
    bits = next(bits for limit, bits in _CLUSTER_BITS if size <= limit)
    cluster = 1 << bits
    data_clusters = ceil_div(size, cluster)
    per_l2 = cluster // qcow2.TABLE_ENTRY_SIZE
    l2_tables = ceil_div(data_clusters, per_l2)
    l1_clusters = ceil_div(l2_tables * qcow2.TABLE_ENTRY_SIZE, cluster)
    per_block = cluster * 8 // _REFCOUNT_BITS
    blocks = 1
    while blocks * per_block < 2 + blocks + l1_clusters + l2_tables:
        blocks += 1
    if l2_tables * qcow2.TABLE_ENTRY_SIZE > qcow2.MAX_L1_BYTES:
        raise UnsupportedError(disk, f"its {size} bytes are more than a qcow2 image can map")
    table, first_block, l1 = cluster, 2 * cluster, (2 + blocks) * cluster
    l2 = l1 + l1_clusters * cluster
    used = 2 + blocks + l1_clusters + l2_tables
    name = os.fsencode(os.path.abspath(disk))
    header = _header(size, bits, table, l1, l2_tables, name)
    if len(header) > cluster:
        raise UnsupportedError(disk, "its path is too long for the header")
    if used * cluster > (room := room_at(path)):
        raise StorageError(path, f"needs {used * cluster} bytes, and there is room for {room}")
    counts = np.zeros(blocks * per_block, np.uint64)
    counts[:used] = 1
    try:
        with open_file(path, writable=True, create=True) as new:
            new.write(0, header.ljust(cluster, b"\0"))
            new.write(
                table,
                (np.arange(blocks, dtype=">u8") * cluster + first_block).astype(">u8").tobytes().ljust(cluster, b"\0"),
            )
            new.write(first_block, qcow2.refcount_block(counts, _REFCOUNT_BITS))
            l1_entries = (np.arange(l2_tables, dtype=np.uint64) * np.uint64(cluster) + np.uint64(l2)) | np.uint64(
                _COPIED
            )
            new.write(l1, l1_entries.astype(">u8").tobytes().ljust(l1_clusters * cluster, b"\0"))
            for index in range(l2_tables):
                first = index * per_l2
                entries = np.zeros(per_l2, np.uint64)
                mapped = min(per_l2, data_clusters - first)
                numbers = np.arange(first, first + mapped, dtype=np.uint64)
                entries[:mapped] = numbers * np.uint64(cluster) | np.uint64(_COPIED)
                new.write(l2 + index * cluster, entries.astype(">u8").tobytes())
            new.sync()
        sync_folder(os.path.abspath(path))
    except StorageError as error:
        if not (error.where == path and error.what.startswith("open")):
            remove_file(path)
        raise


def _header(size: int, cluster_bits: int, refcount_table: int, l1: int, l1_size: int, data_file: bytes) -> bytes:
    v2 = HEADER_V2.build(
        magic=qcow2.MAGIC,
        version=3,
        backing_file_offset=0,
        backing_file_size=0,
        cluster_bits=cluster_bits,
        size=size,
        crypt_method=0,
        l1_size=l1_size,
        l1_table_offset=l1,
        refcount_table_offset=refcount_table,
        refcount_table_clusters=1,
        nb_snapshots=0,
        snapshots_offset=0,
    )
    more = HEADER_MORE.build(compression_type=0, padding=bytes(7))
    v3 = HEADER_V3.build(
        incompatible_features=qcow2.INCOMPATIBLE_DATA_FILE,
        compatible_features=0,
        autoclear_features=qcow2.AUTOCLEAR_RAW_EXTERNAL_DATA,
        refcount_order=_REFCOUNT_BITS.bit_length() - 1,
        header_length=qcow2.MORE_OFFSET + len(more),
    )
    return v2 + v3 + more + build_chain([(qcow2.EXTENSION_DATA_FILE, data_file)])
