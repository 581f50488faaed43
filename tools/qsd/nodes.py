"""What ``blockdev-add`` takes of an image."""

from __future__ import annotations

import os
import stat
from typing import Any

from dirtmap.fmt.errors import StorageError


def image(
    path: str, form: str, *, writable: bool = False, alone: bool = False, force_share: bool = False
) -> dict[str, Any]:
    """An image, as a node.

    What is written is synced by ourselves, once, at the end: QEMU need not.

    Args:
        path: of the image.
        form: ``raw`` or ``qcow2``.
        writable: it is to be written.
        alone: without what it is on: what it does not have is zeros.
        force_share: it is read although somebody writes to it.

    Raises:
        StorageError: it is not there.
    """
    try:
        is_block = stat.S_ISBLK(os.stat(path).st_mode)
    except OSError as error:
        raise StorageError(path, error.strerror or str(error), error.errno) from error
    file: dict[str, Any] = {"driver": "host_device" if is_block else "file", "filename": os.path.abspath(path)}
    made: dict[str, Any] = {"driver": form, "read-only": not writable, "file": file}
    if writable:
        for layer in (made, file):
            layer |= {"cache": {"direct": False, "no-flush": True}, "discard": "unmap"}
    if alone:
        made["backing"] = None
    if force_share:
        made["force-share"] = True
    return made


def compressed(image: dict[str, Any]) -> dict[str, Any]:
    """The same image, with whatever is written to it being compressed, cluster by cluster."""
    return {"driver": "compress", "read-only": image["read-only"], "file": image}
