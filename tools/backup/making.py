"""New images of backups: as they are, or compressed by QEMU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dirtmap.fmt.geometry import align_up
from dirtmap.fmt.qcow2 import SECTOR
from dirtmap.tools.backup import files, images
from dirtmap.tools.backup.imaging import NewImage
from dirtmap.tools.backup.opened import Images
from dirtmap.tools.qsd import nodes

if TYPE_CHECKING:
    from dirtmap.tools.backup.copying import Zeroing


@contextlib.contextmanager
def new_image(
    path: str, size: int, *, cluster: int, backing: str | None = None, compression: str | None = None
) -> Iterator[Zeroing]:
    """A new qcow2 image, that is written from its beginning to its end in the block, and durable after it.

    Args:
        path: of the file, which is made.
        size: of the disk, bytes; it is rounded up to 512.
        cluster: bytes, a power of two, 512 at least.
        backing: the name of the image that it is on, in its own folder; None for none.
        compression: of its clusters: ``zstd``; None for none.

    Raises:
        UnsupportedError: the disk is too large for clusters of that size.
        StorageError: it cannot be made, or written; or QEMU has no such compression.
    """
    if compression is None:
        with NewImage(path, size, cluster=cluster, backing=backing) as image:
            yield image
        return
    whole = align_up(size, cluster)  # QEMU compresses clusters of a disk that has nothing but whole ones
    with Images() as opened:
        images.create(path, whole, cluster_size=cluster, backing=backing, compression=compression)
        opened.open("image", nodes.compressed(nodes.image(path, "qcow2", writable=True, alone=True)))
        yield opened.connect("image")
    if whole != align_up(size, SECTOR):
        images.shrink(path, size)
    files.sync(path)
