r"""`require_raw`: refuses a file of another format that a user takes for a raw disk. The magic numbers tell.

A write to such a file as to a raw disk would destroy the metadata of its format. So a file is taken for a raw disk only
if no format is recognized, or if the user insists, because a guest can have written a magic number itself.

    byte 0          QFI\xfb  KDMV  COWD  conectix  vhdxfile  QED  WithoutFreeSpace  Bochs  cloop's script  text of VMDK
    byte 16         0xbeefc0de, in the first meta page of an LMDB database
    byte 64         0xbeda107f, VDI
    last 512 bytes  conectix, the footer of a VHD of fixed size; koly, the trailer of a DMG

LUKS is not among them: below its encryption an encrypted disk is a raw disk.
Sources: the functions ``*_probe`` of QEMU's block/qcow.c, qcow2.c, vmdk.c, vpc.c, vhdx.c, vdi.c, qed.c, parallels.c,
bochs.c and cloop.c; ``vpc_open`` in block/vpc.c and ``dmg_find_koly_offset`` in block/dmg.c for what is at the end.
"""

from __future__ import annotations

from typing import Final

from dirtmap.engine.system.file import File, open_file
from dirtmap.engine.system.probe import is_store
from dirtmap.fmt import live, lmdb, qcow2
from dirtmap.fmt.errors import FormatError

_SECTOR: Final = 512
_START: Final = 2048  # bytes that QEMU gives its probes
_VHD: Final = b"conectix"
_CLOOP: Final = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"
# (offset, bytes there, what it is). Numbers are little-endian, except qcow's version, as in the sources.
_MAGICS: Final = (
    (0, qcow2.MAGIC + bytes((0, 0, 0, 1)), "a qcow image of version 1"),
    (0, qcow2.MAGIC, "a qcow2 image"),
    (0, b"KDMV", "a VMDK image"),
    (0, b"COWD", "a VMDK image"),
    (0, _VHD, "a VHD (VPC) image"),
    (0, b"vhdxfile", "a VHDX image"),
    (0, b"QED\0", "a QED image"),
    (0, b"WithoutFreeSpace", "a Parallels image"),
    (0, b"WithouFreSpacExt", "a Parallels image"),
    (0, b"Bochs Virtual HD Image", "a Bochs image"),
    (0, _CLOOP, "a cloop image"),
    (0, live.CONTROL_MAGIC, "a tracker's live file"),
    (0, live.ARENA_MAGIC, "a tracker's live file"),
    (0, live.MARKERS_MAGIC, "a tracker's live file"),
    (0, live.LOG_MAGIC, "a tracker's intent log"),
    (16, lmdb.MAGIC.to_bytes(4, "little") + lmdb.VERSION.to_bytes(4, "little"), "an LMDB database, as an index has"),
    (64, (0xBEDA107F).to_bytes(4, "little"), "a VDI image"),
)


def foreign_format(file: File) -> str | None:
    """What a file is if it is no raw disk, such as ``a VMDK image``; None if no format is recognized.

    Raises:
        StorageError: it cannot be read.
    """
    start = file.read(0, _START)
    for offset, magic, what in _MAGICS:
        if start[offset : offset + len(magic)] == magic:
            return what
    if _is_vmdk_text(start):
        return "a VMDK descriptor"
    if is_store(file):
        return "a dirtmap store"
    return _at_the_end(file)


def _is_vmdk_text(start: bytes) -> bool:
    """True if the first line that is neither empty nor a comment is a version that QEMU knows."""
    for line in start.splitlines():
        if not line.startswith(b"#") and line.strip(b" "):
            return line in (b"version=1", b"version=2", b"version=3")
    return False


def _at_the_end(file: File) -> str | None:
    """Like `foreign_format`, for the formats whose magic number is at the end of the file."""
    size = file.size()
    # Old versions of Virtual PC wrote a footer of 511 bytes; a DMG need not end at the end of a sector.
    first = max(0, size - 2 * _SECTOR + 1)
    end = file.read(first, 2 * _SECTOR - 1)
    if any(end[-length:].startswith(_VHD) for length in (_SECTOR, _SECTOR - 1)):
        return "a VHD (VPC) image"
    if b"koly\0\0\0\4\0\0\2\0" in end:  # the magic, version 4, 512 bytes of trailer
        return "a DMG image"
    return None


def require_raw(path: str) -> None:
    """Refuses a file that is of another format than raw.

    Raises:
        FormatError: names the format.
        StorageError: it cannot be opened or read.
    """
    with open_file(path) as file:
        what = foreign_format(file)
    if what is not None:
        how = "what is written to it as raw would destroy it; --raw takes it for a raw disk all the same"
        raise FormatError(path, f"{what}, and not a raw disk: {how}")
