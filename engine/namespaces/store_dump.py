"""Dumps every structure of a store, field by field, as far as it can be read."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from dirtmap.engine.model.dumping import MOST_RUNS, Shown, data, text
from dirtmap.engine.model.naming import decode_name, label
from dirtmap.engine.namespaces.condition import Condition
from dirtmap.engine.storefile import chunks
from dirtmap.engine.storefile import header as headers
from dirtmap.engine.storefile.entries import tree_of
from dirtmap.engine.storefile.file import FORMAT, Snapshot, Store
from dirtmap.engine.storefile.session import require_known
from dirtmap.engine.storefile.table import Node
from dirtmap.engine.system.file import File, open_file
from dirtmap.fmt import directory, live, store
from dirtmap.fmt.digest import crc32c
from dirtmap.fmt.directory import Entry, parse_entries
from dirtmap.fmt.errors import FormatError, UnsupportedError, counted
from dirtmap.fmt.extensions import build_extension, parse_chain
from dirtmap.fmt.parsers.directory import DIRECTORY_ENTRY
from dirtmap.fmt.parsers.extensions import EXTENSION_HEAD
from dirtmap.fmt.parsers.live import CHECKPOINT_NAME, CHECKPOINT_TIME, CHECKPOINT_TIMES, PEER, SESSION, WINDOW
from dirtmap.fmt.parsers.store import (
    AREA,
    BITS,
    CHECKSUM,
    FILE_IDENTITY,
    HEADER,
    HOLD,
    IDENTITY,
    LEAF,
    NAMESPACES_EXTENSION,
    NODE_POINTER,
    OWNER,
    PLACE_EXTENSION,
    POINTER,
    RECORD,
    RUN,
)
from dirtmap.fmt.store import Area, Record, item_faults, parse_record, split_records
from dirtmap.fmt.structure import AnyStructure

_MOST_HEX = 1 << 20  # bytes of one bitmap's bits
_MOST_BAD_ENTRIES = 100  # in one directory; with so many it is not a directory

_FLAGS: dict[str, dict[int, str]] = {
    "incompatible_features": {store.INCOMPATIBLE_SESSION: "a session is open"},
    "read_only_compatible_features": {},
    "compatible_features": {},
    "autoclear_features": {},
    "flags": directory.FLAG_NAMES,
}
_EXTENSIONS: dict[int, AnyStructure] = {
    store.EXTENSION_NAMESPACES: NAMESPACES_EXTENSION,
    store.EXTENSION_SPACE: AREA,
    store.EXTENSION_RELEASED: AREA,
    store.EXTENSION_PLACE: PLACE_EXTENSION,
}

# The structure of each extension of a record, and the texts behind it with the fields that have their lengths.
_RECORD_EXTENSIONS: dict[int, tuple[AnyStructure, dict[str, str]]] = {
    store.EXTENSION_HOLD: (HOLD, {"bitmap": "name_size", "owner": "owner_size"}),
    store.EXTENSION_SESSION: (SESSION, {"live": "live_size", "log_path": "log_size"}),
    store.EXTENSION_PEER: (PEER, {"name": "name_size", "store": "store_size"}),
    store.EXTENSION_CHECKPOINT_TIMES: (CHECKPOINT_TIMES, {}),
}
_ITEMS: dict[int, AnyStructure] = {store.ITEM_BITS: BITS, store.ITEM_WINDOW: WINDOW, store.ITEM_IDENTITY: IDENTITY}
_RECORD_EXTENSION_NAMES = {
    **{kind: structure.name for kind, (structure, _) in _RECORD_EXTENSIONS.items()},
    store.EXTENSION_CHECKPOINTS: "checkpoints",
}


def dump(path: str, *, with_hex: bool = False) -> dict[str, Any]:
    """Dumps every structure in the order of reading, as of one commit.

    Shows an area whose checksum is wrong, too, as far as it makes sense.

    Args:
        path: the store.
        with_hex: each structure also gets ``hex``, its bytes; for the bits of a bitmap, the first MiB.

    Returns:
        As `dirtmap.engine.qcow2.dump.dump`.

    Raises:
        LockedError, StorageError: as for any reading.
    """
    try:
        with Store(path) as target:
            return target.read(lambda snapshot: _Dump(snapshot.file, snapshot, with_hex).document(None))
    except (FormatError, UnsupportedError) as error:
        with open_file(path) as file:
            return _Dump(file, None, with_hex).document(str(error))


class _Dump(Shown):
    """Collects what one commit shows. If no header counts, ``snapshot`` is None, and only the header copies show."""

    def __init__(self, file: File, snapshot: Snapshot | None, with_hex: bool) -> None:
        super().__init__(with_hex, _FLAGS)
        self.file, self.size = file, file.size()
        self.faults: list[dict[str, str]] = []
        self.stopped: str | None = None
        self.shown: set[int] = set()  # offsets of the areas shown so far
        self.pointers = 0  # of nodes, shown so far
        self.copies(snapshot)
        if snapshot is not None:
            self.namespaces(snapshot)
            self.space(snapshot)

    def document(self, stopped: str | None) -> dict[str, Any]:
        return {
            "filename": self.file.path,
            "format": FORMAT,
            "file-size": self.size,
            "structures": self.structures,
            "faults": self.faults,
            "stopped": stopped or self.stopped,
        }

    def fault(self, where: str, what: str) -> None:
        self.faults.append({"where": where, "what": what})

    def note(self, what: str) -> None:
        """Adds a remark to the structure that was added last."""
        last = self.structures[-1]
        last["note"] = f"{last['note']}; {what}" if "note" in last else what

    def area(self, snapshot: Snapshot, area: Area, what: str, most: int = store.MAX_METADATA_BYTES) -> bytes | None:
        """The bytes of an area, even if its checksum is wrong; None if it cannot be read, or has more than ``most``."""
        try:
            snapshot.check_area(area, what, most)
            if area.length and area.offset in self.shown:
                raise FormatError(f"{self.file.path}: {what}.offset", "another area begins there, too")
        except FormatError as error:
            where = error.where.removeprefix(f"{self.file.path}: ")
            self.fault(where, error.what)
            self.stopped = self.stopped or f"{where}: {error.what}"
            return None
        if not area.length:
            return b""
        self.shown.add(area.offset)
        raw = self.file.read(area.offset, area.length)
        if raw and crc32c(raw) != area.checksum:
            snapshot.doubted = True
            self.fault(f"{what} at {area.offset:#x}", "its checksum is wrong")
        return raw

    # The headers.

    def copies(self, snapshot: Snapshot | None) -> None:
        for number in range(store.RESERVED // store.BLOCK):
            start = number * store.BLOCK
            block = self.file.read(start, store.BLOCK)
            name = f"header copy {number} (slot {'AB'[number % 2]})"
            self.record(HEADER, start, block, name)
            if len(block) < store.BLOCK:
                self.fault(name, "the file ends before its end")
                continue
            at = store.BLOCK - CHECKSUM.size
            self.structures[-1]["fields"] += self.fields(CHECKSUM, start + at, block[at:])
            if not headers.is_whole(block, number):
                self.note("damaged")
                self.fault(name, "damaged: its magic, its place or its checksum is wrong")
            elif snapshot and headers.parse_block(self.file.path, block).generation == snapshot.header.generation:
                self.note("it counts")
            self.chain(name, start, block)
        if snapshot and snapshot.chosen.in_doubt:
            self.fault("header", "perhaps not the newest: every bitmap counts as all dirty")

    def chain(self, name: str, start: int, block: bytes) -> None:
        chain = parse_chain(block, HEADER.parse(block).header_length, len(block) - CHECKSUM.size)
        for extension in chain.extensions:
            kind = store.EXTENSION_NAMES.get(extension.type, "unknown")
            head = EXTENSION_HEAD.build(type=extension.type, length=len(extension.data))
            fields = self.fields(EXTENSION_HEAD, start + extension.offset, head)
            fields[0]["meaning"] = kind
            structure = _EXTENSIONS.get(extension.type)
            at = start + extension.data_offset
            if structure and len(extension.data) == structure.size:
                fields += self.fields(structure, at, extension.data)
            elif extension.type == store.EXTENSION_WRITER:
                fields.append(text("writer", at, extension.data))
            else:
                fields.append(data("data", at, extension.data))
            self.add(f"{name}, extension: {kind}", start + extension.offset, head + extension.data, fields=fields)
        if chain.fault:
            self.fault(f"{name}, extensions", chain.fault)

    # What they lead to.

    def namespaces(self, snapshot: Snapshot) -> None:
        count = self.node(snapshot, snapshot.table().root)
        if count != snapshot.header.namespaces:
            self.fault("namespaces extension.namespaces", f"{snapshot.header.namespaces}, but {count} can be read")

    def node(self, snapshot: Snapshot, node: Node) -> int:
        """Adds a node of the namespace table, and all that it leads to. Returns the number of records below it."""
        raw = self.area(snapshot, node.area, node.what, store.MAX_NODE_BYTES)
        if not raw:
            return 0
        if not node.level:
            return self.leaf_node(snapshot, node, raw)
        fields, children = [], []
        size = NODE_POINTER.size
        for number, at in enumerate(range(0, len(raw) // size * size, size)):
            for field in self.fields(NODE_POINTER, node.offset + at, raw[at : at + size]):
                fields.append({**field, "name": f"[{number}].{field['name']}"})
            children.append(NODE_POINTER.unpack(raw, at))
        self.add(node.what, node.offset, raw, entries=len(children), fields=fields)
        if len(raw) % size:
            self.fault(node.what, f"{len(raw)} bytes are not an array of pointers")
        count = 0
        for number, child in enumerate(children):
            end = children[number + 1][0] if number + 1 < len(children) else node.end
            if not node.key <= child[0] < end <= node.end:
                self.fault(node.what, f"the key {child[0]:08x} is out of order")
            count += self.node(snapshot, Node(node.level - 1, end, *child))
        return count

    def leaf_node(self, snapshot: Snapshot, node: Node, raw: bytes) -> int:
        """Adds the records of a leaf, and all that each leads to. Returns their number."""
        self.add(node.what, node.offset, raw)
        count, at, last = 0, 0, (node.key, b"")
        try:
            for name, packed in split_records(raw):
                this = store.name_key(name), name
                if not last < this or this[0] >= node.end:
                    self.fault(node.what, f"{store.namespace_label(name)} is out of order")
                self.namespace(snapshot, parse_record(packed), node.offset + at, packed)
                count, at, last = count + 1, at + len(packed), this
        except ValueError as error:
            self.fault(node.what, str(error))
        return count

    def namespace(self, snapshot: Snapshot, record: Record, offset: int, raw: bytes) -> None:
        where = record.label
        fields = self.with_image(RECORD, offset, raw[: RECORD.size])
        for field in fields:
            if field["name"] == "kind":
                field["meaning"] = store.KIND_NAMES.get(record.kind, "unknown")
        at = offset + RECORD.size
        fields += [text("name", at, record.name), text("path", at + len(record.name), record.path)]
        first = offset + len(raw) - sum(len(build_extension(*item)) for item in record.extensions)
        for kind, contents in record.extensions:
            fields += self.fields(EXTENSION_HEAD, first, build_extension(kind, contents))
            fields[-2]["meaning"] = _RECORD_EXTENSION_NAMES.get(kind, "unknown")
            fields += self.extension(kind, first + EXTENSION_HEAD.size, contents)
            first += len(build_extension(kind, contents))
        self.add(f"namespace record: {where}", offset, raw, fields=fields)
        faults = list(store.record_faults(record))
        for field_name, what in faults:
            self.fault(f"{where}.{field_name}", what)
        if faults:
            return
        try:
            require_known(self.file.path, record)
        except UnsupportedError as error:
            self.fault(where, error.what)
            return
        if doubt := Condition(snapshot, record).doubt:
            self.note(f"counts as all dirty: {doubt}")
        area, count, bad = record.directory, 0, 0
        cluster = snapshot.header.cluster_size
        if whole := self.area(snapshot, area, f"directory of {where}"):
            self.record(OWNER, area.offset, whole, f"directory owner: {where}")
            if not store.belongs_to(whole, record.name, cluster):
                self.fault(f"directory of {where}", "it, or a part of it, is the directory of another namespace")
            entries = store.without_owner(whole, cluster)
            try:
                for at, entry in parse_entries(entries):
                    end = at + entry.packed_size
                    first, last = (store.place_in_directory(byte, cluster) for byte in (at, end - 1))
                    in_file = whole[first : last + 1]
                    bad += not self.entry(snapshot, record, entry, at, entries[at:end], in_file)
                    count += 1
                    if count > record.nb_bitmaps or bad > _MOST_BAD_ENTRIES:
                        break
            except directory.BrokenEntryError as error:
                at = area.offset + store.place_in_directory(error.offset, cluster)
                self.fault(f"directory of {where} at {at:#x}", str(error))
        if count != record.nb_bitmaps:
            self.fault(f"{where}.nb_bitmaps", f"{record.nb_bitmaps}, but the directory has another number")

    def with_image(self, structure: AnyStructure, offset: int, raw: bytes) -> list[dict[str, Any]]:
        """As `fields`; what the image looked like is shown number by number."""
        fields = []
        for field in self.fields(structure, offset, raw):
            if field["name"] == "image":
                at = field["offset"] - offset
                for part in self.fields(FILE_IDENTITY, field["offset"], raw[at : at + FILE_IDENTITY.size]):
                    fields.append({**part, "name": f"image.{part['name']}"})
            else:
                fields.append(field)
        return fields

    def extension(self, kind: int, offset: int, contents: bytes) -> list[dict[str, Any]]:
        """The fields of a record's extension; bytes without a declared structure are shown as data."""
        fields: list[dict[str, Any]] = []
        at = 0
        if kind == store.EXTENSION_CHECKPOINTS:
            number, size = 0, CHECKPOINT_NAME.size
            while at + size <= len(contents):
                raw = contents[at : at + size]
                end = at + size + CHECKPOINT_NAME.parse(raw).length
                if end > len(contents):
                    break
                for field in self.fields(CHECKPOINT_NAME, offset + at, raw):
                    fields.append({**field, "name": f"[{number}].{field['name']}"})
                fields.append(text(f"[{number}].name", offset + at + size, contents[at + size : end]))
                number, at = number + 1, end
        structure, texts = _RECORD_EXTENSIONS.get(kind, (None, {}))
        if structure and len(contents) >= structure.size:
            at = structure.size
            fields += self.with_image(structure, offset, contents[:at])
            for name, size_field in texts.items():
                part = contents[at : at + getattr(structure.parse(contents), size_field)]
                fields.append(text(name, offset + at, part))
                at += len(part)
        if kind == store.EXTENSION_CHECKPOINT_TIMES and structure:
            size = CHECKPOINT_TIME.size
            for number, start in enumerate(range(structure.size, len(contents) - size + 1, size)):
                for field in self.fields(CHECKPOINT_TIME, offset + start, contents[start : start + size]):
                    fields.append({**field, "name": f"[{number}].{field['name']}"})
                at = start + size
        if at < len(contents):
            fields.append(data("data", offset + at, contents[at:]))
        return fields

    def entry(self, snapshot: Snapshot, record: Record, entry: Entry, start: int, raw: bytes, in_file: bytes) -> bool:
        """Adds an entry and its bits.

        Args:
            snapshot: of the store.
            record: of the namespace.
            entry: as it was parsed.
            start: where it begins in the bytes of all entries.
            raw: its bytes.
            in_file: the same as they are in the file, with an owner in their midst where they go on in another cluster.

        Returns:
            False if the entry breaks a rule of the format.
        """
        where = f"{record.label}, {label(decode_name(entry.name))}"
        fields = self.fields(DIRECTORY_ENTRY, start, raw[: DIRECTORY_ENTRY.size])
        meaning = {store.ALL_ZEROS: "all zeros", store.ALL_ONES: "all ones"}.get(entry.table_offset)
        if meaning:
            fields[0]["meaning"] = meaning
        at = start + DIRECTORY_ENTRY.size
        fields += self.items(at, entry.extra_data)
        fields.append(text("name", at + len(entry.extra_data), entry.name))
        first, cluster = record.directory.offset, snapshot.header.cluster_size
        for field in fields:
            field["offset"] = first + store.place_in_directory(field["offset"], cluster)
        self.add(f"directory entry: {where}", first + store.place_in_directory(start, cluster), in_file, fields=fields)
        faults = list(store.entry_faults(entry, record.size, snapshot.header.cluster_size, snapshot.size))
        faults += item_faults(entry)
        for field_name, what in faults:
            self.fault(f"{where}.{field_name}", what)
        if not faults and not meaning:
            self.bits(snapshot, record, entry, where)
        return not faults

    def items(self, offset: int, extra: bytes) -> list[dict[str, Any]]:
        """The fields of the items in an entry's extra data; what makes no sense is shown as data."""
        chain = parse_chain(extra, 0, len(extra))
        fields: list[dict[str, Any]] = []
        for item in chain.extensions:
            structure = _ITEMS.get(item.type)
            head = extra[item.offset : item.data_offset]
            fields += self.fields(EXTENSION_HEAD, offset + item.offset, head)
            fields[-2]["meaning"] = structure.name if structure else "unknown"
            at, raw = offset + item.data_offset, item.data
            if structure and len(raw) >= structure.size:
                found = self.fields(structure, at, raw[: structure.size])
                if structure is WINDOW:
                    found[2]["meaning"] = "busy" if found[2]["value"] & live.WINDOW_BUSY else ""
                fields += found
                at, raw = at + structure.size, raw[structure.size :]
            if raw:
                fields.append(data("data", at, raw))
        if chain.end < len(extra):
            fields.append(data("extra_data", offset + chain.end, extra[chain.end :]))
        return fields

    def bits(self, snapshot: Snapshot, record: Record, entry: Entry, where: str) -> None:
        """Adds the nodes and the chunks of a bitmap's bits; chunks that are adjacent in the file as one structure."""
        if entry.table_offset in self.shown:
            self.fault(f"{where}.table_offset", "another area begins there, too")
            return
        self.shown.add(entry.table_offset)
        cluster = snapshot.header.cluster_size
        found = chunks.verify(snapshot, tree_of(record, entry))
        for (level, number), place in found.at.items():
            raw = self.file.read(place, cluster)
            fields: list[dict[str, Any]] = []
            for at in range(0, len(raw), POINTER.size):
                pointer = raw[at : at + POINTER.size]
                if any(pointer) and self.pointers < MOST_RUNS:
                    self.pointers += 1
                    for field in self.fields(POINTER, place + at, pointer):
                        fields.append({**field, "name": f"[{at // POINTER.size}].{field['name']}"})
            self.add(f"node {number} of level {level} of the bits: {where}", place, raw, fields=fields)
        for area in chunks.clusters_of_chunks(found):
            self.add(f"bits: {where}", area.offset, self.file.read(area.offset, min(area.length, _MOST_HEX)))
            self.structures[-1]["length"] = area.length
        for _, _, place in found.damaged:
            self.fault(f"{where} at {place:#x}", "its checksum is wrong, or nothing can be there")

    def space(self, snapshot: Snapshot) -> None:
        area = snapshot.header.space
        if raw := self.area(snapshot, area, "space map"):
            leaves = [LEAF.parse(raw, at) for at in range(0, len(raw), LEAF.size)[:MOST_RUNS]]
            fields = []
            for index in range(len(leaves)):
                at = index * LEAF.size
                for field in self.fields(LEAF, area.offset + at, raw[at : at + LEAF.size]):
                    fields.append({**field, "name": f"[{index}].{field['name']}"})
            entries = len(raw) // LEAF.size
            self.add("space map", area.offset, raw, entries=entries, fields=fields)
            if entries > len(leaves):
                self.note(f"{counted(entries - len(leaves), 'more leaf', 'more leaves')} not shown")
            for index, leaf in enumerate(leaves):
                self.leaf(snapshot, Area(leaf.offset, snapshot.header.cluster_size, leaf.checksum), index)
        area = snapshot.header.released
        if raw := self.area(snapshot, area, "released clusters"):
            cluster = snapshot.header.cluster_size
            numbers = directory.parse_table(raw)
            pairs = list(zip(numbers[: 2 * MOST_RUNS : 2], numbers[1 : 2 * MOST_RUNS : 2], strict=True))
            found = [
                {"index": index, "count": count, "kind": "released", "offset": first * cluster}
                for index, (first, count) in enumerate(pairs)
            ]
            self.add("released clusters", area.offset, raw, entries=len(raw) // RUN.size, runs=found)
            if len(numbers) > 2 * len(pairs):
                self.note(f"{counted(len(numbers) // 2 - len(pairs), 'more run')} not shown")

    def leaf(self, snapshot: Snapshot, area: Area, index: int) -> None:
        raw = self.area(snapshot, area, f"space map leaf {index}")
        if raw is None:
            return
        cluster = snapshot.header.cluster_size
        per_leaf = store.leaf_clusters(cluster)
        used = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little", count=per_leaf)
        edges = np.flatnonzero(np.diff(used, prepend=1 - used[:1], append=1 - used[-1:]))
        found = [
            {
                "index": int(start),
                "count": int(end - start),
                "kind": "used" if used[start] else "free",
                "offset": (index * per_leaf + int(start)) * cluster,
            }
            for start, end in pairwise(edges[: MOST_RUNS + 1])
        ]
        self.add(f"space map leaf {index}", area.offset, raw, entries=len(used), runs=found)
        if len(edges) - 1 > len(found):
            self.note(f"{counted(len(edges) - 1 - len(found), 'more run')} not shown")
