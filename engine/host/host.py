"""`Host`: the images, stores and names of a machine, as a default store and an index tell of them.

A host is a value: a command or a program makes one, asks it for whatever it needs, and closes it.

"disk.qcow2", "file:a b"      a path: a qcow2 image, or a whole store
"drive0", "node:drive0"       a node or device, wherever its container is; see `dirtmap.engine.host.resolver`
"""

from __future__ import annotations

import contextlib
import os
import uuid as uuids
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Self

from dirtmap.engine.host.handle import Handle
from dirtmap.engine.host.kind import Address, Kind
from dirtmap.engine.host.kinds import KINDS
from dirtmap.engine.host.parts import Parts
from dirtmap.engine.system.file import existing
from dirtmap.engine.system.locks import PATIENCE_SECONDS, USUAL, Locking
from dirtmap.engine.system.log import logger
from dirtmap.engine.system.probe import index_folder
from dirtmap.fmt.errors import (
    ArgumentError,
    BitmapError,
    BitmapNotFoundError,
    Error,
    FormatError,
    LockedError,
    StorageError,
    UnsupportedError,
)
from dirtmap.fmt.spelling import spellings

if TYPE_CHECKING:
    from dirtmap.engine.host.instant import Instant
    from dirtmap.engine.host.resolver import BitmapMatch
    from dirtmap.engine.model.infos import Disk, ImageInfo, Recovery
    from dirtmap.engine.model.report import CheckReport
    from dirtmap.engine.model.transaction import Transaction
    from dirtmap.engine.namespaces.compact import Compaction
    from dirtmap.engine.namespaces.devices import Device
    from dirtmap.engine.namespaces.nodes import Node
    from dirtmap.engine.storefile.file import Store

Target = str | os.PathLike[str] | Address


