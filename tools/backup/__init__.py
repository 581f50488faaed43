"""Incremental backups of disks, and what is done with them, for programs that embed it.

    import dirtmap.engine as dm
    from dirtmap.tools import backup

    with dm.Host() as host:
        for made in backup.create(host, ["disk.qcow2", "data"], "/backups/web"):
            print(made.disk, made.number, made.kind, made.why, made.copied)

The rooms, each of which knows those below it and nothing of the engine but its face:

    pruning | verifying | rebuilding |
    restoring | mounting                          acts
    creating | comparing                          the act that they know | a disk and a backup, byte by byte
    chain | freezing | making                     a disk as it was at a backup | one that is written | new images
    copying | state                               data and digests on their way | what a disk remembers of its backups
    repository                                    the folder of backups, its lock, unfinished acts
    opened | imaging | direct | document          images opened by QEMU | without it, new and old | the JSON document
    nbd | images | raw | files                    the protocol | qemu-img | raw disks | files of ours
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dirtmap.tools.backup.comparing import Sample
    from dirtmap.tools.backup.creating import create
    from dirtmap.tools.backup.document import Backup, Piece
    from dirtmap.tools.backup.mounting import Mounted, mount
    from dirtmap.tools.backup.pruning import prune
    from dirtmap.tools.backup.rebuilding import Rebuilt, rebuild
    from dirtmap.tools.backup.repository import Repository
    from dirtmap.tools.backup.restoring import restore
    from dirtmap.tools.backup.verifying import verify, verify_disk
    from dirtmap.tools.listening.listener import Listener

# Where each name is, from here. They are imported on first use: the help of commands needs none of them.
_HOMES = {
    "Backup": ".document",
    "Listener": "..listening.listener",
    "Mounted": ".mounting",
    "Piece": ".document",
    "Rebuilt": ".rebuilding",
    "Repository": ".repository",
    "Sample": ".comparing",
    "create": ".creating",
    "mount": ".mounting",
    "prune": ".pruning",
    "rebuild": ".rebuilding",
    "restore": ".restoring",
    "verify": ".verifying",
    "verify_disk": ".verifying",
}

__all__ = [
    "Backup",
    "Listener",
    "Mounted",
    "Piece",
    "Rebuilt",
    "Repository",
    "Sample",
    "create",
    "mount",
    "prune",
    "rebuild",
    "restore",
    "verify",
    "verify_disk",
]


def __dir__() -> list[str]:
    """All names, also those not imported yet."""
    return sorted({*globals(), *_HOMES})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value
