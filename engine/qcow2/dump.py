"""Dumps every structure of a qcow2 image that concerns bitmaps, field by field, as far as it can be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dirtmap.engine.model.dumping import MOST_RUNS, Shown, data, text
from dirtmap.engine.qcow2.layout import Layout, bitmap_label, read_layout
from dirtmap.engine.qcow2.reading import FORMAT
from dirtmap.engine.system import locks
from dirtmap.engine.system.file import File, open_file
from dirtmap.engine.system.probe import probe
from dirtmap.fmt import directory, extensions, qcow2
from dirtmap.fmt.errors import Error, FormatError, counted
from dirtmap.fmt.parsers.directory import DIRECTORY_ENTRY
from dirtmap.fmt.parsers.extensions import EXTENSION_HEAD
from dirtmap.fmt.parsers.qcow2 import (
    BITMAPS_EXTENSION,
    CRYPTO_EXTENSION,
    FEATURE_NAME,
    HEADER_MORE,
    HEADER_V2,
    HEADER_V3,
    NAMESPACE_EXTENSION,
    SNAPSHOT,
)
from dirtmap.fmt.structure import AnyStructure

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# A hostile image could claim any number of structures. The limits on tables are for all tables together.
_MOST_STRUCTURES = 10_000
_MOST_TABLE_BYTES = 1 << 26
_MOST_TABLE_RUNS = 1 << 16
_MOST_TABLE_HEX = 1 << 22
_READ = 1 << 20

# The names of entries of 0, of entries of 1, and of all others.
_POINTERS = ("none", "data", "data")
_CLUSTERS = ("zeros", "ones", "data")

_FLAGS = {
    "incompatible_features": qcow2.INCOMPATIBLE_NAMES,
    "compatible_features": qcow2.COMPATIBLE_NAMES,
    "autoclear_features": qcow2.AUTOCLEAR_NAMES,
    "flags": directory.FLAG_NAMES,
}


def dump(path: str, *, with_hex: bool = False, force_share: bool = False) -> dict[str, Any]:
    """Dumps every structure, in the order of reading.

    Args:
        path: the image.
        with_hex: each structure also gets ``hex``, its bytes in hexadecimal.
        force_share: reads even while another process writes to the image.

    Returns:
        ``filename``, ``format`` (``unknown`` without the magic), ``file-size`` in bytes; ``structures``, a list of
        ``name``, ``offset``, ``length`` (bytes) and ``fields`` (``name``, ``offset``, ``length``, ``value``, and
        ``meaning`` if there is one) or, for tables, ``runs`` (``index``, ``count``, ``kind``, ``offset``);
        ``faults``, each with ``where`` and ``what``; ``stopped``, why nothing more could be read, or None.

    Raises:
        LockedError, StorageError: as for any reading.
    """
    with open_file(path) as file, locks.reading(file, force_share=force_share, locking=locks.UNLOCKED):
        layout = read_layout(file)
        steps = _Dump(file, layout, with_hex)
        stopped = None
        try:
            steps.all()
        except Error as error:
            stopped = str(error)
        if stopped is None and layout.faults:
            stopped = _stopped(layout)
        return {
            "filename": path,
            "format": FORMAT if probe(file) == FORMAT else "unknown",
            "file-size": layout.file_size,
            "structures": steps.structures,
            "faults": [{"where": fault.field, "what": fault.what} for fault in layout.faults],
            "stopped": stopped,
        }


def _stopped(layout: Layout) -> str | None:
    """The fault behind which nothing more could be followed, or None."""
    chain = layout.chain
    if chain is None or chain.fault or layout.undecided or (layout.valid and not layout.slots):
        fault = next((fault for fault in layout.faults if fault.field.startswith("bitmap")), layout.faults[0])
        return f"{fault.field}: {fault.what}"
    return None


class _Dump(Shown):
    def __init__(self, file: File, layout: Layout, with_hex: bool) -> None:
        super().__init__(with_hex, _FLAGS)
        self.file, self.layout = file, layout
        self.left, self.runs_left, self.hex_left = _MOST_TABLE_BYTES, _MOST_TABLE_RUNS, _MOST_TABLE_HEX

    def all(self) -> None:
        self.header()
        if self.layout.chain is None:
            return
        for extension in self.layout.chain.extensions:
            self.extension(extension)
        v2 = self.layout.header.v2
        if v2.backing_file_offset:
            raw = self.file.read(v2.backing_file_offset, min(v2.backing_file_size, qcow2.MAX_BACKING_NAME))
            name = text("name", v2.backing_file_offset, raw)
            self.add("backing file name", v2.backing_file_offset, raw, fields=[name])
        length = v2.refcount_table_clusters * self.layout.cluster_size
        self.table("refcount table", v2.refcount_table_offset, length, _POINTERS)
        self.table("L1 table", v2.l1_table_offset, v2.l1_size * qcow2.TABLE_ENTRY_SIZE, _POINTERS)
        self.snapshots()
        self.directory()

    def add(self, name: str, offset: int | None, raw: bytes, **content: Any) -> None:
        if len(self.structures) == _MOST_STRUCTURES:
            raise FormatError(self.layout.path, f"more than {_MOST_STRUCTURES} structures, the others are not shown")
        super().add(name, offset, raw, **content)

    def header(self) -> None:
        raw = self.file.read(0, qcow2.MORE_OFFSET + HEADER_MORE.size)
        self.record(HEADER_V2, 0, raw)
        if self.layout.header.version >= 3:
            self.record(HEADER_V3, qcow2.V3_OFFSET, raw[qcow2.V3_OFFSET :])
            if self.layout.header.length >= qcow2.MORE_OFFSET + HEADER_MORE.size:
                self.record(HEADER_MORE, qcow2.MORE_OFFSET, raw[qcow2.MORE_OFFSET :])

    def extension(self, extension: extensions.Extension) -> None:
        name = qcow2.EXTENSION_NAMES.get(extension.type, "unknown extension")
        head = EXTENSION_HEAD.build(type=extension.type, length=len(extension.data))
        fields = self.fields(EXTENSION_HEAD, extension.offset, head)
        fields[0]["meaning"] = name
        body, at = extension.data, extension.data_offset
        known: dict[int, AnyStructure] = {
            qcow2.EXTENSION_BITMAPS: BITMAPS_EXTENSION,
            qcow2.EXTENSION_CRYPTO: CRYPTO_EXTENSION,
        }
        structure = known.get(extension.type)
        if structure and len(body) == structure.size:
            fields += self.fields(structure, at, body)
        elif extension.type == qcow2.EXTENSION_NAMESPACE and len(body) >= (fixed := NAMESPACE_EXTENSION.size):
            fields += self.fields(NAMESPACE_EXTENSION, at, body[:fixed])
            fields.append(text("name", at + fixed, body[fixed:]))
        elif extension.type in (qcow2.EXTENSION_BACKING_FORMAT, qcow2.EXTENSION_DATA_FILE):
            fields.append(text("name", at, body))
        elif extension.type == qcow2.EXTENSION_FEATURE_NAMES:
            size = FEATURE_NAME.size
            for step in range(0, len(body) - size + 1, size):
                feature = FEATURE_NAME.parse(body, step)
                kind = {0: "incompatible", 1: "compatible", 2: "autoclear"}.get(feature.type, f"type {feature.type}")
                fields.append(text(f"{kind} bit {feature.bit}", at + step, feature.name.rstrip(b"\0"), size))
        else:
            fields.append(data("data", at, body))
        void = extension.type == qcow2.EXTENSION_BITMAPS and not self.layout.valid
        note = {"note": "void: the autoclear bit is clear"} if void else {}
        self.add(f"extension: {name}", extension.offset, head + body, fields=fields, **note)

    def table(self, name: str, offset: int, length: int, kinds: Sequence[str]) -> None:
        """Adds a table as runs of entries of one kind. A run of entries with offsets has adjacent clusters."""
        import numpy as np

        there = max(0, min(length, self.layout.file_size - offset))
        shown = min(there, self.left)
        self.left -= shown
        notes = [f"cut short by the end of the file: {there} of {length} bytes"] if there < length else []
        notes += [f"only the first {shown} bytes are looked at"] if shown < there else []
        starts: list[int] = []
        values: list[int] = []
        count = runs = 0
        most = min(MOST_RUNS, self.runs_left)
        before = np.empty(0, np.uint64)
        for at in range(offset, offset + shown, _READ):
            raw = self.file.read(at, min(_READ, offset + shown - at))
            entries = qcow2.table_view(raw[: len(raw) // 8 * 8]).astype(np.uint64)
            begins = np.flatnonzero(_begins(np.append(before, entries), self.layout.cluster_size)[len(before) :])
            kept = begins[: most - len(starts)]
            starts += (kept + count).tolist()
            values += entries[kept].tolist()
            runs += len(begins)
            count += len(entries)
            before = entries[-1:]
        ends = [*starts[1:], count]
        if runs > most:
            ends.pop()
            notes.append(f"{counted(runs - len(ends), 'more run')} not shown")
        self.runs_left -= len(ends)
        found = [
            {
                "index": start,
                "count": end - start,
                "kind": kinds[min(value, 2)],
                "offset": value & directory.TABLE_OFFSET_MASK,
            }
            for start, end, value in zip(starts, ends, values, strict=False)
        ]
        raw = self.file.read(offset, min(shown, self.hex_left) if self.with_hex else 0)
        self.hex_left -= len(raw)
        notes += [f"only the first {len(raw)} bytes in hexadecimal"] if self.with_hex and len(raw) < shown else []
        note = {"note": "; ".join(notes)} if notes else {}
        self.add(name, offset, raw, entries=count, runs=found, **note)
        self.structures[-1]["length"] = there

    def snapshots(self) -> None:
        for index, snapshot in enumerate(self.layout.snapshots):
            raw = self.file.read(snapshot.offset, snapshot.length)
            self.record(SNAPSHOT, snapshot.offset, raw, f"snapshot {index}")
            fixed = SNAPSHOT.parse(raw)
            at = SNAPSHOT.size + fixed.extra_data_size
            names = [("id", at, at + fixed.id_size), ("name", at + fixed.id_size, len(raw))]
            fields = [text(name, snapshot.offset + start, raw[start:end]) for name, start, end in names]
            self.structures[-1]["fields"] += fields

    def directory(self) -> None:
        for slot in self.layout.slots:
            entry = slot.entry
            raw = self.file.read(slot.offset, entry.packed_size)
            name = bitmap_label(entry.name)
            fields = self.fields(DIRECTORY_ENTRY, slot.offset, raw[: DIRECTORY_ENTRY.size])
            at = slot.offset + DIRECTORY_ENTRY.size
            if entry.extra_data:
                fields.append(data("extra_data", at, entry.extra_data))
            fields.append(text("name", at + len(entry.extra_data), entry.name))
            self.add(f"directory entry: {name}", slot.offset, raw, fields=fields)
            length = entry.table_size * directory.TABLE_ENTRY_SIZE
            if slot.table is None:
                self.structures[-1]["note"] = "its table is not to be believed"
            self.table(f"table: {name}", entry.table_offset, length, _CLUSTERS)


def _begins(entries: NDArray[np.uint64], cluster_size: int) -> NDArray[np.bool_]:
    """Which entries of a table begin a run: bool, one per entry."""
    import numpy as np

    begins = np.ones(len(entries), bool)
    kind, place = np.minimum(entries, 2), entries & np.uint64(directory.TABLE_OFFSET_MASK)
    begins[1:] = (kind[1:] != kind[:-1]) | (kind[1:] == 2) & (place[1:] != place[:-1] + np.uint64(cluster_size))
    return begins
