"""`CheckedOutImage`: a qcow2 image whose bitmaps are checked out into a store, because it is tracked, or was."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

from dirtmap.engine.model.bitmap import Bitmap
from dirtmap.engine.model.checkpoints import shown, written_since
from dirtmap.engine.model.infos import BitmapInfo, ImageInfo, Recovery, Status
from dirtmap.engine.model.namespace import Namespace
from dirtmap.engine.model.naming import decode_name, encode_name
from dirtmap.engine.model.transaction import Transaction
from dirtmap.engine.namespaces.check_in import check_in
from dirtmap.engine.namespaces.condition import Condition
from dirtmap.engine.namespaces.contents import contents
from dirtmap.engine.namespaces.image import Image, bitmap_of_slot
from dirtmap.engine.namespaces.ports import HostPort
from dirtmap.engine.qcow2.layout import read_layout
from dirtmap.engine.qcow2.reading import FORMAT
from dirtmap.engine.session.verdict import Row
from dirtmap.engine.session.view import SessionView
from dirtmap.engine.storefile.chain import checkpoints_of, read_times
from dirtmap.engine.storefile.file import Snapshot
from dirtmap.engine.system import locks
from dirtmap.engine.system.file import open_file
from dirtmap.fmt.errors import FormatError, MovedError
from dirtmap.fmt.store import Record

T = TypeVar("T")


class CheckedOutImage(Namespace):
    """A qcow2 image whose bitmaps are checked out. Reads them from the session; changes them once the tracker is gone.

    Args:
        path: of the image.
        host: opens the store.
        store: path of the store that has the session.
        name: of the node in that store.
    """

    format = FORMAT

    def __init__(self, path: str, host: HostPort, store: str, name: str) -> None:
        # Absolute, except in messages: the process may change its working folder.
        self.path, self.name, self._host, self._store_path = path, name, host, os.path.abspath(store)
        self._abspath = os.path.abspath(path)
        self._raw_name = encode_name(name)
        record = self._ask(self._record)
        self.size, self.uuid = record.size, str(uuid.UUID(bytes=record.uuid))
        with open_file(path) as file:
            self.cluster_size = read_layout(file).cluster_size

    def _record(self, snapshot: Snapshot) -> Record:
        record = snapshot.record(self._raw_name)
        if record is None or not record.tracked:
            raise MovedError(self.path, "is not tracked any more; open it again")
        return record

    def _ask(self, question: Callable[[Snapshot], T]) -> T:
        with self._host.opened(self._store_path) as target:
            return target.read(question)

    def _read(self) -> tuple[SessionView, dict[str, Bitmap], Record]:
        """The session, the bitmaps, and the record. If the tracker is dead, they are as recovery would make them."""

        def read(snapshot: Snapshot) -> tuple[SessionView, dict[str, Bitmap], Record]:
            record = self._record(snapshot)
            now = Condition(snapshot, record)
            view, busy = now.view, now.busy
            assert view
            found: dict[str, Bitmap] = {}
            if view.row is Row.LIVE:
                for entry in now.entries:
                    found[decode_name(entry.name)] = now.frozen(entry, doubted=now.doubted)
            else:
                with open_file(self.path, abspath=self._abspath) as file, locks.reading(file, force_share=True):
                    layout = read_layout(file)
                    layout.require_sound()
                    slots = {decode_name(slot.entry.name): slot for slot in layout.slots}
                    for name, (bitmap, _) in contents(file, layout, now, now.entries).items():
                        if bitmap is not None:
                            found[name] = bitmap
                        elif slots[name].entry.in_use:
                            entry = slots[name].entry
                            found[name] = Bitmap._lazy(self.size, entry.granularity, entry.auto, True, None)
                        else:
                            found[name] = bitmap_of_slot(file, layout, slots[name])
            for name, bitmap in found.items():
                bitmap.freeze().busy = encode_name(name) in busy
            return view, found, record

        return self._ask(read)

    def info(self) -> ImageInfo:
        """Describes the image and its bitmaps, from the session."""
        view, found, record = self._read()
        info = ImageInfo(
            path=self.path,
            format=self.format,
            size=self.size,
            cluster_size=self.cluster_size,
            bitmaps=tuple(
                BitmapInfo(
                    name=name,
                    granularity=bitmap.granularity,
                    recording=bitmap.recording,
                    inconsistent=bitmap.inconsistent,
                    busy=bitmap.busy,
                    count=None if bitmap.inconsistent else bitmap.count,
                )
                for name, bitmap in found.items()
            ),
            notes=(f"node '{self.name}' is {view.note}",),
            node=self.name,
            uuid=self.uuid,
            doubt=self.doubt(),
        )
        try:
            recording = {name: bitmap.recording for name, bitmap in found.items()}
            chain = checkpoints_of(f"{self._store_path}: {record.label}", record, recording)
        except FormatError as error:
            return replace(info, errors=(str(error),))
        since = written_since(chain, lambda name: None if found[name].inconsistent else found[name])
        return shown(info, chain, read_times(record), since)

    @property
    def address(self) -> tuple[str, bytes]:
        """The path of the store that has the session, and the name there, raw bytes."""
        return self._store_path, self._raw_name

    def doubt(self) -> str | None:
        """Why all bitmaps count as dirty all over; see `Namespace.doubt`."""
        return self._ask(lambda snapshot: Condition(snapshot, self._record(snapshot)).doubt)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Changes the bitmaps after recovering them; see `Namespace.transaction`."""
        self.recover_session()
        with Image(self._abspath, self._host, force_share=True) as image, image.transaction() as bitmaps:
            yield bitmaps

    @contextlib.contextmanager
    def hold(self, name: str, owner: str = "dirtmap") -> Iterator[Bitmap]:
        """Holds a bitmap for a backup, after recovery; see `Namespace.hold`. A live tracker refuses: use its `take`."""
        self.recover_session()
        with Image(self._abspath, self._host) as image, image.hold(name, owner) as held:
            yield held

    def recover(self, names: Iterable[str] = ()) -> list[Recovery]:
        """Checks in what a dead tracker has left: all of it, whatever is named; see `Namespace.recover`."""
        chosen = set(names)
        recovered = check_in(self._host, self._abspath, self._store_path, self._raw_name, salvaging=True, wanted=chosen)
        # An inconsistent bitmap of the image that the session does not have is recovered as in any image.
        left = chosen - {item.name for item in recovered}
        if left or not chosen:
            with Image(self._abspath, self._host) as image:
                recovered += image.recover(left)
        return [item for item in recovered if not chosen or item.name in chosen]

    def recover_session(self) -> None:
        """Like `recover`, but refuses a damaged directory; see `Namespace.recover_session`."""
        check_in(self._host, self._abspath, self._store_path, self._raw_name)

    def tracking(self) -> Status | None:
        """The session of the image's tracker; see `Namespace.tracking`."""
        return self._ask(lambda snapshot: Condition(snapshot, self._record(snapshot)).status)

    def close(self) -> None:
        """Does nothing: the host owns the store."""

    def _names(self) -> list[bytes]:
        return [encode_name(name) for name in self._read()[1]]

    def _load(self, name: bytes) -> Bitmap | None:
        return self._read()[1].get(decode_name(name))

    def __repr__(self) -> str:
        return f"<CheckedOutImage {self.path!r}>"
