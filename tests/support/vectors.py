"""The test vectors: the world that they are made in, where nothing is random, and what readers say of them.

`tests/vectors/make.py` makes them. What a vector's document says comes from two sides, and a test compares them: from
what was put into the files, read by a reader that shares nothing with dirtmap, and from dirtmap.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from dirtmap.engine.model.namespace import Namespace
from dirtmap.engine.namespaces import changing, condition
from dirtmap.engine.session import livefile, view
from dirtmap.engine.storefile import chunks
from dirtmap.engine.storefile import file as storefile
from dirtmap.engine.storefile import session as sessions
from dirtmap.engine.storefile.chain import read_chain
from dirtmap.engine.storefile.directory import read_entries
from dirtmap.engine.storefile.entries import tree_of
from dirtmap.engine.storefile.file import Snapshot, Store
from dirtmap.engine.storefile.holds import all_holds
from dirtmap.engine.system.file import File
from dirtmap.engine.system.process import Process
from dirtmap.engine.tracking import home, kernel, recorder
from dirtmap.fmt import live, store
from dirtmap.fmt.errors import Error, FormatError, UnsupportedError
from dirtmap.fmt.identity import FilePlace, Identity
from dirtmap.fmt.store import Record
from dirtmap.fmt.structures.live import build_session, parse_session
from support import hostless, store_crash

VECTORS = Path(__file__).parent.parent / "vectors"

Said = dict[str, Any]  # a document, or a part of one

EXT4 = bytes.fromhex("65787434000000000123456789abcdef")
SECOND = 10**9
MADE = 18 * 10**17  # when everything was made, in nanoseconds since 1970
BOOTED = MADE - 1000 * SECOND
BOOT = uuid.UUID("b0070000-0000-4000-8000-000000000001")
# What the records of killed trackers say. The files are in the vector's own folder.
LIVE, LOG = b"/dev/shm/dirtmap-1000/vector", b"/var/lib/dirtmap/vector.intent"


def identity(number: int, size: int) -> Identity:
    """How the image looks that has this number, and so many bytes."""
    return Identity(EXT4, number, 16 * 10**17, size, 17 * 10**17, 17 * 10**17)


class Clock:
    """The only clock: it shows ``now``, in nanoseconds since 1970, until somebody sets it."""

    def __init__(self) -> None:
        self.now = MADE

    def __call__(self) -> int:
        return self.now


@contextlib.contextmanager
def patched(*patches: tuple[object, str, object]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for target, name, value in patches:
            stack.enter_context(mock.patch.object(target, name, value))
        yield


def images_as_remembered() -> contextlib.AbstractContextManager[None]:
    """While active, every image looks as its namespace's record says: what vectors are about is in their files."""
    return patched(
        (condition, "identity_now", lambda record: record.identity),
        (condition, "root_elsewhere", lambda record: None),
        (condition, "size_now", lambda record: record.size),
        (changing, "lasting_identity_now", lambda record: record.identity),
    )


@contextlib.contextmanager
def fixed() -> Iterator[Clock]:
    """While active, nothing is random: UUIDs are counted, the clock stands, and every file is in one place."""
    clock, numbers = Clock(), itertools.count(1)

    def recorded(session: live.Session) -> bytes:
        return build_session(replace(session, live=LIVE, log_path=LOG))

    def image(path: str) -> Identity:
        return identity(1234, int(Path(path).name))  # the trackers' images are named by their sizes

    with (
        images_as_remembered(),
        patched(
            (uuid, "uuid4", lambda: uuid.UUID(f"{next(numbers):08x}-0000-4000-8000-000000000000")),
            (time, "time_ns", clock),
            (storefile, "time_ns", clock),
            (File, "place", lambda file: FilePlace(EXT4, 4321, MADE)),
            (livefile, "clock_offset", lambda: BOOTED),
            (kernel, "clock_offset", lambda: BOOTED),
            (home, "build_session", recorded),
            (recorder, "identity_of", image),
            (recorder, "this_process", lambda: Process(4711, 1500, BOOT.bytes)),
            (recorder.Recorder, "_give_signs", lambda self: None),
            (recorder.Recorder, "_in_background", lambda self: None),
        ),
    ):
        yield clock


# Documents.


