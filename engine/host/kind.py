"""`Kind`: what the host has to know of a kind of container. The kinds that there are: `dirtmap.engine.host.kinds`.

a path ---probe---> its kind ---open---> the bitmaps of one image or device, a `Namespace`
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from dirtmap.engine.namespaces.ports import HostPort
from dirtmap.engine.system.file import is_same_file
from dirtmap.fmt.errors import UnsupportedError

if TYPE_CHECKING:
    from dirtmap.engine.index.reading import KindReader
    from dirtmap.engine.model.infos import Disk, ImageInfo, Recovery
    from dirtmap.engine.model.namespace import Namespace
    from dirtmap.engine.model.report import CheckReport
    from dirtmap.engine.model.transaction import Transaction
    from dirtmap.engine.storefile.file import Store
    from dirtmap.engine.system.file import File
    from dirtmap.engine.tracking.home import Home
    from dirtmap.engine.tracking.options import Options
    from dirtmap.engine.tracking.recorder import Roots, Setup
    from dirtmap.engine.tracking.tracker import Tracker

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Address:
    """What a target means.

    Attributes:
        path: of the container.
        node: the name of the node or device, in a container of several; None for the container as a whole.
        is_device: the name is a device's.
    """

    path: str
    node: str | None = None
    is_device: bool = False

    def __str__(self) -> str:
        return self.path if self.node is None else f"{self.path}: {self.node}"

    def is_in_one_file(self, other: Address) -> bool:
        """True where both are in one container, whatever the names of its file; False also where one is not there."""
        return is_same_file(self.path, other.path)


@dataclass(frozen=True, slots=True)
class Tracking:
    """How an image is to be tracked.

    Attributes:
        options: see `Options`.
        store: of a qcow2 image: the path of the store that keeps its bitmaps meanwhile; None for that which knows it.
        device: the device whose root the image is, and which is fed, too; the caller closes it after an error.
        roots: of that device.
        make: makes the tracker.
    """

    options: Options
    store: str | None
    make: Callable[[Setup], Any]
    device: Home | None = None
    roots: Roots | None = None


class KindPort(HostPort, Protocol):
    """What a kind may ask of the host, beside what its namespaces may.

    Attributes:
        home: the path of the default store, absolute.
    """

    home: str

    def expect(self, store: Store) -> object:
        """Tells a store that the caller has opened which commit of it the index has seen.

        Called by a check, which reports a rollback and does not commit it.
        """

    def refuse_copy_at(self, path: str) -> None:
        """Refuses a store that is a copy of another, as far as that can be told.

        Called before a repair.

        Raises:
            BitmapError: it is one.
        """

    def open_node(self, uuid: bytes) -> TrackedRoot | None:
        """A device's root: the node of that UUID, opened; None where no store of the host has it.

        Called when a device is tracked, and to tell where its disk is.
        """

    def change_root(self, device: str, root: str, content_unchanged: bool) -> None:
        """Gives a device another root, by their names.

        Called by a device's tracker. Errors as `dirtmap.engine.namespaces.devices.set_root`.
        """


class TrackedRoot(Protocol):
    """A device's root, while its tracker begins or its image is looked for.

    Implemented by `dirtmap.engine.host.handle.Handle`.
    """

    def track_with(self, tracking: Tracking) -> Tracker:
        """Tracks it, for the device as well."""

    def recover_dead(self) -> None:
        """Recovers what a tracker that died has left in it.

        Raises:
            LockedError: its tracker lives.
        """

    def disk(self) -> Disk:
        """Where its image is."""

    def close(self) -> None:
        """Closes it."""


class Kind(abc.ABC):
    """A kind of container: one row of the table of kinds.

    Each method is called by `dirtmap.engine.host.host.Host`, with a path whose file `probe` has said yes to.

    Attributes:
        name: as ``--output=json`` and ``-f`` call it.
        number: in the index, or 0 of a kind that the index does not read.
        is_image: such a container has one disk, whose bitmaps are in it.
    """

    name: str
    number: int = 0
    is_image: bool = True

    @abc.abstractmethod
    def probe(self, file: File) -> bool:
        """True of a container of this kind, however damaged, as far as its magic numbers tell."""

    @abc.abstractmethod
    def open(self, host: KindPort, address: Address, *, force_share: bool) -> AbstractContextManager[Namespace]:
        """The bitmaps of one image or device, until the block ends; see `Host.open`."""

    def name_of(self, path: str) -> str | None:
        """The name of the node that a container says to be; None of one without, and of a container of several."""
        return None

    def describe(self, host: KindPort, address: Address, file: File, *, force_share: bool) -> ImageInfo:
        """All bitmaps without their bits; see `Host.describe`.

        The file is the container, open since it was probed; it may be closed.
        """
        with self.open(host, address, force_share=force_share) as namespace:
            return namespace.info()

    def recover(self, host: KindPort, address: Address, names: Iterable[str]) -> list[Recovery]:
        """Makes bitmaps usable again; see `Host.recover`."""
        with self.open(host, address, force_share=False) as namespace:
            return namespace.recover(names)

    @abc.abstractmethod
    def transaction(self, host: KindPort, addresses: list[Address]) -> AbstractContextManager[list[Transaction]]:
        """Changes several namespaces of one container in one commit; see `Host.transaction`."""

    def disk(self, host: KindPort, namespace: Namespace) -> Disk:
        """Where the disk is that the bitmaps of a namespace are about; see `Handle.disk`."""
        raise UnsupportedError(namespace.where, f"nobody knows where the disk of {self.name} bitmaps is")

    def track(self, host: KindPort, namespace: Namespace, tracking: Tracking) -> Tracker:
        """Begins to track an image whose bitmaps no dead tracker has any more; see `Handle.track`."""
        raise UnsupportedError(namespace.where, f"{self.name} images cannot be tracked")

    def check(
        self, host: KindPort, path: str, *, repair: str | None, force_share: bool, progress: Progress | None
    ) -> CheckReport:
        """Checks a container, and repairs it; see `Host.check`."""
        raise UnsupportedError(path, f"{self.name} containers cannot be checked")

    def dump(self, path: str, *, with_hex: bool, force_share: bool) -> dict[str, Any]:
        """Every structure on disk; see `Host.dump`."""
        raise UnsupportedError(path, f"{self.name} containers cannot be dumped")

    def reader(self, opened: Callable[[str], AbstractContextManager[Store]]) -> KindReader | None:
        """How the index reads it, or None.

        Args:
            opened: opens a store that the host may have open already.
        """
        return None
