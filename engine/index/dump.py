"""Dumps every entry of an index, field by field, as far as it can be read.

``python -m dirtmap.engine.index.dump PATH [hex]`` reads the index, in a process of its own for the reason given in
`dirtmap.engine.index.walk`. Standard output gets lines of JSON: one per entry, then the reason why it stopped, or null.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from typing import Any, Final

from dirtmap.engine.index.database import entries, fault
from dirtmap.engine.index.trial import ending
from dirtmap.engine.model.dumping import MOST_RUNS, Shown, data, text
from dirtmap.engine.system.probe import INDEX, QCOW2, STORE
from dirtmap.fmt import directory, store
from dirtmap.fmt import index as layout
from dirtmap.fmt.errors import Error
from dirtmap.fmt.index import parse_bitmap, parse_namespaces
from dirtmap.fmt.parsers.index import BITMAP_VALUE, CONTAINER_VALUE, NAMESPACE_VALUE, SEEN_VALUE, STATE_VALUE
from dirtmap.fmt.parsers.store import AREA
from dirtmap.fmt.structure import AnyStructure

# An index has as many entries as a host has bitmaps; a hostile index may have any number.
_MOST_ENTRIES = 10_000
_MOST_BYTES = 1 << 24
_MOST_HEX = 1 << 22

_FLAGS = {"flags": directory.FLAG_NAMES}
# The kinds and conditions of containers, as SPEC.md numbers them, and the kinds of namespaces.
_CONTAINER: Final = {"kind": {1: QCOW2, 2: STORE, 3: "unknown"}, "condition": layout.CONDITION_NAMES}
_NAMESPACE: Final = {"kind": {**store.KIND_NAMES, store.KIND_CONTAINER: "container"}}
_FIXED: Final[dict[bytes, tuple[AnyStructure, dict[str, dict[int, str]]]]] = {
    layout.STATE: (STATE_VALUE, {}),
    layout.CONTAINER: (CONTAINER_VALUE, _CONTAINER),
    layout.SEEN: (SEEN_VALUE, {}),
}


def dump(folder: str, *, with_hex: bool = False) -> dict[str, Any]:
    """Dumps every entry in the order of the keys, as of one state of the database.

    Args:
        folder: of the database.
        with_hex: each entry also gets ``hex``, the bytes of its value, until 4 MiB of values are shown.

    Returns:
        As `dirtmap.engine.qcow2.dump.dump`, except that the ``offset`` of a structure is None, because LMDB does not
        tell where a value is. The offsets of fields are in bytes from the beginning of the value.

    Raises:
        StorageError: the folder holds anything but an index, or cannot be read.
    """
    document: dict[str, Any] = {"filename": folder, "format": INDEX}
    document["file-size"] = os.path.getsize(os.path.join(folder, "data.mdb"))
    document |= {"structures": [], "faults": [], "stopped": fault(folder)}
    if document["stopped"] is None:
        command = [sys.executable, "-m", "dirtmap.engine.index.dump", folder, *["hex"] * with_hex]
        done = subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL)
        lines = done.stdout.splitlines()
        document["stopped"] = ending(done) if done.returncode else json.loads(lines.pop())
        for line in lines:
            structure, faults = json.loads(line)
            document["structures"].append(structure)
            document["faults"] += faults
    return document


class _Dump(Shown):
    def __init__(self, with_hex: bool) -> None:
        super().__init__(with_hex, _FLAGS)
        self.faults: list[dict[str, str]] = []
        self.wants_hex, self.hex_left = with_hex, _MOST_HEX

    def entry(self, key: bytes, value: bytes) -> None:
        """Adds one entry. If its value is malformed, shows as many fields as it has, and the rest as data."""
        name = layout.key_text(key)
        if not layout.is_sound(key, value):
            self.faults.append({"where": name, "what": "its checksum is wrong"})
        contents = value[:-4]
        fields: list[dict[str, Any]] = []
        try:
            self.contents(fields, key[:1], contents)
        except layout.BadValueError as error:
            self.faults.append({"where": name, "what": str(error)})
        at = max((field["offset"] + field["length"] for field in fields), default=0)
        if at < len(contents):
            fields.append(data("data", at, contents[at:]))
        checksum = {"name": "entry_checksum", "offset": len(contents), "length": len(value) - len(contents)}
        fields.append({**checksum, "value": int.from_bytes(value[-4:], "little")})
        self.hex_left -= len(value)
        note = {"note": "its bytes are not shown: there are too many"} if self.wants_hex and self.hex_left < 0 else {}
        self.with_hex = self.wants_hex and not note
        self.add(name, None, value, fields=fields, **note)

    def contents(self, fields: list[dict[str, Any]], tag: bytes, contents: bytes) -> None:
        """Adds the fields of a value.

        Raises:
            BadValueError: the value ends too early, or its key has an unknown type.
        """
        if tag in _FIXED:
            structure, meanings = _FIXED[tag]
            fields += self.declared(structure, 0, contents, meanings)
            if len(contents) > structure.size:
                raise layout.BadValueError(f"{structure.name}: {len(contents)} bytes are not {structure.size}")
        elif tag == layout.PATH:
            fields.append(text("path", 0, contents))
        elif tag == layout.FOUND:
            fields.append(text("holder", 0, contents))
        elif tag == layout.IMAGE:
            fields.append(text("name", 0, contents))
        elif tag == layout.MEMBERS:
            fields += self.declared(AREA, 0, contents)
            self.namespaces(fields, AREA.size, contents)
        elif tag in (layout.NAME, layout.UUID, layout.ROOT, layout.OTHERS):
            self.namespaces(fields, 0, contents)
        elif tag == layout.BITMAP:
            self.bitmap(fields, contents)
        else:
            raise layout.BadValueError("nobody knows what this is")

    def declared(
        self, structure: AnyStructure, at: int, contents: bytes, meanings: dict[str, dict[int, str]] | None = None
    ) -> list[dict[str, Any]]:
        """The fields of a declared structure, with the meaning of some values."""
        raw = contents[at : at + structure.size]
        if len(raw) < structure.size:
            raise layout.BadValueError(f"{structure.name}: {len(raw)} bytes are not {structure.size}")
        fields = self.fields(structure, at, raw)
        for field in fields:
            if meaning := (meanings or {}).get(field["name"], {}).get(field["value"]):
                field["meaning"] = meaning
        return fields

    def namespaces(self, fields: list[dict[str, Any]], at: int, contents: bytes) -> None:
        parsed = parse_namespaces(contents[at:])
        for number, (_, member) in enumerate(itertools.islice(parsed, MOST_RUNS)):
            fields += _numbered(number, self.declared(NAMESPACE_VALUE, at, contents, _NAMESPACE))
            at += NAMESPACE_VALUE.size
            for name, part in (("name", member.name), ("path", member.path)):
                fields += _numbered(number, [text(name, at, part)])
                at += len(part)

    def bitmap(self, fields: list[dict[str, Any]], contents: bytes) -> None:
        name, claims = parse_bitmap(contents)
        at, size = 0, BITMAP_VALUE.size
        for number in range(min(len(claims), MOST_RUNS)):
            fields += _numbered(number, self.declared(BITMAP_VALUE, at, contents))
            at += size
        at = len(claims) * size
        fields.append(text("name", at, name))
        fields.append({"name": "name_size", "offset": at + len(name), "length": 2, "value": len(name)})


def _numbered(number: int, fields: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**field, "name": f"[{number}].{field['name']}"} for field in fields]


def main() -> int:
    """Runs the command."""
    shown = _Dump(with_hex=sys.argv[2:] == ["hex"])
    stopped, left = None, _MOST_BYTES
    try:
        for number, (key, value) in enumerate(entries(sys.argv[1])):
            left -= len(value)
            if number == _MOST_ENTRIES or left < 0:
                stopped = f"more than {number} entries, the others are not shown"
                break
            shown.entry(key, bytes(value))
            # Prints at once, because the next entry may kill this process.
            print(json.dumps([shown.structures.pop(), shown.faults]), flush=True)
            shown.faults.clear()
    except Error as error:
        stopped = error.what
    print(json.dumps(stopped))
    return 0


if __name__ == "__main__":
    sys.exit(main())
