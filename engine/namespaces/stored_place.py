"""`StoredPlace`: the place of a qcow2 image that a store has a record of. `holding`: a hold, of any namespace."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from dirtmap.engine.identity import identity_of_disk, is_twin, lasting_identity
from dirtmap.engine.model.naming import decode_name, encode_name, label
from dirtmap.engine.namespaces import devices
from dirtmap.engine.namespaces.condition import refuse_tracked
from dirtmap.engine.namespaces.place import Place
from dirtmap.engine.storefile import holds
from dirtmap.engine.storefile.chain import checkpoints_of, read_times, with_chain
from dirtmap.engine.storefile.directory import no_namespace
from dirtmap.engine.storefile.holds import Hold, held_by
from dirtmap.engine.system import order
from dirtmap.engine.system.file import is_same_file
from dirtmap.fmt.errors import BitmapError, GoneError, StorageError, printable
from dirtmap.fmt.identity import Identity
from dirtmap.fmt.store import Record

if TYPE_CHECKING:
    from dirtmap.engine.namespaces.ports import HostPort
    from dirtmap.engine.storefile.file import Snapshot, Store
    from dirtmap.engine.system.file import File


@contextlib.contextmanager
def holding(target: Store, node: bytes, names: Iterable[str], owner: str) -> Iterator[None]:
    """Holds bitmaps for the time of the block; see `Namespace.hold`. The holds are in the record of their namespace."""
    taken = [holds.hold(encode_name(name), owner) for name in names]
    with contextlib.ExitStack() as stack:
        with target.change() as change:
            record = change.table.get(node)
            if record is None:
                raise no_namespace(target.path, node)
            refuse_tracked(f"{target.path}: {record.label}", record)  # its tracker takes bitmaps for backups
            file = change.snapshot.file
            # The bytes are locked before anybody can see the record, because a hold without a lock counts as stale.
            locked = stack.enter_context(holds.lock(taken, file))
            change.table.put(holds.with_holds(record, [*holds.living(file, record), *taken]))
        try:
            yield
        finally:
            if locked.fd >= 0:  # else this is a forked child, and its parent has the holds
                _end_holds(target, node, taken, locked)


def _end_holds(target: Store, node: bytes, taken: list[Hold], locked: File) -> None:
    """Removes holds from the record of their namespace.

    Raises:
        GoneError: another file has replaced the store, which had the holds.
    """
    tokens = {held.token for held in taken}
    with target.change() as change:
        if (record := change.table.get(node)) is not None:  # else the holds are gone with the record
            others = [found for found in holds.living(change.snapshot.file, record) if found.token not in tokens]
            change.table.put(holds.with_holds(record, others))
    if not locked.is_current():
        one = len(taken) == 1
        held = f"{label(decode_name(taken[0].bitmap))} was" if one else f"{len(taken)} bitmaps were"
        what = f"was replaced while {held} held: {'it' if one else 'they'} may have been changed meanwhile"
        raise GoneError(target.path, what)


class StoredPlace(Place):
    """What a store remembers about a qcow2 image that has a name: where it is, its holds and its checkpoints.

    Args:
        host: opens the store.
        store: the path of the store that has the record.
        name: of the record, raw bytes. It is the node's name, or its former one if a rename was killed halfway.
        uuid: of the image's namespace, 16 bytes.

    Attributes:
        store: as given.
    """

    def __init__(self, host: HostPort, store: str, name: bytes, uuid: bytes) -> None:
        self._host, self._name, self._uuid = host, name, uuid
        self.store: str | None = store

    @property
    def node(self) -> str:
        """The name of the node in the record."""
        return decode_name(self._name)

    def _record(self) -> Record | None:
        with self._host.opened(self.store) as target:
            record = target.record(self._name)
        return record if record is not None and record.uuid == self._uuid else None

    def held(self) -> dict[str, str]:
        """Which bitmaps are held, and by whom."""

        def held(snapshot: Snapshot) -> dict[str, str]:
            record = snapshot.record(self._name)
            return held_by(snapshot.file, record) if record is not None and record.uuid == self._uuid else {}

        with self._host.opened(self.store) as target:
            return target.read(held)

    def checkpoints(self, recording: Mapping[str, bool] | None) -> list[str]:
        """The chain of its checkpoints; see `dirtmap.engine.storefile.chain.checkpoints_of`."""
        record = self._record()
        return checkpoints_of(f"{self.store}: {record.label}", record, recording) if record else []

    def began(self) -> dict[str, int]:
        """When its checkpoints began; see `dirtmap.engine.storefile.chain.read_times`."""
        record = self._record()
        return read_times(record) if record else {}

    def keep_checkpoints(self, chain: list[str]) -> None:
        """Records another chain of checkpoints, as soon as this thread holds no store."""

        def keep() -> None:
            with self._host.opened(self.store) as target, target.change() as change:
                record = change.table.get(self._name)
                same = record is not None and record.uuid == self._uuid
                if record and same and (kept := with_chain(record, chain)) != record:
                    change.table.put(kept)

        order.after_stores(keep)

    @contextlib.contextmanager
    def changing(self, path: str) -> Iterator[None]:
        """Lets the block change the image's metadata without putting bitmaps of devices on the image in doubt.

        The block must not change what a guest reads. Afterwards the devices get the new identity of the image.

        Args:
            path: of the image, absolute.
        """
        on_it = self._host.devices_on(self._uuid)
        before = _look(path) if on_it else None
        try:
            yield
        finally:
            if before is not None and (after := _look(path, lasting=True)) is not None and after != before:

                def confirm() -> None:
                    for where, names in on_it.items():
                        with self._host.opened(where) as target:
                            devices.confirm_roots(target, names, before, after)

                order.after_stores(confirm)

    @contextlib.contextmanager
    def hold(self, where: str, names: list[str], owner: str) -> Iterator[None]:
        """Holds bitmaps for the time of the block.

        Args:
            where: how messages name them.
            names: of the bitmaps.
            owner: who holds them, for messages to others.

        Raises:
            BitmapError: no store has a record of the image.
        """
        with self._host.opened(self.store) as target, holding(target, self._name, names, owner):
            yield

    # Which file is meant.

    def refuse_twin(self, path: str) -> None:
        """Refuses a copy of the image, which has the same identity.

        Raises:
            BitmapError: names the original, and the command that gives the copy an identity of its own.
        """
        if (record := self._record()) and is_twin(record, path):
            original = os.fsdecode(record.path)
            what = f"a copy of {original}, with its identity; 'node add --new-identity' gives it one of its own"
            raise BitmapError(path, what)

    def is_checked_out(self, path: str) -> bool:
        """True if a tracker has the image's bitmaps, or had them when it died. False for a copy of the image."""
        record = self._record()
        return record is not None and record.tracked and is_same_file(path, record.path)

    def refuse_moved(self, path: str) -> None:
        """Refuses an image that was moved while its bitmaps were checked out, until its new place is recorded.

        Raises:
            BitmapError: names the command that records it.
        """
        record = self._record()
        if record and record.tracked and not is_same_file(path, record.path) and not is_twin(record, path):
            node = f"node '{printable(self.node)}'"
            what = f"{node}, moved while a tracker had its bitmaps; 'index scan' finds it, then recover it"
            raise BitmapError(path, what)


def _look(path: str, *, lasting: bool = False) -> Identity | None:
    """The identity of all that a guest reads of an image, lasting or not; None if it cannot be looked at."""
    with contextlib.suppress(StorageError):
        return lasting_identity(path, of_disk=True) if lasting else identity_of_disk(path)
    return None
