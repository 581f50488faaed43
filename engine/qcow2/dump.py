"""Shows every structure of a qcow2 image that concerns bitmaps, field by field, as far as it can be read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from dirtmap.engine import locks
from dirtmap.engine.fileio import File, open_file
from dirtmap.engine.qcow2.image import FORMAT
from dirtmap.engine.qcow2.layout import Layout, bitmap_label, read_layout
from dirtmap.fmt import directory, extensions, qcow2
from dirtmap.fmt.errors import Error
from dirtmap.fmt.geometry import align_up
from dirtmap.fmt.structure import Structure

_MOST_RUNS = 4096  # of one table; a hostile table could have millions

_FEATURES = {
    "incompatible_features": qcow2.INCOMPATIBLE_NAMES,
    "compatible_features": qcow2.COMPATIBLE_NAMES,
    "autoclear_features": qcow2.AUTOCLEAR_NAMES,
    "flags": directory.FLAG_NAMES,
}


def dump(path: str, *, with_hex: bool = False, force_share: bool = False) -> dict[str, Any]:
    """Every structure, in the order of reading.

    Args:
        path: the image.
        with_hex: each structure also gets ``hex``, its bytes.
        force_share: read although another process writes to it.

    Returns:
        ``filename``, ``format``, ``file-size``; ``structures``: a list of ``name``, ``offset``, ``length`` (bytes) and
        ``fields`` (``name``, ``offset``, ``length``, ``value``, and ``meaning`` where there is one) or, for tables,
        ``runs`` (``index``, ``count``, ``kind``, ``offset``); ``faults``: ``where`` and ``what``; ``stopped``: why
        nothing more could be read, or None.

    Raises:
        LockedError, StorageError: as for any reading.
    """
    with open_file(path) as file, locks.reading(file, force_share=force_share):
        layout = read_layout(file)
        steps = _Dump(file, layout, with_hex)
        stopped = None
        try:
            steps.all()
        except Error as error:
            stopped = str(error)
        if layout.chain is None or layout.chain.fault or layout.undecided:
            stopped = stopped or (f"{layout.faults[0].field}: {layout.faults[0].what}" if layout.faults else None)
        return {
            "filename": path,
            "format": FORMAT,
            "file-size": layout.file_size,
            "structures": steps.structures,
            "faults": [{"where": fault.field, "what": fault.what} for fault in layout.faults],
            "stopped": stopped,
        }


class _Dump:
    def __init__(self, file: File, layout: Layout, with_hex: bool) -> None:
        self.file, self.layout, self.with_hex = file, layout, with_hex
        self.structures: list[dict[str, Any]] = []

    def all(self) -> None:
        self.header()
        if self.layout.chain is None:
            return
        for extension in self.layout.chain.extensions:
            self.extension(extension)
        v2 = self.layout.header.v2
        if v2.backing_file_offset:
            raw = self.file.read(v2.backing_file_offset, v2.backing_file_size)
            self.add(
                "backing file name",
                v2.backing_file_offset,
                raw,
                fields=[_text("name", v2.backing_file_offset, raw)],
            )
        self.table(
            "refcount table",
            v2.refcount_table_offset,
            v2.refcount_table_clusters * self.layout.cluster_size,
            _plain_runs,
        )
        self.table("L1 table", v2.l1_table_offset, v2.l1_size * qcow2.TABLE_ENTRY_SIZE, _plain_runs)
        self.snapshots()
        if self.layout.pointer:
            self.directory()

    def add(self, name: str, offset: int, raw: bytes, **content: Any) -> None:
        structure = {"name": name, "offset": int(offset), "length": len(raw), **content}
        if self.with_hex:
            structure["hex"] = raw.hex()
        self.structures.append(structure)

    def record(self, structure: Structure, offset: int, raw: bytes, name: str | None = None) -> None:
        """One declared structure, field by field."""
        raw = raw[: structure.size]
        if len(raw) < structure.size:
            self.add(name or structure.name, offset, raw, fields=[], note="cut short by the end of the file")
            return
        self.add(name or structure.name, offset, raw, fields=_fields(structure, offset, raw))

    def header(self) -> None:
        raw = self.file.read(0, qcow2.MORE_OFFSET + qcow2.HEADER_MORE.size)
        self.record(qcow2.HEADER_V2, 0, raw)
        if self.layout.header.version >= 3:
            self.record(qcow2.HEADER_V3, qcow2.V3_OFFSET, raw[qcow2.V3_OFFSET :])
            if self.layout.header.length >= qcow2.MORE_OFFSET + qcow2.HEADER_MORE.size:
                self.record(qcow2.HEADER_MORE, qcow2.MORE_OFFSET, raw[qcow2.MORE_OFFSET :])

    def extension(self, extension: extensions.Extension) -> None:
        name = qcow2.EXTENSION_NAMES.get(extension.type, "unknown extension")
        head = extensions.EXTENSION_HEAD.build(type=extension.type, length=len(extension.data))
        fields = _fields(extensions.EXTENSION_HEAD, extension.offset, head)
        fields[0]["meaning"] = name
        data, at = extension.data, extension.data_offset
        known = {
            qcow2.EXTENSION_BITMAPS: qcow2.BITMAPS_EXTENSION,
            qcow2.EXTENSION_CRYPTO: qcow2.CRYPTO_EXTENSION,
        }
        structure = known.get(extension.type)
        if structure and len(data) == structure.size:
            fields += _fields(structure, at, data)
        elif extension.type in (qcow2.EXTENSION_BACKING_FORMAT, qcow2.EXTENSION_DATA_FILE):
            fields.append(_text("name", at, data))
        elif extension.type == qcow2.EXTENSION_FEATURE_NAMES:
            size = qcow2.FEATURE_NAME.size
            for step in range(0, len(data) - size + 1, size):
                feature = qcow2.FEATURE_NAME.parse(data, step)
                kind = {0: "incompatible", 1: "compatible", 2: "autoclear"}.get(feature.type, f"type {feature.type}")
                fields.append(_text(f"{kind} bit {feature.bit}", at + step, feature.name.rstrip(b"\0"), size))
        else:
            fields.append({"name": "data", "offset": at, "length": len(data), "value": data[:64].hex()})
        void = extension.type == qcow2.EXTENSION_BITMAPS and not self.layout.valid
        note = {"note": "void: the autoclear bit is clear"} if void else {}
        self.add(f"extension: {name}", extension.offset, head + data, fields=fields, **note)

    def table(self, name: str, offset: int, length: int, runs: Any) -> None:
        raw = self.file.read(offset, length)
        short = {"note": f"cut short by the end of the file: {len(raw)} of {length} bytes"} if len(raw) < length else {}
        entries = directory.parse_table(raw[: len(raw) // 8 * 8])
        found = runs(entries, self.layout.cluster_size)
        if len(found) > _MOST_RUNS:
            short["note"] = f"{len(found) - _MOST_RUNS} more runs not shown"
        self.add(name, offset, raw, entries=len(entries), runs=found[:_MOST_RUNS], **short)

    def snapshots(self) -> None:
        at = self.layout.header.v2.snapshots_offset
        for index in range(self.layout.header.v2.nb_snapshots):
            raw = self.file.read(at, qcow2.SNAPSHOT.size)
            self.record(qcow2.SNAPSHOT, at, raw, f"snapshot {index}")
            if len(raw) < qcow2.SNAPSHOT.size:
                return
            snapshot = qcow2.SNAPSHOT.parse(raw)
            names = at + qcow2.SNAPSHOT.size + snapshot.extra_data_size
            text = self.file.read(names, snapshot.id_size + snapshot.name_size)
            self.structures[-1]["fields"] += [
                _text("id", names, text[: snapshot.id_size]),
                _text("name", names + snapshot.id_size, text[snapshot.id_size :]),
            ]
            at = align_up(names + snapshot.id_size + snapshot.name_size, 8)

    def directory(self) -> None:
        for slot in self.layout.slots:
            entry = slot.entry
            raw = self.file.read(slot.offset, entry.packed_size)
            name = bitmap_label(entry.name)
            fields = _fields(directory.DIRECTORY_ENTRY, slot.offset, raw[: directory.DIRECTORY_ENTRY.size])
            at = slot.offset + directory.DIRECTORY_ENTRY.size
            if entry.extra_data:
                value = entry.extra_data[:64].hex()
                fields.append({"name": "extra_data", "offset": at, "length": len(entry.extra_data), "value": value})
            fields.append(_text("name", at + len(entry.extra_data), entry.name))
            self.add(f"directory entry: {name}", slot.offset, raw, fields=fields)
            if slot.table is not None:
                self.table(f"table: {name}", entry.table_offset, len(slot.table), _bitmap_runs)
            else:
                self.structures[-1]["note"] = "its table cannot be read"


def _fields(structure: Structure, offset: int, raw: bytes) -> list[dict[str, Any]]:
    values = structure.parse(raw)
    fields = []
    for field in structure.fields:
        value = values[field.name]
        shown = {"name": field.name, "offset": int(offset) + field.offset, "length": field.size}
        shown["value"] = value.hex() if isinstance(value, bytes) else value
        if field.name in _FEATURES and value:
            shown["meaning"] = ", ".join(qcow2.feature_text(value, _FEATURES[field.name]))
        elif field.name.endswith("_bits") and value < 64:
            shown["meaning"] = f"{1 << value} bytes"
        elif field.name == "refcount_order" and value < 8:
            shown["meaning"] = f"{1 << value} bits"
        fields.append(shown)
    return fields


def _text(name: str, offset: int, raw: bytes, length: int | None = None) -> dict[str, Any]:
    value = raw.decode("utf-8", "backslashreplace")
    return {
        "name": name,
        "offset": int(offset),
        "length": len(raw) if length is None else length,
        "value": value,
    }


def _bitmap_runs(entries: Sequence[int], cluster_size: int) -> list[dict[str, Any]]:
    def kind(raw: int) -> str:
        return "zeros" if raw == 0 else "ones" if raw == directory.TABLE_ALL_ONES else "data"

    return _runs(((kind(raw), raw & directory.TABLE_OFFSET_MASK) for raw in entries), cluster_size)


def _plain_runs(entries: Sequence[int], cluster_size: int) -> list[dict[str, Any]]:
    return _runs((("data" if raw else "none", raw & qcow2.OFFSET_MASK) for raw in entries), cluster_size)


def _runs(entries: Iterable[tuple[str, int]], cluster_size: int) -> list[dict[str, Any]]:
    """Neighbouring entries of one kind; those with an offset only where their clusters are neighbours, too."""
    runs: list[dict[str, Any]] = []
    for index, (kind, offset) in enumerate(entries):
        last = runs[-1] if runs else None
        expected = last["offset"] + last["count"] * cluster_size if last and last["offset"] else 0
        if last and last["kind"] == kind and (offset == expected if offset else not last["offset"]):
            last["count"] += 1
        elif len(runs) > _MOST_RUNS + 1:
            runs[-1]["count"] += 1  # counted, not shown
        else:
            runs.append({"index": index, "count": 1, "kind": kind, "offset": offset})
    return runs
