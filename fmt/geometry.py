"""Size, granularity and cluster arithmetic, with every limit and where it comes from.

Units: *bytes* unless a name says otherwise. A *granule* is ``granularity`` bytes of the disk and one
bit of a bitmap; a *cluster* is the unit of allocation inside a container.

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

# Disk sizes are signed 64-bit throughout QEMU (and in our int64 extents).
MAX_DISK_SIZE = 2**63 - 1


def ceil_div(value: int, unit: int) -> int:
    """``value / unit`` rounded up; both non-negative integers."""
    return -(-value // unit)


def align_up(value: int, unit: int) -> int:
    """The smallest multiple of ``unit`` that is not below ``value``."""
    return ceil_div(value, unit) * unit


def is_power_of_two(value: int) -> bool:
    """True for 1, 2, 4, 8, ..."""
    return value > 0 and not value & (value - 1)


def is_granularity(value: int) -> bool:
    """True where ``value`` (bytes) is a power of two that QEMU accepts: 512 bytes to 2 GiB."""
    return is_power_of_two(value) and MIN_GRANULARITY_BITS <= value.bit_length() - 1 <= MAX_GRANULARITY_BITS


def granules(size: int, granularity: int) -> int:
    """How many bits a bitmap over ``size`` bytes has: the last one may cover less than a granule."""
    return ceil_div(size, granularity)


def packed_bytes(size: int, granularity: int) -> int:
    """How many bytes those bits take, packed."""
    return ceil_div(granules(size, granularity), 8)


def table_entries(size: int, granularity: int, cluster_size: int) -> int:
    """How many clusters (so, table entries) those bytes take.

    Source: docs/interop/qcow2.txt, "Bitmap table": one entry for each cluster of bitmap data.
    """
    return ceil_div(packed_bytes(size, granularity), cluster_size)


def default_granularity(cluster_size: int) -> int:
    """The granularity a bitmap gets when none is asked for: the cluster size within 4 KiB to 64 KiB.

    Source: QEMU, block/dirty-bitmap.c, bdrv_get_default_bitmap_granularity.
    """
    return max(MIN_DEFAULT_GRANULARITY, min(cluster_size, MAX_DEFAULT_GRANULARITY))
