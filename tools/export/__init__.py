r"""`dirtmap export`: serves disks and their bitmaps read-only over NBD, for clients that know nothing of dirtmap.

    with dm.Host() as host, export(host, ["drive0"], Listener(unix="/run/drive0.sock")) as served:
        print(served.uris)
        served.wait()

The server is QEMU's qemu-storage-daemon, which knows bitmaps from qcow2 images only. So they are written into one that
has nothing else, a *carrier*, and are served beside the disk itself:

    store, qcow2 image --held, read--> carrier.qcow2 ----\
                                                          qemu-storage-daemon --NBD--> nbdinfo, libnbd, qemu-img
    raw file, block device, qcow2 image, frozen copy ----/
"""

from __future__ import annotations

from dirtmap.tools.export.serving import Export, Serving, export
from dirtmap.tools.listening.listener import Listener

__all__ = ["Export", "Listener", "Serving", "export"]
