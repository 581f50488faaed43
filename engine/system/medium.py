"""`medium_of`: which disk or medium is behind the number of a block device, as far as the kernel tells.

    logical volume      dm/uuid
    RAID                md/uuid
    SCSI, SATA, NVMe    device/wwid, wwid
    virtio, MMC         serial, device/cid
    any other           the UUID of the boot, and the sequence number of the disk in it. The kernel raises that number
                        with every disk that it attaches, and with every medium that it finds in a drive.

Source: Linux, Documentation/ABI/stable/sysfs-block (``diskseq`` and ``serial`` are there since Linux 5.14 and 4.x).
"""

from __future__ import annotations

import os

from dirtmap.engine.system.process import boot_id
from dirtmap.fmt.digest import digest

_SYSFS = "/sys/dev/block"
_LASTING = ("dm/uuid", "md/uuid", "device/wwid", "wwid", "serial", "device/cid")


def medium_of(number: int) -> int:
    """A number of 64 bits, which is another one if another disk or medium is there, or may be there.

    A drive with removable media, and a device without a lasting name such as a loop device, have another number after
    every boot. The number of a partition follows from that of its disk, its own index, and its start.

    Args:
        number: of the device, as in ``st_rdev``.
    """
    folder = os.path.realpath(os.path.join(_SYSFS, f"{os.major(number)}:{os.minor(number)}"))
    parts = []
    if partition := _read(folder, "partition"):
        parts = [partition, _read(folder, "start")]
        folder = os.path.dirname(folder)
    lasting = [(name.encode(), value) for name in _LASTING if (value := _read(folder, name))]
    if lasting and _read(folder, "removable") != b"1":
        parts += lasting[0]
    else:
        parts += [boot_id(), _read(folder, "diskseq")]
    return int.from_bytes(digest(b"".join(len(part).to_bytes(2) + part for part in parts), 8))


def _read(folder: str, name: str) -> bytes:
    """The content of a file; empty if there is none."""
    try:
        with open(os.path.join(folder, name), "rb") as file:
            return file.read(4096).strip()
    except OSError:
        return b""