class Host:
    """What a default store and an index tell of a machine's images. Use it as a context manager.

    Stores that it has opened stay open until it is closed, and are believed while their header copies are the same: the
    second act on a node opens nothing. Threads may share it.

    Args:
        store: the default store, which knows the others; the user's normal one where None. It need not exist.
        index: path of the index; the user's normal one where None. It is made on first need.
        kinds: of containers.
        wait: seconds to wait for another process or thread that holds an image or a store; 0 does not wait. Reading an
            image that QEMU writes to is refused at once in any case.
        lock: if False, files on a file system without locks that others see are used, too; the caller knows that nobody
            else uses them. So a hold there has ended, unless a lock tells that it has not. Elsewhere locks are taken
            all the same.
        trust: root believes what is in a default store, in stores that it knows, and in an index, although another user
            owns them or can replace them. A path that is named itself needs no trust.

    Raises:
        ArgumentError: ``wait`` is no number of seconds.
    """

    def __init__(
        self,
        store: str | os.PathLike[str] | None = None,
        index: str | os.PathLike[str] | None = None,
        *,
        kinds: tuple[Kind, ...] = KINDS,
        wait: float = PATIENCE_SECONDS,
        lock: bool = True,
        trust: bool = False,
    ) -> None:
        # The engine's own: what is behind a host is asked for by the rooms beside this one.
        usual = wait == PATIENCE_SECONDS and lock
        self._parts = Parts(store, index, kinds, USUAL if usual else Locking(_seconds(wait), lock), trust=trust)

    @property
    def store(self) -> str:
        """The path of the default store, as it was given."""
        return self._parts.store

    @property
    def home(self) -> str:
        """The path of the default store, absolute."""
        return self._parts.home

    @classmethod
    def default(cls) -> Self:
        """The host as the user's normal default store and index tell of it."""
        return cls()

    def close(self) -> None:
        """Closes the stores that are open; it may be used again."""
        self._parts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Host of {self.store!r}>"

    # Images.

    def locate(self, target: Target) -> Address:
        """Finds out what a target means, without opening it.

        Args:
            target: a path, a node's name or a device's; ``file:``, ``node:`` or ``device:`` in front says which. Bytes
                that are not UTF-8 may be given as JSON shows them, where nothing has this very text as name or path.

        Raises:
            BitmapError: it could be either; or the name is not unique.
            BitmapNotFoundError: neither a file nor a name.
            StorageError: not a file, and there is no store to look names up in.
        """
        if isinstance(target, Address):
            return target
        text = os.fspath(target)
        if text.startswith("file:"):
            return Address(existing(text.removeprefix("file:")))
        for spelling in spellings(text):
            if (address := self._locate(spelling)) is not None:
                return address
        kind = _kind_said(text)
        if not os.path.exists(self.home):
            what = "" if kind else "no such file, and "
            what = f"{what}no store at {self.store} to look the {kind or 'name'} up in; 'index scan' makes one"
            raise StorageError(text, what)
        what = f"no {kind} of {self.store}" if kind else f"neither a file nor a node or device of {self.store}"
        raise BitmapNotFoundError(text, what)

    def _locate(self, text: str) -> Address | None:
        """What this very text means; None where nothing is there."""
        kind = _kind_said(text)
        is_file = kind is None and os.path.lexists(text)
        if is_file and ("/" in text or "." in text or not os.path.exists(self.home)):
            return Address(text)
        if not os.path.exists(self.home):
            return None
        found = self._parts.names.resolve(text.removeprefix(f"{kind}:"))
        if found is not None and kind is not None and (kind == "device") != found.is_device:
            found = None
        if is_file and found:
            what = f"both a file and a {found.what} of {found.store}: say file:{text} or {found.what}:{text}"
            raise BitmapError(text, what)
        if is_file:
            return Address(text)
        if found is None:
            return None
        return Address(found.container, found.name if found.in_store else None, found.is_device)

    def _kind(self, path: str) -> Kind:
        # What is no container at all is refused by the kind that most files are.
        return self._parts.kind_of(path) or self._parts.kinds[0]

    def require_format(self, target: Target, wanted: str) -> None:
        """Holds a user's ``-f`` against what the container is.

        Raises:
            FormatError: it is something else.
        """
        path = self.locate(target).path
        kind = self._parts.kind_of(path)
        if kind is None or kind.name != wanted:
            raise FormatError(path, f"not of format {wanted}")

    def open(
        self, target: Target, *, force_share: bool = False, closing: Callable[[], object] = lambda: None
    ) -> Handle:
        """Opens the bitmaps of an image.

        Args:
            target: a path, a node's name or a device's.
            force_share: read a qcow2 image although another process writes to it; what it has in memory is not seen.
            closing: called when the handle is closed.

        Raises:
            FormatError: neither a qcow2 image nor in a store, one that QEMU would refuse, or one that is unsafe to use.
            BitmapError: no such node or device, the target is ambiguous, or a copy of something else.
            LockedError: open for writing elsewhere.
            StorageError: cannot be opened or read.
        """
        address = self.locate(target)
        return Handle(self._parts, self._kind(address.path), address, force_share=force_share, closing=closing)

    def describe(self, target: Target, *, force_share: bool = False) -> ImageInfo:
        """An image and all its bitmaps without their bits, as of one moment; a store's path stands for all it holds.

        Arguments and errors as `open`.
        """
        address = self.locate(target)
        parts = self._parts
        with parts.open_file(address.path) as file:
            kind = parts.kind_in(file) or parts.kinds[0]
            return kind.describe(parts, address, file, force_share=force_share)

    @contextlib.contextmanager
    def offline(self, disk: Disk) -> Iterator[None]:
        """Keeps a disk offline until the end of the block, for whoever copies or serves it.

        Whoever goes by QEMU's image locks cannot write to it meanwhile: QEMU itself, and this package. Others can, and
        of a file that is noticed at the end. A block device looks the same whatever is written to it. A tracker takes
        no such locks: the caller asks `Handle.tracking`.

        Args:
            disk: as `Handle.disk` tells; or another place of the same disk, such as a snapshot.

        Raises:
            LockedError: somebody has it open for writing; or, at the end, it was written to, changed or replaced. That
                is not told where the block has failed itself.
            UnsupportedError: its file system has no locks that others see.
            StorageError: it cannot be opened or looked at, or is being written to without pause.
        """
        from dirtmap.engine.host.offline import offline

        with offline(disk, self._parts.locking):
            yield

    def checkpoint(self, targets: Iterable[Target], name: str, granularity: int | None = None) -> None:
        """Has the trackers of several disks begin a checkpoint at one instant: no write of any is on both sides of it.

        Nothing is written to any of them meanwhile; see `dirtmap.engine.gate`. All of them have it, or none.

        Args:
            targets: tracked images; of one, as `Tracker.checkpoint`.
            name: of the checkpoint, in each.
            granularity: in bytes; None for the usual one.

        Raises:
            BitmapError: one is not tracked, or the name is taken.
            LockedError: a tracker cannot be asked from here.
            StorageError: a write did not end in ten seconds, or the checkpoint could not be written.
        """
        from dirtmap.engine.host.instant import checkpoint

        with contextlib.ExitStack() as stack:
            images = [stack.enter_context(self.open(target)) for target in targets]
            checkpoint(images, name, granularity, self._parts.locking.wait)

    @contextlib.contextmanager
    def instant(self, images: Iterable[Handle]) -> Iterator[Instant]:
        """Has nothing written to several tracked disks until the end of the block, in which they are cut or cloned.

        See `dirtmap.engine.gate`, which does this for trackers of this very process: the block must be short, as a
        write waits for ten seconds at most. If the block fails, or the instant was none, what it has made is removed.

        Args:
            images: each of another disk; or a tracked device and its root.

        Raises:
            BitmapError: one is not tracked.
            LockedError: a tracker cannot be asked from here; or somebody else is in such a block for longer than the
                host waits.
            StorageError: a write did not end; or, at the end, one could not wait any longer.
        """
        from dirtmap.engine.host.instant import instant

        with instant(images, self._parts.locking.wait) as here:
            yield here

    @contextlib.contextmanager
    def lent(self, disk: Disk) -> Iterator[int]:
        """Takes QEMU's locks on a raw disk for a program that is to write it, and takes none itself.

        Meanwhile whoever goes by these locks does not open the disk. They are given up once the block has ended, and so
        has every process that has inherited the descriptor: they outlive this process where that program does.

        Args:
            disk: as `Handle.disk` tells.

        Yields:
            The descriptor that the program has to inherit.

        Raises:
            LockedError: somebody has it open.
            UnsupportedError: it is a qcow2 image; or its file system has no locks that others see.
            StorageError: it cannot be opened for writing.
        """
        from dirtmap.engine.host.offline import lent

        with lent(disk, self._parts.locking) as fd:
            yield fd

    @contextlib.contextmanager
    def transaction(self, targets: Iterable[Target]) -> Iterator[dict[Target, Transaction]]:
        """Changes the bitmaps of several targets in one commit of the container that holds them all.

        A tracked target is changed through its tracker, which makes the commit; see `Handle.transaction`. As nothing
        can commit two at once, a tracked one is changed by itself: several targets, then, all mean the same one.

        Args:
            targets: paths or names; the same image may be named in several ways.

        Yields:
            The transaction of each target. At the end of the block all changes are durable; after an exception there
            are none.

        Raises:
            UnsupportedError: they are in different containers, or one of several is tracked, and nothing can commit two
                at once.
            As `Namespace.transaction`.
        """
        addresses = {target: self.locate(target) for target in targets}
        if not addresses:
            yield {}
            return
        first, *others = addresses
        path = addresses[first].path
        for target in others:
            if not _same_file(path, addresses[target].path):
                what = f"in another container than '{first}', and one commit cannot span two"
                raise UnsupportedError(str(target), what)
        with contextlib.ExitStack() as stack:
            try:
                kind = self._kind(path)
                found = stack.enter_context(kind.transaction(self._parts, list(addresses.values())))
            except LockedError as error:
                tracked = self._tracked(addresses)
                if tracked is None:
                    raise
                if any(address.node != addresses[tracked].node for address in addresses.values()):
                    what = "its tracker commits by itself, and one commit cannot span two: change each target by itself"
                    what = f"{error.what.partition(';')[0]}; {what}"
                    raise UnsupportedError(str(tracked), what) from None
                image = stack.enter_context(self.open(tracked, force_share=True))
                found = [stack.enter_context(image.transaction())] * len(addresses)
            yield dict(zip(addresses, found, strict=True))

    def _tracked(self, addresses: dict[Target, Address]) -> Target | None:
        """One of these targets that is tracked; None where none is."""
        for target in addresses:
            with self.open(target, force_share=True) as image:
                if image.is_tracked():
                    return target
        return None

    def recover(self, target: Target, names: Iterable[str] = ()) -> list[Recovery]:
        """Makes bitmaps usable whose bits cannot be relied on; works on images that `open` refuses for other bitmaps.

        Args:
            target: a path, a node's name or a device's.
            names: which; none for all that need it.
        """
        address = self.locate(target)
        return self._kind(address.path).recover(self._parts, address, list(names))

    def check(
        self,
        target: Target,
        *,
        repair: str | None = None,
        force_share: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> CheckReport:
        """Checks a container and repairs it.

        Args:
            target: a path, or a name of something in the container.
            repair: ``leaks`` or ``all``; None only checks.
            force_share: read a qcow2 image although another process writes to it.
            progress: called with (parts checked, parts in all).

        Raises:
            ArgumentError: ``repair`` has another value; nothing was read.
            As `dirtmap.engine.qcow2.check.check` and `dirtmap.engine.namespaces.store_check.check`.
        """
        from dirtmap.engine.model.report import require_repair

        require_repair(str(target), repair)
        path = self.locate(target).path
        kind = self._kind(path)
        report = kind.check(self._parts, path, repair=repair, force_share=force_share, progress=progress)
        if report.corruptions_fixed or report.leaks_fixed:
            fixed = report.corruptions_fixed, report.leaks_fixed
            logger(__name__).warning("%s: repaired: %d corruptions, %d leaked clusters", path, *fixed)
        return report

    def dump(self, target: Target, *, with_hex: bool = False, force_share: bool = False) -> dict[str, Any]:
        """Every structure on disk, as far as it can be read; see `dirtmap.engine.qcow2.dump.dump`.

        Args:
            target: a path, or a name of something in the container; also the path of an index, or of its ``data.mdb``.
            with_hex: also the bytes of each structure, in hexadecimal.
            force_share: read a qcow2 image although another process writes to it.
        """
        path = self.locate(target).path
        if folder := index_folder(path):
            from dirtmap.engine.index.dump import dump

            return dump(folder, with_hex=with_hex)
        return self._kind(path).dump(path, with_hex=with_hex, force_share=force_share)

    # Files of ours.

    def compact(self, path: str) -> Compaction:
        """Writes a store anew without the space that it does not use; see `dirtmap.engine.namespaces.compact`.

        Raises:
            BitmapError: it is a copy of another store.
        """
        from dirtmap.engine.namespaces.compact import compact

        path = existing(path)
        self._parts.refuse_copy_at(path)
        return compact(path, expect=self._parts.expect, locking=self._parts.locking)

    def new_identity(self, path: str) -> Compaction:
        """Makes a copied store one of its own, with other UUIDs; see `dirtmap.engine.namespaces.compact`."""
        from dirtmap.engine.namespaces.compact import compact

        path = existing(path)
        with self._parts.stores.kept(path) as target:
            known = self._parts.stores.original_of(target) is not None
            restored = not known and bool(target.is_elsewhere())
        return compact(
            path,
            new_identity=True,
            of_copy=known or restored,
            in_doubt=restored,
            expect=self._parts.expect,
            locking=self._parts.locking,
        )

    def make_sidecar(self, disk: str, path: str, *, raw: bool = False) -> None:
        """Makes a qcow2 image whose data is a raw image; see `dirtmap.engine.qcow2.sidecar.make_sidecar`.

        Raises:
            LockedError: the raw image is tracked as a node.
            FormatError: it is an image of another format than raw, and ``raw`` is not said.
        """
        from dirtmap.engine.qcow2.sidecar import make_sidecar

        disk = existing(disk)
        self._parts.registry.refuse_tracked_image(disk)
        make_sidecar(disk, path, raw=raw)

    def in_lock_order(self, targets: Iterable[Target]) -> list[Target]:
        """Targets in the order in which their transactions have to be begun, where several are open at once.

        Raises:
            As `locate`.
        """
        return sorted(targets, key=lambda target: not self._kind(self.locate(target).path).is_image)

    # Names.

    @property
    def index_path(self) -> str:
        """The path of the index, absolute."""
        return self._parts.index

    @property
    def notice(self) -> str | None:
        """Why the index could not be used, and what follows from that, in one line; None where that never was so.

        Every answer is the same without an index; what it had seen of stores is not known then.
        """
        return self._parts.notice

    def problems(self) -> list[Error]:
        """What is wrong with stores that are there: names in them are neither found nor free."""
        return self._parts.stores.problems()

    def keeps_bitmaps(self, path: str) -> bool:
        """True of a file that keeps the bitmaps of its disk itself, as a qcow2 image does. Errors as `kind_of`."""
        kind = self._parts.kind_of(existing(path))
        return kind is not None and kind.is_image

    def find(
        self, bitmap: str, *, force_share: bool = False, told: Callable[[Error], object] | None = None
    ) -> list[BitmapMatch]:
        """Every bitmap of that name, in all containers that can be read; see `Resolver.find`.

        Raises:
            StorageError: as `has_store`.
        """
        self.has_store()
        return self._parts.names.find(bitmap, force_share=force_share, told=told)

    def has_store(self) -> bool:
        """True where there is a default store; False where it is the user's normal one and was never made.

        Raises:
            StorageError: it was chosen, by ``store`` or by ``$DIRTMAP_STORE``, and is not there; or nobody can tell
                whether it is, as behind a loop of links.
        """
        return self._parts.has_store()

    def containers(self) -> list[str]:
        """The paths of all containers that are known, stores first; those that are gone or damaged included.

        Raises:
            StorageError: as `has_store`.
        """
        self.has_store()
        return self._parts.stores.containers()

    def nodes(self, problems: list[Error]) -> list[Node]:
        """All nodes of all stores that can be read, by name.

        Args:
            problems: takes in why a store could not be read.

        Raises:
            FormatError: the default store is damaged.
            StorageError: as `has_store`.
        """
        from dirtmap.engine.namespaces.nodes import nodes

        return sorted(self._gather(nodes, problems), key=lambda node: node.name)

    def devices(self, problems: list[Error]) -> list[Device]:
        """All devices of all stores that can be read, by name. Arguments and errors as `nodes`."""
        from dirtmap.engine.namespaces.devices import devices

        return sorted(self._gather(devices, problems), key=lambda device: device.name)

    def _gather(self, read: Callable[[Store, list[FormatError]], Iterable[Any]], problems: list[Error]) -> list[Any]:
        found: list[Any] = []
        self.has_store()
        told: dict[str, Error] = {}
        broken: list[FormatError] = []
        for problem in self._parts.stores.problems():
            told.setdefault(problem.where, problem)
        for path in self._parts.stores.stores():
            try:
                with self._parts.stores.opened(path) as opened:
                    found += read(opened, broken)
            except Error as error:
                told.setdefault(error.where, error)
        for fault in broken:
            told.setdefault(fault.where, fault)
        problems += told.values()
        return found

    def name_of(self, address: Address) -> str | None:
        """The name of the node or device at an address, as its container says it; None where it has none.

        Raises:
            StorageError: the container cannot be read.
        """
        return address.node if address.node is not None else self._kind(address.path).name_of(address.path)

    def node_of(self, uuid: str) -> str | None:
        """The name of the node of that UUID; None where no store of the host has it."""
        found = self._parts.names.by_uuid(uuids.UUID(uuid).bytes)
        return None if found is None else found.name

    def add_node(self, name: str, image: str, *, raw: bool = False) -> None:
        """A node whose bitmaps the default store holds; see `dirtmap.engine.namespaces.nodes.add_node`."""
        self._parts.registry.add_node(name, existing(image), raw=raw)
        self._remember_chosen()

    def add_qcow2(self, name: str, image: str, *, new_identity: bool = False) -> None:
        """A node that is a qcow2 image; see `dirtmap.engine.namespaces.nodes.add_qcow2`."""
        self._parts.registry.add_qcow2(name, existing(image), new_identity=new_identity)
        self._remember_chosen()

    def remove_node(self, name: str) -> None:
        """Forgets a node; see `Registry.remove_node`."""
        self._parts.registry.remove_node(name)

    def rename_node(self, name: str, new: str, *, with_bitmaps: bool = False) -> None:
        """Gives a node another name; see `dirtmap.engine.namespaces.nodes.rename_node`."""
        self._parts.registry.rename_node(name, new, with_bitmaps=with_bitmaps)

    def resize_node(self, name: str) -> int:
        """Adopts the size that a node's image has now; see `dirtmap.engine.namespaces.nodes.resize_node`."""
        return self._parts.registry.resize_node(name)

    def confirm_node(self, name: str) -> None:
        """States that a node's bitmaps are right; see `dirtmap.engine.namespaces.nodes.confirm_node`."""
        self._parts.registry.confirm_node(name)

    def relocate_node(
        self, name: str, path: str, confirm: bool = False, move: bool = False, *, raw: bool = False
    ) -> bool:
        """Points a raw node to where its image is now; see `dirtmap.engine.namespaces.nodes.relocate_node`."""
        path = path if move else existing(path)
        return self._parts.registry.relocate_node(name, path, confirm=confirm, move=move, raw=raw)

    def add_device(self, name: str, root: str) -> None:
        """A device on a node, in the default store; see `dirtmap.engine.namespaces.devices.add_device`."""
        self._parts.registry.add_device(name, root)
        self._remember_chosen()

    def set_root(self, name: str, root: str, *, content_unchanged: bool = False) -> None:
        """Gives a device another root; see `dirtmap.engine.namespaces.devices.set_root`."""
        self._parts.registry.set_root(name, root, content_unchanged=content_unchanged)

    def remove_device(self, name: str) -> None:
        """Forgets a device; see `dirtmap.engine.namespaces.devices.remove_device`."""
        self._parts.registry.remove_device(name)

    def _remember_chosen(self) -> None:
        """Has the normal default store know a store that was chosen, so that what is in it is found without choosing.

        Where that cannot be written, it stays as it is: whoever chose the store can choose it again.
        """
        normal = self._parts.normal
        if self.home != normal:
            locking, trust = self._parts.locking, self._parts.trust
            host = Host(
                normal, self.index_path, kinds=self._parts.kinds, wait=locking.wait, lock=locking.lock, trust=trust
            )
            with contextlib.suppress(Error), host:
                host._parts.registry.remember_store(self.home)


def _kind_said(text: str) -> str | None:
    """``node`` or ``device`` where a target says which of them it is."""
    return "node" if text.startswith("node:") else "device" if text.startswith("device:") else None


def _seconds(wait: float) -> float:
    if not wait >= 0:  # nor not a number
        raise ArgumentError("wait", f"{wait!r} is no number of seconds, 0 or more")
    return wait


def _same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError as error:
        raise StorageError(other, error.strerror or str(error), error.errno) from error
