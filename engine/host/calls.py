"""One act on a host that is made for it: what a program calls that needs no more than one. See `Host` for each."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from dirtmap.engine.host.host import Host, Target
from dirtmap.engine.system.locks import PATIENCE_SECONDS

if TYPE_CHECKING:
    from dirtmap.engine.host.handle import Handle
    from dirtmap.engine.model.infos import ImageInfo, Recovery
    from dirtmap.engine.model.report import CheckReport
    from dirtmap.engine.model.transaction import Transaction

Path = str | os.PathLike[str]


def this_host(
    store: Path | None = None,
    index: Path | None = None,
    *,
    wait: float = PATIENCE_SECONDS,
    lock: bool = True,
    trust: bool = False,
) -> Host:
    """The host as a default store and an index tell of it; the user's normal ones where None. The rest as `Host`."""
    return Host(store, index, wait=wait, lock=lock, trust=trust)


def open(
    target: Target,
    *,
    store: Path | None = None,
    index: Path | None = None,
    force_share: bool = False,
    wait: float = PATIENCE_SECONDS,
    lock: bool = True,
    trust: bool = False,
) -> Handle:
    """Opens the bitmaps of an image.

    Args:
        target: a path, a node's name or a device's; ``file:``, ``node:`` or ``device:`` in front says which.
        store: the default store, which knows the others; the user's normal one where None.
        index: path of the index; the user's normal one where None.
        force_share: read a qcow2 image although another process writes to it; what it has in memory is not seen.
        wait: seconds to wait for whoever holds what is needed; see `Host`.
        lock: if False, do without locks on file systems that have none; see `Host`.
        trust: root believes what another user can replace; see `Host`.

    Raises:
        FormatError: neither a qcow2 image nor in a store, one that QEMU would refuse, or one that is unsafe to use.
        BitmapError: no such node or device, the target is ambiguous, or a copy of something else.
        LockedError: open for writing elsewhere.
        StorageError: cannot be opened or read.
    """
    host = Host(store, index, wait=wait, lock=lock, trust=trust)
    try:
        return host.open(target, force_share=force_share, closing=host.close)
    except BaseException:
        host.close()
        raise


def describe(
    target: Target,
    *,
    store: Path | None = None,
    index: Path | None = None,
    force_share: bool = False,
    wait: float = PATIENCE_SECONDS,
    lock: bool = True,
    trust: bool = False,
) -> ImageInfo:
    """An image and all its bitmaps without their bits, as of one moment; a store's path stands for all it holds.

    Arguments and errors as `open`.
    """
    with Host(store, index, wait=wait, lock=lock, trust=trust) as host:
        return host.describe(target, force_share=force_share)


@contextlib.contextmanager
def transaction(
    targets: Iterable[Target],
    *,
    store: Path | None = None,
    index: Path | None = None,
    wait: float = PATIENCE_SECONDS,
    lock: bool = True,
    trust: bool = False,
) -> Iterator[dict[Target, Transaction]]:
    """Changes the bitmaps of several targets in one commit; see `Host.transaction`. Other arguments as `open`."""
    with Host(store, index, wait=wait, lock=lock, trust=trust) as host, host.transaction(targets) as transactions:
        yield transactions


def recover(
    target: Target,
    names: Iterable[str] = (),
    *,
    store: Path | None = None,
    index: Path | None = None,
    wait: float = PATIENCE_SECONDS,
    lock: bool = True,
    trust: bool = False,
) -> list[Recovery]:
    """Makes bitmaps usable whose bits cannot be relied on; see `Host.recover`. Other arguments as `open`."""
    with Host(store, index, wait=wait, lock=lock, trust=trust) as host:
        return host.recover(target, names)


def check(
    target: Target,
    *,
    repair: str | None = None,
    store: Path | None = None,
    index: Path | None = None,
    force_share: bool = False,
    wait: float = PATIENCE_SECONDS,
    lock: bool = True,
    trust: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Checks a container and repairs it; see `Host.check`. Other arguments as `open`."""
    with Host(store, index, wait=wait, lock=lock, trust=trust) as host:
        return host.check(target, repair=repair, force_share=force_share, progress=progress)


def dump(
    target: Target,
    *,
    with_hex: bool = False,
    store: Path | None = None,
    index: Path | None = None,
    force_share: bool = False,
    wait: float = PATIENCE_SECONDS,
    lock: bool = True,
    trust: bool = False,
) -> dict[str, Any]:
    """Every structure on disk, as far as it can be read; see `Host.dump`. Other arguments as `open`."""
    with Host(store, index, wait=wait, lock=lock, trust=trust) as host:
        return host.dump(target, with_hex=with_hex, force_share=force_share)