def written(document: Said) -> str:
    """A document as text: as JSON has it, but for short lists of numbers, each on one line."""
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    text = re.sub(r"\[\s*(\d+),\s*(\d+)\s*\]", r"[\1, \2]", text)
    lists = re.compile(r"\[\s+(\[\d+, \d+\](?:,\s+\[\d+, \d+\])*)\s+\]")
    return lists.sub(lambda found: "[" + re.sub(r"\s+", " ", found[1]) + "]", text)


def extents_of(packed: bytes, size: int, granularity: int) -> list[list[int]]:
    """The dirty extents in packed bits, cut at the end of the disk."""
    bits = np.zeros(-(-size // granularity) + 2, np.int8)
    bits[1:-1] = np.unpackbits(np.frombuffer(packed, np.uint8), count=len(bits) - 2, bitorder="little")
    ends = np.flatnonzero(np.diff(bits)).tolist()
    return [
        [first * granularity, min(end * granularity, size) - first * granularity]
        for first, end in zip(ends[::2], ends[1::2], strict=True)
    ]


def plainly(image: bytes) -> Said:
    """What the tests' own reader says of a sound store."""
    reader = store_crash.Reader(image)
    header = reader.header
    return {
        "readable": True,
        "writable": True,
        "in_doubt": reader.in_doubt,
        "uuid": text_of(image[store_crash.UUID_AT : store_crash.UUID_AT + 16]),
        "generation": header.generation,
        "cluster_size": header.cluster,
        "hidden": 0,
        "namespaces": [
            {
                "name": name.decode(),
                "kind": store.KIND_NAMES[found.kind],
                "uuid": text_of(found.uuids[:16]),
                "root": text_of(found.uuids[16:]) if any(found.uuids[16:]) else None,
                "size": found.size,
                "doubt": found.doubted and bool(found.bitmaps),
                "unreadable": False,
                "checkpoints": [],
                "holds": [],
                "bitmaps": [_plain_bitmap(bitmap, found) for bitmap in found.bitmaps],
            }
            for name, found in sorted(reader.contents().items())
        ],
    }


def _plain_bitmap(bitmap: store_crash.Bitmap, namespace: store_crash.Namespace) -> Said:
    granularity, in_use = 1 << bitmap.granularity_bits, bool(bitmap.flags & 1)
    packed = store_crash.packed(bitmap, namespace.size, doubted=namespace.doubted)
    return {
        "name": bitmap.name.decode(),
        "granularity": granularity,
        "recording": bool(bitmap.flags & 2),
        "inconsistent": in_use,
        "uuid": text_of(bitmap.uuid),
        "generation": bitmap.generation,
        "dirty": None if in_use else extents_of(packed, namespace.size, granularity),
        "damaged": [],
    }


def text_of(raw: bytes) -> str:
    return str(uuid.UUID(bytes=raw))


# What dirtmap says.


def told_of_store(path: Path) -> Said:
    """What dirtmap says of a store, in the words of the documents."""
    with images_as_remembered():
        try:
            target = Store(str(path))
        except (FormatError, UnsupportedError):
            return {"readable": False}
        with target:
            return target.read(lambda snapshot: _told(target, snapshot)) | {"writable": _is_writable(path)}


def _is_writable(path: Path) -> bool:
    """Whether a copy of a store can be committed to."""
    copy = path.with_name(f"{path.name}.copy")
    shutil.copy(path, copy)
    try:
        with Store(str(copy)) as target, target.change() as change:
            change.table.put(Record(b"another", store.KIND_NODE, bytes(16), 0, change.generation))
    except Error:
        return False
    finally:
        copy.unlink()
    return True


def _told(target: Store, snapshot: Snapshot) -> Said:
    broken: list[FormatError] = []
    records = list(snapshot.table().readable(broken.append))
    header = snapshot.header
    hidden = header.namespaces - len(records)
    assert bool(broken) == bool(hidden)
    return {
        "readable": True,
        "in_doubt": snapshot.chosen.in_doubt,
        "uuid": text_of(header.uuid),
        "generation": header.generation,
        "cluster_size": header.cluster_size,
        "hidden": hidden,
        "namespaces": [
            _told_of_namespace(target, snapshot, record) for record in sorted(records, key=lambda record: record.name)
        ],
    }


def _told_of_namespace(target: Store, snapshot: Snapshot, record: Record) -> Said:
    name = record.name.decode()
    said: Said = {
        "name": name,
        "kind": store.KIND_NAMES[record.kind],
        "uuid": text_of(record.uuid),
        "root": text_of(record.root_uuid) if any(record.root_uuid) else None,
        "size": record.size,
    }
    lost = said | {"doubt": None, "unreadable": True, "checkpoints": None, "holds": None, "bitmaps": None}
    try:
        image = hostless.stored(target, name)
        info = image.info()
        entries = read_entries(snapshot, record)
    except (FormatError, UnsupportedError):
        return lost
    bitmaps = []
    for entry, found in zip(entries, info.bitmaps, strict=True):
        bitmaps.append(
            {
                "name": found.name,
                "granularity": found.granularity,
                "recording": found.recording,
                "inconsistent": found.inconsistent,
                "uuid": found.uuid,
                "generation": found.generation,
                "dirty": None if found.inconsistent else _dirty(image, found.name),
                "damaged": [] if found.inconsistent or info.doubt else _damaged(snapshot, record, entry),
            }
        )
        counted = bitmaps[-1]["dirty"]
        if counted is not None:
            assert found.count == sum(-(-length // found.granularity) * found.granularity for _, length in counted)
    return said | {
        "doubt": info.doubt is not None,
        "unreadable": False,
        "checkpoints": [name or None for name in read_chain("", record)],
        "holds": [{"bitmap": held.bitmap.decode(), "owner": held.owner} for held in all_holds(record)],
        "bitmaps": bitmaps,
    }


def _dirty(image: Namespace, name: str) -> list[list[int]]:
    offsets, lengths = image[name].extents()
    return [[offset, length] for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True)]


def _damaged(snapshot: Snapshot, record: Record, entry: Any) -> list[list[int]]:
    """The extents that count as dirty because a chunk or a node above them is damaged."""
    if entry.table_offset <= store.ALL_ONES:
        return []
    found = chunks.verify(snapshot, tree_of(record, entry))
    span = found.shape.bits * entry.granularity
    runs = sorted((first * span, min(end * span, record.size)) for first, end, _ in found.damaged)
    return [[first, end - first] for first, end in runs]


def told_of_tracker(folder: Path, document: Said, case: Said) -> Said:
    """What dirtmap says of a killed tracker, given the facts of a case.

    Args:
        folder: with the files of the vector, which only this user may read.
        document: of the vector.
        case: whether the image is unchanged, and whether it is the same boot.
    """
    files = document["files"]
    live_folder, log = (os.fsencode(folder / (files[what] or "gone")) for what in ("live", "log"))

    def found(data: bytes) -> live.Session:
        return replace(parse_session(data), live=live_folder, log_path=log)

    boot = BOOT.bytes if case["same_boot"] else bytes(15) + b"\1"
    with (
        images_as_remembered(),
        patched(
            (sessions, "parse_session", found),
            (view, "boot_id", lambda: boot),
            (view, "is_alive", lambda session: False),
            (view, "_look_at", lambda record: record.identity),
            (view.SessionView, "_changed", lambda *_: None if case["image_unchanged"] else "changed"),
        ),
        Store(str(folder / files["store"])) as target,
    ):
        said = target.read(lambda snapshot: _told(target, snapshot))

        def rows_of(snapshot: Snapshot) -> dict[str, str]:
            views = {record.name.decode(): view.view_of(snapshot, record) for record in snapshot.table()}
            return {name: found.row.value for name, found in views.items() if found}

        rows = target.read(rows_of)
    return {
        "image_unchanged": case["image_unchanged"],
        "same_boot": case["same_boot"],
        "namespaces": [
            {
                "name": namespace["name"],
                "row": rows.get(namespace["name"]),
                "bitmaps": [{"name": one["name"], "dirty": one["dirty"]} for one in namespace["bitmaps"]],
            }
            for namespace in said["namespaces"]
        ],
    }


def told_of_image(path: Path) -> Said:
    """What dirtmap says of a qcow2 image."""
    try:
        with hostless.image(path, force_share=True) as image:
            info = image.info()
            usable = {found.name: _dirty(image, found.name) for found in info.bitmaps if not found.inconsistent}
    except (FormatError, UnsupportedError):
        return {"readable": False}
    return {
        "readable": not info.errors,
        "size": info.size,
        "cluster_size": info.cluster_size,
        "node": info.node,
        "uuid": info.uuid,
        "bitmaps": [
            {
                "name": found.name,
                "granularity": found.granularity,
                "recording": found.recording,
                "inconsistent": found.inconsistent,
                "dirty": usable.get(found.name),
            }
            for found in info.bitmaps
        ],
    }
