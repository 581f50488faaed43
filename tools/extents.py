"""Reads extents that other programs print: the ranges of a disk to mark.

Each format has a module in `dirtmap.tools.foreign`. Numbers are bytes unless the format says otherwise. A document that
is not clearly of one of the formats is refused, and the error names the place. So is one that may be cut off: an empty
one, as a failed program leaves it, an array or document without its end, or a last line without its newline.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dirtmap.fmt.errors import FormatError
from dirtmap.tools.foreign.marks import Marks
from dirtmap.tools.inputs import Input

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# The names that users give, and their modules in dirtmap.tools.foreign.
FORMATS = {
    "nbdinfo": "nbdinfo",
    "qemu-img": "qemu_img",
    "rbd": "rbd",
    "lines": "lines",
    "thin-delta": "thin_delta",
    "era": "era",
    "vmware": "vmware",
    "csi": "csi",
    "xapi": "xapi",
}

# Keys of JSON objects that only one of the formats has.
_KEYS = {
    **dict.fromkeys(("type", "description"), "nbdinfo"),
    **dict.fromkeys(("data", "zero", "present", "depth"), "qemu-img"),
    "exists": "rbd",
    **dict.fromkeys(("startOffset", "changedArea"), "vmware"),
    **dict.fromkeys(("block_metadata", "block_metadata_type", "volume_capacity_bytes"), "csi"),
    **dict.fromkeys(("blockMetadata", "blockMetadataType", "volumeCapacityBytes"), "csi"),
}
_KEY = re.compile(rb'"([A-Za-z_]{1,64})"\s*:')
_ROOTS = {b"superblock": "thin-delta", b"blocks": "era"}
_ROOT = re.compile(rb"<([A-Za-z_][A-Za-z0-9_.-]*)")
_BASE64 = re.compile(rb"[A-Za-z0-9+/]{4,}={0,2}\s*")


def read_extents(
    source: Input,
    size: int,
    put: Callable[[NDArray[np.int64], NDArray[np.int64]], Any],
    name: str | None = None,
    block_size: int | None = None,
) -> None:
    """Reads a whole document.

    Args:
        source: the document.
        size: of the disk, in bytes.
        put: takes the offsets and lengths (bytes, int64, 1-D) of ranges to mark, all of them inside the disk. It is
            called any number of times, possibly before an error is found further on.
        name: of the format, one of `FORMATS`; None if the content must tell.
        block_size: in bytes, for a format that does not say its own.

    Raises:
        FormatError: not clearly of the format, not complete, or longer than is read for such a disk.
        RangeError: a range is not inside the disk.
        StorageError: the document cannot be read.
    """
    marks = Marks(source.where, size, put)
    head = source.head()
    if not head.strip():
        if len(head) > 1 << 12:
            raise FormatError(source.where, f"begins with more than {1 << 12} blanks")
        raise FormatError(source.where, "empty; a program that finds no extents says so with an empty JSON array, []")
    name = name or _recognise(head, source.where)
    source.limit(marks.most_bytes)
    if name is None:
        from dirtmap.tools.foreign.jsonstream import entries

        list(entries(source, frozenset(), marks))
        return
    extra = {}
    if name == "era":
        if block_size is None:
            raise FormatError(source.where, "era_invalidate does not print the size of a block; --block-size tells it")
        extra["block_size"] = block_size
    elif block_size is not None:
        raise FormatError(source.where, f"--block-size goes with the format era only, not with {name}")
    importlib.import_module(f"dirtmap.tools.foreign.{FORMATS[name]}").read(source, marks, **extra)
    marks.flush()


def _recognise(head: bytes, where: str) -> str | None:
    """The only format that a document can be of; None for an empty JSON array, which is empty in all of them."""
    text = head.lstrip()
    if text[:1] == b"<":
        root = _ROOT.search(text)
        if not root or root[1] not in _ROOTS:
            raise FormatError(where, "XML, but neither of thin_delta nor of era_invalidate")
        return _ROOTS[root[1]]
    if text[:1] in (b"[", b"{"):
        if text[:1] == b"[" and text[1:].lstrip()[:1] == b"]":
            return None
        # The keys of the first object, and of the first object inside it.
        kinds = {_KEYS.get(key.decode()) for key in _KEY.findall(text.partition(b"}")[0])} - {None}
        if len(kinds) != 1:
            raise FormatError(f"{where}: entry 1", f"not clearly an extent as of {_known()}; see --from-format")
        return kinds.pop()
    if _BASE64.fullmatch(head):
        raise FormatError(where, "perhaps base64; a bitmap of VDI.list_changed_blocks needs --from-format xapi")
    return "lines"


def _known() -> str:
    names = [name for name in FORMATS if name in _KEYS.values()]
    return f"{', '.join(names[:-1])} or {names[-1]}"
