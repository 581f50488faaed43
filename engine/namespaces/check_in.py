"""Checks the bitmaps of a tracked qcow2 image in: from the store that has had them while it was tracked.

    check-out   1  store: the session, with a copy of the bits     check-in   1  store: all that was marked
                2  image: its autoclear bit "tracked" on                      2  image: the bits, not in use any more
                3  image: all bitmaps in use                                  3  image: "tracked" off
                                                                              4  store: the session and its copy gone

SPEC.md has the steps, in "Tracked qcow2 images". The check-out is in `dirtmap.engine.host.tracked`.

A program that opens the image for writing clears the autoclear bit "tracked" if it does not know it, as QEMU does; and
QEMU does not touch bitmaps in use. What each bitmap holds after a crash at or between any steps is decided in
`dirtmap.engine.namespaces.contents`.

A device that is tracked with the image ends its session before step 2 of the check-in. After step 3 its record is told
how the image looks now. After a crash in between, the device is all dirty.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import replace

from dirtmap.engine.identity import identity_of_disk
from dirtmap.engine.model.infos import Recovery
from dirtmap.engine.model.naming import encode_name, not_found
from dirtmap.engine.namespaces.condition import Condition, refuse_tracked
from dirtmap.engine.namespaces.contents import contents
from dirtmap.engine.namespaces.ports import HostPort
from dirtmap.engine.namespaces.recover import confirm, log_recovered, recover_tracked_device
from dirtmap.engine.qcow2.check import free_leaks
from dirtmap.engine.qcow2.commit import Kept, Written, commit, require_writable, set_tracked
from dirtmap.engine.qcow2.layout import Layout, read_layout
from dirtmap.engine.qcow2.reading import write_session
from dirtmap.engine.session import livefile
from dirtmap.engine.storefile.directory import release_bits
from dirtmap.engine.storefile.file import Change
from dirtmap.engine.storefile.session import session_of
from dirtmap.engine.system.file import File
from dirtmap.fmt import directory, live, store
from dirtmap.fmt.directory import Entry
from dirtmap.fmt.errors import FormatError, StorageError
from dirtmap.fmt.identity import Identity
from dirtmap.fmt.store import NOWHERE


def check_in(
    host: HostPort,
    path: str,
    store_path: str,
    name: bytes,
    *,
    own: bool = False,
    salvaging: bool = False,
    wanted: Iterable[str] = (),
) -> list[Recovery]:
    """Writes the bitmaps of a session into the image, and ends the session; see the head of the module.

    Args:
        host: opens the stores.
        path: the image.
        store_path: the store that has the session.
        name: of the node, raw bytes.
        own: the session is the caller's, which has saved all marks.
        salvaging: if the session's directory is damaged, recovers all bitmaps that can still be named, all dirty.
        wanted: names of bitmaps that must exist; otherwise nothing happens.

    Returns:
        What was done to each bitmap.

    Raises:
        LockedError: another process tracks the image, or has it open.
        FormatError: the session's directory is damaged, and ``salvaging`` is False.
        BitmapNotFoundError: one of ``wanted`` does not exist.
        As `Namespace.transaction`.
    """
    with host.opened(store_path) as target:
        recover_tracked_device(host, target, name)
    with (
        host.opened(store_path) as target,
        write_session(path, locking=host.locking) as (file, layout),
        target.change() as change,
    ):
        layout.require_sound()
        require_writable(layout)
        record = change.table.get(name)
        session = None if record is None else session_of(record)
        if record is None or session is None:
            return []
        if not own:
            refuse_tracked(path, record)
        if session is live.NO_SESSION:
            livefile.refuse_living(file.abspath, record.uuid)
        now = Condition(change.snapshot, record)
        entries = _entries(now) if salvaging else now.entries
        written, recovered = _recovered_slots(file, layout, now, entries)
        there = {part.entry.name if isinstance(part, Kept) else part.name for part in written}
        for bitmap in wanted:
            if encode_name(bitmap) not in there:
                raise not_found(path, bitmap)
        before = _look(path)
        commit(file, layout, written)
        if not own:
            free_leaks(file)  # those of a check-in that the tracker's death interrupted
        set_tracked(file, read_layout(file), False)
        if layout.tracked:
            confirm(host, change, record, before, _look(path))
        _forget(change, now, entries)
        if not own:
            now.end_session(change)
    log_recovered(path, recovered)
    return recovered


def _look(path: str) -> Identity | None:
    with contextlib.suppress(StorageError):
        return identity_of_disk(path)
    return None


def _entries(now: Condition) -> list[Entry] | None:
    """The directory of a session; None if it is damaged."""
    with contextlib.suppress(FormatError):
        return now.entries
    return None


def _forget(change: Change, now: Condition, entries: list[Entry] | None) -> None:
    """Removes the session and its bitmaps from the record. A damaged directory's space leaks: it is not known."""
    record = now.record
    if entries is not None:
        for entry in entries:
            release_bits(change, record, entry)
        change.release(record.directory)
    ended = record.with_extensions(store.OF_A_SESSION)
    change.table.put(replace(ended, directory=NOWHERE, nb_bitmaps=0))


def _recovered_slots(
    file: File, layout: Layout, now: Condition, entries: list[Entry] | None
) -> tuple[list[Kept | Written], list[Recovery]]:
    """The new directory of the image, and what was done to each bitmap of the session."""
    slots = {slot.entry.name: slot for slot in layout.slots}
    written: list[Kept | Written] = []
    recovered = []
    for name, (bitmap, how) in contents(file, layout, now, entries).items():
        slot = slots.pop(encode_name(name), None)
        if bitmap is None:
            assert slot
            written.append(Kept(slot.entry))
            continue
        recovered.append(Recovery(name, how))
        written.append(
            Written(
                name=encode_name(name),
                flags=directory.FLAG_AUTO if bitmap.recording else 0,
                granularity_bits=bitmap.granularity.bit_length() - 1,
                content=bitmap._parts(lasting=True),
                base=slot,
            )
        )
    return written, recovered
