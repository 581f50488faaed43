"""`file_system`: the file system that a file is on, and whether other machines see the locks on it."""

from __future__ import annotations

import contextlib
import os

MOUNTINFO = "/proc/self/mountinfo"
_NFS = ("nolock", "local_lock=all", "local_lock=posix")
# Mount options with which a lock is granted although no other machine sees it.
_PRIVATE = {"nfs": _NFS, "nfs4": _NFS, "cifs": ("nobrl",), "smb3": ("nobrl",), "lustre": ("localflock",)}


def file_system(device: int) -> tuple[str, str | None]:
    """The type of a file system, and the mount option that hides its locks from other machines, or None.

    Args:
        device: number of the file system, as in ``st_dev``.

    Source: proc(5), /proc/PID/mountinfo; nfs(5) and mount.cifs(8).
    """
    number = f"{os.major(device)}:{os.minor(device)}".encode()
    if os.major(device):
        return "of a disk", None  # network file systems have no device, so a major number of 0
    with contextlib.suppress(OSError), open(MOUNTINFO, "rb") as lines:
        for line in lines:
            mount, _, rest = line.partition(b" - ")
            fields, tail = mount.split(), rest.split()
            if len(fields) > 2 and fields[2] == number and tail:
                kind = tail[0].decode(errors="replace")
                options = {*fields[5].split(b","), *tail[-1].split(b",")} if len(fields) > 5 else set()
                private = next((option for option in _PRIVATE.get(kind, ()) if option.encode() in options), None)
                return kind, private
    return "of unknown type", None
