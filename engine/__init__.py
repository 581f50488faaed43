"""What happens: containers, bitmaps, changes. This is what tools embed.

    import dirtmap.engine as dm

    with dm.open("disk.qcow2") as image:
        image["monday"].count                             # dirty bytes; a frozen value
        with image.transaction() as bitmaps:              # all of it lands, or none
            bitmaps["week"] |= bitmaps["monday"]
            del bitmaps["monday"]

There are only a few types to know:

    Host          the images, stores and names of a machine; a program makes one, and `open` and its like make their own
    Handle        an opened image or device: a read-only mapping of names to bitmaps, that can be tracked and held
    Bitmap        a value: which granules of a disk are dirty
    Transaction   a mutable mapping of names to bitmaps, committed at the end of its block; see also `changes`
    Tracker       marks writes while they are made
    Error         the root of everything that is raised on purpose

Everything here is imported on first use, so that `import dirtmap.engine` costs next to nothing. What happens behind the
scenes, a recovery, a doubt, a repair, is logged by `logging` under ``dirtmap.engine``, which is silent by default.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from dirtmap.fmt.errors import (
    ArgumentError,
    BitmapError,
    BitmapNotFoundError,
    Error,
    FormatError,
    GoneError,
    LockedError,
    MovedError,
    RangeError,
    StorageError,
    SyncError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from dirtmap.engine.host.calls import check, describe, dump, open, recover, this_host, transaction
    from dirtmap.engine.host.handle import Handle
    from dirtmap.engine.host.host import Host, Target
    from dirtmap.engine.host.instant import Instant
    from dirtmap.engine.host.kind import Address, Kind
    from dirtmap.engine.host.lookup import BitmapAddress, Lookup
    from dirtmap.engine.host.maintenance import Verification
    from dirtmap.engine.host.maintenance import rebuild as rebuild_index
    from dirtmap.engine.host.maintenance import stats as index_stats
    from dirtmap.engine.host.maintenance import verify as verify_index
    from dirtmap.engine.host.resolver import BitmapMatch
    from dirtmap.engine.host.scan import Summary, scan
    from dirtmap.engine.model import changes
    from dirtmap.engine.model.bitmap import Bitmap
    from dirtmap.engine.model.infos import BitmapInfo, Disk, ImageInfo, Recovery, Status
    from dirtmap.engine.model.namespace import Namespace
    from dirtmap.engine.model.report import CheckReport, Finding
    from dirtmap.engine.model.transaction import Transaction
    from dirtmap.engine.namespaces.compact import Compaction
    from dirtmap.engine.namespaces.devices import Device
    from dirtmap.engine.namespaces.nodes import Node
    from dirtmap.engine.storefile.file import create as create_store
    from dirtmap.engine.system.clone import Clone
    from dirtmap.engine.tracking.gate import gate
    from dirtmap.engine.tracking.include import get_include
    from dirtmap.engine.tracking.kernel import Ticket, Write
    from dirtmap.engine.tracking.marker import Marker
    from dirtmap.engine.tracking.tracker import Tracker

    __version__: str

# Where each name is: a module of this package, and its name there; None for the module itself.
_HOMES: dict[str, tuple[str, str | None]] = {
    "Address": ("host.kind", "Address"),
    "Bitmap": ("model.bitmap", "Bitmap"),
    "BitmapAddress": ("host.lookup", "BitmapAddress"),
    "BitmapInfo": ("model.infos", "BitmapInfo"),
    "BitmapMatch": ("host.resolver", "BitmapMatch"),
    "CheckReport": ("model.report", "CheckReport"),
    "Clone": ("system.clone", "Clone"),
    "Compaction": ("namespaces.compact", "Compaction"),
    "Device": ("namespaces.devices", "Device"),
    "Disk": ("model.infos", "Disk"),
    "Finding": ("model.report", "Finding"),
    "Handle": ("host.handle", "Handle"),
    "Host": ("host.host", "Host"),
    "ImageInfo": ("model.infos", "ImageInfo"),
    "Instant": ("host.instant", "Instant"),
    "Kind": ("host.kind", "Kind"),
    "Lookup": ("host.lookup", "Lookup"),
    "Marker": ("tracking.marker", "Marker"),
    "Namespace": ("model.namespace", "Namespace"),
    "Node": ("namespaces.nodes", "Node"),
    "Recovery": ("model.infos", "Recovery"),
    "Status": ("model.infos", "Status"),
    "Summary": ("host.scan", "Summary"),
    "Target": ("host.host", "Target"),
    "Ticket": ("tracking.kernel", "Ticket"),
    "Tracker": ("tracking.tracker", "Tracker"),
    "Transaction": ("model.transaction", "Transaction"),
    "Verification": ("host.maintenance", "Verification"),
    "Write": ("tracking.kernel", "Write"),
    "changes": ("model.changes", None),
    "check": ("host.calls", "check"),
    "create_store": ("storefile.file", "create"),
    "describe": ("host.calls", "describe"),
    "dump": ("host.calls", "dump"),
    "gate": ("tracking.gate", "gate"),
    "get_include": ("tracking.include", "get_include"),
    "index_stats": ("host.maintenance", "stats"),
    "open": ("host.calls", "open"),
    "rebuild_index": ("host.maintenance", "rebuild"),
    "recover": ("host.calls", "recover"),
    "scan": ("host.scan", "scan"),
    "this_host": ("host.calls", "this_host"),
    "transaction": ("host.calls", "transaction"),
    "verify_index": ("host.maintenance", "verify"),
}

__all__ = [
    "Address",
    "ArgumentError",
    "Bitmap",
    "BitmapAddress",
    "BitmapError",
    "BitmapInfo",
    "BitmapMatch",
    "BitmapNotFoundError",
    "CheckReport",
    "Clone",
    "Compaction",
    "Device",
    "Disk",
    "Error",
    "Finding",
    "FormatError",
    "GoneError",
    "Handle",
    "Host",
    "ImageInfo",
    "Instant",
    "Kind",
    "LockedError",
    "Lookup",
    "Marker",
    "MovedError",
    "Namespace",
    "Node",
    "RangeError",
    "Recovery",
    "Status",
    "StorageError",
    "Summary",
    "SyncError",
    "Target",
    "Ticket",
    "Tracker",
    "Transaction",
    "UnsupportedError",
    "Verification",
    "Write",
    "changes",
    "check",
    "create_store",
    "describe",
    "dump",
    "gate",
    "get_include",
    "index_stats",
    "open",
    "rebuild_index",
    "recover",
    "scan",
    "this_host",
    "transaction",
    "verify_index",
]


def _after_fork_in_child() -> None:
    """Has the model renew its lock, if it is loaded: it may not import what tells of a fork."""
    if (content := sys.modules.get(f"{__name__}.model.content")) is not None:
        content.after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)


def __dir__() -> list[str]:
    """All names, also those not imported yet: what `dir`, `help` and pydoc go by."""
    return sorted({*globals(), *_HOMES, "__version__"})


def __getattr__(name: str) -> Any:
    if name == "__version__":  # read when it is asked for: that takes longer than all else here
        from importlib.metadata import version

        value: Any = version("dirtmap")
    elif name in _HOMES:
        module, there = _HOMES[name]
        value = importlib.import_module(f"{__name__}.{module}")
        value = value if there is None else getattr(value, there)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value
