"""What happens: containers, bitmaps, changes. This is what tools embed.

    import dirtmap.engine as dm

    with dm.open("disk.qcow2") as image:
        image["monday"].count                             # dirty bytes; a frozen value
        with image.transaction() as bitmaps:              # all of it lands, or none
            bitmaps["week"] |= bitmaps["monday"]
            del bitmaps["monday"]

Everything here is imported on first use, so that `import dirtmap.engine` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dirtmap.fmt.errors import (
    BitmapError,
    BitmapNotFoundError,
    Error,
    FormatError,
    LockedError,
    RangeError,
    StorageError,
    SyncError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from dirtmap.engine.bitmap import Bitmap
    from dirtmap.engine.containers import check, describe, dump, open, recover, this_host, transaction
    from dirtmap.engine.host import Host
    from dirtmap.engine.lookup import Lookup
    from dirtmap.engine.namespace import BitmapInfo, ImageInfo, Namespace, Recovery, Transaction
    from dirtmap.engine.report import CheckReport, Finding
    from dirtmap.engine.scanning import scan
    from dirtmap.engine.tracking.tracker import Tracker

_HOMES = {
    "Bitmap": "bitmap",
    "BitmapInfo": "namespace",
    "CheckReport": "report",
    "Finding": "report",
    "Host": "host",
    "ImageInfo": "namespace",
    "Lookup": "lookup",
    "Namespace": "namespace",
    "Recovery": "namespace",
    "Tracker": "tracking.tracker",
    "Transaction": "namespace",
    "check": "containers",
    "describe": "containers",
    "dump": "containers",
    "open": "containers",
    "recover": "containers",
    "scan": "scanning",
    "this_host": "containers",
    "transaction": "containers",
}

__all__ = [
    "Bitmap",
    "BitmapError",
    "BitmapInfo",
    "BitmapNotFoundError",
    "CheckReport",
    "Error",
    "Finding",
    "FormatError",
    "Host",
    "ImageInfo",
    "LockedError",
    "Lookup",
    "Namespace",
    "RangeError",
    "Recovery",
    "StorageError",
    "SyncError",
    "Tracker",
    "Transaction",
    "UnsupportedError",
    "check",
    "describe",
    "dump",
    "open",
    "recover",
    "scan",
    "this_host",
    "transaction",
]


def __dir__() -> list[str]:
    """All names, also those not imported yet: what `dir`, `help` and pydoc go by."""
    return sorted({*globals(), *_HOMES})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
