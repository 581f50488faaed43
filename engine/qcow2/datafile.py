"""The external data file of a qcow2 image: which file that is, and whether it still fits the image."""

from __future__ import annotations

import os

from dirtmap.engine.qcow2.layout import Layout
from dirtmap.engine.system.file import open_file
from dirtmap.fmt import qcow2
from dirtmap.fmt.errors import StorageError


def data_path(layout: Layout) -> str | None:
    """The path of the file that has an image's guest data; None where that is the image itself.

    Args:
        layout: of the image; its header is enough.

    Raises:
        StorageError: the image does not say which file that is.
    """
    if not layout.header.incompatible & qcow2.INCOMPATIBLE_DATA_FILE:
        return None
    names = [e.data for e in layout.chain.extensions if e.type == qcow2.EXTENSION_DATA_FILE] if layout.chain else []
    if len(names) != 1:
        raise StorageError(layout.path, "does not say which its external data file is")
    # QEMU takes the name for a C string, and a relative one as relative to the folder that it runs in. That is the
    # image's, as far as we can know.
    name = os.fsdecode(names[0].partition(b"\0")[0]).removeprefix("file:")
    return os.path.join(os.path.dirname(layout.path), name)


def misfit(layout: Layout) -> str | None:
    """That the raw external data of an image with bitmaps are of another size than its disk, or not there; or None.

    Whoever gave the file another size did not write to it through the image, so the bitmaps have missed that. Writes of
    others that leave its size alone cannot be told from those through the image, which does not change with them.
    """
    if not (layout.slots and layout.header.autoclear & qcow2.AUTOCLEAR_RAW_EXTERNAL_DATA):
        return None
    try:
        path = data_path(layout)
        if path is None:
            return None
        with open_file(path) as file:
            size = file.size()
    except StorageError as error:
        return f"its external data cannot be looked at ({error.what})"
    if size == layout.header.size:
        return None
    what = f"its external data have {size} bytes and its disk {layout.header.size}"
    return f"{what}: they were resized by themselves, and bitmaps may have missed writes"
