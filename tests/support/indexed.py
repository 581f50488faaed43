"""A host with an index of all that it has, which can be brought back as it was, and what it answers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from dirtmap.engine.host.host import Host
from dirtmap.engine.host.maintenance import verify
from dirtmap.engine.index import database
from support.child import in_child

MIB = 1 << 20
NODES = 24
PAGE = 4096

Answers = dict[str, Any]


def tiny(path: Path) -> str:
    path.touch()
    os.truncate(path, MIB)
    return str(path)


def restore(made: Host) -> None:
    if known := database._connected.pop(made._parts.stores.index.path, None):
        known.close()
    for path in Path(made.store).parent.glob("index*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    shutil.copytree(Path(made.store).with_name("pristine"), made._parts.stores.index.path)


def answers(made: Host) -> Answers:
    """What the host says of everything there is; asked anew."""
    here = Host(made.store, made._parts.stores.index.path)
    found: Answers = {}
    for name in [f"n{number}" for number in range(NODES)] + ["q", "d", "none"]:
        found[name] = here._parts.names.resolve(name)
    for bitmap in ("b3", "none"):
        found[f"bitmap {bitmap}"] = [(hit.path, hit.kind, hit.holder, hit.namespace) for hit in here.find(bitmap)]
    found["containers"] = sorted(here.containers())
    one = here._parts.names.resolve("n1")
    assert one
    found["devices"] = here._parts.names.devices_of(one.uuid)
    return found


def data_of(host: Host) -> Path:
    return Path(host._parts.stores.index.path, "data.mdb")


def verified(host: Host) -> list[str]:
    return in_child(lambda: verify(Host(host.store, host._parts.stores.index.path)).faults)
