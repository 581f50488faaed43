"""Arithmetic on sizes, granularities and clusters, with the limits of each and the source of every limit.

Sizes are in *bytes* unless a name says otherwise. A *granule* is ``granularity`` bytes of the disk and has one bit in a
bitmap. A *cluster* is the unit of allocation in a container.

    disk       |----granule----|----granule----|----granule----|--granule (partial)|
    bitmap          bit 0           bit 1           bit 2           bit 3
    packed     byte 0 = bits 0..7, least significant first; byte 1 = bits 8..15; ...
    stored     |-- cluster of cluster_size * 8 bits --|-- cluster --| ...
"""

from __future__ import annotations

# QEMU: block/qcow2.h, MIN_CLUSTER_BITS and MAX_CLUSTER_BITS.
MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21

# QEMU: block/qcow2-bitmap.c, BME_MIN_GRANULARITY_BITS and BME_MAX_GRANULARITY_BITS. The format's own
# definition (docs/interop/qcow2.txt, "Bitmap directory") says 0..63; QEMU refuses what is outside 9..31.
MIN_GRANULARITY_BITS = 9
MAX_GRANULARITY_BITS = 31

# QEMU: block/qcow2-bitmap.c, see default_granularity below.
MIN_DEFAULT_GRANULARITY = 4096
MAX_DEFAULT_GRANULARITY = 65536

# Disk sizes are signed 64-bit numbers throughout QEMU, and in our int64 extents.
MAX_DISK_SIZE = 2**63 - 1


def ceil_div(value: int, unit: int) -> int:
    """Returns ``value / unit`` rounded up. Both are non-negative integers."""
    return -(-value // unit)


def align_up(value: int, unit: int) -> int:
    """Returns the smallest multiple of ``unit`` that is not below ``value``."""
    return ceil_div(value, unit) * unit


def is_power_of_two(value: int) -> bool:
    """Returns True for 1, 2, 4, 8, ..."""
    return value > 0 and not value & (value - 1)


def is_granularity(value: int) -> bool:
    """Returns True if ``value`` (bytes) is a granularity that QEMU accepts: a power of two from 512 bytes to 2 GiB."""
    return is_power_of_two(value) and MIN_GRANULARITY_BITS <= value.bit_length() - 1 <= MAX_GRANULARITY_BITS


def granules(size: int, granularity: int) -> int:
    """Returns how many bits a bitmap of a disk of ``size`` bytes has. The last bit may cover less than a granule."""
    return ceil_div(size, granularity)


def packed_bytes(size: int, granularity: int) -> int:
    """Returns how many bytes these bits take when packed."""
    return ceil_div(granules(size, granularity), 8)


def table_entries(size: int, granularity: int, cluster_size: int) -> int:
    """Returns how many clusters the packed bits take, which is the number of entries in the bitmap table.

    Source: docs/interop/qcow2.txt, "Bitmap table": one entry for each cluster of bitmap data.
    """
    return ceil_div(packed_bytes(size, granularity), cluster_size)


def default_granularity(cluster_size: int) -> int:
    """Returns the granularity of a bitmap for which none was asked: the cluster size, but from 4 KiB to 64 KiB.

    Source: QEMU, block/dirty-bitmap.c, bdrv_get_default_bitmap_granularity.
    """
    return max(MIN_DEFAULT_GRANULARITY, min(cluster_size, MAX_DEFAULT_GRANULARITY))
