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
    ArgumentError,
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
    from dirtmap.engine.host.lookup import Lookup
    from dirtmap.engine.host.opening import check, describe, dump, open, recover, this_host, transaction
    from dirtmap.engine.host.registry import Host
    from dirtmap.engine.host.scan import scan
    from dirtmap.engine.model.bitmap import Bitmap
    from dirtmap.engine.model.namespace import BitmapInfo, ImageInfo, Namespace, Recovery, Transaction
    from dirtmap.engine.model.report import CheckReport, Finding
    from dirtmap.engine.tracking.tracker import Tracker

_HOMES = {
    "Bitmap": "model.bitmap",
    "BitmapInfo": "model.namespace",
    "CheckReport": "model.report",
    "Finding": "model.report",
    "Host": "host.registry",
    "ImageInfo": "model.namespace",
    "Lookup": "host.lookup",
    "Namespace": "model.namespace",
    "Recovery": "model.namespace",
    "Tracker": "tracking.tracker",
    "Transaction": "model.namespace",
    "check": "host.opening",
    "describe": "host.opening",
    "dump": "host.opening",
    "open": "host.opening",
    "recover": "host.opening",
    "scan": "host.scan",
    "this_host": "host.opening",
    "transaction": "host.opening",
}

__all__ = [
    "ArgumentError",
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
