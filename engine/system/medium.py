"""`medium_of`: what is behind the number of a block device, as far as the kernel tells.

                          what lasts                       else
    logical volume        dm/uuid                          which boot it is, and the disk's sequence number
    RAID                  md/uuid                          in it, which the kernel counts up with every disk that it
    SCSI, SATA, NVMe      device/wwid, wwid                attaches and every medium that it finds in a drive
    virtio, MMC           serial, device/cid

Source: Linux, Documentation/ABI/stable/sysfs-block (``diskseq`` and ``serial`` are there since Linux 5.14 and 4.x).
"""

from __future__ import annotations

import hashlib
import os

from dirtmap.engine.system.process import boot_id

_SYSFS = "/sys/dev/block"
_LASTING = ("dm/uuid", "md/uuid", "device/wwid", "wwid", "serial", "device/cid")


def medium_of(number: int) -> int:
    """A number of 64 bits that is another one where another disk or medium is known, or has to be feared, to be there.

    Of a drive whose medium can be taken out, and of what has no name that lasts, as a loop device, it is another one
    after every boot. A partition is that of its disk with its number and its start.

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
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(2) + part)
    return int.from_bytes(digest.digest())


def _read(folder: str, name: str) -> bytes:
    """A file's content; empty where there is none."""
    try:
        with open(os.path.join(folder, name), "rb") as file:
            return file.read(4096).strip()
    except OSError:
        return b""
